"""Probes of the options of networks and machine: precision, form and place of the weights."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_core.diffusion import losses
from lora_core.memory.quantized_weights import QuantizedLinear, pack_weight
from lora_core.memory.streamed_blocks import find_streamed
from models import DTYPES
from models.placement import named_blocks, repeated_blocks
from models.prompt_chunks import CHUNK
from training.inputs.step_inputs import TokenIds
from training.probes.first_step import FirstStep, forward_calls

# ---------------------------------------------------------------- precision


def has_precision(first: FirstStep) -> bool | None:
    """--precision: whether frozen weights of the denoiser have it, unless they are quantized."""
    if first.config.quantize != "none":
        return None
    frozen = [p for p in first.model.denoiser.parameters() if not p.requires_grad]
    return any(p.dtype == DTYPES[first.config.precision] for p in frozen)


def has_vae_precision(first: FirstStep) -> bool:
    """--vae-precision: whether the VAE has it."""
    dtypes = {p.dtype for p in first.model.family.modules["vae"].parameters()}
    return DTYPES[first.config.vae_precision] in dtypes


def multiplies_in_bf16(first: FirstStep) -> bool | None:
    """--autocast: whether the denoiser runs under it and its products are in bf16."""
    if not first.can_compare:
        return None
    device = first.model.device.type
    found: list[bool] = []
    with forward_calls(first.model.denoiser, found, lambda: torch.is_autocast_enabled(device)):
        first.losses(losses.mse)
    return bool(found) and found[0] and torch.get_autocast_dtype(device) == torch.bfloat16


# ---------------------------------------------------------------- form and place of the weights


def is_quantized(first: FirstStep) -> bool:
    """--quantize: whether there are packed layers in the denoiser, all in that form."""
    wanted, _ = pack_weight(torch.eye(64), first.config.quantize)
    modules = first.model.denoiser.modules()
    packed = [module.packing.kind for module in modules if isinstance(module, QuantizedLinear)]
    return set(packed) == {wanted.kind}


def is_streamed(first: FirstStep) -> bool:
    """--stream: whether blocks of the denoiser stay on the host."""
    return find_streamed(first.model.denoiser) is not None


def is_sharded(first: FirstStep) -> bool:
    """--shard: whether weights of the denoiser are divided among processes."""
    return any(isinstance(p, DTensor) for p in first.model.denoiser.parameters())


def stays_on_device(first: FirstStep) -> bool:
    """--no-offload: whether no network leaves the device."""
    return not first.model.residency.moves


def recomputes(first: FirstStep) -> bool | None:
    """--gradient-checkpointing: whether a block's forward runs again in the backward pass."""
    blocks = list(named_blocks(first.model.denoiser).values())
    if not blocks or not first.can_compare:
        return None
    found: list[bool] = []
    x = replace(first.inputs[-1], readings={})
    with ExitStack() as stack:
        for block in blocks:  # some may come before the first layer that trains
            is_backward = forward_calls(block, found, in_backward)
            stack.enter_context(is_backward)
        rows = first.functions.step(first.model, x, first.config, losses.mse)
        trained = chain(*(first.model.groups[name] for name in first.stage.groups))
        torch.autograd.grad(rows.sum(), list(trained), allow_unused=True)
    return any(found)


def in_backward() -> bool:
    """Whether autograd is running."""
    return bool(torch._C._current_graph_task_id() != -1)


def is_compiled(first: FirstStep) -> bool:
    """--compile: whether blocks of the denoiser are compiled."""
    modules = first.model.denoiser.modules()
    return any(getattr(m, "_compiled_call_impl", None) is not None for m in modules)


def has_threads(first: FirstStep) -> bool:
    """--threads: whether torch computes with so many."""
    return torch.get_num_threads() == first.config.threads


# ---------------------------------------------------------------- what text encoders give


@torch.no_grad()
def skips_last_layers(first: FirstStep) -> bool:
    """--clip-skip: whether the last layer of each CLIP text encoder is left out of the encoding of
    a caption: it is the same after a change of what that layer gives.
    """
    model = first.model
    tokens = model.family.tokenize(first.batch.captions[:1])
    with model.evaluating(), ExitStack() as stack:
        usual = model.family.encode(tokens).prompt_embeds
        for name, encoder in model.encoders.items():
            if model.family.layout.encoders[name] == "t5":
                continue
            last = list(repeated_blocks(encoder).values())[-1]
            handle = last.register_forward_hook(_add_one)
            stack.callback(handle.remove)
        return torch.equal(usual, model.family.encode(tokens).prompt_embeds)


def _add_one(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """The output of a layer, a tensor or a tuple of them, with 1 added to its hidden states."""
    if isinstance(output, Tensor):
        return output + 1
    return (output[0] + 1, *output[1:])


def has_token_length(first: FirstStep) -> bool:
    """--max-token-length: whether the captions of the step have chunks of so many tokens."""
    chunks = first.config.max_token_length // CHUNK
    lengths = set()
    for tokenizer in first.model.family.tokenizers.values():
        lengths.add((tokenizer.model_max_length - 2) * chunks + 2)
    return lengths <= _caption_lengths(first)


def has_sequence_length(first: FirstStep) -> bool:
    """--max-sequence-length: whether the captions of the step have so many tokens, alone or behind
    those of CLIP.
    """
    length, lengths = first.config.max_sequence_length, _caption_lengths(first)
    if length in lengths:
        return True
    tokens = first.model.family.tokenize(first.batch.captions[:1])
    before = {ids.shape[1] for ids in tokens.values() if ids.ndim == 2}
    return any(length + other in lengths for other in before)


def _caption_lengths(first: FirstStep) -> set[int]:
    """The numbers of tokens of the step's captions, in one of the text encoders or encoded."""
    text = first.inputs[-1].text
    if isinstance(text, TokenIds):
        return {ids.shape[1] for ids in text.ids.values() if ids.ndim == 2}
    return {text.prompt_embeds.shape[-2]}
