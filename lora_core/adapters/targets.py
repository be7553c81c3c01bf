"""Choose layers by globs over their dotted paths, and print tables of the chosen layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from lora_core.errors import UserError
from lora_core.text import nearest_names

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a path that is a number
MAX_TABLE_LINES = 15
OTHER = "others"
LAYER_ROLES = (  # for target_summary: the first pattern found in a path names its role
    ("attention", re.compile(r"attn\d*\.|(^|\.)(to|add)_[qkv](_proj)?$|(^|\.)[qkv]_proj$")),
    ("feed-forward", re.compile(r"(^|\.)(ff|ff_context|mlp)\.|(^|\.)proj_mlp$|(^|\.)fc\d$")),
    ("projections", re.compile(r"(^|\.)proj_(in|out)$")),
    ("resnets", re.compile(r"(^|\.)resnets\.")),
    ("samplers", re.compile(r"(^|\.)(down|up)samplers\.")),
    ("embeddings", re.compile(r"embed|(^|\.)time_proj")),
    ("norms", re.compile(r"(^|\.)norm\d*(_\w+)?\.")),
)


def matches_pattern(path: str, pattern: str) -> bool:
    """Whether the shell glob matches the whole path or the end of it after a ".".

    "to_q", "attn1.to_q", "*.attn?.to_*", "mid_block.*". A star also crosses dots. "blocks.3.to_q"
    does not match "single_blocks.3.to_q": the boundary is the dot (as peft matches its lists).
    """
    return fnmatchcase(path, pattern) or fnmatchcase(path, "*." + pattern)


def _matches_any(path: str, patterns: Iterable[str]) -> bool:
    return any(matches_pattern(path, pattern) for pattern in patterns)


def select_paths(
    paths: Sequence[str], patterns: Iterable[str], exclude: Iterable[str] = ()
) -> list[str]:
    """The paths that some pattern matches and no exclusion does, in their given order.

    Raises UserError for a pattern that matches no path (with the nearest ones) and for an exclusion
    that removes nothing.
    """
    patterns, exclude = tuple(patterns), tuple(exclude)
    if not patterns:
        raise UserError(
            "no target patterns were given; name at least one layer, e.g. --adapter.targets to_q"
        )
    for pattern in patterns:
        require_match(pattern, paths, "--adapter.targets")
    chosen = [path for path in paths if _matches_any(path, patterns)]
    for pattern in exclude:
        require_match(pattern, chosen, "--adapter.exclude")
    kept = [path for path in chosen if not _matches_any(path, exclude)]
    if not kept:
        raise UserError(
            f"--adapter.exclude {' '.join(exclude)} removes all {len(chosen)} targets; "
            "leave at least one"
        )
    return kept


def require_match(pattern: str, paths: Sequence[str], option: str) -> None:
    """Raises UserError, naming the nearest paths, when the pattern matches none of them."""
    if not any(matches_pattern(path, pattern) for path in paths):
        nearest = ", ".join(nearest_paths(pattern, paths)) or "none"
        raise UserError(
            f"{option}: {pattern!r} matches none of the {len(paths)} layers it can choose from; "
            f"nearest: {nearest}"
        )


def last_match(path: str, table: Mapping[str, float], default: float | None) -> float | None:
    """The value of the last pattern that matches the path, else the default.

    A later line of the table overrides an earlier one.
    """
    found = [value for pattern, value in table.items() if matches_pattern(path, pattern)]
    return found[-1] if found else default


def nearest_paths(pattern: str, paths: Sequence[str], n: int = 3) -> list[str]:
    """Up to n paths that resemble the pattern most, compared whole or by their last parts.

    Paths below the pattern come first.
    """
    below = [path for path in paths if f".{pattern}." in f".{path}"]
    parts = pattern.count(".") + 1
    ends: dict[str, str] = {}
    for path in reversed(paths):
        ends[path] = path
        ends[".".join(path.split(".")[-parts:])] = path
    alike = [ends[end] for end in nearest_names(pattern, ends, count=n, cutoff=0)]
    return list(dict.fromkeys(below[:n] + alike))[:n]


# ---------------------------------------------------------------- tables


def target_summary(paths: Sequence[str]) -> str:
    """The number of layers by role: "77 layers: attention 32, feed-forward 10, resnets 35"."""
    counts = Counter(map(layer_role, paths))
    names = [role for role, _ in LAYER_ROLES] + [OTHER]
    shown = ", ".join(f"{name} {counts[name]}" for name in names if counts[name])
    total = f"{len(paths)} layer{'' if len(paths) == 1 else 's'}"
    return f"{total}: {shown}" if shown else total


def layer_role(path: str) -> str:
    """The name of the first entry of LAYER_ROLES whose pattern occurs in the path."""
    for name, pattern in LAYER_ROLES:
        if pattern.search(path):
            return name
    return OTHER


def target_table(paths: Sequence[str]) -> str:
    """Every chosen layer: one line for blocks that are alike, with the layers of each.

        495 layers
        266 = 19 x 14  transformer_blocks.0-18: {norm1,norm1_context}.linear, {ff,ff_context}.net...
        228 = 38 x 6   single_transformer_blocks.0-37: norm.linear, proj_mlp, attn.{to_q,to_k,to_v}
          1            proj_out

    A number with a single value is part of the layer's name (to_out.0). Ranges list the numbers
    that occur; with two ranges in a path not every combination need exist, and the count is that of
    the existing ones. Beyond 15 lines the smallest are summed in the last.
    """
    rows = _table_rows(paths)
    count = len(rows) if len(rows) < MAX_TABLE_LINES else MAX_TABLE_LINES - 2
    largest = sorted(range(len(rows)), key=lambda i: -rows[i][0] * rows[i][1])[:count]
    kept = [rows[i] for i in sorted(largest)]
    counts = []
    for blocks, layers, _ in kept:
        factors = f" = {blocks} x {layers}" if blocks > 1 else ""
        counts.append(f"{blocks * layers:3}{factors}")
    width = max(map(len, counts), default=0)
    lines = [f"{len(paths)} layer{'' if len(paths) == 1 else 's'}"]
    lines += [f"{number:{width}}  {text}" for number, (_, _, text) in zip(counts, kept)]
    missing = len(paths) - sum(blocks * layers for blocks, layers, _ in kept)
    if missing:
        lines.append(f"{missing:3} more, of {len(rows) - len(kept)} other kinds")
    return "\n".join(lines)


def _table_rows(paths: Sequence[str]) -> list[tuple[int, int, str]]:
    """(blocks, layers in each, "block: layers") for every kind of block, in the order of paths."""
    values: dict[str, list[set[int]]] = {}  # a path with * for its numbers -> the values of each
    for path in paths:
        numbers = NUMBER.findall(path)
        found = values.setdefault(NUMBER.sub("*", path), [set() for _ in numbers])
        for seen, number in zip(found, numbers):
            seen.add(int(number))
    occurs: dict[tuple[str, str], set[str]] = {}  # (block with ranges, layer) -> paths of blocks
    for path in paths:
        block, layer, place = _split_block(path, values[NUMBER.sub("*", path)])
        occurs.setdefault((block, layer), set()).add(place)
    alike: dict[tuple[str, frozenset[str]], list[str]] = {}
    for (block, layer), places in occurs.items():
        alike.setdefault((block, frozenset(places)), []).append(layer)
    rows = []
    for (block, occurring), layers in alike.items():
        texts = [block, ", ".join(_format_braces(layers))]
        rows.append((len(occurring), len(layers), ": ".join(filter(None, texts))))
    return rows


def _split_block(path: str, values: Sequence[set[int]]) -> tuple[str, str, str]:
    """(the block with ranges for its numbers, the layer in it, the block's own path).

    A path is cut after the last number that varies.
    """
    parts = path.split(".")
    ranges = list(parts)
    cut = 0
    numbers = iter(values)
    for i, part in enumerate(parts):
        seen = next(numbers) if part.isdigit() else set()
        if len(seen) > 1:
            ranges[i] = _format_ranges(seen)
            cut = i + 1
    return ".".join(ranges[:cut]), ".".join(parts[cut:]), ".".join(parts[:cut])


def _format_ranges(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> "0-2,5" """
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _format_braces(names: Sequence[str]) -> list[str]:
    """The names in shell's brace notation.

    ["attn1.to_q", "attn1.to_k", "attn2.to_q", "attn2.to_k", "proj"]
    -> ["{attn1,attn2}.{to_q,to_k}", "proj"]
    """
    tails: dict[str, list[str]] = {}
    for name in names:
        head, _, tail = name.partition(".")
        tails.setdefault(head, []).append(tail)
    heads: dict[tuple[str, ...], list[str]] = {}
    for head, inner in tails.items():
        heads.setdefault(tuple(inner), []).append(head)
    found = []
    for below, alike in heads.items():
        if below == ("",):
            found += alike
        else:
            found.append(f"{_format_choice(alike)}.{_format_choice(_format_braces(below))}")
    return found


def _format_choice(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{{{','.join(names)}}}"
