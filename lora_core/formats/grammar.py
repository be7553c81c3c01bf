"""Key grammars as tables: encode every module a layout knows, and read a file through the inverted dictionary.

A key is `{head}{separator}{module path with that separator}.{leaf}`. What differs between formats is a `Grammar`; what differs between families
is the `Layout`. No key is ever taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_core.algebra import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats.layout import Component, Layout, nearest

Role = Literal["down", "up", "alpha", "magnitude"]


@dataclass(frozen=True)
class Grammar:
    """How a format spells the tensors of one module."""

    leaves: Mapping[Role, tuple[str, ...]]  # the first spelling is written, all are read
    separator: str  # between the words of a module's name
    heads: Callable[[str, Component], tuple[str, ...]]  # what a component's names begin with; the first is written, all are read
    names: Callable[[Component, str], str]  # the dotted name a published path goes by
    scale: Literal["folded", "alpha"]  # where the scale goes: multiplied into up, or a tensor alpha = scale * rank
    magnitude: Callable[[int, int], tuple[int, ...]]  # (out, ndim of the weight) -> shape of a DoRA magnitude
    written: Mapping[tuple[str, Role], str] = field(default_factory=dict)  # (component, role) -> spelling that is written there instead


class Site(NamedTuple):
    component: str
    path: str  # published
    role: Role


def sites(grammar: Grammar, layout: Layout) -> dict[str, Site]:
    """Every key a file of this grammar can have -> what it means. Raises ValueError when two modules would share a key."""
    known: dict[str, Site] = {}
    for name, component in layout.components.items():
        for path in component.shapes:
            for module in module_names(grammar, name, component, path):
                for role, spellings in grammar.leaves.items():
                    for leaf in spellings:
                        site = Site(name, path, role)
                        other = known.setdefault(f"{module}.{leaf}", site)
                        if other != site:
                            raise ValueError(f"{module} would name both {other.path} and {path}; this grammar cannot spell the layout")
    return known


def module_names(grammar: Grammar, name: str, component: Component, path: str) -> list[str]:
    """The spellings of a module: first the one that is written, then those that are only read (older heads, a missing published level)."""
    dotted = [grammar.names(component, path), path.removeprefix(component.module_prefix)]
    return [(head + "." + words).replace(".", grammar.separator) for words in dict.fromkeys(dotted) for head in grammar.heads(name, component)]


def encode(state: AdapterState, grammar: Grammar, layout: Layout) -> dict[str, Tensor]:
    """Tensors under this grammar's keys. A folded scale is multiplied in fp32 or better. Raises UserError for a module the layout lacks."""
    tensors: dict[str, Tensor] = {}
    for name, modules in state.components.items():
        for path, lr in modules.items():
            layout.module_path(name, path)  # refuses a path that is not there
            module = module_names(grammar, name, layout.component(name), path)[0]
            for role, tensor in _written(lr, grammar).items():
                tensors[f"{module}.{grammar.written.get((name, role), grammar.leaves[role][0])}"] = tensor
    return tensors


def decode(
    tensors: Mapping[str, Tensor], grammar: Grammar, known: Mapping[str, Site], layout: Layout | None, *, scales: Mapping[str, float], source: str
) -> dict[str, dict[str, LowRank]]:
    """Component -> published path -> factors, each with its scale resolved; in conv layers 4-D, in linear layers 2-D.

    The scale is alpha / rank where the file has an alpha, else the component's entry of `scales`, else 1. Raises UserError for keys that mean
    nothing here, incomplete or repeated modules, and shapes that do not fit the layout.
    """
    leftover = [key for key in tensors if key not in known]
    if leftover:
        raise UserError(_leftover(leftover, known, source))
    found: dict[tuple[str, str], dict[Role, Tensor]] = {}
    for key, tensor in tensors.items():
        component, path, role = known[key]
        parts = found.setdefault((component, path), {})
        if role in parts:
            raise UserError(f"{source} has two tensors for the {role} of {component}.{path}, one of them {key}; expected one")
        parts[role] = tensor
    components: dict[str, dict[str, LowRank]] = {}
    for (component, path), parts in sorted(found.items()):
        shape = layout.component(component).shapes[path] if layout else None
        lr = _resolve(parts, shape, scales.get(component, 1.0), f"{component}.{path} in {source}")
        if "magnitude" in parts:
            lr = lr._replace(magnitude=_magnitude(parts["magnitude"], lr, grammar, f"{component}.{path} in {source}"))
        components.setdefault(component, {})[path] = lr
    return components


def _written(lr: LowRank, grammar: Grammar) -> dict[Role, Tensor]:
    parts: dict[Role, Tensor] = {"down": lr.down, "up": lr.up}
    if grammar.scale == "alpha":
        parts["alpha"] = torch.tensor(lr.scale * lr.rank, dtype=torch.float32)
    elif lr.scale != 1:
        parts["up"] = (lr.up.to(torch.promote_types(lr.up.dtype, torch.float32)) * lr.scale).to(lr.up.dtype)
    if lr.magnitude is not None:
        parts["magnitude"] = lr.magnitude.reshape(grammar.magnitude(lr.up.shape[0], lr.down.ndim))
    return parts


def _resolve(parts: Mapping[Role, Tensor], shape: tuple[int, ...] | None, scale: float, where: str) -> LowRank:
    for role in ("down", "up"):
        if role not in parts:
            raise UserError(f"{where} has {' and '.join(parts)} but no {role}; the file is incomplete")
    down, up = parts["down"], parts["up"]
    out, inner = (shape[0], shape[1:]) if shape else (up.shape[0], down.shape[1:])
    rank = down.shape[0]
    if rank == 0 or down.ndim not in (2, 4) or _padded(down.shape[1:]) != _padded(inner) or _padded(up.shape) != _padded((out, rank)):
        expected = f"[r, {', '.join(map(str, inner))}] and [{out}, r]" if shape else "[r, in] or [r, in, kh, kw], and [out, r] with the same r > 0"
        raise UserError(f"{where} has down {list(down.shape)} and up {list(up.shape)}, expected {expected}; is it for another model?")
    down = down.reshape(rank, *inner)
    up = up.reshape(out, rank, *[1] * (len(inner) - 1))
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise UserError(f"{where} has an alpha of shape {list(parts['alpha'].shape)}, expected one number")
        scale = float(parts["alpha"]) / rank
    return LowRank(down, up, scale)


def _magnitude(magnitude: Tensor, lr: LowRank, grammar: Grammar, where: str) -> Tensor:
    """[out] from [out], [out, 1 (, 1, 1)] or the shape this grammar writes. A row [1, in (, 1, 1)] is the column convention, even where in = out."""
    out = lr.up.shape[0]
    if tuple(magnitude.shape) not in {(out,), (out, 1), (out, 1, 1, 1), grammar.magnitude(out, lr.down.ndim)}:
        raise UserError(
            f"{where} has a DoRA magnitude {list(magnitude.shape)}, expected one number per output, [{out}] or [{out}, 1]; "
            "one per input (older LyCORIS) is another DoRA and is not read"
        )
    return magnitude.reshape(out)


def _padded(shape: Iterable[int]) -> tuple[int, ...]:
    """The shape with trailing ones up to four axes: a 1x1 convolution and a linear layer are written either way."""
    sizes = tuple(shape)
    return sizes + (1,) * (4 - len(sizes))


def _leftover(keys: list[str], known: Mapping[str, Site], source: str) -> str:
    shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    near = nearest(keys[0], known) or "none"
    return f"{source} has {len(keys)} key(s) that mean nothing here: {shown}; nearest known: {near}; is it for another model?"
