"""The run folder: atomic writes, refusals, logs, checkpoints.

A killed run that resumes ends bit-identical.
"""

import errno
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.atomic_files import atomic_write
from lora_core.errors import UserError
from lora_core.prodigy import Prodigy
from lora_core.runs import run_folder as run_module
from lora_core.runs.run_folder import Run, flatten_state, hold_run, unflatten_state


def listing(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def rows(run, name="metrics"):
    return [json.loads(line) for line in (run.folder / f"{name}.jsonl").read_text().splitlines()]


# --- opening


def hold(out, *, resume=False):
    return hold_run(out, resume=resume, overwrite=False, keep=None)


def test_another_run_is_refused_and_untouched(tmp_path):
    out = tmp_path / "out"
    Run.open(out).write("config.toml", "seed = 1")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        Run.open(out)
    with pytest.raises(UserError, match="both"):
        Run.open(out, resume=True, overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("existed", [False, True])
def test_a_new_run_that_a_mistake_ends_before_its_first_step_leaves_nothing(tmp_path, existed):
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    fail = UserError("the loss is NaN")
    with pytest.raises(UserError, match="NaN"), hold(out) as run:
        run.write("config.toml", "seed = 1")
        raise fail
    assert out.exists() == existed and listing(tmp_path) == ({"out": None} if existed else {})
    with pytest.raises(UserError, match="NaN"), hold(out) as run:
        run.write("config.toml", "seed = 1")
        run.log({"step": 1, "loss": 1.0})
        raise fail
    begun = {"out", "out/config.toml", "out/metrics.jsonl"}
    assert set(listing(tmp_path)) == begun
    with pytest.raises(UserError, match="NaN"), hold(out, resume=True):
        raise fail
    assert set(listing(tmp_path)) == begun


def test_what_another_run_left_is_not_removed(tmp_path):
    """Also where it ended so early that there is only its config."""
    (tmp_path / "config.toml").write_text("seed = 1")
    with pytest.raises(UserError, match="--overwrite"), hold(tmp_path):
        pass
    with pytest.raises(UserError, match="NaN"), hold(tmp_path, resume=True):
        raise UserError("the loss is NaN")
    with pytest.raises(UserError, match="no run"), hold(tmp_path / "nothing", resume=True):
        pass
    assert listing(tmp_path) == {"config.toml": b"seed = 1"}


def test_overwrite_moves_the_old_folder_and_every_older_backup_survives(tmp_path):
    out = tmp_path / "out"
    for number in range(4):
        Run.open(f"{out}/", overwrite=True).write("n.txt", str(number))
    names = {path.name: (path / "n.txt").read_text() for path in tmp_path.iterdir()}
    assert names == {"out": "3", "out.bak": "2", "out.bak.1": "0", "out.bak.2": "1"}


def test_an_empty_folder_is_free_and_a_file_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    Run.open(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        Run.open(tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match=r"no run.*to resume"):
        Run.open(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(UserError, match="at least 1"):
        Run.open(tmp_path / "other", keep=0)


def test_the_current_folder_is_not_moved_away(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(UserError, match="in which this command runs"):
        Run.open(".", overwrite=True)
    assert (tmp_path / "a" / "x").exists()


# --- logs


def test_rows_are_appended_and_cut_on_resume(tmp_path):
    run = Run.open(tmp_path / "out")
    for step in range(1, 8):
        run.log({"step": step, "loss": 0.1 * step})
        run.log({"step": step, "bin": 0}, to="val")
        if step == 4:
            run.save_checkpoint(4, {}, None)
    with open(run.folder / "metrics.jsonl", "a", encoding="latin-1") as file:
        file.write("\0\0\xff\n")  # after a power cut
        file.write('{"step": 4, "lo')  # killed in the middle of a row
    resumed = Run.open(tmp_path / "out", resume=True)
    assert (
        [row["step"] for row in rows(resumed)]
        == [row["step"] for row in rows(resumed, "val")]
        == [1, 2, 3, 4]
    )
    assert rows(resumed)[2] == {"step": 3, "loss": 0.1 * 3}
    resumed.log({"step": 5, "loss": 1.0})
    assert [row["step"] for row in rows(resumed)] == [1, 2, 3, 4, 5]


def test_without_a_checkpoint_a_resumed_run_begins_at_zero(tmp_path):
    run = Run.open(tmp_path / "out")
    run.log({"step": 0, "val": 1.0})
    run.log({"step": 1})
    resumed = Run.open(tmp_path / "out", resume=True)
    assert resumed.load_checkpoint() is None and rows(resumed) == []


@pytest.mark.parametrize("row", [{}, {"step": 1.0}, {"step": True}, {"step": None}])
def test_a_row_without_a_step_is_refused(tmp_path, row):
    with pytest.raises(ValueError, match="step"):
        Run.open(tmp_path / "out").log(row)


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    run = Run.open(tmp_path / "out")
    run.log({"step": 1})

    class Short:  # a disk with room for five bytes
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            return self.file.write(data[:5])

    monkeypatch.setattr(
        run_module,
        "open",
        lambda *a, **k: Short(open(*a, **k)),  # noqa: SIM115
        raising=False,
    )
    with pytest.raises(UserError, match="full"):
        run.log({"step": 2})
    assert (run.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


# --- checkpoints


def test_checkpoints_round_trip_and_the_last_n_stay(tmp_path):
    run = Run.open(tmp_path / "out", keep=2)
    tensors = {
        "half": torch.randn(3).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "scalar": torch.tensor(1 / 3, dtype=torch.float64),
        "int": torch.tensor([7]),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "bool": torch.tensor([True]),
        "empty": torch.zeros(0, 4),
        "strided": torch.randn(3, 4).t(),
    }
    tensors |= {
        "alias": tensors["scalar"],
        "view": tensors["strided"][1:],
        "empty2": torch.zeros(0),
    }
    for step in (5, 9, 10, 100):
        run.save_checkpoint(step, tensors, {"lr": 0.1})
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["10", "100"]
    loaded = run.load_checkpoint()
    assert (
        loaded.step == 100
        and loaded.meta == {"lr": 0.1}
        and loaded.tensors.keys() == tensors.keys()
    )
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype and torch.equal(
            loaded.tensors[name], tensor
        ), name


def test_a_step_saved_twice_is_replaced(tmp_path):
    run = Run.open(tmp_path / "out")
    run.save_checkpoint(3, {"a": torch.zeros(1)}, None)
    run.save_checkpoint(3, {"a": torch.ones(1)}, None)
    assert (
        float(run.load_checkpoint().tensors["a"]) == 1.0
        and len(list((run.folder / "checkpoints").iterdir())) == 1
    )


@pytest.mark.parametrize("damage", ["truncate", "no json", "half json", "swapped", "other step"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys, damage):
    run = Run.open(tmp_path / "out")
    for step in (1, 2):
        run.log({"step": step})
        run.save_checkpoint(step, {"a": torch.full((64 * step,), float(step))}, {})
    new = run.folder / "checkpoints" / "2"
    if damage == "truncate":
        os.truncate(new / "state.safetensors", 100)
    elif damage == "no json":
        (new / "state.json").unlink()
    elif damage == "half json":
        os.truncate(new / "state.json", 9)
    elif damage == "swapped":
        (new / "state.safetensors").write_bytes(
            (new.with_name("1") / "state.safetensors").read_bytes()
        )
    else:
        (new / "state.json").write_text(
            (new / "state.json").read_text().replace('"step": 2', '"step": 1')
        )
    resumed = Run.open(tmp_path / "out", resume=True)
    assert str(new) in capsys.readouterr().out and not new.exists()
    assert resumed.load_checkpoint().step == 1 and rows(resumed) == [{"step": 1}]


def test_without_a_whole_checkpoint_nothing_is_done_again_in_silence(tmp_path):
    run = Run.open(tmp_path / "out")
    for step in (1, 2):
        run.log({"step": step})
        os.truncate(run.save_checkpoint(step, {"a": torch.ones(64)}, {}) / "state.safetensors", 100)
    before = listing(run.folder)
    with pytest.raises(
        UserError, match=r"no whole checkpoint.*--overwrite, which moves it to out.bak"
    ):
        Run.open(tmp_path / "out", resume=True)
    assert listing(run.folder) == before


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "checksums.b2"])
def test_every_flipped_bit_is_noticed(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.open(tmp_path / "run")
    for step in (1, 2):
        run.save_checkpoint(step, {"a": torch.full((8,), float(step))}, {"x": [1.5, "text"]})
    path = run.folder / "checkpoints" / "2" / file
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 37):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        loaded = run.load_checkpoint()
        assert (
            loaded is not None and loaded.step == 1 and "is damaged" in capsys.readouterr().out
        ), bit
    path.write_bytes(whole)
    assert run.load_checkpoint().step == 2  # type: ignore[union-attr]


def test_the_checksums_are_b2sums(tmp_path: Path) -> None:
    import subprocess

    if not shutil.which("b2sum"):
        pytest.skip("there is no b2sum on this machine")
    folder = Run.open(tmp_path / "run").save_checkpoint(1, {"a": torch.ones(5)}, {})
    assert (
        subprocess.run(
            ["b2sum", "--strict", "-c", "checksums.b2"], cwd=folder, capture_output=True, text=True
        ).returncode
        == 0
    )


def test_older_checkpoints_go_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = Run.open(tmp_path / "run", keep=1), []
    run.save_checkpoint(1, {"a": torch.zeros(2)}, {})
    rename = Path.rename

    def dying(self: Path, target: Any) -> Any:
        seen.append((self.name, sorted(p.name for p in self.parent.iterdir())))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dying)
    run.save_checkpoint(2, {"a": torch.ones(2)}, {})
    assert seen == [("1", ["1", "2"])]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_a_checkpoint_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch, code):
    run = Run.open(tmp_path / "out")
    for step in (1, 2):
        run.save_checkpoint(step, {"a": torch.ones(4)}, {})
    (run.folder / "checkpoints" / "3").write_text("a file of somebody's")
    before = listing(run.folder)

    def fails(path):
        raise OSError(code, os.strerror(code))

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=f"2 cannot be read .{os.strerror(code)}.*; try again"),
    ):
        patch.setattr(run_module, "load_file", fails)
        Run.open(tmp_path / "out", resume=True)
    assert (
        listing(run.folder) == before
        and Run.open(tmp_path / "out", resume=True).load_checkpoint().step == 2
    )


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    run = Run.open(tmp_path / "out", keep=1)
    run.save_checkpoint(1, {"a": torch.zeros(4)}, None)
    before = listing(run.folder)

    def full(*_):
        raise run_module.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(run_module, "save_file", full)
    with pytest.raises(UserError, match=r"disk.*full"):
        run.save_checkpoint(2, {"a": torch.ones(4)}, None)
    assert listing(run.folder) == before


# --- flatten

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
trees = st.recursive(
    scalars | st.integers(0, 9).map(lambda n: torch.arange(n)),
    lambda t: (
        st.lists(t, max_size=3)
        | st.lists(t, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), t, max_size=3)
    ),
    max_leaves=12,
)


def alike(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float):
        return a.hex() == b.hex()
    return a == b


@settings(max_examples=60, deadline=None)
@given(trees)
def test_flatten_round_trips_every_tree(tree):
    tensors, meta = flatten_state(tree)
    assert alike(tree, unflatten_state(tensors, json.loads(json.dumps(meta, allow_nan=False))))


def test_flatten_keeps_paths_that_collide_apart():
    tree = {
        "a": {"b": torch.tensor(1)},
        "a/b": torch.tensor(2),
        "$": (1, {"$": "tensor"}),
        0: -0.0,
        "0": random.Random(3).getstate(),
        "x": [math.inf, 1.0],
    }
    tensors, meta = flatten_state(tree)
    assert len(tensors) == 2 and alike(tree, unflatten_state(tensors, json.loads(json.dumps(meta))))


@pytest.mark.parametrize("bad", [object(), b"x", {1, 2}, torch.float32])
def test_flatten_refuses_by_place(bad):
    with pytest.raises(TypeError, match="state/0/thing is a"):
        flatten_state({"state": [{"thing": bad}]})


# --- the whole law


def train(out, *, steps=12, resume=False, die=None):
    """A small run with two optimizers, a torch and a Python generator.

    `die(step, where)` may kill it at three places of a step.
    """
    die = die or (lambda step, where: None)
    run = Run.open(out, resume=resume, keep=2)
    generator, python = torch.Generator().manual_seed(1), random.Random(2)
    params = [torch.randn(4, 3, generator=generator), torch.zeros(3)]
    params = [p.requires_grad_() for p in params]
    optimizers = [
        Prodigy(params[:1], use_bias_correction=True),
        torch.optim.AdamW(params[1:], lr=0.01),
    ]
    total, start = 0.0, 0
    if resume and (checkpoint := run.load_checkpoint()):
        tree = unflatten_state(checkpoint.tensors, checkpoint.meta)
        start, total = checkpoint.step, tree["total"]
        for p, saved in zip(params, tree["params"]):
            p.data.copy_(saved)
        for optimizer, state in zip(optimizers, tree["optimizers"]):
            optimizer.load_state_dict(state)
        generator.set_state(tree["generator"])
        python.setstate(tree["python"])
    for step in range(start, steps):
        x = torch.randn(8, 4, generator=generator)
        loss = ((x @ params[0] + params[1] - python.random()) ** 2).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item() / 3
        run.log({"step": step + 1, "loss": loss.item()})
        die(step + 1, "logged")
        if (step + 1) % 3 == 0:
            tree = dict(
                params=params,
                optimizers=[o.state_dict() for o in optimizers],
                total=total,
                generator=generator.get_state(),
                python=python.getstate(),
            )
            original = os.replace

            def replace(a, b, step=step, original=original):
                die(step + 1, "before rename")
                original(a, b)

            os.replace = replace
            try:
                run.save_checkpoint(step + 1, *flatten_state(tree))
            finally:
                os.replace = original
            die(step + 1, "saved")
    with atomic_write(run.folder / "weights.txt") as temporary:
        numbers = torch.cat([p.detach().flatten().double() for p in params]).tolist()
        temporary.write_text("\n".join(number.hex() for number in [*numbers, total]))


def in_child(function):
    """Runs a function in a forked process, so that it may be killed; returns the signal that ended
    it (0: none).
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.parametrize(
    "kills",
    [
        [(2, "logged")],
        [(3, "before rename")],
        [(3, "saved")],
        [(5, "logged"), (8, "logged")],
        [(6, "before rename"), (6, "logged")],
        [(12, "before rename")],
        [(12, "saved")],
        [(4, "logged"), (9, "before rename"), (11, "logged")],
    ],
)
def test_a_killed_run_resumes_and_ends_bit_identical(tmp_path, kills):
    train(tmp_path / "whole")
    for number, kill in enumerate(kills):

        def die(step, where, kill=kill):
            if (step, where) == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        assert (
            in_child(
                lambda resume=number > 0, die=die: train(
                    tmp_path / "killed", resume=resume, die=die
                )
            )
            == signal.SIGKILL
        )
    assert in_child(lambda: train(tmp_path / "killed", resume=True)) == 0
    assert listing(tmp_path / "killed") == listing(tmp_path / "whole")
