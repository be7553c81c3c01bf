"""The names of a transformer's layers and norms in the original code, from a table of each family.

Most adapter files use these names. A table holds the paths outside of the blocks and, for each list
of blocks, those inside one block and the layers that the original code computes as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


class BlockNames(NamedTuple):
    """One list of blocks: diffusers' paths inside a block and the original code's names."""

    original: str  # name of the list in the original code
    plain: Mapping[str, str]  # path -> name of a layer or norm that both codes have
    joined: Mapping[str, tuple[str, ...]]  # name of a layer that the original computes as one


def find_original_names(
    paths: Iterable[str], outside: Mapping[str, str], blocks: Mapping[str, BlockNames]
) -> dict[str, Any]:
    """The fields `names` and `fused` of a `Component`, for the transformer's paths.

    `outside` is path -> name for those in no block, `blocks` has diffusers' names of the lists.
    """
    names, fused = {}, {}
    for path in paths:
        kind, _, rest = path.partition(".")
        if kind not in blocks:
            names[path] = outside[path]
            continue
        index, _, inner = rest.partition(".")
        own = blocks[kind]
        if inner in own.plain:
            names[path] = f"{own.original}.{index}.{own.plain[inner]}"
        for name, parts in own.joined.items():
            if inner in parts:
                whole = tuple(f"{kind}.{index}.{part}" for part in parts)
                fused[f"{own.original}.{index}.{name}"] = whole
    return {"names": names, "fused": fused}
