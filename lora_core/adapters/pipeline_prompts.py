"""Prompts of patched diffusers pipelines: words with tokens for each cross-attention layer (P+).

The pipelines are called, never imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.cross_attention import CrossAttention, LayerAttention, pack_layers
from lora_core.errors import UserError
from lora_core.family import Conditioning, cat_prompt_embeds
from lora_core.formats.layout import Layout
from lora_core.layer_prompts import encode_layer_prompts
from lora_core.placeholders import Placeholder, bind_layers, has_placeholder

# diffusers' processors that compute attention and nothing else
PLAIN_PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
)
DENOISER = "unet"  # the component whose layers can read texts of their own
EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")  # arguments of a pipeline's call


def check_layer_words(
    placeholders: Sequence[Placeholder],
    layout: Layout,
    networks: Mapping[str, nn.Module],
    source: str,
) -> tuple[str, ...]:
    """The cross-attention modules that words of a file need; () without words for each layer.

    Raises UserError for a network without such layers or with another number of them, and where
    the UNet is not given or its layers do more than attention.
    """
    words = [placeholder for placeholder in placeholders if placeholder.layers]
    if not words:
        return ()
    has = (
        f"{source} has tokens of {words[0].word} for each of {words[0].layers} cross-attention "
        "layers (P+)"
    )
    if DENOISER not in networks:
        raise UserError(f"{has}, and no {DENOISER} was given; pass it too, or the whole pipeline")
    for placeholder in words:
        if placeholder.layers != len(layout.cross_attention):
            raise UserError(
                f"{source} has tokens of {placeholder.word} for each of {placeholder.layers} "
                f"cross-attention layers (P+), and this {DENOISER} has "
                f"{len(layout.cross_attention)}; use the model that they were trained on"
            )
    for path in layout.cross_attention:
        module: Any = networks[DENOISER].get_submodule(path)
        kind = type(module.processor)
        if kind is not LayerAttention and kind.__name__ not in PLAIN_PROCESSORS:
            raise UserError(
                f"{has}, which need attention processors of their own, and {path} has "
                f"{kind.__name__}; take it off before the patch (set_default_attn_processor)"
            )
    return layout.cross_attention


def install_layer_attention(network: nn.Module, paths: Sequence[str]) -> dict[str, Any]:
    """Gives cross-attention modules processors that read a text each; returns the replaced ones.

    None are replaced where all are such processors already, as in this project's families.
    """
    modules: dict[str, Any] = {path: network.get_submodule(path) for path in paths}
    if all(isinstance(module.processor, LayerAttention) for module in modules.values()):
        return {}
    before = {path: module.processor for path, module in modules.items()}
    CrossAttention(network, paths)
    return before


def restore_processors(network: nn.Module, before: Mapping[str, Any]) -> None:
    """Undoes `install_layer_attention`."""
    for path, processor in before.items():
        module: Any = network.get_submodule(path)
        module.set_processor(processor)


def refuse_bound_layers(prompt: str, placeholders: Sequence[Placeholder]) -> None:
    """Raises UserError for a prompt with a word that is another text in each layer."""
    for placeholder in placeholders:
        if placeholder.layers and has_placeholder(prompt, placeholder.word):
            raise UserError(
                f"{placeholder.word} has tokens for each of {placeholder.layers} cross-attention "
                "layers (P+), which one text cannot hold; draw with pipe(**p.encode(prompt)), or "
                "with generate_images(..., placeholders=p.placeholders)"
            )


def expandable_placeholders(placeholders: Sequence[Placeholder]) -> tuple[Placeholder, ...]:
    """The placeholders as pipelines with textual inversion need them.

    Before a pipeline tokenizes a prompt it puts <dog>, <dog>_1, <dog>_2 in the place of <dog>; with
    all names in the prompt it would do so for each.
    """
    found = []
    for placeholder in placeholders:
        first, *others = placeholder.names
        is_expanded = others == [f"{first}_{i + 1}" for i in range(len(others))]
        names = (first,) if is_expanded and not placeholder.layers else placeholder.names
        found.append(Placeholder(placeholder.word, names, layers=placeholder.layers))
    return tuple(found)


@torch.no_grad()
def encode_for_pipeline(
    pipeline: Any, prompts: Sequence[str], negative: str, placeholders: Sequence[Placeholder]
) -> dict[str, Tensor]:
    """Arguments of a pipeline's call in the place of prompts and negative prompts.

    They are prompt_embeds and negative_prompt_embeds [b, s, d], or packed [b, s, layers * d] where
    a prompt has words for each layer, and the pooled ones of pipelines that have them.
    """
    words = expandable_placeholders(placeholders)

    def encode(texts: Sequence[str]) -> Conditioning:
        embeds = _call_encoders(pipeline, list(texts))
        return Conditioning(embeds[0], dict(zip(EMBEDS[1:], embeds[1:])))

    cond = encode_layer_prompts(encode, [bind_layers(prompt, words) for prompt in prompts])
    uncond = encode_layer_prompts(encode, [bind_layers(negative, words)] * len(prompts))
    if not negative and getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
        zeros = {name: torch.zeros_like(values) for name, values in uncond.extra.items()}
        uncond = Conditioning(torch.zeros_like(uncond.prompt_embeds), zeros)
    halves = cat_prompt_embeds([cond.prompt_embeds, uncond.prompt_embeds])
    if halves.ndim == 4:
        halves = pack_layers(halves)
    found = dict(zip((EMBEDS[0], f"negative_{EMBEDS[0]}"), halves.chunk(2)))
    for name in cond.extra:
        found |= {name: cond.extra[name], f"negative_{name}": uncond.extra[name]}
    return found


def _call_encoders(pipeline: Any, texts: list[str]) -> list[Tensor]:
    """Prompt embeds and, where the pipeline has them, pooled ones of some texts."""
    found = pipeline.encode_prompt(
        prompt=texts,
        device=pipeline._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    return list(found[::2])  # each is followed by that of the negative prompts, None here
