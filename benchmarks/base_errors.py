"""Errors of a quantized frozen base: of its weights, its layers' outputs, the denoiser's output.

    python -m benchmarks.base_errors [--model toy/model] [--network toy|flux] [--seed 0]

The reference is the model in fp32; the forms are packed from bf16, as a run with --precision bf16
--quantize FORM has them. A layer's error is that of its output for the inputs that it has in the
fp32 model, the median over all quantized layers; all are relative Frobenius norms.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_core.memory.quantized_weights import Quantize, QuantizedLinear, stored_bytes
from models import load_family
from models.placement import quantizable_paths

FORMS: tuple[Quantize, ...] = ("none", "fp8", "int8", "int4")
IMAGES, SIDE = 4, 16  # latents of a comparison, and their height and width


class FormErrors(NamedTuple):
    """Relative errors of one form against fp32, and of the denoiser against bf16."""

    form: str
    bits: float  # of a weight, with its scales
    weight: float
    layer: float
    denoiser: float
    against_bf16: float


def measure_errors(network: nn.Module, call: Callable[[nn.Module], Tensor]) -> list[FormErrors]:
    """The errors of each form; `call(network)` is a forward pass on fixed inputs."""
    inputs, exact = _record_inputs(network, call)
    half = nn.Module.to(copy.deepcopy(network), torch.bfloat16)  # without diffusers' warning
    plain = call(half)
    found = []
    for form in FORMS:
        packed = copy.deepcopy(half)
        bytes_stored, numbers = 0, 0
        weights, layers = [], []
        for path, x in inputs.items():
            own = packed.get_submodule(path)
            assert isinstance(own, nn.Linear)
            bytes_stored += stored_bytes(own.weight.shape, form, torch.bfloat16)
            numbers += own.weight.numel()
            layer = own if form == "none" else QuantizedLinear(own, form)
            reference: Any = network.get_submodule(path)
            weights.append(relative_error(layer.weight, reference.weight))
            layers.append(relative_error(layer(x.to(torch.bfloat16)), reference(x)))
            packed.set_submodule(path, layer)
        out = call(packed)
        found.append(
            FormErrors(
                "bf16" if form == "none" else form,
                8 * bytes_stored / numbers,
                statistics.median(weights),
                statistics.median(layers),
                relative_error(out, exact),
                relative_error(out, plain),
            )
        )
    return found


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in fp64."""
    exact = b.detach().double()
    return float((a.detach().double() - exact).norm() / exact.norm())


@torch.no_grad()
def _record_inputs(
    network: nn.Module, call: Callable[[nn.Module], Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """(path -> input of a layer that a form can store, the output), in fp32."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for path in quantizable_paths(network, "int4"):

        def keep(module: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            inputs[path] = args[0]

        handles.append(network.get_submodule(path).register_forward_pre_hook(keep))
    out = call(network)
    for handle in handles:
        handle.remove()
    return inputs, out


# ---------------------------------------------------------------- networks


def toy_network(model: str, seed: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A UNet with trained weights, and a forward pass on random latents and encoded captions."""
    family = load_family(model)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(IMAGES, family.latent_channels, SIDE, SIDE, generator=generator)
    text = family.encode_prompts(["a photo of a creature on a red background"] * IMAGES)
    steps = torch.linspace(50, 950, IMAGES).long()

    def call(network: nn.Module) -> Tensor:
        dtype = next(network.parameters()).dtype
        embeds = text.prompt_embeds.to(dtype)
        with torch.no_grad():
            return network(latents.to(dtype), steps, encoder_hidden_states=embeds).sample

    return family.modules[family.denoiser], call


def flux_network(seed: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A small Flux transformer of random weights (2 + 4 blocks, width 256), and a forward pass."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    network = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=64,
        num_attention_heads=4, joint_attention_dim=256, pooled_projection_dim=128,
        guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    ).eval()  # fmt: skip
    tokens = SIDE * SIDE // 4
    image, text = torch.randn(IMAGES, tokens, 64), torch.randn(IMAGES, 32, 256)
    pooled, sigma = torch.randn(IMAGES, 128), torch.linspace(0.1, 0.9, IMAGES)
    places = torch.cartesian_prod(torch.zeros(1), *[torch.arange(SIDE // 2).float()] * 2)

    def call(network: nn.Module) -> Tensor:
        dtype = next(network.parameters()).dtype
        with torch.no_grad():
            return network(
                image.to(dtype),
                encoder_hidden_states=text.to(dtype),
                pooled_projections=pooled.to(dtype),
                timestep=sigma,
                guidance=torch.full((IMAGES,), 3.5),
                img_ids=places,
                txt_ids=torch.zeros(32, 3),
            ).sample

    return network, call


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.base_errors", description=__doc__)
    parser.add_argument("--model", default="toy/model")
    parser.add_argument("--network", choices=("toy", "flux"), default="toy")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.network == "toy":
        network, call = toy_network(options.model, options.seed)
    else:
        network, call = flux_network(options.seed)
    print("| form | bits | weight | layer | denoiser | denoiser, against bf16 |")
    print("|---|---|---|---|---|---|")
    for row in measure_errors(network, call):
        errors = " | ".join(f"{error:.2e}" for error in row[2:])
        print(f"| {row.form} | {row.bits:.2f} | {errors} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
