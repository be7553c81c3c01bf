"""What a file is, decided once: the commands and the library say the same of every kind."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import infer
from lora_core import formats
from lora_core.adapters.weight_updates import scaled_product
from lora_core.errors import UserError
from lora_core.formats import kohya
from lora_core.formats.recognition import (
    describe_kind,
    model_of_run,
    recognize_file,
    recognize_keys,
)
from models import known
from tests.merge_commands import call
from tests.refusals import sentence

SD = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # [320, 768]
SAI = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"  # the same layer in the original code
FLUX = "transformer_blocks.2.attn.add_k_proj"  # [3072, 3072]
BFL = "double_blocks.2.txt_attn.qkv.1"  # the same layer, as OneTrainer numbers the parts
PEFT = "base_model.model"
HEADED = {  # name of a layer in a file -> (format, family, path)
    f"unet.{SD}": ("diffusers", "sd", SD),
    f"unet.{PEFT}.{SD}": ("diffusers", "sd", SD),
    f"{PEFT}.unet.{SD}": ("diffusers", "sd", SD),
    f"unet.{SAI}": ("diffusers", "sd", SD),
    f"{PEFT}.{SD}": ("peft", "sd", SD),
    SAI: ("peft", "sd", SD),
    f"model.diffusion_model.{SAI}": ("comfyui", "sd", SD),
    f"lora_unet_{SAI.replace('.', '_')}": ("kohya", "sd", SD),
    f"transformer.{PEFT}.{FLUX}": ("diffusers", "flux", FLUX),
    f"transformer.{BFL}": ("diffusers", "flux", FLUX),
    BFL: ("peft", "flux", FLUX),
    f"model.diffusion_model.{BFL}": ("comfyui", "flux", FLUX),
    f"lora_transformer_{FLUX.replace('.', '_')}": ("kohya", "flux", FLUX),
}


def layer(name, kind, out, inner):
    """The tensors of one adapted layer, in the forms that trainers write."""
    generator = torch.Generator().manual_seed(3)

    def some(*shape):
        return 0.1 * torch.randn(shape, generator=generator)

    tensors = {f"{name}.lora_down.weight": some(4, inner), f"{name}.lora_up.weight": some(out, 4)}
    if kind == "plain":
        return tensors
    if kind == "alpha":
        return tensors | {f"{name}.alpha": torch.tensor(2.0)}
    if kind == "DoRA":
        return tensors | {f"{name}.dora_scale": some(out, 1).abs()}
    if kind == "LoKr":
        return {f"{name}.lokr_w1": some(4, 4), f"{name}.lokr_w2": some(out // 4, inner // 4)}
    assert kind == "LoHa"
    factors = {f"{name}.hada_w{i}_a": some(out, 2) for i in "12"}
    return factors | {f"{name}.hada_w{i}_b": some(2, inner) for i in "12"}


@pytest.mark.parametrize("kind", ["plain", "alpha", "DoRA", "LoKr", "LoHa"])
@pytest.mark.parametrize("name", HEADED)
def test_every_head_of_every_kind_of_adapter_names_its_layer(tmp_path, name, kind):
    format, family, path = HEADED[name]
    out, inner = (320, 768) if family == "sd" else (3072, 3072)
    file = tmp_path / "a.safetensors"
    save_file(layer(name, kind, out, inner), file)
    assert recognize_file(file) == ("adapter", format, "", "")
    layout = known.recognize_path(file)
    state = formats.load(file, layout, merging=True)
    assert layout.family == family
    updates = state.components | state.dense
    assert [list(own) for own in updates.values()] == [[path]]


@pytest.mark.parametrize("name", [f"transformer.{PEFT}.{FLUX}", f"{PEFT}.transformer.{FLUX}", BFL])
def test_commands_write_published_names_without_the_head(tmp_path, capsys, name):
    source, native, kohya = [tmp_path / f"{word}.safetensors" for word in ("a", "b", "c")]
    tensors = layer(name, "alpha", 3072, 3072)
    save_file(tensors, source)
    call("info", source)
    assert "flux (flux1)" in capsys.readouterr().out
    call("convert", source, native)
    assert set(load_file(native)) == {f"transformer.{FLUX}.lora_{x}.weight" for x in "AB"}
    call("convert", source, kohya, "--to", "kohya")
    assert all(key.startswith("lora_unet_double_blocks_2_txt_attn_qkv") for key in load_file(kohya))
    layout = known.published_layout("flux-dev")
    up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
    for file in (native, kohya):
        lr = formats.load(file, layout).components["transformer"][FLUX]
        torch.testing.assert_close(scaled_product(lr), 0.5 * up @ down)


CONTROL = {  # files for a control image, by the key that shows it
    "norms of the original code": {"double_blocks.0.img_attn.norm.query_norm.scale": (128,)},
    "norms of diffusers": {"transformer.transformer_blocks.0.attn.norm_added_k.weight": (128,)},
    "the first layer": {"transformer.x_embedder.lora_A.weight": (4, 128)},
    "the first layer in kohya's names": {"lora_unet_img_in.lora_down.weight": (4, 128)},
    "ComfyUI's head": {"diffusion_model.img_in.lora_A.weight": (4, 128)},
}


@pytest.mark.parametrize("shown", CONTROL)
def test_all_commands_refuse_a_control_lora_by_its_name(tmp_path, capsys, shown):
    file, out = tmp_path / "control.safetensors", tmp_path / "out.safetensors"
    tensors = layer("double_blocks.0.img_attn.proj", "plain", 3072, 3072)
    save_file(tensors | {key: torch.ones(shape) for key, shape in CONTROL[shown].items()}, file)
    for words in (
        ("info", file),
        ("convert", file, out),
        ("convert", file, out, "--to", "kohya"),
        ("mix", f"0.5*{file}", "--out", out),
        ("resize", file, out, "--rank", "2"),
        ("diff", file, file),
        ("fold", file, file, out),
        ("explain", file, file, file),
        ("distill", file, file, out, "--rank", "2"),
    ):
        call(*words, status=2)
        text = capsys.readouterr().err
        assert "control LoRA" in text and text.count("\n") == 1, words
    for mode in ("lpl", "ljl", "upl"):
        call(file, file, out, "--mode", mode, status=2, lora_add=True)
        assert "control LoRA" in capsys.readouterr().err
    assert "control LoRA" in sentence(formats.load, file)
    # before the model is looked for
    assert infer.main(["--model", "nowhere", "--prompt", "a", "--lora", f"{file}:0.5"]) == 2
    assert "control LoRA" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "other",
    [
        "lora_unet_double_stream_modulation_img_lin",
        "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        "lora_transformer_transformer_blocks_0_ff_linear_in",
    ],
)
def test_latents_of_128_channels_are_no_control_image(other):
    """FLUX.2's have as many as Flux's latents and a control image."""
    first = CONTROL["the first layer"] | CONTROL["the first layer in kohya's names"]
    own = {f"{other}.lora_down.weight": (4, 3072)}
    assert recognize_keys(first).kind == "foreign"
    assert recognize_keys(first | own).kind == "adapter"


@pytest.mark.parametrize(
    ("key", "shape", "what"),
    [
        ("lllite_unet_down_blocks_0.down.0.weight", (4, 4), "ControlNet-LLLite"),
        ("ip_adapter.0.to_q_lora.down.weight", (4, 4), "IP-Adapter"),
        ("unet.x.oft_blocks", (4, 4, 4), "OFT"),
        ("lora_unet_x.on_input", (1,), "GLoRA or"),
        ("lora_controlnet", (), "control LoRA of Stability"),
    ],
)
def test_other_adapters_are_refused_by_their_names(tmp_path, capsys, key, shape, what):
    file = tmp_path / "a.safetensors"
    save_file({key: torch.ones(shape)}, file)
    call("info", file, status=2)
    assert what in capsys.readouterr().err
    assert what in sentence(formats.load, file)


def test_no_layer_of_a_published_model_is_taken_for_another_models():
    for layout in known.published_layouts().values():
        for component in layout.components.values():
            names = [*component.shapes, *kohya.original_names(component).values()]
            names += [f"lora_unet_{name.replace('.', '_')}.alpha" for name in names]
            for title, pattern in known.OTHER_FAMILIES.items():
                found = next(filter(re.compile(pattern).search, names), None)
                assert found is None, (title, found)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("diffusion_model.blocks.0.self_attn.q", "Wan"),
        ("lora_unet_transformer_blocks_0_img_mlp_net_2", "Qwen-Image"),
        ("lora_unet_transformer_blocks_43_attn_to_q", "Qwen-Image"),
        ("diffusion_model.layers.0.attention.to_q", "Z-Image"),
    ],
)
def test_adapters_of_other_models_are_refused_by_the_models_name(tmp_path, capsys, name, title):
    file = tmp_path / "a.safetensors"
    save_file(layer(name, "plain", 3072, 3072), file)
    call("info", file, status=2)
    assert f"is an adapter for {title}" in capsys.readouterr().err


MODELS = {
    "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
    "double_blocks.0.img_attn.norm.query_norm.scale": (128,),
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (8, 8),
    "first_stage_model.encoder.conv_in.weight": (4, 3, 3, 3),
}


@pytest.mark.parametrize("key", MODELS)
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".pt"])
def test_whole_checkpoints_stay_models(tmp_path, capsys, key, ending):
    file = tmp_path / f"model{ending}"
    tensors = {key: torch.ones(MODELS[key]).to(torch.float8_e4m3fn), "scaled_fp8": torch.ones(2)}
    if ending == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save({"state_dict": tensors, "global_step": 3}, file)
    assert recognize_file(file).kind == "model"
    call("diff", file, file, status=2)
    assert "is a whole model" in capsys.readouterr().err


def test_a_factor_makes_an_adapter_of_a_file_with_the_names_of_a_model():
    for key in MODELS:
        name = key.rpartition(".")[0]
        for leaf in (".lora_A.weight", ".hada_w1_a", ".lokr_w2", ".diff"):
            found = recognize_keys({f"{name}{leaf}": (4, 4), f"{name}.alpha": ()})
            assert found.kind in ("adapter", "foreign")
        assert recognize_keys({key: MODELS[key]}).kind == "model"
    assert recognize_keys({"a.weight": (2, 2)}).kind == "unknown"
    assert recognize_keys({"lora_unet_a.alpha": ()}).kind == "unknown"  # no update
    assert recognize_keys({"bundle_emb.dog.clip_l": (2, 768)}).kind == "tokens"


PICKLED = {
    "kohya": (layer(f"lora_unet_{SD.replace('.', '_')}", "alpha", 320, 768), "adapter", "kohya"),
    "diffusers": (layer(f"unet.{SD}", "plain", 320, 768), "adapter", "diffusers"),
    "state dict": ({"state_dict": layer(SD, "DoRA", 320, 768)}, "adapter", "peft"),
    "A1111's token": ({"string_to_param": {"*": torch.ones(2, 768)}}, "tokens", "embeddings"),
    "diffusers' token": ({"<dog>": torch.ones(768)}, "tokens", "embeddings"),
    "both encoders": (
        {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)},
        "tokens",
        "embeddings",
    ),
    "ED-LoRA": (
        {"params": {"new_concept_embedding": {"<a>": torch.ones(16, 768)}, "unet": {}}},
        "adapter",
        "mixofshow",
    ),
}


@pytest.mark.parametrize("ending", [".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("name", PICKLED)
def test_pickles_are_recognized_by_their_content_not_their_ending(tmp_path, capsys, name, ending):
    content, kind, format = PICKLED[name]
    file = tmp_path / f"a{ending}"
    torch.save(content, file)
    assert recognize_file(file)[:2] == (kind, format)
    call("info", file, "--model", "sdxl" if name == "both encoders" else "sd1")
    assert f"a{ending}: {format}, sd" in capsys.readouterr().out


@pytest.mark.parametrize("ending", [".pt", ".bin", ".ckpt"])
def test_a_list_of_factors_is_an_adapter_under_any_ending(tmp_path, capsys, ending):
    file = tmp_path / f"a{ending}"
    torch.save([torch.ones(320, 4), torch.ones(4, 320)], file)
    assert recognize_file(file)[:2] == ("adapter", "cloneofsimo")
    call("info", file, "--model", "sd1", status=2)
    assert "has 1 layers for unet, expected 144" in capsys.readouterr().err


def test_an_ed_lora_tells_its_family(tmp_path, capsys):
    file = tmp_path / "a.pth"
    factors = {f"{SD}.lora_down.weight": torch.ones(4, 768)}
    factors[f"{SD}.lora_up.weight"] = torch.ones(320, 4)
    rows = {"<a>": torch.ones(16, 768)}
    torch.save({"params": {"new_concept_embedding": rows, "unet": factors}}, file)
    call("info", file)
    assert "a.pth: mixofshow, sd (sd_v1)" in capsys.readouterr().out


def test_a_converted_pickle_takes_the_format_of_its_keys(tmp_path, capsys):
    file, out = tmp_path / "a.bin", tmp_path / "out.safetensors"
    torch.save(PICKLED["kohya"][0], file)
    call("mix", f"2*{file}", "--out", out)
    assert all(key.startswith("lora_unet_") for key in load_file(out))


def test_models_and_runs_in_folders(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert model_of_run(tmp_path / "run") == tmp_path / "run" / "model"
    assert model_of_run(tmp_path) is None
    (tmp_path / "run" / "model" / "model_index.json").write_text("{}")
    found = recognize_file(tmp_path / "run" / "model")
    assert found.kind == "model" and describe_kind(found).startswith("a whole model")
    with pytest.raises(UserError, match="does not exist"):
        recognize_file(tmp_path / "run")


@pytest.mark.parametrize("word", ["my.word", "style-v1.5", "<cat-v1.5>", "a.b c", "my_style.v2"])
def test_a_word_with_dots_is_a_word_where_it_is_alone(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    rows = torch.randn(2, 768)
    save_file({word: rows}, "w.safetensors")
    torch.save({word: rows}, "w.bin")
    for file in ("w.safetensors", "w.bin"):
        call("convert", file, f"{file}.safetensors", "--to", "textual_inversion")
        written = load_file(f"{file}.safetensors")
        assert list(written) == [word] and torch.equal(written[word], rows)


@pytest.mark.parametrize(
    "key",
    ["down.to_q.weight", "unet.x.foo", "lora_unet_x.foo", "x.lora_C", "first_stage_model.x", "a:b"],
)
def test_the_only_weight_of_a_file_is_no_word(key):
    assert recognize_keys({key: (2, 768)}).kind in ("unknown", "model")
