"""What a run shows: validation scores, sample grids, before_after.png, the files and summary.json. Functions of an open Session."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from lora_core import tokens
from lora_core.adapters import custom_files, injection
from lora_core.adapters.kinds import KINDS
from lora_core.config import Config
from lora_core.data.dataset import Example, collate
from lora_core.data.images import read_image
from lora_core.diffusion import generation, losses, noise, validation
from lora_core.diffusion.generation import Sizes
from lora_core.diffusion.noise import NoiseLevel
from lora_core.diffusion.validation import Score
from lora_core.formats import save_run
from lora_core.runs import card, pictures, reports
from lora_core.runs.card import ModelCard
from lora_core.runs.pictures import ImageRow
from lora_core.settings import scheduler_changes
from models import read_schedule, save_family
from training import checkpoints, config_checks, nonfinite

if TYPE_CHECKING:
    from training.setup import Session

COLUMNS = 5  # pictures in a row


def run_validation(s: Session, done: int) -> None:
    """Scores the images of `s.scored` after `done` steps, as many at once as in training; rows go to val.jsonl and metrics.jsonl."""
    if s.config.validation.every < 0 or done in s.scores:
        return
    found: list[Score] = []
    count, together = len(s.val_folder), s.config.batch_size
    with s.evaluating(), s.averaged():
        for first in range(0, count, together):
            start = max(
                0, min(first, count - together)
            )  # the last batch is as large as the others: a GEMM's bits depend on its number of rows
            scores = _score_batch(s, range(start, min(start + together, count)))
            found += [
                score for i, score in enumerate(scores) if start + i % min(together, count) >= first
            ]
    s.scores[done] = sorted(
        found, key=lambda score: (score.draw, score.bin)
    )  # images in order within each
    for score in s.scores[done]:
        s.run.log({"step": done, **score._asdict()}, to="val")
    before, after = _on_common_images(s.scores[min(s.scores)], s.scores[done])
    change = (
        {"val_change": validation.mean_loss(after) / validation.mean_loss(before) - 1}
        if after
        else {}
    )  # none: resumed with other images
    s.log_book.add(done, val_loss=validation.mean_loss(s.scores[done]), **change)
    s.flush()


def _score_batch(s: Session, images: range) -> list[Score]:
    """The scores of some images of `val_folder`."""
    batch, side = collate([_latent_example(s, i) for i in images]), s.val_folder.settings.resolution
    cond = s.family.encode_prompts(
        [tokens.bind_placeholders(caption, s.abstractions) for caption in batch.captions]
    )
    cond = s.family.add_size_embeddings(
        cond, Sizes(batch.original_sizes, batch.crops, (side, side)), s.config.noise.guidance
    )
    inpaint = None
    if s.family.inpainting:
        grey = torch.zeros(len(images), 3, side, side, device=s.device)
        inpaint = generation.encode_masked_image(s.family, grey, torch.ones_like(grey[:, :1]))

    def denoise(x_t: Tensor, level: NoiseLevel, _rows: Tensor) -> Tensor:
        return s.denoise(x_t, level, cond, inpaint)

    x0, v = batch.pixels.to(s.device), s.config.validation
    return validation.score_latents(
        denoise,
        x0,
        batch.keys,
        s.family.schedule,
        s.family.prediction,
        bins=v.bins,
        draws=v.draws,
        seed=v.seed,
    )


def _latent_example(s: Session, i: int) -> Example:
    """An image of `val_folder`, the mean of its latents [c, h, w] in place of the pixels; decoded and encoded once a run, when first asked for."""
    if i not in s.val_latents:
        example = s.val_folder.example(i, 0)
        s.val_latents[i] = replace(
            example, pixels=s.family.encode_images(example.pixels[None])[0][0].cpu()
        )
    return s.val_latents[i]


def generate_samples(
    s: Session, prompts: Sequence[str], *, base: bool = False, only_tokens: bool = False
) -> list[Image.Image]:
    """One picture for each prompt, seeds 0, 1, 2 ...; of the base model, of the learned tokens alone, or of the model as it is.

    An inpainting model paints the middle of the training images anew.
    """
    word = s.config.samples.base_word
    bound = [
        _ordinary_prompt(s, prompt, word)
        if base
        else tokens.bind_placeholders(prompt, s.abstractions)
        for prompt in prompts
    ]
    with (
        s.evaluating(),
        s.averaged(),
        _adapters_disabled(s) if base or only_tokens else ExitStack(),
    ):
        out: list[Image.Image] = []
        together = (
            1 if s.family.inpainting else s.config.batch_size
        )  # what fits in training fits here
        for i in range(0, len(bound), together):
            part = bound[i : i + together]
            out += pictures.to_images(
                generation.generate_images(
                    s.family, part, range(i, i + len(part)), s.recipe, **s.hole(i)
                )
            )
    return out


def sample_prompts(s: Session) -> list[str]:
    """The prompts of the config, else the captions of the first training images."""
    return (
        list(s.config.samples.prompts)
        or list(dict.fromkeys(r.captions[0] for r in s.folder.records))[:COLUMNS]
    )


def save_sample_grid(s: Session, done: int, drawn: Sequence[Image.Image] = ()) -> None:
    """OUT/samples/step_NNNNNN.png; of `drawn`, where the pictures are there already."""
    chosen = sample_prompts(s)
    sheet = pictures.draw_grid(
        list(_wrap_row(ImageRow("", drawn or generate_samples(s, chosen), chosen))),
        title=f"after {done} steps",
    )
    pictures.save_png(sheet, s.run.folder / "samples" / f"step_{done:06d}.png")


def before_after_grid(s: Session, drawn: Sequence[Image.Image]) -> Image.Image:
    """Reference images, base model, tokens alone, everything (`drawn`), and everything in new places: one row each.

    More than COLUMNS prompts go on below, where before and after of one prompt are again one above the other.
    """
    chosen, new = sample_prompts(s), list(s.config.samples.new_prompts)
    references = list({r.path: r.use_alpha for r in s.folder.records}.items())[:COLUMNS]
    rows = [
        ImageRow(
            "before: the base model",
            generate_samples(s, chosen, base=True),
            [_ordinary_prompt(s, p, s.config.samples.base_word) for p in chosen],
        )
    ]
    if s.abstractions and s.trained:
        rows.append(
            ImageRow("learned tokens alone", generate_samples(s, chosen, only_tokens=True), chosen)
        )
    what = " + ".join(
        [
            *(["tokens"] if s.abstractions else []),
            *([s.config.adapter.kind.split(":")[-1]] if s.trained else []),
        ]
    )
    rows.append(ImageRow(f"after: {what}", drawn, chosen))
    together = zip(*(_wrap_row(row) for row in rows), strict=True)
    sheet = [
        ImageRow(
            "what it learned from",
            [_center_crop(path, use_alpha=alpha) for path, alpha in references],
        ),
        *itertools.chain.from_iterable(together),
    ]
    sheet += _wrap_row(ImageRow("after: new places", generate_samples(s, new), new)) if new else ()
    return pictures.draw_grid(
        sheet, title=f"{s.run.folder.name}: before and after {s.config.steps} steps"
    )


def finish_run(s: Session) -> Path:
    """Writes the run's files, pictures, plots and summary.json, prints what came of it, and returns the folder."""
    done = s.config.steps
    nonfinite.check_steps_taken(s)
    nonfinite.check_finite_state(s, done)
    run_validation(s, done)
    if s.saved != done:
        checkpoints.write_checkpoint(s, done)
    with s.averaged():
        learned = checkpoints.learned_state(s, done)
        files = save_run(learned, s.run.folder, layout=s.family.layout)
        if not s.has_factors:
            save_trained_model(s, s.run.folder / "model")
            files += _save_custom_adapters(s, learned.metadata)
        told = [
            {"encoder": s.family.layout.encoders[name], **report._asdict()}
            for name, e in s.embeddings.items()
            for report in tokens.report_tokens(e, s.family.tokenizers[name])
        ]
    drawn = generate_samples(s, sample_prompts(s))
    save_sample_grid(s, done, drawn)
    pictures.save_png(before_after_grid(s, drawn), s.run.folder / "before_after.png")
    reports.plot_metrics(s.run.folder, s.scored.words)
    scores, note = _comparable_scores(s, done)
    summary = {
        "seconds": round(time.perf_counter() - s.began, 2),
        "steps": done,
        "val_loss_before": validation.mean_loss(scores[0]) if scores else None,
        "val_loss_after": validation.mean_loss(scores[1]) if scores else None,
        **_summary_notes(s, note),
        "files": {file.name: file.stat().st_size for file in files},
        "tokens": told,
    }
    s.run.write("summary.json", json.dumps(summary, indent=1))
    if scores:
        print(_loss_table(*scores, s.scored.words))
    if note or not scores:
        print(note or "no validation, so no loss before and after")
    if s.skips[0]:
        print(f"{s.skips[0]} of {done} steps were skipped: their gradients overflowed in fp16")
    for entry in told:
        words = ", ".join(
            f"{word.removesuffix('</w>')} {cosine:.2f}" for word, cosine in entry["nearest"]
        )
        encoder = f" of {entry['encoder']}" if len(s.embeddings) > 1 else ""
        print(
            f"{entry['name']}{encoder}: norm {entry['norm']:.3f}, moved {entry['drift']:.3f}, nearest {words}"
        )
    card.write_card(_make_card(s, scores), s.run.folder)
    if s.config.push_to_hub:
        print(f"uploaded: {card.push_to_hub(s.run.folder, s.config.push_to_hub)}")
    return s.run.folder


def _comparable_scores(s: Session, done: int) -> tuple[tuple[list[Score], list[Score]] | None, str]:
    """((scores before, scores after), a remark) of the images that both have: a run may be resumed with other ones.

    No scores without a validation before the first step or after the last one, and where the two have no image in common.
    """
    if not s.scores.keys() >= {0, done}:
        return None, ""
    first, last = s.scores[0], s.scores[done]
    before, after = _on_common_images(first, last)
    if not before:
        return (
            None,
            f"no loss before and after: the validation after {done} steps has none of the images of the first one",
        )
    if len(before) == len(first) and len(after) == len(last):
        return (first, last), ""
    both = len({score.key for score in before})
    return (
        (before, after),
        f"before and after are those of the {both} image{'s' * (both != 1)} that both validations have",
    )


def _on_common_images(
    first: Sequence[Score], last: Sequence[Score]
) -> tuple[list[Score], list[Score]]:
    """The scores of two validations on the images that both have: a run may be resumed with other ones."""
    both = {score.key for score in first} & {score.key for score in last}
    before, after = ([score for score in scores if score.key in both] for scores in (first, last))
    return before, after


def _summary_notes(s: Session, note: str) -> dict[str, Any]:
    """What summary.json says of a run that was resumed with changes or skipped steps."""
    remarks: dict[str, Any] = {"changes": s.changes} if s.changes else {}
    remarks |= {"compared": note} if note else {}
    return remarks | ({} if s.scaler is None else {"skipped": s.skips[0]})


def _save_custom_adapters(s: Session, header: Mapping[str, str]) -> list[Path]:
    """The file of adapters of one's own kind that have no low-rank form; none for a full fine-tune, which is in model/ whole."""
    if s.config.adapter.kind in KINDS:
        return []
    return [
        custom_files.save_adapters(
            s.trained,
            s.run.folder / f"{s.run.folder.name}{custom_files.CUSTOM_ADAPTER_ENDING}",
            header,
        )
    ]


def _make_card(s: Session, scores: tuple[list[Score], list[Score]] | None) -> ModelCard:
    """What the run's README.md says; `scores` before and after, where there are any."""
    c, a = s.config, s.config.adapter
    stages = "; ".join(f"{stage.steps} steps of {' + '.join(stage.groups)}" for stage in c.stages)
    images = len({record.path for record in s.folder.records})
    how = {
        "images": f"{images}, at {c.data.resolution} pixels",
        "stages": stages,
        "batch": s.instances,
        "optimizer": c.optimizer.name,
    }
    how |= {
        "learning rates": ", ".join(f"{name} {rate:g}" for name, rate in s.rates.items()),
        "precision": c.precision,
        "seed": c.seed,
    }
    how |= (
        {
            "adapter": a.kind
            if not s.has_factors
            else f"{a.kind}, rank {a.rank}, alpha {a.alpha or a.rank:g}"
        }
        if s.trained
        else {}
    )
    how |= {
        "loss": losses.describe_loss(
            c.weighting, s.family.prediction, c.noise.space, loss=c.loss, **c.weighting_arg
        ).removeprefix("loss: ")
    }
    how |= {"step": c.step} if c.step else {}
    how |= {"resumed with changes": "; ".join(s.changes)} if s.changes else {}
    how |= {"steps skipped in fp16": s.skips[0]} if s.skips[0] else {}
    configs: dict[str, Any] = {name: encoder.config for name, encoder in s.encoders.items()}
    legacy = [
        name for name, config in configs.items() if config.eos_token_id == 2 and len(configs) > 1
    ]  # one encoder alone is not pooled
    return ModelCard(
        c.model,
        s.family.pipeline,
        encoders={name: s.family.layout.encoders[name] for name in s.embeddings},
        ends={name: s.family.tokenizers[name].eos_token_id for name in legacy},
        words={a.word: a.names for a in s.abstractions},
        prompts=sample_prompts(s),
        instance_prompt=s.folder.records[0].captions[0],
        sampling={"num_inference_steps": c.samples.steps, "guidance_scale": c.samples.guidance},
        training=how,
        validation=_losses_by_timestep(*scores) if scores else (),
        scored=s.scored.words,
        repo=c.push_to_hub,
        rerun=config_checks.rerun_reason(c),
    )


def save_trained_model(s: Session, folder: Path) -> None:
    """The whole model in the diffusers layout, trained parts with what they have learned; token rows are in their own file."""
    states = {name: injection.merged_state_dict(module) for name, module in s.trained.items()}
    for name in states.keys() & s.embeddings.keys():
        states[name] = tokens.strip_token_rows(states[name], s.embeddings[name], s.encoders[name])
    save_family(s.family, s.config.model, folder, states, s.config.model_config)


def preview_noise_levels(config: Config) -> Path:
    """Prints which noise levels a config trains on and how much they count; the plot beside its OUT. Reads the model's scheduler, no weights."""
    config_checks.check_config(config, needs_images=False)
    n = config.noise
    schedule, row = read_schedule(
        config.model,
        scheduler_changes(n.prediction, zero_terminal_snr=n.zero_terminal_snr),
        config.data.resolution if n.dynamic_shift else 0,
        config.model_config,
    )
    o = reports.Objective(
        schedule,
        row,
        noise.bind_density(n.density, **n.density_args),
        n.low,
        n.high,
        n.shift,
        n.space,
        config.loss,
        config.weighting,
        config.weighting_arg,
    )
    out = Path(config.out)
    return reports.preview_density(o, out.with_name(f"{out.name}_density.png"))


def _losses_by_timestep(
    first: Sequence[Score], last: Sequence[Score]
) -> list[tuple[str, float, float]]:
    """(timestep, loss before, loss after), and the means of all."""
    bins = zip(
        validation.mean_by_timestep(first).items(),
        validation.mean_by_timestep(last).values(),
        strict=True,
    )
    return [
        *((validation.format_timestep(t), b, a) for (t, b), a in bins),
        ("all", validation.mean_loss(first), validation.mean_loss(last)),
    ]


def _wrap_row(row: ImageRow) -> Iterator[ImageRow]:
    """The row cut into rows of at most COLUMNS images, each with its captions; the label stands at each."""
    for i in range(0, len(row.images), COLUMNS):
        yield ImageRow(row.label, row.images[i : i + COLUMNS], row.captions[i : i + COLUMNS])


def _loss_table(first: Sequence[Score], last: Sequence[Score], words: str) -> str:
    lines = [
        f"{'timestep':>9} {'before':>9} {'after':>9} {'change':>8}   {words} at fixed timesteps and noise"
    ]
    for name, before, after in _losses_by_timestep(first, last):
        lines.append(f"{name:>9} {before:9.5f} {after:9.5f} {after / before - 1:+8.1%}")
    return "\n".join(lines)


def _ordinary_prompt(s: Session, prompt: str, word: str) -> str:
    """The prompt for a model that knows no placeholder: the word, else the initialising words, in its place."""
    for a in s.abstractions:
        ordinary = "" if tokens.is_random_init(a.init) else a.init
        prompt = tokens.bind_placeholders(
            prompt, [tokens.Placeholder(a.word, (word or ordinary,), "zero")]
        )
    return " ".join(prompt.split())


def _center_crop(path: Path, *, use_alpha: bool = False) -> Image.Image:
    """The training image as training reads it, centre-cropped."""
    image = read_image(path, use_alpha=use_alpha).image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


@contextmanager
def _adapters_disabled(s: Session) -> Iterator[None]:
    with ExitStack() as stack:
        for module in s.trained.values():
            stack.enter_context(injection.disable_adapters(module))
        yield
