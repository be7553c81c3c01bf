"""train_lora_dreambooth.py and train_lora_w_ti.py of cloneofsimo's training_scripts, as configs.

    train_lora_dreambooth.py --instance_prompt "style of sks" --learning_rate 1e-4 ...
    train_lora_w_ti.py --placeholder_token "<krk>" --unfreeze_lora_step 1500 ...

Both count forward passes, and update after every --gradient_accumulation_steps of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.flags.fire_words import REQUIRED, parse_fire_words
from training.translation.lora_pti import MOVED, SDPA, PivotalJob
from training.translation.pti_stages import SCHEDULES
from training.translation.run_flags import RUN_FLAGS, apply_run_flags
from training.translation.translated_options import TranslatedOptions

SHARED: dict[str, Any] = {  # flags of both scripts
    "pretrained_model_name_or_path": REQUIRED,
    "instance_data_dir": REQUIRED,
    "output_dir": "text-inversion-model",
    "pretrained_vae_name_or_path": None,
    "revision": None,
    "tokenizer_name": None,
    "class_data_dir": None,
    "class_prompt": None,
    "with_prior_preservation": False,
    "prior_loss_weight": 1.0,
    "num_class_images": 100,
    "output_format": "both",
    "seed": None,
    "resolution": 512,
    "center_crop": False,
    "color_jitter": False,
    "train_text_encoder": False,
    "train_batch_size": 4,
    "sample_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "save_steps": 500,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "lora_rank": 4,
    "learning_rate": None,
    "learning_rate_text": 5e-6,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "logging_dir": "logs",
    "mixed_precision": None,
    "local_rank": -1,
    "resize": True,
    "use_xformers": False,
}
SCRIPTS: dict[str, dict[str, Any]] = {  # script -> its own flags
    "train_lora_dreambooth.py": {
        "instance_prompt": REQUIRED,
        "resume_unet": None,
        "resume_text_encoder": None,
    },
    "train_lora_w_ti.py": {
        "placeholder_token": REQUIRED,
        "initializer_token": REQUIRED,
        "learnable_property": "object",
        "stochastic_attribute": None,
        "learning_rate_ti": 5e-4,
        "unfreeze_lora_step": 500,
        "just_ti": False,
    },
}
WITHOUT_EFFECT = {
    "center_crop": "images are cut at the center",
    "sample_batch_size": "it changes no image",
    "use_8bit_adam": "moments are in fp32; --optimizer.name of train.py takes 8-bit classes",
    "logging_dir": "metrics.jsonl is in the run's folder",
    "local_rank": "torchrun says it",
    "resize": "images are always resized",
    "use_xformers": SDPA,
    "output_format": "lora_weight.safetensors is written, and the run's own files",
}
REFUSED = {
    "revision": "download that revision and give its folder as the model",
    "tokenizer_name": "put that tokenizer into the model's folder",
    "num_train_epochs": "give --max_train_steps",
    "push_to_hub": "train.py has --push-to-hub USER/NAME",
    "hub_token": "log in with hf auth login; train.py has --push-to-hub USER/NAME",
    "resume_unet": "train.py has --from-lora FILE",
    "resume_text_encoder": "train.py has --from-lora FILE",
    "adam_epsilon": "train.py has --optimizer.args eps=1e-8",
}


def describe_script(script: str) -> str:
    """The help text of a script: every flag with its default."""
    lines = [f"{script} <flags>: cloneofsimo's script, here a config of train.py", ""]
    for name, default in (SCRIPTS[script] | SHARED | RUN_FLAGS).items():
        lines.append(f"  --{name:32}{'needed' if default is REQUIRED else default}")
    return "\n".join(lines)


def translate_script(script: str, words: Sequence[str]) -> PivotalJob:
    """The job of a command line of one of SCRIPTS. Raises UserError."""
    flags = SHARED | SCRIPTS[script]
    given = parse_fire_words(words, flags | RUN_FLAGS, script)
    own = {name: given.pop(name) for name in RUN_FLAGS if name in given}
    known = {name: None if value is REQUIRED else value for name, value in flags.items()}
    record = TranslatedOptions(script, known, given, spell="--{}")
    for name, why in REFUSED.items():
        if record.is_given(name):
            raise record.refuse(name, why)
    _translate_shared(record)
    learns_token = "placeholder_token" in flags
    if learns_token:
        _translate_token(record)
    else:
        prompt = {"data.captions": "one", "data.caption": record["instance_prompt"]}
        record.take("instance_prompt", prompt)
    _translate_steps(record, learns_token=learns_token)
    _translate_optimizer(record, learns_token=learns_token)
    for name, why in WITHOUT_EFFECT.items():
        if record.is_given(name):
            record.ignore(name, why)
    config = apply_run_flags(record.to_config(Config), own)
    return PivotalJob(config, record.format_table(), "lora_weight", "")


def _translate_shared(record: TranslatedOptions) -> None:
    """Model, images, class images and adapters."""
    model = str(record["pretrained_model_name_or_path"])
    moved = MOVED.get(model, model) if not Path(model).exists() else model
    record.take("pretrained_model_name_or_path", {"model": moved})
    if record["pretrained_vae_name_or_path"]:
        record.take(
            "pretrained_vae_name_or_path", {"vae": str(record["pretrained_vae_name_or_path"])}
        )
    folder = {"data.images": str(record["instance_data_dir"]), "data.flip": True}
    record.take("instance_data_dir", folder)
    record.take("output_dir", {"out": str(record["output_dir"])})
    record.take("resolution", {"data.resolution": record["resolution"]})
    why = "brightness and contrast by 10 %; there brightness by 20 %"
    record.change("color_jitter", {"data.jitter": record["color_jitter"]}, why)
    record.take("seed", {"seed": record["seed"] or 0})
    rank = {"adapter.rank": record["lora_rank"], "adapter.targets": ["cloneofsimo"]}
    record.take("lora_rank", rank)
    checkpointing = "blocks" if record["gradient_checkpointing"] else "none"
    record.take("gradient_checkpointing", {"gradient_checkpointing": checkpointing})
    if record["mixed_precision"] in ("fp16", "bf16"):
        record.change("mixed_precision", {"precision": "bf16"}, "the frozen weights are in bf16")
    elif record.is_given("mixed_precision"):
        record.take("mixed_precision", {"precision": "fp32"})
    names = ("class_prompt", "class_data_dir", "num_class_images", "prior_loss_weight")
    options = ("prior.prompt", "prior.images", "prior.count", "prior.weight")
    if record["with_prior_preservation"]:
        if not record["class_prompt"]:
            raise record.refuse("with_prior_preservation", "give --class_prompt as well")
        record.take("with_prior_preservation", {})
    for name, option in zip(names, options):
        if record["with_prior_preservation"] and record[name] is not None:
            record.take(name, {option: record[name]})
        elif record.is_given(name):
            record.ignore(name, "without --with_prior_preservation it has no effect, as there")


def _translate_token(record: TranslatedOptions) -> None:
    """The learned token and its sentences."""
    token, kind = str(record["placeholder_token"]), record["learnable_property"]
    if kind not in ("object", "style"):
        raise record.refuse("learnable_property", "expected object or style")
    ours = {"tokens.words": [token], "tokens.names": [token], "tokens.vectors": 1}
    record.take("placeholder_token", ours | {"tokens.norm": "none", "tokens.encoders": ["clip_l"]})
    record.take("initializer_token", {"tokens.init": [str(record["initializer_token"])]})
    record.take("learnable_property", {"data.captions": kind, "data.caption": token})
    if record["stochastic_attribute"]:
        why = "write the words into captions in NAME.txt: a line for each sentence of an image"
        record.leave_out("stochastic_attribute", why)


def _translate_steps(record: TranslatedOptions, *, learns_token: bool) -> None:
    """One stage; with a token one for it and one for the adapters."""
    total, passes = record["max_train_steps"], record["gradient_accumulation_steps"]
    if not isinstance(total, int) or total < 1 or passes < 1:
        raise UserError("give --max_train_steps, a number of forward passes of at least 1")
    record.take("train_batch_size", {"batch_size": record["train_batch_size"]})
    record.take("gradient_accumulation_steps", {"accumulation": passes})
    save = "checkpoints/N with everything to resume; there lora_weight_eE_sN.pt"
    record.change("save_steps", {"save_every": record["save_steps"]}, save)
    adapters = ["denoiser", *(["text_encoder"] if record["train_text_encoder"] else [])]
    record.take("train_text_encoder", {})
    parts: list[tuple[int, list[str]]] = [(total, adapters)]
    if learns_token:
        first = total if record["just_ti"] else min(total, record["unfreeze_lora_step"])
        parts = [(first, ["tokens"])]
        if total > first:
            parts.append((total - first, adapters))
        why = "the token learns before, the adapters after; there all groups step, at a rate of 0"
        record.take("unfreeze_lora_step", {}, why)
        record.take("just_ti", {})
    ours: dict[str, Any] = {}
    for number, (steps, groups) in enumerate(parts):
        ours[f"stages.{number}.steps"] = -(-steps // passes)
        ours[f"stages.{number}.groups"] = groups
    record.take("max_train_steps", ours, "" if passes == 1 else "in updates; there forward passes")


def _translate_optimizer(record: TranslatedOptions, *, learns_token: bool) -> None:
    """Rates, decay, betas and schedule."""
    rate = record["learning_rate"]
    if not isinstance(rate, int | float) or rate <= 0:
        raise record.refuse("learning_rate", "it has no default there; give one, such as 1e-4")
    images = record["gradient_accumulation_steps"] * record["train_batch_size"]
    factor = images if record["scale_lr"] else 1
    record.take("scale_lr", {}, f"rates x {images}" if record["scale_lr"] else "")
    names = {"denoiser": "learning_rate"}
    if record["train_text_encoder"]:
        names["text_encoder"] = "learning_rate_text"
    elif record.is_given("learning_rate_text"):
        record.ignore("learning_rate_text", "no text encoder trains")
    if learns_token:
        names["tokens"] = "learning_rate_ti"
    betas = (record["adam_beta1"], record["adam_beta2"])
    for group, name in names.items():
        record.take(name, {f"optimizer.lr.{group}": record[name] * factor})
    decays = {f"optimizer.weight_decay.{group}": record["adam_weight_decay"] for group in names}
    record.take("adam_weight_decay", decays)
    own = {f"optimizer.betas.{group}": list(betas) for group in names if betas != (0.9, 0.999)}
    record.take("adam_beta1", own)
    record.take("adam_beta2", {})
    record.take("max_grad_norm", {"optimizer.clip": record["max_grad_norm"]})
    schedule = record["lr_scheduler"]
    if schedule not in SCHEDULES:
        raise record.refuse("lr_scheduler", f"expected one of {', '.join(SCHEDULES)}")
    record.take("lr_scheduler", {"optimizer.schedule": SCHEDULES[schedule]})
    if schedule == "constant":
        record.take("lr_warmup_steps", {}, "as there: constant has no warm-up")
    else:
        passes = record["gradient_accumulation_steps"]
        warmup = -(-record["lr_warmup_steps"] // passes)
        record.take("lr_warmup_steps", {"optimizer.warmup": warmup})
