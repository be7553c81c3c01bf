"""Checkpoints of a run: writing them, resuming from the newest, and the learned adapters and token
rows as an AdapterState.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_core import distributed, formats, tokens
from lora_core.adapters import custom_files
from lora_core.adapters.kinds import KINDS
from lora_core.adapters.weight_updates import AdapterState, LayerUpdate, split_updates
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.formats.known_formats import folder_file_stem
from lora_core.optim.wrapped_tensors import load_state
from lora_core.run_clock import current_time
from lora_core.runs.run_folder import Checkpoint, Run, flatten_state, unflatten_state
from lora_core.text import shorten_value
from lora_core.toml import to_table, to_toml
from training import learned_tokens, nonfinite, processes
from training.checks import config_checks
from training.file_precision import fitting_dtype
from training.headers.file_header import FileHeader
from training.log import Log
from training.networks import base_weights
from training.run_identity import (
    EMPTY_IDENTITY,
    check_identity,
    check_same_inputs,
    hide_image_names,
    identity_changes,
    run_identity,
)
from training.setup import Data, Model, Optimization
from training.shared_config import shared_config
from training.signals import Stopped

# Part of a saved state -> types that it may have.
PARTS: dict[str, tuple[type, ...]] = {
    "groups": (dict,),
    "optimizer": (dict,),
    "optimizer_name": (str,),
    "scaler": (dict, type(None)),
    "average": (dict, type(None)),
    "seconds": (int, float),
    "skipped": (dict, type(None)),  # None in earlier versions
}


class Checkpoints:
    """Writes and restores OUT/checkpoints/STEP of one run.

    `began` is time.perf_counter() at the start of the run: `restore` subtracts from it the seconds
    that earlier processes of a resumed run took.
    """

    # The end of the error for a checkpoint that was made from other data, weights or options.
    advice = "resume with what the run began with, or pass --resume-anyway"

    def __init__(
        self, run: Run, config: Config, data: Data, model: Model, optimization: Optimization
    ) -> None:
        self.run, self.config = run, config
        self.model, self.optimization = model, optimization
        prior = data.class_images.records if data.class_images else ()
        records = data.training.records
        self.identity = run_identity(to_table(config), records, prior, model.identity)
        self.changes: list[str] = []  # options that differ from those the run began with
        self.header = FileHeader(config, data, model, optimization, run.folder.name)
        # seconds since 1970: the start of the run, and of its newest checkpoint
        self.started = self.saved = current_time()
        self.began = time.perf_counter()

    def restore(self, began: float) -> int:
        """Restore the newest checkpoint; returns the number of steps done, 0 for a new run. Raises
        UserError for a checkpoint of another run, naming the differences, and for parameters that
        are not finite.
        """
        self.began = began
        check_same_inputs(self.identity)
        done = self._load()
        nonfinite.check_finite_state(self.model, self.optimization, done, self.run)
        return done

    def _load(self) -> int:
        """Puts the newest checkpoint into the model and the optimizer; returns its step."""
        found = None
        if self.config.resume:
            found = distributed.read_once(self.run.load_checkpoint)
        if found is None:
            if self.config.resume:
                print(f"there is no checkpoint in {self.run.folder} yet: the run begins at step 0")
            return 0
        tree = self._read_tree(found)
        accepted = self._accept_changes(tree, found.step)
        self.changes = [*tree.get("changes", ()), *accepted]
        dates = tree.get("dates") or {"started": self.started, "saved": self.saved}
        self.started, self.saved = dates["started"], dates["saved"]
        with torch.no_grad():
            for group, params in self.model.groups.items():
                for p, saved in zip(params, tree["groups"][group]):
                    p.copy_(saved)
        custom_files.load_buffers(self.model.adapted, tree.get("buffers", {}))
        self._restore_token_starts(tree.get("token_starts", {}))
        self._restore_optimizer(tree["optimizer"])
        scaler, average = self.optimization.scaler, self.optimization.average
        if scaler is not None and tree["scaler"] is not None:
            scaler.load_state_dict(tree["scaler"])
        if average is not None:
            average.load_state_dict(tree["average"])
        self.optimization.skipped.load_state_dict(tree.get("skipped") or {})
        self.began -= tree["seconds"]
        if self.run.writes:
            self._write_missing_files(found.step)
        print(f"resumed after step {found.step}")
        return found.step

    def _restore_token_starts(self, saved: dict[str, Tensor]) -> None:
        """Put the rows that tokens started from in a file, and the norms that follow, back."""
        for name, rows in saved.items():
            self.model.embeddings[name].initial.copy_(rows)
        if saved:
            targets = learned_tokens.norm_targets(self.config, self.model.embeddings)
            self.model.norm_targets.update(targets)

    def _read_tree(self, found: Checkpoint) -> dict[str, Any]:
        """The state in a checkpoint, with all its parts. Raises UserError where one is missing, or
        has another type.
        """
        try:
            tree = unflatten_state(found.tensors, found.meta)
            if reason := _find_wrong_part(tree):
                raise ValueError(reason)
            check_identity(tree.get("identity", EMPTY_IDENTITY))
        except ValueError as error:
            folder = self.run.folder / "checkpoints" / str(found.step)
            raise UserError(
                f"checkpoint {folder} is damaged ({error}); remove it to go back to the one before "
                "it, or start again with --overwrite"
            ) from error
        return tree

    def write(self, done: int, log: Log) -> None:
        """Write checkpoints/<done>/: the state that `restore` needs, and the LoRA and token files
        for other programs.
        """
        log.flush()
        nonfinite.check_finite_state(self.model, self.optimization, done, self.run)
        if not self.run.writes:
            return
        scaler, average = self.optimization.scaler, self.optimization.average
        self.saved = current_time()
        tree = {
            "groups": self.model.groups,
            "buffers": custom_files.adapter_buffers(self.model.adapted),
            "optimizer": self.optimization.optimizer.state_dict(),
            "optimizer_name": self.config.optimizer.name,
            "scaler": scaler and scaler.state_dict(),
            "average": average and average.state_dict(),
            "seconds": time.perf_counter() - self.began,
            "dates": {"started": self.started, "saved": self.saved},
            "skipped": self.optimization.skipped.state_dict(),
            "identity": self.identity,
            "changes": self.changes,
        }
        if self.config.from_lora:  # else the seed gives them
            tree["token_starts"] = {n: e.initial for n, e in self.model.embeddings.items()}
        folder = self.run.save_checkpoint(done, *flatten_state(tree))
        with self.optimization.averaged():
            self.save_files(done, folder)

    def save_files(self, done: int, folder: Path) -> list[Path]:
        """Write the LoRA and token files after `done` steps, which is the newest checkpoint, into
        a folder, with the precision of --files.precision; returns them.
        """
        state = self.learned_state(done, folder_file_stem(folder))
        dtype = fitting_dtype(state, self.config.files.precision)
        return formats.save_run(state, folder, layout=self.model.family.layout, dtype=dtype)

    def learned_state(self, done: int, stem: str = "") -> AdapterState:
        """The adapters' tensors and the token rows after `done` steps, under published names, for
        files called `stem` (empty: as the run). Without adapters that no adapter file can hold,
        which results.py writes.
        """
        model, layout = self.model, self.model.family.layout
        updates: dict[str, dict[str, LayerUpdate]] = {}
        adapted = model.adapted if model.has_factors else {}
        # a kind of the user's may
        reads_base = self.config.adapter.kind not in KINDS or base_weights.files_read_weights(
            adapted
        )
        with model.residency.trained_together() if reads_base else nullcontext():
            for name, found in base_weights.updates_for_files(self.config, adapted).items():
                updates[name] = {layout.published(name, path): own for path, own in found.items()}
        factors, dense = split_updates(updates)
        rows = {
            layout.encoders[name]: tokens.copy_token_rows(embedding)
            for name, embedding in model.embeddings.items()
        }
        names = next((e.names for e in model.embeddings.values()), ())
        words = formats.placeholder_header(
            {p.word: p.names for p in model.placeholders},
            {p.word: p.layers for p in model.placeholders},
        )
        shared = shared_config(self.config, self.run.folder)
        dates = {"started": self.started, "saved": self.saved}
        header = self.header.entries(done, stem or self.header.name, **dates)
        header |= {"lora_core.config": to_toml(shared), "lora_core.steps": str(done)}
        if self.changes:
            header["lora_core.changes"] = "\n".join(self.changes)
        return AdapterState(factors, rows, names, header | words, dense=dense)

    @contextmanager
    def advice_on_interrupt(self) -> Iterator[None]:
        """Add the command that resumes the run to the message of an interruption inside."""
        try:
            yield
        except KeyboardInterrupt as stop:
            number = getattr(stop, "number", signal.SIGINT)
            raise Stopped(self._resume_advice(), number) from None

    def _resume_advice(self) -> str:
        saved = self.run.newest_step()
        name = self.run.folder.name
        if saved is None:
            again = f"start again with --overwrite, which moves {name} to {name}.bak"
            return f"no step is saved; {again}"
        kept = f"the run is saved after step {saved}"
        if only := config_checks.rerun_reason(self.config):
            return f"{kept}; go on from Python with resume=True and config.toml, {only}"
        file = str(Path(self.config.out) / "config.toml")
        command = [*processes.launch_words(), "train.py", file, "--resume"]
        return f"{kept}, go on with: {shlex.join(command)}"

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        """Load a saved optimizer state, keeping the settings of this config."""
        optimizer, o = self.optimization.optimizer, self.config.optimizer
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            load_state(optimizer, state)
        except Exception as error:  # of any type: the class may be a user's
            raise UserError(
                f"{o.name} cannot take up the state it saved ({type(error).__name__}: {error}), "
                "so that this run cannot be resumed; begin anew in another --out"
            ) from error
        for group, rate in zip(optimizer.param_groups, rates):
            arguments = {name: value for name, value in o.args.items() if name in group}
            settings = self.optimization.settings[group["name"]] | arguments
            if isinstance(rate, Tensor):  # torchao's step takes no number
                settings["lr"] = rate.fill_(settings["lr"])
            group.update(settings)

    def _accept_changes(self, tree: dict[str, Any], step: int) -> list[str]:
        """The changes that --resume-anyway accepts, each printed in a line. Raises UserError for
        changes without it, and for a state that does not fit this run.
        """
        refusal = self._refusal(tree, step)
        found = []
        if "identity" in tree:
            found = identity_changes(tree["identity"], self.identity, step)
        elif not refusal:
            print(
                f"the checkpoint of step {step} is of an earlier version and does not say what it "
                "was made from; it is taken as it is"
            )
        if refusal or (found and not self.config.resume_anyway):
            advice = refusal or self.advice
            if found:
                which = f"the checkpoint of step {step} in {self.run.folder}"
                advice = f"{which} is not of this run: {'; '.join(found)}; {advice}"
            raise UserError(advice)
        accepted = [f"from step {step} on: {change}" for change in found]
        for line in accepted:
            print(f"resumed with a change {line}")
        return [hide_image_names(line) for line in accepted]

    def _refusal(self, tree: dict[str, Any], step: int) -> str:
        """Why the state of a checkpoint does not fit this run, as a sentence; "" where it does."""
        folder, config = self.run.folder, self.config
        own = custom_files.adapter_buffers(self.model.adapted)
        has_same_buffers = _tensor_shapes(tree.get("buffers", {})) == _tensor_shapes(own)
        if _shapes(tree["groups"]) != _shapes(self.model.groups) or not has_same_buffers:
            return (
                f"the checkpoint in {folder} has other adapters or tokens than this config; "
                "resume with the config of the run"
            )
        name = config.optimizer.name
        if tree["optimizer_name"] != name:
            return (
                f"the checkpoint in {folder} is of {tree['optimizer_name']}, not of {name}; "
                "resume with that optimizer"
            )
        if step > config.steps:
            return (
                f"{folder} has done {step} steps, more than the {config.steps} of this config; "
                "give its stages more"
            )
        average = self.optimization.average
        if (tree["average"] is None) != (average is None):
            how = "without" if average else "with"
            return f"the checkpoint in {folder} was written {how} --ema; resume as the run began"
        return ""

    def _write_missing_files(self, step: int) -> None:
        """Write the LoRA and token files of a checkpoint whose process was killed after its state
        was saved and before they were, or of which something has cut one.
        """
        folder, layout = self.run.folder / "checkpoints" / str(step), self.model.family.layout
        files = formats.run_file_paths(self.learned_state(step), folder, layout)
        older = formats.older_file_names(folder)
        earlier = [file.with_name(older.get(file.name, file.name)) for file in files]
        if not all(map(_is_whole, files)) and not all(map(_is_whole, earlier)):
            with self.optimization.averaged():
                self.save_files(step, folder)
            print(f"wrote the files that were missing or damaged in {folder}")


def _is_whole(file: Path) -> bool:
    """Whether a file of tensors is there, and as long as its header says."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _find_wrong_part(tree: Any) -> str:
    """The part of a saved state that is missing or of another type, in words; "" for none."""
    if not isinstance(tree, dict):
        return "it holds no table"
    for name, types in PARTS.items():
        if not isinstance(tree.get(name), types):
            return f"its {name} is {shorten_value(tree.get(name))}"
    if not all(isinstance(line, str) for line in tree.get("changes", [])):
        return "its changes are no texts"
    dates = tree.get("dates") or {"started": 0.0, "saved": 0.0}  # earlier versions have none
    if not isinstance(dates, dict) or not all(
        isinstance(dates.get(name), int | float) for name in ("started", "saved")
    ):
        return "its dates are no numbers"
    if not all(type(count) is int for count in (tree.get("skipped") or {}).values()):
        return "its skipped steps are no counts"
    buffers = tree.get("buffers", {})
    is_table = isinstance(buffers, dict)
    if not is_table or not all(isinstance(own, Tensor) for own in buffers.values()):
        return "its buffers are no tensors"
    for name, params in tree["groups"].items():
        if not isinstance(params, list) or not all(isinstance(p, Tensor) for p in params):
            return f"its group {shorten_value(name)} holds no tensors"
    scaler, average = tree["scaler"], tree["average"]
    if scaler is not None:
        tensors = [scaler.get(name) for name in ("current", "clean")]
        numbers = [scaler.get(name) for name in ("growth", "backoff", "interval")]
        is_whole = all(isinstance(t, Tensor) and t.numel() == 1 for t in tensors)
        if not is_whole or not all(isinstance(n, int | float) for n in numbers):
            return "its loss scale has no numbers"
    if average is not None:
        tensors, count = average.get("averages"), average.get("count")
        is_list = isinstance(tensors, list) and all(isinstance(t, Tensor) for t in tensors)
        if not is_list or type(count) is not int:
            return "its moving average holds no tensors"
    return ""


def _tensor_shapes(tensors: dict[str, Any]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _shapes(groups: dict[str, Any]) -> dict[str, list[torch.Size]]:
    return {name: [p.shape for p in params] for name, params in groups.items()}
