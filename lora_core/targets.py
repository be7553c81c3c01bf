"""Globs over the dotted paths of layers: which layers a pattern means, and what to say when it means none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from lora_core.errors import UserError


def matches(path: str, pattern: str) -> bool:
    """True when the shell glob names the whole path or the end of it from a "." on: "to_q", "attn1.to_q", "*.attn?.to_*", "mid_block.*".

    A star also crosses dots. "blocks.3.to_q" does not match "single_blocks.3.to_q", the boundary is the dot (as peft matches its lists).
    """
    return fnmatchcase(path, pattern) or fnmatchcase(path, "*." + pattern)


def select(paths: Sequence[str], patterns: Iterable[str], exclude: Iterable[str] = ()) -> list[str]:
    """The paths that some pattern matches and no exclusion does, in their given order.

    Raises UserError for a pattern that matches no path (with the nearest ones) and for an exclusion that removes nothing.
    """
    patterns, exclude = tuple(patterns), tuple(exclude)
    if not patterns:
        raise UserError("no target patterns were given; name at least one layer, e.g. --adapter.targets to_q")
    for pattern in patterns:
        require_match(pattern, paths, "--adapter.targets")
    chosen = [path for path in paths if any(matches(path, pattern) for pattern in patterns)]
    for pattern in exclude:
        require_match(pattern, chosen, "--adapter.exclude")
    kept = [path for path in chosen if not any(matches(path, pattern) for pattern in exclude)]
    if not kept:
        raise UserError(f"--adapter.exclude {' '.join(exclude)} removes all {len(chosen)} targets; leave at least one")
    return kept


def require_match(pattern: str, paths: Sequence[str], option: str) -> None:
    """Raises UserError, naming the nearest paths, when the pattern matches none of them."""
    if not any(matches(path, pattern) for path in paths):
        close = ", ".join(nearest(pattern, paths)) or "none"
        raise UserError(f"{option}: {pattern!r} matches none of the {len(paths)} layers it can choose from; nearest: {close}")


def lookup(path: str, table: Mapping[str, float], default: float | None) -> float | None:
    """The value of the last pattern in the table that matches the path (a later line overrides an earlier one), else the default."""
    found = [value for pattern, value in table.items() if matches(path, pattern)]
    return found[-1] if found else default


def nearest(pattern: str, paths: Sequence[str], n: int = 3) -> list[str]:
    """Up to n paths whose ends of as many parts, or whose whole, resemble the pattern most; paths below the pattern come first."""
    below = [path for path in paths if f".{pattern}." in f".{path}"]
    parts = pattern.count(".") + 1
    ends = {end: path for path in reversed(paths) for end in (path, ".".join(path.split(".")[-parts:]))}
    alike = [ends[end] for end in difflib.get_close_matches(pattern, ends, n=n, cutoff=0.0)]
    return list(dict.fromkeys(below[:n] + alike))[:n]
