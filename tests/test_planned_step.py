"""A planned step against a real one on the CPU: the same bytes, from shapes alone."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from lora_core.config import (
    AdapterConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    Stage,
    TokensConfig,
    ValidationConfig,
)
from lora_core.memory.live_tensors import tensor_bytes
from tests import tiny_flux, tiny_sdxl
from tests.opened_run import open_parts
from tests.test_live_tensors import allocator_peak
from training.inputs.step_inputs import make_step_inputs
from training.memory.memory_plan import _state_bytes
from training.memory.planned_step import (
    PlannedRun,
    StepMemory,
    make_optimizer_state,
    on_meta,
    open_planned_run,
    planned_inputs,
    step_memory,
)
from training.memory.planned_weights import frozen_sizes
from training.step import optimizer_step

SIDE = 64  # pixels
GROUPS = {"sd": ("denoiser", "text_encoder"), "sdxl": ("denoiser", "tokens"), "flux": ("denoiser",)}

QUICK = (("sd", "all"), ("sdxl", "blocks"), ("flux", "none"))  # the others are of make test-all
EVERY = tuple(itertools.product(GROUPS, ("none", "blocks", "all")))
CASES = [pytest.param(*own, marks=() if own in QUICK else pytest.mark.full) for own in EVERY]


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("planned")
    tiny_sdxl.save(place / "sdxl")
    tiny_flux.save(place / "flux")
    return {"sd": model, "sdxl": place / "sdxl", "flux": place / "flux"}


def make_config(family: str, folder: Path, photos: Path, out: Path, mode: str) -> Config:
    return Config(
        model=str(folder),
        out=str(out),
        device="cpu",
        batch_size=2,
        gradient_checkpointing=mode,  # type: ignore[arg-type]
        data=DataConfig(images=str(photos), resolution=SIDE),
        adapter=AdapterConfig(rank=4),
        tokens=TokensConfig(),
        optimizer=OptimizerConfig(name="prodigy" if family == "sdxl" else "adamw"),
        stages=(Stage(2, GROUPS[family]),),
        validation=ValidationConfig(every=-1),
    )


def measure(config: Config) -> tuple[Any, StepMemory]:
    """A real step of a run that has taken one, on the CPU."""
    opened = open_parts(config)
    opened.take_steps(1)
    stage = config.stages[0]
    (batch,) = opened.data.batches(config, 1, 2)
    inputs = make_step_inputs(opened.source, batch, stage, 1, check=False)
    parts = opened.functions, stage, config, opened.model, opened.optimization, inputs
    return opened, step_memory(*parts)


def plan(config: Config) -> tuple[PlannedRun, StepMemory]:
    config, functions = train.resolve_functions(config, None, train.training_step)
    with on_meta("cpu"):
        run = open_planned_run(config, "cpu")
        make_optimizer_state(run)
        inputs = planned_inputs(run, config.stages[0], (SIDE, SIDE))
        parts = functions, config.stages[0], run.config, run.model, run.optimization, inputs
        return run, step_memory(*parts)


def trained_bytes(run: Any) -> int:
    return tensor_bytes([list(params) for params in run.model.groups.values()])


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_a_planned_step_is_the_step(
    family: str, mode: str, folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    config = make_config(family, folders[family], photos, tmp_path / "run", mode)
    real, measured = measure(config)
    run, planned = plan(config)
    for name, network in real.model.family.modules.items():
        assert frozen_sizes(run.model.family.modules[name]) == frozen_sizes(network)
    assert trained_bytes(run) == trained_bytes(real)
    assert _state_bytes(run) == _state_bytes(PlannedRun(config, real.model, real.optimization))
    assert planned.gradients == measured.gradients
    assert planned.saved == pytest.approx(measured.saved, rel=0.05)
    assert planned.peak == pytest.approx(measured.peak, rel=0.05)


@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.full), "blocks"])
def test_a_planned_peak_is_the_allocators(
    mode: str, folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Of a model without convolutions, in which oneDNN has buffers of its own on the CPU, and of
    a batch so large that the CPU's buffers in attention (some 0.9 MB) are few of its bytes.
    """
    config = make_config("flux", folders["flux"], photos, tmp_path / "run", mode)
    config = replace(config, batch_size=10)
    opened = open_parts(config)
    opened.take_steps(1)
    stage = config.stages[0]
    (batch,) = opened.data.batches(config, 1, 2)
    inputs = make_step_inputs(opened.source, batch, stage, 1, check=False)
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer_step(
            opened.functions, stage, config, opened.model, opened.optimization, False, inputs
        )
    assert plan(config)[1].peak == pytest.approx(allocator_peak(profile), rel=0.05)
