"""kohya's optimizer, learning rates and their schedule as options of ours."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from lora_core.errors import UserError
from lora_core.optim import building
from training.translation.kohya_options import read_pairs
from training.translation.translated_options import TranslatedOptions

BITSANDBYTES = "bitsandbytes.optim."
# optimizer_type in lower case -> --optimizer.name
OPTIMIZERS = {
    "adamw": "adamw",
    "adamw8bit": f"{BITSANDBYTES}AdamW8bit",
    "pagedadamw": f"{BITSANDBYTES}PagedAdamW",
    "pagedadamw8bit": f"{BITSANDBYTES}PagedAdamW8bit",
    "pagedadamw32bit": f"{BITSANDBYTES}PagedAdamW32bit",
    "lion8bit": f"{BITSANDBYTES}Lion8bit",
    "pagedlion8bit": f"{BITSANDBYTES}PagedLion8bit",
    "ademamix8bit": f"{BITSANDBYTES}AdEMAMix8bit",
    "pagedademamix8bit": f"{BITSANDBYTES}PagedAdEMAMix8bit",
    "sgdnesterov8bit": f"{BITSANDBYTES}SGD8bit",
    "sgdnesterov": "torch.optim.SGD",
    "lion": "lion_pytorch.Lion",
    "prodigy": "prodigy",
    "dadaptation": "dadaptation.experimental.DAdaptAdamPreprint",
    "dadaptadampreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "dadaptadagrad": "dadaptation.DAdaptAdaGrad",
    "dadaptadam": "dadaptation.DAdaptAdam",
    "dadaptadan": "dadaptation.DAdaptAdan",
    "dadaptadanip": "dadaptation.experimental.DAdaptAdanIP",
    "dadaptlion": "dadaptation.DAdaptLion",
    "dadaptsgd": "dadaptation.DAdaptSGD",
    "adafactor": "transformers.optimization.Adafactor",
    "radamschedulefree": "schedulefree.RAdamScheduleFree",
    "adamwschedulefree": "schedulefree.AdamWScheduleFree",
    "sgdschedulefree": "schedulefree.SGDScheduleFree",
}
WITHOUT_GPU = {f"{BITSANDBYTES}AdamW8bit": "adamw", f"{BITSANDBYTES}PagedAdamW": "adamw"}
WITHOUT_GPU |= {f"{BITSANDBYTES}PagedAdamW8bit": "adamw", f"{BITSANDBYTES}PagedAdamW32bit": "adamw"}
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_restarts",
    "polynomial": "polynomial",
    "inverse_sqrt": "inverse_sqrt",
    "warmup_stable_decay": "wsd",
    "cosine_with_min_lr": "cosine",
}
LAST_RATE = 1e-7  # at which the polynomial of transformers ends


def translate_groups(options: TranslatedOptions) -> tuple[str, ...]:
    """Record the learning rates; returns the groups that train: those with a rate above 0."""
    usual = float(options["learning_rate"])
    texts = options["text_encoder_lr"]
    several = [float(rate) for rate in texts] if isinstance(texts, list) else []
    if isinstance(texts, list):
        texts = several[0] if several else None
    rates = {
        "denoiser": usual if options["unet_lr"] is None else float(options["unet_lr"]),
        "text_encoder": usual if texts is None else float(texts),
    }
    preset = read_pairs(options["network_args"], "network_args").get("preset", "")
    if options["network_train_unet_only"] or preset.startswith("unet-"):
        rates.pop("text_encoder")
    if options["network_train_text_encoder_only"]:
        rates.pop("denoiser")
    groups = tuple(group for group, rate in rates.items() if rate > 0)
    if not groups:
        raise UserError("kohya's options train nothing: every learning rate is 0; give one")
    names = {"denoiser": "unet_lr", "text_encoder": "text_encoder_lr"}
    for group, name in names.items():
        ours = {f"optimizer.lr.{group}": rates[group]} if group in groups else {}
        source = name if options.is_given(name) else "learning_rate"
        if options.is_given(name) or ours:
            remark = "" if ours else "not trained"
            if group == "text_encoder" and len(set(several)) > 1:
                options.change(source, ours, "one rate for all text encoders: the first")
            else:
                options.take(source, ours, remark)
    is_read = any(entry.name == "learning_rate" for entry in options.entries)
    if options.is_given("learning_rate") and not is_read:
        options.ignore("learning_rate", "unet_lr and text_encoder_lr have all the groups")
    for name in ("network_train_unet_only", "network_train_text_encoder_only"):
        if options[name]:
            options.take(name, {"stages.0.groups": list(groups)})
    options.take("network_args", {"stages.0.groups": list(groups)}, "the groups that train")
    return groups


def translate_optimizer(options: TranslatedOptions, groups: Sequence[str]) -> None:
    """Record the optimizer with its arguments, and clipping. Raises UserError for an Adafactor that
    sets its own rates.
    """
    wanted, source = _optimizer_type(options)
    name = OPTIMIZERS.get(wanted.lower(), wanted)
    arguments = read_pairs(options["optimizer_args"], "optimizer_args")
    values = {key: _read_literal(text) for key, text in arguments.items()}
    if name == OPTIMIZERS["adafactor"] and values.get("relative_step", True):
        raise options.refuse(
            source,
            "with relative_step it sets its own rates; give optimizer_args relative_step=False "
            "scale_parameter=False warmup_init=False, or another optimizer",
        )
    if wanted.lower() == "sgdnesterov":
        values = {"momentum": 0.9, "nesterov": True} | values
    if name in WITHOUT_GPU and not _has_bitsandbytes():
        options.change(
            source,
            {"optimizer.name": WITHOUT_GPU[name]},
            "its state in fp32; with pip install bitsandbytes and a GPU its own class is taken",
        )
        name = WITHOUT_GPU[name]
    else:
        options.take(source, {"optimizer.name": name})
    for key in ("weight_decay", "betas"):
        several = values.get(key, 0.0)
        several = several if key == "betas" and isinstance(several, list | tuple) else [several]
        if not all(isinstance(value, int | float) for value in several):
            raise options.refuse("optimizer_args", f"{key} is {arguments[key]}; expected numbers")
    ours: dict[str, Any] = {}
    decay = values.pop("weight_decay", _default_decay(name))
    ours |= {f"optimizer.weight_decay.{group}": float(decay) for group in groups}
    if "betas" in values:
        given = values.pop("betas")
        betas = [float(beta) for beta in (given if isinstance(given, list | tuple) else [given])]
        if len(betas) == 2:
            ours |= {f"optimizer.betas.{group}": betas for group in groups}
        else:
            ours["optimizer.args.betas"] = betas
    ours |= {f"optimizer.args.{key}": value for key, value in values.items()}
    options.take("optimizer_args", ours, "" if arguments else "the class's own decay")
    options.take("max_grad_norm", {"optimizer.clip": float(options["max_grad_norm"])})


def _optimizer_type(options: TranslatedOptions) -> tuple[str, str]:
    """(the optimizer's name, the option that says it)."""
    for switch, name in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if options[switch]:
            return name, switch
    return options["optimizer_type"] or "AdamW", "optimizer_type"


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None and torch.cuda.is_available()


def _read_literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _default_decay(name: str) -> float:
    """The weight decay of an optimizer's class; 0 for a class without, or one that is not here."""
    if name == "adamw":
        return 0.01
    try:
        argument = building.optimizer_arguments(name).get("weight_decay")
    except UserError:  # said by the checks of the run
        return 0.0
    is_number = argument is not None and isinstance(argument.default, int | float)
    return float(argument.default) if argument is not None and is_number else 0.0


def translate_schedule(options: TranslatedOptions, steps: int, rate: float) -> None:
    """Record the schedule of the learning rate and the warm-up. Raises UserError for schedules that
    are not here, and for a warm-up that kohya's script refuses, too.
    """
    name = str(options["lr_scheduler"])
    if options["lr_scheduler_type"]:
        raise options.refuse(
            "lr_scheduler_type", "classes are not read; write --optimizer.schedule my.py:fn"
        )
    if name not in SCHEDULES:
        raise options.refuse(
            "lr_scheduler", f"choose {', '.join(SCHEDULES)}, or --optimizer.schedule my.py:fn"
        )
    warmup = _count_steps(options["lr_warmup_steps"], steps)
    if name == "constant" and warmup:
        raise options.refuse(
            "lr_warmup_steps",
            'its script refuses a warm-up with lr_scheduler = "constant"; take '
            '"constant_with_warmup" or leave the warm-up out',
        )
    ours: dict[str, Any] = {"optimizer.schedule": SCHEDULES[name]}
    if name == "cosine_with_min_lr":
        options.change("lr_scheduler", ours, "to 0, and not to lr_scheduler_min_lr_ratio")
    elif name == "warmup_stable_decay":
        options.change("lr_scheduler", ours, "its decay is linear, not half a cosine")
    else:
        options.take("lr_scheduler", ours)
    if options.is_given("lr_warmup_steps"):
        options.take("lr_warmup_steps", {"optimizer.warmup": warmup})
    arguments: dict[str, tuple[str, Any]] = {}
    if name == "cosine_with_restarts" and options["lr_scheduler_num_cycles"] != 1:
        arguments["lr_scheduler_num_cycles"] = "cycles", int(options["lr_scheduler_num_cycles"])
    elif name == "polynomial":
        power = float(options["lr_scheduler_power"])
        arguments["lr_scheduler_power"] = "power", power
        options.take("lr_scheduler", {"optimizer.schedule_args.end": LAST_RATE / rate})
    elif name == "inverse_sqrt" and options["lr_scheduler_timescale"]:
        arguments["lr_scheduler_timescale"] = "timescale", int(options["lr_scheduler_timescale"])
    elif name == "warmup_stable_decay":
        decay = _count_steps(options["lr_decay_steps"], steps)
        share = decay / max(1, steps - warmup)
        arguments["lr_decay_steps"] = "decay", share
        if options["lr_scheduler_min_lr_ratio"]:
            ratio = float(options["lr_scheduler_min_lr_ratio"])
            arguments["lr_scheduler_min_lr_ratio"] = "end", ratio
    for source, (argument, value) in arguments.items():
        options.take(source, {f"optimizer.schedule_args.{argument}": value})
    for source in ("num_cycles", "power", "timescale", "min_lr_ratio"):
        if options.is_given(f"lr_scheduler_{source}") and f"lr_scheduler_{source}" not in arguments:
            options.ignore(f"lr_scheduler_{source}", f"not read by {name}")
    if options.is_given("lr_decay_steps") and "lr_decay_steps" not in arguments:
        options.ignore("lr_decay_steps", f"not read by {name}")


def _count_steps(value: Any, steps: int) -> int:
    """Steps of a number of steps, or of a share of all, which is a number with a point."""
    if isinstance(value, str):
        value = float(value) if "." in value else int(value)
    return int(value * steps) if isinstance(value, float) else int(value or 0)
