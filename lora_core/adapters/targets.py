"""Globs over the dotted paths of layers: which layers a pattern means, and what to say when it means none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from lora_core.errors import UserError

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a path that is a number
MAX_TABLE_LINES = 15  # at most, of a table


def matches_pattern(path: str, pattern: str) -> bool:
    """True when the shell glob names the whole path or the end of it from a "." on: "to_q", "attn1.to_q", "*.attn?.to_*", "mid_block.*".

    A star also crosses dots. "blocks.3.to_q" does not match "single_blocks.3.to_q", the boundary is the dot (as peft matches its lists).
    """
    return fnmatchcase(path, pattern) or fnmatchcase(path, "*." + pattern)


def select_paths(
    paths: Sequence[str], patterns: Iterable[str], exclude: Iterable[str] = ()
) -> list[str]:
    """The paths that some pattern matches and no exclusion does, in their given order.

    Raises UserError for a pattern that matches no path (with the nearest ones) and for an exclusion that removes nothing.
    """
    patterns, exclude = tuple(patterns), tuple(exclude)
    if not patterns:
        raise UserError(
            "no target patterns were given; name at least one layer, e.g. --adapter.targets to_q"
        )
    for pattern in patterns:
        require_match(pattern, paths, "--adapter.targets")
    chosen = [path for path in paths if any(matches_pattern(path, pattern) for pattern in patterns)]
    for pattern in exclude:
        require_match(pattern, chosen, "--adapter.exclude")
    kept = [
        path for path in chosen if not any(matches_pattern(path, pattern) for pattern in exclude)
    ]
    if not kept:
        raise UserError(
            f"--adapter.exclude {' '.join(exclude)} removes all {len(chosen)} targets; leave at least one"
        )
    return kept


def require_match(pattern: str, paths: Sequence[str], option: str) -> None:
    """Raises UserError, naming the nearest paths, when the pattern matches none of them."""
    if not any(matches_pattern(path, pattern) for path in paths):
        close = ", ".join(nearest_paths(pattern, paths)) or "none"
        raise UserError(
            f"{option}: {pattern!r} matches none of the {len(paths)} layers it can choose from; nearest: {close}"
        )


def target_table(paths: Sequence[str]) -> str:
    """What a choice of targets comes to, for people: one line for blocks that are alike, with the layers that each of them has.

        495 layers
        266 = 19 x 14  transformer_blocks.0-18: {norm1,norm1_context}.linear, attn.{to_q,to_k,...}, {ff,ff_context}.net.{0.proj,2}
        228 = 38 x 6   single_transformer_blocks.0-37: norm.linear, proj_mlp, proj_out, attn.{to_q,to_k,to_v}
          1            proj_out

    A number that has one value belongs to the layer's name (to_out.0). Ranges hold the numbers that occur; of two in a path not each need meet each,
    so the count is what to trust. Beyond 15 lines the smallest are summed in the last.
    """
    rows = _table_rows(paths)
    largest = sorted(range(len(rows)), key=lambda i: -rows[i][0] * rows[i][1])[
        : len(rows) if len(rows) < MAX_TABLE_LINES else MAX_TABLE_LINES - 2
    ]
    kept = [rows[i] for i in sorted(largest)]
    counts = [
        f"{blocks * layers:3}" + (f" = {blocks} x {layers}" if blocks > 1 else "")
        for blocks, layers, _ in kept
    ]
    width = max(map(len, counts), default=0)
    lines = [f"{count:{width}}  {text}" for count, (_, _, text) in zip(counts, kept)]
    missing = len(paths) - sum(blocks * layers for blocks, layers, _ in kept)
    lines += [f"{missing:3} more, of {len(rows) - len(kept)} other kinds"] if missing else []
    return "\n".join([f"{len(paths)} layer{'' if len(paths) == 1 else 's'}", *lines])


def _table_rows(paths: Sequence[str]) -> list[tuple[int, int, str]]:
    """(blocks, layers in each, "block: layers") for every kind of block, in the order of the paths."""
    values: dict[str, list[set[int]]] = {}  # a path with * for its numbers -> the values of each
    for path in paths:
        found = values.setdefault(NUMBER.sub("*", path), [set() for _ in NUMBER.findall(path)])
        for seen, number in zip(found, NUMBER.findall(path)):
            seen.add(int(number))
    occurs: dict[
        tuple[str, str], set[str]
    ] = {}  # (block with ranges, layer in it) -> paths of the blocks that have it
    for path in paths:
        block, layer, place = _split_block(path, values[NUMBER.sub("*", path)])
        occurs.setdefault((block, layer), set()).add(place)
    alike: dict[tuple[str, frozenset[str]], list[str]] = {}
    for (block, layer), places in occurs.items():
        alike.setdefault((block, frozenset(places)), []).append(layer)
    return [
        (
            len(places),
            len(layers),
            ": ".join(filter(None, (block, ", ".join(_format_braces(layers))))),
        )
        for (block, places), layers in alike.items()
    ]


def _split_block(path: str, values: Sequence[set[int]]) -> tuple[str, str, str]:
    """(the block, ranges for its numbers; the layer in it; the block's own path): a path is cut after the last number that varies."""
    ranges, rest, cut = path.split("."), iter(values), 0
    for i, part in enumerate(ranges):
        seen = next(rest) if part.isdigit() else set()
        if len(seen) > 1:
            ranges[i], cut = _format_ranges(seen), i + 1
    parts = path.split(".")
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
    """["attn1.to_q", "attn1.to_k", "attn2.to_q", "attn2.to_k", "proj"] -> ["{attn1,attn2}.{to_q,to_k}", "proj"]"""
    tails: dict[str, list[str]] = {}
    for name in names:
        head, _, tail = name.partition(".")
        tails.setdefault(head, []).append(tail)
    heads: dict[tuple[str, ...], list[str]] = {}
    for head, inner in tails.items():
        heads.setdefault(tuple(inner), []).append(head)
    found = []
    for below, alike in heads.items():
        found += (
            alike
            if below == ("",)
            else [f"{_format_choice(alike)}.{_format_choice(_format_braces(below))}"]
        )
    return found


def _format_choice(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{{{','.join(names)}}}"


def last_match(path: str, table: Mapping[str, float], default: float | None) -> float | None:
    """The value of the last pattern in the table that matches the path (a later line overrides an earlier one), else the default."""
    found = [value for pattern, value in table.items() if matches_pattern(path, pattern)]
    return found[-1] if found else default


def nearest_paths(pattern: str, paths: Sequence[str], n: int = 3) -> list[str]:
    """Up to n paths whose ends of as many parts, or whose whole, resemble the pattern most; paths below the pattern come first."""
    below = [path for path in paths if f".{pattern}." in f".{path}"]
    parts = pattern.count(".") + 1
    ends = {
        end: path for path in reversed(paths) for end in (path, ".".join(path.split(".")[-parts:]))
    }
    alike = [ends[end] for end in difflib.get_close_matches(pattern, ends, n=n, cutoff=0.0)]
    return list(dict.fromkeys(below[:n] + alike))[:n]
