"""Files with LyCORIS' names of changes of norms and biases, for the tiny pipeline."""

import torch
from safetensors.torch import save_file

NORM = "down_blocks.0.attentions.0.norm"  # GroupNorm
TO_OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"  # a layer with a bias
TEXT_NORM = "text_model.final_layer_norm"


def norm_changes(unet, text_encoder=None, *, seed=0):
    """Published path, its component first -> a random vector: three of the UNet, two of a norm of
    the text encoder.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {("unet", f"{NORM}.weight"): unet.get_submodule(NORM).weight.numel()}
    sizes["unet", f"{NORM}.bias"] = unet.get_submodule(NORM).bias.numel()
    sizes["unet", f"{TO_OUT}.bias"] = unet.get_submodule(TO_OUT).bias.numel()
    if text_encoder is not None:
        for leaf in ("weight", "bias"):
            sizes["text_encoder", f"{TEXT_NORM}.{leaf}"] = text_encoder.config.hidden_size
    return {key: 0.5 * torch.randn(size, generator=generator) for key, size in sizes.items()}


def save_changes(changes, file, header=None):
    """Writes them under kohya's prefixes, as LyCORIS names them."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    leaves = {"weight": ".w_norm", "bias": ".b_norm"}
    tensors = {}
    for (component, path), change in changes.items():
        module, _, leaf = path.rpartition(".")
        end = ".diff_b" if module == TO_OUT else leaves[leaf]
        tensors[prefixes[component] + module.replace(".", "_") + end] = change
    save_file(tensors, file, header)
    return tensors
