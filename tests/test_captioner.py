"""Captions by BLIP and Florence-2, against the library's own processors."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BlipImageProcessorPil, CLIPImageProcessorPil, Florence2Processor

from lora_core.errors import UserError
from models.captioner import Captioner
from tests.tiny_annotators import PREPARATION, save_blip, save_florence


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip(tmp_path_factory.mktemp("captioner") / "blip")


@pytest.fixture(scope="module")
def florence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_florence(tmp_path_factory.mktemp("captioner") / "florence")


def an_image() -> Image.Image:
    noise = torch.randint(256, (40 * 24 * 3,), generator=torch.Generator().manual_seed(0))
    return Image.frombytes("RGB", (40, 24), bytes(noise.tolist()))


def test_blip_reads_what_its_processor_prepares_and_continues_a_beginning(blip: Path) -> None:
    captioner, image = Captioner(str(blip), "cpu"), an_image()
    theirs = BlipImageProcessorPil(**PREPARATION)(image, return_tensors="pt").pixel_values
    pixels = captioner.squeeze(image)
    assert torch.allclose(pixels, theirs, atol=1e-5)
    with torch.no_grad():
        ids = captioner.network.generate(
            pixel_values=theirs, max_length=60, num_beams=3, do_sample=False
        )
    expected = captioner.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert captioner.describe(image) == expected == captioner.describe(image)
    assert captioner.describe(image, "a photo").startswith("a photo")


def test_florence_reads_what_its_processor_prepares(florence: Path) -> None:
    captioner, image = Captioner(str(florence), "cpu"), an_image()
    count = captioner._count_features(captioner.squeeze(image))
    preparation = CLIPImageProcessorPil(**PREPARATION, do_center_crop=False, resample=3)
    preparation.image_seq_length = count
    tokenizer = captioner.tokenizer
    tokenizer.image_token, tokenizer.image_token_id = "<image>", 4
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = Florence2Processor(preparation, tokenizer)
    read = processor(images=image, text="<DETAILED_CAPTION>", return_tensors="pt")
    assert read.input_ids[0].tolist() == captioner.request_ids(count)
    assert torch.allclose(read.pixel_values, captioner.squeeze(image), atol=1e-5)
    with torch.no_grad():
        ids = captioner.network.generate(**read, max_new_tokens=60, num_beams=3, do_sample=False)
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert captioner.describe(image) == " ".join(expected.split())


def test_other_models_and_beginnings_are_refused(florence: Path, model: Path) -> None:
    with pytest.raises(UserError, match="'clip_text_model', expected blip or florence2"):
        Captioner(str(model / "text_encoder"), "cpu")
    with pytest.raises(UserError, match="cannot begin with 'a photo'"):
        Captioner(str(florence), "cpu").describe(an_image(), "a photo")
