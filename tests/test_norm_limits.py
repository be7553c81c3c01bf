"""A limit on the norm of each layer's update: the factors' law, and runs that have it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import train
from lora_core.adapters import injection
from lora_core.adapters.adapted_layer import layers_with_adapter
from lora_core.adapters.norm_limits import largest_update_norm, limit_update_norms_
from lora_core.config import Config, Stage
from lora_core.errors import UserError
from lora_core.settings import AdapterSpec
from tests.injected_nets import TARGETS, injected, shake
from training.checks import config_checks
from training.checks.combination_checks import check_combinations


def updates(model: nn.Module) -> dict[str, Tensor]:
    """Path -> float64 update of the weight, as the adapters themselves give it."""
    found = {}
    for path, layer in layers_with_adapter(model, "default").items():
        found[path] = layer.adapter("default").delta_weight(layer.base).double()
    return found


def kohya_ratio(update: Tensor, limit: float) -> Tensor:
    """min(n, M) / n with n clamped below at M / 2 (sd-scripts, apply_max_norm_regularization)."""
    norm = update.norm().clamp(min=limit / 2)
    return torch.clamp(norm, max=limit) / norm


@pytest.mark.parametrize("limit", [0.05, 0.8, 3.0, 100.0])
def test_each_update_is_scaled_as_in_kohya(limit: float) -> None:
    model = injected(alpha=3.0)
    shake(model)
    before = updates(model)
    factors = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = limit_update_norms_([model], limit)
    ratios = {path: kohya_ratio(update, limit) for path, update in before.items()}
    for path, update in updates(model).items():
        torch.testing.assert_close(update, before[path] * ratios[path], rtol=1e-10, atol=1e-14)
        for factor in ("down", "up"):  # both by the same root
            name = f"{path}.adapters.default.{factor}"
            own = dict(model.named_parameters())[name]
            torch.testing.assert_close(own, factors[name] * ratios[path].sqrt())
    assert int(result.scaled) == sum(float(ratio) < 1 for ratio in ratios.values())
    largest = max(float(update.norm()) for update in before.values())
    assert float(result.largest) == pytest.approx(largest, rel=1e-12)
    assert float(largest_update_norm([model])) <= limit * (1 + 1e-12)


def test_groups_of_a_convolution_have_their_own_products() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double()
    injection.inject(model, AdapterSpec(targets=("0",), rank=2))
    shake(model)
    (update,) = updates(model).values()
    assert float(largest_update_norm([model])) == pytest.approx(float(update.norm()), rel=1e-12)


def test_a_skipped_step_and_small_updates_change_nothing() -> None:
    model = injected()
    assert float(limit_update_norms_([model], 1.0).largest) == 0  # up is 0: no NaN
    shake(model)
    before = [p.detach().clone() for p in injection.adapter_parameters(model)]
    assert int(limit_update_norms_([model], 0.1, skip=torch.ones(())).scaled) == 0
    assert int(limit_update_norms_([model], 1e6, skip=torch.zeros(())).scaled) == 0
    for p, old in zip(injection.adapter_parameters(model), before):
        assert torch.equal(p, old)
    assert len(TARGETS) < int(limit_update_norms_([model], 0.1, skip=torch.zeros(())).scaled)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "torch.optim.SGD"])
def test_a_run_keeps_its_limit_and_logs_it(config: Config, optimizer: str, quick: None) -> None:
    rates = {"denoiser": 1.0 if optimizer == "prodigy" else 0.05}
    own = replace(config.optimizer, name=optimizer, lr=rates, max_update_norm=0.01, clip=0.0)
    # the third step trains the same layers after a pause
    stages = (Stage(2), Stage(2, groups=("denoiser",)))
    folder = train.train(replace(config, optimizer=own, stages=stages))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    limited = [row for row in rows if "limited_layers" in row]
    assert len(limited) == 4
    if optimizer == "adamw":
        assert all(row["limited_layers"] > 0 and row["largest_update"] > 0.01 for row in limited)
    plain = train.train(replace(config, out=config.out + "2", stages=stages))
    assert "limited_layers" not in (Path(plain) / "metrics.jsonl").read_text()


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_a_resumed_run_ends_bit_identical(config: Config, name: str, quick: None) -> None:
    own = replace(config.optimizer, name=name, lr={"denoiser": 1.0}, max_update_norm=0.01)
    changed = replace(config, optimizer=own, stages=(Stage(4),), save_every=2, ema=0.5)
    whole = train.train(changed)
    parted = replace(changed, out=config.out + "_parted")
    train.train(replace(parted, stages=(Stage(2),)))
    again = train.train(replace(parted, resume=True))
    name = "pytorch_lora_weights.safetensors"
    expected, found = load_file(whole / name), load_file(again / name)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_limit_holds_with_other_groups_an_average_and_accumulation(
    config: Config, quick: None
) -> None:
    """The probe of the first step of each stage looks at the norms."""
    own = replace(
        config.optimizer, lr={"denoiser": 0.05, "text_encoder": 0.05}, max_update_norm=0.01
    )
    stages = (Stage(2, groups=("text_encoder",)), Stage(2, groups=("denoiser", "text_encoder")))
    changed = replace(config, optimizer=own, stages=stages, ema=0.9, batch_size=1, accumulation=2)
    folder = train.train(changed)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 4 and all(row["limited_layers"] > 0 for row in steps)


def test_kinds_without_such_factors_and_schedule_free_optimizers_are_refused(
    config: Config, tmp_path: Path
) -> None:
    limited = replace(config, optimizer=replace(config.optimizer, max_update_norm=1.0))
    for kind in ("dora", "full", "lokr"):
        changed = replace(limited, adapter=replace(config.adapter, kind=kind))
        with pytest.raises(UserError, match=f"adapter.kind {kind} does not add by itself"):
            check_combinations(changed)
    file = tmp_path / "free.py"
    file.write_text(
        "import torch\nclass Free(torch.optim.SGD):\n"
        "    def train(self): pass\n    def eval(self): pass\n"
    )
    name = f"{file}:Free"
    with pytest.raises(UserError, match="keeps further copies"):
        config_checks.check_config(
            replace(limited, optimizer=replace(limited.optimizer, name=name))
        )
