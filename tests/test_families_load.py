"""A run on SDXL or Flux: its README.md loads it into diffusers, which then draws our images."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from lora_core import formats
from lora_core.adapters.patch import patch
from lora_core.config import AdapterConfig, Config, OptimizerConfig, Stage, TokensConfig
from lora_core.diffusion.generation import SamplerSettings, generate_images
from models import LoadOptions, load_family
from tests import tiny_flux, tiny_sdxl

ALL = ("denoiser", "text_encoder", "tokens")
CASES = {  # name -> (tiny model, encoders that learn rows, sampler, pipeline's arguments)
    "xl": (lambda folder: tiny_sdxl.save(folder), (), SamplerSettings("euler", 4, 3.0)),
    "legacy_xl": (
        lambda folder: tiny_sdxl.save(folder, legacy=True),
        (),
        SamplerSettings("euler", 4, 3.0),
    ),
    "flow": (
        lambda folder: tiny_flux.save(folder),
        ("clip_l", "t5"),
        SamplerSettings("flow_euler", 4, 3.5),
    ),
}


@pytest.fixture(params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path: Path, config: Config, quick: None
) -> tuple[Path, Path, SamplerSettings]:
    """(model, run, recipe): four steps that move everything far enough to be seen."""
    save, encoders, recipe = CASES[request.param]
    save(tmp_path / "model")
    rates = dict.fromkeys(ALL, 2e-2)
    config = replace(
        config,
        model=str(tmp_path / "model"),
        stages=(Stage(4, ALL),),
        optimizer=OptimizerConfig(lr=rates),
        tokens=TokensConfig(encoders=encoders),
        adapter=AdapterConfig(rank=4, alpha=16),
        samples=replace(config.samples, prompts=("a TOK in b",)),
    )
    return tmp_path / "model", train.train(config), recipe


def levels(a: Tensor, b: Tensor) -> float:
    """Largest difference of two pictures in [0, 1], in levels of 255."""
    return (a - b).abs().max().item() * 255


def test_the_readme_of_a_run_loads_it_into_diffusers(
    case: tuple[Path, Path, SamplerSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run, recipe = case
    (code,) = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    load, call = code.split("image = ")
    monkeypatch.chdir(run)
    scope: dict[str, Any] = {}
    exec(load, scope)
    prompt = re.match(r'pipe\(prompt="(.*?)"', call)
    assert prompt and "<s0><s1>" in prompt[1]
    scope["pipe"].set_progress_bar_config(disable=True)

    family = load_family(
        str(model), LoadOptions(max_sequence_length=32) if family_has_t5(model) else LoadOptions()
    )
    side = family.resolution
    given = dict(
        num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance,
        height=side,
        width=side,
        output_type="pt",
    )
    given |= {"max_sequence_length": 32} if family_has_t5(model) else {}
    theirs = scope["pipe"](prompt[1], generator=torch.Generator().manual_seed(5), **given).images[0]

    def ours(folder: Path) -> Tensor:
        modules = {
            **family.modules,
            **{
                name.replace("text_encoder", "tokenizer"): t
                for name, t in family.tokenizers.items()
            },
        }
        with patch(modules, folder, layout=family.layout) as p:
            return (generate_images(family, [p.bind("a TOK in b")], [5], recipe)[0] + 1) / 2

    assert levels(ours(run), theirs) <= 1
    assert (
        levels((generate_images(family, ["a in b"], [5], recipe)[0] + 1) / 2, theirs) > 8
    )  # what was learned matters


def family_has_t5(model: Path) -> bool:
    return (model / "transformer").is_dir()


def test_the_kohya_file_of_a_run_is_the_same_update(
    case: tuple[Path, Path, SamplerSettings],
) -> None:
    model, run, _ = case
    family = load_family(str(model))
    native, kohya = (
        formats.load(run / name, family.layout).components
        for name in (formats.NATIVE, f"{run.name}.safetensors")
    )
    assert {n: set(c) for n, c in native.items()} == {n: set(c) for n, c in kohya.items()}
    for name, modules in native.items():
        for path, lr in modules.items():
            other = kohya[name][path]
            assert torch.allclose(
                lr.scale * lr.up.flatten(1) @ lr.down.flatten(1),
                other.scale * other.up.flatten(1) @ other.down.flatten(1),
                atol=1e-6,
            )
