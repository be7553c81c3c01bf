"""Stable Diffusion 3 and 3.5 against diffusers' pipeline: prompts, calls, whole images, files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from diffusers.training_utils import compute_loss_weighting_for_sd3
from PIL import Image
from safetensors.torch import load_file

import infer
import lora_core
import train
from lora_core import formats, tokens
from lora_core.adapters import targets
from lora_core.config import (
    AdapterConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    SamplesConfig,
    Stage,
    TokensConfig,
    ValidationConfig,
)
from lora_core.diffusion import noise
from lora_core.diffusion.generation import generate_images
from lora_core.errors import UserError
from lora_core.family import LoadOptions
from lora_core.image_options import Infer
from lora_core.placeholders import make_placeholders
from lora_core.settings import SamplerSettings
from models import load_family, read_layout, sd3
from models.placement import named_blocks
from models.published_layouts import published_layout
from models.skip_layers import choose_skip_layers
from tests import tiny_sd3
from tests.flow_objective import mean_loss
from tests.image_examples import levels_between

PROMPTS = ["a red cat", "dog"]
SIZE = {"height": 16, "width": 24}
T5_ONLY = LoadOptions(max_sequence_length=20)  # tokens of T5, whose pipeline has 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "model"
    tiny_sd3.save(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder: Path) -> StableDiffusion3Pipeline:
    return tiny_sd3.pipeline()


@pytest.fixture
def family(folder: Path) -> sd3.StableDiffusion3:
    return load_family(str(folder), T5_ONLY)


def start_latents(seeds: list[int]) -> torch.Tensor:
    rows = [torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.cat(rows)


def draw_by_pipeline(pipe, seeds: list[int], **options) -> torch.Tensor:
    """Pixels in [-1, 1] from the start noise of our images with these seeds."""
    images = pipe(
        PROMPTS,
        negative_prompt=["blue"] * len(PROMPTS),
        latents=start_latents(seeds),
        max_sequence_length=20,
        output_type="pt",
        **SIZE,
        **options,
    ).images
    return images * 2 - 1


# ---------------------------------------------------------------- prompts


def test_prompts_are_encoded_as_by_the_pipeline(family, pipe) -> None:
    with torch.no_grad():
        ours = family.encode_prompts([*PROMPTS, ""])
        embeds, _, pooled, _ = pipe.encode_prompt(
            [*PROMPTS, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=20
        )
    assert torch.allclose(ours.prompt_embeds, embeds, atol=2e-6)
    assert torch.equal(ours.extra["pooled_prompt_embeds"], pooled)


def test_clip_skip_is_the_pipelines(folder, pipe) -> None:
    family = load_family(str(folder), replace(T5_ONLY, clip_skip=1))
    with torch.no_grad():
        embeds, _, _, _ = pipe.encode_prompt(
            PROMPTS, None, None, False, clip_skip=1, max_sequence_length=20
        )
        ours = family.encode_prompts(PROMPTS).prompt_embeds
    assert torch.allclose(ours, embeds, atol=2e-6)


def test_without_t5_there_are_the_pipelines_zeros(tmp_path) -> None:
    pipe = tiny_sd3.save(tmp_path / "m", missing=("text_encoder_3",))
    family = load_family(str(tmp_path / "m"), T5_ONLY)
    embeds, _, _, _ = pipe.encode_prompt(PROMPTS, None, None, False, max_sequence_length=20)
    assert torch.equal(family.encode_prompts(PROMPTS).prompt_embeds, embeds)
    s = SamplerSettings("flow_euler", 2, 4.0, "blue", **SIZE)
    theirs = draw_by_pipeline(pipe, [3, 4], num_inference_steps=2, guidance_scale=4.0)
    assert (generate_images(family, PROMPTS, [3, 4], s) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    "missing, zeros",
    [
        (["text_encoder"], [slice(0, 16)]),
        (["text_encoder_2"], [slice(16, 40)]),
        (["text_encoder", "text_encoder_2"], [slice(0, 40)]),
        (["text_encoder", "text_encoder_3"], [slice(0, 16)]),
    ],
)
def test_a_missing_encoder_leaves_zeros_in_its_place(folder, family, tmp_path, missing, zeros):
    """16 and 24 channels of CLIP-L and CLIP-G, in the first 16 tokens; T5 has the other 20."""
    tiny_sd3.save(tmp_path / "m", missing=missing)
    ours = load_family(str(tmp_path / "m"), T5_ONLY).encode_prompts(PROMPTS)
    whole = family.encode_prompts(PROMPTS)
    embeds, pooled = whole.prompt_embeds.clone(), whole.extra["pooled_prompt_embeds"].clone()
    own = ours.prompt_embeds
    if len(missing) == 2 and "text_encoder_3" not in missing:  # no CLIP: the length of CLIP's own
        assert own.shape[1] == sd3.CLIP_LENGTH + 20
        own = own[:, sd3.CLIP_LENGTH - 16 :]
    for columns in zeros:
        embeds[:, :16, columns] = 0
        pooled[:, columns] = 0
    if "text_encoder_3" in missing:
        embeds[:, 16:] = 0
    assert torch.equal(own, embeds)
    assert torch.equal(ours.extra["pooled_prompt_embeds"], pooled)


def test_tokens_are_learned_in_all_three_and_pooled_at_the_end_of_text(folder, tmp_path) -> None:
    """A published config has eos_token_id 2, for which transformers pools at the largest id."""
    tiny_sd3.save(tmp_path / "m")
    for name in sd3.CLIPS:
        file = tmp_path / "m" / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 2}))
    family = load_family(str(tmp_path / "m"), T5_ONLY)
    before = family.encode_prompts(["a <s0><s1>"])
    for name, tokenizer in family.tokenizers.items():
        added = make_placeholders(["TOK"], 2)
        tokens.install_tokens(family.modules[name], tokenizer, added, seed=0)
    after = family.encode_prompts(["a <s0><s1>"])
    changed = (before.prompt_embeds - after.prompt_embeds).abs().amax(0)
    for part in (changed[:16, :16], changed[:16, 16:40], changed[16:]):
        assert part.max() > 1e-3
    ids = family.tokenize(["a <s0><s1>"])["text_encoder"]
    out = family.modules["text_encoder"](ids)
    end = ids[0].tolist().index(family.tokenizers["text_encoder"].eos_token_id)
    own = family.modules["text_encoder"].text_projection(out.last_hidden_state[:, end])
    assert torch.equal(after.extra["pooled_prompt_embeds"][:, :16], own)


# ---------------------------------------------------------------- the denoiser and images


@pytest.mark.parametrize("variant", tiny_sd3.VARIANTS)
def test_a_call_and_images_are_the_pipelines(variant, tmp_path) -> None:
    pipe = tiny_sd3.save(tmp_path / "m", variant=variant)
    family = load_family(str(tmp_path / "m"), T5_ONLY)
    assert family.layout.base_model_version == variant
    cond = family.encode_prompts(PROMPTS)
    x, sigma = start_latents([0, 1]), torch.tensor([0.9, 0.25])
    theirs = pipe.transformer(
        x,
        timestep=sigma * 1000,
        encoder_hidden_states=cond.prompt_embeds,
        pooled_projections=cond.extra["pooled_prompt_embeds"],
    ).sample
    ours = family.denoise(x, family.schedule.level(sigma), cond)
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()
    s = SamplerSettings("flow_euler", 4, 5.0, "blue", **SIZE)
    drawn = generate_images(family, PROMPTS, [3, 4], s)
    theirs = draw_by_pipeline(pipe, [3, 4], num_inference_steps=4, guidance_scale=5.0)
    assert (drawn - theirs).abs().max() < 1e-5


def test_its_blocks_are_known_to_compile(family) -> None:
    paths = [f"transformer_blocks.{i}" for i in range(tiny_sd3.BLOCKS)]
    assert list(named_blocks(family.transformer)) == paths


def test_a_dynamic_shift_is_the_pipelines(tmp_path) -> None:
    pipe = tiny_sd3.save(tmp_path / "m", dynamic=True)
    family = load_family(str(tmp_path / "m"), T5_ONLY)
    s = SamplerSettings("flow_euler", 3, 1.0, **SIZE)
    drawn = generate_images(family, PROMPTS, [3, 4], s)
    theirs = draw_by_pipeline(pipe, [3, 4], num_inference_steps=3, guidance_scale=1.0)
    assert (drawn - theirs).abs().max() < 1e-5


def test_image_to_image_is_the_pipelines(family, pipe) -> None:
    other = StableDiffusion3Img2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    init = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(init)[0]
    other.prepare_latents = lambda *_, **__: noise.add_noise(
        latents, start_latents([5]), levels.rows(slice(0, 1))
    )
    steps = torch.tensor(family.schedule_at(8, 12).step_sigmas(8)[4:])
    levels = family.schedule.level(steps)
    theirs = other(
        "cat",
        image=init,
        strength=0.5,
        num_inference_steps=8,
        guidance_scale=2.0,
        max_sequence_length=20,
        output_type="pt",
        **SIZE,
    ).images
    s = SamplerSettings("flow_euler", 8, 2.0, strength=0.5, **SIZE)
    assert (generate_images(family, ["cat"], [5], s, init=init) - (theirs * 2 - 1)).abs().max() < (
        1e-5
    )


def test_skip_layer_guidance_is_the_pipelines(family, pipe) -> None:
    options = {"skip_layers": (1, 2), "skip_layer_scale": 2.0, "skip_layer_stop": 0.6}
    config = Infer(steps=5, guidance=4.0, negative="blue", sampler="flow_euler", **options, **SIZE)
    plain = generate_images(family, PROMPTS, [3, 4], config)
    family.set_skip_layers(choose_skip_layers(family, config))
    ours = generate_images(family, PROMPTS, [3, 4], config)
    theirs = draw_by_pipeline(
        pipe,
        [3, 4],
        num_inference_steps=5,
        guidance_scale=4.0,
        skip_guidance_layers=[1, 2],
        skip_layer_guidance_scale=2.0,
        skip_layer_guidance_stop=0.6,
    )
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - plain).abs().max() > 1e-2


def test_an_image_larger_than_the_position_table_is_refused(family) -> None:
    with pytest.raises(UserError, match="52 x 8 pixels: the position table of this model ends at"):
        family.denoise(torch.zeros(1, 4, 4, 26), family.schedule.level(torch.ones(1)), None)


OBJECTIVES = [  # the script's scheme, its --precondition_outputs, our weighting, its arguments
    ("none", 0, "none", {}),
    ("sigma_sqrt", 0, "sigma_sqrt", {}),
    ("cosmap", 0, "cosmap", {}),
    ("none", 1, "p2", {"k": 0.0}),
    ("sigma_sqrt", 1, "none", {}),
]


@pytest.mark.parametrize("scheme, preconditioned, weighting, arguments", OBJECTIVES)
def test_the_objective_is_the_public_scripts(
    family, pipe, scheme, preconditioned, weighting, arguments
) -> None:
    """train_dreambooth_lora_sd3.py of diffusers: its table of timesteps, weight and target.

    With --precondition_outputs, its default, the squared error of x0 is weighted. A weight of 1 is
    snr / (k + snr), p2, with k = 0; one of 1 / sigma^2 makes it the error of the velocity.
    """
    latents, eps = start_latents([1, 2]), start_latents([3, 4])
    cond = family.encode_prompts(PROMPTS)
    rows = torch.tensor([120, 830])
    table = type(pipe.scheduler).from_config(pipe.scheduler.config)
    sigmas = table.sigmas[rows].view(-1, 1, 1, 1)
    found = pipe.transformer(
        (1 - sigmas) * latents + sigmas * eps,
        timestep=table.timesteps[rows],
        encoder_hidden_states=cond.prompt_embeds,
        pooled_projections=cond.extra["pooled_prompt_embeds"],
    ).sample
    target = eps - latents
    if preconditioned:
        found = found * -sigmas + (1 - sigmas) * latents + sigmas * eps
        target = latents
    weight = compute_loss_weighting_for_sd3(scheme, sigmas)
    theirs = (weight * (found - target) ** 2).reshape(2, -1).mean(1).mean()
    ours = mean_loss(family, latents, eps, cond, rows, weighting, **arguments)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


# ---------------------------------------------------------------- runs and files


@pytest.fixture(scope="module")
def run(folder: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of LoRA on the transformer and both CLIP encoders, tokens in all three encoders."""
    config = Config(
        model=str(folder),
        out=str(tmp_path_factory.mktemp("runs") / "run"),
        device="cpu",
        max_sequence_length=20,
        adapter=AdapterConfig(rank=2, targets=("all-linear",), text_targets=("kohya",)),
        data=DataConfig(images=str(photos), resolution=16),
        tokens=TokensConfig(vectors=1, encoders=("clip_l", "clip_g", "t5")),
        optimizer=OptimizerConfig(lr=dict.fromkeys(("denoiser", "text_encoder", "tokens"), 0.05)),
        stages=(Stage(2, ("denoiser", "text_encoder", "tokens")),),
        samples=SamplesConfig(steps=1, guidance=1.0, prompts=("a TOK",), seeds=1, new_prompts=()),
        validation=ValidationConfig(every=-1),
    )
    return train.train(config)


def test_diffusers_loads_a_run_and_draws_its_image(run, folder, tmp_path, monkeypatch) -> None:
    """By the lines of the run's README.md: its LoRA layers, and tokens in all three encoders."""
    words = ["--model", str(folder), "--lora", str(run), "--prompt", "a TOK", "--steps", "3"]
    words += ["--max-sequence-length", "20", "--out", str(tmp_path / "a.png"), "--device", "cpu"]
    assert infer.main([*words, "--sampler", "flow_euler", "--guidance", "4"]) == 0
    ours = Image.open(tmp_path / "a.png")
    assert levels_between(ours, draw_square(tiny_sd3.pipeline(), "a TOK")) > 1
    card = (run / "README.md").read_text()
    lines, _, call = card.partition("```python\n")[2].partition("image = pipe(")
    assert call.startswith(
        'prompt="a <s0>", num_inference_steps=1, guidance_scale=1.0, max_sequence_len'
    )
    assert "A1111" not in card
    monkeypatch.chdir(run)
    loaded: dict = {}
    exec(lines, loaded)
    assert levels_between(ours, draw_square(loaded["pipe"], "a <s0>")) <= 1
    patched = tiny_sd3.pipeline()
    patch = lora_core.patch(patched, str(run))
    assert levels_between(ours, draw_square(patched, patch.bind("a TOK"))) <= 1


def draw_square(pipe: StableDiffusion3Pipeline, prompt: str) -> Image.Image:
    """The pipeline's image of the size, seed, steps and guidance that infer.py gets."""
    return pipe(
        prompt,
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(0)],
        max_sequence_length=20,
    ).images[0]


def test_a_run_sees_that_lengths_and_left_out_layers_act(config: Config, folder: Path) -> None:
    """T5's last layer is never left out, and its tokens are behind CLIP's: neither is an error."""
    own = replace(config, model=str(folder), clip_skip=1, max_sequence_length=12)
    assert train.train(replace(own, stages=(Stage(1, ("denoiser",)),))).is_dir()


def test_a_run_at_more_than_the_position_table_has_is_refused_at_its_start(
    config: Config, folder: Path
) -> None:
    own = replace(config, model=str(folder), data=replace(config.data, resolution=64))
    with pytest.raises(UserError, match="resolution 64 is more than 48, the largest side"):
        train.train(own)


def test_both_files_of_a_run_have_the_same_layers(run, folder) -> None:
    layout = read_layout(str(folder))
    native = formats.load(run / formats.NATIVE, layout).components
    other = formats.load(run / "run.safetensors", layout).components
    assert set(native) == set(other) == {"transformer", "text_encoder", "text_encoder_2"}
    for name, layers in native.items():
        assert set(layers) == set(other[name])
        for path, layer in layers.items():
            same = other[name][path]
            ours, theirs = (x.scale * x.up @ x.down for x in (layer, same))
            assert torch.allclose(ours, theirs, atol=1e-6)
    keys = set(load_file(run / "run.safetensors"))
    for key in (
        "lora_unet_joint_blocks_0_x_block_attn2_qkv",
        "lora_unet_joint_blocks_2_context_block_adaLN_modulation_1",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
    ):
        assert f"{key}.lora_down.weight" in keys


COUNTS = {  # published model -> preset -> layers
    "sd3": {"attention": 96, "dreambooth": 191, "kohya": 333, "all-linear": 340},
    "sd3.5-medium": {"attention": 148, "dreambooth": 191, "kohya": 385, "all-linear": 392},
    "sd3.5-large": {"attention": 152, "dreambooth": 303, "kohya": 529, "all-linear": 536},
}


@pytest.mark.parametrize("kind", COUNTS)
def test_presets_match_as_many_layers_as_the_peers_do(kind) -> None:
    """dreambooth: 8 layers a block but for the last, whose text has no output."""
    paths = list(published_layout(kind).components["transformer"].shapes)
    presets = sd3.PRESETS["transformer"]
    found = {name: len(targets.select_paths(paths, globs)) for name, globs in presets.items()}
    assert found == COUNTS[kind]


# ---------------------------------------------------------------- refusals


def test_options_without_effect_are_refused(folder) -> None:
    for how, sentence in (
        (LoadOptions(max_token_length=150), "--max-token-length has no effect"),
        (LoadOptions(max_sequence_length=513), "513; expected 1 to 512 tokens"),
        (LoadOptions(clip_skip=3), "--clip-skip is 3; expected 0 to 2"),
        (LoadOptions(scheduler={"prediction_type": "epsilon"}), "prediction_type has no effect"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_family(str(folder), how)


@pytest.mark.parametrize(
    "file, change, sentence",
    [
        ("transformer", {"in_channels": 8}, "takes 8 channels, expected 4"),
        ("transformer", {"pooled_projection_dim": 32}, "expected 40, as text_encoder and text_enc"),
        ("transformer", {"joint_attention_dim": 64}, "expected 48, as text_encoder_3 has it"),
        ("text_encoder", {"projection_dim": 8}, "pooled_projection_dim 40, expected 32"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_weights_are_read(
    folder, tmp_path, file, change, sentence
) -> None:
    shutil.copytree(folder, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    place = tmp_path / "m" / file / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    for read in (load_family, read_layout):
        with pytest.raises(UserError, match=sentence):
            read(str(tmp_path / "m"))


def test_a_vae_of_another_class_is_refused_before_weights_are_read(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLFlux2"}')
    with pytest.raises(UserError, match="AutoencoderKLFlux2, expected AutoencoderKL; take the VAE"):
        load_family(str(tmp_path / "m"), LoadOptions(vae=str(tmp_path)))


def test_a_model_without_text_encoders_is_refused(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    place = tmp_path / "m" / "model_index.json"
    index = json.loads(place.read_text())
    place.write_text(json.dumps(index | {name: [None, None] for name in sd3.TEXTS}))
    with pytest.raises(UserError, match="lists no text encoder; it needs one of text_encoder, "):
        load_family(str(tmp_path / "m"))
