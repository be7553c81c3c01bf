"""--data.prepare: missing files are written beside the images, and those there are kept."""

from pathlib import Path

import pytest
from PIL import Image

import train
from models.captioner import Captioner
from models.face_detector import FaceDetector
from models.segmenter import ClipSegmenter
from tests.conftest import save_photos
from tests.tiny_annotators import save_blip, save_florence, save_owlvit
from tests.tiny_clipseg import save_clipseg
from training.inputs.prepared_files import split_prepare_words


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annotators")
    for name, save in (("blip", save_blip), ("florence", save_florence), ("owlvit", save_owlvit)):
        save(folder / name)
    save_clipseg(folder / "clipseg")
    save_owlvit(folder / "blind", bias=-100.0)
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Three photos, of which only 1.png has a caption and a mask."""
    folder = save_photos(tmp_path / "bare", captions="mine", count=3)
    for i in (0, 2):
        (folder / f"{i}.mask.png").unlink()
        (folder / f"{i}.txt").unlink()
    return folder


def test_missing_files_are_written_and_printed_and_the_others_kept(
    bare: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [(bare / name).read_bytes() for name in ("1.txt", "1.mask.png")]
    words = ["--data.images", str(bare), "--data.caption", "a photo of TOK", "--device", "cpu"]
    sources = [f"blip@{weights / 'blip'}", f"clipseg@{weights / 'clipseg'}:a face"]
    assert train.main([*words, "--data.prepare", *sources]) == 0
    said = capsys.readouterr().out
    assert [(bare / name).read_bytes() for name in ("1.txt", "1.mask.png")] == kept
    captioner = Captioner(str(weights / "blip"), "cpu")
    segmenter = ClipSegmenter(str(weights / "clipseg"), "cpu")
    for i in (0, 2):
        image = Image.open(bare / f"{i}.png").convert("RGB")
        text = f"a photo of TOK, {captioner.describe(image)}"
        assert (bare / f"{i}.txt").read_text() == f"{text}\n"
        mask = segmenter.find(image, "a face")
        assert mask and Image.open(bare / f"{i}.mask.png").tobytes() == mask.tobytes()
        assert f"written: {bare / f'{i}.txt'}: {text}" in said
        assert f"written: {bare / f'{i}.mask.png'}: " in said
    assert "kept: 1 of 3 images had a caption, 1 of 3 a mask; nothing was trained" in said
    assert train.main([*words, "--data.prepare", *sources]) == 0
    again = capsys.readouterr().out
    assert "written" not in again and "3 of 3 images had a caption, 3 of 3 a mask" in again


def test_faces_and_captions_alone(bare: Path, weights: Path) -> None:
    words = ["--data.images", str(bare), "--device", "cpu", "--data.prepare"]
    assert train.main([*words, f"face@{weights / 'owlvit'}"]) == 0
    assert not (bare / "0.txt").exists()
    mask = FaceDetector(str(weights / "owlvit"), "cpu").find(Image.open(bare / "0.png"))
    assert mask and Image.open(bare / "0.mask.png").tobytes() == mask.tobytes()
    assert train.main([*words, f"florence@{weights / 'florence'}"]) == 0
    expected = Captioner(str(weights / "florence"), "cpu").describe(Image.open(bare / "0.png"))
    assert (bare / "0.txt").read_text() == f"{expected}\n"


def test_without_words_a_segmenter_looks_for_the_caption(bare: Path, weights: Path) -> None:
    for i in (0, 2):
        (bare / f"{i}.txt").write_text("a face\n")
    words = ["--data.images", str(bare), "--device", "cpu"]
    assert train.main([*words, f"--data.prepare=clipseg@{weights / 'clipseg'}"]) == 0
    segmenter = ClipSegmenter(str(weights / "clipseg"), "cpu")
    mask = segmenter.find(Image.open(bare / "2.png"), "a face")
    assert mask and Image.open(bare / "2.mask.png").tobytes() == mask.tobytes()


def test_what_cannot_be_done_is_one_sentence(
    bare: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data.images", str(bare), "--device", "cpu", "--data.prepare"]
    for words, said in (
        ([*given, "sam"], "--data.prepare is 'sam', expected blip or florence for captions"),
        ([*given, "face:a"], "--data.prepare is 'face:a', expected"),
        ([*given, "blip", "florence"], "names two models for captions; leave florence out"),
        ([*given, f"clipseg@{weights / 'clipseg'}"], "and an image has none; give words"),
        ([*given, f"face@{weights / 'blind'}"], "face finds nothing in 2 of 2 images, first"),
        (["--data.prepare", "blip"], "needs the folder of the images; add --data.images"),
        (["--data.images", "nowhere", "--data.prepare", "blip"], "nowhere does not exist"),
        ([*given, f"blip@{weights / 'owlvit'}"], "'owlvit', expected blip or florence2"),
    ):
        assert train.main(words) == 2
        assert said in capsys.readouterr().err


def test_its_words_end_at_the_next_flag() -> None:
    words = ["c.toml", "--data.prepare", "blip", "face", "--device", "cpu"]
    assert split_prepare_words(words) == (["c.toml", "--device", "cpu"], ["blip", "face"])
    assert split_prepare_words(["--device", "cpu"]) == (["--device", "cpu"], None)
    assert split_prepare_words(["--data.prepare"]) == ([], [])
