"""Likeness by CLIP: the cosines of the library's own model, and what is no CLIP model."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_core.errors import UserError
from models.image_similarity import ImageSimilarity
from tests.tiny_clip import PREPARATION, save_clip
from tests.tiny_clipseg import save_clipseg


def an_image(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (width * height * 3,), generator=generator)
    return Image.frombytes("RGB", (width, height), bytes(noise.tolist()))


def test_cosines_are_those_of_the_librarys_forward(tmp_path: Path) -> None:
    clip = ImageSimilarity(str(save_clip(tmp_path / "clip")), "cpu")
    images, texts = [an_image(i) for i in range(18)], ["a photo of a cat", "b"]
    pixels = []
    for image in images:
        flat = torch.tensor(list(image.tobytes()), dtype=torch.float64).view(16, 16, 3)
        mean, std = (torch.tensor(PREPARATION[name]) for name in ("image_mean", "image_std"))
        pixels.append(((flat / 255 - mean) / std).permute(2, 0, 1).float())
    ids = clip.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = clip.network(**ids, pixel_values=torch.stack(pixels))
        cosines = out.logits_per_image / clip.network.logit_scale.exp()
    found = clip.embed_images(images) @ clip.embed_texts(texts).T
    assert found.shape == (18, 2) and found.dtype == torch.float64
    torch.testing.assert_close(found.float(), cosines, rtol=1e-5, atol=1e-6)
    assert found.std() > 1e-3  # random weights tell images apart


def test_other_sizes_are_scaled_and_cropped_in_the_middle(tmp_path: Path) -> None:
    clip = ImageSimilarity(str(save_clip(tmp_path / "clip")), "cpu")
    wide = an_image(1, 48, 24)
    half = wide.resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    torch.testing.assert_close(clip.embed_images([wide]), clip.embed_images([half]))
    side = wide.resize((32, 16), Image.Resampling.BICUBIC).crop((0, 0, 16, 16))
    assert not torch.allclose(clip.embed_images([wide]), clip.embed_images([side]), atol=1e-4)


def test_what_is_no_clip_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of the type 'clipseg', expected clip"):
        ImageSimilarity(str(save_clipseg(tmp_path / "other")), "cpu")
