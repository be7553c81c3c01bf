"""What a checkpoint keeps (averages, the loss scale), and the files that a resumed run writes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from lora_core import formats
from lora_core.config import Config, Stage
from lora_core.errors import UserError
from lora_core.formats import Layout
from tests.conftest import distance, final, learned, rows, same


def test_the_moving_average_is_what_is_kept_and_shown(config: Config, quick: None) -> None:
    config = replace(
        config, stages=(Stage(4),), optimizer=replace(config.optimizer, lr={"denoiser": 0.1})
    )
    plain, mean = train.train(config), train.train(replace(config, out=config.out + "2", ema=0.5))
    assert same(learned(plain), learned(mean))  # training itself does not see it
    files = [load_file(run / "pytorch_lora_weights.safetensors") for run in (plain, mean)]
    assert (
        distance(*files) > 0.01 and rows(plain, "val")[-1]["loss"] != rows(mean, "val")[-1]["loss"]
    )
    # the average begins as the start, so that three updates at decays 1/5, 1/4, 1/3 ... are between
    # the first and the last step
    half = replace(config, out=config.out + "3", ema=0.5, stages=(Stage(2),))
    train.train(half)
    assert same(final(train.train(replace(half, stages=config.stages, resume=True))), final(mean))
    with pytest.raises(UserError, match="was written with --ema; resume as the run began"):
        train.train(replace(half, ema=0.0, stages=(Stage(5),), resume=True))


def test_half_precision_with_a_loss_scale_that_is_kept(config: Config, quick: None) -> None:
    config = replace(config, precision="fp16", stages=(Stage(3, ("denoiser", "tokens")),))
    run = train.train(config)
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in learned(run).values())
    assert "scaler/current" in final(run)
    other = replace(config, out=config.out + "2", stages=(Stage(2, ("denoiser", "tokens")),))
    train.train(other)
    train.train(replace(other, stages=config.stages, resume=True))
    assert same(final(run), final(Path(other.out)))


def test_the_files_of_a_resumed_run_are_those_of_the_run_left_alone(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, stages=(Stage(4, ("denoiser", "tokens")),), save_every=2, keep=9)
    run = train.train(config)

    def content() -> dict[str, object]:
        files = {
            file.relative_to(run).as_posix(): file.read_bytes()
            for file in run.rglob("*")
            if file.is_file()
        }
        kept = {
            name: data
            for name, data in files.items()
            if "/state." not in name and "checksums" not in name
        }
        measured = {"seconds": 0, "peak_memory": 0}  # of the process, not of the run's result
        card = files["README.md"].decode().splitlines()
        return kept | {
            "summary.json": json.loads(files["summary.json"]) | measured,
            "README.md": [line for line in card if not line.startswith("| peak memory |")],
            "names": sorted(files),
        }

    whole = content()
    for file in (
        "checkpoints/4",
        "samples",
        "run.safetensors",
        "checkpoints/2/run-000002.safetensors",
        "checkpoints/2/run-000002_emb.safetensors",
    ):
        shutil.rmtree(run / file) if (run / file).is_dir() else (
            run / file
        ).unlink()  # as if killed between the state and the files of step 2
    train.train(replace(config, resume=True))
    assert "wrote the files that were missing" in capsys.readouterr().out
    assert content() == whole
    (run / "pytorch_lora_weights.safetensors").write_bytes(b"old")
    (run / "summary.json").unlink()
    train.train(replace(config, resume=True))  # all steps done, files missing or stale
    assert content() == whole


def test_a_checkpoint_of_an_earlier_version_is_taken_and_said(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train.train(config)
    (folder,) = (run / "checkpoints").iterdir()
    state = json.loads((folder / "state.json").read_text())
    del state["meta"]["identity"], state["meta"]["changes"]
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "checksums.b2").unlink()
    train.train(replace(config, stages=(Stage(3),), resume=True, seed=3))
    assert (
        "is of an earlier version and does not say what it was made from" in capsys.readouterr().out
    )


def test_files_of_checkpoints_are_named_after_the_run_and_older_names_are_read(
    config: Config, quick: None, layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, stages=(Stage(2, groups=("denoiser", "tokens")),), save_every=2)
    run = train.train(config)
    folder = run / "checkpoints" / "2"
    names = ("run-000002.safetensors", "run-000002_emb.safetensors")
    assert {file.name for file in folder.glob("run*")} == set(names)
    state = formats.load(folder, layout)
    assert state.tokens and formats.load(folder / names[0], layout).components
    for name in names:  # as an earlier version called them
        (folder / name).rename(folder / name.replace("run-000002", "2"))
    earlier = formats.load(folder, layout)
    assert earlier.metadata == state.metadata and earlier.tokens.keys() == state.tokens.keys()
    capsys.readouterr()
    train.train(replace(config, resume=True))
    assert "missing or damaged" not in capsys.readouterr().out
    assert not list(folder.glob("run*"))
    (folder / "2_emb.safetensors").unlink()  # then all of them are written, under their names now
    train.train(replace(config, resume=True))
    assert {file.name for file in folder.glob("run*")} == set(names)
    shutil.copy(folder / names[1], folder / "2_emb.safetensors")
    assert formats.load(folder, layout).tokens.keys() == state.tokens.keys()  # both names are there
