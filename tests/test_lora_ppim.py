"""lora_ppim as it is typed: the folder that it writes is cloneofsimo's, and lora_pti's to read."""

import contextlib
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from lora_core.errors import UserError
from lora_core.flags.fire_words import parse_fire_words
from models.captioner import Captioner
from models.face_detector import FaceDetector
from models.segmenter import ClipSegmenter
from tests.conftest import save_photos
from tests.installed_commands import typed_words
from tests.tiny_annotators import save_blip, save_owlvit
from tests.tiny_clipseg import save_clipseg
from training.translation.lora_ppim import (
    ARGUMENTS,
    crop_square,
    mask_center,
    read_job,
    run_lora_ppim,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models of each kind."""
    folder = tmp_path_factory.mktemp("annotators")
    save_blip(folder / "blip")
    save_clipseg(folder / "clipseg")
    save_owlvit(folder / "owlvit")
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Eleven photos, wide and tall, so that the order of numbers and of texts differ."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for number in range(11):
        image = Image.effect_noise((40, 24) if number % 2 else (24, 30), 90).convert("RGB")
        image.paste("red", (2, 2, 12, 12))
        image.save(folder / f"photo_{number:02}.jpg")
    return folder


def models_of(weights: Path) -> list[str]:
    return [
        f"--caption_model={weights / 'blip'}",
        f"--mask_model={weights / 'clipseg'}",
        f"--face_model={weights / 'owlvit'}",
    ]


def test_the_command_as_typed_writes_the_folder_of_cloneofsimo(
    weights: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"lora_ppim {plain} prepared --target_prompts 'a face' --target_size 32 --n_length=3 "
    (words,) = typed_words(line + " ".join(models_of(weights)), tmp_path)
    with contextlib.chdir(tmp_path):
        assert train.lora_ppim(words) == 0
    names = ["0.mask.png", "0.src.jpg", "1.mask.png", "1.src.jpg", "2.mask.png", "2.src.jpg"]
    assert sorted(path.name for path in (tmp_path / "prepared").iterdir()) == [
        *names,
        "caption.txt",
    ]
    assert "written: 0.src.jpg, 0.mask.png (" in capsys.readouterr().out
    for name in names:
        with Image.open(tmp_path / "prepared" / name) as image:
            assert image.size == (32, 32) and image.mode == ("L" if "mask" in name else "RGB")
    captions = (tmp_path / "prepared" / "caption.txt").read_text().splitlines()
    captioner = Captioner(str(weights / "blip"), "cpu")
    with Image.open(plain / "photo_01.jpg") as image:
        assert captions[1] == captioner.describe(image.convert("RGB")) and len(captions) == 3


def test_positions_lists_and_switches_are_those_of_fire(plain: Path) -> None:
    words = [f"[{plain / 'photo_03.jpg'},{plain / 'photo_01.jpg'}]", "out", "a photo of"]
    words += ["--nocrop_based_on_salience", "--use-face-detection-instead"]
    job = read_job(parse_fire_words(words, ARGUMENTS, "lora_ppim"))
    assert [path.name for path in job.files] == ["photo_03.jpg", "photo_01.jpg"]
    assert job.caption_text == "a photo of" and not job.crop_based_on_salience
    assert job.masker.kind == "face"


def test_masks_and_crops_are_cloneofsimos(weights: Path, plain: Path, tmp_path: Path) -> None:
    """Against the formulas of preprocess_files.py, written out."""
    path = plain / "photo_01.jpg"
    words = [f"[{path}]", str(tmp_path / "one"), "--target_prompts=a face", "--temp=2"]
    run_lora_ppim([*words, "--target_size=24", *models_of(weights)])
    image = Image.open(path).convert("RGB")
    mask = ClipSegmenter(str(weights / "clipseg"), "cpu").find(image, "a face", 2.0)
    assert mask is not None
    levels = torch.tensor(list(mask.tobytes())).view(mask.height, mask.width).double()
    x = (levels * torch.arange(mask.width)).sum() / levels.sum()
    left = min(max(float(x) - 12, 0), 40 - 24)
    expected = mask.crop((round(left), 0, round(left) + 24, 24))
    with Image.open(tmp_path / "one" / "0.mask.png") as written:
        assert written.tobytes() == expected.tobytes()


def test_faces_are_boxes_of_255_on_1(weights: Path, plain: Path, tmp_path: Path) -> None:
    words = [str(plain), str(tmp_path / "faces"), "--use_face_detection_instead", "--n_length", "1"]
    run_lora_ppim([*words, "--target_size=24", "--nocrop_based_on_salience", *models_of(weights)])
    image = Image.open(plain / "photo_00.jpg").convert("RGB")
    whole = FaceDetector(str(weights / "owlvit"), "cpu").find(image)
    assert whole is not None and {level for _, level in whole.getcolors() or ()} == {1, 255}
    with Image.open(tmp_path / "faces" / "0.mask.png") as written:
        assert written.tobytes() == whole.crop((0, 3, 24, 27)).tobytes()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--target_prompts=a face", "--use_face_detection_instead"], "have no effect on boxes"),
        (["--temp=0"], r"--temp 0 .*a number above 0"),
        (["--target_prompts=['a', 'b']"], "has 2 texts for 11 images"),
        (["--target_sise=3"], "no flag --target_sise; the nearest is --target_size"),
    ],
)
def test_what_cannot_be_carried_out_is_one_sentence(
    plain: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run_lora_ppim([str(plain), str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_an_edited_folder_is_kept(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "caption.txt").write_text("mine\n")
    with pytest.raises(UserError, match=r"caption\.txt exists and may have been edited"):
        run_lora_ppim([str(plain), str(tmp_path / "out")])
    with pytest.raises(UserError, match="is no folder"):
        run_lora_ppim([str(tmp_path / "none"), str(tmp_path / "out")])


def test_the_center_of_a_mask_and_the_square_around_it() -> None:
    mask = Image.new("L", (9, 5), 0)
    mask.paste(200, (6, 1, 9, 4))
    assert mask_center(mask) == (7, 2)
    assert crop_square(mask, (7, 2), 5).tobytes() == mask.crop((4, 0, 9, 5)).tobytes()
    assert crop_square(mask, (0, 2), 5).tobytes() == mask.crop((0, 0, 5, 5)).tobytes()


def test_masks_beside_the_images_are_no_images(tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos", count=2)
    job = read_job(parse_fire_words([str(folder), "out"], ARGUMENTS, "lora_ppim"))
    assert [path.name for path in job.files] == ["0.png", "1.png"]
