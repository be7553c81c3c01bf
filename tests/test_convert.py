"""merge.py convert: other names, the same updates and tokens."""

import pytest
import torch

from lora_core import formats
from tests.merge_commands import assert_equal, call, deltas


@pytest.mark.parametrize("format", ["kohya", "diffusers", "cloneofsimo"])
def test_convert_changes_names_only(here, states, layout, format):
    call("convert", "c.safetensors", "o.safetensors", "--to", format, "--model", "base")
    assert_equal(deltas(formats.load("o.safetensors", layout)), deltas(states["c"]))
    tokens = formats.load(
        "o.safetensors" if format == "cloneofsimo" else "o_emb.safetensors", layout
    )
    assert torch.equal(tokens.tokens["clip_l"], states["c"].tokens["clip_l"])
