"""Benchmark cases: arguments of every op at the layer shapes of real models, and other callables
that compute the same layer (the frozen layer, our adapted layer, peft's).

layers.json lists, for one image of the model's native size (SD 1.5 512, SDXL and Flux 1024 pixels),
counted on the real architectures:
"adapted" linear layers (those of attention) and all other "linears" [rows, in, out, count],
"groups" of adapted ones that share an input [rows, in, [out, ...], count], "convolutions" [pixels
out, in, kernel, stride, out, count], "attention" [heads, queries, keys, head dim, count].
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.layer_contenders import (
    SequentialLayers,
    frozen_layer,
    layer_call,
    our_layer,
    peft_layer,
)
from lora_core import kernels
from lora_core.kernels import Member
from lora_core.kernels.reference import wide_dtype

LAYERS: dict[str, dict[str, list[Any]]] = json.loads(
    Path(__file__).with_name("layers.json").read_text()
)
# Rows, features in, features out: small enough for one thread, and for a GPU those of SD 1.5, SDXL
# and Flux.
DEFAULT_SHAPES = {
    "cpu": (
        (4096, 320, 320),
        (1024, 640, 640),
        (1024, 640, 5120),
        (256, 1280, 1280),
        (77, 768, 320),
        (1024, 1280, 1280),
    ),
    "cuda": (
        (4096, 320, 320),
        (4096, 640, 640),
        (1024, 1280, 1280),
        (1024, 1280, 10240),
        (77, 2048, 1280),
        (4608, 3072, 3072),
    ),
}
# Names of arguments that get no gradient.
FROZEN = frozenset({"weight", "bias", "norm", "target", "mask", "weights", "snr"})
# For an image of the model's native size.
LATENTS = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128), "flux": (16, 128, 128)}
SCALE = 0.5
# Layers of a shape in one call: more than the caches hold; SDXL's 560 in float64 would be 8 GB.
SEVERAL = 8


@dataclass(frozen=True)
class Case:
    """One call of an op: its arguments, and other callables on tensors of the same values.

    Each of the others has the tensors that it trains next to it.
    """

    op: str
    label: str
    args: tuple[Any, ...]
    count: int = 1  # such calls in one forward of the model
    others: dict[str, tuple[Callable[[], Any], list[Tensor]]] = field(default_factory=dict)


class Setting(NamedTuple):
    """Device, dtype of base and activations, and rank of all cases of a run."""

    device: str
    dtype: torch.dtype
    rank: int


class RandomTensors:
    """A source of random tensors from one seed."""

    def __init__(self, setting: Setting, seed: int = 0) -> None:
        self.setting = setting
        self.generator = torch.Generator(setting.device).manual_seed(seed)

    def base(self, *shape: int, size: float = 1.0) -> Tensor:
        """A normal tensor in the base's dtype."""
        return self._normal(shape, torch.float32, size).to(self.setting.dtype)

    def adapter(self, *shape: int, size: float = 1.0) -> Tensor:
        """A normal tensor in the adapters' dtype, fp32 or better."""
        return self._normal(shape, wide_dtype(self.setting.dtype), size)

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype, size: float) -> Tensor:
        device = self.setting.device
        return torch.randn(shape, generator=self.generator, device=device, dtype=dtype) * size


def make_cases(
    op: str, setting: Setting, model: str | None, shapes: Sequence[tuple[int, ...]]
) -> list[Case]:
    """The cases of an op: for a model's layers, else for the given shapes [rows, in, out].

    For an op without layer shapes, its small example.
    """
    linears = [(*shape, 1) for shape in shapes]
    if model:
        linears = [tuple(row) for row in LAYERS[model]["adapted"]]
    kinds = (False, True)
    if op == "lora_linear":
        pairs = itertools.product(kinds, linears)
        return [linear_case(row, setting, dora=dora) for dora, row in pairs]
    if op == "lora_grouped":
        groups = itertools.product(kinds, _group_shapes(model, shapes))
        return [grouped_case(row, setting, dora=dora) for dora, row in groups]
    if op == "lora_conv":
        return [convolution_case(tuple(row), setting) for row in convolution_shapes(model, shapes)]
    if op in ("dora_norm", "dora_norms"):
        found = [norm_case(*pair, setting) for pair in count_shape_pairs(linears, (1, 2))]
        return found if op == "dora_norm" else [norms_case(found)]
    if op == "dora_compose":
        return [compose_case(*pair, setting) for pair in count_shape_pairs(linears, (0, 2))]
    if op == "keyed_dropout":
        return [dropout_case(*pair, setting) for pair in count_shape_pairs(linears, (0, 1))]
    if op == "snr_weighted_mse":
        return [loss_case(name, setting) for name in ([model] if model else LATENTS)]
    example = kernels.OPS[op].example
    args = example(0, setting.dtype, setting.device)
    if has_plain_arguments(args):
        return [Case(op, "its example", mark_trained(kernels.OPS[op].reference, args))]
    return [Case(op, "its example", example(0, wide_dtype(setting.dtype), setting.device))]


def count_shape_pairs(
    linears: Sequence[tuple[int, ...]], axes: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """The distinct pairs of two numbers of the layers' shapes, with their counts."""
    counts: dict[tuple[int, int], int] = {}
    for row in linears:
        pair = row[axes[0]], row[axes[1]]
        counts[pair] = counts.get(pair, 0) + row[3]
    return [(*pair, count) for pair, count in counts.items()]


def _group_shapes(model: str | None, shapes: Sequence[tuple[int, ...]]) -> list[list[Any]]:
    """[rows, in, [out, ...], count]: a model's, or three layers of each square shape."""
    if model:
        return LAYERS[model]["groups"]
    return [[rows, fan_in, [out] * 3, 1] for rows, fan_in, out in shapes if fan_in == out]


def convolution_shapes(model: str | None, shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """[pixels, in, kernel, stride, out, count]

    Those of a model with stride 1 that take the most time, or 3 x 3 and 1 x 1 on the last square
    shape.
    """
    if model:
        rows = [row for row in LAYERS[model]["convolutions"] if row[3] == 1]
        return sorted(rows, key=lambda row: -math.prod(row))[:6]
    found: list[list[int]] = []
    for pixels, fan_in, out in shapes:
        if math.isqrt(pixels) ** 2 == pixels and fan_in == out:
            found = [[pixels, fan_in, kernel, 1, out, 1] for kernel in (3, 1)]
    return found


def mark_trained(reference: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with requires_grad where training needs a gradient.

    These are the floating-point ones whose names in the reference's signature are not in FROZEN.
    """

    def mark(name: str, value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(mark, value._fields, value))
        if isinstance(value, tuple):
            return tuple(mark(name, part) for part in value)
        if isinstance(value, Tensor) and value.is_floating_point() and name not in FROZEN:
            return value.detach().requires_grad_()
        return value

    return tuple(map(mark, inspect.signature(reference).parameters, args))


def trained_tensors(args: Any) -> list[Tensor]:
    """The tensors that get a gradient."""
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.requires_grad]


def has_plain_arguments(args: Any) -> bool:
    """Whether the arguments are only tensors, numbers and names, in tuples.

    False for an op that takes other objects, such as an optimizer's flat parameters.
    """
    plain = Tensor | float | int | str | torch.dtype | None
    return all(isinstance(leaf, plain) for leaf in tree_leaves(args))


def copy_arguments(args: Any, dtype: torch.dtype | None = None) -> Any:
    """A deep copy of plain arguments, floating-point tensors in `dtype`."""

    def copy_one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        new = value.detach().clone()
        if dtype and new.is_floating_point():
            new = new.to(dtype)
        return new.requires_grad_(value.requires_grad)

    return tree_map(copy_one, args)


# ---------------------------------------------------------------- one case of each op


def linear_case(row: tuple[int, ...], setting: Setting, *, dora: bool) -> Case:
    """lora_linear with bias; "ours" and "peft" are whole layers.

    DoRA's norm is an argument, as a run computes it once per optimizer step.
    """
    rows, fan_in, out, count = row
    random = RandomTensors(setting)
    x = random.base(1, rows, fan_in)
    weight = random.base(out, fan_in, size=fan_in**-0.5)
    bias = random.base(out, size=0.1)
    state = _factors(random, fan_in, out)
    args: tuple[Any, ...] = (x, weight, bias, state["down"], state["up"], SCALE)
    if dora:
        norm = kernels.reference.dora_norm(weight, state["down"], state["up"], SCALE)
        state["magnitude"] = norm * (1 + random.adapter(out, size=0.01))
        args = (*args, state["magnitude"], norm)
    others = {
        "frozen": layer_call(frozen_layer(weight, bias)["layer"], x),
        "ours": layer_call(our_layer(frozen_layer(weight, bias), state, SCALE), x),
        "peft": layer_call(peft_layer(frozen_layer(weight, bias), state, SCALE), x),
    }
    label = f"{'DoRA' if dora else 'LoRA'} {rows},{fan_in},{out}"
    trained = mark_trained(kernels.reference.lora_linear, args)
    return Case("lora_linear", label, trained, count, others)


def _factors(random: RandomTensors, fan_in: int, out: int) -> dict[str, Tensor]:
    down = random.adapter(random.setting.rank, fan_in, size=fan_in**-0.5)
    return {"down": down, "up": random.adapter(out, random.setting.rank, size=0.02)}


def grouped_case(row: Sequence[Any], setting: Setting, *, dora: bool) -> Case:
    """lora_grouped of layers without bias, as in attention.

    The others are the same layers one by one.
    """
    rows, fan_in, outs, count = row
    random = RandomTensors(setting)
    x = random.base(1, rows, fan_in)
    members = []
    layers: dict[str, list[nn.Module]] = {"frozen": [], "ours": [], "peft": []}
    for out in outs:
        weight = random.base(out, fan_in, size=fan_in**-0.5)
        state = _factors(random, fan_in, out)
        norm = magnitude = None
        if dora:
            norm = kernels.reference.dora_norm(weight, state["down"], state["up"], SCALE)
            magnitude = state["magnitude"] = norm * (1 + random.adapter(out, size=0.01))
        factors = state["down"], state["up"], SCALE
        members.append(Member(weight, None, *factors, magnitude, norm))
        layers["frozen"].append(frozen_layer(weight, None)["layer"])
        layers["ours"].append(our_layer(frozen_layer(weight, None), state, SCALE))
        layers["peft"].append(peft_layer(frozen_layer(weight, None), state, SCALE))
    others = {name: layer_call(SequentialLayers(found), x) for name, found in layers.items()}
    label = f"{'DoRA' if dora else 'LoRA'} {rows},{fan_in},{'+'.join(map(str, outs))}"
    args = mark_trained(kernels.reference.lora_grouped, (x, tuple(members)))
    return Case("lora_grouped", label, args, count, others)


def convolution_case(row: tuple[int, ...], setting: Setting) -> Case:
    """lora_conv with bias on a square image, padded so that its size stays."""
    pixels, fan_in, kernel, stride, out, count = row
    random, side = RandomTensors(setting), math.isqrt(pixels) * stride
    size = (fan_in * kernel * kernel) ** -0.5
    x = random.base(1, fan_in, side, side)
    weight = random.base(out, fan_in, kernel, kernel, size=size)
    bias = random.base(out, size=0.1)
    down = random.adapter(setting.rank, fan_in, kernel, kernel, size=size)
    up = random.adapter(out, setting.rank, 1, 1, size=0.02)
    geometry = (stride, stride), (kernel // 2, kernel // 2), (1, 1), 1
    args = (x, weight, bias, down, up, SCALE, *geometry)
    state = {"down": down, "up": up}
    others = {
        "frozen": layer_call(frozen_layer(weight, bias, stride)["layer"], x),
        "ours": layer_call(our_layer(frozen_layer(weight, bias, stride), state, SCALE), x),
        "peft": layer_call(peft_layer(frozen_layer(weight, bias, stride), state, SCALE), x),
    }
    label = f"{pixels},{fan_in},{kernel}x{kernel},{out}"
    trained = mark_trained(kernels.reference.lora_conv, args)
    return Case("lora_conv", label, trained, count, others)


def norm_case(fan_in: int, out: int, count: int, setting: Setting) -> Case:
    """dora_norm; "peft" is the norm as peft's layer computes it in every forward.

    That is: B A by multiplication with an identity matrix, W + s B A, its norm.
    """
    random = RandomTensors(setting)
    weight = random.base(out, fan_in, size=fan_in**-0.5)
    state = _factors(random, fan_in, out)
    norm = kernels.reference.dora_norm(weight, state["down"], state["up"], SCALE)
    host = frozen_layer(weight, None)
    layer: Any = peft_layer(host, state | {"magnitude": norm}, SCALE)
    magnitude = layer.lora_magnitude_vector["default"]
    a, b = layer.lora_A["default"], layer.lora_B["default"]

    def compute_by_peft() -> Tensor:
        dense = magnitude.get_lora_weight(lora_A=a, lora_B=b, adapter_name="default")
        return magnitude.get_weight_norm(
            weight=weight.to(dense.dtype),
            lora_weight=dense.detach(),
            scaling=SCALE,
            adapter_name="default",
        )

    args = weight, state["down"], state["up"], SCALE
    return Case("dora_norm", f"{out} x {fan_in}", args, count, {"peft": (compute_by_peft, [])})


def norms_case(layers: list[Case]) -> Case:
    """dora_norms of SEVERAL layers of each shape, or as many as there are, in one call.

    "peft" computes them one by one.
    """
    args: list[Any] = []
    calls: list[Callable[[], Any]] = []
    for layer in layers:
        for _ in range(min(layer.count, SEVERAL)):
            args.append(copy_arguments(layer.args))
            calls.append(layer.others["peft"][0])
    others = {"peft": (lambda: [call() for call in calls], list[Tensor]())}
    return Case("dora_norms", f"{len(args)} layers", (tuple(args),), others=others)


def compose_case(rows: int, out: int, count: int, setting: Setting) -> Case:
    """dora_compose with a bias."""
    random = RandomTensors(setting)
    y0, bias = random.base(1, rows, out), random.base(out, size=0.1)
    lora, gain = random.base(1, rows, out, size=0.02), 1 + random.adapter(out, size=0.01)
    args = mark_trained(kernels.reference.dora_compose, (y0, bias, lora, gain))
    return Case("dora_compose", f"{rows},{out}", args, count)


def dropout_case(rows: int, fan_in: int, count: int, setting: Setting) -> Case:
    """keyed_dropout; "torch" is F.dropout, whose mask depends on all earlier random numbers."""
    x = RandomTensors(setting).base(1, rows, fan_in)
    step, keys = torch.tensor(3, device=setting.device), torch.tensor([7], device=setting.device)
    own = x.clone().requires_grad_()
    args = mark_trained(kernels.reference.keyed_dropout, (x, 0.1, 1, 12345, step, keys))
    others = {"torch": (lambda: F.dropout(own, 0.1), [own])}
    return Case("keyed_dropout", f"{rows},{fan_in}", args, count, others)


def loss_case(model: str, setting: Setting) -> Case:
    """snr_weighted_mse of one latent image with a mask and a weight."""
    random, shape = RandomTensors(setting), LATENTS[model]
    out, target = random.base(1, *shape), random.base(1, *shape)
    mask = (random.base(1, 1, *shape[1:]) > 0).to(out.dtype)
    args = out, target, mask, random.adapter(1).abs()
    trained = mark_trained(kernels.reference.snr_weighted_mse, args)
    return Case("snr_weighted_mse", f"{model} {'x'.join(map(str, shape))}", trained)
