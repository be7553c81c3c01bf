"""configs/*.toml: the options of the seed guides' command lines, and a few steps of each.

Each is tried on a tiny model of its family, and no option in them is without effect.
"""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train
from lora_core.config import Config
from lora_core.data import captions
from lora_core.flags.command_line import parse_command_line
from lora_core.toml import read_toml
from tests import tiny_flux, tiny_flux2, tiny_sd3, tiny_sdxl
from tests.conftest import learned, save_photos, save_pipeline
from tests.opened_run import open_parts
from training import results
from training.checks import config_checks
from training.log import Log

FOLDER = Path(__file__).parent.parent / "configs"
FAMILY = {  # config -> tiny model it is tried on
    "sdxl_dreambooth": "sdxl",
    "sdxl_dora": "sdxl",
    "sdxl_pivotal_prodigy": "sdxl",
    "sdxl_edm_playground": "edm",
    "flux_pivotal": "flux",
    "flux_pivotal_t5": "flux",
    "flux_textual_inversion": "flux",
    "sd3_dreambooth": "sd3",
    "flux2_klein": "flux2",
    "sd15_lora_pti": "sd",
    "sd15_inpainting": "inpainting",
    "kohya_lora": "sd",
    "edlora": "sd",
}
CONFIGS = {name: read_toml(FOLDER / f"{name}.toml") for name in FAMILY}

# ---------------------------------------------------------------- small configs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> its tiny model's folder, and "pictures": three images with captions of every kind
    that the configs use.
    """
    root = tmp_path_factory.mktemp("tiny")
    save_pipeline(root / "sd")
    save_pipeline(root / "inpainting", channels=9)
    tiny_sdxl.save(root / "sdxl")
    tiny_sdxl.save(root / "edm", scheduler="edm")
    tiny_flux.save(root / "flux")
    tiny_sd3.save(root / "sd3")
    tiny_flux2.save(root / "flux2")
    pictures = save_photos(root / "pictures", count=3)
    rows = [
        {
            "file_name": f"{i}.png",
            "text": "the text of TOK",
            "prompt": f"a prompt of TOK {'abc'[i]}",
        }
        for i in range(3)
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(autouse=True)
def short_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny tokenizer spells every letter, and sixteen of them are too few for the templates."""
    monkeypatch.setitem(captions.TEMPLATES, "style", ("by {}", "{} a"))


def small(config: Config, family: str, tiny: dict[str, Path], *, precision: str = "fp64") -> Config:
    """The config on a tiny model and tiny images, its stages cut to two steps and one.

    In fp64 a rate times a decay of 1e-8 still changes a weight.
    """
    if config.tokens.words == ("<TOK>",):  # the captions of "pictures" have TOK
        start = {"tokens.init": ("<rand-0.013>+b",), "tokens.norm_target": 5.0}
        config = put(config, {"tokens.words": ("TOK",), "samples.prompts": ("a TOK",), **start})
    rank = min(config.adapter.rank, 4) if config.trains("denoiser") else config.adapter.rank
    stages = tuple(
        replace(stage, steps=2 if i == 0 else 1) for i, stage in enumerate(config.stages)
    )
    return replace(
        config,
        model=str(tiny[family]),
        vae="",
        device="cpu",
        precision=precision,
        stages=stages,
        save_every=0,
        log_every=1,
        data=replace(
            config.data,
            images=str(tiny["pictures"]),
            dataset="",
            resolution=16,
            bucket_step=4 if config.data.buckets else 64,
        ),
        adapter=replace(config.adapter, rank=rank),
        samples=replace(config.samples, steps=2, every=0),
        validation=replace(config.validation, bins=1),
    )


def put(config: Any, values: dict[str, Any]) -> Any:
    """The config with dotted options set: "stages.1.high", "optimizer.lr.tokens".

    None takes a key out of a table.
    """
    for path, value in values.items():
        config = _put(config, path.split("."), value)
    return config


def _put(node: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    key, *rest = path
    if is_dataclass(node):
        return replace(node, **{key: _put(getattr(node, key), rest, value)})
    if isinstance(node, tuple):
        return tuple(
            _put(item, rest, value) if i == int(key) else item for i, item in enumerate(node)
        )
    changed = {**node, key: _put(node.get(key), rest, value)}
    return {k: v for k, v in changed.items() if v is not None}


def get(config: Any, path: str) -> Any:
    return reduce(
        lambda node, key: (
            getattr(node, key) if is_dataclass(node) else node[int(key) if key.isdigit() else key]
        ),
        path.split("."),
        config,
    )


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda p: p.stem)
def test_parses_and_says_how_to_run_it(path: Path) -> None:
    config = read_toml(path)
    config_checks.check_config(put(config, {"data.images": config.data.images or "photos"}))
    assert path.name in path.read_text() or path.stem == "toy_pti"


SCRIPT = {
    "data.crop": "random",
    "data.variants": 1,
    "data.interpolation": "lanczos",
    "data.resolution": 1024,
    "seed": 0,
    "optimizer.warmup": 0,
}
DOG = SCRIPT | {
    "data.caption": "a photo of sks dog",
    "adapter.rank": 4,
    "adapter.targets": ("attention",),
    "optimizer.name": "adamw",
    "optimizer.lr": {"denoiser": 1e-4},
    "optimizer.weight_decay": {"denoiser": 1e-4},
    "batch_size": 1,
    "accumulation": 4,
    "precision": "fp16",
    "samples.prompts.0": "A photo of sks dog in a bucket",
    "optimizer.schedule": "constant",
}
PRODIGY = SCRIPT | {
    "optimizer.name": "prodigy",
    "optimizer.args": {"use_bias_correction": True, "safeguard_warmup": True},
    "tokens.words": ("TOK",),
    "tokens.vectors": 2,
    "tokens.norm": "rescale",
    "data.repeats": 1,
    "precision": "bf16",
    "gradient_checkpointing": "all",
    "accumulation": 1,
    "optimizer.schedule": "constant",
}
FLUX = PRODIGY | {
    "model": "black-forest-labs/FLUX.1-dev",
    "batch_size": 1,
    "noise.guidance": 3.5,
    "noise.density": "uniform",
    "weighting": "none",
}
LORA = {"adapter.rank": 8, "optimizer.lr": {"denoiser": 1.0, "tokens": 1.0}}
VALUES: dict[str, dict[str, Any]] = {  # what the command lines of the guides say
    "sdxl_dreambooth": DOG | {"vae": "", "adapter.kind": "lora", "stages": [(500, ("denoiser",))]},
    "sd3_dreambooth": DOG
    | {
        "model": "stabilityai/stable-diffusion-3-medium-diffusers",
        "data.resolution": 512,
        "adapter.targets": ("dreambooth",),
        "optimizer.lr": {"denoiser": 4e-4},
        "noise.density": "logit_normal",
        "max_sequence_length": 77,
        "stages": [(500, ("denoiser",))],
    },
    "flux2_klein": DOG
    | {
        "model": "black-forest-labs/FLUX.2-klein-base-4B",
        "precision": "bf16",
        "gradient_checkpointing": "blocks",
        "data.interpolation": "bilinear",
        "adapter.alpha": 4.0,
        "adapter.targets": ("dreambooth",),
        "stages": [(500, ("denoiser",))],
    },
    "sdxl_dora": DOG | {"vae": "", "adapter.kind": "dora", "stages": [(500, ("denoiser",))]},
    "sdxl_edm_playground": DOG
    | {
        "model": "playgroundai/playground-v2.5-1024px-aesthetic",
        "vae": "",
        "stages": [(500, ("denoiser",))],
    },
    "sdxl_pivotal_prodigy": PRODIGY
    | LORA
    | {
        "batch_size": 3,
        "weighting": "min_snr",
        "weighting_arg": {"gamma": 5.0},
        "stages": [(500, ("denoiser", "tokens")), (500, ("denoiser",))],
        "tokens.encoders": ("clip_l", "clip_g"),
        "optimizer.weight_decay": {"denoiser": 1e-4, "tokens": 1e-4},
        "samples.prompts.0": "a TOK icon of an astronaut riding a horse, in the style of TOK",
        "model": "stabilityai/stable-diffusion-xl-base-1.0",
    },
    "flux_pivotal": FLUX
    | LORA
    | {
        "adapter.alpha": 4.0,
        "adapter.targets": ("fal",),
        "stages": [(350, ("denoiser", "tokens")), (350, ("denoiser",))],
        "tokens.encoders": ("clip_l",),
        "optimizer.weight_decay": {"denoiser": 1e-4, "tokens": 1e-3},
    },
    "flux_pivotal_t5": FLUX
    | LORA
    | {
        "adapter.alpha": 4.0,
        "adapter.targets": ("fal",),
        "stages": [(350, ("denoiser", "tokens")), (350, ("denoiser",))],
        "tokens.encoders": ("clip_l", "t5"),
        "optimizer.weight_decay": {"denoiser": 1e-4, "tokens": 1e-3},
    },
    "flux_textual_inversion": FLUX
    | {
        "stages": [(700, ("tokens",))],
        "tokens.encoders": ("clip_l", "t5"),
        "optimizer.lr": {"tokens": 1.0},
        "optimizer.weight_decay": {"tokens": 1e-3},
    },
    "sd15_lora_pti": {
        "stages": [(1000, ("tokens",)), (1000, ("denoiser", "text_encoder", "tokens"))],
        "batch_size": 1,
        "accumulation": 4,
        "adapter.rank": 1,
        "optimizer.lr": {"denoiser": 4 * 1e-4, "text_encoder": 4 * 1e-5, "tokens": 4 * 5e-4},
        "optimizer.schedule": "linear",
        "optimizer.warmup": 0,
        "optimizer.weight_decay": {"denoiser": 0.001, "text_encoder": 0.001, "tokens": 0.0},
        "stages.1.weight_decay": {"tokens": 0.001},
        "stages.1.lr": {"tokens": 1e-4},
        "stages.1.high": 0.8,
        "stages.1.norm": "none",
        "tokens.norm": "pull",
        "tokens.norm_target": 0.4,
        "tokens.init": ("random:0.017",),
        "tokens.vectors": 2,
        "data.captions": "style",
        "data.resolution": 512,
        "data.jitter": True,
        "adapter.targets": ("cloneofsimo",),
        "save_every": 100,
        "seed": 42,
    },
    "sd15_inpainting": {
        "model": "stable-diffusion-v1-5/stable-diffusion-inpainting",
        "stages": [(3000, ("tokens",)), (3000, ("denoiser", "text_encoder"))],
        "batch_size": 1,
        "accumulation": 2,
        "gradient_checkpointing": "all",
        "adapter.rank": 8,
        "adapter.alpha": 2.0 * 8,
        "adapter.dropout": 0.1,
        "adapter.targets": ("cloneofsimo",),
        "optimizer.lr": {"denoiser": 2 * 2e-4, "text_encoder": 2 * 1e-6, "tokens": 2 * 5e-4},
        "optimizer.weight_decay": {"denoiser": 0.0, "text_encoder": 0.0, "tokens": 0.0},
        "optimizer.schedule": "linear",
        "optimizer.warmup": 0,
        "stages.1.schedule": "constant",
        "stages.1.high": 0.8,
        "tokens.norm": "pull",
        "tokens.norm_target": 0.4,
        "data.masks": "file",
        "data.resolution": 512,
        "data.jitter": True,
        "data.variants": 0,
        "mask_scale": "cloneofsimo",
        "save_every": 100,
        "seed": 42,
    },
    "edlora": {
        "seed": 0,
        "batch_size": 2 * 2,
        "loss": "edlora",
        "loss_arg": {"attention_weight": 0.01, "full_identity": False},
        "data.masks": "file",
        "tokens.per_layer": True,
        "tokens.vectors": 2,
        "tokens.init": ("<rand-0.013>+woman",),
        "tokens.norm": "stop",
        "tokens.norm_target": 0.55,
        "adapter.rank": 4,
        "adapter.alpha": 1.0 * 4,
        "adapter.init": "kaiming",
        "adapter.targets": ("attention",),
        "adapter.text_targets": ("attention",),
        "noise.offset": 0.01,
        "optimizer.lr": {"denoiser": 1e-4, "text_encoder": 1e-5, "tokens": 1e-3},
        "optimizer.weight_decay": {"denoiser": 0.01, "text_encoder": 0.01, "tokens": 0.01},
        "optimizer.schedule": "linear",
        "stages": [(14 * 500 // 4, ("denoiser", "text_encoder", "tokens"))],
        "samples.strengths": (0.0, 0.7, 1.0),
        "samples.steps": 50,
        "samples.guidance": 7.5,
    },
    "kohya_lora": {
        "adapter.rank": 16,
        "adapter.alpha": 1.0,
        "adapter.init": "kaiming",
        "adapter.targets": ("kohya",),
        "adapter.text_targets": ("kohya",),
        "optimizer.lr": {"denoiser": 1e-4, "text_encoder": 1e-5},
        "weighting": "min_snr",
        "weighting_arg": {"gamma": 5.0},
        "optimizer.schedule": "constant",
        "data.buckets": True,
        "data.bucket_step": 64,
        "data.repeats": 10,
        "data.resolution": 512,
        "batch_size": 4,
        "precision": "fp16",
        "gradient_checkpointing": "all",
        "stages": [(400, ("denoiser", "text_encoder"))],
    },
}


@pytest.mark.parametrize("name", VALUES)
def test_says_what_the_guides_command_says(name: str) -> None:
    config = CONFIGS[name]
    for path, wanted in VALUES[name].items():
        found = (
            [(s.steps, s.groups) for s in config.stages] if path == "stages" else get(config, path)
        )
        assert found == wanted, path


def variants(name: str) -> list[list[str]]:
    """The flags that a config's comments offer, one list for each variant; a backslash goes on in
    the next line.
    """
    text = re.sub(r"\\\n#\s*", "", (FOLDER / f"{name}.toml").read_text())
    head = text[text.index("# Variants") :] if "# Variants" in text else ""
    return [
        shlex.split(line.lstrip("# "), comments=True)
        for line in head.splitlines()
        if line.startswith("#   --")
    ]


@pytest.mark.parametrize("name", [name for name in FAMILY if variants(name)])
def test_variants_in_the_comments_are_command_lines(name: str) -> None:
    for words in variants(name):
        config = parse_command_line(
            Config, [str(FOLDER / f"{name}.toml"), *words], prog="train.py", example=""
        )
        assert config != CONFIGS[name], words
        config_checks.check_config(replace(config, report="none"))  # the package may not be here


# ---------------------------------------------------------------- the table of flags

# The flags of diffusers' two advanced scripts and its SDXL DreamBooth script, of lora_pti, and
# those that the guide of kohya explains.
FLAGS = {
    "diffusers": """
        adam_beta1 adam_beta2 adam_epsilon adam_weight_decay
        adam_weight_decay_text_encoder allow_tf32 cache_dir cache_latents caption_column
        center_crop checkpointing_steps checkpoints_total_limit class_data_dir
        class_prompt clip_skip dataloader_num_workers dataset_config_name dataset_name
        do_edm_style_training enable_t5_ti enable_xformers_memory_efficient_attention
        gradient_accumulation_steps gradient_checkpointing guidance_scale hub_model_id
        hub_token image_column image_interpolation_mode initializer_concept
        instance_data_dir instance_prompt learning_rate local_rank logging_dir logit_mean
        logit_std lora_alpha lora_dropout lora_layers lora_unet_blocks lr_num_cycles
        lr_power lr_scheduler lr_warmup_steps max_grad_norm max_sequence_length
        max_train_steps mixed_precision mode_scale noise_offset num_class_images
        num_new_tokens_per_abstraction num_train_epochs num_validation_images optimizer
        output_dir output_kohya_format pretrained_model_name_or_path
        pretrained_vae_model_name_or_path prior_generation_precision prior_loss_weight
        prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup
        prodigy_use_bias_correction push_to_hub random_flip rank repeats report_to
        resolution resume_from_checkpoint revision sample_batch_size scale_lr seed
        snr_gamma text_encoder_lr token_abstraction train_batch_size train_text_encoder
        train_text_encoder_frac train_text_encoder_ti train_text_encoder_ti_frac
        train_transformer_frac upcast_before_saving use_8bit_adam use_blora use_dora
        validation_epochs validation_prompt variant weighting_scheme
        with_prior_preservation
    """,
    "lora_pti": """
        instance_data_dir pretrained_model_name_or_path output_dir train_text_encoder
        pretrained_vae_name_or_path revision perform_inversion use_template
        train_inpainting placeholder_tokens placeholder_token_at_data initializer_tokens
        seed resolution color_jitter train_batch_size sample_batch_size
        max_train_steps_tuning max_train_steps_ti save_steps gradient_accumulation_steps
        gradient_checkpointing lora_rank lora_unet_target_modules lora_clip_target_modules
        lora_dropout_p lora_scale use_extended_lora clip_ti_decay learning_rate_unet
        learning_rate_text learning_rate_ti continue_inversion continue_inversion_lr
        use_face_segmentation_condition cached_latents use_mask_captioned_data
        mask_temperature scale_lr lr_scheduler lr_warmup_steps lr_scheduler_lora
        lr_warmup_steps_lora weight_decay_ti weight_decay_lora use_8bit_adam device
        extra_args log_wandb wandb_log_prompt_cnt wandb_project_name wandb_entity
        proxy_token enable_xformers_memory_efficient_attention out_name
    """,
    "kohya": """
        pretrained_model_name_or_path vae output_dir output_name save_model_as
        save_every_n_epochs save_every_n_steps network_module network_dim network_alpha
        network_dropout network_train_unet_only network_train_text_encoder_only
        network_weights learning_rate unet_lr text_encoder_lr optimizer_type
        optimizer_args lr_scheduler lr_warmup_steps lr_scheduler_num_cycles
        lr_scheduler_power max_train_steps max_train_epochs sdpa xformers mixed_precision
        gradient_accumulation_steps max_grad_norm seed log_with gradient_checkpointing
        clip_skip cache_latents cache_text_encoder_outputs noise_offset
        multires_noise_iterations multires_noise_discount ip_noise_gamma min_snr_gamma
        debiased_estimation_loss loss_type huber_schedule huber_c masked_loss
        zero_terminal_snr v_parameterization prior_loss_weight scale_weight_norms resume
        max_token_length
    """,
}
PAGE = (FOLDER.parent / "docs/flags.md").read_text(encoding="utf-8")
TABLE, OTHERS = PAGE.split("## Flags without a counterpart")


@pytest.mark.parametrize("script", FLAGS)
def test_flag_table_has_every_flag_in_its_column(script: str) -> None:
    column = 2 + list(FLAGS).index(script)
    rows = [
        line.split(" | ")
        for line in TABLE.splitlines()
        if line.startswith("| `") or line.startswith("| the")
    ]
    cells = [("| ".join(row) + " |").split("|")[column] for row in rows]
    named = set(re.findall(r"`--(\w+)", " ".join([*cells, OTHERS])))
    assert not set(FLAGS[script].split()) - named


def test_flag_table_names_options_that_exist() -> None:
    cells = [line.split("|")[1] for line in TABLE.splitlines() if line.startswith("| `")]
    names = re.findall(r"`([\w.]+?)(?: = 0)?`", " ".join(cells))
    assert len(names) > 80
    for name in names:
        if name in ("denoiser", "text_encoder", "tokens"):
            continue
        node: Any = Config()
        for key in name.split("."):
            if isinstance(node, dict):
                assert key in ("denoiser", "text_encoder", "tokens"), name
                break
            node = node[0] if key == "I" else getattr(node, key)


# ---------------------------------------------------------------- two steps of each


@pytest.mark.parametrize("name", FAMILY)
def test_runs(name: str, tiny: dict[str, Path], tmp_path: Path, quick: None) -> None:
    config = put(
        small(CONFIGS[name], FAMILY[name], tiny, precision="fp32"), {"out": str(tmp_path / "run")}
    )
    run = train.train(put(config, {"stages.0.steps": 1}) if len(config.stages) > 1 else config)
    files = {path.name for path in run.iterdir()}
    tokens, lora = config.trains("tokens"), config.trains("denoiser")
    assert {
        "config.toml",
        "metrics.jsonl",
        "val.jsonl",
        "summary.json",
        "before_after.png",
        "checkpoints",
        "samples",
    } <= files
    assert ("run_emb.safetensors" in files) == tokens
    assert ({"pytorch_lora_weights.safetensors", "run.safetensors"} <= files) == lora
    parameters = learned(run)
    trained = set(chain.from_iterable(stage.groups for stage in config.stages))
    assert {key.split("/")[1] for key in parameters} == trained
    assert all(torch.isfinite(p).all() for p in parameters.values())


# ---------------------------------------------------------------- no option without effect

EXCLUDED = {  # options that a config sets and no weight depends on
    "model": "a path, replaced by the tiny model's",
    "out": "a path",
    "data.images": "a path",
    "gradient_checkpointing": "the same numbers with less memory",
    "save_every": "which checkpoints are kept on the disk (tests/test_resume.py)",
    "keep": "the same",
    "tokens.words": "the word of the captions, which are others here",
    "samples.strengths": "rows of a sheet (tests/test_samples.py)",
    "samples.every": "when pictures are drawn, not what",
    "stages.0.steps": "cut to fit here",
    "stages.1.steps": "cut to fit here",
    "optimizer.name": "its arguments go with it: tests/test_train.py",
    "optimizer.weight_decay.tokens": "0 in lora_pti; see stages.1.weight_decay.tokens",
}
FLIPS: dict[
    str, dict[str, Any]
] = {  # where the default is not the right other value: what is set instead
    "adapter.rank": {"adapter.rank": 2},
    "data.captions": {"data.captions": "metadata", "data.caption": ""},
    "data.caption": {"data.caption": "TOK, dark"},
    "data.crop": {"data.crop": "center", "data.variants": 0},
    "data.resolution": {"data.resolution": 24},
    "data.buckets": {"data.buckets": False, "data.bucket_step": 64},
    "data.masks": {"data.masks": "none", "mask_scale": "mean"},
    "loss": {"loss": "attention"},
    "loss_arg.attention_weight": {"loss_arg.attention_weight": 1.0},
    "loss_arg.full_identity": {"loss_arg.full_identity": True},
    "weighting": {"weighting": "none", "weighting_arg": {}},
    "weighting_arg.gamma": {"weighting_arg.gamma": 1.0},
    "weighting_arg.k": {"weighting_arg.k": 1.0},
    "precision": {"precision": "fp32"},
    "samples.prompts": {"samples.prompts": ("b TOK",)},
    "samples.steps": {"samples.steps": 3},
    "stages.0.groups": {"stages.0.groups": ("tokens",)},
    "stages.1.groups": {
        "stages.1.groups": ("denoiser", "text_encoder"),
        "stages.1.lr": {},
        "stages.1.weight_decay": {},
        "stages.1.norm": None,
    },
    "optimizer.args.use_bias_correction": {"optimizer.args.use_bias_correction": False},
    "optimizer.args.safeguard_warmup": {"optimizer.args.safeguard_warmup": False},
}
WITH = {  # in both runs: the estimate of d has to move, a rate to fall
    "stages.1.schedule": {"stages.1.steps": 2},
    "optimizer.args.safeguard_warmup": {
        "optimizer.args.d0": 1e-2,
        "optimizer.args.d_coef": 1e3,
        "stages.0.steps": 4,
    },
}
WHERE = {  # the config that shows it best
    "data.masks": "sd15_inpainting",
    "tokens.encoders": "flux_pivotal_t5",
    "stages.0.groups": "sdxl_pivotal_prodigy",
    "data.caption": "sd15_lora_pti",
    "samples.guidance": "kohya_lora",
    "samples.steps": "flux_pivotal",
    "samples.sampler": "sdxl_pivotal_prodigy",
    "optimizer.lr.denoiser": "sd15_lora_pti",
    "optimizer.lr.text_encoder": "sd15_lora_pti",
    "optimizer.lr.tokens": "sd15_lora_pti",
    "optimizer.weight_decay.denoiser": "sd15_lora_pti",
    "optimizer.weight_decay.text_encoder": "sd15_lora_pti",
}


def differing(config: Any, default: Any, path: str = "") -> list[str]:
    """Dotted names of the options that differ from the default; tables by key, stages by number."""
    found = []
    for field in fields(config):
        value, usual, name = (
            getattr(config, field.name),
            getattr(default, field.name),
            path + field.name,
        )
        if name == "stages":
            for i, stage in enumerate(value):
                found += differing(stage, type(stage)(), f"stages.{i}.")
        elif is_dataclass(value):
            found += differing(value, usual, name + ".")
        elif isinstance(value, dict):
            found += [f"{name}.{key}" for key in value if value[key] != usual.get(key)]
        elif value != usual:
            found.append(name)
    return found


OPTIONS = {name: differing(config, Config()) for name, config in CONFIGS.items()}
QUICKEST = (
    "kohya_lora",
    "sd15_lora_pti",
    "flux_textual_inversion",
    "flux_pivotal",
    "flux_pivotal_t5",
    "sdxl_pivotal_prodigy",
)
# The last config in this order that has an option is the one in which it is flipped.
ORDER = [*(name for name in OPTIONS if name not in QUICKEST), *reversed(QUICKEST)]
UNION: dict[str, str] = {}  # option -> config
for name in ORDER:
    UNION |= {key: WHERE.get(key, name) for key in OPTIONS[name] if key not in EXCLUDED}
BASES: dict[str, dict[str, torch.Tensor]] = {}  # config -> what it learns


def copy_parameters(groups: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Group and number -> a copy of the parameter."""
    found = {}
    for name, group in groups.items():
        found |= {f"{name}/{i}": p.detach().clone() for i, p in enumerate(group)}
    return found


@pytest.fixture
def steps_only(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Config], dict[str, torch.Tensor]]:
    """A run without validation, checkpoint and files: group and number -> learned parameter."""
    monkeypatch.setattr(Log, "validate", lambda log, done, scorer: None)
    monkeypatch.setattr(results, "finish_run", lambda log, *_: copy_parameters(log.model.groups))
    return train.train


def flipped(option: str, name: str, config: Config) -> dict[str, Any]:
    if option in FLIPS:
        return FLIPS[option]
    if re.search(r"\.(lr|weight_decay)\.", option):
        return {option: 2 * get(config, option)}
    parts = option.split(".")
    return {
        option: get(
            type(config.stages[0])() if parts[0] == "stages" else Config(),
            ".".join(parts[2:] if parts[0] == "stages" else parts),
        )
    }


def test_excluded_options_are_in_some_config() -> None:
    assert set(EXCLUDED) <= set(chain.from_iterable(OPTIONS.values()))
    assert set(FLIPS) | set(WHERE) <= set(UNION) | set(EXCLUDED)


@pytest.mark.parametrize(
    "option", sorted(option for option in UNION if not option.startswith("samples."))
)
def test_flipping_an_option_changes_what_is_learned(
    option: str, tiny: dict[str, Path], tmp_path: Path, steps_only: Callable
) -> None:
    name = UNION[option]
    config = put(
        small(CONFIGS[name], FAMILY[name], tiny),
        {"gradient_checkpointing": "none", **WITH.get(option, {})},
    )
    base = name + option * (option in WITH)
    if base not in BASES:
        BASES[base] = steps_only(put(config, {"out": str(tmp_path / "base")}))
    other = steps_only(
        put(config, flipped(option, name, CONFIGS[name]) | {"out": str(tmp_path / "other")})
    )
    ours = BASES[base]
    assert ours.keys() != other.keys() or any(
        ours[k].shape != other[k].shape or not torch.equal(ours[k], other[k]) for k in ours
    )


@pytest.mark.parametrize(
    "option", sorted(option for option in UNION if option.startswith("samples."))
)
def test_flipping_an_option_of_samples_changes_the_pictures(
    option: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    name = UNION[option]
    config = small(CONFIGS[name], FAMILY[name], tiny, precision="fp32")
    drawn: list[list[Image.Image]] = []
    for i, values in enumerate(({}, flipped(option, name, CONFIGS[name]))):
        samples = open_parts(put(config, values | {"out": str(tmp_path / str(i))})).samples
        drawn.append(samples.draw(samples.prompts[:1]))
    assert drawn[0][0].tobytes() != drawn[1][0].tobytes()


def test_the_same_config_twice_learns_the_same(
    tiny: dict[str, Path], tmp_path: Path, steps_only: Callable
) -> None:
    """Otherwise the flips above would show nothing."""
    config = small(CONFIGS["sdxl_pivotal_prodigy"], "sdxl", tiny)
    one, two = (steps_only(put(config, {"out": str(tmp_path / out)})) for out in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
