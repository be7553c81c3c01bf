"""The stages, learning rates and schedules of a command line of lora_pti."""

from __future__ import annotations

from typing import Any

from training.translation.translated_options import TranslatedOptions

SCHEDULES = {  # of diffusers' get_scheduler -> ours
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_restarts",
    "polynomial": "polynomial",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
HIGHEST_TUNED = 0.8  # of the schedule; the noisiest fifth is left out in the tuning


def translate_stages(record: TranslatedOptions) -> None:
    """Record steps, groups, rates and schedules of both stages. Raises UserError."""
    batch, passes = record["train_batch_size"], record["gradient_accumulation_steps"]
    for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps_tuning"):
        if record[name] < 1:
            raise record.refuse(name, "expected at least 1")
    record.take("train_batch_size", {"batch_size": batch})
    inverts = bool(
        record["perform_inversion"]
        and record["placeholder_tokens"]
        and record["max_train_steps_ti"] > 0
    )
    first = 1 if inverts else 0
    _translate_counts(record, passes, inverts=inverts)
    _translate_rates(record, batch * passes, first, inverts=inverts)
    if inverts:
        _translate_schedule(record, "lr_scheduler", "lr_warmup_steps", 0, passes)
    else:
        record.ignore("lr_scheduler", "there is no inversion")
    _translate_schedule(record, "lr_scheduler_lora", "lr_warmup_steps_lora", first, 1)
    if record.is_given("mask_temperature") or record["mask_temperature"] != 1:
        ours = {f"stages.{first}.mask_temperature": record["mask_temperature"]}
        record.take("mask_temperature", ours, "in the tuning only, as there")


def _translate_counts(record: TranslatedOptions, passes: int, *, inverts: bool) -> None:
    """The steps and groups of both stages."""
    steps = record["max_train_steps_ti"]
    updates = -(-steps // passes)
    first = 1 if inverts else 0
    if inverts:
        ours: dict[str, Any] = {"stages.0.steps": updates, "stages.0.groups": ["tokens"]}
        why = f"there {steps} forward passes, {updates} updates; here a step is an update"
        record.take("perform_inversion", ours, "stage 0")
        record.change("max_train_steps_ti", {"stages.0.steps": updates}, why)
    else:
        record.take("perform_inversion", {}, "no stage learns tokens alone")
        if record.is_given("max_train_steps_ti"):
            record.ignore("max_train_steps_ti", "there is no inversion")
    groups = ["denoiser"]
    if record["train_text_encoder"]:
        groups.append("text_encoder")
    if record["continue_inversion"] and record["placeholder_tokens"]:
        groups.append("tokens")
    stage = f"stages.{first}"
    ours = {f"{stage}.steps": record["max_train_steps_tuning"], f"{stage}.groups": groups}
    images = passes * record["train_batch_size"]
    why = f"as many updates as there, each of {images} images; there of "
    why += f"{record['train_batch_size']}, as with an accumulation of 1"
    tuning = ours | {f"{stage}.high": HIGHEST_TUNED}
    if "tokens" in groups:
        tuning[f"{stage}.norm"] = "none"
    (record.change if passes > 1 else record.take)("max_train_steps_tuning", tuning, why)
    record.take("train_text_encoder", {f"{stage}.groups": groups})
    why = "in both stages; there in the inversion alone"
    record.change("gradient_accumulation_steps", {"accumulation": passes}, why)
    save = record["save_steps"]
    why = "checkpoints/N with everything to resume; there step_N.safetensors"
    record.change("save_steps", {"save_every": save}, why)


def _translate_rates(record: TranslatedOptions, images: int, first: int, *, inverts: bool) -> None:
    """Learning rates, of which --scale_lr makes `images` times as much, and weight decays."""
    factor = images if record["scale_lr"] else 1
    how = f"x {images} by --scale_lr" if factor > 1 else ""
    why = f"rates x {images}, accumulation x batch" if record["scale_lr"] else ""
    record.take("scale_lr", {}, why)
    names = {"denoiser": "learning_rate_unet"}
    if record["train_text_encoder"]:
        names["text_encoder"] = "learning_rate_text"
    elif record.is_given("learning_rate_text"):
        record.ignore("learning_rate_text", "no text encoder trains")
    for group, name in names.items():
        record.take(name, {f"optimizer.lr.{group}": record[name] * factor}, how)
    decay = record["weight_decay_lora"]
    decays: dict[str, Any] = {f"optimizer.weight_decay.{group}": decay for group in names}
    continues = bool(record["continue_inversion"] and record["placeholder_tokens"])
    rate = record["learning_rate_ti"] * factor
    if inverts or continues:
        record.take("learning_rate_ti", {"optimizer.lr.tokens": rate}, how)
        ours = {"optimizer.weight_decay.tokens": record["weight_decay_ti"]}
        record.take("weight_decay_ti", ours)
    if continues:
        own = record["continue_inversion_lr"]
        ours = {f"stages.{first}.lr.tokens": float(rate if own is None else own)}
        why = "not scaled, as there" if own is not None else "that of the inversion"
        record.take("continue_inversion_lr", ours, why)
        why = "only the rows of the tokens train; there the whole table, of which they are saved"
        record.change("continue_inversion", {}, why)
        decays[f"stages.{first}.weight_decay.tokens"] = decay
    record.take("weight_decay_lora", decays)


def _translate_schedule(
    record: TranslatedOptions, name: str, warmup: str, stage: int, passes: int
) -> None:
    """A stage's schedule and warm-up, whose steps are forward passes there."""
    schedule, steps = str(record[name]), record[warmup]
    if schedule not in SCHEDULES:
        raise record.refuse(name, f"expected one of {', '.join(SCHEDULES)}")
    record.take(name, {f"stages.{stage}.schedule": SCHEDULES[schedule]})
    if steps and schedule == "constant":
        record.leave_out(warmup, "as there: constant has no warm-up; constant_with_warmup has")
        return
    ours = {f"stages.{stage}.warmup": -(-steps // passes)}
    if steps and passes > 1:
        record.change(warmup, ours, "in updates; there in forward passes")
    else:
        record.take(warmup, ours)
