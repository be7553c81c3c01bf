"""Stable Diffusion against diffusers' own pipelines, on tiny random networks.

Module counts are those of the true architectures, without weights.
"""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from lora_core.adapters import injection
from lora_core.cross_attention import AttentionMap
from lora_core.diffusion.generation import SamplerSettings, generate_images
from lora_core.errors import UserError
from lora_core.formats.layout import layout_of
from models import LoadOptions, load_family
from models.sd import PRESETS, unet_presets
from tests.tiny_pipeline import save_sd_pipeline


def levels(x: torch.Tensor) -> int:
    return int(x.mul(127.5).round().abs().max())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "sampler, scheduler",
    [
        ("ddim", DDIMScheduler),
        ("euler", EulerDiscreteScheduler),
        ("dpmpp_2m", DPMSolverMultistepScheduler),
    ],
)
def test_pictures_equal_the_pipelines(
    tmp_path: Path, prediction: str, sampler: str, scheduler: type
) -> None:
    pipe, prompts = save_sd_pipeline(tmp_path, prediction=prediction), ["a cat", "dog"]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    theirs = pipe(
        prompts,
        negative_prompt=["fish"] * 2,
        num_inference_steps=6,
        guidance_scale=3.0,
        generator=generators,
        output_type="pt",
    ).images
    family = load_family(str(tmp_path))
    ours = generate_images(family, prompts, [3, 4], SamplerSettings(sampler, 6, 3.0, "fish"))
    assert levels(ours - (theirs * 2 - 1)) <= 1
    assert (
        levels(
            ours
            - generate_images(
                family, ["dog", "a cat"], [3, 4], SamplerSettings(sampler, 6, 3.0, "fish")
            )
        )
        > 1
    )


def test_image_to_image_equals_the_pipeline(tmp_path: Path) -> None:
    pipe = StableDiffusionImg2ImgPipeline(
        **save_sd_pipeline(tmp_path).components, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    family = load_family(str(tmp_path))
    init = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = family.encode_images(init)[0] / family.vae.config.scaling_factor
    pipe.vae.encode = lambda x: type(
        "Out",
        (),
        {
            "latent_dist": type(
                "Dist", (), {"sample": lambda self, g=None: mean, "mode": lambda self: mean}
            )()
        },
    )()
    theirs = pipe(
        "cat",
        image=init,
        strength=0.5,
        num_inference_steps=10,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    )
    ours = generate_images(
        family, ["cat"], [5], SamplerSettings("ddim", 10, 2.0, strength=0.5), init=init
    )
    assert levels(ours - (theirs.images * 2 - 1)) <= 1


def test_inpainting_equals_the_pipeline(tmp_path: Path) -> None:
    pipe = save_sd_pipeline(tmp_path, channels=9)
    family = load_family(str(tmp_path))
    assert family.inpainting
    init = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 4:20] = 1
    mean = family.encode_images(init * (mask < 0.5))[0] / family.vae.config.scaling_factor
    pipe.vae.encode = lambda x: type(
        "Out",
        (),
        {
            "latent_dist": type(
                "Dist", (), {"sample": lambda self, g=None: mean, "mode": lambda self: mean}
            )()
        },
    )()
    theirs = pipe(
        "cat", image=init, mask_image=mask, height=32, width=32, num_inference_steps=5,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(5), output_type="pt",
    ).images  # fmt: skip
    ours = generate_images(
        family,
        ["cat"],
        [5],
        SamplerSettings("ddim", 5, 2.0, width=32, height=32),
        init=init,
        mask=mask,
    )
    assert levels(ours - (theirs * 2 - 1)) <= 1
    with pytest.raises(UserError, match="mask"):
        generate_images(family, ["cat"], [5], SamplerSettings("ddim", 5, 2.0), init=init)


def test_latents_are_the_scaled_posterior_and_decode_inverts_the_scale(tmp_path: Path) -> None:
    pipe, family = save_sd_pipeline(tmp_path), load_family(str(tmp_path))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = family.encode_images(x)
    posterior = pipe.vae.encode(x).latent_dist
    assert torch.allclose(mean, posterior.mean * 0.3, atol=1e-6) and torch.allclose(
        std, posterior.std * 0.3, atol=1e-6
    )
    assert torch.allclose(
        family.decode(mean), pipe.vae.decode(posterior.mean).sample.clamp(-1, 1), atol=1e-5
    )
    assert mean.shape == (2, 4, 8, 8) and family.factor == 4


def test_attention_maps_are_the_probabilities_diffusers_computes(tmp_path: Path) -> None:
    save_sd_pipeline(tmp_path)
    family = load_family(str(tmp_path))
    x, cond, level = (
        torch.randn(2, 4, 8, 8),
        family.encode_prompts(["a", "cat dog"]),
        family.schedule.level(torch.tensor([10.0, 500.0])),
    )
    recorded: list[AttentionMap] = []
    family.denoise(x, level, cond, maps=recorded)
    maps = [layer.probabilities for layer in recorded]
    seen = []
    layers = [m for name, m in family.unet.named_modules() if name.endswith("attn2")]
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append((m, args[0], kwargs["encoder_hidden_states"])),
            with_kwargs=True,
        )
    family.denoise(x, level, cond)
    assert len(maps) == len(layers) == len(seen) > 0
    expected = {
        m: m.get_attention_scores(m.head_to_batch_dim(m.to_q(h)), m.head_to_batch_dim(m.to_k(e)))
        for m, h, e in seen
    }
    for layer, ours in zip([family.unet.get_submodule(m.name) for m in recorded], maps):
        assert torch.allclose(ours.flatten(0, 1), expected[layer], atol=1e-6)
        assert torch.allclose(ours.sum(-1), torch.ones(()), atol=1e-5)


def test_another_vae_and_changed_scheduler_settings(tmp_path: Path) -> None:
    pipe = save_sd_pipeline(tmp_path / "model")
    torch.manual_seed(9)
    other = AutoencoderKL.from_config(pipe.vae.config)
    other.save_pretrained(tmp_path / "vae")
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    family = load_family(
        str(tmp_path / "model"), LoadOptions(vae=str(tmp_path / "vae"), scheduler=changes)
    )
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.allclose(family.encode_images(x)[0], other.encode(x).latent_dist.mean * 0.3)
    assert family.prediction == "v_prediction" and family.schedule.alphas[-1] == 0


def test_precision_leaves_the_vae_in_fp32(tmp_path: Path) -> None:
    save_sd_pipeline(tmp_path)
    family = load_family(str(tmp_path), LoadOptions(torch.bfloat16))
    assert (
        family.unet.dtype == family.text_encoder.dtype == torch.bfloat16
        and family.vae.dtype == torch.float32
    )
    cond = family.encode_prompts(["cat"])
    assert (
        family.denoise(
            torch.randn(1, 4, 8, 8), family.schedule.level(torch.tensor([5.0])), cond
        ).dtype
        == torch.float32
    )
    for module in family.modules.values():
        assert not any(p.requires_grad for p in module.parameters())


SD15 = dict(cross_attention_dim=768, attention_head_dim=8)
SD2 = dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)


@pytest.mark.parametrize("config", [SD15, SD2], ids=["sd15", "sd2"])
def test_presets_match_as_many_modules_as_the_peers_do(config: dict) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        text = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12))
    count = {
        name: len(injection.target_paths(unet, globs)) for name, globs in unet_presets(unet).items()
    }
    linear = sum(isinstance(m, torch.nn.Linear) for m in unet.modules())
    resnets = 66 + 14  # 22 with three layers each, 14 with a shortcut
    assert count == {
        "attention": 128, "cloneofsimo": 144, "extended": 144 + resnets, "kohya": 192,
        "all": 192 + resnets, "all-linear": linear,
    }  # fmt: skip
    count = {
        name: len(injection.target_paths(text, globs))
        for name, globs in PRESETS["text_encoder"].items()
    }
    assert count == {"attention": 48, "kohya": 72, "all-linear": 72}
    layout = layout_of({"unet": unet, "text_encoder": text})
    assert (
        "text_model.encoder.layers.0.self_attn.q_proj" in layout.components["text_encoder"].shapes
    )
