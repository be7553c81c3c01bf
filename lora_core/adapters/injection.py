"""Inject LoRA, DoRA and other kinds into a model's Linear and Conv2d layers, and remove them.

An adapted layer is replaced by `Adapted`, which holds the same layer object as `.base` and any
number of named adapters:

    inject(unet, AdapterSpec(targets=("to_q", "to_v"), rank=8))
    optimizer = torch.optim.AdamW(adapter_parameters(unet))
    factors = adapter_factors(unet)
    remove(unet)

Several adapters give W + t1 delta1 + t2 delta2, each delta taken against the base weight W. A kind
of adapter is a class in kinds.py or in a file of yours, `--adapter.kind my_adapter.py:Class`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters import noise_levels
from lora_core.adapters.adapted_layer import (
    Adapted,
    adaptable_layers,
    adapted_layers,
    check_strength,
    forget_adapted_layers,
    layers_with_adapter,
    module_parents,
)
from lora_core.adapters.adapter_module import BaseLayer, LayerSpec, convolution_groups
from lora_core.adapters.file_kinds import ColumnDoRA, LycorisUpdate, kind_of_update
from lora_core.adapters.groups import build_groups
from lora_core.adapters.kinds import (
    DoRA,
    build_adapters,
    cache_norms,
    check_rank,
    factor_shapes,
    kind_class,
    kind_options,
)
from lora_core.adapters.product_adapter import ProductAdapter
from lora_core.adapters.targets import last_match, nearest_paths, require_match, select_paths
from lora_core.adapters.weight_updates import DenseUpdate, LayerUpdate, LowRank
from lora_core.errors import UserError
from lora_core.settings import AdapterSpec


def layer_spec(spec: AdapterSpec, path: str, seed: int = 0) -> LayerSpec:
    """The adapter settings of one layer; a later matching pattern overrides an earlier one."""
    rank = int(last_match(path, spec.rank_pattern, None) or spec.rank)
    alpha = last_match(path, spec.alpha_pattern, None) or spec.alpha or rank
    return LayerSpec(
        path,
        rank,
        scale=alpha / (math.sqrt(rank) if spec.rslora else rank),
        dropout=spec.dropout,
        init=spec.init,
        seed=seed,
        rank_dropout=spec.rank_dropout,
        module_dropout=spec.module_dropout,
        norm_grad=spec.norm_grad,
        factor=spec.factor,
    )


def target_paths(
    model: nn.Module, patterns: tuple[str, ...], exclude: tuple[str, ...] = ()
) -> list[str]:
    """Paths of the Linear and Conv2d layers that the patterns choose, in the model's order.

    Raises UserError as targets.select_paths does.
    """
    return select_paths(list(adaptable_layers(model)), patterns, exclude)


def inject(
    model: nn.Module, spec: AdapterSpec, *, name: str = "default", seed: int = 0
) -> list[str]:
    """Put an adapter on every target and return the targets' paths.

    The model's output is unchanged, because every update is zero at first. Each layer's initial
    tensors depend on (seed, path) alone. The base's requires_grad is left as it is.

    All or nothing: raises UserError before any change for a pattern without a match, a rank that a
    layer cannot have, a name that is taken, a layer whose forward would not be called.
    """
    kind: Any = kind_class(spec.kind)
    read = kind_options(kind)
    spec.refuse_unread(read)
    found = adaptable_layers(model)
    paths = select_paths(list(found), spec.targets, spec.exclude)
    for pattern in spec.rank_pattern:
        require_match(pattern, paths, "--adapter.rank-pattern")
    for pattern in spec.alpha_pattern:
        require_match(pattern, paths, "--adapter.alpha-pattern")
    _check_name(name, found)
    bases = {path: adaptable_base(path, found[path]) for path in paths}
    if "rank" in read and not getattr(kind, "any_rank", False):
        for path, base in bases.items():
            check_rank(base, path, layer_spec(spec, path).rank)
    specs = {path: layer_spec(spec, path, seed) for path in bases}
    install_adapters(model, build_adapters(kind, bases, specs), name, 1.0)
    return paths


def remove(model: nn.Module, name: str | None = None) -> None:
    """Remove one adapter (or all).

    A layer without adapters is the same base module object as before. Folded adapters are refused.
    """
    adapted = layers_with_adapter(model, name)
    folded: set[str] = set()
    for layer in adapted.values():
        folded.update(key for key in layer.folded if name in (None, key))
    if folded:
        names = ", ".join(sorted(folded))
        raise UserError(
            f"adapter {names} is folded into the weights; unfold it first, then remove it"
        )
    parents, level = module_parents(model), noise_levels.find_level(model)
    for layer in adapted.values():
        for key in list(layer.adapters) if name is None else [name]:
            layer.discard(key)
        if not layer.adapters:
            if layer.group is not None:
                layer.group.dissolve()
            for parent, attribute in parents[id(layer)]:
                parent._modules[attribute] = layer.base
    forget_adapted_layers()
    noise_levels.disconnect_level(model, level)
    build_groups(model)


def set_strength(model: nn.Module, name: str, strength: float) -> None:
    """Make the adapter act as W + strength * delta W from now on; 0 is exactly the base.

    Raises UserError for a folded adapter, whose copy in the weights cannot change.
    """
    adapted = layers_with_adapter(model, name)
    check_strength(strength)
    if any(name in layer.folded for layer in adapted.values()):
        raise UserError(
            f"adapter {name!r} is folded into the weights; unfold it, "
            f"or fold it again at strength {strength}"
        )
    for layer in adapted.values():
        layer.set_strength(name, strength)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run the base model inside the block (a loss's base_out): no adapter acts.

    Only for forwards without gradients: gradient checkpointing would recompute after the block,
    with adapters. Raises UserError while an adapter is folded.
    """
    adapted = adapted_layers(model)
    if any(layer.folded for layer in adapted):
        raise UserError(
            "an adapter is folded into the weights, so there is no base model; unfold it first"
        )
    before = [layer.enabled for layer in adapted]
    try:
        for layer in adapted:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(adapted, before, strict=True):
            layer.enabled = enabled


def has_dora(model: nn.Module) -> bool:
    """Whether any adapter of the model is a DoRA."""
    for layer in adapted_layers(model):
        if any(isinstance(adapter, DoRA) for adapter in layer.adapters.values()):
            return True
    return False


@contextmanager
def cache_dora_norms(model: nn.Module) -> Iterator[None]:
    """Compute the row norms of every DoRA once, on entry, and not in each forward of the block.

    Factors and base weights must not change inside the block. It encloses the forward and backward
    passes of a training step, but not the optimizer's step. A nested block has no effect. The norms
    are dropped at the end of the outermost block, also after an exception. Norms are not cached for
    DoRAs with norm_grad "full" (which need the norms' graph), folded ones, and those that are
    injected, loaded into or moved to another dtype or device inside the block.
    """
    cached: list[tuple[BaseLayer, DoRA]] = []
    for layer in adapted_layers(model):
        if not layer.folded:
            doras = [adapter for adapter in layer.adapters.values() if isinstance(adapter, DoRA)]
            cached += [(layer.base, dora) for dora in doras if dora.takes_cached_norm()]
    try:
        if cached:
            cache_norms(cached)
        yield
    finally:
        for _, dora in cached:
            dora.cached_norm = None


def set_dropout_keys(model: nn.Module, rows: Tensor, step: int | Tensor) -> None:
    """Set the keys of adapter dropout for the next forward.

    rows [b] int64 has one key for each example (noise.Keys.hashes), on the model's device.
    """
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows is {list(rows.shape)} {rows.dtype}; expected [b] int64")
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=rows.device)
    for layer in adapted_layers(model):
        for adapter in layer.adapters.values():
            adapter.row_keys, adapter.step = rows, step


def adapter_parameters(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """The trained parameters in the model's order: down and up, or full updates; fp32 or better.

    A DoRA has its magnitude in addition. A parameter that layers share is listed once.
    """
    found: dict[nn.Parameter, None] = {}
    for layer in layers_with_adapter(model, name).values():
        found |= dict.fromkeys(layer.adapter(name).parameters())
    return list(found)


def up_parameters(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """The up of every layer, in the model's order: LoRA+ gives them a higher learning rate.

    The paper (arXiv 2402.12354) is about down and up only: a DoRA's magnitude has the plain rate
    here (in peft that of up). Raises UserError for a full update.
    """
    found = []
    for path, layer in layers_with_adapter(model, name).items():
        up = getattr(layer.adapter(name), "up", None)
        if not isinstance(up, nn.Parameter):
            raise UserError(
                f"the adapter of {path} has no up and down, to which LoRA+ gives different rates; "
                "leave --optimizer.lora-plus out"
            )
        found.append(up)
    return found


def adapter_factors(model: nn.Module, name: str = "default") -> dict[str, LowRank]:
    """Copies of the factors of LoRA and DoRA by layer path, at strength 1.

    `adapter_updates` takes any kind. Raises UserError for a kind that has no such factors.
    """
    factors = {}
    for path, update in adapter_updates(model, name).items():
        if not isinstance(update, LowRank):
            raise UserError(
                f"the {update.kind} of {path} is not a product of two factors; "
                "take adapter_updates, or distil it to a LoRA"
            )
        factors[path] = update
    return factors


def adapter_updates(model: nn.Module, name: str = "default") -> dict[str, LayerUpdate]:
    """Copies of each adapter's own tensors by layer path, at strength 1.

    Raises UserError for a kind without a `state` for adapter files.
    """
    adapted = layers_with_adapter(model, name)
    updates = {}
    for path, layer in adapted.items():
        updates[path] = stored_update(layer.adapter(name), layer.base)
    return updates


def stored_update(adapter: Any, base: BaseLayer) -> LayerUpdate:
    """An adapter's tensors for adapter files: its `low_rank` of the base layer, else its `state`.

    Raises as these do, and UserError for a class without them.
    """
    if hasattr(adapter, "low_rank"):
        return adapter.low_rank(base)
    if hasattr(adapter, "state"):
        return adapter.state()
    raise UserError(
        f"{type(adapter).__name__} has no form in adapter files; write its own tensors with "
        "lora_core.adapters.custom_files.save_adapters"
    )


def load_factors(
    model: nn.Module,
    factors: Mapping[str, LayerUpdate],
    name: str = "default",
    strength: float = 1.0,
) -> None:
    """Load factors, such as those of a file, into the model.

    Layers that have the adapter are overwritten in place; the others get an adapter of the
    factors' kind and rank. Ranks may differ by layer and exceed min(in, out), as those of
    concatenated factors do. LyCORIS' full updates, and LoHa and LoKr with magnitudes, are computed
    here and take the memory of the layer's weight.

    All or nothing: raises UserError before any change for an unknown path (with the nearest),
    shapes that do not fit, an existing adapter of another rank or kind, or one on layers that the
    factors leave out.
    """
    found = adaptable_layers(model)
    check_strength(strength)
    existing = _check_paths(found, factors, name)
    _check_name(name, {})
    fitted: dict[str, LayerUpdate] = {}
    for path, update in factors.items():
        layer = existing.get(path)
        base = adaptable_base(path, found[path]) if layer is None else layer.base
        fitted[path] = _fit_to_layer(path, base, update)
    for path, layer in existing.items():
        _check_same_kind(path, layer, name, fitted[path])
    built: dict[str, nn.Module] = {}
    for path, update in fitted.items():
        if path not in existing:
            spec = LayerSpec(path, 1, 1.0, init="zero")
            if isinstance(update, LowRank):
                spec = replace(spec, rank=update.rank, scale=update.scale)
            built[path] = kind_of_update(update)(adaptable_base(path, found[path]), spec)
    built_products = {path for path, own in built.items() if isinstance(own, ProductAdapter)}
    install_adapters(model, built, name, strength)
    for path, adapted in layers_with_adapter(model, name).items():
        adapter = adapted.adapter(name)
        if isinstance(adapter, ColumnDoRA | LycorisUpdate) or path in built_products:
            adapter.load_onto(adapted.base, fitted[path])
        else:
            adapter.load(fitted[path])
        adapted.set_strength(name, strength)


def _check_paths(
    found: Mapping[str, BaseLayer | Adapted], factors: Collection[str], name: str
) -> dict[str, Adapted]:
    """The layers that have the adapter.

    Raises UserError for factors that leave one of them out, and for paths that are no layer.
    """
    if not factors:
        raise UserError(
            "there are no factors to load; the file holds nothing for this part of the model"
        )
    for path in factors:
        if path not in found:
            nearest = ", ".join(nearest_paths(path, list(found)))
            raise UserError(f"the model has no layer {path!r}; nearest: {nearest}")
    existing: dict[str, Adapted] = {}
    for path, layer in found.items():
        if isinstance(layer, Adapted) and name in layer.adapters:
            existing[path] = layer
    missing = [path for path in existing if path not in factors]
    if missing:
        raise UserError(
            f"adapter {name!r} is on {len(missing)} layers without factors, e.g. {missing[0]}; "
            "remove it or load under another name"
        )
    return existing


def install_adapters(
    model: nn.Module, built: Mapping[str, nn.Module], name: str, strength: float
) -> None:
    """Put adapters that are built already on the layers of these paths, which lack the name."""
    found = adaptable_layers(model)
    parents = module_parents(model)
    for path, adapter in built.items():
        layer = found[path]
        if not isinstance(layer, Adapted):
            layer = Adapted(layer)
            for parent, attribute in parents[id(layer.base)]:
                parent._modules[attribute] = layer
        layer.add(name, adapter, strength)
    forget_adapted_layers()
    build_groups(model)
    try:
        noise_levels.connect_levels(model)
    except UserError:
        remove(model, name)
        raise


def adaptable_base(path: str, layer: BaseLayer | Adapted) -> BaseLayer:
    """The layer that an adapter is built for.

    Raises UserError where the adapter would not act, or where the base weight is folded.
    """
    base = layer.base if isinstance(layer, Adapted) else layer
    if isinstance(layer, Adapted) and layer.folded:
        raise UserError(
            f"{path} has {', '.join(layer.folded)} folded into its weight; "
            "unfold before adding another adapter"
        )
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise UserError(
            f"{path} is read by torch.nn.MultiheadAttention without being called, "
            "so an adapter does nothing; use --adapter.exclude"
        )
    return base


def _check_name(name: str, found: Mapping[str, BaseLayer | Adapted]) -> None:
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise UserError(
            f"an adapter cannot be named {name!r}; "
            "use letters, digits and _ and no method name of a module"
        )
    taken = []
    for path, layer in found.items():
        if isinstance(layer, Adapted) and name in layer.adapters:
            taken.append(path)
    if taken:
        raise UserError(
            f"adapter {name!r} is already on {len(taken)} layers, e.g. {taken[0]}; "
            "remove it or choose another name"
        )


def _fit_to_layer(path: str, base: BaseLayer, lr: LayerUpdate) -> LayerUpdate:
    """The factors in the layer's shapes; [r, in] and [r, in, 1, 1] are interchangeable.

    Raises UserError, naming the layer, when they do not fit.
    """
    if isinstance(lr, DenseUpdate):
        if _trim_ones(lr.shape) != _trim_ones(base.weight.shape):
            raise UserError(
                f"the {lr.kind} update of {path} has the shape {list(lr.shape)}, its weight "
                f"{list(base.weight.shape)}; is it for another model?"
            )
        return lr
    down, up = factor_shapes(base, lr.rank)
    fits = _trim_ones(lr.down.shape) == _trim_ones(down)
    fits = fits and _trim_ones(lr.up.shape) == _trim_ones(up)
    fits = fits and lr.rank % convolution_groups(base) == 0
    magnitude: tuple[int, ...] = (up[0],)
    if lr.magnitude is not None and lr.magnitude.ndim > 1:
        magnitude = (1, base.weight.shape[1])
    fits_magnitude = lr.magnitude is None or _trim_ones(lr.magnitude.shape) == magnitude
    if not fits or not fits_magnitude:
        tensors = {key: t for key, t in lr._asdict().items() if isinstance(t, Tensor)}
        got = ", ".join(f"{key} {list(t.shape)}" for key, t in tensors.items())
        expected = f"down {list(down)}, up {list(up)}, magnitude {list(magnitude)}"
        raise UserError(
            f"the factors of {path} do not fit its weight {list(base.weight.shape)}: "
            f"got {got}, expected {expected}"
        )
    return lr._replace(down=lr.down.reshape(down), up=lr.up.reshape(up))


def _trim_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[:2]) if all(size == 1 for size in shape[2:]) else tuple(shape)


def _check_same_kind(path: str, layer: Adapted, name: str, lr: LayerUpdate) -> None:
    """Raises UserError for an existing adapter of another rank or kind, or a folded one.

    The folded copy in the weights would not follow new factors.
    """
    if name in layer.folded:
        raise UserError(
            f"adapter {name!r} is folded into the weights; "
            "unfold it before loading other factors into it"
        )
    kind = kind_of_update(lr)
    if kind in (LycorisUpdate, ColumnDoRA):
        raise UserError(
            f"adapter {name!r} is on {path} already, and an update of LyCORIS cannot be loaded "
            "into it; remove it first or load under another name"
        )
    own = layer.adapter(name).state()
    if _describe_factors(own) != _describe_factors(lr):
        raise UserError(
            f"adapter {name!r} at {path} is {_describe_factors(own)} and the factors are "
            f"{_describe_factors(lr)}; remove it first or load under another name"
        )


def _describe_factors(lr: LayerUpdate) -> str:
    """The kind of an adapter and all that its parameters' shapes depend on, in words."""
    if isinstance(lr, LowRank):
        return f"rank {lr.rank} {'lora' if lr.magnitude is None else 'dora'}"
    shapes = [f"{role} {list(lr.tensors[role].shape)}" for role in sorted(lr.tensors)]
    return f"a {lr.kind} of {', '.join(shapes)}"
