"""The kinds of adapter: LoRA, DoRA and a full update of one Linear or Conv2d, and what a kind of your own has to provide.

A kind of adapter is a row of KINDS, or `--adapter.kind my_adapter.py:Class`. The class is an nn.Module that provides:
    Class(base, layer: LayerSpec)           builds its parameters; its update is zero at first; `base` is a Linear or Conv2d, not to be kept
    forward(base, x, strength) -> y         the layer with this adapter alone
    update(base, x, y0, strength) -> dy     what it adds to y0 = base(x) when others are active too, in y0's dtype or fp32
    delta_weight(base) -> dW                the same update as a matrix, shaped as base.weight, fp32 or better, detached (fold)
    state() -> LowRank, load(LowRank)       its factors to and from files; UserError when it has no such form: then the run writes its state dict
                                            and the whole model with it folded in (bespoke.py)
and, where it applies,
    delta_bias(base) -> db                  its update of the bias, or None (fold)
    up                                      the parameter that LoRA+ gives a learning rate of its own
    low_rank = False                        on the class: rank, alpha, init and dropout have no part in it, as in one without `state`
`set_dropout` leaves the row keys and the step of the next forward in its attributes `rows` and `step`. Subclassing LoRA gives all of this.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.adapters import weight_updates
from lora_core.adapters.weight_updates import LowRank
from lora_core.errors import UserError
from lora_core.kernels import call
from lora_core.kernels.reference import Drop, Member, wide_dtype
from lora_core.plugins import load_from_file

BaseLayer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class LayerSpec:
    """What one layer's adapter is built from: an AdapterSpec resolved for its path."""

    path: str
    rank: int
    scale: float  # delta W = scale * up @ down
    dropout: float = 0.0
    init: str = "gaussian"  # or "kaiming"; "zero" when the factors follow from a file
    seed: int = 0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    norm_grad: str = "detach"  # or "full": a DoRA's gradient flows through its row norms too


class FullPrecisionModule(nn.Module):
    """A module whose parameters stay fp32 or better whatever the model is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """model.half() or model.to(bfloat16) moves adapters but leaves them fp32: in bf16 an update of 1e-4 on 0.05 would round to nothing."""

        def keep_wide(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == wide_dtype(new.dtype) else tensor.to(new.device)

        return super()._apply(keep_wide, recurse)


class LoRA(FullPrecisionModule):
    """delta W = scale * up @ down (arXiv 2106.09685); down is drawn from (seed, path), up is 0. Convolutions: LoCon's form, up is 1x1.

    Three dropouts, in training only, each decided per example by a counter hash of (seed, path, purpose, step, row key): `dropout` of the input's
    elements (peft), `rank_dropout` of ranks between down and up, `module_dropout` of the whole adapter (both kohya's). The first two divide what is
    kept by 1 - p, the third does not; kohya draws it once for a batch, which would make a result depend on how a batch is cut.
    """

    def __init__(self, base: BaseLayer, layer: LayerSpec) -> None:
        super().__init__()
        self.layer, self.scale = layer, layer.scale
        self.streams = {
            purpose: zlib.crc32(f"{layer.path}{purpose}".encode())
            for purpose in ("", "/rank", "/module")
        }  # of dropout
        self.rows: Tensor | None = None  # set_dropout: [b] int64 and [] int64
        self.step: Tensor | None = None
        down, up = factor_shapes(base, layer.rank)
        device, dtype = base.weight.device, wide_dtype(base.weight.dtype)
        self.down = nn.Parameter(_initial_down(layer, down).to(device, dtype))
        self.up = nn.Parameter(torch.zeros(up, device=device, dtype=dtype))

    def forward(self, base: BaseLayer, x: Tensor, strength: float) -> Tensor:
        if self.is_one_linear(base, strength):
            return call("lora_linear", x, *self.member(base, x, strength))
        if self._drops() or not _is_plain(base):
            y0 = base(x)
            return y0 + self.update(base, x, y0, strength).to(y0.dtype)
        return self._product(base, x, base.weight, base.bias, self.scale * strength)

    def is_one_linear(self, base: BaseLayer, strength: float) -> bool:
        """Whether this layer is one lora_linear of `member`'s arguments: no convolution, hooks or dropout of ranks or whole adapters."""
        return (
            isinstance(base, nn.Linear)
            and _is_plain(base)
            and not (self.training and (self.layer.rank_dropout or self.layer.module_dropout))
        )

    def member(self, base: BaseLayer, x: Tensor, strength: float) -> Member:
        """The arguments of that lora_linear after x, without the norm, which costs."""
        return Member(
            base.weight, base.bias, self.down, self.up, self.scale * strength, drop=self._dropout(x)
        )

    def update(self, base: BaseLayer, x: Tensor, y0: Tensor, strength: float) -> Tensor:
        update, kept = self._branch(base, x, self.scale * strength), self._kept(x)
        return update if kept is None else torch.where(kept, update, 0)

    def delta_weight(self, base: BaseLayer) -> Tensor:
        with torch.no_grad():
            return weight_updates.delta_weight(self.state(), base.weight)

    def state(self) -> LowRank:
        return LowRank(self.down.detach().clone(), self.up.detach().clone(), self.scale)

    @torch.no_grad()
    def load(self, lr: LowRank) -> None:
        self.scale = float(lr.scale)
        self.down.copy_(lr.down)
        self.up.copy_(lr.up)

    def _branch(self, base: BaseLayer, x: Tensor, scale: float) -> Tensor:
        """scale * up(rank_dropout(down(dropout(x))))"""
        drop = self._dropout(x)
        if drop is not None:
            x = call("keyed_dropout", x, *drop)
        if not (self.training and self.layer.rank_dropout):
            return self._product(base, x, None, None, scale)
        ones = torch.ones(len(x), len(self.down), dtype=wide_dtype(x.dtype), device=x.device)
        mask = call(
            "keyed_dropout", ones, *self._drop(x, self.layer.rank_dropout, "/rank")
        )  # [b, r] of 0 and 1 / (1 - p)
        hidden = apply_layer(base, x, self.down.to(x.dtype), None)  # [b, ..., r] or [b, r, h', w']
        is_linear = isinstance(base, nn.Linear)
        mask = mask.view(len(x), *[1] * (x.ndim - 2), -1) if is_linear else mask[..., None, None]
        hidden, up = (hidden * mask).to(hidden.dtype), self.up.to(x.dtype)
        return scale * (
            F.linear(hidden, up)
            if is_linear
            else F.conv2d(hidden, up, groups=convolution_groups(base))
        )

    def _kept(self, x: Tensor) -> Tensor | None:
        """[b, 1, ...] bool, False for the examples whose adapter module dropout takes out; None without module dropout."""
        if not (self.training and self.layer.module_dropout):
            return None
        ones = torch.ones(len(x), *[1] * (x.ndim - 1), device=x.device)
        return (
            call("keyed_dropout", ones, *self._drop(x, self.layer.module_dropout, "/module")) != 0
        )

    def _dropout(self, x: Tensor) -> Drop | None:
        """Dropout of the input, in training."""
        return (
            self._drop(x, self.layer.dropout, "") if self.training and self.layer.dropout else None
        )

    def _drop(self, x: Tensor, p: float, purpose: str) -> Drop:
        if self.rows is None or self.step is None:
            raise UserError(
                f"the adapter of {self.layer.path} has dropout; call injection.set_dropout_keys before each training forward"
            )
        if len(x) != len(self.rows):
            raise UserError(
                f"adapter dropout at {self.layer.path} got {len(x)} rows for {len(self.rows)} row keys; give one key a row"
            )
        return Drop(p, self.layer.seed, self.streams[purpose], self.step, self.rows)

    def _product(
        self, base: BaseLayer, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float
    ) -> Tensor:
        if isinstance(base, nn.Linear):
            return call("lora_linear", x, weight, bias, self.down, self.up, scale)
        padding = base.padding
        if base.padding_mode != "zeros":
            x, padding = (
                F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode),
                (0, 0),
            )
        return call(
            "lora_conv",
            x,
            weight,
            bias,
            self.down,
            self.up,
            scale,
            base.stride,
            padding,
            base.dilation,
            base.groups,
        )

    def _drops(self) -> bool:
        return self.training and (
            self.layer.dropout > 0 or self.layer.rank_dropout > 0 or self.layer.module_dropout > 0
        )


class DoRA(LoRA):
    """W' = m / n (W + scale * up @ down), n the row norms of the bracket (arXiv 2402.09353; rows as in peft).

    norm_grad "detach" takes n for a constant in the gradient, as the paper's section 4.3 and peft do; "full" differentiates it, as LyCORIS does.
    At init m = n by the op that computes n, so the layer is the base layer to the bit. Strength t means W + t (W' - W). Cast the base to its
    dtype before injecting: afterwards n is that of the rounded weights. Dropout and rank dropout thin up @ down only (peft drops the base term's
    input too); module dropout leaves the base layer, magnitude and all.
    """

    def __init__(self, base: BaseLayer, layer: LayerSpec) -> None:
        super().__init__(base, layer)
        self.steady: Tensor | None = None  # n, while injection.cache_dora_norms holds it
        norm = self.norm(base).detach()
        if layer.init != "zero" and not norm.is_meta and not bool((norm > 0).all()):
            row = int((~(norm > 0)).nonzero()[0])
            raise UserError(
                f"row {row} of {layer.path}'s weight has norm {float(norm[row])}, which DoRA cannot scale; use --adapter.exclude"
            )
        self.magnitude = nn.Parameter(norm)

    def forward(self, base: BaseLayer, x: Tensor, strength: float) -> Tensor:
        if self.is_one_linear(base, strength):
            return call(
                "lora_linear", x, *self.member(base, x, strength)._replace(norm=self.norm(base))
            )
        return self._compose(base, x, base(x), strength)

    def is_one_linear(self, base: BaseLayer, strength: float) -> bool:
        return strength == 1 and super().is_one_linear(base, strength)

    def member(self, base: BaseLayer, x: Tensor, strength: float) -> Member:
        return super().member(base, x, strength)._replace(magnitude=self.magnitude)

    def norm(self, base: BaseLayer) -> Tensor:
        """[out] n, with its graph for norm_grad "full"."""
        if self.steady is not None:
            return self.steady
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.layer.norm_grad == "full"):
            return call("dora_norm", base.weight, self.down, self.up, self.scale)

    def update(self, base: BaseLayer, x: Tensor, y0: Tensor, strength: float) -> Tensor:
        y0 = y0.to(wide_dtype(y0.dtype))
        return self._compose(base, x, y0, strength) - y0

    def state(self) -> LowRank:
        return super().state()._replace(magnitude=self.magnitude.detach().clone())

    @torch.no_grad()
    def load(self, lr: LowRank) -> None:
        assert lr.magnitude is not None
        super().load(lr)
        self.magnitude.copy_(lr.magnitude)
        self.steady = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.steady = None  # of the base in its old dtype, on its old device
        return super()._apply(fn, recurse)

    def _compose(self, base: BaseLayer, x: Tensor, y0: Tensor, strength: float) -> Tensor:
        shape = (-1, *[1] * (base.weight.ndim - 2))
        bias = None if base.bias is None else base.bias.view(shape)
        gain = (self.magnitude / self.norm(base)).view(shape)
        tuned, kept = (
            call("dora_compose", y0, bias, self._branch(base, x, self.scale), gain, strength),
            self._kept(x),
        )
        return tuned if kept is None else torch.where(kept, tuned, y0)


class FullUpdate(FullPrecisionModule):
    """delta W and, where the layer has a bias, delta b themselves: full fine-tuning (DreamBooth, arXiv 2208.12242) as one more kind.

    Both start at 0 and stay fp32 or better beside a base of any dtype, which is the fp32 master copy of mixed-precision training: W + delta W is
    summed in fp32 and rounded to the base's dtype in each forward, so that forward = fold to the bit. Only Linear and Conv2d train: norm layers and
    embeddings stay as they are.
    """

    low_rank = False

    def __init__(self, base: BaseLayer, layer: LayerSpec) -> None:
        super().__init__()
        if not base.weight.is_floating_point():
            raise UserError(
                f"{layer.path} stores its weight as {base.weight.dtype}, which cannot take an update; load the model in fp32 or bf16"
            )
        self.layer = layer
        self.rows: Tensor | None = None  # set_dropout's; nothing here drops
        self.step: Tensor | None = None
        self.weight = nn.Parameter(
            torch.zeros_like(base.weight, dtype=wide_dtype(base.weight.dtype))
        )
        self.bias = (
            None
            if base.bias is None
            else nn.Parameter(torch.zeros_like(base.bias, dtype=wide_dtype(base.bias.dtype)))
        )

    def forward(self, base: BaseLayer, x: Tensor, strength: float) -> Tensor:
        if not _is_plain(base):
            y0 = base(x)
            return y0 + self.update(base, x, y0, strength).to(y0.dtype)
        bias = (
            None
            if self.bias is None or base.bias is None
            else _add_update(base.bias, self.bias, strength)
        )
        return apply_layer(base, x, _add_update(base.weight, self.weight, strength), bias)

    def update(self, base: BaseLayer, x: Tensor, y0: Tensor, strength: float) -> Tensor:
        bias = None if self.bias is None else (strength * self.bias).to(x.dtype)
        return apply_layer(base, x, (strength * self.weight).to(x.dtype), bias)

    def delta_weight(self, base: BaseLayer) -> Tensor:
        return self.weight.detach()

    def delta_bias(self, base: BaseLayer) -> Tensor | None:
        return None if self.bias is None else self.bias.detach()

    def state(self) -> LowRank:
        raise UserError(
            f"the full update of {self.layer.path} has no low-rank form; write the merged model, or distil it to a LoRA"
        )

    def load(self, lr: LowRank) -> None:
        raise UserError(
            f"{self.layer.path} has a full update, which cannot take low-rank factors; load them under another name"
        )


def _add_update(base: Tensor, delta: Tensor, strength: float) -> Tensor:
    """base + strength * delta, summed in delta's dtype and rounded once to base's."""
    return (base.to(delta.dtype) + strength * delta).to(base.dtype)


KINDS: dict[str, Any] = {"lora": LoRA, "dora": DoRA, "full": FullUpdate}


def kind_class(spec: str) -> Callable[[BaseLayer, LayerSpec], nn.Module]:
    """The class that `kind` names: a row of KINDS, or Class in the Python file of "path/my_adapter.py:Class". Raises UserError otherwise."""
    if spec in KINDS:
        return KINDS[spec]
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py"):
        close = "".join(
            f", did you mean {kind}" for kind in difflib.get_close_matches(spec, KINDS, n=1)
        )
        raise UserError(
            f"unknown adapter kind {spec!r}{close}; expected {', '.join(KINDS)} or my_adapter.py:Class"
        )
    found = load_from_file(file, name, "class")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(
            f"adapter kind {spec!r} is {found!r}, not a torch.nn.Module class; name the class itself"
        )
    return found


def is_low_rank(kind: Any) -> bool:
    """Whether rank, alpha, init and dropout have a part in a kind: as its class says with `low_rank`, else whether it has factors, a `state`."""
    return getattr(kind, "low_rank", hasattr(kind, "state") or not isinstance(kind, type))


def apply_layer(base: BaseLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's operation (stride, padding mode, groups ...) with another weight and bias, without its hooks."""
    return (
        F.linear(x, weight, bias)
        if isinstance(base, nn.Linear)
        else base._conv_forward(x, weight, bias)
    )


def factor_shapes(base: BaseLayer, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of down and up for a layer: [r, in / groups, kh, kw] and [out, r / groups, 1, 1], or [r, in] and [out, r]."""
    weight = base.weight.shape
    return (rank, *weight[1:]), (
        weight[0],
        rank // convolution_groups(base),
        *[1] * (len(weight) - 2),
    )


def convolution_groups(base: BaseLayer) -> int:
    return base.groups if isinstance(base, nn.Conv2d) else 1


def check_rank(base: BaseLayer, path: str, rank: int) -> None:
    """Raises UserError, naming the layer, for a rank above that of a full update or one that the groups do not divide."""
    groups, (out, *inner) = convolution_groups(base), base.weight.shape
    if rank % groups:
        raise UserError(
            f"rank {rank} is not divisible by the {groups} groups of {path}; choose a multiple of {groups} or use --adapter.exclude"
        )
    limit = groups * min(math.prod(inner), out // groups)
    if rank > limit:
        name = "min(in, out)" if isinstance(base, nn.Linear) else "min(in * kh * kw, out)"
        name += f" summed over {groups} groups" if groups > 1 else ""
        raise UserError(
            f"rank {rank} exceeds {name} = {limit} for {path}; lower --adapter.rank or narrow --adapter.targets"
        )


def _initial_down(layer: LayerSpec, shape: tuple[int, ...]) -> Tensor:
    """The initial down, fp32 on CPU, a function of (seed, path, shape) only."""
    if layer.init == "zero":
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{layer.seed}/{layer.path}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    if layer.init == "gaussian":
        return torch.randn(shape, generator=generator) / layer.rank
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(math.prod(shape[1:]))


def _is_plain(base: nn.Module) -> bool:
    """True when base(x) is just its weight and bias applied: no hooks, no patched or overridden forward that a fused op would skip."""
    hooked = (
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
    )
    return type(base) in (nn.Linear, nn.Conv2d) and not hooked and "forward" not in vars(base)
