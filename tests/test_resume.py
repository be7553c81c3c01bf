"""A run killed with SIGKILL, at a random step or in the middle of writing, and resumed ends with
the bits of the uninterrupted run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train
from lora_core.config import Config, OptimizerConfig, PriorConfig, Stage, ValidationConfig
from lora_core.errors import UserError
from lora_core.toml import read_toml, to_toml
from tests.conftest import final, rows, same
from tests.soak_runs import differences

STEPS, EVERY = (4, 5), 3

# Imports once, then forks a child for each job before anything is computed; a job ends as its child
# does.
CHILD = """
import gc, json, os, signal, sys
from training import step
import models.sd, torch._dynamo, train, lora_core.runs.run_folder
from pathlib import Path
from lora_core.toml import read_toml

gc.freeze()

def die(): os.kill(os.getpid(), signal.SIGKILL)

def dying_step(at):
    whole = step.set_step_dropout_keys
    def set_keys(adapted, keys, number):
        if number == at:
            die()
        return whole(adapted, keys, number)
    step.set_step_dropout_keys = set_keys

def half_a_file(path):  # the file of the checkpoint of step 6, not that of step 3
    whole = lora_core.runs.run_folder.save_file
    def save(tensors, file):
        whole(tensors, file)
        if ".6." in str(file):
            os.truncate(file, os.path.getsize(file) // 2)
            die()
    lora_core.runs.run_folder.save_file = save

def half_a_validation(at):
    whole = lora_core.runs.run_folder.Run.log
    def log(self, row, *, to="metrics"):
        whole(self, row, to=to)
        if to == "val" and row["step"] == at:
            die()
    lora_core.runs.run_folder.Run.log = log

for config, how, at in json.loads(sys.stdin.read()):
    child = os.fork()
    if not child:
        if how == "file":
            half_a_file(at)
        if how == "validation":
            half_a_validation(at)
        if how == "step":
            dying_step(at)
        try:
            train.train(read_toml(Path(config)))
        finally:
            os._exit(1)
    print("STATUS", -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Case:
    name: str
    config: Config
    # step: while it computes, file: while it writes the checkpoint of step 6, validation: between
    # its rows
    how: str
    at: int


@pytest.fixture(scope="module")
def cases(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """The killed runs: one process imports, and each run is a fork of it."""
    from lora_core.config import AdapterConfig, DataConfig, SamplesConfig

    def draw() -> int:  # a step in the middle of which no checkpoint was just written
        return random.SystemRandom().choice([step for step in range(sum(STEPS)) if step % EVERY])

    base = Config(
        model=str(model),
        device="cpu",
        threads=1,
        batch_size=2,
        save_every=EVERY,
        log_every=2,
        samples=SamplesConfig(steps=1, guidance=1, prompts=("a TOK",)),
        data=DataConfig(images=str(photos), resolution=16, crop="random", flip=True),
        adapter=AdapterConfig(rank=4, dropout=0.1),
        validation=ValidationConfig(bins=2, every=EVERY),
        stages=(
            Stage(STEPS[0], ("tokens",)),
            Stage(STEPS[1], ("denoiser", "tokens"), schedule="cosine", schedules={"tokens": "rex"}),
        ),
    )
    both = replace(
        base,
        stages=(
            base.stages[0],
            replace(base.stages[1], groups=("denoiser", "text_encoder", "tokens")),
        ),
    )
    prodigy = OptimizerConfig("prodigy", args={"d0": 1e-4, "safeguard_warmup": True})
    first = replace(
        base,
        optimizer=prodigy,
        stages=(replace(base.stages[0], groups=("tokens", "text_encoder")), base.stages[1]),
        accumulation=2,
    )
    made = [
        Case("adamw", replace(both, prior=PriorConfig("a cat", count=2)), "step", draw()),
        Case("prodigy", first, "step", draw()),
        Case("half a checkpoint", base, "file", 6),
        Case("half a validation", base, "validation", 6),
        Case("half of the first validation", base, "validation", 0),
    ]
    jobs = []
    for case in made:
        folder = tmp_path_factory.mktemp("killed")
        case.config = replace(case.config, out=str(folder / "run"))
        (folder / "config.toml").write_text(to_toml(case.config))
        jobs.append((str(folder / "config.toml"), case.how, case.at))
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=root,
        env=dict(os.environ),
    )
    status = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("STATUS")]
    assert status == [str(int(signal.SIGKILL))] * len(made), done.stdout + done.stderr
    return {case.name: case for case in made}


def meta(run: Path) -> dict:
    """state.json of the newest checkpoint without the wall clock."""
    newest = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    found = json.loads((newest / "state.json").read_text())
    assert found["meta"].pop("seconds") > 0
    return found


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, Path]:
    """The uninterrupted runs by their configs without `out`: cases that share one train it once."""
    return {}


@pytest.mark.parametrize(
    "name",
    ["adamw", "prodigy", "half a checkpoint", "half a validation", "half of the first validation"],
)
def test_a_killed_run_resumes_and_ends_bit_identical(
    cases: dict[str, Case], whole_runs: dict[str, Path], tmp_path: Path, quick: None, name: str
) -> None:
    case, where = cases[name], f"killed at {cases[name].how} {cases[name].at}"
    key = repr(replace(case.config, out=""))
    if key not in whole_runs:
        whole_runs[key] = train.train(replace(case.config, out=str(tmp_path / "run")))
    killed, whole = Path(case.config.out), whole_runs[key]
    for file in killed.rglob("*.safetensors"):  # what has its final name is whole
        if not any(part.startswith(".") for part in file.parts[len(killed.parts) :]):
            load_file(file)
    done = [int(folder.name) for folder in (killed / "checkpoints").glob("[0-9]*")]
    assert done == [step for step in done if step % EVERY == 0] and (
        not done or case.how != "step" or max(done) < case.at
    ), where
    train.train(replace(case.config, resume=True))
    assert same(final(killed), final(whole)), where
    assert meta(killed) == meta(whole), where
    assert rows(killed) == rows(whole) and len(rows(whole)) == sum(STEPS) + 4, where
    assert rows(killed, "val") == rows(whole, "val") and len(rows(whole, "val")) == 4 * 2 * 5, where
    assert not [file for file in killed.rglob(".*")], where
    files = sorted(file.name for file in whole.rglob("*") if file.is_file())
    assert sorted(file.name for file in killed.rglob("*") if file.is_file()) == files


def test_going_on_with_a_finished_run_changes_nothing(config: Config, quick: None) -> None:
    run = train.train(config)
    before = final(run), rows(run), rows(run, "val"), (run / "config.toml").read_text()
    train.train(replace(config, resume=True))
    assert (
        same(final(run), before[0])
        and (rows(run), rows(run, "val"), (run / "config.toml").read_text()) == before[1:]
    )


def test_a_longer_schedule_goes_on_from_the_checkpoint(config: Config, quick: None) -> None:
    run = train.train(config)
    train.train(replace(config, resume=True, stages=(Stage(steps=4),)))
    other = train.train(replace(config, out=config.out + "4", stages=(Stage(steps=4),)))
    assert same(final(run), final(other))


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": OptimizerConfig("prodigy")},
        {"stages": (Stage(2, ("denoiser", "text_encoder")),)},
        {"stages": (Stage(1),)},
    ],
    ids=["optimizer", "groups", "fewer steps"],
)
def test_resuming_with_another_config_is_refused_and_overwrites_nothing(
    config: Config, quick: None, change: dict
) -> None:
    run = train.train(config)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"checkpoint|steps"):
        train.train(replace(config, resume=True, **change))
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


# ---------------------------------------------------------------- damaged checkpoints

DAMAGES = {  # name -> what it makes of a file's bytes; None: no file
    "empty": lambda data: b"",
    "a byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "all but a byte": lambda data: data[:-1],
    "a byte more": lambda data: data + b"0",
    "another byte": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
    "missing": None,
}
STATE_FILES = ("state.safetensors", "state.json", "checksums.b2")


@pytest.fixture(scope="module")
def damageable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run that the next tests damage is kept, once it is trained."""
    return tmp_path_factory.mktemp("damageable")


def trained(config: Config, folder: Path) -> Path:
    """A finished run with checkpoints of steps 2, 4, 6."""
    config = replace(
        config,
        out=str(folder / "run"),
        save_every=2,
        keep=3,
        stages=(Stage(2, ("tokens",)), Stage(4, ("denoiser", "tokens"))),
        validation=ValidationConfig(bins=1, every=2),
    )
    return Path(config.out) if Path(config.out).exists() else train.train(config)


def damage(file: Path, how: str) -> None:
    change = DAMAGES[how]
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))


@pytest.mark.soak
@pytest.mark.parametrize("newest", [4, 6], ids=["of an unfinished run", "of a finished run"])
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [*STATE_FILES, "{}.safetensors", "{}_emb.safetensors"])
def test_a_damaged_checkpoint_costs_steps_and_no_bit(
    config: Config,
    quick: None,
    damageable: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    how: str,
    newest: int,
) -> None:
    whole = trained(config, damageable)
    run = Path(shutil.copytree(whole, config.out))
    if newest == 4:  # as it was before the last checkpoint
        for file in [file for file in run.iterdir() if file.suffix in (".safetensors", ".png")]:
            file.unlink()
        shutil.rmtree(run / "checkpoints" / "6")
    of_state = name in STATE_FILES
    if how == "another byte" and not of_state:
        pytest.skip("the files for other programs have no checksum")
    damage(run / "checkpoints" / str(newest) / name.format(f"{run.name}-{newest:06d}"), how)
    capsys.readouterr()
    train.train(replace(read_toml(whole / "config.toml"), out=str(run), resume=True))
    said = capsys.readouterr().out
    without_sums = (name, how) == ("checksums.b2", "missing")  # as older checkpoints are
    if of_state and not without_sums:
        assert f"checkpoint {run}/checkpoints/{newest} is damaged (" in said
        assert f"resumed after step {newest - 2}" in said
    else:
        assert f"resumed after step {newest}" in said
        assert ("missing or damaged" in said) == (not of_state)
    lost = [f"checkpoints/{newest}/{name} (missing)"] if without_sums else []
    assert differences(run, whole) == lost


@pytest.mark.soak
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", STATE_FILES[:2])
def test_where_all_are_damaged_nothing_is_changed(
    config: Config, quick: None, damageable: Path, name: str, how: str
) -> None:
    whole = trained(config, damageable)
    run = Path(shutil.copytree(whole, config.out))
    for folder in (run / "checkpoints").iterdir():
        damage(folder / name, how)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="no whole checkpoint to resume from; start again with"):
        train.train(replace(read_toml(whole / "config.toml"), out=str(run), resume=True))
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
