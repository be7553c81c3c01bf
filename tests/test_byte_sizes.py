"""Numbers of bytes as text."""

import pytest

from lora_core.byte_sizes import format_bytes


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (999.6, "1 kB"),
        (2_015_000, "2.02 MB"),
        (138e6, "138 MB"),
        (3e9, "3 GB"),
        (8_640_000_000, "8.64 GB"),
        (1.5e12, "1,500 GB"),
    ],
)
def test_sizes_are_short_and_in_thousands(size: float, text: str) -> None:
    assert format_bytes(size) == text
