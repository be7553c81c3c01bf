"""Arguments of every op at true layer shapes, with what else a user could run in its place: the frozen layer, our adapted layer, peft's.

layers.json beside this file lists, for one picture of the model's own size (SD 1.5 512, SDXL and Flux 1024 pixels): "adapted" linear layers (those of
attention) and all other "linears" [rows, in, out, count], "groups" of adapted ones that share an input [rows, in, [out, ...], count],
"convolutions" [pixels out, in, kernel, stride, out, count], "attention" [heads, queries, keys, head dim, count]. Counted on the real architectures.
"""

from __future__ import annotations

import inspect
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

from lora_core import kernels
from lora_core.adapters import injection
from lora_core.adapters.injection import AdapterSpec
from lora_core.kernels import Member
from lora_core.kernels.reference import wide_dtype

LAYERS: dict[str, dict[str, list[Any]]] = json.loads(
    Path(__file__).with_name("layers.json").read_text()
)
DEFAULT_SHAPES = {  # rows, features in, features out: small enough for one thread, and those that a GPU meets in SD 1.5, SDXL and Flux
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
FROZEN = frozenset(
    {"weight", "bias", "norm", "target", "mask", "weights", "snr"}
)  # arguments that no gradient is asked for, by their name
LATENTS = {
    "sd15": (4, 64, 64),
    "sdxl": (4, 128, 128),
    "flux": (16, 128, 128),
}  # of a picture of the model's own size
SCALE = 0.5
SEVERAL = (
    8  # layers of a shape in one call: beyond the caches, and SDXL's 560 in float64 would be 8 GB
)


@dataclass(frozen=True)
class Case:
    """One call: its arguments, and other callables over tensors of the same values, each with the leaves that it trains."""

    op: str
    label: str
    args: tuple[Any, ...]
    count: int = 1  # such calls in one forward of the model
    others: dict[str, tuple[Callable[[], Any], list[Tensor]]] = field(default_factory=dict)


class Setting(NamedTuple):
    """What all cases of a run share."""

    device: str
    dtype: torch.dtype
    rank: int


class RandomTensors:
    """Random tensors of one seed."""

    def __init__(self, setting: Setting, seed: int = 0) -> None:
        self.setting = setting
        self.generator = torch.Generator(setting.device).manual_seed(seed)

    def base(self, *shape: int, size: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.setting.device) * size
        return drawn.to(self.setting.dtype)

    def adapter(self, *shape: int, size: float = 1.0) -> Tensor:
        return (
            torch.randn(
                shape,
                generator=self.generator,
                device=self.setting.device,
                dtype=wide_dtype(self.setting.dtype),
            )
            * size
        )


def make_cases(
    op: str, setting: Setting, model: str | None, shapes: Sequence[tuple[int, ...]]
) -> list[Case]:
    """The cases of an op: of a model's layers, else of the given [rows, in, out]; an op without shapes of its own has its example."""
    linears = (
        [tuple(row) for row in LAYERS[model]["adapted"]]
        if model
        else [(*shape, 1) for shape in shapes]
    )
    if op == "lora_linear":
        return [linear_case(row, setting, dora=dora) for dora in (False, True) for row in linears]
    if op == "lora_grouped":
        groups = (
            LAYERS[model]["groups"]
            if model
            else [[rows, fan_in, [out] * 3, 1] for rows, fan_in, out in shapes if fan_in == out]
        )
        return [grouped_case(row, setting, dora=dora) for dora in (False, True) for row in groups]
    if op == "lora_conv":
        return [convolution_case(tuple(row), setting) for row in convolution_shapes(model, shapes)]
    if op == "dora_norm":
        return [
            norm_case(fan_in, out, count, setting)
            for fan_in, out, count in count_shape_pairs(linears, (1, 2))
        ]
    if op == "dora_norms":
        return [
            norms_case(
                [
                    norm_case(fan_in, out, count, setting)
                    for fan_in, out, count in count_shape_pairs(linears, (1, 2))
                ]
            )
        ]
    if op in ("dora_compose", "keyed_dropout"):
        make = compose_case if op == "dora_compose" else dropout_case
        return [
            make(rows, width, count, setting)
            for rows, width, count in count_shape_pairs(
                linears, (0, 2) if op == "dora_compose" else (0, 1)
            )
        ]
    if op == "snr_weighted_mse":
        return [loss_case(name, setting) for name in ([model] if model else LATENTS)]
    example = kernels.OPS[op].example
    args = example(0, setting.dtype, setting.device)
    if is_plain(args):
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


def convolution_shapes(model: str | None, shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """[pixels, in, kernel, stride, out, count]: a model's with the stride 1 that fill the most time, or 3 x 3 and 1 x 1 on shapes that are square."""
    if model:
        rows = [row for row in LAYERS[model]["convolutions"] if row[3] == 1]
        return sorted(rows, key=lambda row: -math.prod(row))[:6]
    square = [
        shape for shape in shapes if math.isqrt(shape[0]) ** 2 == shape[0] and shape[1] == shape[2]
    ]
    return [
        [rows, fan_in, kernel, 1, out, 1] for rows, fan_in, out in square[-1:] for kernel in (3, 1)
    ]


def mark_trained(reference: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with requires_grad where training asks for a gradient: floating, and not FROZEN by the name of the reference's argument."""

    def mark(name: str, value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(mark(key, part) for key, part in zip(value._fields, value)))
        if isinstance(value, tuple):
            return tuple(mark(name, part) for part in value)
        if isinstance(value, Tensor) and value.is_floating_point() and name not in FROZEN:
            return value.detach().requires_grad_()
        return value

    return tuple(
        mark(name, value) for name, value in zip(inspect.signature(reference).parameters, args)
    )


def trained_tensors(args: Any) -> list[Tensor]:
    """The tensors that a gradient is asked for."""
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.requires_grad]


def linear_case(row: tuple[int, ...], setting: Setting, *, dora: bool) -> Case:
    """lora_linear with bias; DoRA's norm is an argument, as a run computes it once per optimiser step, but "ours" and "peft" are whole layers."""
    rows, fan_in, out, count = row
    drawn = RandomTensors(setting)
    x, weight, bias = (
        drawn.base(1, rows, fan_in),
        drawn.base(out, fan_in, size=fan_in**-0.5),
        drawn.base(out, size=0.1),
    )
    down, up = (
        drawn.adapter(setting.rank, fan_in, size=fan_in**-0.5),
        drawn.adapter(out, setting.rank, size=0.02),
    )
    args: tuple[Any, ...] = (x, weight, bias, down, up, SCALE)
    if dora:
        norm = kernels.reference.dora_norm(weight, down, up, SCALE)
        args = (*args, norm * (1 + drawn.adapter(out, size=0.01)), norm)
    args = mark_trained(kernels.reference.lora_linear, args)
    host = frozen_layer(weight, bias)
    others = {"frozen": layer_call(host["layer"], x)}
    state = {"down": down, "up": up} | ({"magnitude": args[6]} if dora else {})
    others["ours"] = layer_call(our_layer(weight, bias, setting, state), x)
    others["peft"] = layer_call(peft_layer(frozen_layer(weight, bias), setting, state), x)
    return Case(
        "lora_linear", f"{'DoRA' if dora else 'LoRA'} {rows},{fan_in},{out}", args, count, others
    )


def frozen_layer(weight: Tensor, bias: Tensor | None, stride: int = 1) -> Any:
    """A module whose .layer is a linear layer or convolution of these weights, which takes no gradient."""
    with torch.device("meta"):
        layer: Any = (
            nn.Linear(weight.shape[1], weight.shape[0])
            if weight.ndim == 2
            else nn.Conv2d(
                weight.shape[1], weight.shape[0], weight.shape[2], stride, weight.shape[2] // 2
            )
        )
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return nn.ModuleDict({"layer": layer})


def layer_call(layer: nn.Module, x: Tensor) -> tuple[Callable[[], Any], list[Tensor]]:
    """The layer on x of its own, and what it trains."""
    x = x.detach().clone().requires_grad_()
    return lambda: layer(x), [x, *(p for p in layer.parameters() if p.requires_grad)]


def our_layer(
    weight: Tensor, bias: Tensor | None, setting: Setting, state: dict[str, Tensor], stride: int = 1
) -> nn.Module:
    """adapters.inject's layer with these factors."""
    host = frozen_layer(weight, bias, stride)
    injection.inject(
        host,
        AdapterSpec(
            ("layer",),
            kind="dora" if "magnitude" in state else "lora",
            rank=setting.rank,
            alpha=SCALE * setting.rank,
        ),
    )
    held: Any = host["layer"]
    with torch.no_grad():
        for name, value in state.items():
            getattr(held.adapter("default"), name).copy_(value)
    return held


def peft_layer(host: Any, setting: Setting, state: dict[str, Tensor]) -> nn.Module:
    """peft's layer with these factors, which its default keeps in fp32."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=setting.rank,
        lora_alpha=int(SCALE * setting.rank),
        target_modules=["layer"],
        use_dora="magnitude" in state,
    )
    model: Any = get_peft_model(host, config)
    layer: Any = model.base_model.model["layer"]
    places = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector"}
    with torch.no_grad():
        for name, value in state.items():
            parameter = getattr(layer, places[name])["default"].weight
            parameter.copy_(value.view(parameter.shape))
    layer.scaling["default"] = SCALE  # lora_alpha is a whole number
    return layer


def grouped_case(row: Sequence[Any], setting: Setting, *, dora: bool) -> Case:
    """lora_grouped of layers without bias, as attention has them; the others are the same layers one by one."""
    rows, fan_in, outs, count = row
    drawn = RandomTensors(setting)
    x, members = drawn.base(1, rows, fan_in), []
    calls: dict[str, list[nn.Module]] = {"frozen": [], "ours": [], "peft": []}
    for out in outs:
        weight = drawn.base(out, fan_in, size=fan_in**-0.5)
        down, up = (
            drawn.adapter(setting.rank, fan_in, size=fan_in**-0.5),
            drawn.adapter(out, setting.rank, size=0.02),
        )
        norm = kernels.reference.dora_norm(weight, down, up, SCALE) if dora else None
        magnitude = None if norm is None else norm * (1 + drawn.adapter(out, size=0.01))
        members.append(Member(weight, None, down, up, SCALE, magnitude, norm))
        state = {"down": down, "up": up} | ({} if magnitude is None else {"magnitude": magnitude})
        calls["frozen"].append(frozen_layer(weight, None)["layer"])
        calls["ours"].append(our_layer(weight, None, setting, state))
        calls["peft"].append(peft_layer(frozen_layer(weight, None), setting, state))
    others = {name: layer_call(Together(layers), x) for name, layers in calls.items()}
    args = mark_trained(kernels.reference.lora_grouped, (x, tuple(members)))
    return Case(
        "lora_grouped",
        f"{'DoRA' if dora else 'LoRA'} {rows},{fan_in},{'+'.join(map(str, outs))}",
        args,
        count,
        others,
    )


class Together(nn.Module):
    """Layers on the same input, one after another."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def convolution_case(row: tuple[int, ...], setting: Setting) -> Case:
    """lora_conv with bias on a square picture, padded so that its size stays."""
    pixels, fan_in, kernel, stride, out, count = row
    drawn, side = RandomTensors(setting), math.isqrt(pixels) * stride
    size = (fan_in * kernel * kernel) ** -0.5
    x, weight, bias = (
        drawn.base(1, fan_in, side, side),
        drawn.base(out, fan_in, kernel, kernel, size=size),
        drawn.base(out, size=0.1),
    )
    down, up = (
        drawn.adapter(setting.rank, fan_in, kernel, kernel, size=size),
        drawn.adapter(out, setting.rank, 1, 1, size=0.02),
    )
    args = (
        x,
        weight,
        bias,
        down,
        up,
        SCALE,
        (stride, stride),
        (kernel // 2, kernel // 2),
        (1, 1),
        1,
    )
    state = {"down": down, "up": up}
    others = {
        "frozen": layer_call(frozen_layer(weight, bias, stride)["layer"], x),
        "ours": layer_call(our_layer(weight, bias, setting, state, stride), x),
        "peft": layer_call(peft_layer(frozen_layer(weight, bias, stride), setting, state), x),
    }
    return Case(
        "lora_conv",
        f"{pixels},{fan_in},{kernel}x{kernel},{out}",
        mark_trained(kernels.reference.lora_conv, args),
        count,
        others,
    )


def norm_case(fan_in: int, out: int, count: int, setting: Setting) -> Case:
    """dora_norm; "peft" is what its layer computes in every forward: B A by way of an identity matrix, W + s B A, its norm."""
    drawn = RandomTensors(setting)
    weight, down = (
        drawn.base(out, fan_in, size=fan_in**-0.5),
        drawn.adapter(setting.rank, fan_in, size=fan_in**-0.5),
    )
    up = drawn.adapter(out, setting.rank, size=0.02)
    norm = kernels.reference.dora_norm(weight, down, up, SCALE)
    layer: Any = peft_layer(
        frozen_layer(weight, None), setting, {"down": down, "up": up, "magnitude": norm}
    )
    part, a, b = (
        layer.lora_magnitude_vector["default"],
        layer.lora_A["default"],
        layer.lora_B["default"],
    )

    def peft() -> Tensor:
        dense = part.get_lora_weight(lora_A=a, lora_B=b, adapter_name="default")
        return part.get_weight_norm(
            weight=weight.to(dense.dtype),
            lora_weight=dense.detach(),
            scaling=SCALE,
            adapter_name="default",
        )

    return Case(
        "dora_norm", f"{out} x {fan_in}", (weight, down, up, SCALE), count, {"peft": (peft, [])}
    )


def norms_case(layers: list[Case]) -> Case:
    """dora_norms of SEVERAL layers of each shape, or as many as there are, in one call; "peft" computes them one by one."""
    counts = [min(layer.count, SEVERAL) for layer in layers]
    args = tuple(
        copy_arguments(layer.args) for layer, count in zip(layers, counts) for _ in range(count)
    )
    calls = [layer.others["peft"][0] for layer, count in zip(layers, counts) for _ in range(count)]
    return Case(
        "dora_norms",
        f"{sum(counts)} layers",
        (args,),
        others={"peft": (lambda: [call() for call in calls], [])},
    )


def compose_case(rows: int, out: int, count: int, setting: Setting) -> Case:
    """dora_compose with a bias."""
    drawn = RandomTensors(setting)
    args = (
        drawn.base(1, rows, out),
        drawn.base(out, size=0.1),
        drawn.base(1, rows, out, size=0.02),
        1 + drawn.adapter(out, size=0.01),
    )
    return Case(
        "dora_compose", f"{rows},{out}", mark_trained(kernels.reference.dora_compose, args), count
    )


def dropout_case(rows: int, fan_in: int, count: int, setting: Setting) -> Case:
    """keyed_dropout; "torch" is F.dropout, whose mask depends on what was drawn before."""
    x = RandomTensors(setting).base(1, rows, fan_in)
    step, keys = torch.tensor(3, device=setting.device), torch.tensor([7], device=setting.device)
    own = x.clone().requires_grad_()
    args = mark_trained(kernels.reference.keyed_dropout, (x, 0.1, 1, 12345, step, keys))
    return Case(
        "keyed_dropout",
        f"{rows},{fan_in}",
        args,
        count,
        {"torch": (lambda: F.dropout(own, 0.1), [own])},
    )


def is_plain(args: Any) -> bool:
    """Whether the arguments are tensors, numbers and names, in tuples, and no objects of an op's own (an optimiser's flat parameters)."""
    return all(
        leaf is None or isinstance(leaf, Tensor | float | int | str | torch.dtype)
        for leaf in tree_leaves(args)
    )


def loss_case(model: str, setting: Setting) -> Case:
    """snr_weighted_mse of one latent picture with a mask and a weight."""
    drawn, shape = RandomTensors(setting), LATENTS[model]
    out, target, mask = (
        drawn.base(1, *shape),
        drawn.base(1, *shape),
        drawn.base(1, 1, *shape[1:]) > 0,
    )
    args = mark_trained(
        kernels.reference.snr_weighted_mse,
        (out, target, mask.to(out.dtype), drawn.adapter(1).abs()),
    )
    return Case("snr_weighted_mse", f"{model} {'x'.join(map(str, shape))}", args)


def copy_arguments(args: Any, dtype: torch.dtype | None = None) -> Any:
    """Plain arguments of the same values in storages of their own, floating ones in `dtype`."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        new = value.detach().clone()
        return (new.to(dtype) if dtype and new.is_floating_point() else new).requires_grad_(
            value.requires_grad
        )

    return tree_map(one, args)
