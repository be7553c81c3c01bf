"""Several processes train one run: the numbers of one process, at any number of processes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

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
from tests.conftest import rows, save_photos
from tests.process_groups import ProcessGroups, free_port, process_groups
from tests.run_difference import largest_difference, trained_parameters

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
        assert largest_difference(one, other) < 1e-10, name
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
    one = trained_parameters(run_on(sharp, 1, "one"))
    for processes, batch, accumulation in SPLITS:
        changed = replace(sharp, batch_size=batch, accumulation=accumulation)
        other = trained_parameters(run_on(changed, processes, f"{processes}x{batch}"))
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
    assert largest_difference(one, two) < 1e-10


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
        assert largest_difference(whole, again) < 1e-10
        assert losses(again) == pytest.approx(losses(whole), rel=1e-9)


def test_validation_and_samples_are_shared_and_the_same(base: Config, run_on) -> None:
    config = replace(base, batch_size=1, stages=(Stage(4, ("denoiser",)),), prior=PriorConfig())
    config = replace(config, data=replace(config.data, masks="none"))
    one = run_on(replace(config, processes=2), 1, "one")  # one process computes a step for two
    two = run_on(config, 2, "two")
    before = [row for row in rows(one, "val") if row["step"] == 0]
    assert before == [row for row in rows(two, "val") if row["step"] == 0]
    assert largest_difference(one, two) < 1e-5


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


def test_the_checks_of_images_are_shared(groups: ProcessGroups, tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos")
    ended = groups.call(2, "tests.process_jobs:check_images_together", str(folder))
    assert ended.status == [0, 0], "\n".join(ended.output)


def test_a_process_that_fails_shows_its_traceback(
    base: Config, groups: ProcessGroups, tmp_path: Path
) -> None:
    changed = replace(base, out=str(tmp_path / "run"))
    ended = groups.call(2, "tests.process_jobs:fail_in_process_one", to_toml(changed))
    assert ended.status == [2, 1]
    assert "process 0 ends, for it lost another one" in ended.output[0]
    assert ended.output[1].count("Traceback") == 1
    assert "ZeroDivisionError: of our own making" in ended.output[1]


# A loss by which something happens in the last process alone, in step 3: NaN, or Ctrl-C.
BAD_STEP = """
import os, signal
from lora_core.diffusion.losses import mse

def loss(step, at=2, how="none"):
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    if step.step == at and is_last:
        if how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        return mse(step) * float("nan")
    return mse(step)
"""


@pytest.fixture
def bad_step(base: Config, tmp_path: Path) -> Config:
    """Six steps, the third of which is bad in the last process."""
    (tmp_path / "bad_step.py").write_text(BAD_STEP)
    return replace(
        base,
        precision="fp64",
        log_every=1,
        prior=PriorConfig(),
        loss=f"{tmp_path / 'bad_step.py'}:loss",
        stages=(Stage(6, ("denoiser",)),),
    )


def test_a_step_that_is_nan_in_one_process_is_skipped_in_all(bad_step: Config, run_on) -> None:
    one, two = run_on(bad_step, 1, "one"), run_on(replace(bad_step, batch_size=2), 2, "two")
    assert largest_difference(one, two) < 1e-10
    ours, theirs = ([row for row in rows(run) if "loss" in row] for run in (one, two))
    assert ours[2]["loss"] is theirs[2]["loss"] is None
    assert [row.get("skipped") for row in theirs] == [None, None, 1, 1, 1, 1]
    assert [row.get("skipped") for row in ours] == [row.get("skipped") for row in theirs]
    good = run_on(replace(bad_step, loss="mse"), 1, "good")
    assert largest_difference(one, good) > 1e-3  # a step is missing


@pytest.mark.parametrize("shard", [False, True])
def test_a_first_step_of_nan_in_one_process_ends_all(
    bad_step: Config, groups: ProcessGroups, tmp_path: Path, shard: bool
) -> None:
    file, out = tmp_path / "config.toml", str(tmp_path / "run")
    bad = replace(bad_step, precision="fp32", loss_arg={"at": 0}, out=out, shard=shard)
    file.write_text(to_toml(replace(bad, validation=ValidationConfig(every=-1))))
    ended = groups.train(2, [str(file)])
    assert ended.status == [2, 2], "\n".join(ended.output)
    assert "error: process 1: loss loss returned nan for row 0" in ended.output[1]
    assert "error: process 0 ends, for it lost another one" in ended.output[0]
    for said in ended.output:
        assert "Traceback" not in said and "waitForInput" not in said


def test_an_interrupted_run_says_once_how_to_go_on(
    bad_step: Config, groups: ProcessGroups, tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    out = str(tmp_path / "run")
    file.write_text(to_toml(replace(bad_step, loss_arg={"how": "interrupt"}, out=out)))
    ended = groups.train(2, [str(file)])
    assert ended.status == [130, 130]
    assert "the run is saved after step 4" in ended.output[0]
    assert ended.output[1] == ""


@pytest.mark.parametrize("streams", [False, True])
def test_left_out_and_streamed_images_give_the_numbers_of_one_process(
    base: Config, run_on, photos: Path, tmp_path: Path, streams: bool
) -> None:
    """A damaged image among those of a folder; the images in tar files."""
    data = replace(base.data, masks="none", buckets=True, bucket_step=4)
    if streams:
        for number in range(2):
            with tarfile.open(tmp_path / f"{number}.tar", "w") as shard:
                for file in sorted(photos.glob(f"[{'01' if number else '234'}].*")):
                    if ".mask" not in file.name:
                        shard.add(file, file.name)
        shards = str(tmp_path / "{0..1}.tar")
        changed = replace(data, images="", dataset=shards, streaming=True)
    else:
        folder = Path(shutil.copytree(photos, tmp_path / "photos"))
        (folder / "00.png").write_bytes((folder / "0.png").read_bytes()[:60])
        (folder / "00.txt").write_text("a photo of TOK")
        changed = replace(data, images=str(folder), skip_bad=True)
    config = replace(base, precision="fp64", prior=PriorConfig(), data=changed, stages=(Stage(4),))
    one = run_on(config, 1, "one")
    for processes, batch in ((2, 2), (4, 1)):
        other = run_on(replace(config, batch_size=batch), processes, f"on{processes}")
        assert largest_difference(one, other) < 1e-10
        assert losses(one) == pytest.approx(losses(other), rel=1e-9)
        same = {path.replace("one", other.name) for path in written(one)}
        assert written(other) == same
    if not streams:
        assert "00.png: " in (other / "skipped_files.txt").read_text()
        whole = run_on(replace(config, data=data), 1, "whole")
        assert largest_difference(one, whole) < 1e-10


# A loss by which process 1 ends in the middle of step 5 of the first launch, once.
DEADLY = """
import os, signal
from pathlib import Path
from lora_core.diffusion.losses import mse

def loss(step, how="kill", mark=""):
    if step.step == 4 and os.environ["RANK"] == "1" and not Path(mark).exists():
        Path(mark).write_text("")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("this process ends here")
    return mse(step)
"""


def launch(*words: str) -> subprocess.Popen[str]:
    """A launcher of the environment, say torchrun, and its output."""
    program = Path(sys.executable).with_name(words[0])
    return subprocess.Popen(
        [str(program), *words[1:]],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def short(base: Config, tmp_path: Path) -> tuple[Path, Config]:
    """(the file of a config, the config): eight steps with a checkpoint after each second one."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    config = replace(
        base,
        precision="fp64",
        batch_size=2,
        save_every=2,
        prior=PriorConfig(),
        loss=f"{tmp_path / 'deadly.py'}:loss",
        loss_arg={"mark": str(tmp_path / "mark")},
        out=str(tmp_path / "run"),
        stages=(Stage(8, ("denoiser",)),),
    )
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    return file, config


@pytest.mark.soak
def test_a_killed_process_ends_the_job_and_a_restart_goes_on(
    short: tuple[Path, Config], tmp_path: Path, run_on
) -> None:
    file, config = short
    agent = launch(
        "torchrun", "--nproc-per-node", "2", "--max-restarts", "1", "train.py", str(file)
    )
    said, _ = agent.communicate(timeout=600)
    assert agent.returncode == 0, said
    assert "restart 1: the run goes on from its newest checkpoint" in said
    assert "resumed after step 4" in said
    whole = run_on(replace(config, loss_arg={"mark": str(file)}), 2, "whole")
    assert largest_difference(whole, tmp_path / "run") < 1e-10
    assert losses(whole) == pytest.approx(losses(tmp_path / "run"), rel=1e-9)


@pytest.mark.soak
def test_a_process_whose_loss_fails_ends_the_job(short: tuple[Path, Config]) -> None:
    file, config = short
    mark = ["--loss-arg", "how=raise", f"mark={config.loss_arg['mark']}"]
    agent = launch("torchrun", "--nproc-per-node", "2", "train.py", str(file), *mark)
    said, _ = agent.communicate(timeout=600)
    assert agent.returncode != 0
    assert re.search(r"error: process 1: .*deadly.py.*this process ends here", said), said
    assert "Root Cause" in said and "process 0 ends, for it lost another one" in said


@pytest.mark.soak
def test_a_restart_takes_up_no_older_run(short: tuple[Path, Config], tmp_path: Path) -> None:
    """A folder that is refused stays as it is, however often torchrun tries."""
    file, _ = short
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("an older run")
    agent = launch(
        "torchrun", "--nproc-per-node", "2", "--max-restarts", "2", "train.py", str(file)
    )
    said, _ = agent.communicate(timeout=600)
    assert agent.returncode != 0
    assert said.count("already holds a run") == 3
    assert written(tmp_path / "run") == {"metrics.jsonl"}


@pytest.mark.soak
def test_two_agents_are_two_machines(short: tuple[Path, Config], tmp_path: Path, run_on) -> None:
    file, config = short
    (tmp_path / "mark").write_text("")  # nobody dies
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    words = ["--nnodes", "2", "--nproc-per-node", "1", *meeting, "train.py", str(file)]
    agents = [launch("torchrun", *words) for _ in range(2)]
    said = [agent.communicate(timeout=600)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    assert sum(text.count("done: ") for text in said) == 1
    whole = run_on(config, 2, "whole")
    assert largest_difference(whole, tmp_path / "run") < 1e-10


@pytest.mark.soak
def test_accelerates_launcher_is_taken(short: tuple[Path, Config], tmp_path: Path, run_on) -> None:
    pytest.importorskip("accelerate")
    file, config = short
    (tmp_path / "mark").write_text("")
    words = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    port = [
        "--main_process_port",
        str(free_port()),
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    agent = launch("accelerate", *words, *port, "train.py", str(file))
    said, _ = agent.communicate(timeout=600)
    assert agent.returncode == 0, said
    assert largest_difference(run_on(config, 2, "whole"), tmp_path / "run") < 1e-10


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_all_processes(
    short: tuple[Path, Config], tmp_path: Path, number: int
) -> None:
    file, _ = short
    (tmp_path / "mark").write_text("")
    long = ["--stages.0.steps", "2000", "--save-every", "0", "--log-every", "1"]
    agent = launch("torchrun", "--nproc-per-node", "2", "train.py", str(file), *long)
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and len(log.read_bytes().splitlines()) > 3):
        assert agent.poll() is None
        time.sleep(0.2)
    agent.send_signal(number)
    said, _ = agent.communicate(timeout=120)
    assert agent.returncode != 0
    assert said.count("interrupted: ") == 1, said  # by the first process alone
    assert said.count("the run is saved after step") == 1, said
    assert "torchrun --nproc-per-node 2 train.py" in said
    assert trained_parameters(tmp_path / "run")
