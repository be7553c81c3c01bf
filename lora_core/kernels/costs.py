"""COSTS: the launches and bytes of every torch op that a kernel module defines.

Each module declares its ops' costs next to its kernels. Tests compare the declarations with the
launches and bytes that are observed; benchmarks add them up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Cost(NamedTuple):
    """Launches and memory traffic of one call of a kernel."""

    launches: int
    bytes: int  # read and written
    product: bool = False  # a matrix product, not an elementwise pass


# Name of a torch op, "lora_core::shrink" -> its cost, from the op's own arguments.
COSTS: dict[str, Callable[..., Cost]] = {}
