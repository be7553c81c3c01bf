"""models/flux2.py against diffusers' FLUX.2 pipelines: prompts, latents, one call, images; training
against the public DreamBooth script's formula.
"""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.training_utils import compute_loss_weighting_for_sd3

from lora_core.adapters import injection
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.diffusion import noise
from lora_core.diffusion.generation import SamplerSettings, generate_images
from lora_core.errors import UserError
from lora_core.formats import joined_layers
from models import LoadOptions, Sizes, flow, flux2, load_family, read_layout, read_schedule
from tests import tiny_flux2

KINDS = ("base", "distilled", "dev")
PROMPTS = ["a cat", "dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> (folder, pipeline)"""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = (str(folder), tiny_flux2.save(folder, kind))
    return found


@pytest.fixture(scope="module")
def opened(folders):
    """kind -> (family, pipeline)"""
    found = {}
    for kind, (path, pipe) in folders.items():
        options = LoadOptions(max_sequence_length=tiny_flux2.LENGTHS[kind])
        found[kind] = (load_family(path, options), pipe)
    return found


@pytest.fixture(params=KINDS)
def each(opened, request):
    """(kind, family, pipeline)"""
    return request.param, *opened[request.param]


def conditioning(family, guidance=3.5):
    cond = family.encode_prompts(PROMPTS)
    return family.add_size_embeddings(cond, Sizes.uncropped(16, 24, len(PROMPTS)), guidance)


# ---------------------------------------------------------------- prompts, latents, one call


def test_prompts_are_encoded_as_by_the_pipeline(each):
    kind, family, pipe = each
    prompts = ["a cat", "", "the quick fox"]
    with torch.no_grad():
        embeds, text_ids = pipe.encode_prompt(prompts, max_sequence_length=tiny_flux2.LENGTHS[kind])
        ours = family.encode_prompts(prompts)
    assert torch.equal(ours.prompt_embeds, embeds) and not ours.extra
    length = tiny_flux2.LENGTHS[kind]
    assert torch.equal(flux2.position_ids(1, 1, 1, length), text_ids[0])
    assert (embeds[0] - embeds[2]).abs().max() > 0.1


def test_latents_are_patched_and_normalised(opened):
    family, pipe = opened["base"]
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        mean, std = family.encode_images(x)
        theirs = pipe._encode_vae_image(x, None)
        plain = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        assert torch.allclose(family.decode(mean), plain, atol=1e-5)
    assert torch.allclose(mean, theirs, atol=1e-6) and not std.any()
    assert mean.shape == (2, 16, 4, 6)
    sizes = (family.latent_channels, family.factor, family.multiple, family.resolution)
    assert sizes == (16, 4, 4, 32)


def test_a_call_of_the_denoiser_is_the_pipelines(each):
    kind, family, pipe = each
    x, sigma = torch.randn(2, 16, 4, 6), torch.tensor([0.9, 0.25])
    level = family.schedule.level(sigma)
    ids = Flux2KleinPipeline._prepare_latent_ids(x)
    assert torch.equal(flux2.position_ids(1, 4, 6, 1), ids[0])
    cond = conditioning(family)
    given = [Flux2KleinPipeline._pack_latents(x), cond.prompt_embeds, sigma, ids]
    given.append(Flux2KleinPipeline._prepare_text_ids(cond.prompt_embeds))
    given.append(torch.full([2], 3.5) if kind == "dev" else None)
    exact = [None if values is None else values.double() for values in given]
    with torch.no_grad():
        ours = family.denoise(x, level, cond)
        reference = copy.deepcopy(pipe.transformer).double()(*exact).sample
        reference = Flux2KleinPipeline._unpack_latents_with_ids(reference, ids)
        theirs = Flux2KleinPipeline._unpack_latents_with_ids(pipe.transformer(*given).sample, ids)
        other = family.denoise(x, level, conditioning(family, 1.0))
        swapped = family.denoise(x, family.schedule.level(sigma.flip(0)), cond)
    error = (theirs - reference).norm()
    assert (ours - reference).norm() <= 2 * error < 1e-5 * reference.norm()
    assert torch.equal(ours, other) == (kind != "dev")
    assert (ours - swapped).abs().max() > 1e-3
    with pytest.raises(UserError, match="takes no mask"):
        family.denoise(x, level, cond, torch.zeros(2, 17, 4, 6))


# ---------------------------------------------------------------- images


def test_images_equal_the_pipelines(each):
    kind, family, pipe = each
    for (height, width), steps in (((16, 24), 4), ((48, 32), 7)):
        theirs = pipe(
            prompt=PROMPTS, height=height, width=width, num_inference_steps=steps,
            guidance_scale=3.0, generator=[torch.Generator().manual_seed(s) for s in (3, 4)],
            max_sequence_length=tiny_flux2.LENGTHS[kind], output_type="pt",
        ).images  # fmt: skip
        settings = SamplerSettings("flow_euler", steps, 3.0, width=width, height=height)
        ours = generate_images(family, PROMPTS, [3, 4], settings)
        assert (ours / 2 + 0.5 - theirs).abs().max() < 2e-6  # at most 6e-7
    swapped = generate_images(family, PROMPTS[::-1], [3, 4], settings)
    assert (ours - swapped).abs().max() > 5e-4


def test_distilled_models_have_their_own_steps_and_no_second_call(opened):
    found = {kind: opened[kind][0] for kind in KINDS}
    steps = {kind: family.own_steps for kind, family in found.items()}
    assert steps == {"base": 0, "distilled": 4, "dev": 0}
    needs_no_second_call = {kind: family.distilled_guidance for kind, family in found.items()}
    assert needs_no_second_call == {"base": False, "distilled": True, "dev": True}
    assert not conditioning(found["distilled"]).extra
    assert conditioning(found["dev"]).extra["guidance"].tolist() == [3.5, 3.5]


@pytest.mark.parametrize("tokens, steps", [(64, 4), (4096, 50), (4300, 7), (4301, 7), (9216, 50)])
def test_steps_are_shifted_as_by_the_pipeline(tokens, steps):
    mu = math.exp(compute_empirical_mu(tokens, steps))
    expected = [mu / (mu + steps / i - 1) for i in range(steps, 0, -1)]
    assert flow.empirical_steps(tokens, steps) == pytest.approx(expected, rel=1e-12)


def test_the_schedule_of_training_is_not_shifted_unless_asked(folders, opened):
    family, pipe = opened["base"]
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.allclose(family.schedule.sigmas.flip(0).float(), scheduler.sigmas)
    assert family.schedule.shift == 1 and family.schedule.step_sigmas is None
    assert family.schedule_at(16, 16).shift == pytest.approx(math.exp(0.5))
    schedule, prediction = read_schedule(folders["base"][0], {}, 64)
    assert (schedule.shift, prediction) == (family.schedule_at(16, 16).shift, "flow")
    changes = {"use_dynamic_shifting": False}
    fixed = load_family(folders["base"][0], LoadOptions(scheduler=changes))
    assert fixed.schedule_at(4, 4).shift == 3 and fixed.schedule_at(4, 4).step_sigmas is None


# ---------------------------------------------------------------- names


@pytest.fixture(scope="module")
def full():
    """The published transformers on the meta device."""
    sizes = {
        "klein 4B": dict(num_layers=5, num_single_layers=20, num_attention_heads=24),
        "klein 9B": dict(num_layers=8, num_single_layers=24, num_attention_heads=32),
        "dev": dict(num_layers=8, num_single_layers=48, num_attention_heads=48),
    }
    with torch.device("meta"):
        return {
            name: Flux2Transformer2DModel(**size, guidance_embeds=name == "dev")
            for name, size in sizes.items()
        }


def test_presets_match_as_many_modules_as_the_peers_do(full):
    counts = {preset: [] for preset in flux2.PRESETS["transformer"]}
    original = []
    for transformer in full.values():
        layout = flux2.flux2_layout(transformer)
        for preset, globs in flux2.PRESETS["transformer"].items():
            counts[preset].append(len(injection.target_paths(transformer, globs)))
        paths = injection.target_paths(transformer, flux2.PRESETS["transformer"]["kohya"])
        factors = {path: zero_factors(layout, path) for path in paths}
        joined = joined_layers.join_layers(AdapterState({"transformer": factors}), layout)
        original.append(len(joined.components["transformer"]))
    assert counts == {
        "attention": [40, 56, 80],
        "dreambooth": [60, 80, 128],
        "fal": [80, 120, 144],
        "kohya": [100, 144, 192],
        "all-linear": [109, 153, 203],
    }
    assert original == [80, 112, 160]


def zero_factors(layout, path):
    rows = layout.components["transformer"].shapes[path][0]
    return LowRank(torch.zeros(1, 1), torch.zeros(rows, 1), 1.0)


def test_only_the_transformer_has_a_place_in_files(full, folders):
    versions = {}
    for name, transformer in full.items():
        layout = flux2.flux2_layout(transformer)
        versions[name] = (layout.base_model_version, layout.architecture)
        assert set(layout.components) == set(layout.presets) == {"transformer"}
        assert not layout.encoders and layout.components["transformer"].prefixes == ("lora_unet",)
    assert versions == {
        "klein 4B": ("flux_2_klein_4b", "Flux.2-klein-4b/lora"),
        "klein 9B": ("flux_2_klein_9b", "Flux.2-klein-9b/lora"),
        "dev": ("flux_2_dev", "Flux.2-dev/lora"),
    }
    assert read_layout(folders["dev"][0]).family == "flux2"


# ---------------------------------------------------------------- training


def test_the_objective_is_the_public_scripts(opened):
    """The DreamBooth script's formula, with its own functions, for the same latents and noise."""
    family, pipe = opened["base"]
    latents, eps = torch.randn(2, 16, 4, 6), torch.randn(2, 16, 4, 6)
    indices = torch.tensor([100, 900])
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    timesteps = scheduler.timesteps[indices]
    sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * eps
    ids = Flux2KleinPipeline._prepare_latent_ids(noisy)
    with torch.no_grad():
        embeds, text_ids = pipe.encode_prompt(
            PROMPTS, max_sequence_length=tiny_flux2.LENGTHS["base"]
        )
        out = pipe.transformer(
            hidden_states=Flux2KleinPipeline._pack_latents(noisy), timestep=timesteps / 1000,
            guidance=None, encoder_hidden_states=embeds, txt_ids=text_ids, img_ids=ids,
            return_dict=False,
        )[0]  # fmt: skip
        out = Flux2KleinPipeline._unpack_latents_with_ids(out, ids)
        weights = compute_loss_weighting_for_sd3("none", sigmas=sigmas)
        theirs = (weights * (out - (eps - latents)) ** 2).reshape(2, -1).mean(1).mean()
        level = noise.levels_at_quantiles(family.schedule, (999.5 - indices.double()) / 1000)
        velocity = family.denoise(
            noise.add_noise(latents, eps, level), level, family.encode_prompts(PROMPTS)
        )
        ours = (velocity - (eps - latents)).square().mean()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "file, change, expected",
    [
        ("transformer", {"in_channels": 32}, "has in_channels 32, and vae gives 16"),
        ("transformer", {"joint_attention_dim": 32}, "joint_attention_dim 32, .* gives 24"),
        ("text_encoder", {"model_type": "qwen2"}, "is of type qwen2, expected qwen3"),
        ("text_encoder", {"num_hidden_layers": 20}, "has 20 layers"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_weights_are_read(
    tmp_path, folders, file, change, expected
):
    path, _ = folders["base"]
    for name in ("model_index.json", "scheduler", "transformer", "text_encoder", "vae"):
        copy_configs(path, tmp_path, name)
    config = tmp_path / file / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=expected):
        load_family(str(tmp_path))


def copy_configs(path, folder, name):
    """Copies the JSON files of one part of a model."""
    for source in [Path(path) / name, *(Path(path) / name).glob("*config.json")]:
        if source.is_file():
            target = folder / source.relative_to(path)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())


def test_settings_without_effect_are_refused(folders):
    path = folders["base"][0]
    for how, expected in (
        (LoadOptions(clip_skip=1), "--clip-skip has no effect"),
        (LoadOptions(max_token_length=150), "--max-token-length has no effect"),
        (LoadOptions(max_sequence_length=513), "513; expected 1 to 512 tokens"),
        (LoadOptions(scheduler={"prediction_type": "epsilon"}), "prediction_type has no effect"),
    ):
        with pytest.raises(UserError, match=expected):
            load_family(path, how)
