"""The cost of a model's adapters relative to the frozen model, summed from times of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import laws, timing
from benchmarks.cases import LAYERS, RandomTensors, Setting

ROUNDS, LIMIT = 5, 2.0  # for a layer without adapter, whose seconds are one term of a sum


def model_cost(
    model: str, rows: list[dict[str, Any]], setting: Setting, *, graph: bool = False
) -> dict[str, Any]:
    """Seconds of the adapted layers (ours, peft), of the same layers frozen, and of all others.

    Also prints the ratio of the sums. The others are linear layers, convolutions and attention,
    forward and backward to their inputs (only forward for layers whose input has one row: nothing
    trained comes before them). Norms, activations and additions are left out, which makes the ratio
    larger than that of a whole step.
    """
    linears = [row for row in rows if row["op"] == "lora_linear"]
    cost: dict[str, Any] = {}
    rest = time_frozen_rest(model, setting, graph=graph) if linears else 0.0
    for kind in ("LoRA", "DoRA"):
        group = [row for row in linears if row["case"].startswith(kind)]
        names = set.intersection(*(set(row["contenders"]) for row in group)) if group else set()
        if not {"frozen", "ours", "peft"} <= names:
            continue
        sums = {name: _sum_layers(group, name) for name in ("frozen", "ours", "peft")}
        whole = rest + sums["frozen"]
        layers = sum(row["count"] for row in group)
        ours, peft = (rest + sums["ours"]) / whole, (rest + sums["peft"]) / whole
        cost[kind] = {"layers": layers, "rest": rest, **sums}
        cost[kind] |= {"ours over frozen": ours, "peft over frozen": peft}
        print(
            f"{model} {kind}: {layers} adapters add {1e3 * (sums['ours'] - sums['frozen']):.3g} ms "
            f"to the {1e3 * whole:.4g} ms of the frozen products, forward and backward: "
            f"{ours:.3f}x (peft {peft:.3f}x)"
        )
    return cost


def _sum_layers(group: list[dict[str, Any]], name: str) -> float:
    """Seconds of a contender over all layers of a group of rows."""
    return sum(row["count"] * step_seconds(row["contenders"][name]) for row in group)


def step_seconds(row: dict[str, Any]) -> float:
    """Seconds of forward and backward together."""
    return row["forward"] + row["backward"]


def time_frozen_rest(model: str, setting: Setting, *, graph: bool = False) -> float:
    """Seconds of everything but the adapted layers."""
    layers, total = LAYERS[model], 0.0
    kinds = [
        (frozen_linear, layers["linears"]),
        (frozen_convolution, layers["convolutions"]),
        (frozen_attention, layers["attention"]),
    ]
    for make_call, shapes in kinds:
        for *shape, count in shapes:
            contenders = {"layer": make_call(shape, setting)}
            times = timing.alternate(
                contenders, ROUNDS, device=setting.device, graph=graph, limit=LIMIT
            )
            total += count * timing.median_seconds(times, "layer")
    return total


def frozen_linear(shape: list[int], setting: Setting) -> Callable[[], object]:
    """Forward and backward of a linear layer without bias."""
    rows, fan_in, out = shape
    random = RandomTensors(setting)
    x = random.base(rows, fan_in).requires_grad_(rows > 1)
    weight = random.base(out, fan_in, size=fan_in**-0.5)
    return gradient_call(lambda: F.linear(x, weight), [x] if rows > 1 else [])


def frozen_convolution(shape: list[int], setting: Setting) -> Callable[[], object]:
    """Forward and backward of a convolution without bias."""
    pixels, fan_in, kernel, stride, out = shape
    random, side = RandomTensors(setting), math.isqrt(pixels) * stride
    x = random.base(1, fan_in, side, side).requires_grad_()
    weight = random.base(out, fan_in, kernel, kernel, size=(fan_in * kernel * kernel) ** -0.5)
    return gradient_call(lambda: F.conv2d(x, weight, None, stride, kernel // 2), [x])


def frozen_attention(shape: list[int], setting: Setting) -> Callable[[], object]:
    """Forward and backward of attention."""
    heads, queries, keys, width = shape
    random = RandomTensors(setting)
    q, k, v = (random.base(1, heads, n, width).requires_grad_() for n in (queries, keys, keys))
    return gradient_call(lambda: F.scaled_dot_product_attention(q, k, v), [q, k, v])


def gradient_call(
    call: Callable[[], torch.Tensor], trains: list[torch.Tensor]
) -> Callable[[], object]:
    """Forward and backward; forward alone where nothing is trained."""
    if not trains:
        return call
    slope = laws.output_gradient(call())
    return lambda: torch.autograd.grad(call(), trains, slope)
