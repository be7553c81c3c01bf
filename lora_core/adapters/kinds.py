"""The kinds of adapter of a Linear or Conv2d: LoRA, DoRA, full update; and how to add one.

A kind is an entry of KINDS, or `--adapter.kind my_adapter.py:Class`: an nn.Module class with

    Class(base, spec: LayerSpec)          builds its parameters, with an update of zero; `base` is
                                          the Linear or Conv2d, whose weight it may read, but not
                                          keep or change
    forward(base, x, strength) -> y       the layer with this adapter alone
    update(base, x, y0, strength) -> dy   its addition to y0 = base(x) where other adapters act
                                          too, in y0's dtype or fp32
    delta_weight(base) -> dW              the update of the weight, in its shape, detached, fp32 or
                                          better (for folding)
    delta_bias(base) -> db                optional: the update of the bias, or None

It is shortest to write `update` only: a subclass of `adapter_module.Adapter` has the others from
it, for Linear layers. A subclass of `FactorAdapter` gives `factors() -> (down, up)` instead and is
a LoRA for every file and command, and a subclass of a class here inherits what it does not replace.
The class is tried on a layer before a run begins: it must be the identity at first, and `forward`,
`update` and the folded weight must agree.

Where it applies, a class may have

    state(), load(state)      its tensors, to and from adapter files: a LowRank (factors of a LoRA
                              or DoRA) or a DenseUpdate (LyCORIS' tensors). For a class without
                              them, or whose `state` raises UserError, a run writes the whole model
                              with the adapters folded in
    low_rank(base)            in place of `state`, where the factors depend on the base weight
    options                   the names of the options of [adapter] that it reads besides targets
                              and exclude; others are refused. Default: those of LoRA for a class
                              with `state`, else none
    any_rank = True           a rank may exceed min(in, out)
    up                        the parameter that LoRA+ gives a learning rate of its own
    rates = {"name": 16.0}    learning rates of some parameters, relative to the others'
    change_gradients()        called before the gradients of a step are clipped: all micro-batches
                              are summed, and in fp16 the loss scale is divided out
    reads_level = True        `self.level` has the noise level of each forward pass of the denoiser:
                              `level.t` [b], as the network reads it, and `level.fraction` [b], from
                              0 (clean) to 1 (pure noise) (noise_levels.py)
    is_linear = False         its update is not linear in x, as with an activation between its
                              factors: no weight holds it, and a run writes its own tensors alone
    make_shared(bases, spec)  classmethod: a module that all layers of a network share, made from
                              those layers before any adapter of them, which gets it as
                              `spec.shared`

Parameters train. Buffers do not, and are saved and resumed with them, except those registered with
persistent=False, such as tensors that a shared module makes again from `spec.seed`. A run with a
class from outside always writes RUN_adapter.safetensors, its own tensors (custom_files.py).

`set_dropout_keys` sets its attributes `row_keys` and `step` before each training forward.
docs/CONTRIBUTING.md lists the examples of kinds; kronecker.LoKr has a form in LyCORIS' files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.adapters import weight_updates
from lora_core.adapters.adapter_module import (
    BaseLayer,
    DroppingAdapter,
    FullPrecisionModule,
    LayerSpec,
    apply_layer,
    convolution_groups,
    initial_generator,
    is_plain_layer,
)
from lora_core.adapters.hadamard import LoHa
from lora_core.adapters.kronecker import LoKr
from lora_core.adapters.weight_updates import LowRank
from lora_core.errors import UserError
from lora_core.kernels import call
from lora_core.kernels.reference import Member, wide_dtype
from lora_core.plugins import describe_error, find_plugin
from lora_core.settings import KIND_OPTIONS


class FactorAdapter(DroppingAdapter):
    """delta W = scale * up @ down, of the down and up that a subclass's `factors` gives.

    Convolutions take LoCon's form, in which up is 1x1. Rank dropout drops ranks between down and
    up (kohya).
    """

    options = KIND_OPTIONS["lora"]
    masks_ranks = False  # True: `rank_mask` gives a mask without dropout too

    def factors(self) -> tuple[Tensor, Tensor]:
        """down and up with their graph, in the shapes of `factor_shapes`, of any rank."""
        raise NotImplementedError

    def forward(self, base: BaseLayer, x: Tensor, strength: float) -> Tensor:
        if self.fits_lora_linear(base, strength):
            return call("lora_linear", x, *self.linear_arguments(base, x, strength))
        if self.masks_ranks or self._drops_in_training() or not is_plain_layer(base):
            y0 = base(x)
            return y0 + self.update(base, x, y0, strength).to(y0.dtype)
        return self._apply_factors(base, x, base.weight, base.bias, self.scale * strength)

    def fits_lora_linear(self, base: BaseLayer, strength: float) -> bool:
        """Whether one lora_linear of `linear_arguments` computes the layer.

        It does not for a convolution, a layer with hooks, or dropout of ranks or whole adapters.
        """
        if self.training and (self.spec.rank_dropout or self.spec.module_dropout):
            return False
        return isinstance(base, nn.Linear) and is_plain_layer(base) and not self.masks_ranks

    def linear_arguments(self, base: BaseLayer, x: Tensor, strength: float) -> Member:
        """The arguments of lora_linear after x, without the norm, which takes time."""
        drop = self._input_dropout(x)
        down, up = self.factors()
        return Member(base.weight, base.bias, down, up, self.scale * strength, drop=drop)

    def update(self, base: BaseLayer, x: Tensor, y0: Tensor, strength: float) -> Tensor:
        update = self._branch(base, x, self.scale * strength)
        kept = self._kept_examples(x)
        return update if kept is None else torch.where(kept, update, 0)

    def delta_weight(self, base: BaseLayer) -> Tensor:
        with torch.no_grad():
            return weight_updates.delta_weight(self.state(), base.weight)

    def state(self) -> LowRank:
        down, up = self.factors()
        return LowRank(down.detach().clone(), up.detach().clone(), self.scale)

    def rank_mask(self, x: Tensor) -> Tensor | None:
        """[b, r] what each rank is multiplied by, for the examples of x; None: 1."""
        if not (self.training and self.spec.rank_dropout):
            return None
        rank = len(self.factors()[0])
        ones = torch.ones(len(x), rank, dtype=wide_dtype(x.dtype), device=x.device)
        drop = self._keyed_drop(x, self.spec.rank_dropout, "/rank")
        return call("keyed_dropout", ones, *drop)  # 0 and 1 / (1 - p)

    def _branch(self, base: BaseLayer, x: Tensor, scale: float) -> Tensor:
        """scale * up(rank_mask(down(dropout(x))))"""
        drop = self._input_dropout(x)
        if drop is not None:
            x = call("keyed_dropout", x, *drop)
        mask = self.rank_mask(x)
        if mask is None:
            return self._apply_factors(base, x, None, None, scale)
        down, up = (factor.to(x.dtype) for factor in self.factors())
        hidden = apply_layer(base, x, down, None)  # [b, ..., r], [b, r, h', w']
        if isinstance(base, nn.Linear):
            hidden = (hidden * mask.view(len(x), *[1] * (x.ndim - 2), -1)).to(hidden.dtype)
            return scale * F.linear(hidden, up)
        hidden = (hidden * mask[..., None, None]).to(hidden.dtype)
        return scale * F.conv2d(hidden, up, groups=convolution_groups(base))

    def _apply_factors(
        self, base: BaseLayer, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float
    ) -> Tensor:
        """The layer with this weight and bias plus the update; with None the update alone."""
        factors = self.factors()
        if isinstance(base, nn.Linear):
            return call("lora_linear", x, weight, bias, *factors, scale)
        padding = base.padding
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = (0, 0)
        window = base.stride, padding, base.dilation, base.groups
        return call("lora_conv", x, weight, bias, *factors, scale, *window)


class LoRA(FactorAdapter):
    """delta W = scale * up @ down (arXiv 2106.09685), down from (seed, path), up zero at first."""

    def __init__(self, base: BaseLayer, spec: LayerSpec) -> None:
        super().__init__(spec)
        down, up = factor_shapes(base, spec.rank)
        device, dtype = base.weight.device, wide_dtype(base.weight.dtype)
        self.down = nn.Parameter(_initial_down(spec, down).to(device, dtype))
        self.up = nn.Parameter(torch.zeros(up, device=device, dtype=dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up

    @torch.no_grad()
    def load(self, lr: LowRank) -> None:
        self.scale = float(lr.scale)
        self.down.copy_(lr.down)
        self.up.copy_(lr.up)


class DoRA(LoRA):
    """W' = m / n (W + scale * up @ down), n the row norms of the bracket (arXiv 2402.09353).

    Norms are by rows, as in peft. norm_grad "detach" treats n as a constant in the gradient, as the
    paper's section 4.3 and peft do; "full" differentiates it, as LyCORIS does. At init m = n by the
    op that computes n, so the layer is the base layer to the bit. Strength t gives W + t (W' - W).
    Cast the base to its dtype before injecting: afterwards n is that of the rounded weights.
    Dropout and rank dropout act on up @ down only (peft also drops the base term's input); module
    dropout leaves the base layer, without the magnitude.
    """

    options = KIND_OPTIONS["dora"]

    def __init__(self, base: BaseLayer, spec: LayerSpec) -> None:
        super().__init__(base, spec)
        self.cached_norm: Tensor | None = None  # [out], inside injection.cache_dora_norms
        norm = self.norm(base).detach()
        if spec.init != "zero" and not norm.is_meta and not bool((norm > 0).all()):
            row = int((~(norm > 0)).nonzero()[0])
            raise UserError(
                f"row {row} of {spec.path}'s weight has norm {float(norm[row])}, "
                "which DoRA cannot scale; use --adapter.exclude"
            )
        self.magnitude = nn.Parameter(norm)

    def forward(self, base: BaseLayer, x: Tensor, strength: float) -> Tensor:
        if self.fits_lora_linear(base, strength):
            arguments = self.linear_arguments(base, x, strength)
            return call("lora_linear", x, *arguments._replace(norm=self.norm(base)))
        return self._compose(base, x, base(x), strength)

    def fits_lora_linear(self, base: BaseLayer, strength: float) -> bool:
        return strength == 1 and super().fits_lora_linear(base, strength)

    def linear_arguments(self, base: BaseLayer, x: Tensor, strength: float) -> Member:
        return super().linear_arguments(base, x, strength)._replace(magnitude=self.magnitude)

    def norm(self, base: BaseLayer) -> Tensor:
        """[out] n, with its graph for norm_grad "full"."""
        if self.cached_norm is not None:
            return self.cached_norm
        down: Tensor = self.down
        up: Tensor = self.up
        if self.spec.norm_grad == "detach":
            down, up = down.detach(), up.detach()
        return call("dora_norm", base.weight, down, up, self.scale)

    def takes_cached_norm(self) -> bool:
        """Whether the norm has no graph and is not cached yet."""
        return self.cached_norm is None and self.spec.norm_grad == "detach"

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
        self.cached_norm = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.cached_norm = None  # of the base in its old dtype, on its old device
        return super()._apply(fn, recurse)

    def _compose(self, base: BaseLayer, x: Tensor, y0: Tensor, strength: float) -> Tensor:
        shape = (-1, 1, 1) if isinstance(base, nn.Conv2d) else (-1,)
        bias = None if base.bias is None else base.bias.view(shape)
        gain = (self.magnitude / self.norm(base)).view(shape)
        branch = self._branch(base, x, self.scale)
        tuned = call("dora_compose", y0, bias, branch, gain, strength)
        kept = self._kept_examples(x)
        return tuned if kept is None else torch.where(kept, tuned, y0)


class FullUpdate(FullPrecisionModule):
    """delta W and, if the layer has a bias, delta b as parameters: full fine-tuning as an adapter.

    Both start at 0 and stay fp32 or better next to a base of any dtype. This is the fp32 master
    copy of mixed-precision training: W + delta W is summed in fp32 and rounded to the base's dtype
    in each forward, so that forward = fold to the bit. Only Linear and Conv2d train; norm layers
    and embeddings stay as they are. (DreamBooth, arXiv 2208.12242.)
    """

    options = KIND_OPTIONS["full"]

    def __init__(self, base: BaseLayer, spec: LayerSpec) -> None:
        super().__init__()
        if not base.weight.is_floating_point():
            raise UserError(
                f"{spec.path} stores its weight as {base.weight.dtype}, "
                "which cannot take an update; load the model in fp32 or bf16"
            )
        self.spec = spec
        self.row_keys: Tensor | None = None  # set by set_dropout_keys; nothing here drops
        self.step: Tensor | None = None
        self.weight = nn.Parameter(_wide_zeros(base.weight))
        self.bias = None if base.bias is None else nn.Parameter(_wide_zeros(base.bias))

    def forward(self, base: BaseLayer, x: Tensor, strength: float) -> Tensor:
        if not is_plain_layer(base):
            y0 = base(x)
            return y0 + self.update(base, x, y0, strength).to(y0.dtype)
        bias = base.bias
        if self.bias is not None and bias is not None:
            bias = _add_update(bias, self.bias, strength)
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
            f"the full update of {self.spec.path} has no low-rank form; "
            "write the merged model, or distil it to a LoRA"
        )

    def load(self, lr: LowRank) -> None:
        raise UserError(
            f"{self.spec.path} has a full update, which cannot take low-rank factors; "
            "load them under another name"
        )


@torch.no_grad()
def cache_norms(layers: Sequence[tuple[BaseLayer, DoRA]]) -> None:
    """Set `cached_norm` of every DoRA: one call for plain weights, and one for each weight that is
    made when it is read (QuantizedLinear), so that only one of these is there at a time.
    """
    plain = [(base, dora) for base, dora in layers if "weight" in base._parameters]
    if plain:
        arguments = [(base.weight, dora.down, dora.up, dora.scale) for base, dora in plain]
        for (_, dora), norm in zip(plain, call("dora_norms", tuple(arguments)), strict=True):
            dora.cached_norm = norm
    for base, dora in layers:
        if dora.cached_norm is None:
            dora.cached_norm = dora.norm(base)


def _wide_zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=wide_dtype(tensor.dtype))


def _add_update(base: Tensor, delta: Tensor, strength: float) -> Tensor:
    """base + strength * delta, summed in delta's dtype and rounded once to base's."""
    return (base.to(delta.dtype) + strength * delta).to(base.dtype)


KINDS: dict[str, Any] = {"lora": LoRA, "dora": DoRA, "full": FullUpdate, "lokr": LoKr, "loha": LoHa}
# LyCORIS' names of a LoKr and a LoHa with DoRA's magnitudes -> the kind without them
WITH_MAGNITUDES = {"dokr": "lokr", "doha": "loha"}


def kind_class(kind: str) -> Callable[[BaseLayer, LayerSpec], nn.Module]:
    """The class of a kind: an entry of KINDS, or Class in the file of "path/my_adapter.py:Class".

    Raises UserError for any other name.
    """
    if kind in WITH_MAGNITUDES:
        plain = WITH_MAGNITUDES[kind]
        raise UserError(
            f"--adapter.kind {kind}, {plain} with DoRA's magnitudes, is not trained here; "
            f"take {plain} or dora"
        )
    found = find_plugin(kind, KINDS, "adapter kind", noun="class")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(
            f"adapter kind {kind!r} is {found!r}, not a torch.nn.Module class; "
            "name the class itself"
        )
    return found


def build_adapters(
    kind: Any, bases: Mapping[str, BaseLayer], specs: Mapping[str, LayerSpec]
) -> dict[str, nn.Module]:
    """The adapters of the layers of one network, of a class, with the module that they share.

    Raises UserError for a class from outside that fails, naming the layer.
    """
    if kind.__module__.startswith("lora_core."):
        return {path: kind(base, specs[path]) for path, base in bases.items()}
    built: dict[str, nn.Module] = {}
    path, shared = next(iter(bases)), None
    try:
        if hasattr(kind, "make_shared"):
            shared = kind.make_shared(list(bases.values()), specs[path])
        for path, base in bases.items():
            built[path] = kind(base, replace(specs[path], shared=shared))
    except UserError:
        raise
    except Exception as error:  # whatever the user's class raises
        advice = "see lora_core/adapters/kinds.py"
        if not isinstance(bases[path], nn.Linear):
            advice = "if it is for linear layers alone, give --adapter.targets all-linear"
        what = describe_error(error, kind)
        where = f"{path}, a {type(bases[path]).__name__}"
        raise UserError(f"{kind.__name__} cannot be made for {where}: {what}; {advice}") from error
    return built


def kind_options(kind: Any) -> tuple[str, ...]:
    """The options of [adapter] that a class of adapter reads, besides targets and exclude."""
    default = KIND_OPTIONS["lora"] if hasattr(kind, "state") else ()
    return getattr(kind, "options", default)


def factor_shapes(base: BaseLayer, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a layer's down and up.

    [r, in] and [out, r], or [r, in / groups, kh, kw] and [out, r / groups, 1, 1].
    """
    out, *inner = base.weight.shape
    ones = [1] * (len(inner) - 1)
    return (rank, *inner), (out, rank // convolution_groups(base), *ones)


def check_rank(base: BaseLayer, path: str, rank: int) -> None:
    """UserError, naming the layer, for a rank above a full update's or not divided by groups."""
    groups = convolution_groups(base)
    out, *inner = base.weight.shape
    if rank % groups:
        raise UserError(
            f"rank {rank} is not divisible by the {groups} groups of {path}; "
            f"choose a multiple of {groups} or use --adapter.exclude"
        )
    limit = groups * min(math.prod(inner), out // groups)
    if rank > limit:
        name = "min(in, out)" if isinstance(base, nn.Linear) else "min(in * kh * kw, out)"
        name += f" summed over {groups} groups" if groups > 1 else ""
        raise UserError(
            f"rank {rank} exceeds {name} = {limit} for {path}; "
            "lower --adapter.rank or narrow --adapter.targets"
        )


def _initial_down(spec: LayerSpec, shape: tuple[int, ...]) -> Tensor:
    """The initial down, fp32 on the CPU, a function of (seed, path, shape) only."""
    if spec.init == "zero":
        return torch.zeros(shape)
    generator = initial_generator(spec)
    if spec.init == "gaussian":
        return torch.randn(shape, generator=generator) / spec.rank
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(math.prod(shape[1:]))
