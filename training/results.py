"""Results of a run: its files, images, plots, summary.json and README.md; the preview of a config's
noise levels.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from lora_core import distributed, formats, tokens
from lora_core.adapters import custom_files, injection
from lora_core.adapters.adapted_layer import adapted_layers
from lora_core.adapters.folded_weights import folding_error, merged_state_dict
from lora_core.adapters.kinds import KINDS, DoRA
from lora_core.adapters.weight_updates import LowRank
from lora_core.config import Config
from lora_core.data.captions import TYPED
from lora_core.data.records import every_image
from lora_core.diffusion import densities, validation
from lora_core.diffusion.validation import Score
from lora_core.formats import dora_readers
from lora_core.formats.known_formats import CUSTOM_KIND, TOKEN_NAMES
from lora_core.kernels import choice
from lora_core.report import write_report
from lora_core.runs import card, pictures, reports
from lora_core.runs.card import ModelCard
from lora_core.runs.run_folder import Run
from lora_core.runs.shared_options import find_folders, hide_folders
from lora_core.settings import scheduler_changes
from lora_core.text import hide_home
from lora_core.toml import to_table, to_toml
from models import read_schedule, save_family
from training import nonfinite
from training.checkpoints import Checkpoints
from training.checks import config_checks
from training.headers.manager_files import add_manager_files
from training.learned_tokens import describe_learned_tokens
from training.log import Log
from training.memory.peak_memory import describe_peak, measure_peak
from training.networks import base_weights
from training.probes import effects
from training.samples import SampleImages, before_after_grid, save_sample_grid
from training.scores import (
    Scorer,
    comparable_scores,
    hardly_changed,
    loss_table,
    losses_by_timestep,
)
from training.setup import Model
from training.shared_config import shared_config

TEXTS = (".md", ".html", ".json", ".jsonl")  # endings of the texts that a run writes
A1111_FAMILIES = ("sd", "sdxl", "flux")  # whose LoRAs A1111, or Forge, was seen to read
Before = tuple[Sequence[Score], Sequence[Score]]  # scores before and after


def finish_run(log: Log, checkpoints: Checkpoints, scorer: Scorer, samples: SampleImages) -> Path:
    """Write the run's files, images, plots, summary.json, README.md and report.html, print losses
    and learned tokens, and return the run's folder.
    """
    run, config, model = log.run, log.config, log.model
    done = config.steps
    nonfinite.check_steps_taken(log.skipped, done)
    nonfinite.check_finite_state(model, checkpoints.optimization, done, run)
    log.validate(done, scorer)
    if distributed.read_once(run.newest_step) != done:
        checkpoints.write(done, log)
    if not run.writes:
        _draw_share(samples, run, done)
        return run.folder
    with checkpoints.optimization.averaged(), model.residency.trained_together():
        files = _save_files(run.folder, done, config, model, checkpoints)
        learned = _report_tokens(model)
        dora_errors = _reader_errors(model, files)
    drawn = _draw_sheets(log, samples)
    is_painted_over = model.family.inpainting  # samples show a training image's surroundings
    files += add_manager_files(config, run.folder, drawn, shows_training=is_painted_over)
    peak = measure_peak(model.device)
    words = samples.data.scored.words
    reports.plot_metrics(run.folder, words)
    scores, note = comparable_scores(log.scores, done)
    summary = {
        "seconds": round(time.perf_counter() - checkpoints.began, 2),
        "steps": done,
        "peak_memory": peak,
        "val_loss_before": validation.mean_loss(scores[0]) if scores else None,
        "val_loss_after": validation.mean_loss(scores[1]) if scores else None,
        **_summary_notes(log, checkpoints, note),
        "files": {file.name: file.stat().st_size for file in files},
        "tokens": learned,
        "images": len({record.path for record in samples.data.training.records}),
        "scored": words,
    }
    run.write("summary.json", json.dumps(summary, indent=1))
    log.book.finish(plain_results(summary))
    _print_results(scores, note, words)
    for count, why in log.skipped.reasons():
        print(f"{count} of {done} steps were skipped: {why}")
    for line in describe_learned_tokens(learned, model.placeholders):
        print(line)
    if dora_errors:
        described = dora_readers.describe_reader_errors(dora_errors)
        print(f"note: {described}; {dora_readers.HOW_TO_CONVERT}", file=sys.stderr)
    own = _make_card(log, checkpoints, samples, scores)
    training = {**own.training, "peak memory": describe_peak(peak)}
    own = replace(own, training=training, dora_errors=dora_errors)
    card.write_card(own, run.folder)
    write_report([run.folder])
    effects.check_outputs(log, samples)
    if config.push_to_hub:
        print(f"uploaded: {_upload_run(run.folder, config, samples)}")
    return run.folder


def _draw_sheets(log: Log, samples: SampleImages) -> list[Image.Image]:
    """Write the last samples and before_after.png; returns the samples."""
    run, done = log.run, log.config.steps
    drawn = samples.draw(samples.prompts)
    log.add_samples(done, save_sample_grid(samples, run, done, drawn))
    title = f"{run.folder.name}: before and after {done} steps"
    sheet = before_after_grid(samples, drawn, title)
    path = run.folder / "before_after.png"
    pictures.save_sheet(sheet, path, step=done, is_private=not samples.are_public)
    if samples.are_public:
        log.book.add_images(done, "before_after", [""], [sheet])
    return drawn


def plain_results(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of summary.json that a run is compared by: seconds, steps and losses."""
    wanted = ("seconds", "steps", "val_loss_before", "val_loss_after")
    found = {name: summary.get(name) for name in wanted}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _draw_share(samples: SampleImages, run: Run, done: int) -> None:
    """The share of another process than the first in `finish_run`: images, and its peak."""
    drawn = samples.draw(samples.prompts)
    save_sample_grid(samples, run, done, drawn)
    before_after_grid(samples, drawn, "")
    measure_peak(samples.model.device)


def _save_files(
    folder: Path, done: int, config: Config, model: Model, checkpoints: Checkpoints
) -> list[Path]:
    """The adapter and token files; for adapters that these cannot hold, the whole model as well;
    for those of a class from outside, their own tensors.
    """
    files = checkpoints.save_files(done, folder)
    if not model.has_factors and all(map(custom_files.is_foldable, model.adapted.values())):
        save_trained_model(model, config, folder / "model")
    if config.adapter.kind in KINDS or not model.adapted:
        return files
    learned = checkpoints.learned_state(done)
    own = folder / f"{folder.name}{custom_files.CUSTOM_ADAPTER_ENDING}"
    header = {CUSTOM_KIND: hide_home(config.adapter.kind), **learned.metadata}
    if learned.token_names:
        header[TOKEN_NAMES] = json.dumps(list(learned.token_names), ensure_ascii=False)
    return [*files, custom_files.save_adapters(model.adapted, own, header)]


def _reader_errors(model: Model, files: Sequence[Path]) -> dict[str, float]:
    """Tool -> its error of the run's DoRAs, where a file under kohya's names has any."""
    kohya = [file for file in files if file.name == formats.run_file_names(file.parent.name)[1]]
    if not kohya or not any(map(injection.has_dora, model.adapted.values())):
        return {}
    return dora_readers.reader_errors(_dora_layers(model))


def _dora_layers(model: Model) -> Iterator[tuple[LowRank, Tensor]]:
    """The DoRAs and their base weights, one at a time: a quantized weight is unpacked."""
    for module in model.adapted.values():
        for layer in adapted_layers(module):
            for adapter in layer.adapters.values():
                if isinstance(adapter, DoRA):
                    weight = layer.base.weight.detach().to(adapter.magnitude.device)
                    yield adapter.state(), weight


def save_trained_model(model: Model, config: Config, folder: Path) -> None:
    """Write the whole model in the diffusers layout, adapters folded into its weights, and print
    the error of that; token rows are in their own file.
    """
    networks = base_weights.networks_to_fold(config, model.adapted)
    states = {name: merged_state_dict(part) for name, part in networks.items()}
    for name, part in networks.items():
        error = folding_error(part, states[name])
        print(
            f"{folder.name}/: {name} with its adapters folded in, error of the update {error:.1e}"
        )
    for name in states.keys() & model.embeddings.keys():
        if networks[name] is not model.adapted[name]:  # read again, without the rows
            continue
        encoder = model.encoders[name]
        states[name] = tokens.strip_token_rows(states[name], model.embeddings[name], encoder)
    save_family(model.family, config.model, folder, states, config.model_config)


def _report_tokens(model: Model) -> list[dict[str, Any]]:
    """Each learned token's text encoder, norm, distance from its start, and nearest words."""
    found = []
    for name, embedding in model.embeddings.items():
        encoder = model.family.layout.encoders[name]
        for report in tokens.report_tokens(embedding, model.family.tokenizers[name]):
            found.append({"encoder": encoder, **report._asdict()})
    return found


def _print_results(scores: Before | None, note: str, words: str) -> None:
    if scores:
        print(loss_table(*scores, words))
        if hardly_changed(*scores):
            advice = "train longer or with a higher learning rate"
            print(f"warning: the loss hardly changed; {advice}", file=sys.stderr)
    if note or not scores:
        print(note or "no validation, so no loss before and after")


def _summary_notes(log: Log, checkpoints: Checkpoints, note: str) -> dict[str, Any]:
    """Optional entries of summary.json: changes on resuming, skipped steps, a remark, the user's
    function in place of a kernel."""
    notes: dict[str, Any] = {}
    if checkpoints.changes:
        notes["changes"] = checkpoints.changes
    if note:
        notes["compared"] = note
    if (candidate := choice.current_candidate()) is not None:
        notes["kernel_candidate"] = {"op": candidate.op, "function": candidate.name}
        print(candidate.describe_calls())
    if log.config.precision == "fp16" or log.skipped.total:
        notes["skipped"] = log.skipped.total
    return notes


# ---------------------------------------------------------------- the run's README.md


def _upload_run(folder: Path, config: Config, samples: SampleImages) -> str:
    """Uploads the run's files, with the shared form of its config, without folders of this disk in
    texts, and with headers without the user's captions; returns the address.
    """
    ignore = list(card.IGNORED)
    if not samples.are_public:
        ignore += ["samples/*", "before_after.png"]  # and report.html has none of their images
    folders = find_folders(to_table(config), folder)
    contents: dict[str, bytes] = {}
    for file in folder.iterdir():
        if file.suffix in TEXTS and (text := file.read_text(encoding="utf-8")):
            hidden = hide_folders(text, folders)
            contents |= {file.name: hidden.encode()} if hidden != text else {}
    contents["config.toml"] = to_toml(shared_config(config, folder)).encode()
    public = config.files.public
    return card.push_to_hub(
        folder, config.push_to_hub, ignore=ignore, contents=contents, public=public
    )


def _typed_caption(samples: SampleImages) -> str:
    """The first caption where it is an option of the run, or shown on demand; else ""."""
    first = samples.data.training.records[0]
    is_shown = first.source in TYPED or samples.config.samples.show_data
    return first.plain_caption if is_shown else ""


def _make_card(
    log: Log, checkpoints: Checkpoints, samples: SampleImages, scores: Before | None
) -> ModelCard:
    """The model card that becomes the run's README.md; `scores`: before and after, if any."""
    config, model, family = log.config, log.model, log.model.family
    data = samples.data
    ends = {}
    if len(model.encoders) > 1:  # one encoder alone is not pooled
        for name, encoder in model.encoders.items():
            if encoder.config.eos_token_id == 2:  # type: ignore[union-attr]
                ends[name] = family.tokenizers[name].eos_token_id
    base = hide_home(config.model)
    if config.push_to_hub and Path(config.model).exists():  # of no use elsewhere
        base = Path(config.model).resolve().name
    return ModelCard(
        base,
        family.pipeline,
        encoders={name: family.layout.encoders[name] for name in model.embeddings},
        ends=ends,
        words={p.word: p.names for p in model.placeholders},
        layers={p.word: p.layers for p in model.placeholders if p.layers},
        prompts=samples.public_prompts,
        instance_prompt=_typed_caption(samples),
        shows_images=samples.are_public,
        sampling=_pipeline_arguments(config),
        loads_tokens=getattr(family, "pipeline_loads_tokens", True),
        a1111=family.layout.family in A1111_FAMILIES,
        training=_training_table(log, checkpoints, samples),
        validation=losses_by_timestep(*scores) if scores else (),
        scored=data.scored.words,
        repo=config.push_to_hub,
        license=config.files.license,
        tags=[tag.strip() for tag in config.files.tags.split(",") if tag.strip()],
        description=config.files.description,
        rerun=config_checks.rerun_reason(config),
    )


def _pipeline_arguments(config: Config) -> dict[str, float]:
    """The arguments of the diffusers pipeline's call that draws as the run's samples."""
    look, length = config.samples, config.max_sequence_length
    arguments = {"num_inference_steps": look.steps, "guidance_scale": look.guidance}
    return arguments | ({"max_sequence_length": length} if length else {})


def _training_table(log: Log, checkpoints: Checkpoints, samples: SampleImages) -> dict[str, Any]:
    """How the run was trained: name -> value."""
    c, a, model = log.config, log.config.adapter, log.model
    stages = [f"{stage.steps} steps of {' + '.join(stage.groups)}" for stage in c.stages]
    images = len({record.path for record in every_image(samples.data.training.records)})
    settings = checkpoints.optimization.settings
    rates = [f"{name} {own['lr']:g}" for name, own in settings.items()]
    table: dict[str, Any] = {
        "images": f"{images}, at {c.data.resolution} pixels",
        "stages": "; ".join(stages),
        "batch": f"{c.images_per_step}{' pairs' if c.data.pairs else ''}",
        "optimizer": c.optimizer.name,
        "learning rates": ", ".join(rates),
        "precision": c.precision,
        "seed": c.seed,
    }
    if model.adapted:
        factors = f", rank {a.rank}, alpha {a.alpha or a.rank:g}" if model.has_factors else ""
        table["adapter"] = f"{a.kind}{factors}"
    table["loss"] = model.objective.removeprefix("loss: ")
    if c.step:
        table["step"] = hide_home(c.step)
    if checkpoints.changes:
        table["resumed with changes"] = "; ".join(checkpoints.changes)
    if log.skipped.overflows:
        table["steps skipped in fp16"] = log.skipped.overflows
    if log.skipped.nonfinite:
        table["steps skipped as not finite"] = log.skipped.nonfinite
    return table


# ---------------------------------------------------------------- --preview-density


def preview_noise_levels(config: Config) -> Path:
    """Print and plot the density and weights of the noise levels that a config trains on; returns
    the plot's path, next to OUT. Reads the model's scheduler, no weights.
    """
    config_checks.check_config(config, needs_images=False)
    n = config.noise
    schedule, prediction = read_schedule(
        config.model,
        scheduler_changes(n.prediction, zero_terminal_snr=n.zero_terminal_snr),
        config.data.resolution if n.dynamic_shift else 0,
        config.model_config,
        config.family,
    )
    objective = reports.Objective(
        schedule,
        prediction,
        densities.bind_density(n.density, **n.density_args),
        n.low,
        n.high,
        n.shift,
        n.space,
        config.loss,
        config.weighting,
        config.weighting_arg,
    )
    out = Path(config.out)
    return reports.preview_density(objective, out.with_name(f"{out.name}_density.png"))
