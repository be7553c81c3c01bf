"""models/sdxl.py against diffusers' own pipelines, on tiny random networks; module counts on the
true architecture without weights.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from lora_core import formats, tokens
from lora_core.adapters import injection
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.cross_attention import AttentionMap
from lora_core.diffusion import sampling
from lora_core.diffusion.generation import SamplerSettings, generate_images
from lora_core.errors import UserError
from lora_core.placeholders import Placeholder
from lora_core.tokens import first_eos
from models import Conditioning, LoadOptions, Sizes, load_family, read_layout
from models.sd import unet_presets
from models.sdxl import PRESETS, sdxl_layout, sdxl_schedule
from tests import tiny_sdxl
from tests.tiny_sdxl import save

Tiny = Callable[..., tuple]
SIZES = Sizes([(30, 44), (30, 44)], [(3, 5), (3, 5)], (16, 18))  # nothing square, nothing equal


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """(folder, pipeline, family) of `save`'s settings, made once; for tests that change none of the
    three.
    """

    @cache
    def make(**settings: Any) -> tuple:
        folder = tmp_path_factory.mktemp("model")
        return folder, save(folder, **settings), load_family(str(folder))

    return make


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def picture(seed: int = 0, side: int = 16) -> torch.Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def gap(x: torch.Tensor) -> float:
    """The largest difference of two pictures in levels of 255; the pipelines' rounding makes up to
    4e-4 of one here.
    """
    return x.mul(127.5).abs().max().item()


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


# ---------------------------------------------------------------- one call of the denoiser


def draw(pipe: Any, kind: str, **settings: Any) -> Any:
    """The pipeline's pictures of two prompts with SIZES as what the UNet is told, from start
    pictures where the kind has any.
    """
    given = {
        "text": {},
        "image": {"image": picture(), "strength": 0.5},
        "refiner": {"image": picture(), "strength": 0.5},
    }
    given["inpaint"] = {
        "image": picture(),
        "mask_image": torch.ones(1, 1, 16, 16),
        "strength": 1.0,
        "height": 16,
        "width": 16,
    }
    told = dict(
        original_size=SIZES.original[0],
        crops_coords_top_left=SIZES.crop[0],
        target_size=SIZES.target,
    )
    if kind in ("image", "refiner", "inpaint"):
        told |= {
            "negative_original_size": SIZES.original[0],
            "negative_crops_coords_top_left": SIZES.crop[0],
            "negative_target_size": SIZES.target,
        }
    return pipe(
        ["a cat", "dog"],
        guidance_scale=3.0,
        generator=generators(1, 2),
        output_type="pt",
        **given[kind],
        **told,
        **settings,
    ).images


@pytest.mark.parametrize("scheduler", ["euler", "edm"])
@pytest.mark.parametrize("kind", ["text", "image", "inpaint", "refiner"])
def test_one_denoiser_call_equals_the_pipelines(tiny: Tiny, kind: str, scheduler: str) -> None:
    _, pipe, family = tiny(
        scheduler=scheduler,
        **{"inpaint": {"channels": 9}, "refiner": {"refiner": True}}.get(kind, {}),
    )
    if kind == "image":
        pipe = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    seen = []
    watched = pipe.unet.register_forward_hook(
        lambda _m, args, kwargs, out: seen.append((*args, kwargs, out[0])), with_kwargs=True
    )
    draw(pipe, kind, negative_prompt=["fish", "fish"], num_inference_steps=4)
    watched.remove()
    x, t, told, theirs = seen[1]
    assert family.inpainting == (kind == "inpaint")
    level = family.schedule.level(t.expand(4))
    parts = (family.encode_negative(["fish", "fish"]), family.encode_prompts(["a cat", "dog"]))
    cond = Conditioning.cat([family.add_size_embeddings(part, SIZES, 3.0) for part in parts])
    assert cond.extra.keys() == told["added_cond_kwargs"].keys()
    assert torch.equal(cond.extra["time_ids"], told["added_cond_kwargs"]["time_ids"])
    inpaint = x[:, 4:] if family.inpainting else None
    ours = family.denoise(x[:, :4], level, cond, inpaint)
    assert (ours - theirs).abs().max() < 1e-6 < 1e-3 < theirs.std()
    unlike = Conditioning.cat(
        [family.add_size_embeddings(part, Sizes.uncropped(16, 16, 2), 3.0) for part in parts]
    )
    assert (
        family.denoise(x[:, :4], level, unlike, inpaint) - theirs
    ).abs().max() > 1e-4  # the sizes matter


def test_a_refiner_is_told_what_negative_rows_are(tiny: Tiny) -> None:
    _, _, family = tiny(scheduler="euler", refiner=True)
    assert (
        list(family.tokenizers)
        == ["text_encoder_2"]
        == [name for name in family.modules if name.startswith("text")]
    )
    rows = [
        family.add_size_embeddings(encode(["a cat"] * 2), SIZES, 3.0)
        for encode in (family.encode_negative, family.encode_prompts)
    ]
    assert [cond.extra["time_ids"].tolist() for cond in rows] == [
        [[30, 44, 3, 5, score]] * 2 for score in (2.5, 6.0)
    ]
    mixed = Conditioning.cat(
        [family.encode_negative([""]), family.encode_prompts(["dog"])]
    )  # before the sizes are known, as under caption dropout
    assert family.add_size_embeddings(mixed, SIZES, 3.0).extra["time_ids"][:, 4].tolist() == [
        2.5,
        6.0,
    ]


def test_sizes_keep_their_precision_in_bf16(tiny: Tiny) -> None:
    folder, _, _ = tiny(scheduler="euler")
    family = load_family(str(folder), LoadOptions(torch.bfloat16))
    assert {m.dtype for name, m in family.modules.items() if name != "vae"} == {
        torch.bfloat16
    } and family.vae.dtype == torch.float32
    x, level, seen = torch.randn(1, 4, 8, 8), family.schedule.level(torch.tensor([5.0])), []
    family.unet.add_time_proj.register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].tolist())
    )
    cond = family.add_size_embeddings(
        family.encode_prompts(["a"]), Sizes([(1365, 2049)], [(257, 0)], (1024, 1023)), 1.0
    )
    assert family.denoise(x, level, cond).dtype == torch.float32
    assert seen == [[1365, 2049, 257, 0, 1024, 1023]]
    assert (
        load_family(str(folder), LoadOptions(torch.float32, vae_dtype=torch.bfloat16)).vae.dtype
        == torch.bfloat16
    )
    for module in family.modules.values():
        assert not any(p.requires_grad for p in module.parameters())


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("skip", [0, 1])
def test_prompts_are_encoded_as_the_pipeline_does(tiny: Tiny, skip: int, legacy: bool) -> None:
    folder, pipe, _ = tiny(scheduler="euler", **({"legacy": True} if legacy else {}))
    family, prompts = load_family(str(folder), LoadOptions(clip_skip=skip)), ["a cat", "the dog"]
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, clip_skip=skip or None)
    ours = family.encode_prompts(prompts)
    assert (ours.prompt_embeds - embeds).abs().max() < 1e-6 and (
        ours.extra["text_embeds"] - pooled
    ).abs().max() < 1e-6
    assert ours.prompt_embeds.shape == (2, 16, 40) and ours.extra["text_embeds"].shape == (2, 12)
    with pytest.raises(UserError, match=r"--clip-skip is 2.*0 to 1"):
        load_family(str(folder), LoadOptions(clip_skip=2))


def test_trap_12_pooling_stays_at_the_eos_with_added_tokens(tmp_path: Path) -> None:
    """transformers pools at the largest id where a config says eos_token_id 2: right for plain
    prompts, the placeholder's once there is one.
    """
    save(tmp_path, legacy=True)
    family, prompts = load_family(str(tmp_path)), ["a <s0><s1> b", "<s0><s1>"]
    second, tokenizer = family.modules["text_encoder_2"], family.tokenizers["text_encoder_2"]
    tokens.install_tokens(second, tokenizer, [Placeholder("TOK", ("<s0>", "<s1>"))], seed=0)
    tokens.install_tokens(
        family.modules["text_encoder"],
        family.tokenizers["text_encoder"],
        [Placeholder("TOK", ("<s0>", "<s1>"))],
        seed=0,
    )
    ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    out = second(ids)
    places = {"placeholder": ids.argmax(1), "eos": first_eos(ids, tokenizer.eos_token_id)}
    assert places["placeholder"].tolist() == [3, 2] and places["eos"].tolist() == [5, 3]
    at = {
        name: second.text_projection(out.last_hidden_state[torch.arange(2), place])
        for name, place in places.items()
    }
    ours = family.encode_prompts(prompts).extra["text_embeds"]
    assert torch.allclose(out.text_embeds, at["placeholder"], atol=1e-6)
    assert torch.allclose(ours, at["eos"], atol=1e-6)
    assert (ours - out.text_embeds).abs().max() > 0.1
    plain = tokenizer(["a b"], padding="max_length", return_tensors="pt").input_ids
    assert torch.allclose(
        second(plain).text_embeds, family.encode_prompts(["a b"]).extra["text_embeds"], atol=1e-6
    )


def test_the_empty_negative_prompt_is_zeros_where_the_model_says_so(tmp_path: Path) -> None:
    pipe = save(tmp_path)
    family = load_family(str(tmp_path))
    _, theirs, _, pooled = pipe.encode_prompt(["a"], negative_prompt=None)
    empty = family.encode_negative(["", "fish"])
    assert (
        not theirs.any()
        and not pooled.any()
        and not empty.rows(slice(0, 1)).prompt_embeds.any()
        and not empty.extra["text_embeds"][0].any()
    )
    fish = family.encode_prompts(["fish"])
    assert torch.allclose(empty.prompt_embeds[1:], fish.prompt_embeds, atol=1e-6)
    assert torch.allclose(empty.extra["text_embeds"][1:], fish.extra["text_embeds"], atol=1e-6)
    edit(tmp_path / "model_index.json", force_zeros_for_empty_prompt=False)
    assert torch.equal(
        load_family(str(tmp_path)).encode_negative([""]).prompt_embeds,
        family.encode_prompts([""]).prompt_embeds,
    )
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]  # the pipeline's default is True
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert not load_family(str(tmp_path)).encode_negative([""]).prompt_embeds.any()


# ---------------------------------------------------------------- whole pictures


PICTURES = [
    ("euler", "euler", ""),
    ("euler", "euler", "fish"),
    ("ddim", "ddim", ""),
    ("dpmpp_2m", "dpm", "fish"),
    ("dpmpp_2m", "edm", ""),
    ("dpmpp_2m", "edm", "fish"),
    ("euler", "edm_euler", "fish"),
]


@pytest.mark.parametrize("sampler, scheduler, negative", PICTURES)
def test_pictures_equal_the_pipelines(
    tiny: Tiny, sampler: str, scheduler: str, negative: str
) -> None:
    (_, pipe, family), prompts = tiny(scheduler=scheduler), ["a cat", "dog"]
    settings = dict(num_inference_steps=4, guidance_scale=3.0, output_type="pt")
    theirs = pipe(
        prompts,
        negative_prompt=[negative] * 2 if negative else None,
        generator=generators(3, 4),
        **settings,
    ).images
    assert (family.prediction, family.schedule.kind) == (
        ("edm", "edm") if "edm" in scheduler else ("epsilon", "vp")
    )
    ours = generate_images(family, prompts, [3, 4], SamplerSettings(sampler, 4, 3.0, negative))
    assert gap(ours - (theirs * 2 - 1)) < 0.01
    assert (
        gap(ours - generate_images(family, prompts, [3, 4], SamplerSettings(sampler, 4, 3.0, "no")))
        > 1
    )


@pytest.mark.parametrize("start, negative", [(0.8, ""), (0.4, "fish")])
def test_base_and_refiner_equal_the_pipelines(tiny: Tiny, start: float, negative: str) -> None:
    (_, base, first), (_, refiner, second) = (
        tiny(scheduler="euler"),
        tiny(scheduler="euler", refiner=True),
    )
    given = dict(
        negative_prompt=[negative] * 2 if negative else None,
        num_inference_steps=10,
        guidance_scale=3.0,
    )
    latents = base(
        ["a cat", "dog"],
        denoising_end=start,
        generator=generators(3, 4),
        output_type="latent",
        **given,
    ).images
    theirs = refiner(
        ["a cat", "dog"], image=latents, denoising_start=start, output_type="pt", **given
    ).images
    recipe = SamplerSettings("euler", 10, 3.0, negative, refiner_start=start)
    ours = generate_images(first, ["a cat", "dog"], [3, 4], recipe, refiner=second)
    assert gap(ours - (theirs * 2 - 1)) < 0.01
    assert gap(ours - generate_images(first, ["a cat", "dog"], [3, 4], recipe)) > 1


def test_inpainting_equals_the_pipeline(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pipe, family = tiny(scheduler="euler", channels=9)
    init, mask = picture(), torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 2:10] = 1
    mean = family.encode_images(init * (mask < 0.5))[0] / family.vae.config.scaling_factor
    fixed = type(
        "Posterior", (), {"sample": lambda self, g=None: mean, "mode": lambda self: mean}
    )()
    monkeypatch.setattr(pipe.vae, "encode", lambda x: type("Encoded", (), {"latent_dist": fixed})())
    given = dict(
        image=init,
        mask_image=mask,
        height=16,
        width=16,
        strength=1.0,
        num_inference_steps=5,
        guidance_scale=2.0,
        output_type="pt",
    )
    theirs = pipe("cat", generator=torch.Generator().manual_seed(5), **given).images
    ours = generate_images(
        family, ["cat"], [5], SamplerSettings("euler", 5, 2.0), init=init, mask=mask
    )
    assert gap(ours - (theirs * 2 - 1)) < 0.01


def test_latents_have_the_mean_and_std_of_the_vaes_config(tiny: Tiny, tmp_path: Path) -> None:
    (folder, pipe, family), x = tiny(scheduler="edm"), torch.cat([picture(1), picture(2)])
    mean, std = family.encode_images(x)
    posterior = pipe.vae.encode(x).latent_dist
    shift, spread = (
        torch.tensor(tiny_sdxl.PLAYGROUND[name]).view(1, 4, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    assert torch.allclose(mean, (posterior.mean - shift) * 0.5 / spread, atol=1e-6)
    assert torch.allclose(std, posterior.std * 0.5 / spread, atol=1e-6)
    assert torch.allclose(
        family.decode(mean), pipe.vae.decode(posterior.mean).sample.clamp(-1, 1), atol=1e-5
    )
    assert mean.shape == (2, 4, 8, 8) and family.factor == 2 and family.resolution == 16
    torch.manual_seed(9)
    other = AutoencoderKL.from_config(tiny_sdxl.vae().config)
    other.save_pretrained(tmp_path)
    swapped = load_family(str(folder), LoadOptions(vae=str(tmp_path)))
    assert torch.allclose(
        swapped.encode_images(x)[0], other.encode(x).latent_dist.mean * 0.13025, atol=1e-6
    )


def test_attention_maps_are_the_probabilities_diffusers_computes(tiny: Tiny) -> None:
    _, _, family = tiny(scheduler="euler")
    cond = family.add_size_embeddings(family.encode_prompts(["a", "cat dog"]), SIZES, 1.0)
    x, level, seen = torch.randn(2, 4, 8, 8), family.schedule.level(torch.tensor([10.0, 500.0])), []
    layers = [m for name, m in family.unet.named_modules() if name.endswith("attn2")]

    def note(m, args, kwargs):
        seen.append((m, args[0], kwargs["encoder_hidden_states"]))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    recorded: list[AttentionMap] = []
    family.denoise(x, level, cond, maps=recorded)
    maps = [layer.probabilities for layer in recorded]
    for hook in hooks:
        hook.remove()
    assert len(maps) == len(layers) == len(seen) == 2 * (2 + 1 + 3)
    theirs = {
        m: m.get_attention_scores(m.head_to_batch_dim(m.to_q(h)), m.head_to_batch_dim(m.to_k(e)))
        for m, h, e in seen
    }
    for layer, ours in zip([family.unet.get_submodule(m.name) for m in recorded], maps):
        assert ours.shape == (2, layer.heads, 16, 16) and torch.allclose(
            ours.sum(-1), torch.ones(()), atol=1e-5
        )
        assert torch.allclose(ours.flatten(0, 1), theirs[layer], atol=1e-6)


# ---------------------------------------------------------------- EDM


def test_the_edm_schedule_is_the_schedulers() -> None:
    schedule, prediction = sdxl_schedule({"_class_name": "EDMDPMSolverMultistepScheduler"}, {})
    assert prediction == "edm" and len(schedule) == 1000
    theirs = EDMDPMSolverMultistepScheduler()
    assert torch.allclose(
        schedule.sigmas.flip(0).float(), theirs.sigmas[:-1], rtol=1e-4
    )  # fp32 powers on their side
    assert torch.allclose(schedule.ts.flip(0).float(), theirs.timesteps, atol=2e-5)
    longer = EDMEulerScheduler()  # T + 1 rows between the same ends
    assert (
        torch.allclose(longer.sigmas[[0, 1000]], schedule.sigmas[[999, 0]].float())
        and len(longer.timesteps) == 1001
    )
    for scheduler in (theirs, longer):
        scheduler.set_timesteps(7)
        ours = sampling.sampler_levels("euler", schedule, 7)
        assert torch.allclose(ours.sigma.float(), scheduler.sigmas, rtol=1e-4)
        assert torch.allclose(ours.t[:-1].float(), scheduler.timesteps, atol=2e-5)
    own, _ = sdxl_schedule(
        {
            "_class_name": "EDMEulerScheduler",
            "sigma_min": 0.01,
            "sigma_max": 9.0,
            "rho": 5.0,
            "num_train_timesteps": 50,
        },
        {},
    )
    reference = EDMDPMSolverMultistepScheduler(
        sigma_min=0.01, sigma_max=9.0, rho=5.0, num_train_timesteps=50
    )
    assert torch.allclose(own.sigmas.flip(0).float(), reference.sigmas[:-1], rtol=1e-4)


@pytest.mark.parametrize(
    "key, value",
    [("prediction_type", "v_prediction"), ("sigma_data", 1.0), ("sigma_schedule", "exponential")],
)
def test_other_edm_conventions_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    save(tmp_path, scheduler="edm")
    edit(tmp_path / "scheduler" / "scheduler_config.json", **{key: value})
    with pytest.raises(UserError, match=f"EDMDPM.*{key}.*{value}"):
        load_family(str(tmp_path))


def test_changes_of_the_scheduler_are_used_or_refused(tmp_path: Path) -> None:
    save(tmp_path / "vp")
    save(tmp_path / "edm", scheduler="edm")
    changes = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    family = load_family(str(tmp_path / "vp"), LoadOptions(scheduler=changes))
    assert (family.prediction, family.spacing, family.offset) == (
        "v_prediction",
        "trailing",
        1,
    ) and family.schedule.alphas[-1] == 0
    for key in changes:
        with pytest.raises(UserError, match=f"EDMDPMSolverMultistepScheduler takes no {key}"):
            load_family(str(tmp_path / "edm"), LoadOptions(scheduler={key: changes[key]}))
    assert load_family(
        str(tmp_path / "edm"), LoadOptions(scheduler={"sigma_max": 20.0})
    ).schedule.sigmas[-1].item() == pytest.approx(20)
    edit(
        tmp_path / "vp" / "scheduler" / "scheduler_config.json",
        _class_name="FlowMatchEulerDiscreteScheduler",
    )
    with pytest.raises(UserError, match="FlowMatchEuler"):
        load_family(str(tmp_path / "vp"))


# ---------------------------------------------------------------- bad models


@pytest.mark.parametrize(
    "missing",
    [
        "vae",
        "unet",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
        "model_index.json",
    ],
)
def test_a_missing_part_is_named(tmp_path: Path, missing: str) -> None:
    save(tmp_path / "model")
    (tmp_path / "model" / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=missing):
        load_family(str(tmp_path / "model"))


def test_parts_that_do_not_fit_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    save(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match="cannot load unet/"):
        load_family(str(tmp_path))
    edit(tmp_path / "model_index.json", requires_aesthetics_score=True)
    for opened in (load_family, read_layout):
        with pytest.raises(
            UserError, match=r"projection_class_embeddings_input_dim 60.*expected 52"
        ):
            opened(str(tmp_path))
    edit(tmp_path / "model_index.json", requires_aesthetics_score=False, text_encoder=[None, None])
    with pytest.raises(
        UserError, match="cross_attention_dim 40, expected 24 next to text_encoder_2"
    ):
        load_family(str(tmp_path))
    edit(tmp_path / "model_index.json", text_encoder_2=[None, None])
    with pytest.raises(UserError, match="lists no text_encoder_2"):
        load_family(str(tmp_path))
    with pytest.raises(UserError, match="no T5"):
        load_family(str(tmp_path), LoadOptions(max_sequence_length=77))


# ---------------------------------------------------------------- names


@pytest.fixture(scope="module")
def full() -> tuple:
    return tiny_sdxl.full_size()


def test_presets_match_as_many_modules_as_the_peers_do(full: tuple) -> None:
    unet, first, second = full
    count = {
        name: len(injection.target_paths(unet, globs))
        for name, globs in (unet_presets(unet) | PRESETS["unet"]).items()
    }
    assert {name: count[name] for name in ("attention", "kohya", "cloneofsimo")} == {
        "attention": 560,
        "kohya": 722,
        "cloneofsimo": 630,
    }
    assert (
        count["extended"] == 630 + 3 * 17 + 11 and count["all"] == 722 + 3 * 17 + 11
    )  # 17 resnets, 11 shortcuts
    assert (
        count["all-linear"]
        == sum(isinstance(module, torch.nn.Linear) for module in unet.modules())
        == 743
    )
    for preset, block in (("b-lora-content", 0), ("b-lora-style", 1)):
        found = injection.target_paths(unet, PRESETS["unet"][preset])
        assert len(found) == 80 and all(
            path.startswith(f"up_blocks.0.attentions.{block}.") and ".attn" in path
            for path in found
        )
    for name, encoder, expected in (
        ("text_encoder", first, (48, 72)),
        ("text_encoder_2", second, (128, 192)),
    ):
        assert (
            tuple(
                len(injection.target_paths(encoder, PRESETS[name][preset]))
                for preset in ("attention", "kohya")
            )
            == expected
        )


def test_kohya_names_are_stabilitys(full: tuple) -> None:
    """semantics 4.2: 22 modules in each block of two layers, 102 in each of ten."""
    unet, first, second = full
    shape = sdxl_layout(unet, {"text_encoder": first, "text_encoder_2": second})
    names = shape.components["unet"].names
    assert set(names) == set(shape.components["unet"].modules)
    assert len(set(names.values())) == len(names)
    chosen = [
        "lora_unet_" + names[path].replace(".", "_")
        for path in injection.target_paths(unet, unet_presets(unet)["kohya"])
    ]
    blocks = Counter("_".join(name.split("_")[2 : 5 if "middle" in name else 6]) for name in chosen)
    two, ten = (f"input_blocks_{i}_1" for i in (4, 5)), (f"input_blocks_{i}_1" for i in (7, 8))
    expected = dict.fromkeys([*two, *(f"output_blocks_{i}_1" for i in (3, 4, 5))], 22)
    expected |= dict.fromkeys(
        [*ten, *(f"output_blocks_{i}_1" for i in (0, 1, 2)), "middle_block_1"], 102
    )
    assert blocks == expected and sum(expected.values()) == 722
    for known in (
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0",
        "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2",
        "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q",
    ):  # fmt: skip
        assert known in chosen
    others = {  # what diffusers reads back, block by block
        "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "down_blocks.2.resnets.1.conv2": "input_blocks.8.0.out_layers.3",
        "mid_block.resnets.0.time_emb_proj": "middle_block.0.emb_layers.1",
        "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.2.resnets.2.conv2": "output_blocks.8.0.out_layers.3",
        "conv_in": "input_blocks.0.0", "conv_out": "out.2",
        "add_embedding.linear_1": "label_emb.0.0", "time_embedding.linear_2": "time_embed.2",
    }  # fmt: skip
    assert {path: names[path] for path in others} == others
    assert (shape.base_model_version, shape.architecture) == (
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base/lora",
    )
    assert (
        shape.components["text_encoder"].prefixes[0] == "lora_te1"
        and shape.components["text_encoder_2"].prefixes[0] == "lora_te2"
    )
    assert shape.encoders == {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def test_the_outline_is_the_loaded_models(tiny: Tiny) -> None:
    (base, _, first), (refiner, _, second) = (
        tiny(scheduler="euler"),
        tiny(scheduler="euler", refiner=True),
    )
    assert read_layout(str(base)) == first.layout and read_layout(str(refiner)) == second.layout
    assert (
        list(second.layout.presets) == ["unet", "text_encoder_2"]
        and second.layout.architecture == "stable-diffusion-xl-v1-refiner/lora"
    )


# ---------------------------------------------------------------- files


TEXT_TARGETS = ("*self_attn*proj", "*mlp.fc?")
UNET_TARGETS = (
    "*attn?.to_*",
    "*ff.net*",
    "*proj_in",
    "*proj_out",
    "*resnets*conv*",
    "*time_emb_proj",
    "*samplers*conv",
)


def random_state(family: Any) -> AdapterState:
    """Factors of rank 3 and scale 0.5 for the UNet and both text encoders."""
    noise, components = torch.Generator().manual_seed(1), {}
    for name, globs in (
        ("unet", UNET_TARGETS),
        ("text_encoder", TEXT_TARGETS),
        ("text_encoder_2", TEXT_TARGETS),
    ):
        shapes = family.layout.components[name].shapes
        components[name] = {}
        for path in (
            family.layout.published(name, path)
            for path in injection.target_paths(family.modules[name], globs)
        ):
            down, up = (3, *shapes[path][1:]), (shapes[path][0], 3, *[1] * (len(shapes[path]) - 2))
            components[name][path] = LowRank(
                *(torch.randn(shape, generator=noise) * 0.3 for shape in (down, up)), 0.5, None
            )
    return AdapterState(components)


def outputs(
    unet: torch.nn.Module, first: torch.nn.Module, second: torch.nn.Module
) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(7)
    x, embeds, pooled = (
        torch.randn(shape, generator=noise) for shape in ((2, 4, 8, 8), (2, 5, 40), (2, 12))
    )
    told = {"text_embeds": pooled, "time_ids": torch.tensor([[30.0, 44, 3, 5, 16, 18]] * 2)}
    ids = torch.tensor([[53, 3, 4, 54, 0]])
    with torch.no_grad():
        out = unet(x, torch.tensor([3, 700]), embeds, added_cond_kwargs=told).sample
        return [out, first(ids).last_hidden_state, second(ids).last_hidden_state]


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_diffusers_loads_the_files_to_the_same_outputs(tmp_path: Path, format: str) -> None:
    pipe = save(tmp_path / "model")
    family = load_family(str(tmp_path / "model"))
    base, state = outputs(pipe.unet, pipe.text_encoder, pipe.text_encoder_2), random_state(family)
    formats.save_run(state, tmp_path / "run", layout=family.layout)
    name = formats.NATIVE if format == "diffusers" else "run.safetensors"
    pipe.load_lora_weights(str(tmp_path / "run"), weight_name=name)
    theirs = outputs(pipe.unet, pipe.text_encoder, pipe.text_encoder_2)
    read = formats.load(tmp_path / "run" / name, family.layout)
    assert {c: set(m) for c, m in read.components.items()} == {
        c: set(m) for c, m in state.components.items()
    }
    for component, modules in read.components.items():
        found = {family.layout.module_path(component, path): lr for path, lr in modules.items()}
        injection.load_factors(family.modules[component], found, "ours")
    ours = outputs(*(family.modules[name] for name in ("unet", "text_encoder", "text_encoder_2")))
    for mine, other, before in zip(ours, theirs, base):
        assert (mine - other).abs().max() < 1e-5 and (other - before).abs().max() > 1e-2


def test_a_tiny_pipeline_is_read_back_by_diffusers(tiny: Tiny) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny(scheduler="edm")[0])
    assert (
        isinstance(pipe.scheduler, EDMDPMSolverMultistepScheduler)
        and pipe.tokenizer_2.pad_token == "!"
        and pipe.tokenizer_2.pad_token_id == 0
    )
