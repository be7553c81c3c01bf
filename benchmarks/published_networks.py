"""The denoisers of SD1.5, SDXL and Flux.1 dev from their published configs, for the benchmarks.

Weights are random, or absent on the meta device.

    model = build_network("sdxl")  # on the meta device: shapes alone
    model(**network_inputs("sdxl"))

`adapted_paths` lists the layers that get an adapter: every attention linear, as in the public
scripts.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from lora_core.adapters import injection
from models import flux, sd
from models.known import PUBLISHED_MODELS

NAMES = ("sd15", "sdxl", "flux")
SIDES = {"sd15": 512, "sdxl": 1024, "flux": 1024}  # pixels that each model was trained at
TARGETS = {"sd15": sd.ATTENTION, "sdxl": sd.ATTENTION, "flux": (*flux.ATTENTION, *flux.ADDED)}
CLASSES = {
    "sd15": (UNet2DConditionModel, "sd1", "unet"),
    "sdxl": (UNet2DConditionModel, "sdxl", "unet"),
    "flux": (FluxTransformer2DModel, "flux-dev", "transformer"),
}
CLIP_TOKENS, T5_TOKENS = 77, 512


def build_network(
    name: str, device: str = "meta", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    """The denoiser, frozen, in training mode.

    Weights ~ N(0, 1 / fan_in) from the seed (none on the meta device), biases 0, those of norms 1.
    """
    build, kind, part = CLASSES[name]
    published = PUBLISHED_MODELS[kind].files[f"{part}/config.json"]
    config = {key: value for key, value in published.items() if not key.startswith("_")}
    with torch.device("meta"):
        model = nn.Module.to(build(**config), dtype)  # diffusers' own `to` warns at every call
    model.requires_grad_(False).train()
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        _fill(model, torch.Generator(device).manual_seed(seed))
    return model


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Sample every parameter in place.

    These networks have no buffers, whose values to_empty would have lost.
    """
    assert not list(model.buffers())
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(std=p[0].numel() ** -0.5, generator=generator)
        else:
            p.zero_()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and isinstance(weight, Tensor):
            weight.fill_(1)


def network_inputs(
    name: str,
    batch: int = 1,
    side: int = 0,
    device: str = "meta",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of the network for `batch` images of side x side pixels (0: SIDES).

    Random values, except on the meta device.
    """
    side = side or SIDES[name]
    generator = None
    if torch.device(device).type != "meta":
        generator = torch.Generator(device).manual_seed(seed)

    def sample(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    if name == "flux":
        tokens = side // 16
        return {
            "return_dict": False,
            "hidden_states": sample(batch, tokens**2, 64),
            "encoder_hidden_states": sample(batch, T5_TOKENS, 4096),
            "pooled_projections": sample(batch, 768),
            "timestep": torch.full((batch,), 0.5, device=device),
            "guidance": torch.full((batch,), 1.0, device=device),
            "img_ids": flux.image_position_ids(2 * tokens, 2 * tokens, torch.device(device)),
            "txt_ids": torch.zeros(T5_TOKENS, 3, device=device),
        }
    inputs: dict[str, Any] = {
        "return_dict": False,
        "sample": sample(batch, 4, side // 8, side // 8),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": sample(batch, CLIP_TOKENS, 2048 if name == "sdxl" else 768),
    }
    if name == "sdxl":
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=dtype).to(device)
        text = {"text_embeds": sample(batch, 1280), "time_ids": sizes.expand(batch, 6)}
        inputs["added_cond_kwargs"] = text
    return inputs


@cache
def adapted_paths(name: str) -> tuple[str, ...]:
    """Paths of the adapted linears in the model's order: 128 of SD1.5, 560 of SDXL, 266 of Flux."""
    return tuple(injection.target_paths(build_network(name), TARGETS[name]))


@cache
def _weights(name: str) -> dict[str, tuple[int, ...]]:
    shapes = {key: tuple(p.shape) for key, p in build_network(name).named_parameters()}
    return {path: shapes[f"{path}.weight"] for path in adapted_paths(name)}


def tensor_shapes(name: str, rank: int = 16, *, dora: bool = False) -> list[tuple[int, ...]]:
    """Shapes of down and up (and magnitude) of each layer, as injection.adapter_parameters orders
    them.
    """
    shapes: list[tuple[int, ...]] = []
    for out, fan in _weights(name).values():
        shapes += [(rank, fan), (out, rank)]
        if dora:
            shapes.append((out,))
    return shapes
