"""kohya's files, checkpoints, sample images and logs as options of ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lora_core.flags.flag_values import KOHYA_SAMPLERS
from training.translation.kohya_objective import FILE_PRECISIONS
from training.translation.kohya_prompts import read_sample_prompts
from training.translation.translated_options import TranslatedOptions

SAMPLE_STEPS, SAMPLE_SCALE = 30, 7.5  # of its sample images
METADATA = {  # of the header -> option of [files]
    "metadata_title": "title",
    "metadata_author": "author",
    "metadata_description": "description",
    "metadata_license": "license",
    "metadata_tags": "tags",
    "metadata_trigger_phrase": "trigger",
}
SAMPLE_EVERY = ("sample_every_n_epochs", "sample_every_n_steps")  # the first one wins
NAME = "last"  # of a model without output_name


def translate_outputs(options: TranslatedOptions, steps: int, epoch: int, version: str) -> None:
    """Record where the run is written, its checkpoints, samples and logs. `epoch`: its steps;
    `version`: "flux..." for a model that reads a guidance scale.
    """
    folder, name = options["output_dir"], options["output_name"] or NAME
    out = str(Path(folder or "runs") / name)
    options.take("output_name", {"out": out}, f"files: {name}.safetensors in that folder")
    if options.is_given("output_dir"):
        options.take("output_dir", {"out": out})
    _record_checkpoints(options, steps, epoch)
    _record_precision(options)
    if options["save_model_as"] not in ("safetensors", None):
        options.change("save_model_as", {}, "safetensors, which every reader of .pt reads as well")
    elif options.is_given("save_model_as"):
        options.take("save_model_as", {})
    if options["log_with"]:
        report = "tensorboard" if options["log_with"] == "all" else options["log_with"]
        options.take("log_with", {"report": report})
    if options["huggingface_repo_id"]:
        options.take("huggingface_repo_id", {"push_to_hub": options["huggingface_repo_id"]})
        if options["huggingface_repo_visibility"] == "public":
            options.take("huggingface_repo_visibility", {"files.public": True})
    for name, ours in METADATA.items():
        if options[name]:
            options.take(name, {f"files.{ours}": str(options[name])})
    if options["no_metadata"]:
        options.take("no_metadata", {"files.header": "short"})
    if options["seed"] is None:
        options.change("seed", {"seed": 0}, "drawn anew each time there")
    else:
        options.take("seed", {"seed": int(options["seed"])})
    _record_samples(options, steps, epoch, version)


def _record_checkpoints(options: TranslatedOptions, steps: int, epoch: int) -> None:
    every, source = 0, ""
    if options["save_n_epoch_ratio"]:
        epochs = math.ceil(steps / epoch)
        every = (epochs // int(options["save_n_epoch_ratio"]) or 1) * epoch
        source = "save_n_epoch_ratio"
    elif options["save_every_n_epochs"]:
        every, source = int(options["save_every_n_epochs"]) * epoch, "save_every_n_epochs"
    if options["save_every_n_steps"]:
        if source:
            options.leave_out(source, "checkpoints come every save_every_n_steps alone")
        every, source = int(options["save_every_n_steps"]), "save_every_n_steps"
    if not source:
        return
    keep = max(1, math.ceil(steps / every))
    ours: dict[str, Any] = {"save_every": every} if every <= steps else {}
    options.take(source, ours | {"keep": keep} if ours else {}, "all are kept")
    for name, unit in (("save_last_n_epochs", epoch), ("save_last_n_steps", 1)):
        if options[name]:
            kept = max(1, int(options[name]) * unit // every)
            options.take(name, {"keep": kept})


def _record_precision(options: TranslatedOptions) -> None:
    """Record the precision of the files."""
    if not options.is_given("save_precision"):
        return
    precision = FILE_PRECISIONS.get(str(options["save_precision"]))
    if precision is None:
        raise options.refuse("save_precision", f"choose {', '.join(FILE_PRECISIONS)}")
    options.take("save_precision", {"files.precision": precision})


def _record_samples(options: TranslatedOptions, steps: int, epoch: int, version: str) -> None:
    """Record the sample images: prompts, how often, and the settings that all of them share."""
    given = [name for name in SAMPLE_EVERY if options[name]]
    if not options["sample_prompts"]:
        for name in (*given, "sample_sampler"):
            if options.is_given(name):
                options.ignore(name, "there are no sample_prompts, so kohya's script draws nothing")
        return
    for name in given[:1]:
        every = int(options[name]) * (epoch if name == "sample_every_n_epochs" else 1)
        options.take(name, {"samples.every": every} if every <= steps else {})
    for name in given[1:]:
        options.ignore(name, f"{given[0]} wins")
    prompts = read_sample_prompts(options["sample_prompts"])
    if not prompts:
        options.ignore("sample_prompts", "it has no prompt")
        return
    first = prompts[0].options
    ours: dict[str, Any] = {"samples.prompts": [prompt.prompt for prompt in prompts]}
    ours["samples.steps"] = first.get("sample_steps", SAMPLE_STEPS)
    ours["samples.guidance"] = float(first.get("scale", SAMPLE_SCALE))
    if version.startswith("flux"):
        usual = options["guidance_scale"]
        ours["samples.guidance"] = float(first.get("guidance_scale", usual))
    if first.get("negative_prompt") and ours["samples.guidance"] != 1:
        ours["samples.negative"] = first["negative_prompt"]
    left = {"width", "height", "seed"} & first.keys()
    remarks = [f"{', '.join(sorted(left))}: those of the run"] if left else []
    if any(prompt.options != first for prompt in prompts):
        remarks.append("steps, scale and negative prompt of the first prompt for all")
    if remarks:
        options.change("sample_prompts", ours, "; ".join(remarks))
    else:
        options.take("sample_prompts", ours)
    sampler = str(first.get("sample_sampler", options["sample_sampler"]))
    if sampler in KOHYA_SAMPLERS:
        options.take("sample_sampler", {"samples.sampler": KOHYA_SAMPLERS[sampler]})
    else:
        options.change("sample_sampler", {"samples.sampler": "ddim"}, f"{sampler} is not here")
