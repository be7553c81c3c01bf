"""What a run leaves behind, the comparison of two runs, and the preview of noise levels."""

import json
import math
import re
import statistics
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import infer
import train
from lora_core.config import (
    AdapterConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    SamplesConfig,
    Stage,
    TokensConfig,
    ValidationConfig,
)
from lora_core.diffusion import validation
from lora_core.formats.model_folders import open_model_folder
from lora_core.toml import from_table, to_toml
from models import read_layout
from tests.conftest import rows, same, save_photos
from training import results


@pytest.mark.parametrize("after, warned", [(0.0998, False), (0.09995, True), (0.10005, True)])
def test_a_run_that_learned_nothing_is_told(
    capsys: pytest.CaptureFixture[str], after: float, warned: bool
) -> None:
    first, last = [[validation.Score("a", 0, 0, 500, loss)] for loss in (0.1, after)]
    results._print_results((first, last), "", "held-out loss")
    out, err = capsys.readouterr()
    words = "the loss hardly changed; train longer or with a higher learning rate"
    assert err == f"warning: {words}\n" * warned
    assert out.splitlines()[:2] == [
        "held-out loss at fixed timesteps and noise:",
        " timestep    before     after   change",
    ]


def test_a_full_fine_tune_leaves_a_whole_model(config: Config, quick: None) -> None:
    config = replace(
        config,
        adapter=AdapterConfig(kind="full", targets=("all",)),
        stages=(Stage(2, ("denoiser", "tokens")),),
    )
    run = train.train(config)
    before, after = (
        StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
        for path in (config.model, run / "model")
    )
    moved = [
        n
        for n, p in after.unet.state_dict().items()
        if not torch.equal(p, before.unet.state_dict()[n])
    ]
    assert len(moved) > 40 and all("norm" not in name for name in moved)
    assert same(before.text_encoder.state_dict(), after.text_encoder.state_dict()) and len(
        after.tokenizer
    ) == len(before.tokenizer)
    assert (
        not (run / "pytorch_lora_weights.safetensors").exists()
        and (run / "run_emb.safetensors").exists()
    )
    assert (
        infer.main(
            [
                "--model",
                str(run / "model"),
                "--prompt",
                "a b",
                "--steps",
                "2",
                "--out",
                str(run / "out.png"),
            ]
        )
        == 0
    )


def test_the_preview_needs_no_weights(
    config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text(
        to_toml(replace(config, noise=replace(config.noise, density="logit_normal")))
    )
    (copy := tmp_path / "model").mkdir()
    for file in Path(config.model).rglob("*.json"):
        (copy / file.relative_to(config.model)).parent.mkdir(exist_ok=True)
        (copy / file.relative_to(config.model)).write_text(file.read_text())
    assert (
        train.main(
            [
                str(tmp_path / "c.toml"),
                "--model",
                str(copy),
                "--preview-density",
                "--out",
                str(tmp_path / "mine"),
            ]
        )
        == 0
    )
    assert (
        "from clean to pure noise" in capsys.readouterr().out
        and (tmp_path / "mine_density.png").is_file()
        and not (tmp_path / "mine").exists()
    )


@pytest.fixture(scope="module")
def finished(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A whole run with images and plots."""
    config = Config(
        model=str(model),
        out=str(tmp_path_factory.mktemp("finished") / "run"),
        device="cpu",
        batch_size=2,
        log_every=1,
        data=DataConfig(images=str(photos), resolution=16),
        adapter=AdapterConfig(rank=4, kind="dora"),
        tokens=TokensConfig(init=("c",)),
        optimizer=OptimizerConfig(
            "prodigy", args={"d0": 1e-4}, betas={"tokens": (0.9, 0.99), "denoiser": (0.9, 0.99)}
        ),
        stages=(Stage(4, ("denoiser", "tokens"), low=0.1),),
        samples=SamplesConfig(steps=2, every=2, prompts=("a TOK",), new_prompts=("a TOK on mars",)),
        validation=ValidationConfig(bins=3, every=2, draws=2),
    )
    train.train(config)
    return config


def test_a_dora_run_says_what_a1111_and_comfyui_make_of_it(finished: Config) -> None:
    """With the errors of its own file, here from the file and the model's weights."""
    run = Path(finished.out)
    tensors = load_file(run / "run.safetensors")
    weights = open_model_folder(finished.model)["unet"]
    squares, total = {"A1111": 0.0, "ComfyUI": 0.0}, 0.0
    layout = read_layout(finished.model)
    for path in layout.components["unet"].shapes:
        module = "lora_unet_" + path.replace(".", "_")
        if f"{module}.dora_scale" not in tensors:
            continue
        parts = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
        down, up, alpha, scale = (tensors[f"{module}.{part}"].double() for part in parts)
        base = weights.read(f"{path}.weight").double()
        tuned = base + alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(base.shape)
        columns = tuned.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *scale.shape[2:])
        rows = [norm.flatten(1).norm(dim=1).reshape(scale.shape) for norm in (tuned, base)]
        wanted = tuned * scale / rows[0]
        total += float((wanted - base).square().sum())
        squares["A1111"] += float((tuned * (scale / columns) - wanted).square().sum())
        squares["ComfyUI"] += float((tuned * (scale / rows[1]) - wanted).square().sum())
    text = (run / "README.md").read_text()
    for name, square in squares.items():
        (shown,) = re.findall(rf"([\d.e+]+) % in {name}", text)
        assert float(shown) == pytest.approx(100 * (square / total) ** 0.5, rel=0.02)
    assert "## DoRA in A1111 and ComfyUI" in text
    assert f"--as lora --to kohya --model {finished.model}" in text


@pytest.mark.parametrize("kind, is_said", [("dora", True), ("lora", False)])
def test_a_dora_run_ends_with_a_note(config: Config, capsys, kind: str, is_said: bool) -> None:
    train.train(replace(config, adapter=replace(config.adapter, kind=kind)))
    said = capsys.readouterr().err
    assert ("note: A1111 and ComfyUI apply a DoRA under kohya's names" in said) is is_said
    assert ("--as lora --model BASE makes a plain LoRA" in said) is is_said


def test_a_run_leaves_the_files_of_the_contract(finished: Config) -> None:
    run = Path(finished.out)
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert names >= {
        "pytorch_lora_weights.safetensors",
        "run.safetensors",
        "run_emb.safetensors",
        "config.toml",
        "metrics.jsonl",
        "val.jsonl",
        "summary.json",
        "samples/step_000002.png",
        "samples/step_000004.png",
        "before_after.png",
        "report.html",
        "loss.png",
        "val.png",
        "distance.png",
        "checkpoints/4/state.safetensors",
    }
    for name in ("loss.png", "before_after.png", "samples/step_000004.png"):
        assert Image.open(run / name).convert("L").getextrema() != (255, 255)
    again = from_table(tomllib.loads((run / "config.toml").read_text()))
    assert again == finished
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seconds"] > 0 and summary["steps"] == 4
    scores = validation.read_scores(run)
    assert sorted(scores) == [0, 2, 4]
    for name, step in (("val_loss_before", 0), ("val_loss_after", 4)):
        assert summary[name] == pytest.approx(
            statistics.fmean(s.loss for s in scores[step]), rel=1e-12
        )


def test_compare_prints_paired_differences(
    finished: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    a = Path(finished.out)
    b = train.train(replace(finished, out=finished.out + "b", seed=3, resume=False))
    capsys.readouterr()
    assert train.main(["--compare", str(a), str(b)]) == 0
    printed = capsys.readouterr().out
    last = {
        run: {(r["key"], r["draw"], r["t"]): r["loss"] for r in rows(run, "val") if r["step"] == 4}
        for run in (a, b)
    }
    lines = {
        line.split()[0]: line.split()[1:]
        for line in printed.splitlines()
        if line.strip() and line.split()[0].replace(".", "").isdigit()
    }
    times = sorted({t for _, _, t in last[a]})
    assert len(times) == 3 and len(lines) == 3
    for t in times:
        changes = [last[b][k] - last[a][k] for k in last[a] if k[2] == t]
        assert len(changes) == 10
        *_, mean, error, pairs = lines[f"{t:.0f}"]
        assert float(mean) == pytest.approx(statistics.fmean(changes), abs=1e-6)
        assert float(error) == pytest.approx(statistics.stdev(changes) / math.sqrt(10), abs=1e-6)
        assert pairs == "10"
    assert Image.open(b / "compare_run.png").width > 100
    whole = [
        statistics.fmean(last[b][k] - last[a][k] for k in last[a] if k[:2] == pair)
        for pair in {k[:2] for k in last[a]}
    ]
    total = next(line.split() for line in printed.splitlines() if line.split()[:1] == ["all"])
    assert float(total[3]) == pytest.approx(statistics.fmean(whole), abs=1e-6)
    assert float(total[4]) == pytest.approx(
        statistics.stdev(whole) / math.sqrt(len(whole)), abs=1e-6
    )


def test_compare_refuses_runs_scored_on_other_images(
    finished: Config, config: Config, quick: None, tmp_path: Path, capsys: Any
) -> None:
    other = train.train(
        replace(
            config, data=replace(config.data, images=str(save_photos(tmp_path / "others", side=32)))
        )
    )
    assert train.main(["--compare", finished.out, str(other)]) == 2
    assert "different images, timesteps or draws" in capsys.readouterr().err
    assert train.main(["--compare", finished.out, str(tmp_path)]) == 2
    assert "has no val.jsonl" in capsys.readouterr().err
    assert train.main(["--compare", finished.out]) == 2


def test_a_run_without_validation_has_no_loss_before_and_after(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train.train(replace(config, validation=ValidationConfig(every=-1)))
    out = capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert (
        summary["val_loss_before"] is None
        and summary["val_loss_after"] is None
        and not (run / "val.jsonl").exists()
    )
    assert (
        "no validation" in out
        and "held-out" not in out
        and not any("val_loss" in row for row in rows(run))
    )
    assert "loss before" not in (run / "README.md").read_text()
    other = train.train(replace(config, out=config.out + "2"))
    text = (other / "README.md").read_text()
    assert (
        "loss on the training images" in text + capsys.readouterr().out and "held-out" not in text
    )
    assert train.main(["--compare", str(run), str(other)]) == 2
    assert "was trained without validation" in capsys.readouterr().err
