"""The memory of a run by phase: what is on the device when, and the published models' plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import train
from lora_core.adapters import injection
from lora_core.config import AdapterConfig, Config, DataConfig, Stage
from lora_core.memory.live_tensors import tensor_bytes
from lora_core.settings import ImageSettings
from lora_core.tensor_trees import map_tensors
from training import run_adapters, setup
from training.memory.memory_plan import (
    ACTIVATIONS,
    AVERAGE,
    CONTEXT,
    GB,
    GRADIENTS,
    OVERHEAD,
    STATE,
    TRAINED,
    MemoryPlan,
    largest_size,
    plan_memory,
    takes_turns,
)
from training.memory.plan_options import Fit, find_fit
from training.memory.planned_step import (
    make_optimizer_state,
    on_meta,
    open_planned_run,
    planned_inputs,
    step_memory,
)


def plan(config: Config) -> MemoryPlan:
    return plan_memory(*train.resolve_functions(config, None, train.training_step))


def published(kind: str, **changes: Any) -> Config:
    """A LoRA of rank 16 for a published model, at the size that it was trained at."""
    side = 512 if kind == "sd1" else 1024
    config = Config(
        model=kind,
        precision="bf16",
        data=DataConfig(images="x", resolution=side),
        adapter=AdapterConfig(rank=16),
    )
    return replace(config, **changes)


@pytest.fixture
def tiny(model: Path) -> Config:
    return Config(
        model=str(model),
        data=DataConfig(images="x", resolution=32),
        adapter=AdapterConfig(rank=2),
        ema=0.9,
        stages=(Stage(1, ("denoiser",)), Stage(1, ("denoiser", "text_encoder"))),
    )


def test_networks_take_turns(tiny: Config) -> None:
    phases = {phase.name: phase.parts for phase in plan(tiny).phases}
    assert list(phases) == [
        "opening", "captions", "images", "step 1", "step 2", "samples", "decoding"
    ]  # fmt: skip
    networks = {"unet", "text_encoder", "vae"}
    present = {name: {k for k in networks if parts[k]} for name, parts in phases.items()}
    assert present == {
        "opening": {"unet", "text_encoder"},  # both get adapters
        "captions": {"text_encoder"},
        "images": {"vae"},
        "step 1": {"unet"},
        "step 2": {"unet", "text_encoder"},
        "samples": {"unet"},
        "decoding": {"vae"},
    }
    first, second = phases["step 1"], phases["step 2"]
    assert first[TRAINED] == second[TRAINED] and first[GRADIENTS] < second[GRADIENTS]
    assert first[STATE] >= 2 * first[AVERAGE] > 0  # adamw's two moments
    assert first[OVERHEAD] > CONTEXT and second[ACTIVATIONS] > first[ACTIVATIONS]


def test_on_the_cpu_all_networks_stay_and_nothing_is_estimated(tiny: Config) -> None:
    for phase in plan(replace(tiny, device="cpu")).phases:
        assert all(phase.parts[name] for name in ("unet", "text_encoder", "vae"))
        assert OVERHEAD not in phase.parts


def test_batches_of_random_crops_keep_the_vae(tiny: Config) -> None:
    crops = replace(tiny.data, crop="random", zoom=(1.0, 1.5))
    steps = [p for p in plan(replace(tiny, data=crops)).phases if p.name.startswith("step")]
    assert all(phase.parts["vae"] for phase in steps)


def test_sizes_of_buckets() -> None:
    assert largest_size(Config()) == (Config().data.resolution,) * 2
    data = replace(DataConfig(), resolution=512, buckets=True, bucket_step=64)
    height, width = largest_size(replace(Config(), data=data))
    assert 0.9 * 512**2 < height * width <= 512**2
    assert isinstance(data, ImageSettings)


def test_adapters_of_a_published_model_are_exact() -> None:
    """SD 1.5's published rank-16 LoRA of the attention layers has 3,188,736 numbers."""
    parts = plan(published("sd1")).phases[3].parts
    assert parts[TRAINED] == parts[GRADIENTS] == 4 * 3_188_736
    # 859,520,964 numbers in bf16, and the number of each layer of cross-attention
    assert parts["unet"] == 2 * 859_520_964 + 8 * 16


# ---------------------------------------------------------------- the published models


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "limit", "changes"),
    [
        ("flux-dev", 24, {"quantize": "fp8", "gradient_checkpointing": "blocks"}),
        ("flux-dev", 12, {"quantize": "fp8", "stream": True, "gradient_checkpointing": "blocks"}),
        ("sdxl", 8, {"gradient_checkpointing": "blocks"}),
        ("sd1", 5, {}),
    ],
)
def test_published_models_fit(kind: str, limit: int, changes: dict[str, Any]) -> None:
    config = published(kind, **changes)
    assert takes_turns(config)
    assert plan(config).peak.total < limit * GB


@pytest.mark.full
def test_options_for_every_card() -> None:
    config = published("sdxl", precision="fp32", batch_size=4)
    resolved, functions = train.resolve_functions(config, None, train.training_step)
    found = [find_fit(resolved, functions, size * GB) for size in (8, 12, 16, 24, 40, 80)]
    assert all(isinstance(fit, Fit) for fit in found)
    counts = [len(fit.words) for fit in found if isinstance(fit, Fit)]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0


# ---------------------------------------------------------------- a real device


def fill_network(network: nn.Module, device: str) -> None:
    """Give a network of the meta device memory and small numbers."""
    network.to_empty(device=device)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02)
        else:
            tensor.data.zero_()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["none", "blocks"])
@pytest.mark.parametrize(("kind", "batch"), [("sd1", 4), ("sdxl", 1)])
def test_a_planned_peak_is_the_gpus(kind: str, batch: int, mode: Any) -> None:
    """Within 10 %: resident tensors and one step, by torch's count of allocated bytes."""
    config = published(kind, batch_size=batch, gradient_checkpointing=mode)
    config, functions = train.resolve_functions(config, None, train.training_step)
    side = config.data.resolution
    with on_meta("cuda"):
        run = open_planned_run(config, "cuda")
        make_optimizer_state(run)
        inputs = planned_inputs(run, config.stages[0], (side, side))
        step = step_memory(
            functions, config.stages[0], run.config, run.model, run.optimization, inputs
        )
    planned = step.peak + step.workspace
    with on_meta("cuda"):
        model = open_planned_run(config, "cuda").model
    device = torch.device("cuda", torch.cuda.current_device())
    fill_network(model.denoiser, str(device))
    denoiser = model.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = run_adapters.parameter_groups(model.family, model.adapted, model.embeddings)
    model = replace(
        model, device=device, groups=groups, autocast=torch.autocast("cuda", enabled=False)
    )
    optimization = setup.open_optimizer(replace(config, device=str(device)), groups, {})
    real = [map_to(device, x) for x in inputs]
    parts = functions, config.stages[0], config, model, optimization, real
    step_memory(*parts)  # the state of the optimizer, and kernels that are chosen
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step_memory(*parts)
    measured = torch.cuda.max_memory_allocated() - before
    resident = tensor_bytes(list(denoiser.parameters()))
    assert planned + resident == pytest.approx(measured + resident, rel=0.1)
    assert injection.adapter_parameters(denoiser)


def map_to(device: torch.device, x: Any) -> Any:
    """Inputs of a step with random numbers on the device."""
    return map_tensors(x, lambda tensor: torch.rand(tensor.shape, device=device).to(tensor.dtype))


def test_text_adapters_that_drop_and_losses_that_read_attention_have_a_plan(tiny: Config) -> None:
    dropping = replace(tiny, adapter=AdapterConfig(rank=2, dropout=0.5), batch_size=3)
    bare = plan(replace(tiny, batch_size=3))
    assert plan(dropping).peak.total >= bare.peak.total
    attentive = replace(
        tiny,
        loss="attention",
        data=replace(tiny.data, masks="file"),
        stages=(Stage(1, ("denoiser", "text_encoder", "tokens")),),
    )
    assert plan(attentive).peak.total > 0
