"""What a run keeps: checkpoints that a killed run goes on from, and what it has learned as an
AdapterState. Functions of an open Session.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_core import tokens
from lora_core.adapters import injection
from lora_core.adapters.weight_updates import AdapterState
from lora_core.diffusion import validation
from lora_core.errors import UserError
from lora_core.formats import embeddings, run_file_paths, save_run
from lora_core.runs.run_folder import flatten_state, unflatten_state
from lora_core.toml import to_table, to_toml
from training import config_checks, nonfinite
from training.run_identity import identity_changes, run_identity

if TYPE_CHECKING:
    from training.setup import Session


def write_checkpoint(s: Session, done: int) -> None:
    """Writes checkpoints/<done>/: everything that `restore` needs, and beside it the files that can
    be used elsewhere.
    """
    s.flush()
    nonfinite.check_finite_state(s, done)
    tree = {
        "groups": s.groups,
        "optimizer": s.optimizer.state_dict(),
        "optimizer_name": s.config.optimizer.name,
        "scaler": s.scaler and s.scaler.state_dict(),
        "average": s.average and s.average.state_dict(),
        "seconds": time.perf_counter() - s.began,
        "identity": _run_identity(s),
        "changes": s.changes,
    }
    folder = s.run.save_checkpoint(done, *flatten_state(tree))
    s.saved = done
    with s.averaged():
        save_run(learned_state(s, done), folder, layout=s.family.layout)


def restore_checkpoint(s: Session) -> int:
    """The number of steps done; 0 for a new run. Raises UserError when the checkpoint is of another
    run, naming in what.
    """
    found = s.run.load_checkpoint() if s.config.resume else None
    if found is None:
        if s.config.resume:
            print(f"there is no checkpoint in {s.run.folder} yet: the run begins at step 0")
        return 0
    tree = unflatten_state(found.tensors, found.meta)
    s.changes = list(tree.get("changes", ())) + _accept_changes(s, tree, found.step)
    with torch.no_grad():
        for group, params in s.groups.items():
            for p, saved in zip(params, tree["groups"][group]):
                p.copy_(saved)
    try:
        s.optimizer.load_state_dict(tree["optimizer"])
    except Exception as error:  # of a class that may be anybody's
        told = f"cannot take up the state it saved ({type(error).__name__}: {error})"
        raise UserError(
            f"{s.config.optimizer.name} {told}, so that this run cannot be resumed; begin anew in another --out"
        ) from error
    for state in s.optimizer.param_groups:  # as this config says, not as the saved state does
        state.update(
            s.settings[state["name"]]
            | {k: v for k, v in s.config.optimizer.args.items() if k in state}
        )
    if s.scaler is not None and tree["scaler"] is not None:
        s.scaler.load_state_dict(tree["scaler"])
        s.skips = (int(s.scaler.skipped), 0)
    if s.average is not None:
        s.average.load_state_dict(tree["average"])
    s.began -= tree["seconds"]
    if (s.run.folder / "val.jsonl").is_file():
        s.scores = validation.read_scores(s.run.folder)
    s.saved = found.step
    _write_missing(s, found.step)
    print(f"resumed after step {found.step}")
    return found.step


def _run_identity(s: Session) -> dict[str, Any]:
    return run_identity(
        to_table(s.config), s.folder.records, s.prior.records if s.prior else (), s.model_identity
    )


def _accept_changes(s: Session, tree: dict[str, Any], step: int) -> list[str]:
    """The changes that --resume-anyway takes, said in a line each. Raises UserError for changes
    without it, and for state that cannot be taken.
    """
    obstacle = _refusal(s, tree, step)
    if "identity" not in tree and not obstacle:
        print(
            f"the checkpoint of step {step} is of an earlier version and does not say what it was made from; it is taken as it is"
        )
    found = identity_changes(tree["identity"], _run_identity(s), step) if "identity" in tree else []
    if obstacle or (found and not s.config.resume_anyway):
        named = (
            f"the checkpoint of step {step} in {s.run.folder} is not of this run: {'; '.join(found)}; "
            if found
            else ""
        )
        raise UserError(
            named + (obstacle or "resume with what the run began with, or pass --resume-anyway")
        )
    told = [f"from step {step} on: {change}" for change in found]
    for line in told:
        print(f"resumed with a change {line}")
    return told


def _refusal(s: Session, tree: dict[str, Any], step: int) -> str:
    """Why the state of a checkpoint cannot be put into this run, as a sentence; "" where it can."""
    folder, name = s.run.folder, s.config.optimizer.name
    if {n: [p.shape for p in ps] for n, ps in tree["groups"].items()} != {
        n: [p.shape for p in ps] for n, ps in s.groups.items()
    }:
        return f"the checkpoint in {folder} has other adapters or tokens than this config; resume with the config of the run"
    if tree["optimizer_name"] != name:
        return f"the checkpoint in {folder} is of {tree['optimizer_name']}, not of {name}; resume with that optimizer"
    if step > s.config.steps:
        return f"{folder} has done {step} steps, more than the {s.config.steps} of this config; give its stages more"
    if (tree["average"] is None) != (s.average is None):
        return f"the checkpoint in {folder} was written {'without' if s.average else 'with'} --ema; resume as the run began"
    return ""


def _write_missing(s: Session, step: int) -> None:
    """The files beside the state of a checkpoint, where the process that wrote it was killed in
    between.
    """
    folder, state = s.run.folder / "checkpoints" / str(step), learned_state(s, step)
    if not all(file.is_file() for file in run_file_paths(state, folder, s.family.layout)):
        with s.averaged():
            save_run(learned_state(s, step), folder, layout=s.family.layout)
        print(f"wrote the files that were missing in {folder}")


def resume_advice(s: Session) -> str:
    """How to go on with this run after an interruption."""
    if s.saved is None:
        return f"no step is saved; start again with --overwrite, which moves {s.run.folder.name} to {s.run.folder.name}.bak"
    if only := config_checks.rerun_reason(s.config):
        return f"the run is saved after step {s.saved}; go on from Python with resume=True and config.toml, {only}"
    command = shlex.join(
        ["python", "train.py", str(Path(s.config.out) / "config.toml"), "--resume"]
    )
    return f"the run is saved after step {s.saved}, go on with: {command}"


def learned_state(s: Session, done: int) -> AdapterState:
    """What the run has learned after `done` steps, under published names; a full fine-tune has no
    factors (results.save_trained_model writes it).
    """
    layout = s.family.layout
    components: dict[str, dict[str, Any]] = {}
    for name, module in s.trained.items() if s.has_factors else ():
        components[name] = {
            layout.published(name, path): factors
            for path, factors in injection.adapter_factors(module).items()
        }
    rows = {
        layout.encoders[name]: tokens.copy_token_rows(embedding)
        for name, embedding in s.embeddings.items()
    }
    names = next((e.names for e in s.embeddings.values()), ())
    words = embeddings.placeholder_header({a.word: a.names for a in s.abstractions})
    header = {"lora_core.config": to_toml(s.config.recorded), "lora_core.steps": str(done)}
    header |= {"lora_core.changes": "\n".join(s.changes)} if s.changes else {}
    return AdapterState(components, rows, names, header | words)
