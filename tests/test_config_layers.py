"""The layers that the comments in configs/*.toml promise, by the rules of the scripts they name.

The networks are the true architectures, without weights. Rules: peft matches the end of a path
after a dot, B-LoRA's search takes the attention processors of a block, cloneofsimo's and kohya's
the layers below modules of some classes.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from lora_core.adapters.injection import target_paths
from lora_core.config import Config
from lora_core.flags.command_line import parse_command_line
from lora_core.toml import read_toml
from models import flux, sd, sdxl
from tests.adapter_examples import meta_sd15
from tests.numbered_files import walk
from tests.tiny_sdxl import full_size

FOLDER = Path(__file__).parent.parent / "configs"
FLUX_ATTENTION = ["attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"]
FLUX_ADDED = ["attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"]
FLUX_MLP = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
FLUX_REST = ["norm1_context.linear", "norm1.linear", "norm.linear", "proj_mlp", "proj_out"]
CLASSES = ["CrossAttention", "Attention", "GEGLU"]


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    unet, text = meta_sd15()
    return {"sd": unet, "sd text": text, "sdxl": full_size()[0], "flux": transformer}


def by_peft(network: nn.Module, names: list[str]) -> set[str]:
    """The layers whose path is one of the names or ends in it after a dot."""
    ends = tuple(f".{name}" for name in names)
    layers = [path for path, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return {path for path in layers if f".{path}".endswith(ends)}


def by_blocks(network: nn.Module, *blocks: str) -> set[str]:
    """What --lora_unet_blocks and --use_blora adapt: four layers of each attention there."""
    found = set()
    for name in network.attn_processors:
        if any(block in name for block in blocks):
            attention = name.rpartition(".")[0]
            found |= {f"{attention}.{layer}" for layer in ("to_k", "to_q", "to_v", "to_out.0")}
    return found


def by_kohya(network: nn.Module, classes: list[str]) -> dict[str, bool]:
    """networks.lora: path of a layer below the classes -> whether it is a convolution above 1x1."""
    found = {}
    for path, module in network.named_modules():
        if type(module).__name__ in classes:
            for child, layer in module.named_modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    sizes = getattr(layer, "kernel_size", (1, 1))
                    found[f"{path}.{child}"] = sizes != (1, 1)
    return found


def variant(config: str, comment: str) -> Config:
    """The config with the flags below a comment that begins so."""
    text = re.sub(r"\\\n#\s*", "", (FOLDER / f"{config}.toml").read_text())
    after = text.split(f"# {comment}")
    assert len(after) == 2, comment
    line = next(line for line in after[1].splitlines() if line.startswith("#   --"))
    words = [str(FOLDER / f"{config}.toml"), *shlex.split(line.lstrip("# "))]
    return parse_command_line(Config, words, prog="train.py", example="")


def our_layers(network: nn.Module, targets: tuple[str, ...], presets: dict) -> set[str]:
    globs: list[str] = []
    for name in targets:
        globs += presets.get(name, (name,))
    return set(target_paths(network, tuple(globs)))


def test_the_sdxl_guides(networks: dict[str, nn.Module]) -> None:
    unet = networks["sdxl"]
    presets = sd.unet_presets(unet) | sdxl.PRESETS["unet"]
    attention = ["to_k", "to_q", "to_v", "to_out.0"]
    for name in ("sdxl_dreambooth", "sdxl_dora", "sdxl_edm_playground", "sdxl_pivotal_prodigy"):
        targets = read_toml(FOLDER / f"{name}.toml").adapter.targets
        assert our_layers(unet, targets, presets) == by_peft(unet, attention)
    block = by_blocks(unet, "up_blocks.0.attentions.0")
    both = by_blocks(unet, "up_blocks.0.attentions.0", "up_blocks.0.attentions.1")
    assert (len(by_peft(unet, attention)), len(block), len(both)) == (560, 80, 160)
    for config, comment, expected in (
        ("sdxl_pivotal_prodigy", "--lora_unet_blocks", block),
        ("sdxl_pivotal_prodigy", "--use_blora", both),
        ("sdxl_dreambooth", "The B-LoRA command", both),
    ):
        targets = variant(config, comment).adapter.targets
        assert our_layers(unet, targets, presets) == expected, comment


def test_the_flux_guides(networks: dict[str, nn.Module]) -> None:
    transformer = networks["flux"]
    presets = flux.PRESETS["transformer"]
    default = FLUX_ATTENTION + FLUX_ADDED + FLUX_MLP
    for name in ("flux_pivotal", "flux_pivotal_t5"):
        targets = read_toml(FOLDER / f"{name}.toml").adapter.targets
        assert our_layers(transformer, targets, presets) == by_peft(transformer, default)
    one_each = ["transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.attn.to_k"]
    for comment, names, count in (
        ("--lora_layers, attention only", FLUX_ATTENTION, 190),
        ("--lora_layers as in ai-toolkit", default + FLUX_REST, 495),
        ("block prefixes", one_each, 2),
    ):
        expected = by_peft(transformer, names)
        targets = variant("flux_pivotal", comment).adapter.targets
        assert our_layers(transformer, targets, presets) == expected and len(expected) == count
    assert len(by_peft(transformer, default)) == 342


def test_the_guide_of_lora_pti(networks: dict[str, nn.Module]) -> None:
    unet, presets = networks["sd"], sd.unet_presets(networks["sd"])
    config = read_toml(FOLDER / "sd15_lora_pti.toml")
    plain = set(walk(unet, CLASSES))
    assert our_layers(unet, config.adapter.targets, presets) == plain and len(plain) == 144
    text = set(walk(networks["sd text"], ["CLIPAttention"]))
    found = our_layers(networks["sd text"], config.adapter.text_targets, sd.PRESETS["text_encoder"])
    assert found == text
    kinds = (nn.Linear, nn.Conv2d)
    assert set(walk(unet, CLASSES, kinds)) == plain  # --use_extended_lora alone
    extended = set(walk(unet, [*CLASSES, "ResnetBlock2D"], kinds))
    targets = variant("sd15_lora_pti", "--use_extended_lora").adapter.targets
    assert our_layers(unet, targets, presets) == extended and len(extended) == 224


def test_the_guide_of_kohya(networks: dict[str, nn.Module]) -> None:
    unet, presets = networks["sd"], sd.unet_presets(networks["sd"])
    config = read_toml(FOLDER / "kohya_lora.toml")
    plain = by_kohya(unet, ["Transformer2DModel"])
    assert our_layers(unet, config.adapter.targets, presets) == set(plain) and len(plain) == 192
    text = by_kohya(networks["sd text"], ["CLIPAttention", "CLIPMLP"])
    own = our_layers(networks["sd text"], config.adapter.text_targets, sd.PRESETS["text_encoder"])
    assert own == set(text) and len(text) == 72
    classes = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
    layers = by_kohya(unet, classes)
    adapter = variant("kohya_lora", "--network_args conv_dim=4").adapter
    assert our_layers(unet, adapter.targets, presets) == set(layers)
    larger = {path for path, is_larger in layers.items() if is_larger}
    patterned = target_paths(unet, tuple(adapter.rank_pattern))
    assert {path for path in patterned if path in layers} == larger
    assert (len(layers) - len(plain), len(larger)) == (86, 50)
    assert set(adapter.rank_pattern.values()) == {4} == {adapter.rank_pattern["*.conv"]}
    assert adapter.rank_pattern.keys() == adapter.alpha_pattern.keys() and adapter.rank == 16
