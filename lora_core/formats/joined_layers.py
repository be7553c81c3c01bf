"""Layers that files store as one, because the original code computes them in one: q, k and v, or these and the way into an MLP.

The outputs are stacked, so the fused update is delta W = [delta W_1; delta W_2 ...]. With down = [down_1; down_2 ...], up = diag(up_1, up_2 ...) and
one scale for all it is exact; alpha = scale * rank grows with the number of parts. Files from elsewhere may have one dense up instead, of which every
part gets its rows and the whole down. Halves of an output that a file stores the other way round are turned in the same place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.errors import UserError
from lora_core.formats.layout import Component, Layout

Modules = Mapping[str, LowRank]  # path -> factors
Update = LowRank | DenseUpdate


def join_layout(layout: Layout) -> Layout:
    """The layout of what files hold: with every fused or turned layer under its own name, beside our own (which some files have)."""
    return replace(
        layout,
        components={
            name: _join_component(component) for name, component in layout.components.items()
        },
    )


def why_not_joined(state: AdapterState, layout: Layout) -> str:
    """Why the state's DoRAs cannot be fused, or "". The rows of a part without a DoRA would need its base weight's norms as their magnitude."""
    for name, modules in state.components.items():
        for fused, parts in layout.component(name).fused.items():
            doras = [
                path for path in parts if path in modules and modules[path].magnitude is not None
            ]
            if columns := [path for path in doras if _by_columns(modules[path])]:
                return f"{name}.{columns[0]} is a DoRA by columns, but such files store it in one layer, {fused}, whose columns have other norms"
            if doras and len(doras) < len(parts):
                other = next(path for path in parts if path not in doras)
                return f"{name}.{doras[0]} is a DoRA and {other} is not, but such files store both in one layer, {fused}; adapt all of it or none"
    return ""


def join_layers(state: AdapterState, layout: Layout) -> AdapterState:
    """The state as files hold it. Parts that differ in scale get the first part's, exactly: their `up` takes up the rest, in fp32 or better.

    Raises UserError for an `obstacle`.
    """
    if reason := why_not_joined(state, layout):
        raise UserError(reason)
    return replace(
        state,
        components={
            name: _join_modules(modules, layout.component(name))
            for name, modules in state.components.items()
        },
    )


def separate_layers(
    components: Mapping[str, Mapping[str, Update]], layout: Layout, source: str
) -> dict[str, dict[str, Update]]:
    """Undoes `fuse`: bit for bit where the scales agreed. A part that has no column of a block-diagonal `up` for itself was not adapted, and is left
    out. Raises UserError for a file that has a layer whole and in parts, and for a DoRA by columns of a fused layer.
    """
    return {
        name: _separate_modules(modules, layout.component(name), f"{name} of {source}")
        for name, modules in components.items()
    }


def _join_component(component: Component) -> Component:
    shapes = dict(component.shapes)
    for fused, parts in component.fused.items():
        shapes[fused] = (
            sum(component.shapes[path][0] for path in parts),
            *component.shapes[parts[0]][1:],
        )
    for path, name in _swapped_names(component).items():
        shapes[name] = component.shapes[path]
    return replace(
        component,
        shapes=shapes,
        names={
            path: name for path, name in component.names.items() if path not in component.swapped
        },
    )


def _swapped_names(component: Component) -> dict[str, str]:
    """Path -> the name under which files have it turned; a layer that only has our name is turned under that."""
    return {
        path: component.names.get(path, path)
        for path in component.swapped
        if path in component.shapes
    }


def _join_modules(modules: Modules, component: Component) -> dict[str, LowRank]:
    names = _swapped_names(component)
    stored = {
        names.get(path, path): _swap_halves(lr) if path in names else lr
        for path, lr in modules.items()
    }
    for fused, parts in component.fused.items():
        if any(path in stored for path in parts):
            stored[fused] = _stack_parts(
                [stored.pop(path, None) for path in parts],
                [component.shapes[path][0] for path in parts],
            )
    return stored


def _separate_modules(
    modules: Mapping[str, Update], component: Component, where: str
) -> dict[str, Update]:
    found = dict(modules)
    pieces: list[tuple[str, str, Update | None]] = []  # stored name, path, update
    for fused, parts in component.fused.items():
        if fused in found:
            apart = _unstack_parts(
                found.pop(fused),
                [component.shapes[path][0] for path in parts],
                f"{fused} of {where}",
            )
            pieces += [(fused, path, piece) for path, piece in zip(parts, apart, strict=True)]
    pieces += [
        (name, path, _swap_update(found.pop(name)))
        for path, name in _swapped_names(component).items()
        if name in found
    ]
    for name, path, piece in pieces:
        if piece is not None and path in found:
            raise UserError(f"{where} has {path} twice, alone and in {name}; expected one")
        if piece is not None:
            found[path] = piece
    return dict(sorted(found.items()))


def _by_columns(update: Update) -> bool:
    return update.magnitude is not None and update.magnitude.ndim > 1


def _swap_halves(lr: LowRank) -> LowRank:
    """With the halves of the output in the other order."""
    half = lr.up.shape[0] // 2
    magnitude = lr.magnitude if lr.magnitude is None or _by_columns(lr) else lr.magnitude.roll(half)
    return lr._replace(up=lr.up.roll(half, 0), magnitude=magnitude)


def _swap_update(update: Update) -> Update:
    return (
        update.rolled(update.shape[0] // 2)
        if isinstance(update, DenseUpdate)
        else _swap_halves(update)
    )


def _stack_parts(parts: Sequence[LowRank | None], outs: Sequence[int]) -> LowRank:
    """One layer of parts with `outs` outputs; None is a part that is not adapted. All parts are DoRAs or none is."""
    given = [lr for lr in parts if lr is not None]
    scale = next((lr.scale for lr in given if lr.scale), 0.0)
    up = torch.zeros(
        sum(outs), sum(lr.rank for lr in given), dtype=given[0].up.dtype, device=given[0].up.device
    )
    row = column = 0
    for lr, out in zip(parts, outs, strict=True):
        if lr is not None:
            up[row : row + out, column : column + lr.rank] = (
                lr.up if lr.scale == scale else _scale_up(lr.up, lr.scale / scale)
            )
            column += lr.rank
        row += out
    magnitudes = [lr.magnitude for lr in given if lr.magnitude is not None]
    return LowRank(
        torch.cat([lr.down for lr in given]),
        up,
        scale,
        torch.cat(magnitudes) if magnitudes else None,
    )


def _scale_up(up: Tensor, factor: float) -> Tensor:
    return up.to(torch.promote_types(up.dtype, torch.float32)) * factor


def _unstack_parts(lr: Update, outs: list[int], where: str) -> Sequence[Update | None]:
    """The layer's parts; None for one that is not adapted."""
    if _by_columns(lr):
        raise UserError(
            f"{where} is a DoRA by columns, whose parts have other norms than the whole; it cannot be read apart"
        )
    if isinstance(lr, DenseUpdate):
        starts = [sum(outs[:i]) for i in range(len(outs))]
        return [lr.rows(start, start + out) for start, out in zip(starts, outs, strict=True)]
    blocks = lr.up.split(outs)
    columns = _columns_by_part(blocks)
    magnitudes: Sequence[Tensor | None] = (
        [None] * len(outs) if lr.magnitude is None else lr.magnitude.split(outs)
    )
    if columns is None or (
        lr.magnitude is not None and [] in columns
    ):  # a magnitude changes a row even where up is 0
        columns = [list(range(lr.rank))] * len(outs)
    return [
        LowRank(lr.down[own], block[:, own], lr.scale, magnitude) if own else None
        for own, block, magnitude in zip(columns, blocks, magnitudes, strict=True)
    ]


def _columns_by_part(blocks: Sequence[Tensor]) -> list[list[int]] | None:
    """Which columns each part alone uses; None when up is not block-diagonal. Columns of zeros: equal shares if that fits, else to the left."""
    uses = torch.stack([block.bool().any(dim=0) for block in blocks])  # [parts, r]
    rank, count = uses.shape[1], len(blocks)
    share = [column * count // rank for column in range(rank)]
    owners = [row.index(True) if any(row) else -1 for row in uses.T.tolist()]
    if (uses.sum(dim=0) > 1).any():
        return None
    if rank % count == 0 and all(
        owner in (-1, part) for owner, part in zip(owners, share, strict=True)
    ):
        owners = share
    elif max(owners) < 0:
        return None
    first = next(owner for owner in owners if owner >= 0)
    for column, owner in enumerate(owners):
        owners[column] = owner if owner >= 0 else owners[column - 1] if column else first
    return [
        [column for column, owner in enumerate(owners) if owner == part] for part in range(count)
    ]
