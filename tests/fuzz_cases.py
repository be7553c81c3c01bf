"""One case of the fuzz test: a damaged file, a command on it, and what is wrong with its end."""

import contextlib
import copy
import io
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import infer
import models
from tests.fuzz_damage import damage_file
from tests.fuzz_workspace import COMMANDS, OUT, PROGRAMS, Target, list_targets
from training import setup

LONGEST = 10  # seconds of a command
MOST_MEMORY = 2_000_000  # kilobytes that the peak of the process may grow by
SENTINEL = b"precious"
STATE_FILES = ("state.json", "state.safetensors")  # damage to them is found by checksums, if any
# Kind -> how often it is drawn: commands on the last ones take ten times as long.
WEIGHTS = {
    "adapter": 20, "tokens": 12, "pickle": 14, "recipe": 8, "single file": 8, "run's adapter": 8,
    "image": 8, "sidecar": 6, "prompts": 3, "model": 6, "run": 4, "data": 2, "config": 1,
}  # fmt: skip


class TooSlow(BaseException):
    """Raised in a command that takes longer than LONGEST."""


@dataclass
class Outcome:
    """The end of a command."""

    status: Any
    stderr: str
    seconds: float
    raised: str  # the traceback; empty without one


@dataclass
class Workspace:
    """The folder of valid files, and their bytes."""

    folder: Path
    targets: dict[str, list[Target]]  # by kind
    pristine: dict[Path, bytes]
    stamps: dict[Path, tuple[int, ...]]  # of the files as they are on the disk
    loaded: dict[str, Any]  # what was read of the undamaged model

    @classmethod
    def read(cls, folder: Path) -> "Workspace":
        targets: dict[str, list[Target]] = {}
        for target in list_targets(folder):
            targets.setdefault(target.kind, []).append(target)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        content = {path: path.read_bytes() for path in files}
        return cls(folder, targets, content, {path: stamp(path) for path in files}, {})

    def restore(self) -> list[str]:
        """Brings every file back, removes others; the names of those that had changed."""
        changed = []
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in self.pristine:
                changed.append(str(path.relative_to(self.folder)))
                path.unlink()
        for path, content in self.pristine.items():
            if path.is_file() and stamp(path) == self.stamps[path]:
                continue
            if not path.is_file() or path.read_bytes() != content:
                changed.append(str(path.relative_to(self.folder)))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self.stamps[path] = stamp(path)
        return changed


def stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written: its number on the disk, its size and its times."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def cache_models(monkeypatch: pytest.MonkeyPatch, workspace: Workspace) -> None:
    """The undamaged model is read once, and images are black instead of sampled."""
    loaded, read_layout = workspace.loaded, models.read_layout
    if "layout" not in loaded:
        loaded["layout"] = read_layout("model")

    def read_layout_once(path: str, config: str = "", family: str = "") -> Any:
        if path != "model" or config or family:
            return read_layout(path, config, family)
        return loaded["layout"]

    for module in (models, setup):
        monkeypatch.setattr(module, "read_layout", read_layout_once)
    for module in (infer, setup):
        load = module.load_family

        def load_once(path: str, *args: Any, load: Any = load, **settings: Any) -> Any:
            if path != "model":
                return load(path, *args, **settings)
            key = repr((args, settings))
            if key not in loaded:
                loaded[key] = load(path, *args, **settings)
            return copy.deepcopy(loaded[key])

        monkeypatch.setattr(module, "load_family", load_once)

    def draw_black(family: Any, batches: Any, **_: Any) -> Iterator[torch.Tensor]:
        for batch in batches:
            yield torch.zeros(len(batch.prompts), 3, 8, 8)

    monkeypatch.setattr(infer, "generate_batches", draw_black)


def command_words(command: str, target: Target, folder: Path) -> list[str]:
    """The words of a command on a target."""
    given = str(target.given.relative_to(folder))
    for name in ("{run}", "{data}", "{folder}", "{}"):
        command = command.replace(name, given)
    return command.replace("{out}", f"{OUT}/made").split()


def run_command(words: list[str]) -> Outcome:
    """The end of a command in this process, stopped after LONGEST seconds."""

    def stop(*_: object) -> None:
        raise TooSlow

    errors, raised, status = io.StringIO(), "", None
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)  # of this process, however busy the machine is
    began = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            status = PROGRAMS[words[0]](words[1:])
    except SystemExit as end:  # tyro ends the process for a wrong flag
        status = end.code
    except (Exception, TooSlow):
        raised = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return Outcome(status, errors.getvalue(), time.process_time() - began, raised)


def draw_case(workspace: Workspace, rng: random.Random) -> tuple[Target, list[str]]:
    """A target that was damaged, and the words of a command on it."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    target = rng.choice(workspace.targets[kind])
    content = workspace.pristine[target.path]
    target.path.write_bytes(damage_file(content, target.path.suffix, rng))
    if target.path.name in STATE_FILES and rng.random() < 0.8:
        (target.path.parent / "checksums.b2").unlink()
    return target, command_words(rng.choice(COMMANDS[kind]), target, workspace.folder)


def run_case(workspace: Workspace, seed: int, number: int) -> tuple[str, str]:
    """(kind of the file, what is wrong with the end of a command on it; "" where nothing is)."""
    rng = random.Random(seed * 1_000_003 + number)
    target, words = draw_case(workspace, rng)
    outputs = workspace.folder / OUT
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.mkdir()
    taken = _place_sentinel(workspace.folder, words) if rng.random() < 0.3 else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = run_command(words)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    faults = list(_find_faults(outcome, grown))
    left = {str(path) for path in outputs.rglob("*") if path.is_file()}
    if taken is not None:
        left.discard(str(taken))
        if taken.read_bytes() != SENTINEL:
            faults.append("the output that was there is another one")
    if outcome.status == 2 and left:
        faults.append(f"partial output: {', '.join(sorted(left))}; {outcome.stderr[-500:]}")
    shutil.rmtree(outputs)
    changed = workspace.restore()
    if target.kind != "run":
        name = str(target.path.relative_to(workspace.folder))
        faults += [f"{path} was written" for path in changed if path != name]
    place = target.path.relative_to(workspace.folder)
    return target.kind, f"{place}: {' '.join(words)}\n    {faults[0]}" if faults else ""


def _place_sentinel(folder: Path, words: list[str]) -> Path | None:
    """A file in the place of the output, where that is one that merge.py may not overwrite."""
    outputs = [word for word in words if word.startswith(f"{OUT}/made.")]
    if not outputs or words[0] in ("infer", "train"):
        return None
    path = folder / outputs[0]
    path.write_bytes(SENTINEL)
    return path


def _find_faults(outcome: Outcome, grown: int) -> Iterator[str]:
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    if outcome.raised:
        yield f"traceback: {outcome.raised}"
    elif outcome.status not in (0, 2):
        yield f"status {outcome.status}: {outcome.stderr[-500:]}"
    elif outcome.status == 2 and len(errors) != 1:
        yield f"{len(errors)} lines of error: {outcome.stderr[-500:]}"
    if "Traceback" in outcome.stderr:
        yield f"a traceback is printed: {outcome.stderr[-500:]}"
    if outcome.seconds > LONGEST:
        yield f"it took {outcome.seconds:.0f} s"
    if grown > MOST_MEMORY:
        yield f"it took {grown / 1e6:.1f} GB"
