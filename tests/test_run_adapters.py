"""What a kind asks of training is done in runs: rates of the optimizer's groups, gradient hooks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from lora_core.adapters.adapted_layer import adapted_layers, layers_with_adapter
from lora_core.adapters.kinds import kind_class
from lora_core.config import Config, Stage
from lora_core.errors import UserError
from tests.opened_run import open_parts

FILE = """
import torch
from lora_core.adapters.kinds import LoRA

class Fast(LoRA):
    rates = {"up": 4.0, "down": 0.5}

class Still(LoRA):
    sums = []
    def change_gradients(self):
        self.sums.append(self.up.grad.clone())
        self.up.grad.zero_()
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "asks.py").write_text(FILE)
    return str(tmp_path / "asks.py")


def with_kind(config: Config, kind: str, **more: Any) -> Config:
    return replace(config, adapter=replace(config.adapter, kind=kind), **more)


def test_parameters_have_the_rates_that_their_kind_names(
    config: Config, quick: None, file: str
) -> None:
    plus = replace(config.optimizer, lora_plus=3.0, lr={"denoiser": 1.0})
    for optimizer, of_up in ((config.optimizer, 4.0), (plus, 12.0)):
        opened = open_parts(with_kind(config, f"{file}:Fast", optimizer=optimizer))
        found = {}
        for group in opened.optimization.optimizer.param_groups:
            found |= {id(p): group["ratio"] for p in group["params"]}
        layers = adapted_layers(opened.model.denoiser)
        for layer in layers:
            (adapter,) = layer.adapters.values()
            assert found[id(adapter.up)] == of_up and found[id(adapter.down)] == 0.5
        assert len(found) == 2 * len(layers)


def test_a_hook_sees_the_sum_of_all_micro_batches(config: Config, quick: None, file: str) -> None:
    sums = []
    for name, size in (("whole", {}), ("parts", {"batch_size": 1, "accumulation": 2})):
        own = with_kind(config, f"{file}:Still", stages=(Stage(1),), out=config.out + name, **size)
        train.train(own)
        seen = kind_class(own.adapter.kind).sums
        sums.append([grad.clone() for grad in seen])
        seen.clear()
    assert sums[0] and len(sums[0]) == len(sums[1])
    for a, b in zip(*sums, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and a.abs().max() > 0


def test_layers_have_the_rates_of_the_last_pattern_that_matches(config: Config) -> None:
    """Each parameter moves as it would with its factor times the group's rate (AdamW's first step
    is lr * sign(g))."""
    pattern = {"down_blocks.*": 0.5, "*.to_k": 0.25, "*.to_q": 1.0}
    optimizer = replace(config.optimizer, lr={"denoiser": 0.01}, lr_pattern=pattern, lora_plus=4.0)
    parts = open_parts(with_kind(config, "lora", optimizer=optimizer))
    before = {}
    for path, layer in layers_with_adapter(parts.model.denoiser, "default").items():
        before[path] = layer.adapter("default").up.detach().clone()
    parts.take_steps(1)
    seen = set()
    for path, layer in layers_with_adapter(parts.model.denoiser, "default").items():
        factor = 0.5 if path.startswith("down_blocks.") else 1.0
        factor = {"to_k": 0.25, "to_q": 1.0}.get(path.rpartition(".")[2], factor)
        seen.add(factor)
        moved = (layer.adapter("default").up.detach() - before[path]).abs().max()
        assert float(moved) == pytest.approx(0.01 * 4 * factor, rel=1e-3)
    assert seen == {1.0, 0.5, 0.25}


def test_a_pattern_without_a_layer_is_refused(config: Config) -> None:
    optimizer = replace(config.optimizer, lr_pattern={"*.to_x": 0.5})
    with pytest.raises(UserError, match=r"--optimizer\.lr-pattern: .\*\.to_x"):
        open_parts(replace(config, optimizer=optimizer))


@pytest.mark.parametrize("name", ["prodigy", "torch.optim.SGD"])
def test_rates_of_layers_go_with_other_optimizers(config: Config, name: str, quick: None) -> None:
    """After one step at half the rate the ups, which began at 0, are half as large."""
    own = replace(config.optimizer, name=name, lr={"denoiser": 1.0})
    config = replace(config, optimizer=own, stages=(Stage(1),))
    plain = train.train(replace(config, out=f"{config.out}_plain"))
    halved = replace(own, lr_pattern={"*.to_k": 0.5})
    changed = train.train(replace(config, optimizer=halved))
    name = "pytorch_lora_weights.safetensors"
    expected, found = load_file(plain / name), load_file(changed / name)
    ups = [key for key in expected if "lora_B" in key or "lora.up" in key]
    assert any(".to_k." in key for key in ups) and any(".to_q." in key for key in ups)
    for key in ups:
        factor = 0.5 if ".to_k." in key else 1.0
        torch.testing.assert_close(found[key], factor * expected[key], rtol=1e-6, atol=1e-12)
