"""Several processes train one run: the numbers of one process, at any number of processes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_core.config import (
    AdapterConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    PriorConfig,
    SamplesConfig,
    Stage,
    TokensConfig,
    ValidationConfig,
)
from lora_core.toml import to_toml
from tests.conftest import rows
from tests.process_groups import ProcessGroups, process_groups

ROOT = Path(__file__).parent.parent
# (processes, batch, accumulation) of steps of four images
SPLITS = [(1, 1, 4), (2, 2, 1), (4, 1, 1)]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessGroups]:
    with process_groups(tmp_path_factory.mktemp("output")) as started:
        yield started


@pytest.fixture(scope="module")
def base(model: Path, photos: Path) -> Config:
    """Steps of four images: masks, crops, class images; adapters, a text encoder and tokens."""
    return Config(
        model=str(model),
        device="cpu",
        threads=1,
        batch_size=4,
        log_every=5,
        adapter=AdapterConfig(rank=2, dropout=0.1),
        data=DataConfig(images=str(photos), resolution=16, crop="random", flip=True, masks="file"),
        prior=PriorConfig("a cat", count=3),
        optimizer=OptimizerConfig(lr={"denoiser": 1e-2}),
        samples=SamplesConfig(steps=1, guidance=1, prompts=("a TOK", "TOK")),
        validation=ValidationConfig(bins=1),
        stages=(Stage(20, ("denoiser", "text_encoder", "tokens")),),
    )


@pytest.fixture
def run_on(groups: ProcessGroups, tmp_path: Path):
    """run_on(config, processes, name, *flags) trains in OUT = tmp_path / name; returns OUT."""

    def run(config: Config, processes: int, name: str, *flags: str) -> Path:
        out = tmp_path / name
        file = tmp_path / f"{name}.toml"
        file.write_text(to_toml(replace(config, out=str(out))))
        ended = groups.train(processes, [str(file), *flags])
        assert ended.status == [0] * processes, "\n".join(ended.output)
        for other in ended.output[1:]:  # one process prints
            assert other == ""
        return out

    return run


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """The trained parameters in the newest checkpoint, in float64."""
    newest = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    state = load_file(newest / "state.safetensors")
    return {name: t.double() for name, t in state.items() if name.startswith("groups")}


def difference(first: Path, other: Path) -> float:
    """The largest difference of a parameter between two runs, relative to the largest number in
    that parameter.
    """
    a, b = parameters(first), parameters(other)
    assert a.keys() == b.keys() and a
    return max(float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-12)) for k in a)


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    return [row["loss"] for row in rows(run) if "loss" in row]


def written(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*")}


def test_twenty_steps_agree_in_float64(base: Config, run_on) -> None:
    exact = replace(base, precision="fp64")
    one = run_on(exact, 1, "one")
    for processes, batch, accumulation in SPLITS:
        name = f"{processes}x{batch}x{accumulation}"
        other = run_on(replace(exact, batch_size=batch, accumulation=accumulation), processes, name)
        assert difference(one, other) < 1e-10, name
        assert len(rows(other)) == len(rows(one)) == 22  # 20 steps and two validations
        for mine, theirs in zip(rows(one), rows(other)):
            assert mine == pytest.approx(theirs, rel=1e-9)
        expected = {path.replace("one", name) for path in written(one)}
        assert written(other) == expected  # and nothing of another process
        shown = sorted((one / "samples").glob("*.png"))
        assert shown and shown[0].read_bytes() != b""


def test_first_gradients_agree_in_float32(base: Config, run_on) -> None:
    """After one step of plain gradient descent at a large rate the parameters are the gradients, up
    to that rate; with buckets.
    """
    descent = OptimizerConfig(
        "torch.optim.SGD", lr={"denoiser": 1e6, "tokens": 1e6}, clip=0, weight_decay={"denoiser": 0}
    )
    sharp = replace(
        base,
        optimizer=descent,
        data=replace(base.data, buckets=True, bucket_step=4, masks="none"),
        prior=PriorConfig(),
        tokens=TokensConfig(norm="none"),
        validation=ValidationConfig(every=-1),
        stages=(Stage(1, ("denoiser", "tokens")),),
    )
    one = parameters(run_on(sharp, 1, "one"))
    for processes, batch, accumulation in SPLITS:
        changed = replace(sharp, batch_size=batch, accumulation=accumulation)
        other = parameters(run_on(changed, processes, f"{processes}x{batch}"))
        for group in ("denoiser", "tokens"):
            ours = torch.cat([t.flatten() for name, t in one.items() if group in name])
            theirs = torch.cat([t.flatten() for name, t in other.items() if group in name])
            assert (ours - theirs).norm() < 1e-6 * ours.norm(), (processes, group)


def test_prodigys_distance_is_global(base: Config, run_on) -> None:
    prodigy = replace(
        base,
        precision="fp64",
        optimizer=OptimizerConfig("prodigy", args={"d0": 1e-4}),
        stages=(Stage(8, ("denoiser", "tokens")),),
    )
    one, two = run_on(prodigy, 1, "one"), run_on(replace(prodigy, batch_size=2), 2, "two")
    ours, theirs = rows(one)[-2], rows(two)[-2]
    assert ours["d_denoiser"] > 1e-4  # it grew
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert difference(one, two) < 1e-10


def test_another_number_of_processes_resumes_the_same_run(base: Config, run_on) -> None:
    config = replace(
        base, precision="fp64", batch_size=2, save_every=2, stages=(Stage(6, ("denoiser",)),)
    )
    whole = run_on(config, 2, "whole")
    half = replace(config, stages=(Stage(2, ("denoiser",)),))
    for processes in (1, 3):  # three processes have 2, 1 and 1 of the four images
        cut = run_on(half, 2, f"cut{processes}")
        assert "processes = 2" in (cut / "config.toml").read_text()
        again = run_on(config, processes, f"cut{processes}", "--resume")
        assert difference(whole, again) < 1e-10
        assert losses(again) == pytest.approx(losses(whole), rel=1e-9)


def test_validation_and_samples_are_shared_and_the_same(base: Config, run_on) -> None:
    config = replace(base, batch_size=1, stages=(Stage(4, ("denoiser",)),), prior=PriorConfig())
    config = replace(config, data=replace(config.data, masks="none"))
    one = run_on(replace(config, processes=2), 1, "one")  # one process computes a step for two
    two = run_on(config, 2, "two")
    before = [row for row in rows(one, "val") if row["step"] == 0]
    assert before == [row for row in rows(two, "val") if row["step"] == 0]
    assert difference(one, two) < 1e-5


def test_one_sentence_for_a_mistake(base: Config, groups: ProcessGroups, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    changes = {
        "rank 99 exceeds": replace(base, adapter=AdapterConfig(rank=99)),
        "a step has 1 image for 2 processes": replace(base, batch_size=1, processes=1),
        "--cuda-graph replays the steps of one process": replace(base, cuda_graph=True),
        "--device cpu:0 is one device": replace(base, device="cpu:0"),
    }
    for sentence, config in changes.items():
        file.write_text(to_toml(replace(config, out=str(tmp_path / "none"))))
        ended = groups.train(2, [str(file)])
        assert ended.status == [2, 2]
        assert ended.output[0].count("error: ") == 1 and sentence in ended.output[0]
        assert ended.output[1] == ""
        assert not (tmp_path / "none").exists()


def test_processes_with_other_images_are_refused(
    base: Config, groups: ProcessGroups, tmp_path: Path
) -> None:
    ended = groups.call(2, "tests.process_jobs:train_on_own_images", str(tmp_path), to_toml(base))
    assert ended.status == [2, 2]
    assert (
        "process 1 trains from something else than process 0: the captions of 1 image"
        in ended.output[0]
    )
