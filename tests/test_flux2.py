"""models/flux2.py against diffusers' FLUX.2 pipelines: prompts, latents, one call, images; training
against the public DreamBooth script's formula.
"""

import copy
import itertools
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from diffusers.training_utils import compute_loss_weighting_for_sd3
from PIL import Image
from safetensors.torch import load_file

import infer
import lora_core
import merge
import train
from lora_core import formats
from lora_core.adapters import injection, targets
from lora_core.adapters.adapted_layer import adapted_layers
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.config import (
    AdapterConfig,
    Config,
    DataConfig,
    NoiseConfig,
    OptimizerConfig,
    SamplesConfig,
    Stage,
    ValidationConfig,
)
from lora_core.diffusion.generation import SamplerSettings, generate_images
from lora_core.errors import UserError
from lora_core.settings import AdapterSpec
from models import LoadOptions, Sizes, flow, flux2, load_family, read_layout, read_schedule
from models.published_configs import published_configs
from tests import tiny_flux2
from tests.flow_objective import mean_loss
from tests.image_examples import levels_between

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
    for kind, family in found.items():
        flow.check_guidance(family, "--guidance", 1.0, 5.0)
        if kind != "distilled":
            flow.check_guidance(family, "--guidance", 4.0, 5.0)
    with pytest.raises(UserError, match="--guidance 4 has no effect on this model, which was dist"):
        flow.check_guidance(found["distilled"], "--guidance", 4.0, 5.0)
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


COUNTS = {  # published model -> preset -> layers
    "flux2-klein-base-4b": dict(attention=40, dreambooth=60, kohya=100),
    "flux2-klein-base-9b": dict(attention=56, dreambooth=80, kohya=144),
    "flux2-dev": dict(attention=80, dreambooth=128, kohya=192),
}
ALL_LAYERS = {"flux2-klein-base-4b": 109, "flux2-klein-base-9b": 153, "flux2-dev": 203}
JOINED = {"flux2-klein-base-4b": 80, "flux2-klein-base-9b": 112, "flux2-dev": 160}


@pytest.mark.parametrize("kind", COUNTS)
def test_presets_match_as_many_layers_as_the_peers_do(kind):
    """kohya: the layers of musubi-tuner's networks; the original code joins q, k and v."""
    layout = read_layout(str(published_configs(kind)))
    part = layout.components["transformer"]
    presets = flux2.PRESETS["transformer"]
    found = {name: targets.select_paths(list(part.shapes), presets[name]) for name in presets}
    counts = {name: len(paths) for name, paths in found.items()}
    assert counts == COUNTS[kind] | {"all-linear": ALL_LAYERS[kind]}
    joined = set(itertools.chain.from_iterable(part.fused.values()))
    assert len(set(found["kohya"]) - joined) + len(part.fused) == JOINED[kind]


def test_only_the_transformer_has_a_place_in_files():
    versions = []
    for kind in COUNTS:
        layout = read_layout(str(published_configs(kind)))
        versions.append((layout.base_model_version, layout.architecture))
        assert set(layout.components) == set(layout.presets) == {"transformer"}
        assert not layout.encoders and layout.components["transformer"].prefixes == ("lora_unet",)
    assert versions == [
        ("flux_2_klein_4b", "Flux.2-klein-4b/lora"),
        ("flux_2_klein_9b", "Flux.2-klein-9b/lora"),
        ("flux_2_dev", "Flux.2-dev/lora"),
    ]


def test_layers_that_read_the_same_are_groups(opened):
    """q, k and v of the image and of the text in double blocks; single blocks have one layer."""
    transformer = copy.deepcopy(opened["base"][0].transformer)
    injection.inject(transformer, AdapterSpec(rank=2, targets=("*",)))
    found = {layer.group for layer in adapted_layers(transformer) if layer.group}
    assert len(found) == 4 and {len(group.members) for group in found} == {3}


# ---------------------------------------------------------------- training


def test_the_objective_is_the_public_scripts(opened):
    """train_dreambooth_lora_flux2_klein.py of diffusers: its table of timesteps and its target."""
    family, pipe = opened["base"]
    latents, eps = torch.randn(2, 16, 4, 6), torch.randn(2, 16, 4, 6)
    rows = torch.tensor([100, 900])
    table = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    sigmas = table.sigmas[rows].view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * eps
    ids = Flux2KleinPipeline._prepare_latent_ids(noisy)
    with torch.no_grad():
        embeds, text_ids = pipe.encode_prompt(
            PROMPTS, max_sequence_length=tiny_flux2.LENGTHS["base"]
        )
        out = pipe.transformer(
            hidden_states=Flux2KleinPipeline._pack_latents(noisy),
            timestep=table.timesteps[rows] / 1000, guidance=None, encoder_hidden_states=embeds,
            txt_ids=text_ids, img_ids=ids, return_dict=False,
        )[0]  # fmt: skip
        ours = mean_loss(family, latents, eps, family.encode_prompts(PROMPTS), rows, "none")
    out = Flux2KleinPipeline._unpack_latents_with_ids(out, ids)
    weight = compute_loss_weighting_for_sd3("none", sigmas=sigmas)
    theirs = (weight * (out - (eps - latents)) ** 2).reshape(2, -1).mean(1).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def config_of(folder, photos, out, kind, adapter):
    return Config(
        model=str(folder),
        out=str(out),
        device="cpu",
        max_sequence_length=tiny_flux2.LENGTHS[kind],
        adapter=AdapterConfig(kind=adapter, rank=2, targets=("all-linear",)),
        data=DataConfig(images=str(photos), resolution=16),
        optimizer=OptimizerConfig(lr={"denoiser": 0.02}),
        stages=(Stage(2, ("denoiser",)),),
        samples=SamplesConfig(steps=1, guidance=1.0, prompts=("a TOK",), seeds=1, new_prompts=()),
        validation=ValidationConfig(every=-1),
    )


@pytest.fixture(
    scope="module", params=[("base", "lora"), ("dev", "dora")], ids=["klein-lora", "dev-dora"]
)
def run(folders, photos, tmp_path_factory, request):
    """(kind, folder of a run): two steps on all layers of the transformer."""
    kind, adapter = request.param
    out = tmp_path_factory.mktemp("runs") / "run"
    return kind, train.train(config_of(folders[kind][0], photos, out, kind, adapter))


def drawn(path, *words):
    """The pixels of infer.py's image."""
    assert infer.main([*words, "--out", str(path), "--device", "cpu"]) == 0
    return Image.open(path)


def test_diffusers_loads_a_run_and_draws_its_image(run, folders, tmp_path):
    kind, folder = run
    words = ["--model", folders[kind][0], "--lora", str(folder), "--prompt", "a cat"]
    words += ["--max-sequence-length", str(tiny_flux2.LENGTHS[kind]), "--steps", "3"]
    words += ["--sampler", "flow_euler", "--guidance", "4"]
    ours = drawn(tmp_path / "a.png", *words)
    pipe = tiny_flux2.pipeline(kind)
    assert levels_between(ours, draw_square(pipe, kind)) > 1
    pipe.load_lora_weights(str(folder))
    assert levels_between(ours, draw_square(pipe, kind)) <= 1
    patched = tiny_flux2.pipeline(kind)
    lora_core.patch(patched, str(folder))
    assert levels_between(ours, draw_square(patched, kind)) <= 1


def test_the_lines_of_a_runs_card_draw_an_image(run, monkeypatch, tmp_path):
    """The first argument of these pipelines is an image."""
    _, folder = run
    card = (folder / "README.md").read_text()
    lines = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder)
    exec(lines.replace('"image.png"', repr(str(tmp_path / "image.png"))), {})
    assert (tmp_path / "image.png").is_file() and "## A1111" not in card


def draw_square(pipe, kind):
    """The pipeline's image of the size, seed, steps and guidance that infer.py gets."""
    return pipe(
        prompt="a cat",
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(0)],
        max_sequence_length=tiny_flux2.LENGTHS[kind],
    ).images[0]


def test_both_files_of_a_run_have_the_same_layers(run, folders):
    kind, folder = run
    layout = read_layout(folders[kind][0])
    native = formats.load(folder / formats.NATIVE, layout).components
    other = formats.load(folder / "run.safetensors", layout).components
    assert set(native) == set(other) == {"transformer"}
    paths = layout.components["transformer"].shapes
    assert set(native["transformer"]) == set(other["transformer"]) == set(paths)
    keys = set(load_file(folder / "run.safetensors"))
    if kind == "base":  # DoRA's norms are of each layer alone
        assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in keys
    assert "lora_unet_single_blocks_1_linear1.lora_down.weight" in keys
    assert "lora_unet_single_stream_modulation_lin.lora_down.weight" in keys


def test_diffusers_converts_the_original_names_to_the_same_layers(opened, tmp_path):
    """Those of the blocks, which files of other trainers have."""
    family, _ = opened["base"]
    shapes = family.layout.components["transformer"].shapes
    paths = targets.select_paths(list(shapes), flux2.PRESETS["transformer"]["kohya"])
    factors = {}
    for number, path in enumerate(paths):
        rows, columns = shapes[path]
        scale = 0.5 * (1 + number % 3)
        factors[path] = LowRank(torch.randn(2, columns), torch.randn(rows, 2), scale)
    state = AdapterState({"transformer": factors})
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=family.layout)
    found = Flux2KleinPipeline.lora_state_dict(load_file(tmp_path / "a.safetensors"))
    assert len(found) == 2 * len(factors)
    for path, layer in factors.items():
        down, up = (found[f"transformer.{path}.lora_{side}.weight"] for side in "AB")
        assert torch.allclose(up @ down, layer.scale * layer.up @ layer.down, atol=1e-5)


def test_a_run_is_folded_into_a_whole_model(run, folders, tmp_path):
    kind, folder = run
    words = ["--prompt", "a cat", "--steps", "2", "--guidance", "1", "--sampler", "flow_euler"]
    words += ["--max-sequence-length", str(tiny_flux2.LENGTHS[kind])]
    out = str(tmp_path / "whole")
    assert merge.main(["fold", folders[kind][0], str(folder), "--out", out]) == 0
    whole = drawn(tmp_path / "a.png", "--model", out, *words)
    model = folders[kind][0]
    ours = drawn(tmp_path / "b.png", "--model", model, "--lora", str(folder), *words)
    assert levels_between(whole, ours) <= 1


# ---------------------------------------------------------------- text that does not train


def test_captions_are_encoded_once(folders, photos, tmp_path, monkeypatch):
    encoded = []
    tokenize = flux2.Flux2.tokenize

    def note_prompts(self, prompts):
        encoded.extend(prompts)
        return tokenize(self, prompts)

    monkeypatch.setattr(flux2.Flux2, "tokenize", note_prompts)
    config = config_of(folders["base"][0], photos, tmp_path / "run", "base", "lora")
    train.train(replace(config, stages=(Stage(3, ("denoiser",)),)))
    assert encoded.count("a photo of TOK") == 1


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            dict(stages=(Stage(2, ("denoiser", "tokens")),)),
            "no text encoder of the family flux2 learns tokens",
        ),
        (
            dict(stages=(Stage(2, ("denoiser", "text_encoder")),)),
            "no text encoder of the family flux2 takes adapters",
        ),
        (dict(loss="attention"), "attention reads the attention on words of a caption"),
        (dict(clip_skip=1), "--clip-skip 1 is for"),
        (dict(max_token_length=150), "--max-token-length has no effect"),
        (dict(samples=SamplesConfig(guidance=4.0)), "--samples.guidance 4 has no effect"),
        (dict(noise=NoiseConfig(guidance=2.0)), "--noise.guidance has no effect on this model"),
    ],
)
def test_what_a_text_encoder_cannot_learn_is_refused(folders, photos, tmp_path, change, expected):
    config = config_of(folders["distilled"][0], photos, tmp_path / "run", "distilled", "lora")
    with pytest.raises(UserError, match=expected):
        train.train(replace(config, **change))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "file, change, expected",
    [
        ("transformer", {"in_channels": 32}, "has in_channels 32, expected 16, as vae"),
        (
            "transformer",
            {"joint_attention_dim": 32},
            "joint_attention_dim 32, expected 24, as text_encoder",
        ),
        ("text_encoder", {"model_type": "qwen2"}, "is of type qwen2, expected qwen3"),
        ("text_encoder", {"num_hidden_layers": 20}, "has 20 layers"),
        (
            "vae",
            {"_class_name": "AutoencoderKL"},
            "is of the class AutoencoderKL, expected AutoencoderKLFlux2; take the VAE of this",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_weights_are_read(
    tmp_path, folders, file, change, expected
):
    folder = tmp_path / "model"
    shutil.copytree(folders["base"][0], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = folder / file / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=expected):
        load_family(str(folder))


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


def test_a_grid_over_guidance_that_a_distilled_model_ignores_is_refused(folders, tmp_path, capsys):
    words = ["--model", folders["distilled"][0], "--prompt", "x", "--device", "cpu"]
    words += ["--grid", "guidance=1,3", "--out", str(tmp_path / "a.png")]
    assert infer.main(words) == 2
    assert "--grid guidance 3 has no effect on this model" in capsys.readouterr().err


def test_a_setting_of_a_run_that_the_model_lacks_is_named_as_that(folders):
    with pytest.raises(UserError) as caught, infer._settings_named({"clip_skip": 1}):
        load_family(folders["base"][0], LoadOptions(clip_skip=1))
    assert str(caught.value).endswith("is no CLIP; the LoRA's run has this setting, so it was "
                                      "trained on another kind of model")  # fmt: skip
    with pytest.raises(UserError, match="leave it out"), infer._settings_named({}):
        load_family(folders["base"][0], LoadOptions(clip_skip=1))


def test_devs_conversation_begins_with_the_published_text():
    assert flux2.SYSTEM_MESSAGE == SYSTEM_MESSAGE
