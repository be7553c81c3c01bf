"""Files of different models are not merged: published ones by name, unknown ones by shapes."""

import pytest
import torch
from safetensors.torch import save_file

import merge

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
TEXT = "text_encoder.text_model.encoder.layers"
FILES = {  # name -> layer -> (out, in); all under diffusers' names
    "sd1": {f"unet.{BLOCK}.attn2.to_k": (640, 768)},
    "sd1b": {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (1280, 768)},
    "sd2": {f"unet.{BLOCK}.attn2.to_k": (640, 1024)},
    "sdxl": {f"unet.{BLOCK}.attn2.to_k": (640, 2048)},
    "flux": {"transformer.single_transformer_blocks.3.proj_mlp": (12288, 3072)},
    # of small models that nobody published
    "small": {f"unet.{BLOCK}.attn1.to_q": (16, 16), f"unet.{BLOCK}.attn2.to_k": (16, 24)},
    "small_up": {"unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (32, 32)},
    "small_text": {f"{TEXT}.1.self_attn.q_proj": (24, 24)},
    "wide": {f"unet.{BLOCK.replace('attentions.0', 'attentions.1')}.attn1.to_q": (24, 24)},
    "pair": {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (32, 56)},
    "other_text": {f"{TEXT}.0.self_attn.q_proj": (48, 48)},
    "streams": {"transformer.transformer_blocks.0.attn.to_q": (16, 16)},
    "streams_b": {"transformer.transformer_blocks.5.attn.to_q": (16, 16)},
    "wide_streams": {"transformer.transformer_blocks.7.attn.to_q": (20, 20)},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, layers in FILES.items():
        tensors = {}
        for layer, (out, fan) in layers.items():
            tensors[f"{layer}.lora_A.weight"] = torch.ones(2, fan)
            tensors[f"{layer}.lora_B.weight"] = torch.ones(out, 2)
        save_file(tensors, f"{name}.safetensors")
    return tmp_path


def mix(*names, more=()):
    text = " + ".join(f"{name}.safetensors" for name in names)
    return merge.main(["mix", text, "--out", "o.safetensors", *more])


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (("sd1", "sdxl"), ("Stable Diffusion 1.x", "Stable Diffusion XL")),
        (("flux", "sd1"), ("Flux.1 dev", "Stable Diffusion 1.x")),
        (("sd2", "sd1"), ("Stable Diffusion 2.x", "Stable Diffusion 1.x")),
        (("sd1", "sd1b", "flux"), ("Stable Diffusion 1.x", "Flux.1 dev")),
    ],
)
@pytest.mark.parametrize("more", [(), ("--model", "sd1")])
def test_published_families_are_named(folder, names, titles, more, capsys):
    assert mix(*names, more=more) == 2
    said = capsys.readouterr().err
    for name, title in zip((names[0], names[-1]), titles):
        assert f"{name}.safetensors is for {title}" in said
    assert not (folder / "o.safetensors").exists()


@pytest.mark.parametrize("mode", [["--mode", "ljl"], ["--mode", "lpl"]])
def test_add_names_them_too(folder, mode, capsys):
    assert merge.main(["add", "sd1.safetensors", "flux.safetensors", "o.safetensors", *mode]) == 2
    assert "sd1.safetensors is for Stable Diffusion 1.x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("small", "streams"), "the denoiser is a unet in one and a transformer in the other"),
        (("small", "pair"), "cross-attention reads is 24 wide in one and 56 wide in the other"),
        (("small", "wide"), "attn1.to_q is 24 x 24 in the other"),
        (("small_text", "other_text"), "layers.0.self_attn.q_proj is 48 x 48 in the other"),
        (("streams", "wide_streams"), "transformer_blocks.7.attn.to_q is 20 x 20 in the other"),
        (("small", "small_up", "pair"), "cross-attention reads"),
    ],
)
def test_unknown_models_of_two_families_are_told_apart(folder, names, reason, capsys):
    assert mix(*names) == 2
    said = capsys.readouterr().err
    assert reason in said and f"{names[-1]}.safetensors are for different models" in said
    assert not (folder / "o.safetensors").exists()


@pytest.mark.parametrize(
    "names",
    [
        ("small", "small_up"),
        ("small", "small_text", "small_up"),
        ("streams", "streams_b"),
        ("sd1", "sd1b"),
    ],
)
def test_files_of_one_model_are_merged(folder, names):
    assert mix(*names) == 0


def test_damage_is_said_before_families(folder, capsys):
    tensors = {
        f"unet.{BLOCK}.attn2.to_k.lora_{x}.weight": torch.full((2, 2), float("nan")) for x in "AB"
    }
    save_file(tensors, "nan.safetensors")
    assert mix("small", "nan") == 2
    assert "NaN" in capsys.readouterr().err


LAYER = {
    "transformer.transformer_blocks.3.attn.to_q.lora_A.weight": torch.ones(2, 1536),
    "transformer.transformer_blocks.3.attn.to_q.lora_B.weight": torch.ones(1536, 2),
}


@pytest.mark.parametrize("command", ["mix", "diff"])
def test_headers_tell_models_with_the_same_layers_apart(folder, command, capsys):
    """With --model the user has said which model is meant."""
    for name, version in (("old", "medium"), ("new", "5-medium")):
        header = {"modelspec.architecture": f"stable-diffusion-3-{version}/lora"}
        save_file(LAYER, f"{name}.safetensors", metadata=header)
    words = {
        "mix": ["mix", "old.safetensors + new.safetensors", "--out", "o.safetensors"],
        "diff": ["diff", "old.safetensors", "new.safetensors"],
    }[command]
    assert merge.main(words) == 2
    assert capsys.readouterr().err.endswith(
        "old.safetensors is for Stable Diffusion 3 medium and new.safetensors is for "
        "Stable Diffusion 3.5 medium, by their headers; give files of one model\n"
    )
    assert merge.main([*words, "--model", "sd3"]) == 0


def test_headers_of_a_model_and_its_variant_are_of_one_model(folder):
    for name in ("dev", "schnell"):
        header = {"modelspec.architecture": f"flux-1-{name}/lora"}
        tensors = {
            "transformer.single_transformer_blocks.3.proj_mlp.lora_A.weight": torch.ones(2, 3072),
            "transformer.single_transformer_blocks.3.proj_mlp.lora_B.weight": torch.ones(12288, 2),
        }
        save_file(tensors, f"{name}.safetensors", metadata=header)
    assert mix("dev", "schnell") == 0
