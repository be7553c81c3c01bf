"""Tokens added to a whole model: diffusers finds their rows by their names."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import infer
from lora_core import formats
from lora_core.formats import embeddings
from lora_core.formats.model_folders import open_model_folder, weight_key
from lora_core.formats.model_words import model_placeholders
from tests.layered_files import LAYERS, save_deep_folder
from tests.merge_commands import call, deltas


@pytest.mark.parametrize("name", ["base", "runwayml/stable-diffusion-v1-5"])
def test_upl_writes_the_model_with_its_tokens(
    here, states, layout, model, name, monkeypatch, capsys
):
    monkeypatch.setattr("models.hub_models.download_model", lambda _: model)
    call(name, "./c.safetensors", "./output_merged", "0.8", "--mode", "upl", lora_add=True)
    assert "100.00 % of the update's energy survived" in capsys.readouterr().out
    pipe = StableDiffusionPipeline.from_pretrained("output_merged", safety_checker=None)
    ids = pipe.tokenizer("a<s1><s2>", add_special_tokens=False).input_ids[1:]
    assert ids == pipe.tokenizer.convert_tokens_to_ids(
        ["<s1>", "<s2>"]
    ) and pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)
    assert torch.equal(
        pipe.text_encoder.get_input_embeddings().weight[ids], states["c"].tokens["clip_l"]
    )
    before = open_model_folder("base")
    for (component, path), update in deltas(states["c"]).items():
        weight = getattr(pipe, component).get_submodule(layout.module_path(component, path)).weight
        expected = (
            before[component].read(weight_key(before[component], layout, component, path))
            + 0.8 * update
        )
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    return save_deep_folder(tmp_path_factory.mktemp("deep"))


def test_tokens_for_layers_are_in_the_model_and_its_words_know_their_layers(
    deep_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    call("fold", deep_folder / "model", f"0.8*{deep_folder / 'a.pth'}", "--out", "out")
    assert "other programs that load the model do not know" in capsys.readouterr().err
    words = model_placeholders("out")
    assert {own.word: own.layers for own in words} == {"<dog1>": LAYERS, "<dog2>": LAYERS}
    pipe = StableDiffusionPipeline.from_pretrained("out", safety_checker=None)
    assert set(words[0].names) <= set(pipe.tokenizer.get_vocab())
    kept = draw(deep_folder / "model", "--lora", f"{deep_folder / 'a.pth'}:0.8")
    assert (draw("out") - kept).abs().max() <= 1  # of 255


def test_tokens_for_layers_are_a_file_next_to_a_single_file_model(
    deep_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    call("fold", deep_folder / "model", f"0.8*{deep_folder / 'a.pth'}", "--out", "out.safetensors")
    assert "written: out_emb.safetensors" in capsys.readouterr().out
    tokens = formats.load("out_emb.safetensors")
    assert embeddings.word_layers(tokens) == {"<dog1>": LAYERS, "<dog2>": LAYERS}


def draw(model, *lora):
    words = ("--model", model, *lora, "--prompt", "a <dog1>", "--steps", 2)
    more = ("--guidance", 1, "--overwrite", "--out", "x.png")
    assert infer.main([str(word) for word in (*words, *more)]) == 0
    image = Image.open("x.png").convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


def test_upl_ckpt_v2_makes_no_embedding_of_words_for_layers(deep_folder, tmp_path, monkeypatch):
    """A1111's embedding has no place for layers."""
    monkeypatch.chdir(tmp_path)
    words = (deep_folder / "model", deep_folder / "a.pth", "out.ckpt", 0.8)
    call(*words, "--mode", "upl-ckpt-v2", lora_add=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.ckpt", "out_emb.safetensors"]


def test_ljl_keeps_the_layers(deep_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.safetensors"
    files = (deep_folder / "a.pth", deep_folder / "b.pth")
    call("add", *files, out, "--mode", "ljl", "--model", deep_folder / "model")
    state = formats.load("out_emb.safetensors")
    names = ("<dog1>", "<dog2>", "<dog1-2>", "<dog2-2>")
    assert embeddings.word_layers(state) == dict.fromkeys(names, LAYERS)
    assert len(set(state.token_names)) == 4 * LAYERS
