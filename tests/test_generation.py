"""Images that are not finite are refused."""

import shutil
from pathlib import Path

import pytest
import torch

import infer
from lora_core.diffusion import generation
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
