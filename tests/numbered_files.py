"""cloneofsimo's files, whose layers are numbers: made from a walk through live networks."""

import json
from dataclasses import replace

import torch
from torch import nn

PLAIN = ("*attn?.to_*", "*ff.net.0.proj")
EXTENDED = (*PLAIN, "*resnets*conv*", "*time_emb_proj")
TEXT = ("*self_attn*proj",)


def old_order(unet):
    """The UNet as older diffusers registered it: feed-forward layers between the two attentions."""
    for block in unet.modules():
        if type(block).__name__ == "BasicTransformerBlock":
            order = sorted(
                block._modules, key=lambda name: {"attn1": 0, "ff": 1, "attn2": 2}.get(name, 3)
            )
            block._modules = {name: block._modules[name] for name in order}
    return unet


def walk(network, classes, layers=(nn.Linear,)):
    """The layers in the order of cloneofsimo's search: below a module of the classes."""
    names = {module: name for name, module in network.named_modules()}
    found = []
    for module in network.modules():
        if type(module).__name__ in classes:
            found += [names[m] for m in module.modules() if isinstance(m, layers)]
    return found


def file_of(state, walks, classes):
    """(tensors, header) as cloneofsimo's writer makes them.

    `walks` are live ones: component -> module paths within the network.
    """
    tensors, header = {}, {}
    for component, paths in walks.items():
        header[component] = json.dumps(classes[component])
        for i, path in enumerate(paths):
            lr = state.components[component][path]
            tensors |= {f"{component}:{i}:up": lr.up, f"{component}:{i}:down": lr.down}
            header[f"{component}:{i}:rank"] = str(lr.rank)
    return tensors, header


def with_tokens(state, names=("<s2>", "<s10>", "<dog>")):
    return replace(state, tokens={"clip_l": torch.randn(len(names), 16)}, token_names=names)
