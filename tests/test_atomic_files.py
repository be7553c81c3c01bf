"""Files are written whole or not at all, and a disk that refuses them is one sentence."""

import errno
import os

import pytest

from lora_core.atomic_files import atomic_write
from lora_core.errors import UserError


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_atomic_writes_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.png"
    with atomic_write(path) as temporary:
        assert (
            temporary.parent == path.parent and temporary.suffix == ".png"
        )  # same file system; an image writer reads the suffix
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("tw")
        raise RuntimeError
    assert listing(path.parent) == {"a.png": b"one"}


@pytest.mark.parametrize(
    "code, words",
    [
        (errno.ENOSPC, "disk is full.*untouched"),
        (errno.EROFS, "cannot be written"),
        (errno.EDQUOT, "full"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch, code, words):
    path = tmp_path / "config.toml"
    path.write_text("old")

    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=words) as caught, atomic_write(path) as temporary:
        temporary.write_text("new")
    assert "\n" not in str(caught.value) and listing(tmp_path) == {"config.toml": b"old"}
