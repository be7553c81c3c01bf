"""Key grammars as tables: encode every module a layout knows, and read a file through the inverted dictionary.

A key is a head, a module's path in the format's spelling, and a leaf. Writers use one spelling of each; readers know all leaves under every head,
because files mix them. What differs between formats is a `Grammar`; what differs between families is the `Layout`. No key is ever taken apart.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.errors import UserError
from lora_core.formats import lycoris
from lora_core.formats.layout import Component, Layout

LEAVES: Mapping[
    str, tuple[str, ...]
] = {  # role -> all its spellings; a leaf with "_" goes with the names of old attention processors
    "down": (
        ".lora_A.weight",
        ".lora_down.weight",
        ".lora.down.weight",
        ".lora_linear_layer.down.weight",
        "_lora.down.weight",
        ".lora_A",
    ),
    "up": (
        ".lora_B.weight",
        ".lora_up.weight",
        ".lora.up.weight",
        ".lora_linear_layer.up.weight",
        "_lora.up.weight",
        ".lora_B",
    ),
    "mid": (".lora_mid.weight",),
    "alpha": (".alpha", "_lora.alpha"),
    "magnitude": (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),  # by rows
    "dora_scale": (".dora_scale",),  # by rows or columns
    **{role: (f".{role}",) for role in lycoris.ROLES},
}
ADAPTER_NAME = re.compile(
    r"\.lora_(?:[AB]\.(?P<factor>[^.]+)\.weight|magnitude_vector\.(?!weight$)(?P<vector>[^.]+)(?:\.weight)?)$"
)  # an adapter's name
MOST_COMPARED = 200  # names compared for the nearest one: comparing 10^5 takes a minute
Update = LowRank | DenseUpdate
Scale = Callable[
    [str, int, str], float
]  # (path, rank, where: for errors) -> the factor of up @ down in a file without alphas


@dataclass(frozen=True)
class Grammar:
    """How a format spells the tensors of one module."""

    heads: Callable[
        [str, Component], tuple[str, ...]
    ]  # what a component's names begin with; the first is written, all are read; "" is no head
    names: Callable[
        [Component, str], tuple[str, ...]
    ]  # the dotted names a published path goes by; likewise
    leaves: Mapping[str, str]  # role -> leaf that is written
    scale: Literal[
        "folded", "alpha"
    ]  # where the scale goes: multiplied into up, or a tensor alpha = scale * rank
    magnitude: Callable[
        [int, int], tuple[int, ...]
    ]  # (out, ndim of the weight) -> shape of a DoRA magnitude by rows
    separator: str = "."  # between the words of a module's name
    columns: bool = False  # whether a DoRA magnitude may be by columns
    written: Mapping[tuple[str, str], str] = field(
        default_factory=dict
    )  # (component, role) -> leaf that is written there instead


class TensorRole(NamedTuple):
    component: str
    path: str  # published
    role: str


@dataclass(frozen=True)
class ReadOptions:
    """What a caller asks of a reader."""

    allow_extra: bool = False  # unknown keys are left out, said in one line
    dora_axis: str = ""  # "rows" or "columns" of magnitudes whose shape does not tell
    header_axis: str = ""  # what the file says of it


STRICT = ReadOptions()


def list_known_keys(
    grammar: Grammar, layout: Layout, leaves: Mapping[str, str] | None = None
) -> dict[str, TensorRole]:
    """Every key a file of this grammar can have -> what it means; with these leaves (leaf -> role), else with all.

    Raises ValueError when two modules would share a key.
    """
    leaves = (
        {leaf: role for role, spellings in LEAVES.items() for leaf in spellings}
        if leaves is None
        else leaves
    )
    known: dict[str, TensorRole] = {}
    for name, component in layout.components.items():
        for path in component.shapes:
            for module in spell_module(grammar, name, component, path):
                for leaf, role in leaves.items():
                    site = TensorRole(name, path, role)
                    other = known.setdefault(module + leaf, site)
                    if other != site:
                        raise ValueError(
                            f"{module} would name both {other.path} and {path}; this grammar cannot spell the layout"
                        )
    return known


def find_leaves(keys: Iterable[str], source: str) -> dict[str, str]:
    """The leaves that occur in a file -> their roles, with an adapter's name where peft left it in. Raises UserError for two adapters in a file."""
    keys = list(keys)
    names = {
        match["factor"] or match["vector"]: key
        for key in keys
        if (match := ADAPTER_NAME.search(key))
    }
    if len(names) > 1:
        (one, key), (other, second) = list(names.items())[:2]
        raise UserError(
            f"{source} has the adapters {one} ({key}) and {other} ({second}), expected one; save them apart"
        )
    every = {leaf: role for role, spellings in LEAVES.items() for leaf in spellings}
    for name in names:
        every |= {f".lora_A.{name}.weight": "down", f".lora_B.{name}.weight": "up"}
        every |= {f".lora_magnitude_vector.{name}{end}": "magnitude" for end in ("", ".weight")}
    return {leaf: role for leaf, role in every.items() if any(key.endswith(leaf) for key in keys)}


def is_adapter_key(key: str) -> bool:
    """Whether a key ends like a tensor of an adapter."""
    return key.endswith(
        tuple(leaf for role, spellings in LEAVES.items() if role != "alpha" for leaf in spellings)
    ) or bool(ADAPTER_NAME.search(key))


def spell_module(grammar: Grammar, name: str, component: Component, path: str) -> list[str]:
    """The spellings of a module: first the one that is written, then those that are only read (older heads, a missing published level)."""
    dotted = dict.fromkeys(
        word
        for own in grammar.names(component, path)
        for word in (own, own.removeprefix(component.module_prefix))
    )
    return [(f"{head}." if head else "").replace(".", grammar.separator) + words.replace(".", grammar.separator)
            for words in dotted for head in grammar.heads(name, component)]  # fmt: skip


def encode_adapter(state: AdapterState, grammar: Grammar, layout: Layout) -> dict[str, Tensor]:
    """Tensors under this grammar's keys. A folded scale is multiplied in fp32 or better.

    Raises UserError for a module the layout lacks, and for a DoRA by columns where the format has none.
    """
    tensors: dict[str, Tensor] = {}
    for name, modules in state.components.items():
        for path, lr in modules.items():
            layout.module_path(name, path)  # refuses a path that is not there
            if lr.magnitude is not None and lr.magnitude.ndim > 1 and not grammar.columns:
                raise UserError(
                    f"{name}.{path} is a DoRA by columns, which only kohya's format holds; fold it into a model, or write that"
                )
            module = spell_module(grammar, name, layout.component(name), path)[0]
            for role, tensor in _tensors_to_write(lr, grammar).items():
                tensors[module + grammar.written.get((name, role), grammar.leaves[role])] = tensor
    return tensors


def decode_adapter(
    tensors: Mapping[str, Tensor], known: Mapping[str, TensorRole], layout: Layout | None, source: str, *, how: ReadOptions = STRICT,
    scales: Mapping[str, Scale] | None = None,
) -> dict[str, dict[str, Update]]:  # fmt: skip
    """Component -> published path -> update, its scale resolved; factors of conv layers 4-D, of linear layers 2-D.

    The scale is alpha / rank where the file has an alpha, else what `scales` say of the component, else 1. Raises UserError for keys that mean
    nothing here, incomplete or repeated modules, and shapes that do not fit the layout.
    """
    if leftover := [key for key in tensors if key not in known]:
        if not how.allow_extra or len(leftover) == len(tensors):
            raise UserError(_unknown_keys_error(leftover, known, source))
        print(f"{_describe_unknown(leftover, source)}, left out", file=sys.stderr)
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key in tensors:
        if key in known:
            component, path, role = known[key]
            parts = found.setdefault((component, path), {})
            if role in parts:
                raise UserError(
                    f"{source} has two tensors for the {role} of {component}.{path}, one of them {key}; expected one"
                )
            if role != "alpha" and not tensors[key].is_floating_point():
                raise UserError(
                    f"{key} in {source} is {tensors[key].dtype}, expected floating point; quantised adapters are not read"
                )
            parts[role] = tensors[key]
    components: dict[str, dict[str, Update]] = {}
    for (component, path), parts in sorted(found.items()):
        shape, where = (
            layout.component(component).shapes[path] if layout else None,
            f"{component}.{path} in {source}",
        )
        if lycoris.is_lycoris(parts):
            update: Update = lycoris.to_dense_update(parts, shape, where)
        else:
            update = _to_low_rank(parts, shape, where)
            if scales and component in scales and "alpha" not in parts:
                update = update._replace(scale=scales[component](path, update.rank, where))
        components.setdefault(component, {})[path] = _add_magnitude(update, parts, how, where)
    return components


def to_adapter_state(
    components: Mapping[str, Mapping[str, Update]], header: Mapping[str, str]
) -> AdapterState:
    """The state of what `decode` found: factors in `components`, the rest in `dense`."""
    factors = {
        name: {path: u for path, u in modules.items() if isinstance(u, LowRank)}
        for name, modules in components.items()
    }
    dense = {
        name: {path: u for path, u in modules.items() if isinstance(u, DenseUpdate)}
        for name, modules in components.items()
    }
    return AdapterState(
        {n: m for n, m in factors.items() if m},
        metadata=dict(header),
        dense={n: m for n, m in dense.items() if m},
    )


def _tensors_to_write(lr: LowRank, grammar: Grammar) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {"down": lr.down, "up": lr.up}
    if grammar.scale == "alpha":
        parts["alpha"] = torch.tensor(lr.scale * lr.rank, dtype=torch.float32)
    elif lr.scale != 1:
        parts["up"] = (lr.up.to(torch.promote_types(lr.up.dtype, torch.float32)) * lr.scale).to(
            lr.up.dtype
        )
    if lr.magnitude is not None:
        parts["magnitude"] = (
            lr.magnitude
            if lr.magnitude.ndim > 1
            else lr.magnitude.reshape(grammar.magnitude(lr.up.shape[0], lr.down.ndim))
        )
    return parts


def _to_low_rank(parts: Mapping[str, Tensor], shape: tuple[int, ...] | None, where: str) -> LowRank:
    for role in ("down", "up"):
        if role not in parts:
            raise UserError(
                f"{where} has {' and '.join(parts)} but no {role}; the file is incomplete"
            )
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        down = lycoris.merge_core(down, parts["mid"], where)
    out, inner = (shape[0], shape[1:]) if shape else (up.shape[:1].numel(), down.shape[1:])
    rank = down.shape[:1].numel() if down.ndim else 0
    if (
        not rank
        or down.ndim not in (2, 4)
        or _pad_shape(down.shape[1:]) != _pad_shape(inner)
        or _pad_shape(up.shape) != _pad_shape((out, rank))
    ):
        expected = (
            f"[r, {', '.join(map(str, inner))}] and [{out}, r]"
            if shape
            else "[r, in] or [r, in, kh, kw], and [out, r] with the same r > 0"
        )
        raise UserError(
            f"{where} has down {list(down.shape)} and up {list(up.shape)}, expected {expected}; is it for another model?"
        )
    down = down.reshape(rank, *inner)
    up = up.reshape(out, rank, *[1] * (len(inner) - 1))
    return LowRank(down, up, lycoris.resolve_scale(parts, rank, where))


def _add_magnitude(
    update: Update, parts: Mapping[str, Tensor], how: ReadOptions, where: str
) -> Update:
    """The update with its DoRA magnitude, if the file has one: [out], or by columns [1, in (, 1, 1)]."""
    given = [role for role in ("magnitude", "dora_scale") if role in parts]
    if not given:
        return update
    if len(given) > 1:
        raise UserError(
            f"{where} has two DoRA magnitudes, lora_magnitude_vector and dora_scale; expected one"
        )
    magnitude = parts[given[0]]
    shape = (
        update.shape
        if isinstance(update, DenseUpdate)
        else (update.up.shape[0], *update.down.shape[1:])
    )
    if _magnitude_axis(magnitude, shape, given[0], how, where) == "rows":
        magnitude = magnitude.reshape(shape[0])
    else:
        magnitude = magnitude.reshape(1, shape[1], *[1] * (len(shape) - 2))
    return (
        update._replace(magnitude=magnitude)
        if isinstance(update, LowRank)
        else lycoris.add_dense_magnitude(update, magnitude)
    )


def _magnitude_axis(
    magnitude: Tensor, weight: tuple[int, ...], role: str, how: ReadOptions, where: str
) -> str:
    """Whether a magnitude goes by rows or columns: by its shape, and where both fit by what the caller says. Raises UserError, never guesses."""
    (out, inner), got = weight[:2], tuple(magnitude.shape)
    rows = (
        got == (out,)
        or _pad_shape(got) == (out, 1, 1, 1)
        or (role == "magnitude" and _pad_shape(got) == (1, out, 1, 1))
    )
    columns = role == "dora_scale" and (got == (inner,) or _pad_shape(got) == (1, inner, 1, 1))
    if not rows and not columns:
        expected = f"one number per output, [{out}] or [{out}, 1]" + (
            f", or one per input, [1, {inner}]" if role == "dora_scale" else ""
        )
        raise UserError(f"{where} has a DoRA magnitude {list(got)}, expected {expected}")
    said = how.dora_axis or how.header_axis
    if rows and columns:
        if not said:
            either = 'dora_axis="rows" (peft, LyCORIS with wd_on_output) or dora_axis="columns" (older LyCORIS)'
            raise UserError(
                f"{where} has a DoRA magnitude {list(got)}, which may go by the rows or columns of {list(weight)}; choose {either}"
            )
        return said
    axis = "rows" if rows else "columns"
    if how.dora_axis not in ("", axis):
        raise UserError(
            f"{where} has a DoRA magnitude {list(got)}, which goes by {axis}, not by {how.dora_axis}; leave the axis out"
        )
    return axis


def _pad_shape(shape: Iterable[int]) -> tuple[int, ...]:
    """The shape with trailing ones up to four axes: a 1x1 convolution and a linear layer are written either way."""
    sizes = tuple(shape)
    return sizes + (1,) * (4 - len(sizes))


def _describe_unknown(keys: list[str], source: str) -> str:
    shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return f"{source} has {len(keys)} key(s) that mean nothing here: {shown}"


def _unknown_keys_error(keys: list[str], known: Mapping[str, TensorRole], source: str) -> str:
    return f"{_describe_unknown(keys, source)}; nearest known: {nearest_key(keys[0], known) or 'none'}; is it for another model?"


def nearest_key(key: str, known: Iterable[str]) -> str:
    """The known key most like this one, out of those that share the most words with it; "" when nothing is known."""
    words = set(re.split(r"[._]", key))
    likely = sorted(known, key=lambda other: -len(words.intersection(re.split(r"[._]", other))))[
        :MOST_COMPARED
    ]
    return next(iter(difflib.get_close_matches(key, likely, 1, 0.0)), "")
