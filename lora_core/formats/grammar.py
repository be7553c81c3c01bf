"""Keys of adapter files: a grammar spells them, and files are read with the table of all spellings.

A key is a head (a prefix), a module's path in the format's spelling, and a leaf (a suffix). Writers
use one spelling of each; readers accept all leaves under every head, because files mix them. A
format is a `Grammar`, a family a `Layout`. Keys are looked up, never parsed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, LayerUpdate, LowRank, split_updates
from lora_core.errors import UserError
from lora_core.formats import lycoris
from lora_core.formats.known_formats import ADAPTER_NAME, PARAMETER_ROLES, ROLE_OF_LEAF
from lora_core.formats.layout import Component, Layout, Shape, nearest_name

MOST_COMPARED = 200  # names compared for the nearest one: comparing 10^5 takes a minute
Update = LayerUpdate | Tensor  # a tensor: added to a norm or bias
Scale = Callable[[str, int, str], float]  # (path, rank, where) -> the factor of up @ down
NORM_ROLES = ("w_norm", "b_norm")  # roles that layers do not have
TensorRole = tuple[str, str, str]  # (component, published path, role)


@dataclass(frozen=True)
class Grammar:
    """How a format spells the tensors of one module."""

    # (name, component) -> beginnings of its keys; the first is written, all are read; "" is none
    heads: Callable[[str, Component], tuple[str, ...]]
    # (component, published path) -> the dotted names of a module; the first is written
    names: Callable[[Component, str], Sequence[str]]
    leaves: Mapping[str, str]  # role -> leaf that is written
    scale: Literal["folded", "alpha"]  # multiplied into up, or stored as alpha = scale * rank
    # (out, ndim of the weight) -> shape of a DoRA magnitude by rows
    magnitude: Callable[[int, int], tuple[int, ...]]
    separator: str = "."  # between the words of a module's name
    columns: bool = False  # whether a DoRA magnitude may be by columns
    # (component, role) -> leaf that is written there instead
    written: Mapping[tuple[str, str], str] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodeOptions:
    """Options for reading a file."""

    allow_extra: bool = False  # unknown keys are left out and named in one line
    dora_axis: str = ""  # "rows" or "columns": axis of magnitudes with an ambiguous shape
    header_axis: str = ""  # the same, from the file's header
    mapped: bool = False  # tensors stay on the disk until they are used


STRICT = DecodeOptions()


# ---------------------------------------------------------------- keys


def list_known_keys(
    grammar: Grammar,
    layout: Layout,
    leaves: Mapping[str, str] | None = None,
    keys: Collection[str] = (),
) -> dict[str, TensorRole]:
    """Every key that a file of this grammar can have -> the tensor's role.

    With `leaves` (leaf -> role) only keys that end in one of them, else in any; with the `keys` of
    a file only those that begin as some of them. Raises ValueError when two modules would share a
    key.
    """
    leaves = ROLE_OF_LEAF if leaves is None else leaves
    of_norms = {leaf: role for leaf, role in leaves.items() if role in PARAMETER_ROLES}
    of_layers = {leaf: role for leaf, role in leaves.items() if role not in NORM_ROLES}
    known: dict[str, TensorRole] = {}
    for name, component in layout.components.items():
        heads = spell_heads(grammar, name, component)
        if keys:
            # of the keys' beginnings, cut where the heads end: one look for all keys
            heads = [head for head in heads if head in {key[: len(head)] for key in keys}]
        if not heads:
            continue
        _add_keys(known, name, heads, spell_paths(grammar, component, component.shapes), of_layers)
        if of_norms:
            spelled = spell_paths(grammar, component, component.norms)
            _add_keys(known, name, heads, spelled, of_norms)
    return known


def _add_keys(
    known: dict[str, TensorRole],
    component: str,
    heads: Sequence[str],
    spelled: Mapping[str, Sequence[str]],
    leaves: Mapping[str, str],
) -> None:
    """Adds the keys of modules in place; `spelled` has the names of each path.

    Raises ValueError for a key of two modules.
    """
    for path, spellings in spelled.items():
        for head, words in itertools.product(heads, spellings):
            module = head + words
            for leaf, role in leaves.items():
                meaning = (component, path, role)
                other = known.setdefault(module + leaf, meaning)
                if other != meaning:
                    raise ValueError(
                        f"{module} would name both {other[1]} and {path}; "
                        "this grammar cannot spell the layout"
                    )


def find_leaves(keys: Iterable[str], source: str) -> dict[str, str]:
    """The leaves that occur in a file -> their roles.

    Where peft left an adapter's name in the keys, it is part of the leaf. Raises UserError for two
    adapters in a file.
    """
    keys = list(keys)
    matches = [(ADAPTER_NAME.search(key), key) for key in keys]
    names = {match["factor"] or match["vector"]: key for match, key in matches if match}
    if len(names) > 1:
        (one, key), (other, second) = list(names.items())[:2]
        raise UserError(
            f"{source} has the adapters {one} ({key}) and {other} ({second}), expected one; "
            "save them apart"
        )
    every = dict(ROLE_OF_LEAF)
    for name in names:
        every |= {f".lora_A.{name}.weight": "down", f".lora_B.{name}.weight": "up"}
        every |= {f".lora_magnitude_vector.{name}{end}": "magnitude" for end in ("", ".weight")}
    found = set()
    for key in keys:
        for leaf in every:
            if key.endswith(leaf):
                found.add(leaf)
    return {leaf: role for leaf, role in every.items() if leaf in found}


def spell_heads(grammar: Grammar, name: str, component: Component) -> list[str]:
    """The beginnings of a component's keys, each with its separator."""
    heads = [f"{head}." if head else "" for head in grammar.heads(name, component)]
    return [head.replace(".", grammar.separator) for head in heads]


def spell_paths(
    grammar: Grammar, component: Component, paths: Iterable[str]
) -> dict[str, list[str]]:
    """Path -> the names of the module, each with and without the level that installed ones lack."""
    table = {}
    for path in paths:
        spellings: list[str] = []
        for name in grammar.names(component, path):
            for dotted in (name, name.removeprefix(component.module_prefix)):
                words = dotted.replace(".", grammar.separator)
                if words not in spellings:
                    spellings.append(words)
        table[path] = spellings
    return table


# ---------------------------------------------------------------- writing


def encode_adapter(state: AdapterState, grammar: Grammar, layout: Layout) -> dict[str, Tensor]:
    """Tensors under this grammar's keys. A folded scale is multiplied in fp32 or better.

    Raises UserError for a module the layout lacks, and for a DoRA by columns in a format without
    them.
    """
    tensors: dict[str, Tensor] = {}
    for name, modules in state.components.items():
        component = layout.component(name)
        leaves = {
            role: grammar.written.get((name, role), leaf) for role, leaf in grammar.leaves.items()
        }
        head = spell_heads(grammar, name, component)[0]
        spellings = spell_paths(grammar, component, modules)
        for path, lr in modules.items():
            if path not in component.shapes:
                layout.module_path(name, path)  # raises the error that names the nearest path
            if lr.magnitude is not None and lr.magnitude.ndim > 1 and not grammar.columns:
                raise UserError(
                    f"{name}.{path} is a DoRA by columns, which only kohya's format holds; write "
                    "that, or make a LoRA of it: merge.py convert --as lora --model BASE"
                )
            module = head + spellings[path][0]
            for role, tensor in _tensors_to_write(lr, grammar).items():
                tensors[module + leaves[role]] = tensor
    if any(state.dense.values()):
        tensors |= _encode_dense(state, grammar, layout)
    if any(state.parameters.values()):
        tensors |= _encode_parameters(state, grammar, layout)
    return tensors


def _encode_dense(state: AdapterState, grammar: Grammar, layout: Layout) -> dict[str, Tensor]:
    """Key -> tensor of LyCORIS' updates.

    A layer that files only have as a part of another is spelled as LyCORIS spells modules.
    """
    tensors: dict[str, Tensor] = {}
    for name, modules in state.dense.items():
        component = layout.component(name)
        head = spell_heads(grammar, name, component)[0]
        apart = {*component.swapped}.union(*component.fused.values())
        starts = {}
        for path, spellings in spell_paths(grammar, component, modules).items():
            if path not in component.shapes:
                layout.module_path(name, path)  # raises the error that names the nearest path
            starts[path] = head + spellings[0]
            if path in apart:
                starts[path] = lycoris.HEAD + path.replace(".", grammar.separator)
        tensors |= lycoris.encode_updates(modules, starts)
    return tensors


def _encode_parameters(state: AdapterState, grammar: Grammar, layout: Layout) -> dict[str, Tensor]:
    """Key -> tensor of the changes of norms and biases, which few files have."""
    from lora_core.formats.parameter_changes import changed_modules, encode_parameters

    tensors: dict[str, Tensor] = {}
    for name, changes in state.parameters.items():
        component = layout.component(name)
        head = spell_heads(grammar, name, component)[0]
        spelled = spell_paths(grammar, component, changed_modules(changes))
        starts = {path: head + words[0] for path, words in spelled.items()}
        tensors |= encode_parameters(changes, component, starts, grammar.leaves)
    return tensors


def _tensors_to_write(lr: LowRank, grammar: Grammar) -> dict[str, Tensor]:
    """Role -> tensor of one module."""
    if grammar.scale == "folded":
        lr = fold_scale(lr)
    parts: dict[str, Tensor] = {"down": lr.down, "up": lr.up}
    if grammar.scale == "alpha":
        parts["alpha"] = torch.tensor(lr.scale * lr.rank, dtype=torch.float32)
    if lr.magnitude is not None:
        by_rows = lr.magnitude.ndim == 1
        shape = grammar.magnitude(lr.up.shape[0], lr.down.ndim)
        parts["magnitude"] = lr.magnitude.reshape(shape) if by_rows else lr.magnitude
    return parts


def fold_scale(lr: LowRank) -> LowRank:
    """The same update with scale 1, for formats that store none."""
    return lr if lr.scale == 1 else scale_factors(lr, lr.scale)._replace(scale=1.0)


def scale_factors(lr: LowRank, factor: float) -> LowRank:
    """The adapter with `factor` multiplied into its tensors, in their dtypes; the scale stays.

    `share_of_down` of it is multiplied into `down`, the rest into `up`, in fp32 or better.
    """
    share = share_of_down(lr.up.dtype, factor)
    wide = lr.up.to(torch.promote_types(lr.up.dtype, torch.float32))
    up = (wide * (factor / share)).to(lr.up.dtype)
    return lr._replace(up=up, down=lr.down if share == 1 else lr.down * share)


def share_of_down(dtype: torch.dtype, factor: float) -> float:
    """The power of two next to a factor's root in fp16, where small numbers lose their digits.

    Else 1. It depends on the factor alone, so that layers that share a down still do.
    """
    if dtype != torch.float16 or not factor:
        return 1.0
    return 2.0 ** round(math.log2(abs(factor)) / 2)


# ---------------------------------------------------------------- reading


def decode_adapter(
    tensors: Mapping[str, Tensor],
    known: Mapping[str, TensorRole],
    layout: Layout | None,
    source: str,
    *,
    options: DecodeOptions = STRICT,
    scales: Mapping[str, Scale] | None = None,
) -> dict[str, dict[str, Update]]:
    """Component -> published path -> update; factors of convolutions 4-D, of linear layers 2-D.

    The scale is alpha / rank where the file has an alpha, else that of the component's `scales`,
    else 1. Raises UserError for unknown keys, incomplete or repeated modules, and shapes that do
    not fit the layout.
    """
    if leftover := [key for key in tensors if key not in known]:
        if not options.allow_extra or len(leftover) == len(tensors):
            near = nearest_key(leftover[0], known) or "none"
            raise UserError(
                f"{_describe_unknown(leftover, source)}; nearest known: {near}; "
                "is it for another model?"
            )
        print(f"{_describe_unknown(leftover, source)}, left out", file=sys.stderr)
    components: dict[str, dict[str, Update]] = {}
    for (component, path), parts in sorted(_group_by_module(tensors, known, source).items()):
        part = layout.components[component] if layout else None
        where = f"{component}.{path} in {source}"
        own = components.setdefault(component, {})
        if not PARAMETER_ROLES.keys().isdisjoint(parts):
            from lora_core.formats.parameter_changes import take_parameters  # in few files

            changes = take_parameters(parts, part, path, where)
            own.update(changes)
            if changes and parts.keys() <= {"alpha"}:
                continue
        shape = part.shapes[path] if part else None
        is_lycoris = not lycoris.ROLES.isdisjoint(parts)
        if is_lycoris:
            update: LayerUpdate = lycoris.to_dense_update(parts, shape, where)
        else:
            update = _to_low_rank(parts, shape, where)
            if scales and component in scales and "alpha" not in parts:
                update = update._replace(scale=scales[component](path, update.rank, where))
        if "magnitude" in parts or "dora_scale" in parts:
            update = _add_magnitude(update, parts, options, where)
        own[path] = update
    return components


def to_adapter_state(
    components: Mapping[str, Mapping[str, Update]], header: Mapping[str, str]
) -> AdapterState:
    """The state of decoded updates: factors in `components`, vectors in `parameters`, the rest
    in `dense`.
    """
    layers: dict[str, dict[str, LayerUpdate]] = {}
    parameters: dict[str, dict[str, Tensor]] = {}
    for name, modules in components.items():
        for path, update in modules.items():
            if isinstance(update, Tensor):
                parameters.setdefault(name, {})[path] = update
            else:
                layers.setdefault(name, {})[path] = update
    factors, dense = split_updates(layers)
    return AdapterState(factors, metadata=dict(header), parameters=parameters, dense=dense)


def nearest_key(key: str, known: Iterable[str]) -> str:
    """The known key most similar to this one, among those that share the most words with it.

    "" when no key is known.
    """
    words = set(re.split(r"[._]", key))

    def count_shared(other: str) -> int:
        return len(words.intersection(re.split(r"[._]", other)))

    likely = sorted(known, key=count_shared, reverse=True)[:MOST_COMPARED]
    return nearest_name(key, likely)


def _group_by_module(
    tensors: Mapping[str, Tensor], known: Mapping[str, TensorRole], source: str
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """(component, path) -> role -> tensor. Raises UserError for a role that occurs twice."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key not in known:
            continue
        component, path, role = known[key]
        parts = found.setdefault((component, path), {})
        if role in parts:
            raise UserError(
                f"{source} has two tensors for the {role} of {component}.{path}, "
                f"one of them {key}; expected one"
            )
        if role != "alpha" and not tensor.is_floating_point():
            raise UserError(
                f"{key} in {source} is {tensor.dtype}, expected floating point; "
                "quantized adapters are not read"
            )
        parts[role] = tensor
    return found


def _to_low_rank(parts: Mapping[str, Tensor], shape: Shape | None, where: str) -> LowRank:
    for role in ("down", "up"):
        if role not in parts:
            has = " and ".join(parts)
            raise UserError(f"{where} has {has} but no {role}; the file is incomplete")
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        down = lycoris.merge_core(down, parts["mid"], where)
    if shape is None:
        shape = (up.shape[:1].numel(), *down.shape[1:])
        expected = "[r, in] or [r, in, kh, kw], and [out, r] with the same r > 0"
    else:
        expected = f"[r, {', '.join(map(str, shape[1:]))}] and [{shape[0]}, r]"
    out, *inner = shape
    rank = down.shape[0] if down.ndim else 0
    whole = (rank, *inner)
    if tuple(down.shape) != whole or tuple(up.shape) != (out, rank) or len(whole) != 2 or not rank:
        fits = pad_shape(down.shape) == pad_shape(whole) and pad_shape(up.shape) == pad_shape(
            (out, rank)
        )
        if not rank or down.ndim not in (2, 4) or not fits:
            raise UserError(
                f"{where} has down {list(down.shape)} and up {list(up.shape)}, "
                f"expected {expected}; is it for another model?"
            )
        down = down.reshape(whole)
        up = up.reshape(out, rank, *[1] * (len(inner) - 1))
    scale = lycoris.resolve_scale(parts, rank, where)
    if "scalar" in parts:
        scale *= lycoris.resolve_scalar(parts, where)
    return LowRank(down, up, scale)


def _add_magnitude(
    update: LayerUpdate, parts: Mapping[str, Tensor], options: DecodeOptions, where: str
) -> LayerUpdate:
    """The update with the file's DoRA magnitude: [out], or by columns [1, in (, 1, 1)]."""
    given = [role for role in ("magnitude", "dora_scale") if role in parts]
    if len(given) > 1:
        raise UserError(
            f"{where} has two DoRA magnitudes, lora_magnitude_vector and dora_scale; expected one"
        )
    magnitude = parts[given[0]]
    if isinstance(update, LowRank):
        shape: Shape = (update.up.shape[0], *update.down.shape[1:])
    else:
        shape = update.shape
    if _magnitude_axis(magnitude, shape, given[0], options, where) == "rows":
        magnitude = magnitude.reshape(shape[0])
    else:
        magnitude = magnitude.reshape(1, shape[1], *[1] * (len(shape) - 2))
    if isinstance(update, LowRank):
        return update._replace(magnitude=magnitude)
    return dataclasses.replace(update, magnitude=magnitude)


def _magnitude_axis(
    magnitude: Tensor, weight: Shape, role: str, options: DecodeOptions, where: str
) -> str:
    """The axis of a magnitude, "rows" or "columns": from its shape, or `options` if both fit.

    Raises UserError when that leaves it open; it never guesses.
    """
    out, inner = weight[:2]
    got = tuple(magnitude.shape)
    padded = pad_shape(got)
    rows = got == (out,) or padded == (out, 1, 1, 1)
    columns = False
    expected = f"one number per output, [{out}] or [{out}, 1]"
    if role == "magnitude":
        rows = rows or padded == (1, out, 1, 1)
    else:
        columns = got == (inner,) or padded == (1, inner, 1, 1)
        expected += f", or one per input, [1, {inner}]"
    if not rows and not columns:
        raise UserError(f"{where} has a DoRA magnitude {list(got)}, expected {expected}")
    if rows and columns:
        chosen = options.dora_axis or options.header_axis
        if not chosen:
            raise UserError(
                f"{where} has a DoRA magnitude {list(got)}, "
                f"which may go by the rows or columns of {list(weight)}; "
                'choose dora_axis="rows" (peft, LyCORIS with wd_on_output) '
                'or dora_axis="columns" (older LyCORIS)'
            )
        return chosen
    axis = "rows" if rows else "columns"
    if options.dora_axis not in ("", axis):
        raise UserError(
            f"{where} has a DoRA magnitude {list(got)}, which goes by {axis}, "
            f"not by {options.dora_axis}; leave the axis out"
        )
    return axis


def pad_shape(shape: Iterable[int]) -> Shape:
    """The shape with trailing ones up to four axes.

    A 1x1 convolution and a linear layer are written either way.
    """
    sizes = tuple(shape)
    return sizes + (1,) * (4 - len(sizes))


def _describe_unknown(keys: list[str], source: str) -> str:
    shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return f"{source} has {len(keys)} unknown key(s): {shown}"
