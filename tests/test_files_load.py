"""Files of a run on the embedded model, in diffusers' own pipeline: it draws infer.py's images."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import infer
import train
from lora_core.toml import read_toml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=["lora", "dora"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty real steps: ten on the tokens, ten on tokens, denoiser and text encoder.

    At a rate that changes the images.
    """
    config = read_toml(ROOT / "configs" / "toy_pti.toml")
    stages = (
        replace(config.stages[0], steps=10),
        replace(
            config.stages[1], steps=10, groups=("denoiser", "text_encoder", "tokens"), schedule=None
        ),
    )
    rates = {"denoiser": 1e-2, "text_encoder": 1e-2, "tokens": 2e-2}
    config = replace(
        config,
        model=str(ROOT / "toy" / "model"),
        out=str(tmp_path_factory.mktemp("runs") / request.param),
        batch_size=2,
        stages=stages,
        data=replace(config.data, images=str(ROOT / "toy" / "concepts" / "zib")),
        optimizer=replace(config.optimizer, name="adamw", args={}, lr=rates),
        adapter=replace(config.adapter, kind=request.param, rank=4, alpha=8.0),
        validation=replace(config.validation, bins=1),
        samples=replace(config.samples, prompts=("TOK",), new_prompts=(), steps=4),
    )
    return train.train(config)


def difference(pixels: torch.Tensor, file: Path) -> float:
    """Largest difference in levels of 255 between pixels [3, h, w] in [0, 1] and a PNG."""
    image = Image.open(file)
    ours = (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .reshape(image.height, image.width, 3)
        .permute(2, 0, 1)
        .float()
    )
    return (pixels * 255 - ours).abs().max().item()


def test_diffusers_draws_what_infer_draws(run: Path, tmp_path: Path) -> None:
    model, out = str(ROOT / "toy" / "model"), tmp_path / "ours.png"
    words = [
        "--model",
        model,
        "--prompt",
        "a photo of TOK on a yellow background",
        "--steps",
        "10",
        "--seed",
        "3",
        "--guidance",
        "3",
    ]
    assert infer.main([*words, "--lora", str(run), "--out", str(out)]) == 0
    assert infer.main([*words, "--lora", f"{run}:0", "--out", str(tmp_path / "base.png")]) == 0

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(run)  # finds pytorch_lora_weights.safetensors by its name
    pipe.load_textual_inversion(
        load_file(run / f"{run.name}_emb.safetensors")["clip_l"], token=["<s0>", "<s1>"]
    )
    draw = dict(
        num_inference_steps=10,
        guidance_scale=3.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(3),
    )
    theirs = pipe("a photo of <s0><s1> on a yellow background", **draw).images[0]
    assert difference(theirs, out) <= 2
    assert difference(theirs, tmp_path / "base.png") > 20  # the adapters matter


def test_kohya_file_draws_the_same(run: Path, tmp_path: Path) -> None:
    words = [
        "--model",
        str(ROOT / "toy" / "model"),
        "--prompt",
        "a red cat",
        "--steps",
        "5",
        "--seed",
        "1",
    ]
    for name in ("pytorch_lora_weights.safetensors", f"{run.name}.safetensors"):
        assert (
            infer.main([*words, "--lora", str(run / name), "--out", str(tmp_path / f"{name}.png")])
            == 0
        )
    native, kohya = (Image.open(p).tobytes() for p in sorted(tmp_path.glob("*.png")))
    assert max(abs(a - b) for a, b in zip(native, kohya)) <= 2


def test_the_files_carry_their_recipe(run: Path) -> None:
    for file in (
        run / "pytorch_lora_weights.safetensors",
        run / f"{run.name}.safetensors",
        run / f"{run.name}_emb.safetensors",
    ):
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        assert "clip" in header["lora_core.config"] and json.loads(header["placeholders"]) == {
            "TOK": ["<s0>", "<s1>"]
        }
    with safe_open(run / f"{run.name}.safetensors", "pt") as opened:
        assert (
            opened.metadata()["ss_base_model_version"] == "sd_v1"
            and opened.metadata()["modelspec.architecture"] == "stable-diffusion-v1/lora"
        )
