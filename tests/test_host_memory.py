"""Memory of the computer and of this process."""

import torch

from lora_core.memory.host_memory import (
    available_memory,
    installed_memory,
    peak_resident_memory,
    resident_memory,
)

SIZE = 200_000_000  # bytes


def test_a_filled_tensor_is_in_the_process_and_gone_with_it() -> None:
    before = resident_memory()
    filled = torch.ones(SIZE // 4)
    during = resident_memory()
    assert during - before > 0.9 * SIZE
    del filled
    assert resident_memory() < during - 0.9 * SIZE
    assert peak_resident_memory() >= during - 10_000_000  # pages of it are counted in batches


def test_the_computer_has_what_is_available_and_what_the_process_holds() -> None:
    available = available_memory()
    assert available is not None and 0 < available < installed_memory()
    assert 0 < resident_memory() <= peak_resident_memory() + 10_000_000
