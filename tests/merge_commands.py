"""merge.py in this process on a folder of small files, and the sums that it should give."""

import json
from dataclasses import replace

import torch
from safetensors.torch import save_file

import merge
from lora_core import formats
from lora_core.adapters.weight_updates import scaled_product
from lora_core.formats import embeddings
from lora_core.formats.model_folders import open_model_folder
from merging.adapter_sums import layers_by_key
from tests.tiny_pipeline import pipeline, random_state

SQUARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def save_loras(folder, layout):
    """Writes LoRA files of three formats, ranks and choices of layers, and a run's folder.

    Returns name -> content of each file. Two of them have tokens of the same names.
    """
    pipe = pipeline()
    noise = torch.Generator().manual_seed(9)
    states = {
        "a": random_state(pipe, rank=2, seed=1),
        "b": random_state(pipe, mixed=True, seed=2),
        "d": random_state(pipe, rank=2, dora=True, seed=4),
        "c": random_state(
            pipe, rank=3, seed=3, unet=("*attn?.to_*", "*ff.net.0.proj"), text=("*self_attn*proj",)
        ),
    }
    written = {"a": "diffusers", "b": "kohya", "c": "cloneofsimo", "d": "diffusers"}
    for name, format in written.items():
        state = states[name]
        if name in "ac":
            words = {"TOK": ("<s1>", "<s2>")} if name == "a" else {}
            metadata = embeddings.placeholder_header(words) | {
                embeddings.TOKEN_NAMES: '["<s1>", "<s2>"]'
            }
            state = states[name] = replace(
                state,
                tokens={"clip_l": torch.randn(2, 16, generator=noise)},
                token_names=("<s1>", "<s2>"),
                metadata=metadata,
            )
        formats.save(state, folder / f"{name}.safetensors", format=format, layout=layout)
    formats.save_run(states["a"], folder / "run", layout=layout)
    return states


def call(*words, status=0, lora_add=False):
    """Runs a command line and checks its status."""
    assert (merge.lora_add if lora_add else merge.main)([str(word) for word in words]) == status


def deltas(state):
    return {key: scaled_product(lr).double() for key, lr in layers_by_key(state).items()}


def summed(terms):
    total = {}
    for weight, state in terms:
        for key, value in deltas(state).items():
            total[key] = total.get(key, 0) + weight * value
    return total


def assert_equal(ours, theirs, tolerance=1e-6):
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert float((ours[key] - value).norm()) <= tolerance * max(float(value.norm()), 1e-12), key


def snapshot(folder):
    return {
        str(path): path.stat().st_mtime_ns if path.is_file() else 0 for path in folder.rglob("*")
    }


def dora_on(folder, *, columns=False, path=SQUARE, factor=1.2):
    """(a DoRA of one layer of the model as a kohya file, its update in fp64)."""
    weight = open_model_folder(folder)["unet"].read(f"{path}.weight").double()
    noise = torch.Generator().manual_seed(3)
    down = 0.05 * torch.randn(2, weight.shape[1], generator=noise)
    up = torch.randn(weight.shape[0], 2, generator=noise)
    tuned = weight + up.double() @ down.double()
    norm = tuned.norm(dim=0 if columns else 1, keepdim=True)
    magnitude = factor * norm + 0.05 * torch.rand(norm.shape, generator=noise)
    update = tuned * magnitude.float() / norm - weight
    module = "lora_unet_" + path.replace(".", "_")
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    return tensors | {f"{module}.dora_scale": magnitude.float()}, update


def save_dora(name, *, columns=False, folder="base", **more):
    tensors, update = dora_on(folder, columns=columns, **more)
    header = {"ss_network_args": json.dumps({"wd_on_output": str(not columns)})}
    save_file(tensors, name, header)
    return update
