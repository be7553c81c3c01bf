"""What the kinds of adapter share: the settings of a layer, dropout, the layer's own operation."""

from __future__ import annotations

import copy
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.errors import UserError
from lora_core.kernels import call
from lora_core.kernels.reference import Drop, wide_dtype

BaseLayer = nn.Linear | nn.Conv2d
INPUTS_AT_ONCE = 1024  # rows of the identity in one call: a layer may have 15360 inputs


@dataclass(frozen=True)
class LayerSpec:
    """Settings of one layer's adapter: an AdapterSpec resolved for the layer's path."""

    path: str
    rank: int
    scale: float  # factor of the update: delta W = scale * up @ down
    dropout: float = 0.0
    init: str = "gaussian"  # or "kaiming"; "zero" where a file's factors follow
    seed: int = 0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    norm_grad: str = "detach"  # or "full": a DoRA's gradient flows through its row norms too
    factor: int = -1  # of a LoKr: the size of w1 at most; -1: as square as possible
    shared: nn.Module | None = field(default=None, compare=False, repr=False)  # see kinds.py


class FullPrecisionModule(nn.Module):
    """A module whose parameters stay fp32 or better whatever the model is cast to.

    model.half() or model.to(bfloat16) moves them and leaves them fp32: in bf16 an update of 1e-4
    on 0.05 would round to nothing.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_wide(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == wide_dtype(new.dtype) else tensor.to(new.device)

        return super()._apply(keep_wide, recurse)


class Adapter(FullPrecisionModule):
    """An adapter whose `update` is written, and whose other methods follow from it.

    For an update that is proportional to the strength, and linear (or affine) in x, unless the
    class says `is_linear = False`. Its weight is what it does to each input by itself; a Conv2d,
    whose inputs are windows, needs `delta_weight` (and `delta_bias`) of its own.
    """

    is_linear = True

    def update(self, base: BaseLayer, x: Tensor, y0: Tensor, strength: float) -> Tensor:
        """The addition to y0 = base(x), in its shape."""
        raise NotImplementedError(f"{type(self).__name__} has no update(base, x, y0, strength)")

    def forward(self, base: BaseLayer, x: Tensor, strength: float) -> Tensor:
        y0 = base(x)
        return y0 + self.update(base, x, y0, strength).to(y0.dtype)

    def delta_weight(self, base: BaseLayer) -> Tensor:
        if not self.is_linear:
            raise UserError(f"{type(self).__name__} is not linear in its input: no weight holds it")
        if not isinstance(base, nn.Linear):
            raise UserError(
                f"{type(self).__name__} has no delta_weight for a convolution; write it, or leave "
                "convolutions out with --adapter.exclude"
            )
        wide = _wide_copy(base)
        at_zero = self._respond(wide, wide.weight.new_zeros(1, base.in_features))
        delta = torch.empty_like(wide.weight)
        inputs = torch.arange(base.in_features, device=delta.device)
        for rows in inputs.split(INPUTS_AT_ONCE):
            ones = F.one_hot(rows, base.in_features).to(delta.dtype)
            delta[:, rows] = (self._respond(wide, ones) - at_zero).T
        return delta

    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        if not isinstance(base, nn.Linear):
            return None
        wide = _wide_copy(base)
        at_zero = self._respond(wide, wide.weight.new_zeros(1, base.in_features))[0]
        if base.bias is None and at_zero.any():
            raise UserError(
                f"{type(self).__name__} adds a bias to a layer without one, which no weight holds; "
                "leave such layers out with --adapter.exclude"
            )
        return None if base.bias is None else at_zero

    @torch.no_grad()
    def _respond(self, base: nn.Linear, x: Tensor) -> Tensor:
        return self.update(base, x, base(x), 1.0).to(x.dtype)


def _wide_copy(base: nn.Linear) -> nn.Linear:
    """The layer in fp32 or better, without gradients."""
    own = copy.deepcopy(base).to(wide_dtype(base.weight.dtype))
    return own.requires_grad_(False)


class DroppingAdapter(FullPrecisionModule):
    """An adapter with the dropouts of its input, its ranks and the whole of it.

    They act in training only. Each is decided per example by a counter hash of (seed, path,
    purpose, step, row key). `dropout` of the input's elements (peft) and `rank_dropout` divide the
    kept values by 1 - p, `module_dropout` of the whole adapter does not. kohya draws the last two
    once for a batch, which would make a result depend on the division into micro-batches.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.scale = spec.scale
        purposes = ("", "/rank", "/module")
        self.streams = {name: zlib.crc32(f"{spec.path}{name}".encode()) for name in purposes}
        self.row_keys: Tensor | None = None  # [b] int64, by set_dropout_keys
        self.step: Tensor | None = None  # [] int64

    def _kept_examples(self, x: Tensor) -> Tensor | None:
        """[b, 1, ...] bool, False where module dropout removes an example's adapter, or None."""
        if not (self.training and self.spec.module_dropout):
            return None
        ones = torch.ones(len(x), *[1] * (x.ndim - 1), device=x.device)
        drop = self._keyed_drop(x, self.spec.module_dropout, "/module")
        return call("keyed_dropout", ones, *drop) != 0

    def _input_dropout(self, x: Tensor) -> Drop | None:
        """Dropout of the input, in training."""
        if not (self.training and self.spec.dropout):
            return None
        return self._keyed_drop(x, self.spec.dropout, "")

    def _keyed_drop(self, x: Tensor, p: float, purpose: str) -> Drop:
        if self.row_keys is None or self.step is None:
            raise UserError(
                f"the adapter of {self.spec.path} has dropout; "
                "call injection.set_dropout_keys before each training forward"
            )
        if len(x) != len(self.row_keys):
            raise UserError(
                f"adapter dropout at {self.spec.path} got {len(x)} rows for "
                f"{len(self.row_keys)} row keys; give one key a row"
            )
        return Drop(p, self.spec.seed, self.streams[purpose], self.step, self.row_keys)

    def _drops_in_training(self) -> bool:
        return self.training and has_dropout(self.spec)


def has_dropout(spec: LayerSpec) -> bool:
    return spec.dropout > 0 or spec.rank_dropout > 0 or spec.module_dropout > 0


def is_plain_layer(base: nn.Module) -> bool:
    """Whether base(x) is its weight and bias applied and nothing more.

    A fused op would skip hooks, and a forward that the class or the object overrides.
    """
    if type(base) not in (nn.Linear, nn.Conv2d) or "forward" in base.__dict__:
        return False
    return not _has_hooks(base)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def apply_layer(base: BaseLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's operation (stride, padding mode, groups ...) with another weight and bias.

    Hooks of the layer do not run.
    """
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, bias)
    return base._conv_forward(x, weight, bias)


def convolution_groups(base: BaseLayer) -> int:
    return base.groups if isinstance(base, nn.Conv2d) else 1


def initial_generator(spec: LayerSpec, purpose: str = "") -> torch.Generator:
    """A generator for a layer's initial tensors, which depends on (seed, path, purpose) only."""
    key = f"{spec.seed}/{spec.path}" + (f"/{purpose}" if purpose else "")
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
