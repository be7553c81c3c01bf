"""The model that adapter files belong to, and keys that it does not have."""

import json
import os

import pytest
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


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
            "Stable Diffusion 2.x and Stable Diffusion XL alike; name the model it was made for "
            "with --model",
        ),
        ("elsewhere.to_q", "peft is of no published model; add --model FOLDER"),
    ],
)
def test_a_folder_of_peft_that_fits_several_models_is_said_to(
    tmp_path, monkeypatch, capsys, layer, said
):
    monkeypatch.chdir(tmp_path)
    os.mkdir("peft")
    name = f"base_model.model.{layer}.lora_{{}}.weight"
    factors = {name.format("A"): torch.ones(2, 1280), name.format("B"): torch.ones(1280, 2)}
    save_file(factors, "peft/adapter_model.safetensors")
    with open("peft/adapter_config.json", "w", encoding="utf-8") as file:
        json.dump({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, file)
    for words in (("info", "peft"), ("convert", "peft", "o.safetensors"), ("diff", "peft", "peft")):
        call(*words, status=2)
        error = capsys.readouterr().err
        assert error.endswith(f"{said}\n")
    if layer.startswith("mid"):
        call("convert", "peft", "o.safetensors", "--model", "sd2")


@pytest.mark.parametrize("command", ["info", "convert", "mix", "resize"])
def test_what_is_neither_a_file_nor_a_folder_is_not_looked_for_elsewhere(
    tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    os.mkfifo("a.safetensors")
    flags = {"info": [], "resize": ["o.safetensors", "--rank", "1"]}
    for path in ("a.safetensors", "/dev/null"):
        call(command, path, *flags.get(command, ["o.safetensors"]), status=2)
        assert f"error: {path} is neither a file nor a folder" in capsys.readouterr().err
