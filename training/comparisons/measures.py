"""Measures that finished runs are compared by (--metric): losses and errors of the network at the
timesteps and noise of the validation, and scores of images that the trained models draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.config import Stage, WeightingName
from lora_core.data.dataset import collate
from lora_core.data.images import image_to_pixels, read_image
from lora_core.diffusion import losses, validation
from lora_core.diffusion.losses import StepOutput
from lora_core.diffusion.validation import Score
from lora_core.errors import UserError
from lora_core.kernels.reference import wide_dtype
from lora_core.plugins import check_call, explain_errors, find_plugin, function_name
from lora_core.runs.comparison import NO_TIME, Measured, read_recorded_run, recorded_losses
from training.comparisons.trained_runs import TrainedRun, find_trained_run, open_trained_run
from training.inputs.step_inputs import InputSource, list_visits, make_step_inputs
from training.step import Loss, Step

RECORDED, CLIP = "loss", "clip:"
AT_ONCE = 256  # training images in memory
# Options by which a run draws images; measures of images compare runs with the same ones.
DRAWN_BY = ("sampler", "sampler_args", "steps", "guidance", "negative")
# (images [n, 3, h, w] in [-1, 1], their prompts) -> one number for each image
SampleScore = Callable[[Tensor, Sequence[str]], Tensor | Sequence[float]]


def x0_error(step: StepOutput) -> Tensor:
    """[b] mean squared error of the predicted clean latents."""
    dtype = wide_dtype(step.out.dtype)
    return (step.x0_pred.to(dtype) - step.x0.to(dtype)).square().flatten(1).mean(1)


MEASURES: dict[str, Loss] = {"x0": x0_error, **losses.LOSSES}


@dataclass(frozen=True)
class Measure:
    """A measure by its name."""

    name: str
    higher_is_better: bool = False
    loss: Loss | None = None  # of the network; None: of the images, or what the runs recorded
    of_samples: Callable[[TrainedRun, Sequence[Any]], Sequence[float]] | None = None


def find_measures(specs: Sequence[str], args: Mapping[str, Any]) -> list[Measure]:
    """The measures that --metric names, with the arguments of --metric-arg.

    "loss" is the recorded one; "x0", a loss by its name, and a function of a file are
    computed anew, and "clip:MODEL" is two measures of images. Raises UserError for an unknown
    name, and for a loss of pairs.
    """
    if args and len(specs) != 1:
        raise UserError("--metric-arg belongs to one --metric; give it with one measure alone")
    found: list[Measure] = []
    for spec in specs:
        if spec == RECORDED or spec.startswith(CLIP):
            if args:
                raise UserError(f"--metric {spec} takes no argument; leave --metric-arg out")
            is_clip = spec.startswith(CLIP)
            found += _clip_measures(spec.removeprefix(CLIP)) if is_clip else [Measure(RECORDED)]
            continue
        known = {**MEASURES, RECORDED: None, f"{CLIP}MODEL": None}
        function = find_plugin(spec, known, "measure", args)
        if getattr(function, "reads_pairs", False) is True:
            raise UserError(
                f"--metric {spec} compares the two images of pairs, and validations have the "
                "winners alone; take a measure of single images"
            )
        is_better = getattr(function, "higher_is_better", False) is True
        if getattr(function, "reads_samples", False) is True:
            form = "fn(images, prompts)"
            check_call(function, f"--metric {spec}", form, "images", "prompts")
            found.append(Measure(spec, is_better, of_samples=_score_with(function, spec)))
        else:
            check_call(function, f"--metric {spec}", "fn(step)", "step")
            found.append(Measure(spec, is_better, loss=function))
    return found


def measure_runs(
    folders: Sequence[Path], measures: Sequence[Measure], step: Step
) -> list[Measured]:
    """Each measure of each run; a run is opened once, if a measure needs its model.

    `step` is train.training_step. Raises UserError for runs that draw images differently, where
    images are measured, and for batches of different sizes, where a loss compares their images.
    """
    if any(measure.of_samples for measure in measures):
        drawn_by = [f"samples.{name}" for name in DRAWN_BY]
        _check_same_options(folders, drawn_by, "write the same into config.toml")
    if any(getattr(measure.loss, "whole_batch", False) for measure in measures):
        _check_same_options(folders, ["batch_size"], "train with the same, or take another")
    if any(_needs_model(measure) for measure in measures):
        for folder in folders:  # before the first of them is opened, which takes long
            find_trained_run(folder)
    rows = {folder: _measure_run(folder, measures, step) for folder in folders}
    found = []
    for i, measure in enumerate(measures):
        scores = {folder: own[i] for folder, own in rows.items()}
        found.append(Measured(measure.name, measure.higher_is_better, scores))
    return found


def _measure_run(folder: Path, measures: Sequence[Measure], step: Step) -> list[Sequence[Score]]:
    """Each measure of one run; its model is freed when this returns."""
    needs_model = any(_needs_model(measure) for measure in measures)
    trained = open_trained_run(folder) if needs_model else None
    images: list[Any] = []  # are drawn once for all measures of them
    found: list[Sequence[Score]] = []
    for measure in measures:
        if trained is not None and measure.loss:
            found.append(score_by_loss(trained, measure.loss, step))
        elif trained is not None and measure.of_samples:
            images = images or draw_validation_prompts(trained)
            found.append(_score_images(trained, images, measure))
        else:
            found.append(recorded_losses(read_recorded_run(folder)))
    return found


def _needs_model(measure: Measure) -> bool:
    return bool(measure.loss or measure.of_samples)


# ---------------------------------------------------------------- of the network


def score_by_loss(trained: TrainedRun, loss: Loss, step: Step) -> list[Score]:
    """The unweighted loss of each validation image at the timesteps and noise of the validation.

    The loss gets the same inputs as in training: `step` computes it.
    """
    model, scorer = trained.model, trained.scorer
    # whole batches, no weights by noise level, and the network's own output
    config = replace(
        trained.config, accumulation=1, weighting=WeightingName("none"), weighting_arg={}
    )
    config = replace(config, noise=replace(config.noise, space="model"), cuda_graph=False)
    images = trained.data.validation
    data = replace(trained.data, training=images, class_images=None)
    reads_attention = getattr(loss, "reads_attention", False)
    source = InputSource(config, data, model, reads_attention=reads_attention)
    v = config.validation
    if model.residency.moves:
        with model.evaluating():
            source.encode_ahead(list_visits(config, data, range(len(images))))

    def score_batch(indices: range) -> list[Score]:
        batch = collate([images.example(i, 0) for i in indices])
        stage = Stage(groups=("denoiser",))
        (inputs,) = make_step_inputs(source, batch, stage, 0, check=False)
        x0 = torch.stack([scorer.encode_image(i).pixels for i in indices]).to(model.device)
        inpaint = scorer.repaint_all(len(indices))
        found = []
        for at in validation.noise_points(
            x0, batch.keys, model.family.schedule, bins=v.bins, draws=v.draws, seed=v.seed
        ):
            x = replace(inputs, x0=x0, eps=at.eps, eps_in=at.eps, level=at.level, inpaint=inpaint)
            with explain_errors(f"--metric {function_name(loss)}", loss):
                values = step(model, x, config, loss)
            if not values.isfinite().all():
                raise UserError(
                    f"measure {function_name(loss)} gives {values.tolist()} for validation images "
                    f"at timestep {validation.format_timestep(at.t)}; expected finite numbers"
                )
            rows = zip(batch.keys, values.double().tolist())
            found += [Score(key, at.draw, at.bin, at.t, value) for key, value in rows]
        return found

    return scorer.score(score_batch)


# ---------------------------------------------------------------- of images


def draw_validation_prompts(trained: TrainedRun) -> list[Any]:
    """One image for the caption of each validation image, with seeds 0, 1, 2 ..."""
    return trained.samples.draw(validation_prompts(trained))


def validation_prompts(trained: TrainedRun) -> list[str]:
    """The captions of the validation images."""
    return [record.plain_caption for record in trained.data.validation.records]


def _check_same_options(folders: Sequence[Path], options: Sequence[str], remedy: str) -> None:
    """Raises UserError for the first of the options in which runs differ."""
    runs = [read_recorded_run(folder) for folder in folders]
    for run in runs[1:]:
        for name in options:
            values = [own.settings.get(name) for own in (runs[0], run)]
            if values[0] != values[1]:
                raise UserError(
                    f"{runs[0].folder} would be measured with {name} {values[0]}, {run.folder} "
                    f"with {values[1]}; the measure depends on it: {remedy}"
                )


def _score_images(trained: TrainedRun, images: Sequence[Any], measure: Measure) -> list[Score]:
    """A measure of images, one for each validation image."""
    assert measure.of_samples is not None
    values = measure.of_samples(trained, images)
    keys = [record.key for record in trained.data.validation.records]
    return [Score(key, 0, -1, NO_TIME, value) for key, value in zip(keys, values, strict=True)]


def _score_with(
    function: SampleScore, spec: str
) -> Callable[[TrainedRun, Sequence[Any]], list[float]]:
    """The measure of images by a function of their pixels and prompts."""

    def score(trained: TrainedRun, images: Sequence[Any]) -> list[float]:
        pixels = torch.stack([image_to_pixels(image) for image in images])
        with torch.no_grad(), explain_errors(f"--metric {spec}", function):
            given = function(pixels, validation_prompts(trained))
        try:
            values = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--metric {spec} returned {type(given).__name__}, expected {len(images)} numbers, "
                "one for each image"
            ) from error
        if values.shape != (len(images),) or not values.isfinite().all():
            raise UserError(
                f"--metric {spec} returned {list(values.shape)} numbers, expected {len(images)} "
                "finite ones, one for each image"
            )
        return values.double().tolist()

    return score


def _clip_measures(path: str) -> list[Measure]:
    """Cosines of CLIP's embeddings: of an image and its prompt, in ordinary words, and the mean
    over the training images of those of an image and a training image (arXiv 2208.12242: CLIP-T and
    CLIP-I).
    """
    if not path:
        raise UserError("--metric clip: names no model; expected clip:MODEL, a folder or hub id")
    from models.image_similarity import ImageSimilarity  # its library takes seconds to import

    clip = ImageSimilarity(path)

    def to_prompts(trained: TrainedRun, images: Sequence[Any]) -> list[float]:
        ordinary = trained.samples.ordinary_prompt
        texts = clip.embed_texts([ordinary(text) for text in validation_prompts(trained)])
        return (clip.embed_images(images) * texts).sum(1).tolist()

    def to_training_images(trained: TrainedRun, images: Sequence[Any]) -> list[float]:
        records = {record.file: record.use_alpha for record in trained.data.training.records}
        files = list(records.items())
        own = []
        for start in range(0, len(files), AT_ONCE):  # not all of a large set in memory
            part = files[start : start + AT_ONCE]
            opened = [read_image(file, use_alpha=alpha).image for file, alpha in part]
            own.append(clip.embed_images(opened))
        return (clip.embed_images(images) @ torch.cat(own).T).mean(1).tolist()

    return [
        Measure(f"clip text {Path(path).name}", True, of_samples=to_prompts),
        Measure(f"clip image {Path(path).name}", True, of_samples=to_training_images),
    ]
