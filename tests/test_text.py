"""Text files are UTF-8, with a byte order mark or without; other encodings are named."""

from pathlib import Path

import pytest

from lora_core.errors import UserError
from lora_core.toml import read_toml


def test_a_byte_order_mark_is_read_and_other_encodings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "notepad.toml"
    file.write_bytes("\ufeff# été\r\nseed = 3\r\n".encode())
    assert read_toml(file).seed == 3
    for encoding in ("utf-16", "utf-16-le", "latin-1"):
        mark = "\ufeff" if encoding == "utf-16-le" else ""
        file.write_bytes(f"{mark}# été".encode(encoding))
        with pytest.raises(UserError, match=r"notepad\.toml is not UTF-8 text") as error:
            read_toml(file)
        assert ("UTF-16" in str(error.value)) == (encoding != "latin-1") and str(error.value).count(
            "notepad.toml"
        ) == 1
