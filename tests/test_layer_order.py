"""Merges of files whose layers are numbers keep the inputs' order; of two orders, the first's."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.merge_commands import call
from tests.numbered_files import PLAIN, TEXT, file_of, old_order, walk
from tests.tiny_pipeline import pipeline, random_state


def unet_keys(path):
    """The shapes of a numbered file's UNet layers, which tell their order: up, down, up, ..."""
    tensors = load_file(path)
    count = sum(key.startswith("unet:") for key in tensors) // 2
    shapes = []
    for i in range(count):
        shapes += [tuple(tensors[f"unet:{i}:up"].shape), tuple(tensors[f"unet:{i}:down"].shape)]
    return shapes


@pytest.mark.parametrize("command", ["lpl", "ljl", "mix", "resize", "convert", "pt"])
@pytest.mark.parametrize("old", [True, False])
def test_the_output_numbers_layers_as_the_inputs_do(here, layout, command, old, capsys):
    """Files by cloneofsimo's own walk over either order of registration."""
    classes = {"unet": ["CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}
    pipe = pipeline()
    unet = old_order(pipe.unet) if old else pipe.unet
    encoder = ["text_model." + path for path in walk(pipe.text_encoder, ["CLIPAttention"])]
    walks = {"unet": walk(unet, classes["unet"]), "text_encoder": encoder}
    for seed, name in enumerate(("m", "n")):
        state = random_state(pipeline(), rank=2, scale=1.0, seed=seed, unet=PLAIN, text=TEXT)
        if name == "n":  # its tool writes layers that were not trained as zeros
            skipped = next(iter(state.components["unet"].values()))
            skipped.up.zero_(), skipped.down.zero_()
        tensors, header = file_of(state, walks, classes)
        save_file(tensors, f"{name}.safetensors", header)
    lines = {
        "lpl": ("add", "m.safetensors", "m.safetensors", "o.safetensors"),
        "ljl": ("add", "n.safetensors", "m.safetensors", "o.safetensors", "--mode", "ljl"),
        "mix": ("mix", "n.safetensors + m.safetensors", "o.safetensors"),
        "resize": ("resize", "m.safetensors", "o.safetensors", "--rank", "1"),
        "convert": ("convert", "m.safetensors", "o.safetensors", "--to", "cloneofsimo"),
        "pt": ("mix", "n.safetensors + m.safetensors", "o.pt"),
    }
    call(*lines[command], "--model", "base")
    assert "different orders" not in capsys.readouterr().err
    if command == "pt":
        written = [tuple(part.shape) for part in torch.load("o.pt")]
    else:
        written = unet_keys("o.safetensors")
    outer = [(up[0], down[1]) for up, down in zip(written[::2], written[1::2])]
    expected = unet_keys("m.safetensors")
    assert outer == [(up[0], down[1]) for up, down in zip(expected[::2], expected[1::2])]


def test_of_two_orders_the_first_is_taken_and_said(here, layout, capsys):
    classes = {"unet": ["CrossAttention", "Attention", "GEGLU"]}
    for name, unet in (("m", pipeline().unet), ("n", old_order(pipeline().unet))):
        state = random_state(pipeline(), rank=2, scale=1.0, unet=PLAIN, text=())
        tensors, header = file_of(state, {"unet": walk(unet, classes["unet"])}, classes)
        save_file(tensors, f"{name}.safetensors", header)
    shown = {"m": "m.safetensors (attn2, ff)", "n": "n.safetensors (ff, attn2)"}
    for first, second in (("m", "n"), ("n", "m")):
        for line in (
            ("mix", f"{first}.safetensors + {second}.safetensors", "o.safetensors"),
            ("add", f"{first}.safetensors", f"{second}.safetensors", "o.safetensors"),
        ):
            call(*line, "--model", "base", "--overwrite")
            said = " ".join(capsys.readouterr().err.split())
            assert f"different orders by {shown[first]} and {shown[second]}" in said
            assert f"the output is numbered as {first}.safetensors" in said
            outer = [shape[0] for shape in unet_keys("o.safetensors")[::2]]
            assert outer == [shape[0] for shape in unet_keys(f"{first}.safetensors")[::2]]
