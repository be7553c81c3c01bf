"""image_checks: every image is decoded once; what is kept or left out is told by the files.

Processes that share the checks: tests/test_processes.py.
"""

import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image

import train
from lora_core.config import Config
from lora_core.data import image_checks
from lora_core.data.captions import CaptionMode
from lora_core.data.image_checks import ImageChecks, describe_left_out, error_reason
from lora_core.data.records import scan_folder
from lora_core.errors import UserError
from tests.conftest import merged, save_photos
from tests.image_examples import noise_image, save_gray_square, save_image

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def settle(folder: Path) -> None:
    """Make the files look as if they were written some seconds ago: results are kept of such."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 100,) * 2)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are decoded."""
    names: list[str] = []
    check = image_checks.check_image

    def counted(file: image_checks.ImageFile, masks: str) -> image_checks.CheckedImage:
        names.append(Path(str(file.image)).name)
        return check(file, masks)

    monkeypatch.setattr(image_checks, "check_image", counted)
    monkeypatch.setattr(image_checks, "SETTLED", -1.0)  # ctime cannot be set back
    return names


def test_results_are_those_without_threads_and_without_a_cache(tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos")
    plain = scan_folder(folder, masks="auto", checks=ImageChecks(threads=1))
    cache = tmp_path / "cache"
    for _ in range(2):
        assert scan_folder(folder, masks="auto", checks=ImageChecks(cache, threads=4)) == plain
    assert scan_folder(folder, masks="none") == [r for r in scan_folder(folder, masks="none")]


def test_only_new_and_changed_files_are_decoded_again(tmp_path: Path, decoded: list[str]) -> None:
    folder = save_photos(tmp_path / "photos")
    before = scan_folder(folder, masks="auto", checks=ImageChecks(tmp_path / "cache"))
    assert sorted(decoded) == [f"{i}.png" for i in range(5)]
    decoded.clear()
    assert scan_folder(folder, masks="auto", checks=ImageChecks(tmp_path / "cache")) == before
    assert decoded == []
    old = (folder / "1.png").stat()
    content = (folder / "2.png").read_bytes()
    (folder / "1.png").write_bytes(content[: old.st_size].ljust(old.st_size, b"\0"))
    os.utime(folder / "1.png", ns=(old.st_atime_ns, old.st_mtime_ns))  # ctime tells it
    Image.new("L", (36, 24)).save(folder / "3.mask.png")
    with pytest.raises(UserError):
        scan_folder(folder, masks="auto", checks=ImageChecks(tmp_path / "cache"))
    assert "1.png" in decoded and "0.png" not in decoded
    decoded.clear()
    scan_folder(folder, masks="none", checks=ImageChecks(tmp_path / "cache"))  # other keys
    assert len(decoded) == 5


def test_a_file_that_was_just_written_is_decoded_again(tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos")
    scan_folder(folder, checks=ImageChecks(tmp_path / "cache"))
    (kept,) = (tmp_path / "cache").iterdir()
    assert json.loads(kept.read_text()) == {}


def test_a_damaged_file_of_results_is_written_anew(tmp_path: Path, decoded: list[str]) -> None:
    folder = save_photos(tmp_path / "photos")
    before = scan_folder(folder, checks=ImageChecks(tmp_path / "cache"))
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_text()
    for text in ("", "[]", '{"x": 1}', whole.replace("[false", "[1, 2"), whole[:40]):
        kept.write_text(text)
        assert scan_folder(folder, checks=ImageChecks(tmp_path / "cache")) == before
        assert json.loads(kept.read_text()) == json.loads(whole)


# ---------------------------------------------------------------- --data.skip-bad


def spoil(folder: Path) -> dict[str, str]:
    """Damaged files of every kind in a folder of good ones: name -> a part of the reason."""
    whole = (folder / "0.png").read_bytes()
    files = {"cut.png": whole[: len(whole) // 2], "empty.png": b"", "page.jpg": b"<html>"}
    files["bomb.ppm"] = b"P6 20000 20000 255\n"
    for name, content in files.items():
        (folder / name).write_bytes(content)
    save_image(noise_image(8, 8), folder / "masked.png")
    save_gray_square(folder / "masked.mask.png")
    (folder / "masked.mask.png").write_bytes(whole)  # of another size
    save_image(noise_image(8, 8, 1), folder / "utf16.png")
    for name in (*files, "masked.png"):
        (folder / name).with_suffix(".txt").write_text("a photo of TOK")
    (folder / "utf16.txt").write_bytes("a photo of TOK".encode("utf-16"))
    reasons = {
        "cut.png": "truncated", "empty.png": "it is empty", "page.jpg": "no image format",
        "bomb.ppm": "pixels", "masked.png": "make them the same size", "utf16.png": "UTF-16",
    }  # fmt: skip
    if not IS_ROOT:
        save_image(noise_image(8, 8, 2), folder / "locked.png").chmod(0)
        (folder / "locked.txt").write_text("a photo of TOK")
        reasons["locked.png"] = "Permission denied"
    return reasons


def test_files_that_cannot_be_read_are_left_out_with_their_reasons(tmp_path: Path) -> None:
    good = scan_folder(save_photos(tmp_path / "good"), masks="auto")
    folder = save_photos(tmp_path / "photos")
    reasons = spoil(folder)
    with pytest.raises(UserError):
        scan_folder(folder, masks="auto")
    checks = ImageChecks(skips=True)
    found = scan_folder(folder, masks="auto", checks=checks)
    assert [(r.key, r.path.name) for r in found] == [(r.key, r.path.name) for r in good]
    left = {path.name: why for path, why in checks.left_out.items()}
    assert left.keys() == reasons.keys()
    for name, part in reasons.items():
        assert part in left[name], left[name]


@pytest.mark.parametrize("captions", ["auto", "metadata"])
def test_names_in_a_table_without_a_file_are_left_out(
    tmp_path: Path, captions: CaptionMode
) -> None:
    folder = save_photos(tmp_path / "photos", count=2)
    rows = [{"file_name": name, "text": "x"} for name in ("0.png", "gone.png", "1.png", "../a.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"line 2 names gone.png"):
        scan_folder(folder, captions=captions)
    checks = ImageChecks(skips=True)
    found = scan_folder(folder, captions=captions, checks=checks)
    assert [r.path.name for r in found] == ["0.png", "1.png"]
    assert [path.name for path in checks.left_out] == ["gone.png", "a.png"]


def test_nothing_but_bad_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"leaves nothing of .*: none of its 1 image can be read"):
        scan_folder(tmp_path, captions="one", caption="x", checks=ImageChecks(skips=True))


def test_the_printed_list_is_short() -> None:
    assert describe_left_out({}, 7).endswith("all 7 images can be read, none is left out")
    many = {Path(f"{i}.png"): "it is empty" for i in range(25)}
    lines = describe_left_out(many, 5).splitlines()
    assert lines[0] == "--data.skip-bad: 25 of 30 images are left out:"
    assert lines[1] == "  0.png: it is empty" and lines[-1] == "  and 5 more" and len(lines) == 22


def test_a_run_prints_and_writes_what_it_leaves_out(
    config: Config, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_photos(tmp_path / "photos")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "cut.txt").write_text("a photo of TOK")
    with pytest.raises(UserError, match=r"cannot read the image .*cut.png"):
        train.train(merged(config, {"data": {"images": str(folder)}}))
    run = train.train(merged(config, {"data": {"images": str(folder), "skip_bad": True}}))
    said = capsys.readouterr().out
    assert f"--data.skip-bad: 1 of 6 images are left out:\n  {folder / 'cut.png'}: " in said
    assert said.count("cut.") == 1  # neither it nor its caption is among the files left out
    assert (run / "skipped_files.txt").read_text().startswith(f"{folder / 'cut.png'}: ")
    assert json.loads((run / "summary.json").read_text())["images"] == 5
    with pytest.raises(UserError, match=r"--data.skip-bad leaves out single images"):
        train.train(merged(config, {"data": {"skip_bad": True, "pairs": "x"}}))


def test_a_reason_names_the_file_that_is_at_fault(tmp_path: Path) -> None:
    own, other = tmp_path / "a.png", tmp_path / "a.mask.png"
    own.write_bytes(b"x")
    assert error_reason(own, UserError(f"cannot read {own} (cut off); replace it")).startswith(
        "can"
    )
    error = UserError(f"{other} is not UTF-8 text; save it as UTF-8")
    error.__cause__ = ValueError("byte 3")
    assert str(other) in error_reason(own, error)
