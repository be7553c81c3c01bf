"""Which loss is better: trains a config with several losses and seeds, and compares them.

    python -m benchmarks.loss_lab configs/toy_pti.toml --loss mse --loss huber:delta=0.2 \
        --loss examples/my_loss.py:edges --seeds 4 --jobs 2 --out runs/lab

Further flags are train.py's (--optimizer.name adamw). Each run is a process of train.py in
OUT/LOSS_SEED; started again, the lab leaves finished runs alone and goes on with interrupted ones.
Every loss is compared with the first one, on the same images and noise, and OUT/page.html shows all
runs. Runs draw one sample image; the latents of all are cached in OUT/cache. A config that trains
on a concept of toy/concepts without --validation.images is validated on drawings of the concept in
new places.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import train
from lora_core.config import Config, Stage
from lora_core.diffusion.losses import LOSSES
from lora_core.errors import UserError, exit_status
from lora_core.flags.command_line import parse_command_line
from lora_core.plugins import find_plugin
from lora_core.report import write_report
from lora_core.runs.comparison import Comparison, RecordedRun, config_changes, read_recorded_run
from lora_core.runs.run_folder import is_run
from lora_core.toml import flatten_table, parse_toml, to_table, to_toml
from toy.concepts import draw_concepts
from toy.demo import draw_held_out
from training.comparisons import comparing, measures

USAGE = "python -m benchmarks.loss_lab CONFIG.toml --loss A --loss B --seeds 4"
LAST_LINES = 5  # of a failed run's log


@dataclass(frozen=True)
class LabLoss:
    """A loss of the grid: its name or file.py:function, its arguments, and a name for folders."""

    name: str
    arguments: dict[str, Any]
    label: str


def parse_losses(specs: Sequence[str]) -> list[LabLoss]:
    """The losses of --loss: a name or file.py:function, and after a colon its arguments, such as
    huber:delta=0.2,schedule=snr. Raises UserError for a loss that does not exist.
    """
    found: list[LabLoss] = []
    for spec in specs:
        name, colon, words = spec.rpartition(":")
        if not colon or "=" not in words:
            name, words = spec, ""
        arguments = dict(map(_parse_argument, filter(None, words.split(","))))
        find_plugin(name, LOSSES, "loss", arguments)
        label = re.sub(r"[^\w.=-]+", "_", ":".join(filter(None, [name.split(":")[-1], words])))
        if label in {loss.label for loss in found}:
            raise UserError(f"--loss {spec} is there twice, or has the name of another; rename it")
        found.append(LabLoss(name, arguments, label))
    if len(found) < 2:
        raise UserError(f"a comparison needs at least two --loss, got {len(found)}: {USAGE}")
    return found


def _parse_argument(text: str) -> tuple[str, Any]:
    """(name, value) of delta=0.2; a value that is no TOML is a text."""
    name, _, value = text.partition("=")
    try:
        return name, parse_toml(f"value = {value}", "the argument")["value"]
    except UserError:
        return name, value


def scale_stages(stages: Sequence[Stage], steps: int) -> tuple[Stage, ...]:
    """The stages with their lengths in the same proportions and the sum `steps`, each at least 1.

    Raises UserError where there are more stages than steps.
    """
    if steps < len(stages):
        raise UserError(f"--steps {steps} is less than the {len(stages)} stages of the config")
    total = sum(stage.steps for stage in stages)
    scaled, before, end = [], 0, 0
    for i, stage in enumerate(stages):
        before += stage.steps
        start, left = end, len(stages) - 1 - i
        end = min(max(round(before * steps / total), start + 1), steps - left)
        scaled.append(replace(stage, steps=end - start))
    return tuple(scaled)


def plan_runs(base: Config, losses: Sequence[LabLoss], seeds: int, out: Path) -> list[Config]:
    """The configs of the grid, the seeds of one loss after one another: runs of one seed have the
    same latents, which those at work at the same time would each encode.
    """
    word = base.tokens.words[0] if base.trains("tokens") else "TOK"
    samples = replace(
        base.samples,
        prompts=(*base.samples.prompts, f"a photo of {word}")[:1],
        new_prompts=(),
        strengths=(1.0,),
        every=0,
    )
    base = replace(
        base,
        samples=samples,
        data=replace(base.data, cache=base.data.cache or str(out / "cache")),
        save_every=base.save_every or max(1, base.steps // 4),
        keep=1,
        overwrite=False,
        resume=False,
    )
    planned = []
    for loss in losses:
        for seed in range(base.seed, base.seed + seeds):
            own = replace(base, loss=loss.name, loss_arg=loss.arguments, seed=seed)
            planned.append(replace(own, out=str(run_folder(out, loss, seed))))
    return planned


def run_folder(out: Path, loss: LabLoss, seed: int) -> Path:
    """The folder of one run."""
    return out / f"{loss.label}_{seed}"


def add_held_out_images(config: Config, out: Path) -> Config:
    """The config with held-out drawings in OUT/held_out, if it trains on a concept of the toy model
    and names no images for the validation.
    """
    images = Path(config.data.images)
    is_toy = images.name in draw_concepts.CONCEPTS and images.parent.name == "concepts"
    if config.validation.images or not is_toy:
        return config
    folder = out / "held_out"
    if not folder.is_dir():
        draw_held_out(images.name, folder)
    return replace(config, validation=replace(config.validation, images=str(folder)))


def is_finished(config: Config) -> bool:
    """Whether the run of a config is done. Raises UserError where its folder has one of another
    config.
    """
    folder = Path(config.out)
    if not (folder / "summary.json").is_file():
        return False
    recorded = read_recorded_run(folder)
    settings = flatten_table(to_table(config.recorded))
    changes = config_changes(recorded, RecordedRun(folder, settings, {}))
    if changes or recorded.seed != config.seed:
        found = "; ".join(changes[:3]).replace(" in A,", " there,").replace(" in B", " here")
        raise UserError(f"{folder} is a run of another config ({found}); name another --out")
    return True


# ---------------------------------------------------------------- training


def train_grid(planned: Sequence[Config], out: Path, jobs: int) -> None:
    """Train the runs that are not finished, `jobs` at a time, each in a process of its own; prints
    a line for each. Raises UserError, after all others have ended, where a run failed.
    """
    waiting = [config for config in planned if not is_finished(config)]
    if len(waiting) < len(planned):
        print(f"{len(planned) - len(waiting)} of {len(planned)} runs are finished already")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        reasons = pool.map(lambda config: train_run(config, out, jobs), waiting)
        try:
            for number, (config, reason) in enumerate(zip(waiting, reasons), start=1):
                name, seconds = Path(config.out).name, time.perf_counter() - began
                words = "failed" if reason else "done"
                print(f"{name}: {words} ({number} of {len(waiting)}, {seconds:.0f} s)", flush=True)
                failed += [f"{name}: {reason}"] if reason else []
        except KeyboardInterrupt:  # the processes got the signal too, and write a checkpoint
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise UserError(f"{len(failed)} of {len(waiting)} runs failed; {'; '.join(failed)}")


def train_run(config: Config, out: Path, jobs: int) -> str:
    """Train one run in a process of its own, or go on with it; returns the end of its log in
    OUT/logs if that failed, else "".
    """
    folder = Path(config.out)
    file, log = out / "logs" / f"{folder.name}.toml", out / "logs" / f"{folder.name}.txt"
    file.write_text(to_toml(config), encoding="utf-8")
    command = [sys.executable, str(Path(train.__file__)), str(file)]
    if folder.is_dir() and is_run(folder):
        command.append("--resume")
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    with open(log, "w", encoding="utf-8") as text:
        status = subprocess.run(command, stdout=text, stderr=subprocess.STDOUT, env=environment)
    if not status.returncode:
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{' '.join(lines[-LAST_LINES:])} ({log})"


# ---------------------------------------------------------------- comparing


def group_by_loss(planned: Sequence[Config]) -> dict[str, list[Path]]:
    """Loss, as folders are named -> the folders of its runs."""
    groups: dict[str, list[Path]] = {}
    for config in planned:
        label = Path(config.out).name.rpartition("_")[0]
        groups.setdefault(label, []).append(Path(config.out))
    return groups


def compare_grid(
    planned: Sequence[Config], wanted: Sequence[measures.Measure], out: Path
) -> list[Comparison]:
    """Each loss against the first one by each measure: prints tables and verdicts, writes plots."""
    groups = group_by_loss(planned)
    folders = [Path(config.out) for config in planned]
    measured = measures.measure_runs(folders, wanted, train.training_step)
    first, *others = groups
    found = []
    for other in others:
        print(f"\n## {other} against {first}\n")
        plot = str(out / f"{other}_against_{first}.png")
        sides = groups[first], groups[other]
        found += comparing.show_comparisons(sides, measured, plot, draws_apart=False)
    return found


def run_lab(words: Sequence[str]) -> None:
    """Train, compare and write the page, as the words of the command line ask."""
    lab = plan_lab(words)
    train_grid(lab.runs, lab.out, lab.jobs)
    found = compare_grid(lab.runs, lab.measures, lab.out)
    folders = [Path(config.out) for config in lab.runs]
    page = write_report(folders, lab.out / "page.html", measured=found)
    print(f"\npage: {page}")


class Lab(NamedTuple):
    """The runs, measures and folder that a command line asks for."""

    runs: list[Config]
    measures: list[measures.Measure]
    out: Path
    jobs: int


def plan_lab(words: Sequence[str]) -> Lab:
    """The runs and measures of a command line; draws held-out images where `add_held_out_images`
    does. Raises UserError for what cannot be trained or compared.
    """
    args, flags = make_parser().parse_known_args(words)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, expected at least 1")
    losses = parse_losses(args.loss)
    wanted = measures.find_measures(args.metric or [measures.RECORDED], {})
    base = parse_command_line(Config, [args.config, *flags], prog="loss_lab", example=USAGE)
    if base.validation.every < 0:
        raise UserError("the runs are compared by their validation; leave --validation.every out")
    if args.steps:
        base = replace(base, stages=scale_stages(base.stages, args.steps))
    base = add_held_out_images(base, args.out)
    return Lab(plan_runs(base, losses, args.seeds, args.out), wanted, args.out, args.jobs)


def make_parser() -> argparse.ArgumentParser:
    """The lab's own options; all others are train.py's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss_lab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="TOML file of a run")
    parser.add_argument(
        "--loss",
        action="append",
        default=[],
        help="a loss or FILE.py:FUNCTION, with arguments as in huber:delta=0.2; repeat it, the "
        "first is the one that others are compared with",
    )
    parser.add_argument("--seeds", type=int, default=4, help="runs of each loss (4)")
    parser.add_argument("--steps", type=int, default=0, help="steps of a run, in all its stages")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--out", type=Path, default=Path("runs/lab"), help="folder (runs/lab)")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        help="what the losses are compared by, as for train.py --compare; repeat it for several "
        "(the validation's loss)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_status(
        lambda: run_lab(words), "what is done is kept, and the same command goes on with it"
    )


if __name__ == "__main__":
    sys.exit(main())
