"""docs/family.md: the family of its code block trains, and draws what diffusers' pipeline does."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import AuraFlowPipeline
from PIL import Image

import infer
import train
from lora_core.config import Config, Stage, TokensConfig
from lora_core.diffusion.generation import SamplerSettings, generate_images
from lora_core.errors import UserError
from lora_core.family import Family
from models import LoadOptions, load_family, read_layout, read_schedule
from tests import tiny_auraflow
from tests.test_docs import ROOT, blocks

PROMPTS = ["a cat", "the quick dog"]
LENGTH = 24  # tokens of a prompt


class Opened(NamedTuple):
    """The tiny model, by diffusers and by the family of the page."""

    name: str  # FILE.py:FAMILY
    path: str
    pipe: AuraFlowPipeline
    family: Family


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("family_page")
    (code,) = [text for language, text in blocks(ROOT / "docs/family.md") if language == "python"]
    (folder / "auraflow.py").write_text(code)
    name = f"{folder / 'auraflow.py'}:FAMILY"
    pipe = tiny_auraflow.save(folder / "model")
    how = LoadOptions(family=name, max_sequence_length=LENGTH)
    return Opened(name, str(folder / "model"), pipe, load_family(str(folder / "model"), how))


@pytest.fixture
def page(config: Config, opened: Opened) -> Config:
    """Three steps of LoRA on that model."""
    return replace(
        config,
        model=opened.path,
        family=opened.name,
        max_sequence_length=LENGTH,
        optimizer=replace(config.optimizer, lr={"denoiser": 0.1}),
        stages=(Stage(3, ("denoiser",)),),
    )


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def test_prompts_and_a_call_of_the_denoiser_are_the_pipelines(opened: Opened) -> None:
    family, pipe = opened.family, opened.pipe
    x, sigma = torch.randn(2, 4, 8, 12), torch.tensor([0.9, 0.25])
    with torch.no_grad():
        cond = family.encode_prompts(PROMPTS)
        embeds = pipe.encode_prompt(PROMPTS, max_sequence_length=LENGTH)[0]
        assert torch.equal(cond.prompt_embeds, embeds)
        ours = family.denoise(x, family.schedule.level(sigma), cond)
        theirs = pipe.transformer(x, embeds, sigma).sample
        other = family.denoise(x, family.schedule.level(sigma.flip(0)), cond)
    assert torch.equal(ours, theirs)
    assert (ours - other).abs().max() > 1e-3, "the level matters"


@pytest.mark.parametrize(("height", "width", "guidance"), [(16, 24, 3.5), (32, 32, 1.0)])
def test_images_are_the_pipelines(opened: Opened, height: int, width: int, guidance: float) -> None:
    theirs = opened.pipe(
        PROMPTS, height=height, width=width, num_inference_steps=4, guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        max_sequence_length=LENGTH, output_type="pt",
    ).images  # fmt: skip
    settings = SamplerSettings("flow_euler", 4, guidance, width=width, height=height)
    ours = generate_images(opened.family, PROMPTS, [3, 4], settings)
    swapped = generate_images(opened.family, PROMPTS[::-1], [3, 4], settings)
    assert (ours - (theirs * 2 - 1)).abs().max() * 127.5 < 0.5
    assert (ours - swapped).abs().max() * 127.5 > 3, "the prompt matters"


def test_layout_and_schedule_of_the_configs_are_the_models(opened: Opened) -> None:
    assert read_layout(opened.path, family=opened.name) == opened.family.layout
    schedule, prediction = read_schedule(opened.path, {}, family=opened.name)
    assert (prediction, schedule.shift) == ("flow", opened.pipe.scheduler.config.shift)
    opened.pipe.scheduler.set_timesteps(4)
    steps = opened.family.schedule_at(8, 8).step_sigmas
    assert steps is not None
    found = torch.tensor(steps(4))
    assert torch.allclose(found, opened.pipe.scheduler.sigmas[:4], atol=1e-6)


def test_a_run_trains_and_draws_what_the_pipeline_draws_with_its_file(
    opened: Opened, page: Config, quick: None, tmp_path: Path
) -> None:
    run = train.train(page)
    drawn = tmp_path / "image.png"
    words = ["--model", opened.path, "--family", opened.name, "--lora", str(run)]
    words += ["--prompt", PROMPTS[0], "--sampler", "flow_euler", "--steps", "3", "--seed", "5"]
    words += ["--guidance", "2", "--width", "16", "--height", "16", "--out", str(drawn)]
    assert infer.main([*words, "--device", "cpu"]) == 0
    pipe = copy.deepcopy(opened.pipe)

    def draw() -> np.ndarray:
        image = pipe(
            PROMPTS[0], height=16, width=16, num_inference_steps=3, guidance_scale=2.0,
            generator=torch.Generator().manual_seed(5), max_sequence_length=LENGTH,
        ).images[0]  # fmt: skip
        return pixels(image)

    base = draw()
    pipe.load_lora_weights(str(run), weight_name="pytorch_lora_weights.safetensors")
    with Image.open(drawn) as image:
        ours = pixels(image)
    assert abs(ours - draw()).max() <= 1
    assert abs(ours - base).max() > 3, "the LoRA matters"


def test_a_run_learns_tokens_in_its_text_encoder(page: Config, quick: None) -> None:
    tokens = TokensConfig(encoders=("t5",), vectors=2)
    run = train.train(replace(page, tokens=tokens, stages=(Stage(2, ("denoiser", "tokens")),)))
    assert (run / f"{run.name}_emb.safetensors").is_file()


def test_its_memory_is_planned(page: Config, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", page.model, "--family", page.family, "--data.images", page.data.images]
    assert train.main([*words, "--data.resolution", "16", "--device", "cpu", "--plan"]) == 0
    assert capsys.readouterr().out.startswith(f"plan of {page.model}\nlora of rank 16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_skip": 1}, "--clip-skip 1 has no effect: the family .* reads"),
        ({"max_token_length": 150}, "--max-token-length 150 has no effect: the family"),
        ({"max_sequence_length": 999}, "--max-sequence-length is 999; expected 1 to 512 tokens"),
        (
            {"loss": "examples/attention_in_mask.py:attention_in_mask"},
            "this loss reads attention, and the family auraflow records no attention maps",
        ),
        (
            {"stages": (Stage(1, ("denoiser", "text_encoder")),)},
            "no text encoder of the family auraflow takes adapters; leave the group",
        ),
        (
            {"stages": (Stage(1, ("denoiser", "tokens")),)},
            r"has no CLIP text encoder to learn tokens; name others with --tokens.encoders \(t5\)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_lacks_is_refused(
    page: Config, quick: None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train.train(replace(page, **changes))
