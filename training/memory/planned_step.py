"""A run on the meta device: its networks, the inputs of a step, and the memory of its phases, from
shapes alone. `step_memory` counts the same on any device.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core import kernels
from lora_core.config import Config, Stage
from lora_core.diffusion.noise import NoiseLevel
from lora_core.diffusion.step_output import CaptionTokens
from lora_core.family import Conditioning, Family, LoadOptions, Sizes
from lora_core.kernels.device import HAS_TRITON
from lora_core.memory.cuda_operators import WORKSPACES, as_cuda
from lora_core.memory.live_tensors import LiveTensors, tensor_bytes
from lora_core.memory.saved_tensors import saved_activations
from lora_core.tensor_trees import tree_tensors
from models import DTYPES, load_family
from models.published_configs import config_source
from training import setup
from training.checks import model_checks
from training.inputs.caption_cache import TokenIds, trains_text
from training.inputs.step_inputs import StepInputs
from training.setup import Model, Optimization
from training.stages import begin_stage
from training.step import Loss, StepFunctions, optimizer_step

META = torch.device("meta")


@dataclass(frozen=True)
class PlannedRun:
    """A run on the meta device, before its first step; its optimizer has its state."""

    config: Config
    model: Model
    optimization: Optimization


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step, without what is there before it."""

    saved: int  # kept by autograd from the forward to the backward pass
    peak: int  # largest sum of the tensors that live at one time, with gradients
    gradients: int  # of all trained parameters, at the end
    workspace: int  # more at the peak, inside operators of CUDA's libraries (estimate)


class Forward(NamedTuple):
    """Bytes that live at one time in a forward pass, and those that libraries need inside it."""

    activations: int
    workspace: int


@contextlib.contextmanager
def on_meta(kind: str) -> Iterator[None]:
    """Operators as on a device of this kind, cuda or cpu, for tensors on the meta device; nothing
    is printed.
    """
    mode = "triton" if kind == "cuda" and HAS_TRITON else "fused"
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(as_cuda())
        stack.enter_context(kernels.use_kernels(mode))
        yield


def open_planned_run(config: Config, kind: str, *, weights_itself: bool = False) -> PlannedRun:
    """The networks, adapters, token rows and optimizer of a run on the meta device, to be called
    inside `on_meta(kind)`. Raises UserError like `setup.open_model`.
    """
    model_path, vae = config_source(config.model), _own_vae(config)
    planned = replace(
        plain_placement(config), model=model_path, vae=vae, device="meta", from_lora=""
    )
    planned = replace(planned, compile=False, cuda_graph=False)
    if config.trains("tokens"):  # their first values need a vocabulary
        longest = max(len(words.split()) for words in config.tokens.init)
        vectors = config.tokens.vectors or longest
        tokens = replace(config.tokens, init=("zero",), norm="none", vectors=vectors, names=())
        stages = tuple(replace(stage, norm=None) for stage in config.stages)
        planned = replace(planned, tokens=tokens, stages=stages)
    model = setup.open_model(planned, weights_itself=weights_itself)
    if kind == "cuda":  # as setup.py has it there
        model.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimization = setup.open_optimizer(planned, model.groups, model.rate_ratios)
    return PlannedRun(planned, model, optimization)


def plain_placement(config: Config) -> Config:
    """The config with all weights on the device as they are."""
    return replace(config, quantize="none", stream=False, shard=False, offload=False)


def open_planned_family(config: Config) -> Family:
    """The networks of a config on the meta device, without adapters."""
    vae_dtype = None if config.vae_precision == "fp32" else DTYPES[config.vae_precision]
    how = LoadOptions(
        DTYPES[config.precision],
        META,
        _own_vae(config),
        vae_dtype,
        max_token_length=config.max_token_length,
        config=config.model_config,
        family=config.family,
    )
    return load_family(config_source(config.model), how)


def _own_vae(config: Config) -> str:
    """Another VAE where its config is on this disk; one of the hub has the model's own shapes."""
    return config.vae if Path(config.vae).is_dir() else ""


# ---------------------------------------------------------------- inputs of a step


def planned_inputs(run: PlannedRun, stage: Stage, size: tuple[int, int]) -> list[StepInputs]:
    """The inputs of the micro-batches of a step, for images of `size` (h, w) in pixels. Two
    micro-batches stand for any number above one: gradients are there during the second.
    """
    count = min(2, run.config.passes_per_step)
    return [_micro_inputs(run, stage, size) for _ in range(count)]


def micro_batch_rows(config: Config) -> int:
    """Images in one forward pass, with the losers of pairs and the class images."""
    has_prior = bool(config.prior.prompt or config.prior.images)
    return config.batch_size * (1 + bool(config.data.pairs) + has_prior)


def _micro_inputs(run: PlannedRun, stage: Stage, size: tuple[int, int]) -> StepInputs:
    config, family = run.config, run.model.family
    b, a = micro_batch_rows(config), config.adapter
    height, width = size[0] // family.factor, size[1] // family.factor
    x0 = _empty(b, family.latent_channels, height, width)
    eps = torch.empty_like(x0)
    perturbed = config.noise.perturbation
    mask = _empty(b, 1, height, width) if config.masks_loss else None
    inpaint = None
    if family.inpainting:
        inpaint = _empty(b, 1 + family.latent_channels, height, width)
    sizes = Sizes([size] * b, [(0, 0)] * b, size, _empty(b, 6) if family.embeds_sizes else None)
    drops = bool(a.dropout or a.rank_dropout or a.module_dropout)
    swapped = plain = None
    if config.prior.swap:
        swapped = _planned_text(run, stage, b), _encoded(run, b)
    if config.prior.outside_mask:
        plain = _encoded(run, b)
    return StepInputs(
        x0=x0,
        eps=eps,
        eps_in=torch.empty_like(x0) if perturbed else eps,
        level=NoiseLevel(_empty(b), _empty(b), _empty(b)),
        mask=mask,
        inpaint=inpaint,
        text=_planned_text(run, stage, b),
        sizes=sizes,
        is_prior=_empty(b, dtype=torch.bool),
        dropout_keys=_empty(b, dtype=torch.int64) if drops else None,
        step=_empty(dtype=torch.int64),
        number=0,
        caption_tokens=CaptionTokens(()),
        swapped=swapped,
        plain=plain,
        is_loser=_empty(b, dtype=torch.bool) if config.data.pairs else None,
    )


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _planned_text(run: PlannedRun, stage: Stage, b: int) -> Conditioning | TokenIds:
    """The captions of b images: token ids where the stage trains a text encoder or tokens."""
    family, layers = run.model.family, _text_layers(run)
    if not trains_text(stage):
        return _encoded(run, b)
    kept = _empty(b) if model_checks.drops_to_zeros(run.config, family) else None
    ids = family.tokenize(["a"] * (b * max(1, layers)))
    rows = _empty(b, layers, dtype=torch.int64) if layers else None
    return TokenIds(ids, kept, rows)


def _text_layers(run: PlannedRun) -> int:
    """Layers that read texts of their own; 0: all read the same."""
    return max((placeholder.layers for placeholder in run.model.placeholders), default=0)


@torch.no_grad()
def _encoded(run: PlannedRun, b: int) -> Conditioning:
    """The encoding of b captions."""
    family, layers = run.model.family, _text_layers(run)
    with run.model.frozen(), LiveTensors():  # which remembers shapes
        cond = family.encode_prompts(["a"] * b)
    if layers:
        embeds = cond.prompt_embeds
        wide = embeds.new_empty(b, layers, *embeds.shape[1:])
        cond = replace(cond, prompt_embeds=wide)
    return cond


# ---------------------------------------------------------------- the phases


def make_optimizer_state(run: PlannedRun) -> None:
    """One step of the optimizer on gradients of every trained parameter, which makes its state."""
    with LiveTensors():  # numbers that are read from the meta device are 1
        for params in run.model.groups.values():
            for p in params:
                p.grad = torch.empty_like(p)
        run.optimization.optimizer.step()
        run.optimization.optimizer.zero_grad(set_to_none=True)


def step_memory(
    functions: StepFunctions,
    stage: Stage,
    config: Config,
    model: Model,
    optimization: Optimization,
    inputs: Sequence[StepInputs],
) -> StepMemory:
    """The memory of one step of the optimizer, which is taken, on the device of the model."""
    begin_stage(stage, config, model, optimization)
    known = [list(network.parameters()) for network in model.networks]
    saved = 0

    def counted_step(model: Model, x: StepInputs, config: Config, loss: Loss) -> Tensor:
        nonlocal saved
        with saved_activations(known, list(tree_tensors([x]))) as kept:
            rows = functions.step(model, x, config, loss)
        saved = max(saved, kept.bytes)
        return rows

    counted = replace(functions, step=counted_step)
    with LiveTensors(WORKSPACES if model.device.type == "meta" else None) as live:
        optimizer_step(counted, stage, config, model, optimization, False, inputs)
    grads = []
    for params in model.groups.values():
        grads += [p.grad for p in params if p.grad is not None]
    workspace = live.peak_inside - live.peak
    return StepMemory(saved, live.peak, tensor_bytes(grads), workspace)


def encoding_memory(run: PlannedRun, texts: int) -> Forward:
    """Memory while the text encoders encode that many prompts."""
    return _forward_peak(lambda: run.model.family.encode_prompts(["a"] * texts))


def image_memory(family: Family, rows: int, size: tuple[int, int]) -> Forward:
    """Memory while the VAE encodes `rows` images of `size` pixels."""
    pixels = _empty(rows, 3, *size)
    return _forward_peak(lambda: family.encode_images(pixels))


def decoding_memory(family: Family, rows: int, size: tuple[int, int]) -> Forward:
    """Memory while the VAE decodes `rows` images of `size` pixels."""
    height, width = size[0] // family.factor, size[1] // family.factor
    latents = _empty(rows, family.latent_channels, height, width)
    return _forward_peak(lambda: family.decode(latents))


def denoising_memory(run: PlannedRun, rows: int, size: tuple[int, int]) -> Forward:
    """Memory of one forward pass of the denoiser over `rows` latents of `size`
    pixels, without gradients.
    """
    family, b = run.model.family, rows
    height, width = size[0] // family.factor, size[1] // family.factor
    x = _empty(b, family.latent_channels, height, width)
    inpaint = _empty(b, 1 + family.latent_channels, height, width) if family.inpainting else None
    level = NoiseLevel(_empty(b), _empty(b), _empty(b))
    sizes = Sizes.uncropped(*size, b)._replace(values=_empty(b, 6))
    cond = family.add_size_embeddings(_encoded(run, b), sizes, 1.0)
    return _forward_peak(lambda: family.denoise(x, level, cond, inpaint))


def _forward_peak(forward: Callable[[], object]) -> Forward:
    with torch.no_grad(), LiveTensors(WORKSPACES) as live:
        forward()
    return Forward(live.peak, live.peak_inside - live.peak)
