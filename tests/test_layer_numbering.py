"""Numbers of layers against a walk through live modules."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import cloneofsimo, layout_of
from lora_core.formats.known_formats import find_format
from lora_core.formats.layout import Numbering
from tests.adapter_checks import assert_equal_factors
from tests.numbered_files import EXTENDED, PLAIN, TEXT, file_of, old_order, walk
from tests.tiny_pipeline import pipeline, random_state


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("said", [True, False])
def test_files_of_either_order_are_read_by_a_live_walk(layout, old, extended, said):
    pipe = pipeline()
    state = random_state(pipe, mixed=True, unet=EXTENDED if extended else PLAIN, text=TEXT)
    state = AdapterState(
        {c: {p: lr._replace(scale=1.0) for p, lr in m.items()} for c, m in state.components.items()}
    )
    unet = old_order(pipe.unet) if old else pipe.unet
    classes = ["Attention", "GEGLU", "CrossAttention"] + [
        "ResnetBlock2D"
    ] * extended  # a set: in any order
    walks = {
        "unet": walk(unet, classes, (nn.Linear, nn.Conv2d) if extended else nn.Linear),
        "text_encoder": [
            "text_model." + path for path in walk(pipe.text_encoder, ["CLIPAttention"])
        ],
    }
    tensors, header = file_of(state, walks, {"unet": classes, "text_encoder": ["CLIPAttention"]})
    assert find_format({key: t.shape for key, t in tensors.items()}) == "cloneofsimo"
    assert_equal_factors(
        cloneofsimo.read_cloneofsimo(
            dict(reversed(tensors.items())), header if said else {}, layout, "x"
        ),
        state,
    )


def test_a_file_for_linear_layers_of_all_classes_is_read(layout):
    """Early extended files: the search below residual blocks found linear layers only."""
    pipe = pipeline()
    state = random_state(pipe, unet=(*PLAIN, "*time_emb_proj"), text=(), scale=1.0)
    classes = ["CrossAttention", "Attention", "GEGLU", "ResnetBlock2D"]
    tensors, header = file_of(
        state, {"unet": walk(old_order(pipe.unet), classes)}, {"unet": classes}
    )
    assert_equal_factors(cloneofsimo.read_cloneofsimo(tensors, header, layout, "x"), state)


def test_shapes_that_tell_no_order_are_refused():
    layout = layout_of({"unet": nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})})
    numbering = Numbering({"X": ("*",)}, (("X",),), (("a", "b"), ("b", "a")))
    layout = replace(
        layout, components={"unet": replace(layout.components["unet"], numbering=numbering)}
    )
    keys = ("unet:0:up", "unet:0:down", "unet:1:up", "unet:1:down")
    tensors = {key: torch.ones(2, 2) for key in keys}
    with pytest.raises(UserError, match="may mean a or b by unet:0, both fit"):
        cloneofsimo.read_cloneofsimo(tensors, {"unet": '["X"]'}, layout, "x")
