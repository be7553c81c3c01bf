"""Networks of a run that leave the device: who is there when, and the same numbers as without."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import train
from lora_core.config import AdapterConfig, Config, PriorConfig, Stage
from lora_core.errors import UserError
from lora_core.memory.residency import DENOISER, TEXT_ENCODERS, VAE, HostCopy, leaves_device
from tests import tiny_flux
from tests.conftest import final, merged, rows, same, save_pipeline
from tests.parted_memory import PartedMemory, parted_memory
from training.networks.stage_residency import StageResidency, choose_loading_device

DECODING_LOSS = """
import torch

def through_the_vae(step):
    seen = step.decode(step.x0_pred)
    return (seen - step.decode(step.x0)).square().flatten(1).mean(1)
"""


def both_runs(config: Config, **change: Any) -> tuple[Path, Path, PartedMemory]:
    """(run with all networks in one place, run whose networks come and go, their moves)."""
    config = merged(config, change)
    whole = train.train(config)
    own = Path(config.out)  # the name is in the images
    with parted_memory() as memory:
        parted = train.train(replace(config, out=str(own.parent / "parted" / own.name)))
    return whole, parted, memory


def assert_same_run(whole: Path, parted: Path) -> None:
    """The same parameters, losses, validations and images, to the bit."""
    assert same(final(whole), final(parted))
    for name in ("metrics", "val"):
        for a, b in zip(rows(whole, name), rows(parted, name), strict=True):
            assert a == b
    images = [
        sorted(path.relative_to(run) for path in run.rglob("*.png")) for run in (whole, parted)
    ]
    drawn = [name for name in images[0] if "samples" in name.parts or "class" in str(name)]
    assert images[0] == images[1] and drawn
    for name in [*drawn, Path("before_after.png")]:
        assert (whole / name).read_bytes() == (parted / name).read_bytes(), name


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "model"
    tiny_flux.save(folder)
    return folder


def test_parts_take_turns_and_each_comes_once_for_a_frozen_text(
    config: Config, flux: Path, without_plots: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A DoRA of Flux's transformer, with validation and samples: never two parts at once."""
    whole, parted, memory = both_runs(
        config,
        model=str(flux),
        adapter=AdapterConfig(rank=2, kind="dora"),
        data={"caption_dropout": 0.5},
        samples={"every": 1, "guidance": 3.0},
        validation={"every": 1, "count": 2},
        save_every=1,
    )
    assert_same_run(whole, parted)
    assert {len(there) for there in memory.together} <= {0, 1}
    order = list(memory.order())
    assert order[:9] == [
        "denoiser comes",  # adapters are made there
        "denoiser leaves",
        "VAE comes",  # the first validation
        "VAE leaves",
        "text encoders comes",
        "text encoders leaves",
        "denoiser comes",
        "denoiser leaves",
        "text encoders comes",  # the captions of the stage, in ones
    ]
    # validations and samples need the text encoders for prompts that are new: before the first
    # step, then for the samples' prompts and those of the base model
    assert order.count("text encoders comes") <= 5
    said = capsys.readouterr().out
    line = r"text encoders: 2 captions encoded in \d+ s, left the GPU \(8 GB freed\)"
    assert len(re.findall(line, said)) == 1  # the empty caption of dropped ones, too
    assert re.search(r"VAE: 4 images encoded in \d+ s, left the GPU \(4 GB freed\)", said)
    assert said.count("denoiser: on the GPU (4 GB)") == 1
    assert said.count("denoiser: left the GPU (4 GB freed)") == 1


def test_what_trains_stays_together_and_leaves_with_its_stage(
    config: Config, without_plots: None
) -> None:
    """Tokens, then everything, then the denoiser, with swapped captions of prior preservation."""
    whole, parted, memory = both_runs(
        config,
        stages=(
            Stage(1, ("tokens",)),
            Stage(1, ("denoiser", "text_encoder", "tokens")),
            Stage(2, ("denoiser",)),
        ),
        prior=PriorConfig(prompt="a cat", count=2, swap={"TOK": "cat"}),
        samples={"every": 1},
        optimizer={"lr": {}},
        adapter=AdapterConfig(rank=2, kind="dora"),
    )
    assert_same_run(whole, parted)
    assert (DENOISER, TEXT_ENCODERS) in memory.together
    assert not any(VAE in there and len(there) > 1 for there in memory.together)
    assert set(memory.order()) == {
        *(f"{part} comes" for part in (DENOISER, TEXT_ENCODERS, VAE)),
        *(f"{part} leaves" for part in (DENOISER, TEXT_ENCODERS, VAE)),
    }


def test_a_vae_that_steps_read_is_there(config: Config, quick: None, tmp_path: Path) -> None:
    """For new pixels in each step, a loss of decoded pixels, and random holes."""
    loss = tmp_path / "seen.py"
    loss.write_text(DECODING_LOSS)
    painter = save_pipeline(tmp_path / "painter", channels=9)
    changes = (
        {"data": {"crop": "random"}},
        {"loss": f"{loss}:through_the_vae"},
        {"model": str(painter)},
    )
    for number, change in enumerate(changes):
        own = replace(config, out=f"{config.out}{number}")
        whole, parted, memory = both_runs(own, **change)
        assert same(final(whole), final(parted))
        assert (VAE, DENOISER) in memory.together
        assert (VAE, TEXT_ENCODERS) not in memory.together


def test_a_run_goes_on_with_other_places_and_ends_with_the_same_bits(
    config: Config, quick: None
) -> None:
    """Stopped with all networks in one place, resumed with networks that leave."""
    longer = replace(config, stages=(Stage(steps=4),))
    whole = train.train(longer)
    other = replace(config, out=config.out + "2")
    train.train(other)
    with parted_memory():
        train.train(replace(longer, out=other.out, resume=True))
    assert same(final(whole), final(Path(other.out)))


def test_nothing_leaves_on_a_cpu_and_asking_for_it_is_refused(config: Config) -> None:
    with pytest.raises(UserError, match="--no-offload has no effect on the CPU"):
        train.train(replace(config, offload=False))


def test_where_weights_are_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    """To the host, if networks leave the device or are packed or divided on their way there."""
    gpu, host = torch.device("cuda"), torch.device("cpu")
    packed = Config(quantize="fp8", offload=False)
    for config in (Config(), packed, Config(stream=True), Config(shard=True, offload=False)):
        assert choose_loading_device(config, gpu) == host
        assert leaves_device(gpu, offload=config.offload, family="") == config.offload
    assert not capsys.readouterr().out
    assert choose_loading_device(Config(offload=False), gpu) == gpu
    assert choose_loading_device(Config(family="own.py:FAMILY"), gpu) == gpu
    said = "--family own.py:FAMILY: text encoders and VAE stay on the GPU, too\n"
    assert capsys.readouterr().out == said


def test_a_cuda_graph_keeps_what_its_steps_read_where_it_is() -> None:
    moves: list[tuple[bool, int]] = []
    parts = {name: [nn.Linear(1, 1)] for name in (TEXT_ENCODERS, DENOISER, VAE)}
    numbers = {id(own[0]): i for i, own in enumerate(parts.values())}

    def place(network: nn.Module, device: torch.device | None, host: HostCopy) -> int:
        moves.append((device is not None, numbers[id(network)]))
        return 0

    for keeps in (False, True):
        moves.clear()
        cpu = torch.device("cpu")
        found = StageResidency(parts, cpu, moves=True, keeps_addresses=keeps, place=place)
        found.begin_steps([DENOISER])
        found.use(DENOISER)
        with found.in_turns():
            found.use(VAE)
            assert found.present == ({DENOISER, VAE} if keeps else {VAE})
        assert found.present == {DENOISER}
        assert moves.count((True, 1)) == (1 if keeps else 2)
        found.use(VAE)  # in a step: it stays, and comes back after an evaluation
        with found.in_turns():
            found.use(DENOISER)
        assert found.present == {DENOISER, VAE}
        found.end_steps()
        found.use(TEXT_ENCODERS)
        assert found.present == {TEXT_ENCODERS}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_on_a_gpu_a_run_has_the_same_bits_with_and_without(
    config: Config, flux: Path, without_plots: None, graph: bool
) -> None:
    change = {"device": "cuda", "samples": {"every": 1}, "validation": {"every": 1}}
    for name, model, stages in (
        ("flux", str(flux), (Stage(5),)),
        ("sd", config.model, (Stage(2, ("tokens",)), Stage(5))),
    ):
        own = merged(config, {**change, "model": model, "stages": stages, "cuda_graph": graph})
        own = merged(own, {"optimizer": {"lr": {}}, "out": f"{config.out}_{name}"})
        ours = train.train(own)
        kept = Path(own.out).parent / "kept" / Path(own.out).name
        other = train.train(replace(own, offload=False, out=str(kept)))
        assert_same_run(other, ours)
