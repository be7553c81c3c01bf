"""The costs of a step: of a small network by its layers, and of the published ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import published_networks, step_cost
from benchmarks.counting import operator_class
from benchmarks.step_cost import NetworkStep, count_cost
from tests import tiny_sdxl

# ---------------------------------------------------------------- a small network


def tiny() -> NetworkStep:
    """Two blocks of SDXL's kind, 6 transformer blocks in 5 places."""
    with torch.device("meta"):
        model = tiny_sdxl.unet().to(torch.bfloat16).requires_grad_(False).train()
        added = {"text_embeds": torch.empty(2, tiny_sdxl.POOLED), "time_ids": torch.empty(2, 6)}
        inputs = {
            "sample": torch.empty(2, 4, 8, 8),
            "encoder_hidden_states": torch.empty(2, 16, sum(tiny_sdxl.WIDTHS)),
        }
    wide = {key: value.to(torch.bfloat16) for key, value in inputs.items()}
    cond = {key: value.to(torch.bfloat16) for key, value in added.items()}
    paths = tuple(
        name
        for name, _ in model.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    )
    return NetworkStep(
        model,
        {
            **wide,
            "timestep": torch.empty(2, device="meta"),
            "added_cond_kwargs": cond,
            "return_dict": False,
        },
        paths,
    )


class Seen:
    """Calls of modules in one forward: how many, and how many whose input carries a gradient."""

    def __init__(self, step: NetworkStep, kinds: tuple[type, ...]) -> None:
        self.calls = self.carrying = 0
        self.of_adapted = 0
        adapted = {step.model.get_submodule(path) for path in step.paths}
        for module in step.model.modules():
            if isinstance(module, kinds):
                module.register_forward_hook(lambda m, args, out: self.see(args[0], m in adapted))

    def see(self, x: Tensor, adapted: bool) -> None:
        self.calls += 1
        self.carrying += x.requires_grad
        self.of_adapted += adapted and x.requires_grad


def test_a_frozen_step_by_the_networks_layers() -> None:
    step = tiny()
    linear, conv = Seen(step, (nn.Linear,)), Seen(step, (nn.Conv2d,))
    classes = _classes(count_cost(step, "frozen", rank=2).operators)
    assert (
        classes["product"] == linear.calls + linear.carrying
    )  # x W^T, and dy W where a gradient flows on
    assert classes["convolution"] == conv.calls + conv.carrying
    assert classes["attention"] == 2 * len(step.paths) // 4


def test_pefts_step_by_the_networks_layers() -> None:
    step = tiny()
    frozen = count_cost(tiny(), "frozen", rank=2)
    seen = Seen(step, (nn.Linear,))
    lora = count_cost(step, "peft lora", rank=2)
    count, carrying = len(step.paths), seen.of_adapted
    extra = _classes(lora.operators)["product"] - _classes(frozen.operators)["product"]
    # forward: down, up; backward: d_up, d_down, dt, and dx of down where x carries a gradient.
    # The first three layers give the base's dx back.
    assert extra == 5 * count + carrying - 3
    assert 13 <= (lora.ops - frozen.ops) / count <= 15  # 13.8 on SD1.5
    assert 33 <= (count_cost(tiny(), "peft dora", rank=2).ops - frozen.ops) / count <= 38  # 35


def _classes(operators: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, ops in operators.items():
        found[operator_class(name)] = found.get(operator_class(name), 0) + ops
    return found


@pytest.mark.parametrize(("kind", "most"), [("lora", 4), ("dora", 6)])
def test_an_adapted_linear_adds_few_launches(kind: str, most: int) -> None:
    step = tiny()
    extra = (
        count_cost(step, f"triton {kind}", rank=2).ops - count_cost(tiny(), "frozen", rank=2).ops
    )
    assert extra <= most * len(step.paths)


# ---------------------------------------------------------------- SDXL


@pytest.fixture(scope="module")
def frozen_xl() -> step_cost.StepCost:
    return count_cost(step_cost.open_step("sdxl"), "frozen")


@pytest.mark.parametrize(
    ("kind", "ops", "elementwise", "kept"),
    [pytest.param("lora", 1.6, 1.05, 1.15, marks=pytest.mark.full), ("dora", 2.0, 1.3, 1.3)],
)
def test_a_step_of_sdxl(
    frozen_xl: step_cost.StepCost, kind: str, ops: float, elementwise: float, kept: float
) -> None:
    ours = count_cost(step_cost.open_step("sdxl"), f"triton {kind}")
    assert ours.ops <= ops * frozen_xl.ops
    assert ours.elementwise <= elementwise * frozen_xl.elementwise
    assert ours.saved <= kept * frozen_xl.saved


def test_pefts_step_of_sd15_is_the_published_one() -> None:
    """performance.md: 1,768 ops more than frozen and 4.3 GB of elementwise traffic.

    1.0 ms at 4.3 TB/s.
    """
    frozen, peft = (
        count_cost(step_cost.open_step("sd15"), variant) for variant in ("frozen", "peft lora")
    )
    assert peft.ops - frozen.ops == pytest.approx(1768, rel=0.01)
    assert peft.elementwise - frozen.elementwise == pytest.approx(4.3e9, rel=0.02)


def test_the_optimizers() -> None:
    found = step_cost.count_optimizer_steps([(2, 3), (4, 2)] * 5)
    assert (found["prodigyopt"].ops, found["prodigyopt"].syncs) == (
        13 * 10,
        2 * 10,
    )  # 14,560 and 2,240 for 1,120 tensors
    assert (found["ours Prodigy triton"].syncs, found["ours AdamW triton"].syncs) == (0, 0)
    assert 2 <= found["ours Prodigy triton"].ops <= 8 and 1 <= found["ours AdamW triton"].ops <= 8


def test_the_command(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cost.json"
    monkeypatch.setattr(step_cost, "open_step", lambda name, batch: tiny())
    monkeypatch.setattr(published_networks, "tensor_shapes", lambda name, rank: [(rank, 3)])
    monkeypatch.setattr(
        "sys.argv",
        [
            "step_cost",
            "--model",
            "sd15",
            "--variant",
            "peft lora",
            "--rank",
            "2",
            "--json",
            str(file),
        ],
    )
    step_cost.main()
    report = json.loads(file.read_text())["models"]["sd15"]
    assert set(report["step"]) == {"frozen", "peft lora"} and report["linears"] == 128
    assert {key: report["optimizer"]["prodigyopt"][key] for key in ("calls", "syncs")} == {
        "calls": 13,
        "syncs": 2,
    }
    assert f"{report['step']['peft lora']['ops']:,}" in capsys.readouterr().out
