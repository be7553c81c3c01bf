"""Fine-tune a text-to-image model with LoRA, DoRA, learned tokens, or all of them in stages.

    python train.py configs/toy_pti.toml                                      # TOML, then flags: --optimizer.name adamw --stages.0.steps 200
    python train.py --model MODEL --data.images photos --data.captions one --data.caption "a photo of TOK" --out runs/photos
    python train.py --compare runs/a runs/b                                   # paired difference of two runs on the same images and noise
    python train.py CONFIG.toml --preview-density                             # which noise levels a config trains on, as a table and a plot

`training_step` is the function to read first, then `train`. `train(config, loss=fn)` takes another loss (`--loss FILE:FN`),
`train(config, step=fn)` a whole step (`--step FILE:FN`).
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora_core import plugins
from lora_core.command_line import parse_command_line
from lora_core.config import Config, Stage
from lora_core.data.dataset import Batch, micro_batches
from lora_core.diffusion import losses, noise, prediction, validation
from lora_core.diffusion.losses import StepOutput
from lora_core.errors import UserError
from lora_core.runs import destination, pictures
from training import checkpoints, results
from training.setup import Session
from training.signals import Signals, Stopped

EXAMPLE = (
    "python train.py configs/toy_pti.toml --optimizer.name adamw --out runs/adamw\n\n"
    "or: python train.py --compare RUN_A RUN_B\n\nor: python train.py CONFIG.toml --preview-density"
)
PREVIEW_FLAG = "--preview-density"
Loss = Callable[[StepOutput], Tensor]
Step = Callable[[Session, Batch, Stage, int], Tensor]


def training_step(s: Session, batch: Batch, stage: Stage, step: int) -> Tensor:
    """[b] loss rows, weighed by noise level. All on the device, nothing read back: the step can be captured as a CUDA graph."""
    x = s.inputs(
        batch, stage, step
    )  # latents, noise and its level, text, sizes, keyed by image and visit: step_inputs.make_step_inputs
    s.key_dropout(x)
    x_t = noise.add_noise(x.x0, x.eps_in, x.level)
    cond = s.conditioning(x.text, x.sizes)
    out = s.denoise(x_t, x.level, cond, x.inpaint)
    out, target, row = prediction.to_loss_space(
        s.family.prediction, s.config.noise.space, out, x.x0, x.eps, x.level
    )
    lazy, t_max = s.lazy(x, x_t, cond), s.family.schedule.t_max
    rows = s.loss(
        StepOutput(
            out,
            target,
            x.x0,
            x.eps,
            x_t,
            x.level,
            row,
            x.mask,
            x.is_prior,
            step,
            lazy,
            t_max,
            s.family.prediction,
        )
    )
    s.check_rows(
        rows, s.loss_name, len(batch.keys)
    )  # before weighing, which would spread a scalar over the rows
    return rows * losses.loss_weights(
        s.config.weighting,
        x.level,
        s.family.prediction,
        space=s.config.noise.space,
        **s.config.weighting_arg,
    )


def optimizer_step(
    s: Session, batch: Batch, stage: Stage, number: int, step: Step
) -> tuple[Tensor, Tensor]:
    """(loss, norm of the gradient) of one step of the optimiser on a batch, cut into micro-batches. This is what a CUDA graph captures."""
    s.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=s.device)
    with s.steady():
        for micro in micro_batches(batch, s.config.accumulation):
            rows = step(s, micro, stage, number)
            s.check_rows(rows, getattr(step, "__name__", "step"), len(micro.keys))
            is_prior = s.inputs(micro, stage, number).is_prior
            part = losses.sum_losses(
                rows, is_prior, prior_weight=s.config.prior.weight, instances=s.instances
            )
            s.backward(part)
            total = total + part.detach()
    norm = s.update()
    s.control_norms(stage)
    return total, norm


def train(config: Config, *, loss: Loss | None = None, step: Step = training_step) -> Path:
    """The folder of the finished run. Raises UserError, before heavy work where that is possible, when the config cannot be carried out."""
    config, loss, step = _resolve_functions(config, loss, step)
    with Signals() as signals:
        s = Session(config, loss, None if step is training_step else step)
        with _resumable(s):
            if s.start == 0:
                results.run_validation(s, 0)
            with signals.deferred() as stop, s.progress(s.start) as bar:
                for stage, first, last in stage_spans(config.stages):
                    if s.start >= last:
                        continue
                    s.enter(stage)
                    begin = max(first, s.start)
                    for done, batch in enumerate(s.batches(begin, last), begin + 1):
                        s.set_rates(stage, done - 1 - first)
                        s.prepare(batch, stage, done - 1)
                        total, norm = s.replay(
                            functools.partial(optimizer_step, s, batch, stage, done - 1, step),
                            stage,
                        )
                        s.average_()
                        s.log(done, stage, total, norm, bar)
                        if _is_due(done, config.validation.every):
                            results.run_validation(s, done)
                        if _is_due(done, config.samples.every):
                            results.save_sample_grid(s, done)
                        if stop or _is_due(
                            done, config.save_every
                        ):  # last: a checkpoint says that all before it is done
                            checkpoints.write_checkpoint(s, done)
                        stop.raise_if_received()
            return results.finish_run(s)


def _resolve_functions(
    config: Config, loss: Loss | None, step: Step
) -> tuple[Config, Loss | None, Step]:
    """A config that names the loss and the step that the caller gives, so that it repeats the run where a file has them, and those two.

    The config's own step stands where the caller gives none, as its loss does in Session. --loss-arg is for the loss that is given as well.
    """
    if loss is not None:
        loss = losses.bind_arguments(loss, getattr(loss, "__name__", "loss"), config.loss_arg)
        name, args = losses.name_and_arguments(loss)
        config = replace(config, loss=name, loss_arg=args)
    if step is not training_step:
        return replace(config, step=plugins.name_function(step)), loss, step
    return config, loss, plugins.load_function(config.step, "step") if config.step else step


def stage_spans(stages: Sequence[Stage]) -> Iterator[tuple[Stage, int, int]]:
    """(stage, its first step, one after its last) in order."""
    first = 0
    for stage in stages:
        yield stage, first, first + stage.steps
        first += stage.steps


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _resumable(s: Session) -> Iterator[None]:
    """Says with an interruption how to go on, and lets the run's folder go at the end."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(
            checkpoints.resume_advice(s), getattr(stop, "number", signal.SIGINT)
        ) from None
    finally:
        s.lock.release()


def print_comparison(run_a: Path, run_b: Path) -> None:
    """Prints the paired difference B - A of the last validations of two runs, and writes RUN_B/compare_RUN_A.png."""
    rows = validation.compare_scores(run_a, run_b)
    print(validation.comparison_table(rows, (run_a.name, run_b.name)))
    bins, out = rows[:-1], run_b / f"compare_{run_a.name}.png"
    series = {f"{run_b.name} - {run_a.name}": ([r.t for r in bins], [r.mean for r in bins])}
    errors = {name: [r.error for r in bins] for name in series}
    pictures.plot_lines(
        series,
        out,
        axes=("timestep", "loss difference (std. error)"),
        title=f"{run_b.name} - {run_a.name}, paired on the same images and noise",
        errors=errors,
    )
    print(f"plot: {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 a mistake that the printed sentence explains, 128 + the number of a
    signal that ended it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["--compare"]:
            if len(words) != 3:
                raise UserError(
                    "--compare takes two run folders: python train.py --compare runs/a runs/b"
                )
            print_comparison(Path(words[1]), Path(words[2]))
            return 0
        preview = PREVIEW_FLAG in words
        config = parse_command_line(
            Config,
            [word for word in words if word != PREVIEW_FLAG],
            prog="train.py",
            example=EXAMPLE,
        )
        if preview:
            print(f"plot: {results.preview_noise_levels(config)}")
            return 0
        if config.overwrite and words and not words[0].startswith("-"):
            destination.check_apart_from_inputs(
                config.out, {"the config file": words[0]}, overwrite=True
            )
        print(f"done: {train(config)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stdout = None  # at its end Python would write to it once more
        with suppress(OSError):
            print(
                "error: the program that this output was piped to has ended (| head?); write the output to a file",
                file=sys.stderr,
            )
        return 2
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # SIGHUP: the terminal is gone
            print(f"interrupted: {str(stop) or 'nothing was saved'}", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
