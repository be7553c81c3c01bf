"""Bytes of frozen weights: as they are, in another form, and streamed, against placed networks."""

from dataclasses import replace

import pytest
import torch

from lora_core.adapters import injection
from lora_core.config import Config
from lora_core.settings import AdapterSpec
from models.placement import checkpointed_blocks
from tests import tiny_flux
from training.memory.planned_weights import component_bytes, frozen_sizes, unpacked_bytes


@pytest.fixture(scope="module")
def transformer() -> torch.nn.Module:
    network = tiny_flux.pipeline().transformer
    injection.inject(network, AdapterSpec(targets=("*.to_q",), rank=2))
    return network


def test_adapters_are_not_among_the_frozen_weights(transformer: torch.nn.Module) -> None:
    every = sum(p.numel() for p in transformer.parameters())
    ours = sum(p.numel() for p in injection.adapter_parameters(transformer))
    assert sum(frozen_sizes(transformer).values()) == 4 * (every - ours)


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_a_quantized_network_is_smaller(transformer: torch.nn.Module, form: str) -> None:
    whole = component_bytes(Config(), transformer, is_denoiser=True)
    config = Config(quantize=form)  # type: ignore[arg-type]
    size = component_bytes(config, transformer, is_denoiser=True)
    assert size < whole and unpacked_bytes(config, transformer) > 0
    assert component_bytes(config, transformer, is_denoiser=False) == whole
    assert unpacked_bytes(Config(), transformer) == 0


def test_two_blocks_of_a_streamed_network_are_on_the_device(transformer: torch.nn.Module) -> None:
    config = Config(stream=True, gradient_checkpointing="blocks")
    sizes = frozen_sizes(transformer)
    blocks = checkpointed_blocks(transformer)
    outside = [
        size
        for path, size in sizes.items()
        if not path.startswith(("transformer_blocks", "single"))
    ]
    largest = 0
    for path in blocks:
        own = [size for name, size in sizes.items() if name.startswith(f"{path}.")]
        largest = max(largest, sum(own))
    found = component_bytes(config, transformer, is_denoiser=True)
    assert found == sum(outside) + 2 * largest
    kept = replace(config, gradient_checkpointing="none")
    assert component_bytes(kept, transformer, is_denoiser=True) == sum(sizes.values())
