"""The numbers in errors about memory."""

import pytest
import torch

from lora_core.errors import is_out_of_memory
from lora_core.memory.memory_errors import describe_shortage, read_shortage

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of "
    "which 1.20 GiB is free. Including non-PyTorch memory, this process has 22.44 GiB memory in "
    "use. Of the allocated memory 21.97 GiB is allocated by PyTorch, and 123.00 MiB is reserved"
)


def test_cudas_numbers() -> None:
    shortage = read_shortage(torch.OutOfMemoryError(CUDA))
    assert shortage == ("the GPU", 2 << 30, int(22.44 * 2**30), int(23.64 * 2**30))
    assert describe_shortage(shortage) == (
        "2.15 GB more were asked for, this process has 24.1 GB, the GPU has 25.4 GB"
    )


def test_numbers_of_a_refusal_of_the_cpus_allocator() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value) and not is_out_of_memory(RuntimeError("a shape"))
    shortage = read_shortage(caught.value)
    assert shortage.asked == 4 << 55 and shortage.device == "the computer"
    assert 10**7 < shortage.in_use < shortage.total


def test_an_error_of_python_has_no_number() -> None:
    assert read_shortage(MemoryError()).asked == 0
