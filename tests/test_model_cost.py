"""The cost of a model's adapters: the sum of its layers' times over the frozen model's."""

from __future__ import annotations

import pytest
import torch

from benchmarks import model_cost
from benchmarks.cases import Setting


def test_layers_are_summed_as_often_as_the_model_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cost, "time_frozen_rest", lambda *_, graph: 4.0)

    def row(case: str, count: int, **seconds: float) -> dict:
        times = {name: {"forward": s, "backward": 2 * s} for name, s in seconds.items()}
        return {"op": "lora_linear", "case": case, "count": count, "contenders": times}

    rows = [
        row("LoRA 1,2,3", 2, frozen=1.0, ours=1.5, peft=2.0),
        row("LoRA 4,5,6", 1, frozen=2.0, ours=2.0, peft=3.0),
        row("DoRA 1,2,3", 2, frozen=1.0, ours=2.0),  # without peft nothing is compared
    ]
    cost = model_cost.model_cost("a model", rows, Setting("cpu", torch.float32, 4))
    assert cost.keys() == {"LoRA"}
    found = cost["LoRA"]
    assert (found["layers"], found["frozen"], found["ours"], found["peft"]) == (3, 12, 15, 21)
    assert found["ours over frozen"] == pytest.approx((4 + 15) / (4 + 12))
    assert found["peft over frozen"] == pytest.approx((4 + 21) / (4 + 12))
