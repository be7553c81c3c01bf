"""What values kohya's options may have: a whole number, a text, ...; told when files are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora_core.errors import UserError
from lora_core.text import is_number
from training.translation.translated_options import show_value

WHOLE, NUMBER, TEXT, TRUTH = "a whole number", "a number", "a text", "true or false"
TEXTS = "a list of texts"
NUMBERS = "a number or a list of numbers"
SIDES = 'a number of pixels, or width and height as in "512,768"'
PROMPTS = "a file or a list of texts"
ANY = ""  # read by nobody here
SHOWN = 60  # characters of a value in a message

# Options whose default is None, or says less than what may be given -> what is expected.
KINDS: dict[str, str] = {
    **dict.fromkeys(
        (
            "text_encoder_batch_size", "save_last_n_epochs_state", "save_last_n_steps_state",
            "initial_epoch", "initial_step", "validation_seed", "validate_every_n_steps",
            "validate_every_n_epochs", "max_validation_steps", "clip_skip", "max_token_length",
            "save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio",
            "save_last_n_epochs", "save_last_n_steps", "sample_every_n_steps",
            "sample_every_n_epochs", "seed", "max_train_epochs", "network_dim",
            "lr_scheduler_timescale", "multires_noise_iterations", "min_timestep", "max_timestep",
            "t5xxl_max_token_length", "batch_size", "num_repeats",
        ),
        WHOLE,
    ),
    **dict.fromkeys(
        (
            "token_warmup_step", "lr_warmup_steps", "lr_decay_steps", "network_dropout",
            "scale_weight_norms", "unet_lr", "lr_scheduler_min_lr_ratio", "min_snr_gamma",
            "noise_offset", "adaptive_noise_scale", "ip_noise_gamma", "v_pred_like_loss",
        ),
        NUMBER,
    ),
    **dict.fromkeys(("optimizer_args", "network_args", "lr_scheduler_args"), TEXTS),
    "base_weights": TEXTS,
    "base_weights_multiplier": NUMBERS,
    "text_encoder_lr": NUMBERS,
    "resolution": SIDES,
    "sample_prompts": PROMPTS,
    "is_reg": TRUTH,
    "face_crop_aug_range": ANY,
    "custom_attributes": ANY,
}  # fmt: skip
AT_LEAST_ONE = (
    "batch_size", "train_batch_size", "gradient_accumulation_steps", "max_train_steps",
    "max_train_epochs", "num_repeats", "dataset_repeats", "network_dim", "min_bucket_reso",
    "max_bucket_reso", "bucket_reso_steps",
)  # fmt: skip
SIGNED = ("logit_mean", "mode_scale", "adaptive_noise_scale", "network_multiplier")
CHOICES: dict[str, tuple[Any, ...]] = {
    "max_token_length": (75, 150, 225),
    "save_model_as": ("safetensors", "ckpt", "pt"),
}


def expected_kind(name: str, default: Any, *, is_read: bool = True) -> str:
    """What the value of an option is to be. `is_read`: False for options that nobody here reads,
    of which those without a default may be anything.
    """
    if name in KINDS:
        return KINDS[name]
    if isinstance(default, bool):
        return TRUTH
    if default is None:
        return TEXT if is_read else ANY
    return {int: WHOLE, float: NUMBER}.get(type(default), TEXT)


def check_value(name: str, value: Any, kind: str, where: str) -> Any:
    """The value of an option, a number where a text is one. `where`: what a message begins with,
    such as "train.toml: ". Raises UserError for another kind of value and one out of range.
    """
    last = name.rpartition(".")[2]
    found = _read_as(kind, value)
    least = 1 if last in AT_LEAST_ONE else 0
    expected = kind
    if kind in (WHOLE, NUMBER) and last not in SIGNED:
        expected = f"{kind} of at least {least}"
        found = None if found is None or found < least else found
    if last in CHOICES:
        found = found if found in CHOICES[last] else None
        expected = f"one of {', '.join(map(str, CHOICES[last]))}"
    if found is None:
        shown = show_value(value)
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        raise UserError(f"{where}{name} = {shown} of kohya: expected {expected}")
    return found


def _read_as(kind: str, value: Any) -> Any:
    """The value as that kind; None where it is of another."""
    if kind == WHOLE:
        number = _read_number(value)
        return int(number) if number is not None and number == int(number) else None
    if kind == NUMBER:
        return _read_number(value)
    if kind in (TEXT, TRUTH):
        return value if isinstance(value, str if kind == TEXT else bool) else None
    if kind == SIDES:
        return value if split_resolution(value) else None
    if kind == NUMBERS:
        several = value if isinstance(value, list) else [value]
        return value if all(_read_number(item) is not None for item in several) else None
    if kind in (TEXTS, PROMPTS):
        several = value if isinstance(value, list) else [value]
        return value if all(isinstance(item, str) for item in several) else None
    return value


def _read_number(value: Any) -> int | float | None:
    """A finite number, also one that is written as a text."""
    is_text = isinstance(value, str) and is_number(value)
    if isinstance(value, bool) or not (is_text or isinstance(value, int | float)):
        return None
    if not math.isfinite(number := _as_float(value)):
        return None
    if is_text:
        return int(value) if value.strip().isdigit() else number
    found: int | float = value
    return found


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def split_resolution(value: Any) -> list[int]:
    """[side] or [width, height] of 512, "512", "512,768" or [512, 768]; [] for anything else."""
    parts = value.split(",") if isinstance(value, str) else value
    several = list(parts) if isinstance(parts, list | tuple) else [parts]
    sides = [_read_as(WHOLE, part) for part in several]
    return sides if len(sides) in (1, 2) and all(side and side > 0 for side in sides) else []


def check_tables(table: Mapping[str, Any], file: str) -> None:
    """Raises UserError for a dataset file whose sections are not those that kohya reads."""
    if not isinstance(table.get("general", {}), dict):
        raise UserError(f"{file}: general is no section; write [general] and its options below")
    datasets = _check_rows(table, "datasets", "[[datasets]]", file)
    for dataset in datasets:
        _check_rows(dataset, "subsets", "[[datasets.subsets]]", file)


def _check_rows(table: Mapping[str, Any], name: str, heading: str, file: str) -> list[Any]:
    rows = table.get(name, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{file}: {name} is no list of sections; write {heading}, with two brackets, above "
            "the options of each"
        )
    return rows
