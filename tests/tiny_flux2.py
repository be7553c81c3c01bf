"""Random FLUX.2 pipelines of a few thousand numbers, klein and dev, with real tokenizer classes
whose vocabularies are bytes.
"""

import functools
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LENGTHS = {"base": 96, "distilled": 96, "dev": 192}  # tokens of a prompt, dev's with its message
WIDTH = 8  # of the text encoders
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
KLEIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
DEV_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}[SYS]{{ m.content[0].text }}[/SYS]"
    "{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def klein_tokenizer():
    """A Qwen2 tokenizer whose words are bytes."""
    vocab = {word: i for i, word in enumerate(["<|endoftext|>", *BYTES])}
    tokenizer = Qwen2TokenizerFast(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = KLEIN_TEMPLATE
    return tokenizer


def dev_tokenizer():
    """A tokenizer as Mistral's, whose words are bytes: it begins a text with <s> and pads left."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYS]", "[/SYS]"]
    vocab = {word: i for i, word in enumerate([*special, *BYTES])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", padding_side="left", extra_special_tokens=special[4:],
    )  # fmt: skip
    tokenizer.chat_template = DEV_TEMPLATE
    return tokenizer


def language_config(tokenizer, layers):
    """The config of a language model, as keywords."""
    return dict(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=12, head_dim=4,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        initializer_range=0.3, max_position_embeddings=512,
    )  # fmt: skip


def klein_encoder(tokenizer):
    """Qwen3 with a head of its own, as the 8B has."""
    config = Qwen3Config(**language_config(tokenizer, 29), tie_word_embeddings=False)
    return Qwen3ForCausalLM(config)


def dev_encoder(tokenizer):
    """Mistral Small with a part that reads images."""
    vision = dict(
        model_type="pixtral", hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, image_size=16, patch_size=4,
    )  # fmt: skip
    text = language_config(tokenizer, 32) | {"model_type": "mistral"}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=2)
    )


def pipeline(kind="base", seed=0):
    """base and distilled: as klein; dev: as dev. VAE of factor 2, latents of 4 channels, so images
    are multiples of 4 pixels.
    """
    torch.manual_seed(seed)
    is_dev = kind == "dev"
    tokenizer = dev_tokenizer() if is_dev else klein_tokenizer()
    encoder = dev_encoder(tokenizer) if is_dev else klein_encoder(tokenizer)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=3 * WIDTH, timestep_guidance_channels=32,
        guidance_embeds=is_dev, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        sample_size=32, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    nn.init.normal_(vae.bn.running_mean)
    nn.init.uniform_(vae.bn.running_var, 0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    make = Flux2Pipeline
    if not is_dev:
        make = functools.partial(Flux2KleinPipeline, is_distilled=kind == "distilled")
    pipe = make(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer,
        transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    for module in (transformer, encoder, vae):
        module.eval()
    for norm in (module for module in transformer.modules() if isinstance(module, nn.RMSNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # ones would hide a missing norm
    return pipe


def save(folder, kind="base"):
    """The pipeline, saved in the diffusers layout."""
    pipe = pipeline(kind)
    pipe.save_pretrained(Path(folder))
    return pipe
