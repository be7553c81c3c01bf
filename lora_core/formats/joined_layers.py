"""Layers that files store as one, because the original code computes them as one.

Examples are q, k and v, or these and an MLP's input projection. Their outputs are stacked, so the
joined update is delta W = [delta W_1; delta W_2 ...]. down = [down_1; down_2 ...],
up = diag(up_1, up_2 ...) and one scale for all give it exactly; alpha = scale * rank grows with the
number of parts. sd-scripts and ai-toolkit train one down for all parts instead, with a dense up:
read apart, every part gets its rows of up and all of down, and parts that have the same down are
stored with one again. The last modulation, whose halves (scale and shift) the original code has in
the other order, is swapped here too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LayerUpdate, LowRank
from lora_core.errors import UserError
from lora_core.formats.layout import Component, Layout, Shape

Modules = Mapping[str, LowRank]  # path -> factors
Update = LayerUpdate | Tensor  # a tensor: added to a norm or bias


def join_layout(layout: Layout) -> Layout:
    """The layout of the layers in files, with joined and swapped layers under their stored names.

    Our own names stay in it, because some files use them; `swapped` are those whose stored name is
    another.
    """
    components = {name: _join_component(part) for name, part in layout.components.items()}
    return replace(layout, components=components)


def why_not_joined(state: AdapterState, layout: Layout) -> str:
    """The reason why the state's DoRAs cannot be joined, or "".

    A part without a DoRA would need the norms of its base weight as its magnitude.
    """
    for name, modules in state.components.items():
        for joined, parts in layout.component(name).fused.items():
            doras = [path for path in parts if _is_dora(modules.get(path))]
            columns = [path for path in doras if _by_columns(modules[path])]
            if columns:
                return (
                    f"{name}.{columns[0]} is a DoRA by columns, but such files store it in one "
                    f"layer, {joined}, whose columns have other norms"
                )
            if doras and len(doras) < len(parts):
                other = next(path for path in parts if path not in doras)
                return (
                    f"{name}.{doras[0]} is a DoRA and {other} is not, but such files store both "
                    f"in one layer, {joined}; adapt all of it or none"
                )
    return ""


def join_layers(state: AdapterState, layout: Layout) -> AdapterState:
    """The state as files store it, with joined layers.

    Parts of one layer get one scale (see `equalize_parts`). Raises UserError for the reason that
    `why_not_joined` gives.
    """
    if reason := why_not_joined(state, layout):
        raise UserError(reason)
    state = equalize_parts(state, layout)
    components = {}
    for name, modules in state.components.items():
        components[name] = _join_modules(modules, layout.component(name))
    dense = {name: join_dense(own, layout.component(name)) for name, own in state.dense.items()}
    state = replace(state, components=components, dense=dense)
    if not any(state.parameters.values()):  # as of most files
        return state
    from lora_core.formats.parameter_changes import join_biases

    parameters = {}
    for name, changes in state.parameters.items():
        part = layout.component(name)
        parameters[name] = join_biases(changes, part, _swapped_names(part))
    return replace(state, parameters=parameters)


def join_dense(modules: Mapping[str, DenseUpdate], component: Component) -> dict[str, DenseUpdate]:
    """Updates of LyCORIS, where parts that were read from one stored layer are that layer again.

    Others stay under our names: the parts of a layer have no LoKr or LoHa in common. Raises
    UserError for one whose only name in files is that of a layer with swapped halves.
    """
    stored = dict(modules)
    for joined, paths in component.fused.items():
        parts = [stored[path] for path in paths if path in stored]
        if len(parts) == len(paths) and (whole := _whole_update(parts)):
            for path in paths:
                del stored[path]
            stored[joined] = whole
    for path, name in _swapped_names(component).items():
        if path not in stored:
            continue
        update = stored.pop(path)
        if not update.shift and name == path:
            raise UserError(
                f"{path} is a {update.kind} update, but files store this layer with its halves "
                "swapped; make a LoRA of it: merge.py convert --as lora"
            )
        stored[name if update.shift else path] = update.rolled(-update.shift)
    return stored


def equalize_parts(state: AdapterState, layout: Layout) -> AdapterState:
    """The state whose parts of a joined layer have one scale, the first part's.

    The `up` of others is rescaled to match, in fp32 or better, and rounded to the dtype that the
    joined layer has.
    """
    components = {}
    for name, modules in state.components.items():
        equal = dict(modules)
        for paths in layout.component(name).fused.values():
            parts = {path: modules[path] for path in paths if path in modules}
            if len({lr.scale for lr in parts.values()}) > 1:
                equal |= _share_scale(parts)
        components[name] = equal
    return replace(state, components=components)


def stored_names(component: Component) -> dict[str, str]:
    """Path -> the name of its layer in files, for joined and swapped layers."""
    names = _swapped_names(component)
    for joined, parts in component.fused.items():
        names |= dict.fromkeys(parts, joined)
    return names


def stack_dense(updates: Mapping[str, Tensor], name: str, component: Component) -> Tensor:
    """delta W of the layer that files call `name`, from those of its parts by path.

    Parts that are missing have an update of zero.
    """
    if name not in component.fused:
        (update,) = updates.values()
        return update.roll(update.shape[0] // 2, 0)
    first = next(iter(updates.values()))
    blocks = []
    for path in component.fused[name]:
        empty = first.new_zeros(component.shapes[path])
        blocks.append(updates.get(path, empty))
    return torch.cat(blocks)


def stack_factors(parts: Mapping[str, LowRank], name: str, component: Component) -> LowRank:
    """The layer that files call `name`, from its parts by path.

    All given parts are DoRAs by rows, and then none is missing, or none is.
    """
    if name not in component.fused:
        (lr,) = parts.values()
        return _swap_halves(lr)
    paths = component.fused[name]
    outs = [component.shapes[path][0] for path in paths]
    return _stack_parts([parts.get(path) for path in paths], outs)


def stored_rank(parts: Sequence[LowRank]) -> int:
    """The rank of a joined layer of these parts: that of one where all have the same down."""
    return parts[0].rank if _share_down(parts) else sum(lr.rank for lr in parts)


def separate_layers(
    components: Mapping[str, Mapping[str, Update]], layout: Layout, source: str
) -> dict[str, dict[str, Update]]:
    """Undoes `join_layers`: bit for bit where the scales agreed.

    A part without a column of its own in a block-diagonal `up` was not adapted and is left out.
    Raises UserError for a file that has a layer both whole and in parts, and for a DoRA by columns
    of a joined layer.
    """
    separated = {}
    for name, modules in components.items():
        where = f"{name} of {source}"
        separated[name] = _separate_modules(modules, layout.component(name), where)
    return separated


# ---------------------------------------------------------------- by component


def _join_component(component: Component) -> Component:
    if not component.fused and not component.swapped:
        return component
    shapes = dict(component.shapes)
    for joined, parts in component.fused.items():
        out = sum([component.shapes[path][0] for path in parts])
        shapes[joined] = (out, *component.shapes[parts[0]][1:])
    renamed = _swapped_names(component)
    for path, name in renamed.items():
        shapes[name] = component.shapes[path]
    apart = frozenset(path for path, name in renamed.items() if name != path)
    names = {path: own for path, own in component.names.items() if path not in component.swapped}
    biases = _joined_biases(component, _swapped_names(component))
    parameters = {**component.parameters, **biases}
    return replace(component, shapes=shapes, names=names, parameters=parameters, swapped=apart)


def _joined_biases(component: Component, swapped: Mapping[str, str]) -> dict[str, Shape]:
    """Path of each bias of a joined or swapped layer -> its shape."""
    shapes: dict[str, Shape] = {}
    for joined, paths in component.fused.items():
        sizes = [component.parameters.get(f"{path}.bias", ()) for path in paths]
        if all(sizes):
            shapes[f"{joined}.bias"] = (sum(size[0] for size in sizes),)
    for path, name in swapped.items():
        if (bias := f"{path}.bias") in component.parameters:
            shapes[f"{name}.bias"] = component.parameters[bias]
    return shapes


def _swapped_names(component: Component) -> dict[str, str]:
    """Path -> the name under which files have it with swapped halves.

    A layer that has only our name is swapped under that.
    """
    paths = component.swapped.intersection(component.shapes)
    return {path: component.names.get(path, path) for path in paths}


def _join_modules(modules: Modules, component: Component) -> dict[str, LowRank]:
    stored = dict(modules)
    parts: dict[str, dict[str, LowRank]] = {}
    for path, name in stored_names(component).items():
        if isinstance(stored.get(path), LowRank):  # LyCORIS' updates stay apart
            parts.setdefault(name, {})[path] = stored.pop(path)
    for name, own in parts.items():
        stored[name] = stack_factors(own, name, component)
    return stored


def _separate_modules(
    modules: Mapping[str, Update], component: Component, where: str
) -> dict[str, Update]:
    changes = {path: own for path, own in modules.items() if isinstance(own, Tensor)}
    found = {path: own for path, own in modules.items() if not isinstance(own, Tensor)}
    pieces: list[tuple[str, str, LayerUpdate]] = []  # stored name, path, update
    for joined, parts in component.fused.items():
        if joined in found:
            outs = [component.shapes[path][0] for path in parts]
            apart = _unstack_parts(found.pop(joined), outs, f"{joined} of {where}")
            for path, piece in zip(parts, apart, strict=True):
                if piece is not None:
                    pieces.append((joined, path, piece))
    for path, name in _swapped_names(component).items():
        if name in found:
            pieces.append((name, path, _swap_update(found.pop(name))))
    for name, path, piece in pieces:
        if path in found:
            raise UserError(f"{where} has {path} twice, alone and in {name}; expected one")
        found[path] = piece
    if changes:
        from lora_core.formats.parameter_changes import separate_biases

        changes = separate_biases(changes, component, _swapped_names(component))
    return {**dict(sorted(found.items())), **changes}


# ---------------------------------------------------------------- one layer


def _is_dora(update: LayerUpdate | None) -> bool:
    return update is not None and update.magnitude is not None


def _by_columns(update: LayerUpdate) -> bool:
    return update.magnitude is not None and update.magnitude.ndim > 1


def _swap_halves(lr: LowRank) -> LowRank:
    """The factors with the two halves of the output swapped."""
    half = lr.up.shape[0] // 2
    magnitude = lr.magnitude
    if magnitude is not None and magnitude.ndim == 1:
        magnitude = magnitude.roll(half)
    return lr._replace(up=lr.up.roll(half, 0), magnitude=magnitude)


def _swap_update(update: LayerUpdate) -> LayerUpdate:
    if isinstance(update, DenseUpdate):
        return update.rolled(update.shape[0] // 2)
    return _swap_halves(update)


def _stack_parts(parts: Sequence[LowRank | None], outs: Sequence[int]) -> LowRank:
    """The joined layer of parts with `outs` outputs each; None is a part that is not adapted.

    Parts with the same down have it once. All parts have one scale; all are DoRAs or none is.
    """
    given = [lr for lr in parts if lr is not None]
    is_shared = _share_down(given)
    downs = [given[0].down] if is_shared else [lr.down for lr in given]
    dtype = functools.reduce(torch.promote_types, [lr.up.dtype for lr in given])
    up = given[0].up.new_zeros(sum(outs), sum(map(len, downs)), dtype=dtype)
    row = column = 0
    for lr, out in zip(parts, outs, strict=True):
        if lr is not None:
            up[row : row + out, column : column + lr.rank] = lr.up
            column += 0 if is_shared else lr.rank
        row += out
    magnitudes = [lr.magnitude for lr in given if lr.magnitude is not None]
    magnitude = torch.cat(magnitudes) if magnitudes else None
    return LowRank(torch.cat(downs), up, given[0].scale, magnitude)


def _share_down(parts: Sequence[LowRank]) -> bool:
    return all(_is_same(lr.down, parts[0].down) for lr in parts)


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if first is second:
        return True
    is_alike = first.dtype == second.dtype and first.shape == second.shape
    return is_alike and torch.equal(first, second)


def _whole_update(parts: Sequence[DenseUpdate]) -> DenseUpdate | None:
    """The update of a stored layer of which these are all outputs, in order; None for others."""
    first, stop = parts[0], 0
    for part in parts:
        is_next = part.outputs == (stop, stop + part.shape[0])
        is_alike = part.scale == first.scale and part.tensors.keys() == first.tensors.keys()
        if not is_next or not is_alike:
            return None
        if not all(_is_same(part.tensors[role], own) for role, own in first.tensors.items()):
            return None
        stop += part.shape[0]
    magnitudes = [part.magnitude for part in parts if part.magnitude is not None]
    magnitude = torch.cat(magnitudes) if magnitudes else None
    shape = (stop, *first.shape[1:])
    return replace(first, shape=shape, magnitude=magnitude, outputs=None)


def _share_scale(parts: Modules) -> dict[str, LowRank]:
    """Parts of one layer that differ in scale, with that of the first whose scale is not 0."""
    scale = next(lr.scale for lr in parts.values() if lr.scale)
    dtype = functools.reduce(torch.promote_types, [lr.up.dtype for lr in parts.values()])
    equal = {}
    for path, lr in parts.items():
        wide = lr.up.to(torch.promote_types(lr.up.dtype, torch.float32))
        up = lr.up if lr.scale == scale else (wide * (lr.scale / scale)).to(dtype)
        equal[path] = lr._replace(up=up, scale=scale)
    return equal


def _unstack_parts(lr: LayerUpdate, outs: list[int], where: str) -> Sequence[LayerUpdate | None]:
    """The layer's parts; None for one that is not adapted."""
    if _by_columns(lr):
        raise UserError(
            f"{where} is a DoRA by columns, whose parts have other norms than the whole; "
            "it cannot be read apart, merge it with the tool that trained it"
        )
    if isinstance(lr, DenseUpdate):
        starts = [sum(outs[:i]) for i in range(len(outs))]
        return [lr.rows(start, start + out) for start, out in zip(starts, outs, strict=True)]
    blocks = lr.up.split(outs)
    columns = _columns_by_part(blocks)
    magnitudes: Sequence[Tensor | None] = [None] * len(outs)
    if lr.magnitude is not None:
        magnitudes = lr.magnitude.split(outs)
    has_empty = columns is not None and [] in columns
    # A magnitude changes a row even where up is 0.
    if columns is None or (lr.magnitude is not None and has_empty):
        columns = [list(range(lr.rank))] * len(outs)
    found: list[LayerUpdate | None] = []
    for own, block, magnitude in zip(columns, blocks, magnitudes, strict=True):
        found.append(_take_columns(lr.down, block, own, lr.scale, magnitude) if own else None)
    return found


def _take_columns(
    down: Tensor, up: Tensor, columns: list[int], scale: float, magnitude: Tensor | None
) -> LowRank:
    """The part with some columns of up; with all of them it has the same down, not a copy."""
    if len(columns) == len(down):
        return LowRank(down, up, scale, magnitude)
    return LowRank(down[columns], up[:, columns], scale, magnitude)


def _columns_by_part(blocks: Sequence[Tensor]) -> list[list[int]] | None:
    """The columns of up that belong to each part; None when up is not block-diagonal.

    Columns of zeros: equal shares if that fits, else they belong to the part on their left.
    """
    uses = torch.stack([block.bool().any(dim=0) for block in blocks])  # [parts, r]
    rank = uses.shape[1]
    count = len(blocks)
    share = [column * count // rank for column in range(rank)]
    owners = [row.index(True) if any(row) else -1 for row in uses.T.tolist()]
    if (uses.sum(dim=0) > 1).any():
        return None
    equal = all(owner in (-1, part) for owner, part in zip(owners, share, strict=True))
    if rank % count == 0 and equal:
        owners = share
    elif max(owners) < 0:
        return None
    last = next(owner for owner in owners if owner >= 0)
    for column, owner in enumerate(owners):
        last = owner if owner >= 0 else last
        owners[column] = last
    columns: list[list[int]] = [[] for _ in blocks]
    for column, owner in enumerate(owners):
        columns[owner].append(column)
    return columns
