"""LoRA, DoRA and full updates of Linear and Conv2d: inject, train, change strength, fold, remove.

An adapter replaces its layer by `Adapted`, which holds the very same layer as `.base` and any number of named adapters:
    inject(unet, AdapterSpec(targets=("to_q", "to_v"), rank=8));  parameters(unet);  state(unet);  remove(unet)
The update of several adapters is W + t1 delta1 + t2 delta2, each delta taken against the base weight W.
A kind of adapter is a class in kinds.py or in a file of yours, `--adapter.kind my_adapter.py:Class`; kinds.py says what it provides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_core.adapters.adapted_layer import Adapted, adaptable_layers, module_parents
from lora_core.adapters.groups import build_groups, dissolve_group
from lora_core.adapters.kinds import (
    KINDS,
    BaseLayer,
    DoRA,
    FullUpdate,
    LayerSpec,
    LoRA,
    check_rank,
    convolution_groups,
    factor_shapes,
    is_low_rank,
    kind_class,
)
from lora_core.adapters.targets import last_match, nearest_paths, require_match, select_paths
from lora_core.adapters.weight_updates import LowRank
from lora_core.errors import UserError
from lora_core.kernels import call
from lora_core.settings import AdapterSpec

__all__ = [
    "KINDS", "Adapted", "AdapterSpec", "DoRA", "FullUpdate", "LayerSpec", "LoRA", "disable_adapters", "fold_adapter", "inject", "adaptable_layers", "load_factors",
    "merged_state_dict", "adapter_parameters", "remove", "set_dropout_keys", "set_strength", "adapter_factors", "cache_dora_norms", "target_paths", "unfold_adapter", "up_parameters",
]  # fmt: skip


def layer_spec(spec: AdapterSpec, path: str, seed: int = 0) -> LayerSpec:
    """The settings of one layer."""
    rank = int(last_match(path, spec.rank_pattern, None) or spec.rank)
    alpha = last_match(path, spec.alpha_pattern, None) or spec.alpha or rank
    scale = alpha / (math.sqrt(rank) if spec.rslora else rank)
    return LayerSpec(
        path,
        rank,
        scale,
        spec.dropout,
        spec.init,
        seed,
        spec.rank_dropout,
        spec.module_dropout,
        spec.norm_grad,
    )


def target_paths(
    model: nn.Module, patterns: tuple[str, ...], exclude: tuple[str, ...] = ()
) -> list[str]:
    """Paths of the Linear and Conv2d layers that the patterns choose, in the model's order. Raises UserError as targets.select_paths does."""
    return select_paths(list(adaptable_layers(model)), patterns, exclude)


def inject(
    model: nn.Module, spec: AdapterSpec, *, name: str = "default", seed: int = 0
) -> list[str]:
    """Puts an adapter on every target and returns their paths. The model computes what it did before: every update is zero at first.

    Each layer's down is drawn from (seed, path), whatever else is injected. The base's requires_grad is left as it is.
    All or nothing: raises UserError before any change for a pattern without a match, a rank that a layer cannot have, a name that is taken,
    a layer whose forward would not be called.
    """
    kind, found = kind_class(spec.kind), adaptable_layers(model)
    paths = select_paths(list(found), spec.targets, spec.exclude)
    for pattern in spec.rank_pattern:
        require_match(pattern, paths, "--adapter.rank-pattern")
    for pattern in spec.alpha_pattern:
        require_match(pattern, paths, "--adapter.alpha-pattern")
    _check_name(name, found)
    bases = {path: _adaptable_base(path, found[path]) for path in paths}
    if is_low_rank(kind):
        for path, base in bases.items():
            check_rank(base, path, layer_spec(spec, path).rank)
    else:
        spec.check_full()
    _install_adapters(
        model, {path: kind(base, layer_spec(spec, path, seed)) for path, base in bases.items()}, name, 1.0
    )
    return paths


def remove(model: nn.Module, name: str | None = None) -> None:
    """Takes one adapter (or all) out; where none is left the very same base module stands in its place again. Folded ones are refused."""
    adapted = _layers_with_adapter(model, name)
    folded = {key for layer in adapted.values() for key in layer.folded if name in (None, key)}
    if folded:
        raise UserError(
            f"adapter {', '.join(sorted(folded))} is folded into the weights; unfold it first, then remove it"
        )
    held_by = module_parents(model)
    for layer in adapted.values():
        for key in list(layer.adapters) if name is None else [name]:
            del layer.adapters[key], layer.strengths[key]
        if not layer.adapters:
            dissolve_group(layer)
            for parent, attribute in held_by[id(layer)]:
                parent._modules[attribute] = layer.base
    build_groups(model)


def fold_adapter(model: nn.Module, name: str = "default", strength: float = 1.0) -> None:
    """Writes W + strength * delta W (and the bias of a full update) into the base (in place, one rounding) and stops the adapter's own forward.

    Each layer keeps a copy of its weight and bias, so that `unfold` restores the bits; several folded adapters add up against that copy.
    Raises UserError, with the model as it was, when the name is folded already, a weight is shared with another module, or the result overflows.
    """
    adapted = _layers_with_adapter(model, name)
    _check_strength(strength)
    for layer in adapted.values():
        if name in layer.folded:
            raise UserError(
                f"adapter {name!r} is folded already; unfold it before folding it at another strength"
            )
    _check_sharing(model, adapted, name)
    done: list[tuple[str, Adapted]] = []
    try:
        for path, layer in adapted.items():
            layer.refold({**layer.folded, name: strength}, path)
            done.append((path, layer))
    except BaseException:
        for path, layer in done:
            layer.refold({key: t for key, t in layer.folded.items() if key != name}, path)
        raise


def unfold_adapter(model: nn.Module, name: str = "default") -> None:
    """Undoes `fold`: the adapter acts in forward again at its run-time strength; with none folded the weights have their very bits back."""
    for path, layer in _layers_with_adapter(model, name).items():
        if name not in layer.folded:
            raise UserError(f"adapter {name!r} is not folded; there is nothing to unfold")
        layer.refold({key: t for key, t in layer.folded.items() if key != name}, path)


def merged_state_dict(
    model: nn.Module, name: str = "default", strength: float = 1.0
) -> dict[str, Tensor]:
    """The model's state dict under the keys it has without adapters, with strength * this adapter folded in; the model stays as it is.

    Adapted weights (and the biases of a full update) are new tensors in the base's dtype, rounded once, the very numbers that `fold` writes; all else
    are the model's own tensors, not copies. Other adapters are left out. Norm layers and embeddings take no adapter and are the base's.
    Raises UserError, as `fold` does, for a shared weight or an overflow, and while any adapter is folded.
    """
    chosen = _layers_with_adapter(model, name)
    _check_strength(strength)
    _check_sharing(model, chosen, name)
    wrapped = {
        f"{path}.": layer
        for path, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, Adapted)
    }
    for layer in wrapped.values():
        if layer.folded:
            raise UserError(
                f"adapter {', '.join(layer.folded)} is folded into the weights; unfold it before merging"
            )
    moved = {id(layer): layer.merged({name: strength}, path) for path, layer in chosen.items()}
    found = {}
    for key, value in model.state_dict().items():
        prefix = next(
            (key[: i + 1] for i, c in enumerate(key) if c == "." and key[: i + 1] in wrapped), ""
        )
        if not prefix:
            found[key] = value
        elif key.startswith(f"{prefix}base."):
            own = key.removeprefix(f"{prefix}base.")  # weight or bias
            found[prefix + own] = moved.get(id(wrapped[prefix]), {}).get(own, value)
    return found


def set_strength(model: nn.Module, name: str, strength: float) -> None:
    """The adapter acts as W + strength * delta W from now on; 0 is exactly the base. Its folded copy cannot change: refused."""
    adapted = _layers_with_adapter(model, name)
    _check_strength(strength)
    if any(name in layer.folded for layer in adapted.values()):
        raise UserError(
            f"adapter {name!r} is folded into the weights; unfold it, or fold it again at strength {strength}"
        )
    for layer in adapted.values():
        layer.strengths[name] = float(strength)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """The base model inside the block (a loss's base_out): no adapter acts. Raises UserError while one is folded.

    Meant for no_grad forwards: gradient checkpointing recomputes after the block, with adapters.
    """
    adapted = [layer for layer in adaptable_layers(model).values() if isinstance(layer, Adapted)]
    if any(layer.folded for layer in adapted):
        raise UserError(
            "an adapter is folded into the weights, so the base model is not at hand; unfold it first"
        )
    before = [layer.enabled for layer in adapted]
    try:
        for layer in adapted:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(adapted, before, strict=True):
            layer.enabled = enabled


@contextmanager
def cache_dora_norms(model: nn.Module) -> Iterator[None]:
    """Inside, factors and base weights do not change: the row norms of every DoRA are computed once, on entry, and not in each forward.

    A training step's forwards and backwards belong inside, with whatever checkpointing recomputes; the optimiser's step does not. Inside a block
    the same block does nothing more; at the end of the outermost one, also by an exception, every norm is forgotten. DoRAs with norm_grad "full"
    (which need the norms' graph), folded ones, and those injected, loaded into or moved to another dtype or device inside compute theirs as ever.
    """
    adapted = [
        layer
        for layer in adaptable_layers(model).values()
        if isinstance(layer, Adapted) and not layer.folded
    ]
    found = [
        (layer.base, adapter)
        for layer in adapted
        for adapter in layer.adapters.values()
        if isinstance(adapter, DoRA)
    ]
    held = [
        (base, dora)
        for base, dora in found
        if dora.steady is None and dora.layer.norm_grad == "detach"
    ]
    with torch.no_grad():
        norms = (
            call(
                "dora_norms",
                tuple([(base.weight, dora.down, dora.up, dora.scale) for base, dora in held]),
            )
            if held
            else ()
        )
    try:
        for (_, dora), norm in zip(held, norms, strict=True):
            dora.steady = norm
        yield
    finally:
        for _, dora in held:
            dora.steady = None


def set_dropout_keys(model: nn.Module, rows: Tensor, step: int | Tensor) -> None:
    """Names the rows of the next forward for adapter dropout: rows [b] int64 (noise.RandomKeys.hashes) on the model's device, and the step."""
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows is {list(rows.shape)} {rows.dtype}; expected [b] int64")
    shared = (
        step
        if isinstance(step, Tensor)
        else torch.full((), step, dtype=torch.int64, device=rows.device)
    )
    for layer in adaptable_layers(model).values():
        for adapter in layer.adapters.values() if isinstance(layer, Adapted) else ():
            adapter.rows, adapter.step = rows, shared


def adapter_parameters(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """What trains: down, up (and magnitude) of every layer, or its full update, in the model's order, fp32 or better."""
    return [
        p
        for layer in _layers_with_adapter(model, name).values()
        for p in layer.adapter(name).parameters()
    ]


def up_parameters(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """The up of every layer, in the model's order: what LoRA+ (arXiv 2402.12354) gives a higher learning rate; see schedules.split_lora_plus.

    The paper speaks of down and up only: a DoRA's magnitude stays at the plain rate here (peft moves it with up). Raises UserError for a full update.
    """
    found = []
    for path, layer in _layers_with_adapter(model, name).items():
        up = getattr(layer.adapter(name), "up", None)
        if not isinstance(up, nn.Parameter):
            raise UserError(
                f"the adapter of {path} has no up and down, which LoRA+ tells apart; leave --optimizer.lora-plus out"
            )
        found.append(up)
    return found


def adapter_factors(model: nn.Module, name: str = "default") -> dict[str, LowRank]:
    """Copies of the factors by layer path, at strength 1."""
    return {
        path: layer.adapter(name).state()
        for path, layer in _layers_with_adapter(model, name).items()
    }


def load_factors(
    model: nn.Module, factors: Mapping[str, LowRank], name: str = "default", strength: float = 1.0
) -> None:
    """Puts factors from a file on the model: layers that have the adapter are overwritten in place, the others get a LoRA or (with a
    magnitude) a DoRA of the file's own rank. Ranks may differ by layer and exceed min(in, out) (a concatenation does).

    All or nothing: raises UserError before any change for an unknown path (with the nearest), shapes that do not fit, an existing adapter of
    another rank or kind, or one on layers that the factors leave out.
    """
    found = adaptable_layers(model)
    _check_strength(strength)
    if not factors:
        raise UserError(
            "there are no factors to load; the file holds nothing for this part of the model"
        )
    for path in factors:
        if path not in found:
            raise UserError(
                f"the model has no layer {path!r}; nearest: {', '.join(nearest_paths(path, list(found)))}"
            )
    existing = {
        path: layer
        for path, layer in found.items()
        if isinstance(layer, Adapted) and name in layer.adapters
    }
    missing = [path for path in existing if path not in factors]
    if missing:
        raise UserError(
            f"adapter {name!r} is on {len(missing)} layers without factors, e.g. {missing[0]}; remove it or load under another name"
        )
    _check_name(name, {})
    fitted = {
        path: _fit_to_layer(
            path,
            existing[path].base if path in existing else _adaptable_base(path, found[path]),
            lr,
        )
        for path, lr in factors.items()
    }
    for path, layer in existing.items():
        _check_same_kind(path, layer, name, fitted[path])
    built = {}
    for path, lr in fitted.items():
        if path not in existing:
            kind = LoRA if lr.magnitude is None else DoRA
            built[path] = kind(
                _adaptable_base(path, found[path]), LayerSpec(path, lr.rank, lr.scale, init="zero")
            )
    _install_adapters(model, built, name, strength)
    for path, adapted in _layers_with_adapter(model, name).items():
        adapted.adapter(name).load(fitted[path])
        adapted.strengths[name] = float(strength)


def _layers_with_adapter(model: nn.Module, name: str | None) -> dict[str, Adapted]:
    """The layers that carry the adapter (any adapter for None); UserError, with the names there are, when none does."""
    every = {
        path: layer for path, layer in adaptable_layers(model).items() if isinstance(layer, Adapted)
    }
    chosen = {
        path: layer for path, layer in every.items() if name is None or name in layer.adapters
    }
    if not chosen:
        names = dict.fromkeys(key for layer in every.values() for key in layer.adapters)
        raise UserError(
            f"the model has no adapter{'' if name is None else f' {name!r}'}; it has {', '.join(names) or 'none at all'}"
        )
    return chosen


def _install_adapters(
    model: nn.Module, built: Mapping[str, nn.Module], name: str, strength: float
) -> None:
    found, held_by = adaptable_layers(model), module_parents(model)
    for path, adapter in built.items():
        layer = found[path]
        if not isinstance(layer, Adapted):
            layer = Adapted(layer)
            for parent, attribute in held_by[id(layer.base)]:
                parent._modules[attribute] = layer
        layer.add(name, adapter, strength)
    build_groups(model)


def _adaptable_base(path: str, layer: BaseLayer | Adapted) -> BaseLayer:
    """The layer that an adapter is built for; UserError where it would not act or not see the base weight."""
    base = layer.base if isinstance(layer, Adapted) else layer
    if isinstance(layer, Adapted) and layer.folded:
        raise UserError(
            f"{path} has {', '.join(layer.folded)} folded into its weight; unfold before adding another adapter"
        )
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise UserError(
            f"{path} is read by torch.nn.MultiheadAttention without being called, so an adapter does nothing; use --adapter.exclude"
        )
    return base


def _check_name(name: str, found: Mapping[str, BaseLayer | Adapted]) -> None:
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise UserError(
            f"an adapter cannot be named {name!r}; use letters, digits and _ and no method name of a module"
        )
    taken = [
        path
        for path, layer in found.items()
        if isinstance(layer, Adapted) and name in layer.adapters
    ]
    if taken:
        raise UserError(
            f"adapter {name!r} is already on {len(taken)} layers, e.g. {taken[0]}; remove it or choose another name"
        )


def _check_strength(strength: float) -> None:
    if not math.isfinite(strength):
        raise UserError(f"strength is {strength}; expected a finite number")


def _check_sharing(model: nn.Module, adapted: Mapping[str, Adapted], name: str) -> None:
    """UserError when a weight (or a bias that the adapter moves) is also another module's."""
    users = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    for path, layer in adapted.items():
        bias = layer.base.bias if hasattr(layer.adapter(name), "delta_bias") else None
        if users[id(layer.base.weight)] > 1 or users[id(bias)] > 1:
            raise UserError(
                f"the weight of {path} is shared with another module, which would change too; keep the adapter unfolded"
            )


def _fit_to_layer(path: str, base: BaseLayer, lr: LowRank) -> LowRank:
    """The factors in the layer's shapes; [r, in] and [r, in, 1, 1] stand for each other. UserError, naming the layer, when they do not fit."""
    down, up = factor_shapes(base, lr.rank)
    fits = (
        _trim_ones(lr.down.shape) == _trim_ones(down)
        and _trim_ones(lr.up.shape) == _trim_ones(up)
        and lr.rank % convolution_groups(base) == 0
    )
    if not fits or (lr.magnitude is not None and lr.magnitude.shape != (up[0],)):
        got = ", ".join(
            f"{key} {list(value.shape)}"
            for key, value in lr._asdict().items()
            if isinstance(value, Tensor)
        )
        expected = f"down {list(down)}, up {list(up)}, magnitude [{up[0]}]"
        raise UserError(
            f"the factors of {path} do not fit its weight {list(base.weight.shape)}: got {got}, expected {expected}"
        )
    return lr._replace(down=lr.down.reshape(down), up=lr.up.reshape(up))


def _trim_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[:2]) if all(size == 1 for size in shape[2:]) else tuple(shape)


def _check_same_kind(path: str, layer: Adapted, name: str, lr: LowRank) -> None:
    """UserError when an existing adapter is of another rank or kind than the factors, or its folded copy would go stale."""
    if name in layer.folded:
        raise UserError(
            f"adapter {name!r} is folded into the weights; unfold it before loading other factors into it"
        )
    own = layer.adapter(name).state()
    if own.rank != lr.rank or (own.magnitude is None) != (lr.magnitude is None):
        told = [
            f"rank {one.rank} {'lora' if one.magnitude is None else 'dora'}" for one in (own, lr)
        ]
        raise UserError(
            f"adapter {name!r} at {path} is {told[0]} and the factors are {told[1]}; remove it first or load under another name"
        )
