"""cloneofsimo's lora_pti: its command line as a config of ours, and its file of the finished run.

    lora_pti --pretrained_model_name_or_path=MODEL --instance_data_dir=IMAGES --output_dir=OUT \\
        --placeholder_tokens="<s1>|<s2>" --use_template=style --scale_lr

Its steps count forward passes. The inversion updates after the first pass and then after every
--gradient_accumulation_steps of them, ceil(steps / accumulation) times; the tuning after each pass.
Here a step is an update of accumulation x batch images in both stages: as many updates as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_core import formats
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.flags.fire_words import REQUIRED, parse_fire_words
from lora_core.formats.grammar import fold_scale
from models import read_layout
from training.inputs.annotators import WEIGHTS
from training.translation.pti_data import translate_pti_data
from training.translation.pti_stages import translate_stages
from training.translation.run_flags import RUN_FLAGS, apply_run_flags
from training.translation.translated_options import TranslatedOptions

UNET_CLASSES = ("CrossAttention", "Attention", "GEGLU")
TEXT_CLASSES = ("CLIPAttention",)
DEFAULTS: dict[str, Any] = {  # of lora_pti, in the order of its arguments
    "instance_data_dir": REQUIRED,
    "pretrained_model_name_or_path": REQUIRED,
    "output_dir": REQUIRED,
    "train_text_encoder": True,
    "pretrained_vae_name_or_path": None,
    "revision": None,
    "perform_inversion": True,
    "use_template": None,
    "train_inpainting": False,
    "placeholder_tokens": "",
    "placeholder_token_at_data": None,
    "initializer_tokens": None,
    "seed": 42,
    "resolution": 512,
    "color_jitter": True,
    "train_batch_size": 1,
    "sample_batch_size": 1,
    "max_train_steps_tuning": 1000,
    "max_train_steps_ti": 1000,
    "save_steps": 100,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": False,
    "lora_rank": 4,
    "lora_unet_target_modules": UNET_CLASSES,
    "lora_clip_target_modules": TEXT_CLASSES,
    "lora_dropout_p": 0.0,
    "lora_scale": 1.0,
    "use_extended_lora": False,
    "clip_ti_decay": True,
    "learning_rate_unet": 1e-4,
    "learning_rate_text": 1e-5,
    "learning_rate_ti": 5e-4,
    "continue_inversion": False,
    "continue_inversion_lr": None,
    "use_face_segmentation_condition": False,
    "cached_latents": True,
    "use_mask_captioned_data": False,
    "mask_temperature": 1.0,
    "scale_lr": False,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 0,
    "lr_scheduler_lora": "linear",
    "lr_warmup_steps_lora": 0,
    "weight_decay_ti": 0.0,
    "weight_decay_lora": 0.001,
    "use_8bit_adam": False,
    "device": "cuda:0",
    "extra_args": None,
    "log_wandb": False,
    "wandb_log_prompt_cnt": 10,
    "wandb_project_name": "new_pti_project",
    "wandb_entity": "new_pti_entity",
    "proxy_token": "person",
    "enable_xformers_memory_efficient_attention": False,
    "out_name": "final_lora",
}
OWN: dict[str, Any] = {"face_model": WEIGHTS["face"], **RUN_FLAGS}  # flags of ours
MOVED = {  # models that have left the hub -> where they are now
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}
EXAMPLE = """example: lora_pti --pretrained_model_name_or_path=MODEL --instance_data_dir=IMAGES
  --output_dir=OUT --placeholder_tokens="<s1>|<s2>" --use_template=style"""
SDPA = "attention always uses torch's own fast form"
# Flags that change no number of the result, there or here -> why.
WITHOUT_EFFECT = {
    "sample_batch_size": "there nothing reads it",
    "use_8bit_adam": "there nothing reads it; --optimizer.name of train.py takes 8-bit classes",
    "proxy_token": "there it is replaced by the initializer before anything reads it",
    "enable_xformers_memory_efficient_attention": SDPA,
    "extra_args": "there it goes to wandb alone; here the whole config does",
    "wandb_log_prompt_cnt": "here the sample images are logged",
    "wandb_project_name": "set WANDB_PROJECT",
    "wandb_entity": "set WANDB_ENTITY",
}


TOKEN_FLAGS = (  # that say nothing in a run without the inversion or without its continuation
    "placeholder_token_at_data",
    "initializer_tokens",
    "clip_ti_decay",
    "learning_rate_ti",
    "weight_decay_ti",
    "lr_warmup_steps",
    "continue_inversion",
    "continue_inversion_lr",
    "max_train_steps_ti",
)


@dataclass(frozen=True)
class PivotalJob:
    """What a command line of lora_pti asks for."""

    config: Config
    table: str  # what became of each flag
    out_name: str
    face_model: str  # "": no masks of faces are painted


def describe_flags() -> str:
    """The help text: every flag with its default."""
    lines = [
        "lora_pti <flags>: cloneofsimo's pivotal tuning, here a config of train.py",
        "",
        "The flags are those of its README; a table says what became of each.",
        "",
    ]
    for name, default in (DEFAULTS | OWN).items():
        shown = "needed" if default is REQUIRED else default
        lines.append(f"  --{name:46}{shown}")
    return "\n".join([*lines, "", EXAMPLE])


def translate_lora_pti(words: Sequence[str]) -> PivotalJob:
    """The job of one command line. Raises UserError for what cannot be carried out."""
    given = parse_fire_words(words, DEFAULTS | OWN, "lora_pti")
    own = OWN | {name: given.pop(name) for name in OWN if name in given}
    known = {name: None if value is REQUIRED else value for name, value in DEFAULTS.items()}
    record = TranslatedOptions("lora_pti", known, given, spell="--{}")
    _translate_places(record)
    needs_faces = translate_pti_data(record)
    translate_stages(record)
    _translate_adapter(record)
    _translate_rest(record)
    run_flags = {name: own[name] for name in RUN_FLAGS}
    config = apply_run_flags(record.to_config(Config), run_flags)
    face_model = str(own["face_model"]) if needs_faces else ""
    return PivotalJob(config, record.format_table(), str(record["out_name"]), face_model)


def _translate_places(record: TranslatedOptions) -> None:
    """The model, the output and the device."""
    model, device = record["pretrained_model_name_or_path"], record["device"]
    if model in MOVED and not Path(model).exists():
        moved = {"model": MOVED[model]}
        record.change("pretrained_model_name_or_path", moved, "it has moved on the hub")
    else:
        record.take("pretrained_model_name_or_path", {"model": model})
    if record["revision"] is not None:
        raise record.refuse("revision", "download that revision and give its folder as the model")
    vae = record["pretrained_vae_name_or_path"]
    if vae is not None:
        record.take("pretrained_vae_name_or_path", {"vae": str(vae)})
    record.take("output_dir", {"out": record["output_dir"]})
    if not record.is_given("device"):
        record.take("device", {"device": "auto"}, "cuda where there is one")
    elif str(device).startswith("cuda") and not torch.cuda.is_available():
        why = "this machine has no CUDA device: it trains on the CPU, slowly"
        record.change("device", {"device": "cpu"}, why)
    else:
        record.take("device", {"device": str(device)})
    record.take("seed", {"seed": record["seed"]})
    if not record["out_name"] or "/" in str(record["out_name"]):
        raise record.refuse("out_name", "give the name of a file in --output_dir, without ending")
    record.take("out_name", {}, f"{record['out_name']}.safetensors, a file in their format")


def _translate_adapter(record: TranslatedOptions) -> None:
    """Rank, scale, dropout and classes of layers."""
    rank = record["lora_rank"]
    record.take("lora_rank", {"adapter.rank": rank})
    if record["use_extended_lora"]:
        why = "as there: 0.1 with --use_extended_lora, whatever the flag says"
        record.take("use_extended_lora", {"adapter.targets": ["extended"]})
        record.take("lora_unet_target_modules", {})
        record.change("lora_dropout_p", {"adapter.dropout": 0.1}, why)
        if record.is_given("lora_scale"):
            record.leave_out("lora_scale", "as there: --use_extended_lora does not read it")
    else:
        targets = _unet_targets(record)
        record.take("lora_unet_target_modules", {"adapter.targets": targets})
        record.take("use_extended_lora", {})
        _translate_strength(record, rank, record["lora_scale"])
    if set(_class_names(record["lora_clip_target_modules"])) != set(TEXT_CLASSES):
        raise record.refuse("lora_clip_target_modules", "expected {CLIPAttention}; leave it out")
    record.take("lora_clip_target_modules", {"adapter.text_targets": ["attention"]})


def _translate_strength(record: TranslatedOptions, rank: int, scale: float) -> None:
    """Scale and dropout of the plain layers."""
    if scale <= 0:
        raise record.refuse("lora_scale", "expected a number above 0")
    strength: dict[str, Any] = {"adapter.alpha": rank * scale}
    if scale != 1 and record["train_text_encoder"]:
        strength["adapter.alpha_pattern"] = {"*.self_attn.*": float(rank)}
        record.take("lora_scale", strength, "rank x scale; the text encoder's scale is 1, as there")
    else:
        record.take("lora_scale", strength, "rank x scale")
    dropout = record["lora_dropout_p"]
    if dropout:
        why = "of the input of an adapter, in both networks; there of the U-Net's output"
        record.change("lora_dropout_p", {"adapter.dropout": dropout}, why)
    else:
        record.take("lora_dropout_p", {"adapter.dropout": dropout})


def _unet_targets(record: TranslatedOptions) -> list[str]:
    """The globs of a set of classes."""
    names = set(_class_names(record["lora_unet_target_modules"]))
    attention = names & {"CrossAttention", "Attention"}
    if names == attention:
        return ["attention"]
    if names == attention | {"GEGLU"}:
        return ["cloneofsimo"] if attention else ["*.ff.net.0.proj"]
    raise record.refuse(
        "lora_unet_target_modules",
        "expected some of CrossAttention, Attention and GEGLU; --use_extended_lora adds the "
        "residual blocks, and --adapter.targets of train.py takes any layers",
    )


def _class_names(value: Any) -> list[str]:
    """The names in a set that fire read, or in one word."""
    return [value] if isinstance(value, str) else list(map(str, value or ()))


def _translate_rest(record: TranslatedOptions) -> None:
    """Checkpointing, logging, and flags without effect."""
    checkpointing = "blocks" if record["gradient_checkpointing"] else "none"
    record.take("gradient_checkpointing", {"gradient_checkpointing": checkpointing})
    report = "wandb" if record["log_wandb"] else "none"
    record.take("log_wandb", {"report": report})
    for name, why in WITHOUT_EFFECT.items():
        if record.is_given(name):
            record.ignore(name, why)
    told = {entry.name for entry in record.entries}
    for name in [name for name in TOKEN_FLAGS if name in record.given and name not in told]:
        record.ignore(name, "no stage of this run learns tokens by it")


def save_pivotal_file(folder: Path, job: PivotalJob) -> Path:
    """Write OUT_NAME.safetensors of a finished run, in cloneofsimo's format: factors in fp16 with
    their scale, token rows in fp32 under the tokens' names. Returns its path.
    """
    layout = read_layout(job.config.model, job.config.model_config, job.config.family)
    state = formats.load(folder, layout)
    components = {}
    for component, modules in state.components.items():
        components[component] = {path: _halve(fold_scale(lr)) for path, lr in modules.items()}
    path = folder / f"{job.out_name}.safetensors"
    half = replace(state, components=components)
    formats.save(half, path, format="cloneofsimo", layout=layout)
    return path


def _halve(lr: Any) -> Any:
    """The factors in fp16. Raises UserError for a number that fp16 cannot hold."""
    half = lr._replace(down=lr.down.half(), up=lr.up.half())
    if not (half.down.isfinite().all() and half.up.isfinite().all()):
        raise UserError("a factor is too large for fp16, in which lora_pti saves; lower the rates")
    return half
