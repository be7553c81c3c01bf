"""merge.py resize: a smaller rank with the same layers, tokens and dtype."""

import torch
from safetensors.torch import load_file

from lora_core import formats
from merging.adapter_sums import layers_by_key
from tests.merge_commands import call


def test_resize_keeps_dtype_tokens_and_layers(here, states, layout, capsys):
    call("resize", "run", "small.safetensors", "--rank", "1", "--model", "base", "--dtype", "fp16")
    small = formats.load("small.safetensors", layout)
    for lr in layers_by_key(small).values():
        assert lr.rank == 1 and lr.down.dtype == torch.float16
    assert formats.load("small_emb.safetensors", layout).token_names == ("<s1>", "<s2>")
    call("resize", "small.safetensors", "one.safetensors", "--energy", "1", "--model", "base")
    call("mix", "small.safetensors", "--out", "wide.safetensors", "--model", "base")
    assert (
        load_file("one.safetensors").popitem()[1].dtype == torch.float16
        and load_file("wide.safetensors").popitem()[1].dtype == torch.float32
    )
    call("resize", "run", "x.safetensors", "--model", "base", status=2)
    assert "choose how much" in capsys.readouterr().err
