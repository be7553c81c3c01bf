"""The denoisers of published models from their configs, for the benchmarks: SD 1.5, SDXL, Flux.1
dev, SD 3.5 medium, and FLUX.2 [klein] base 4B.

Weights are random, or absent on the meta device.

    model = build_network("sdxl")  # on the meta device: shapes alone
    model(**network_inputs("sdxl"))

`adapted_paths` lists the layers that get an adapter: every attention linear, as in the public
scripts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from lora_core.adapters import injection
from models import flux, flux2, sd, sd3
from models.published_configs import MODEL_FILES

SIDES = {"sd15": 512, "sdxl": 1024, "flux": 1024, "sd35": 1024, "flux2": 1024}  # pixels
NAMES = tuple(SIDES)
TARGETS = {
    "sd15": sd.ATTENTION,
    "sdxl": sd.ATTENTION,
    "flux": (*flux.ATTENTION, *flux.ADDED),
    "sd35": (*sd3.ATTENTION, *sd3.DREAMBOOTH),
    "flux2": flux2.PRESETS["transformer"]["dreambooth"],
}
CLASSES = {
    "sd15": (UNet2DConditionModel, "sd1", "unet"),
    "sdxl": (UNet2DConditionModel, "sdxl", "unet"),
    "flux": (FluxTransformer2DModel, "flux-dev", "transformer"),
    "sd35": (SD3Transformer2DModel, "sd3.5-medium", "transformer"),
    "flux2": (Flux2Transformer2DModel, "flux2-klein-base-4b", "transformer"),
}
CLIP_TOKENS, T5_TOKENS, SD3_T5_TOKENS = 77, 512, 256
Sample = Callable[..., Tensor]  # sizes -> random numbers


def build_network(
    name: str, device: str = "meta", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    """The denoiser, frozen, in training mode.

    Weights ~ N(0, 1 / fan_in) from the seed (none on the meta device), biases 0, those of norms 1.
    """
    build, kind, part = CLASSES[name]
    published = MODEL_FILES[kind][f"{part}/config.json"]
    config = {key: value for key, value in published.items() if not key.startswith("_")}
    with torch.device("meta"):
        model = nn.Module.to(build(**config), dtype)  # diffusers' own `to` warns at every call
    model.requires_grad_(False).train()
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        _fill(model, torch.Generator(device).manual_seed(seed))
        _fill_buffers(model, config)
    return model


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Sample every parameter in place."""
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(std=p[0].numel() ** -0.5, generator=generator)
        else:
            p.zero_()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("Norm") and isinstance(weight, Tensor):
            weight.fill_(1)


@torch.no_grad()
def _fill_buffers(model: nn.Module, config: dict[str, Any]) -> None:
    """Compute the buffers, which to_empty has lost: the table of positions of SD 3.5."""
    if list(model.buffers()):
        small = type(model)(**config | {"num_layers": 0})
        for name, buffer in model.named_buffers():
            buffer.copy_(small.get_buffer(name))


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

    make = INPUTS.get(name, _unet_inputs)
    return {"return_dict": False, **make(name, batch, side, sample)}


def _unet_inputs(name: str, batch: int, side: int, sample: Sample) -> dict[str, Any]:
    latents = sample(batch, 4, side // 8, side // 8)
    inputs: dict[str, Any] = {
        "sample": latents,
        "timestep": torch.full((batch,), 500, device=latents.device),
        "encoder_hidden_states": sample(batch, CLIP_TOKENS, 2048 if name == "sdxl" else 768),
    }
    if name == "sdxl":
        sizes = torch.tensor([side, side, 0, 0, side, side], dtype=latents.dtype)
        time_ids = sizes.to(latents.device).expand(batch, 6)
        inputs["added_cond_kwargs"] = {"text_embeds": sample(batch, 1280), "time_ids": time_ids}
    return inputs


def _flux_inputs(name: str, batch: int, side: int, sample: Sample) -> dict[str, Any]:
    tokens = side // 16
    latents = sample(batch, tokens**2, 64)
    device = latents.device
    return {
        "hidden_states": latents,
        "encoder_hidden_states": sample(batch, T5_TOKENS, 4096),
        "pooled_projections": sample(batch, 768),
        "timestep": torch.full((batch,), 0.5, device=device),
        "guidance": torch.full((batch,), 1.0, device=device),
        "img_ids": flux.image_position_ids(2 * tokens, 2 * tokens, device),
        "txt_ids": torch.zeros(T5_TOKENS, 3, device=device),
    }


def _sd3_inputs(name: str, batch: int, side: int, sample: Sample) -> dict[str, Any]:
    latents = sample(batch, 16, side // 8, side // 8)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": sample(batch, CLIP_TOKENS + SD3_T5_TOKENS, 4096),
        "pooled_projections": sample(batch, 2048),
        "timestep": torch.full((batch,), 500.0, device=latents.device),
    }


def _flux2_inputs(name: str, batch: int, side: int, sample: Sample) -> dict[str, Any]:
    tokens = side // 16
    latents = sample(batch, tokens**2, 128)
    device = latents.device
    return {
        "hidden_states": latents,
        "encoder_hidden_states": sample(batch, T5_TOKENS, 7680),
        "timestep": torch.full((batch,), 0.5, device=device),
        "img_ids": flux2.position_ids(1, tokens, tokens, 1, device=device),
        "txt_ids": flux2.position_ids(1, 1, 1, T5_TOKENS, device=device),
    }


INPUTS = {"flux": _flux_inputs, "sd35": _sd3_inputs, "flux2": _flux2_inputs}


@cache
def adapted_paths(name: str) -> tuple[str, ...]:
    """Paths of the adapted linears in the model's order: 128 of SD 1.5, 560 of SDXL, 266 of Flux,
    243 of SD 3.5 medium, 60 of FLUX.2 [klein] 4B.
    """
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
