"""Generated images: start noise and holes by the example, and images that are not finite."""

import shutil
from pathlib import Path

import pytest
import torch

import infer
from lora_core.diffusion import generation
from lora_core.diffusion.generation import random_hole_masks, start_noise
from lora_core.diffusion.noise import RandomKeys
from lora_core.errors import UserError
from models import load_family


@pytest.mark.parametrize(
    "part, said",
    [
        ("unet", r"the denoiser \(unet\) gave NaN .* seed 3"),
        ("vae", "the VAE's decoder gave NaN .* seed 3"),
    ],
)
def test_black_images_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, said: str
) -> None:
    broken = Path(shutil.copytree(model, tmp_path / part))
    family = load_family(str(broken))
    with torch.no_grad():
        (
            family.modules["unet"].conv_out
            if part == "unet"
            else family.modules["vae"].decoder.conv_out
        ).bias.fill_(float("nan"))
    with pytest.raises(UserError, match=said):
        generation.generate_images(
            family, ["a", "b"], [3, 4], generation.SamplerSettings(steps=1, guidance=1.0)
        )
    family.modules[part].save_pretrained(broken / part)
    out = tmp_path / "out.png"
    assert (
        infer.main(
            [
                "--model",
                str(broken),
                "--prompt",
                "a",
                "--seed",
                "3",
                "--steps",
                "1",
                "--out",
                str(out),
            ]
        )
        == 2
    )
    assert "gave NaN" in capsys.readouterr().err and not out.exists()


def test_start_noise_is_what_diffusers_draws() -> None:
    theirs = torch.cat(
        [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (7, 8)]
    )
    assert torch.equal(start_noise([7, 8], (4, 8, 8)), theirs)


def test_holes_are_keyed_by_example() -> None:
    masks = random_hole_masks(RandomKeys(0, ("a", "b", "c"), (0, 1, 2)), 64, 64)
    assert torch.equal(masks[1:2], random_hole_masks(RandomKeys(0, ("b",), (1,)), 64, 64))
    assert masks.shape == (3, 1, 64, 64) and set(masks.unique().tolist()) <= {0.0, 1.0}
    many = random_hole_masks(RandomKeys(0, tuple(map(str, range(200))), (0,) * 200), 32, 32)
    assert 0.15 < (many.flatten(1).min(1).values == 1).float().mean() < 0.35
