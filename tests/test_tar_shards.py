"""tar_shards: the examples are those that webdataset finds."""

import tarfile
from pathlib import Path

import pytest

from lora_core.data.shards.tar_shards import expand_ranges, list_tar_examples
from lora_core.errors import UserError
from tests.shard_examples import encoded, image_members, write_shards, write_tar


def test_ranges_are_those_of_webdataset() -> None:
    braceexpand = pytest.importorskip("braceexpand")
    for pattern in ("a{000..012}.tar", "{0..3}/b{08..11}.tar", "plain.tar"):
        assert expand_ranges(pattern) == list(braceexpand.braceexpand(pattern))


def test_examples_are_those_of_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = write_shards(tmp_path / "shards", count=10, shards=2)
    members = {
        "x/a.b.png": encoded(3),
        "x/a.b.txt": b"one",
        "y/a.png": encoded(4),
        "y/a.json": b"{}",
    }
    write_tar(folder / "002.tar", members)
    files = sorted(folder.glob("*.tar"))
    theirs = list(webdataset.WebDataset([str(file) for file in files], shardshuffle=False))
    ours = []
    for file in files:
        ours += list_tar_examples(file)
    assert len(ours) == len(theirs) == 12
    for own, other in zip(ours, theirs, strict=True):
        name = own.image.path.name.split(".", 1)
        assert other["__key__"].split("/")[-1] == name[0]
        assert own.image.read_bytes() == other[name[1]]
        for text in own.texts:
            assert text.read_bytes() == other[text.path.name.split(".", 1)[1]]


def test_masks_other_members_and_names_without_an_image(tmp_path: Path) -> None:
    members = {
        "a.txt": b"x", "a.mask.png": encoded(1), "a.png": encoded(0), "a.cls": b"1",
        "b.txt": b"no image", ".c.png": encoded(2), "d.jpg": encoded(3, "JPEG"),
    }  # fmt: skip
    found = list(list_tar_examples(write_tar(tmp_path / "a.tar", members)))
    assert [own.image.path.name for own in found] == ["a.png", "d.jpg"]
    assert [own.mask and own.mask.path.name for own in found] == ["a.mask.png", None]
    assert [text.path.name for text in found[0].texts] == ["a.txt"]


def test_two_images_of_a_name_need_a_choice(tmp_path: Path) -> None:
    members = {"a.png": encoded(0), "a.jpg": encoded(1, "JPEG")}
    file = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=r"two images of the name a, .* --data.image-column png"):
        list(list_tar_examples(file))
    assert [own.image.path.name for own in list_tar_examples(file, "jpg")] == ["a.jpg"]


def test_shards_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"x" * 2000)
    whole = write_tar(tmp_path / "whole.tar", image_members(range(4))).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 4])
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(tmp_path / "whole.tar", "whole.tar")
    for name in ("no.tar", "cut.tar", "packed.tar", "missing.tar"):
        with pytest.raises(UserError, match=f"cannot read the shard .*{name} "):
            list(list_tar_examples(tmp_path / name))


def test_links_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert list(list_tar_examples(tmp_path / "a.tar")) == []


def test_members_of_a_name_may_lie_apart(tmp_path: Path) -> None:
    """Plain tar packs a folder in the order of its disk."""
    members = {
        "./b.txt": b"b", "./a.jpg": encoded(0, "JPEG"), "./b.mask.png": encoded(2),
        "./a.txt": b"a", "./b.jpg": encoded(1, "JPEG"), "sub/a.txt": b"no image",
    }  # fmt: skip
    found = list(list_tar_examples(write_tar(tmp_path / "a.tar", members)))
    assert [own.image.path.name for own in found] == ["b.jpg", "a.jpg"]
    assert [[text.read_bytes() for text in own.texts] for own in found] == [[b"b"], [b"a"]]
    assert [own.mask and own.mask.path.name for own in found] == ["b.mask.png", None]


def test_a_member_that_is_there_twice_is_named(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {"x/a.png": encoded(0), "x/a.txt": b"a"})
    with tarfile.open(file, "a") as archive:
        archive.addfile(tarfile.TarInfo("x/a.txt"))
    with pytest.raises(UserError, match=r"has the member x/a\.txt twice; write the shard again"):
        list(list_tar_examples(file))


def test_names_with_further_dots_are_explained(tmp_path: Path) -> None:
    members = {"shot 10.15.png": encoded(0), "shot 10.30.png": encoded(1)}
    with pytest.raises(UserError, match=r"name shot 10, .* a name ends at its first dot"):
        list(list_tar_examples(write_tar(tmp_path / "a.tar", members)))
