"""Laws that every kind of adapter keeps, checked on a few layers before a run of a class begins.

A new adapter is the identity; its `forward` is the base layer and its `update`, in proportion to
the strength; and the weight that it is folded into does the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters import custom_files, weight_updates
from lora_core.adapters.adapted_layer import Adapted, layers_with_adapter
from lora_core.adapters.adapter_module import BaseLayer, apply_layer
from lora_core.adapters.noise_levels import ForwardLevel
from lora_core.adapters.weight_updates import DenseUpdate, LowRank
from lora_core.errors import UserError
from lora_core.kernels.reference import wide_dtype
from lora_core.plugins import describe_error

TOLERANCE = 1e-3  # of the largest output: 100 times what fp32 loses in sums over a layer's inputs
NUDGE = 0.05  # spread of what is added to the parameters: an update of zero keeps every law
HELP = "see lora_core/adapters/kinds.py"


def check_kind_laws(models: Mapping[str, nn.Module], kind: str, name: str = "default") -> None:
    """Raises UserError, naming the law, unless a class keeps them on a layer of each form."""
    for component, model in models.items():
        seen: set[tuple[type, bool]] = set()
        for path, layer in layers_with_adapter(model, name).items():
            form = type(layer.base), layer.base.bias is None
            if form in seen or layer.base.weight.is_meta:
                continue
            seen.add(form)
            where = f"{kind} at {component}.{path}"
            try:
                with torch.no_grad():
                    _check_layer(layer, layer.adapter(name), where)
            except UserError:
                raise
            except Exception as error:  # whatever the user's class raises
                what = describe_error(error, type(layer.adapter(name)))
                raise UserError(f"{where} fails: {what}; {HELP}") from error


def _check_layer(layer: Adapted, original: Any, where: str) -> None:
    base = copy.deepcopy(layer.base).to(wide_dtype(layer.base.weight.dtype))
    x = _example_input(base)
    level = ForwardLevel()
    level.now, level.t_max = x.new_tensor([0.2, 0.7]), 1.0
    adapter = copy.deepcopy(original, {id(getattr(original, "level", None)): level}).eval()
    y0 = base(x)
    if not _agree(adapter(base, x, 1.0), y0, y0):
        raise UserError(
            f"{where} changes the layer before it is trained; begin with an update of zero; {HELP}"
        )
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter += NUDGE * torch.randn(parameter.shape, generator=generator).to(parameter)
    y = adapter(base, x, 1.0)
    whole, half = (adapter.update(base, x, y0, strength) for strength in (1.0, 0.5))
    if not _agree(y, y0 + whole, y0):
        raise UserError(f"{where}: forward is not base(x) + update; {HELP}")
    if not _agree(half, whole / 2, y0):
        raise UserError(f"{where}: update is not in proportion to the strength; {HELP}")
    if not getattr(adapter, "is_linear", True):
        return  # no weight does what it does; its run writes none
    try:
        delta = adapter.delta_weight(base)
        shift = adapter.delta_bias(base) if hasattr(adapter, "delta_bias") else None
    except custom_files.NO_FACTORS as error:
        if getattr(adapter, "reads_level", False):
            return  # the same
        what = str(error)
        if not isinstance(error, UserError):
            what = (
                f"{describe_error(error, type(adapter))}; add delta_weight, or derive the class "
                f"from adapter_module.Adapter, which has it from `update`; {HELP}"
            )
        raise UserError(f"{where} cannot be folded into the weight: {what}") from error
    bias = base.bias if shift is None else base.bias + shift
    if not _agree(apply_layer(base, x, base.weight + delta, bias), y, y0):
        raise UserError(
            f"{where}: the layer with delta_weight (and delta_bias) in its weights gives another "
            f"output than forward; correct them or, if its update is not linear in x, write "
            f"is_linear = False in the class; {HELP}"
        )
    _check_factors(adapter, base, delta, where)


def _check_factors(adapter: Any, base: BaseLayer, delta: Tensor, where: str) -> None:
    """Raises UserError where the factors for LoRA files are another update than delta_weight."""
    try:
        found = adapter.low_rank(base) if hasattr(adapter, "low_rank") else adapter.state()
    except custom_files.NO_FACTORS:
        return
    if not isinstance(found, LowRank | DenseUpdate):
        return
    update = weight_updates.delta_weight(found, base.weight)
    if not _agree(update, delta.to(update), base.weight):
        raise UserError(
            f"{where}: the factors, which LoRA files take, give another update than delta_weight; "
            f"{HELP}"
        )


def _agree(found: Tensor, wanted: Tensor, y0: Tensor) -> bool:
    size = max(float(wanted.abs().max()), float(y0.abs().max()))
    return found.shape == wanted.shape and float((found - wanted).abs().max()) <= TOLERANCE * size


def _example_input(base: nn.Linear | nn.Conv2d) -> Tensor:
    """[2, 3, in] or [2, in, h, w] random numbers, the same each time."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(base, nn.Linear):
        shape: tuple[int, ...] = (2, 3, base.in_features)
    else:
        shape = (2, base.in_channels, *(2 * side + 2 for side in base.kernel_size))
    return torch.randn(shape, generator=generator).to(base.weight)
