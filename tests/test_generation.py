"""Generated images: start noise and holes by the example, and images that are not finite."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FluxInpaintPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
)

import infer
from lora_core.diffusion import generation
from lora_core.diffusion.generation import ImageBatch, random_hole_masks, start_noise
from lora_core.diffusion.noise import RandomKeys
from lora_core.diffusion.regions import parse_region
from lora_core.errors import UserError
from lora_core.family import Conditioning
from lora_core.placeholders import make_placeholders
from lora_core.tokens import install_tokens
from models import load_family
from tests import tiny_flux, tiny_sdxl
from tests.tiny_pipeline import SCALED, save_sd_pipeline


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


# ---------------------------------------------------------------- many batches


def test_networks_work_one_after_the_other_for_the_images_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of other settings and sizes, with a refiner; each is prepared before each network.

    A batch that is larger than the most that may wait goes alone.
    """
    tiny_sdxl.save(tmp_path / "base")
    tiny_sdxl.save(tmp_path / "refiner", refiner=True)
    family, refiner = (load_family(str(tmp_path / name)) for name in ("base", "refiner"))
    calls: list[str] = []
    for model, owner in ((family, "base"), (refiner, "refiner")):
        for name in ("encode", "denoise", "decode"):
            _note_calls(monkeypatch, model, name, f"{owner} {name}", calls)
    settings = generation.SamplerSettings("euler", 4, 3.0, width=16, height=16, refiner_start=0.5)
    batches = []
    for number, count in enumerate((1, 2, 1, 4, 1)):
        own = replace(settings, steps=4 + number % 2)
        seeds = range(count)
        prepare = partial(calls.append, f"batch {number}")
        batches.append(ImageBatch(["a"] * count, seeds, own, prepare=prepare))
    monkeypatch.setattr(generation, "MOST_WAITING", 3)
    drawn = list(generation.generate_batches(family, batches, refiner=refiner))
    turns = ("base encode", "base denoise", "refiner encode", "refiner denoise", "base decode")
    expected = []
    for group in ([0, 1], [2], [3], [4]):
        expected += [f"batch {number}" for number in group]  # the start
        for turn in turns:
            for number in group:
                expected += [f"batch {number}", turn]
    assert [call for call, _ in groupby(calls)] == [call for call, _ in groupby(expected)]
    for batch, pixels in zip(batches, drawn, strict=True):
        alone = generation.generate_images(
            family, batch.prompts, batch.seeds, batch.settings, refiner=refiner
        )
        assert torch.equal(pixels, alone)
    assert not list(generation.generate_batches(family, []))


def _note_calls(
    monkeypatch: pytest.MonkeyPatch, model: Any, name: str, note: str, calls: list[str]
) -> None:
    method = getattr(model, name)

    def noted(*inputs: Any) -> Any:
        calls.append(note)
        return method(*inputs)

    monkeypatch.setattr(model, name, noted)


# ---------------------------------------------------------------- painting in an image

# Of pixels in [-1, 1]: eight fp32 steps of two networks with about 40 layers each, 6e-8 a layer.
ROUNDING = 8 * 40 * 6e-8
SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler(**SCALED),
    "euler": EulerDiscreteScheduler.from_config(SCALED),
    "dpmpp_2m": DPMSolverMultistepScheduler.from_config(SCALED),
}


def painting() -> tuple[torch.Tensor, torch.Tensor]:
    """An image in [-1, 1] and a mask with a hole that is no multiple of the VAE's factor."""
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 9:26, 4:19] = 1
    return pixels, mask


def use_posterior_mean(pipe: Any) -> None:
    """infer.py starts from the mean of the posterior, diffusers' pipelines from a sample of it."""
    encode = pipe.vae.encode

    def mean(x: torch.Tensor) -> SimpleNamespace:
        middle = encode(x).latent_dist.mean
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator=None: middle))

    pipe.vae.encode = mean


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_a_plain_model_paints_in_an_image_as_diffusers_blends_latents(
    tmp_path: Path, sampler: str, strength: float
) -> None:
    pipe = StableDiffusionInpaintPipeline.from_pipe(
        save_sd_pipeline(tmp_path), requires_safety_checker=False
    )
    pipe.scheduler = SCHEDULERS[sampler]
    pipe.set_progress_bar_config(disable=True)
    use_posterior_mean(pipe)
    pixels, mask = painting()
    settings = generation.SamplerSettings(sampler, 8, 2.0, width=32, height=32, strength=strength)
    theirs = pipe(
        "cat", image=pixels, mask_image=mask, height=32, width=32, num_inference_steps=8,
        guidance_scale=2.0, generator=torch.Generator().manual_seed(5), output_type="pt",
        strength=strength,
    ).images * 2 - 1  # fmt: skip
    family = load_family(str(tmp_path))
    ours = generation.generate_images(family, ["cat"], [5], settings, init=pixels, mask=mask)
    assert (ours - theirs).abs().max() < ROUNDING
    whole = generation.generate_images(
        family, ["cat"], [5], settings, init=pixels, mask=torch.ones_like(mask)
    )
    assert (ours - whole).abs().max() > 1e-2


def test_a_refiner_reads_placeholder_words_as_they_are(tmp_path: Path) -> None:
    """It has not learned their tokens, and may have another number of cross-attention layers."""
    tiny_sdxl.save(tmp_path / "base")
    tiny_sdxl.save(tmp_path / "refiner", refiner=True)
    base, refiner = load_family(str(tmp_path / "base")), load_family(str(tmp_path / "refiner"))
    words = make_placeholders(["TOK"], vectors=1, layers=len(base.layout.cross_attention))
    for name, tokenizer in base.tokenizers.items():
        install_tokens(base.modules[name], tokenizer, words, seed=0)
    read: list[str] = []
    encode = refiner.encode_prompts

    def watched(prompts: Sequence[str]) -> Conditioning:
        read.extend(prompts)
        return encode(prompts)

    refiner.encode_prompts = watched  # type: ignore[method-assign]
    settings = generation.SamplerSettings("euler", 3, 1.0, width=16, height=16, refiner_start=0.5)
    region = parse_region("0,0,8,16: a TOK", 16, 16)
    generation.generate_images(
        base, ["TOK b"], [5], settings, refiner=refiner, regions=[region], placeholders=words
    )
    assert read == ["TOK b", "a TOK"]


@pytest.mark.parametrize("family_name, strength", [("sdxl", 1.0), ("flux", 1.0), ("flux", 0.5)])
def test_other_families_paint_in_an_image_and_keep_the_latents_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family_name: str, strength: float
) -> None:
    pixels, mask = painting()
    pipe: Any
    if family_name == "flux":
        pipe = FluxInpaintPipeline(**tiny_flux.save(tmp_path).components)
        settings = generation.SamplerSettings("flow_euler", 4, 3.5)
    else:
        pipe = StableDiffusionXLInpaintPipeline(**tiny_sdxl.save(tmp_path).components)
        settings = generation.SamplerSettings("euler", 4, 2.0)
    settings = replace(settings, width=32, height=32, strength=strength)
    pipe.set_progress_bar_config(disable=True)
    use_posterior_mean(pipe)
    theirs = pipe(
        "cat", image=pixels, mask_image=mask, height=32, width=32,
        num_inference_steps=4, guidance_scale=settings.guidance, strength=strength,
        output_type="pt", generator=torch.Generator().manual_seed(5),
    ).images * 2 - 1  # fmt: skip
    family = load_family(str(tmp_path))
    decoded: list[torch.Tensor] = []
    decode = family.decode

    def watched(latents: torch.Tensor) -> torch.Tensor:
        decoded.append(latents)
        return decode(latents)

    monkeypatch.setattr(family, "decode", watched)
    ours = generation.generate_images(family, ["cat"], [5], settings, init=pixels, mask=mask)
    assert (ours - theirs).abs().max() < ROUNDING
    known = family.encode_images(pixels)[0]
    outside = generation.latent_mask(mask, known) == 0
    assert torch.equal(decoded[0] * outside, known * outside)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_every_call_sees_the_image_outside_the_hole(
    model: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the level of the call, with the start noise; only the first call sees noise alone."""
    family = load_family(str(model))
    seen: list[tuple[torch.Tensor, Any]] = []
    denoise = family.denoise

    def watched(x: torch.Tensor, level: Any, *rest: Any) -> torch.Tensor:
        seen.append((x, level))
        return denoise(x, level, *rest)

    monkeypatch.setattr(family, "denoise", watched)
    side = family.resolution
    pixels, mask = torch.rand(1, 3, side, side) * 2 - 1, torch.zeros(1, 1, side, side)
    mask[..., : side // 2] = 1
    settings = generation.SamplerSettings(sampler, 5, 1.0)
    generation.generate_images(family, ["a"], [3], settings, init=pixels, mask=mask)
    x0, _ = family.encode_images(pixels)
    eps = start_noise([3], tuple(x0.shape[1:]))
    outside = (generation.latent_mask(mask, x0) == 0).expand_as(x0)
    assert torch.equal(seen[0][0], eps) and len(seen) == 5
    for x, level in seen[1:]:
        known = level.alpha * x0 + level.sigma * eps
        torch.testing.assert_close(x[outside], known[outside])
        assert not torch.allclose(x[~outside], known[~outside], atol=0.1)


def test_a_mask_without_an_image_is_refused(model: Path) -> None:
    family = load_family(str(model))
    settings = generation.SamplerSettings(steps=1, guidance=1.0)
    mask = torch.ones(1, 1, family.resolution, family.resolution)
    with pytest.raises(UserError, match=r"masks .* need an image to start from \(--init-image\)"):
        generation.generate_images(family, ["a"], [3], settings, mask=mask)


@pytest.mark.parametrize("channels", [4, 9])
def test_a_mask_that_the_latents_lose_is_refused(tmp_path: Path, channels: int) -> None:
    save_sd_pipeline(tmp_path, channels=channels)
    pixels, mask = painting()
    mask.zero_()
    mask[..., 5, 5] = 1  # of latents of 4 x 4 pixels, the nearest to their corner is taken
    settings = generation.SamplerSettings(steps=1, guidance=1.0, width=32, height=32)
    family = load_family(str(tmp_path))
    with pytest.raises(UserError, match=r"nothing is left of the mask .* 4 x 4 pixels each; paint"):
        generation.generate_images(family, ["a"], [3], settings, init=pixels, mask=mask)
