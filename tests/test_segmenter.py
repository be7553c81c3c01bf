"""CLIPSeg's masks: the formula of cloneofsimo's lora_ppim, the images it reads, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_core.errors import UserError
from models.segmenter import ClipSegmenter, mask_levels
from tests.tiny_clipseg import PREPARATION, save_clipseg


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clipseg(tmp_path_factory.mktemp("segmenter") / "clipseg")


def an_image() -> Image.Image:
    noise = torch.randint(256, (40 * 24 * 3,), generator=torch.Generator().manual_seed(0))
    image = Image.frombytes("RGB", (40, 24), bytes(noise.tolist()))
    image.paste("navy", (20, 0, 40, 24))
    return image


def test_greys_are_the_sources_formula() -> None:
    logits = 4 * torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    a, b = logits.double()
    chances = (a.exp() / (a.exp() + b.exp()) + 0.01).clamp(max=1)
    expected = 255 * chances / chances.max()
    levels = mask_levels(logits)
    assert levels.dtype == torch.uint8 and levels.max() == 255
    assert ((expected - levels) > -1e-4).all() and ((expected - levels) < 1.0001).all()  # cut off


def test_a_mask_is_the_networks_answer_at_the_size_of_the_image(clipseg: Path) -> None:
    segmenter, image = ClipSegmenter(str(clipseg), "cpu"), an_image()
    mask = segmenter.find(image, "a face")
    assert mask is not None and (mask.size, mask.mode) == (image.size, "L")
    square = torch.tensor(list(image.resize((32, 32), Image.Resampling.BILINEAR).tobytes()))
    pixels = square.view(32, 32, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(PREPARATION[name]) for name in ("image_mean", "image_std"))
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    ids = segmenter.tokenizer(["a face", ""], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        logits = segmenter.network(**ids, pixel_values=torch.stack([pixels] * 2)).logits
    levels = mask_levels(logits)
    small = Image.frombytes("L", (32, 32), bytes(levels.flatten().tolist()))
    assert small.resize(image.size, Image.Resampling.BICUBIC).tobytes() == mask.tobytes()
    assert segmenter.find(image, "b c").tobytes() != mask.tobytes()  # type: ignore[union-attr]


def test_a_temperature_divides_the_logits() -> None:
    logits = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mask_levels(logits, 4.0), mask_levels(logits / 4))


def test_words_that_fit_nothing_give_no_mask(tmp_path: Path) -> None:
    flat = ClipSegmenter(str(save_clipseg(tmp_path / "flat", contrast=0.01)), "cpu")
    assert flat.find(an_image(), "a face") is None


def test_recent_versions_write_the_preparation_into_another_file(
    clipseg: Path, tmp_path: Path
) -> None:
    folder = save_clipseg(tmp_path / "new")
    (folder / "preprocessor_config.json").unlink()
    table = {"image_processor": PREPARATION | {"size": {"height": 32, "width": 32}}}
    (folder / "processor_config.json").write_text(json.dumps(table))
    mask = ClipSegmenter(str(folder), "cpu").find(an_image(), "a face")
    assert mask == ClipSegmenter(str(clipseg), "cpu").find(an_image(), "a face")
    table = {"image_processor": PREPARATION | {"size": [32, 32]}}  # as OWL-ViT's
    (folder / "processor_config.json").write_text(json.dumps(table))
    assert mask == ClipSegmenter(str(folder), "cpu").find(an_image(), "a face")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"size": 0}, "has size 0"),
        ({"size": "big"}, "has size 'big'"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean \[0.5, 0.5\]"),
        ({"image_std": [0.5, 0.5, 0]}, r"image_std \[0.5, 0.5, 0\]"),
        (None, "has no preprocessor_config.json"),
    ],
)
def test_a_bad_preparation_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    folder = save_clipseg(tmp_path / "bad")
    file = folder / "preprocessor_config.json"
    file.unlink() if change is None else file.write_text(json.dumps(PREPARATION | change))
    with pytest.raises(UserError, match=said):
        ClipSegmenter(str(folder), "cpu")


def test_other_models_and_damaged_weights_are_refused(clipseg: Path, model: Path) -> None:
    with pytest.raises(UserError, match="is of the type 'clip_text_model', expected clipseg"):
        ClipSegmenter(str(model / "text_encoder"), "cpu")
    segmenter = ClipSegmenter(str(clipseg), "cpu")
    segmenter.network.decoder.transposed_convolution.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="gives NaN or infinity"):
        segmenter.find(an_image(), "a face")
