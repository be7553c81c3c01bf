"""merge.py diff: the cosine of dense updates, and angles where they have layers in common."""

import re

import torch
from safetensors.torch import save_file

from tests.merge_commands import call, deltas


def test_a_file_does_not_differ_from_itself(here, capsys):
    call("diff", "a.safetensors", "a.safetensors", "--model", "base")
    assert re.search(r"total .* 1\.0000 +\S+\n", capsys.readouterr().out)


def test_the_cosine_is_that_of_the_updates(here, states, capsys):
    call("diff", "a.safetensors", "c.safetensors", "--model", "base", "--top", "1")
    said = capsys.readouterr().out
    first, second = deltas(states["a"]), deltas(states["c"])
    inner = sum(float((first[key] * value).sum()) for key, value in second.items())
    norms = [
        sum(float(value.square().sum()) for value in own.values()) ** 0.5 for own in (first, second)
    ]
    assert f"{inner / norms[0] / norms[1]:.4f}" in said and "90" in said


def test_files_of_two_families_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    layers = {  # file -> (a layer, its inputs)
        "first": ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768, 320),
        "xl": ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", 1280, 1280),
        "flux": ("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072),
    }
    for name, (layer, inner, out) in layers.items():
        down, up = torch.ones(1, inner), torch.ones(out, 1)
        factors = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        save_file(factors, f"{name}.safetensors")
    titles = {"first": "Stable Diffusion 1.x", "xl": "Stable Diffusion XL", "flux": "Flux.1 dev"}
    for a, b in (("first", "xl"), ("xl", "first"), ("flux", "xl"), ("first", "flux")):
        call("diff", f"{a}.safetensors", f"{b}.safetensors", status=2)
        assert capsys.readouterr().err == (
            f"error: {a}.safetensors is for {titles[a]} and {b}.safetensors is for {titles[b]}; "
            "give files of one model\n"
        )


def test_token_rows_have_no_layers_to_compare(here, capsys):
    call("diff", "a.safetensors", "run/run_emb.safetensors", "--model", "base", status=2)
    assert "run_emb.safetensors holds token rows only" in capsys.readouterr().err
    call("convert", "run/run_emb.safetensors", "o.safetensors", "--as", "lora", status=2)
    assert "run_emb.safetensors holds token rows only" in capsys.readouterr().err
