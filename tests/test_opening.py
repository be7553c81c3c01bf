"""The model that adapter files belong to, and keys that it does not have."""

import torch
from safetensors.torch import load_file, save_file

from tests.merge_commands import SQUARE, call


def test_the_family_is_told_by_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = SQUARE.replace("attn1.to_q", "attn2.to_k").replace(".", "_")
    save_file(
        {
            f"lora_unet_{path}.lora_{side}.weight": torch.randn(shape)
            for side, shape in (("down", (2, 768)), ("up", (320, 2)))
        },
        "k.safetensors",
    )
    call("mix", "2*k.safetensors@IN01", "--out", "o.safetensors")
    call("info", "o.safetensors")
    assert "o.safetensors: kohya, sd (sd_v1)" in capsys.readouterr().out
    xl = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file(
        {
            f"{xl}.lora_{side}.weight": torch.randn(shape)
            for side, shape in (("down", (2, 2048)), ("up", (640, 2)))
        },
        "x.safetensors",
    )
    call("mix", "x.safetensors@IN04", "--out", "y.safetensors")
    call("mix", "k.safetensors + x.safetensors", "--out", "z.safetensors", status=2)
    assert "x.safetensors" in capsys.readouterr().err
    call("info", "k.safetensors", "--model", "sd1")
    call("mix", "2*k.safetensors@OUT03", "--out", "p.safetensors", status=2)
    assert "matches none of the 1 layers" in capsys.readouterr().err


def test_keys_that_mean_nothing_can_be_allowed(here, capsys):
    tensors = load_file("a.safetensors")
    save_file(
        tensors
        | {
            "unet.nothing.lora_A.weight": torch.ones(2, 2),
            "unet.nothing.lora_B.weight": torch.ones(2, 2),
        },
        "odd.safetensors",
    )
    call("mix", "odd.safetensors", "--out", "o.safetensors", "--model", "base", status=2)
    call("mix", "odd.safetensors", "--out", "o.safetensors", "--model", "base", "--allow-extra")
    assert capsys.readouterr().err.count("nothing") >= 2
