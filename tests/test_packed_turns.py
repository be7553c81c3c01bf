"""Packed and streamed networks take turns as the others do: the same bits, and in each phase the
networks that the plan counts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import train
from lora_core.config import AdapterConfig, Config, Stage
from lora_core.memory.quantized_weights import QuantizedLinear
from lora_core.memory.residency import DENOISER, TEXT_ENCODERS, VAE, HostCopy, place_component
from lora_core.memory.streamed_blocks import find_streamed
from models import load_family, placement
from models.placement import place_networks
from tests.conftest import merged
from tests.parted_memory import PartedMemory
from tests.test_stage_residency import assert_same_run, both_runs
from training.memory import planned_weights
from training.memory.memory_plan import plan_memory

PARTS = {"unet": DENOISER, "transformer": DENOISER, "vae": VAE}
STREAMED = {"stream": True, "gradient_checkpointing": "blocks"}
TEXTS = (Stage(1, ("tokens",)), Stage(1, ("denoiser", "text_encoder")))
CASES: dict[str, dict[str, Any]] = {
    "fp8": {"quantize": "fp8"},
    "int8, texts train": {"quantize": "int8", "stages": TEXTS, "adapter": {"kind": "dora"}},
    "int4, streamed": {"quantize": "int4", **STREAMED, "adapter": {"kind": "dora"}},
    "streamed, new pixels": {**STREAMED, "data": {"crop": "random"}},
    "tokens": {
        "quantize": "fp8",
        **STREAMED,
        "stages": (Stage(1, ("tokens",)),),
        "adapter": AdapterConfig(),
    },
}


@pytest.fixture
def large_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text encoder is as large as T5."""
    monkeypatch.setattr(placement, "LARGE_ENCODER", 1)
    monkeypatch.setattr(planned_weights, "LARGE_ENCODER", 1)


def planned_parts(config: Config) -> dict[str, set[tuple[str, ...]]]:
    """Phase -> the parts that the plan counts; of several phases with steps together."""
    config = replace(config, device="cuda")
    plan = plan_memory(*train.resolve_functions(config, None, train.training_step))
    found: dict[str, set[tuple[str, ...]]] = {}
    for phase in plan.phases:
        there = set()
        for name, size in phase.parts.items():
            if size and (name in PARTS or name.startswith("text_encoder")):
                there.add(PARTS.get(name, TEXT_ENCODERS))
        found.setdefault(phase.name.split()[0], set()).add(tuple(sorted(there)))
    return found


def assert_as_planned(config: Config, memory: PartedMemory) -> None:
    planned, calls = planned_parts(config), memory.calls
    assert {memory.opened()} == planned["opening"]
    assert calls["denoise, trains"] == planned["step"]
    evaluated = {"encode": "captions", "encode_images": "images", "decode": "decoding"}
    for method, phase in evaluated.items():
        assert planned[phase] <= calls[method] <= planned[phase] | planned["step"], method
    assert planned["samples"] <= calls["denoise"] <= planned["samples"] | planned["step"]
    largest = set().union(*planned.values())
    for there in memory.together:
        assert any(set(there) <= set(most) for most in largest), there


@pytest.mark.parametrize("change", CASES.values(), ids=CASES)
def test_a_run_has_the_same_bits_and_the_phases_of_its_plan(
    config: Config, without_plots: None, large_encoders: None, change: dict[str, Any]
) -> None:
    own = merged(config, {**change, "precision": "bf16", "samples": {"every": 1}})
    own = merged(own, {"optimizer": {"lr": {}}, "validation": {"every": 1, "count": 2}})
    whole, parted, memory = both_runs(own)
    assert_same_run(whole, parted)
    assert_as_planned(own, memory)


def test_streamed_blocks_stay_on_the_host_and_no_copy_is_left(model: Path) -> None:
    """What moves of a streamed denoiser are the tensors outside its blocks."""
    unet = load_family(str(model)).modules["unet"]
    blocks = tuple(f"{path}." for path in placement.checkpointed_blocks(unet))
    outside = sum(p.nbytes for path, p in unet.named_parameters() if not path.startswith(blocks))
    network = load_family(str(model))
    place_networks(network, torch.device("cpu"), "none", stream=True)
    unet = network.modules["unet"]
    streamed = find_streamed(unet)
    assert streamed is not None
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 5, 16)
    with torch.no_grad():
        for _ in range(2):  # the first pass finds the order out
            unet(*inputs)
    assert streamed.ahead
    assert place_component(unet, None, HostCopy()) == outside
    assert not streamed.ahead


def test_one_layer_is_on_the_device_as_it_was(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While layers are packed; the meta device stands for the GPU."""
    family = load_family(str(model))
    unet, whole = family.modules["unet"], []

    def pack(linear: nn.Linear, quantize: Any) -> QuantizedLinear:
        whole.append(sum(p.nbytes for p in unet.parameters() if p.is_meta and p.ndim == 2))
        assert whole[-1] == linear.weight.nbytes
        return QuantizedLinear(linear, quantize)

    monkeypatch.setattr(placement, "QuantizedLinear", pack)
    place_networks(family, torch.device("meta"), "int8")
    assert len(whole) == len(
        placement.quantizable_paths(load_family(str(model)).modules["unet"], "int8")
    )


def test_a_divided_denoiser_and_a_graph_stay_where_they_are(config: Config) -> None:
    shard = planned_parts(replace(config, shard=True, processes=2))
    assert shard == {
        "opening": {(DENOISER,)},
        "captions": {(DENOISER, TEXT_ENCODERS)},
        "images": {(VAE, DENOISER)},
        "step": {(DENOISER,)},
        "samples": {(DENOISER,)},
        "decoding": {(VAE, DENOISER)},
    }
    graph = planned_parts(replace(config, cuda_graph=True))
    assert graph == {
        **shard,
        "captions": {(TEXT_ENCODERS,)},
        "images": {(VAE,)},
        "prompts": {(DENOISER, TEXT_ENCODERS)},
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("change", CASES.values(), ids=CASES)
def test_on_a_gpu_a_packed_run_has_the_same_bits_with_and_without(
    config: Config, without_plots: None, large_encoders: None, change: dict[str, Any]
) -> None:
    own = merged(config, {**change, "precision": "bf16", "samples": {"every": 1}})
    own = merged(own, {"optimizer": {"lr": {}}, "device": "cuda"})
    ours = train.train(own)
    kept = Path(own.out).parent / "kept" / Path(own.out).name
    assert_same_run(train.train(replace(own, offload=False, out=str(kept))), ours)
