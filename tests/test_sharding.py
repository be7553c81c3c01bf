"""The frozen denoiser divided among processes, and launches that cannot divide it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_core import distributed
from lora_core.config import AdapterConfig, Config, Stage
from lora_core.errors import UserError
from lora_core.toml import to_toml
from tests.conftest import rows
from tests.process_groups import process_groups
from tests.run_difference import largest_difference
from training.networks import sharding
from training.probes import model_probes


class Network(nn.Module):
    """Two blocks and an output layer, with an adapter's parameter in each block."""

    _repeated_blocks = ("Sequential",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
        self.out = nn.Linear(8, 4)
        self.requires_grad_(False)
        for block in self.blocks:
            block.register_parameter("scale", nn.Parameter(torch.ones(8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x * block.scale).tanh()
        return self.out(x)


def step_with(denoiser: nn.Module) -> Any:
    """A step of which only the denoiser is there."""
    return SimpleNamespace(model=SimpleNamespace(denoiser=denoiser))


def compare_with_the_whole() -> None:
    """In each of two processes: half of the frozen weights, all of the trained ones, and the output
    and gradient of the whole network.
    """
    with distributed.join_processes():
        whole, parts = Network(), Network()
        trained = [p for p in parts.parameters() if p.requires_grad]
        before = sharding.held_bytes(parts)
        sharding.shard_denoiser(parts, {"denoiser": trained}, torch.device("cpu"))
        frozen = before - 2 * 8 * 4
        assert sharding.held_bytes(parts) == frozen // 2 + 2 * 8 * 4
        assert model_probes.is_sharded(step_with(parts))
        assert not model_probes.is_sharded(step_with(whole))
        x = torch.randn(3, 8)
        for network in (whole, parts):
            network(x).square().mean().backward()
        assert torch.equal(whole(x), parts(x))
        for ours, theirs in zip(whole.blocks, parts.blocks):
            assert torch.equal(ours.scale.grad, theirs.scale.grad)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"adapter": AdapterConfig(kind="dora")}, "--adapter.kind dora reads whole weights"),
        ({"batch_size": 3, "processes": 1}, "3 images in 1 passes is not divided evenly among 2"),
        ({"compile": True}, "which --compile does not see"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch, change: dict, sentence: str
) -> None:
    sharded = replace(config, shard=True, processes=2)
    with pytest.raises(UserError, match="this run has one"):
        sharding.check_sharding(sharded)
    monkeypatch.setattr(sharding, "distributed", SimpleNamespace(process_count=lambda: 2))
    sharding.check_sharding(sharded)
    with pytest.raises(UserError, match=sentence):
        sharding.check_sharding(replace(sharded, **change))


def test_a_sharded_run_is_the_run(config: Config, tmp_path: Path) -> None:
    tested = replace(config, precision="fp64", stages=(Stage(4, ("denoiser", "tokens")),))
    tested = replace(tested, adapter=replace(config.adapter, dropout=0.2))
    with process_groups(tmp_path) as groups:
        ended = groups.call(2, "tests.test_sharding:compare_with_the_whole")
        assert ended.status == [0, 0], "\n".join(ended.output)
        for name, shard in {"whole": False, "parts": True}.items():
            file = tmp_path / f"{name}.toml"
            file.write_text(to_toml(replace(tested, shard=shard, out=str(tmp_path / name))))
            ended = groups.train(2, [str(file)])
            assert ended.status == [0, 0], "\n".join(ended.output)
    assert largest_difference(tmp_path / "whole", tmp_path / "parts") < 1e-10
    scores = [[row["loss"] for row in rows(tmp_path / name, "val")] for name in ("whole", "parts")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)
