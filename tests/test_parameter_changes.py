"""w_norm, b_norm, diff_b: found under every name, kept by kohya's, refused by other formats."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState
from lora_core.formats.grammar import list_known_keys
from lora_core.formats.joined_layers import join_layers
from lora_core.formats.kohya import kohya_names
from models import known
from tests.merge_commands import call
from tests.refusals import sentence

SD1 = {"ss_base_model_version": "sd_v1"}
BLOCK = "down_blocks.0.attentions.0"
# name of a tensor in a file -> (length, published model, component, path of the parameter)
NAMES = {
    "lora_unet_down_blocks_0_attentions_0_norm.w_norm": (
        320,
        "sd1",
        "unet",
        f"{BLOCK}.norm.weight",
    ),
    "lora_unet_input_blocks_1_1_norm.w_norm": (320, "sd1", "unet", f"{BLOCK}.norm.weight"),
    "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_norm3.b_norm": (
        320,
        "sd1",
        "unet",
        f"{BLOCK}.transformer_blocks.0.norm3.bias",
    ),
    "diffusion_model.input_blocks.1.1.norm.b_norm": (320, "sd1", "unet", f"{BLOCK}.norm.bias"),
    "unet.down_blocks.0.attentions.0.norm.w_norm": (320, "sd1", "unet", f"{BLOCK}.norm.weight"),
    "lora_unet_out_0.diff": (320, "sd1", "unet", "conv_norm_out.weight"),
    "lora_unet_out_0.diff_b": (320, "sd1", "unet", "conv_norm_out.bias"),
    "lora_te_text_model_final_layer_norm.w_norm": (
        768,
        "sd1",
        "text_encoder",
        "text_model.final_layer_norm.weight",
    ),
    "lora_unet_input_blocks_1_0_in_layers_0.w_norm": (
        320,
        "sdxl",
        "unet",
        "down_blocks.0.resnets.0.norm1.weight",
    ),
    "lora_te2_text_model_encoder_layers_1_layer_norm2.b_norm": (
        1280,
        "sdxl",
        "text_encoder_2",
        "text_model.encoder.layers.1.layer_norm2.bias",
    ),
    "lora_unet_double_blocks_3_img_attn_norm_query_norm.w_norm": (
        128,
        "flux-dev",
        "transformer",
        "transformer_blocks.3.attn.norm_q.weight",
    ),
    "diffusion_model.single_blocks.3.norm.key_norm.scale.diff": (
        128,
        "flux-dev",
        "transformer",
        "single_transformer_blocks.3.attn.norm_k.weight",
    ),
    "lora_transformer_transformer_blocks_3_attn_norm_added_k.w_norm": (
        128,
        "flux-dev",
        "transformer",
        "transformer_blocks.3.attn.norm_added_k.weight",
    ),
}


@pytest.mark.parametrize("key", NAMES)
def test_every_name_of_a_norm_or_bias_is_found(tmp_path, capsys, key):
    length, kind, component, path = NAMES[key]
    change = torch.randn(length, generator=torch.Generator().manual_seed(1))
    file, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({key: change}, file, SD1 if kind == "sd1" else None)
    call("info", file, "--model", kind)
    assert f"norms and biases of {component}: 1 are changed, such as {path}" in (
        capsys.readouterr().out
    )
    call("convert", file, out, "--to", "kohya", "--model", kind)
    for place in (file, out):
        state = formats.load(place, known.published_layout(kind))
        assert torch.equal(state.parameters[component][path], change)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_input_blocks_4_1_transformer_blocks_1_norm2.w_norm",
        "lora_te2_text_model_final_layer_norm.b_norm",
    ],
)
def test_a_file_of_norms_alone_tells_its_model(key, tmp_path, capsys):
    save_file({key: torch.ones(640 if "unet" in key else 1280)}, tmp_path / "a.safetensors")
    call("info", tmp_path / "a.safetensors")
    assert "sdxl (sdxl_base_v1-0)" in capsys.readouterr().out


def test_kohyas_names_keep_every_bit_and_a_norm_is_known_by_its_weight(tmp_path):
    generator = torch.Generator().manual_seed(2)
    name = "lora_unet_input_blocks_4_1_norm"
    attention = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_out_0"
    tensors = {
        f"{name}.b_norm": torch.randn(640, generator=generator),
        f"{attention}.diff_b": torch.randn(640, generator=generator),
        f"{attention}.lora_down.weight": torch.randn(4, 640, generator=generator),
        f"{attention}.lora_up.weight": torch.randn(640, 4, generator=generator),
        f"{attention}.alpha": torch.tensor(4.0),
    }
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, source)
    call("convert", source, out, "--to", "kohya")
    written = load_file(out)
    # LyCORIS and ComfyUI read a b_norm only next to a w_norm
    assert torch.equal(written.pop(f"{name}.w_norm"), torch.zeros(640))
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)


def test_biases_of_joined_layers_are_stacked_and_taken_apart(tmp_path):
    generator = torch.Generator().manual_seed(3)
    layout = known.published_layout("flux-dev")
    tensors = {
        "lora_unet_double_blocks_0_img_attn_qkv.diff_b": torch.randn(9216, generator=generator),
        "lora_unet_single_blocks_9_linear1.diff_b": torch.randn(21504, generator=generator),
        "lora_unet_final_layer_adaLN_modulation_1.diff_b": torch.randn(6144, generator=generator),
    }
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, source)
    call("convert", source, out, "--to", "kohya")
    assert all(torch.equal(load_file(out)[key], tensor) for key, tensor in tensors.items())
    found = formats.load(source, layout).parameters["transformer"]
    q, k, v = tensors["lora_unet_double_blocks_0_img_attn_qkv.diff_b"].split(3072)
    for name, part in zip(("to_q", "to_k", "to_v"), (q, k, v)):
        assert torch.equal(found[f"transformer_blocks.0.attn.{name}.bias"], part)
    shift, scale = tensors["lora_unet_final_layer_adaLN_modulation_1.diff_b"].chunk(2)
    assert torch.equal(found["norm_out.linear.bias"], torch.cat([scale, shift]))
    # a part that does not change is stored as zeros, which change nothing
    alone = AdapterState(parameters={"transformer": {"transformer_blocks.0.attn.to_k.bias": k}})
    stored = join_layers(alone, layout).parameters["transformer"]
    joined = {"double_blocks.0.img_attn.qkv.bias": torch.cat([0 * q, k, 0 * v])}
    assert stored.keys() == joined.keys()
    assert all(torch.equal(stored[path], change) for path, change in joined.items())


@pytest.mark.parametrize("format", ["diffusers", "cloneofsimo"])
def test_other_formats_refuse_what_they_cannot_hold(tmp_path, capsys, format):
    source = tmp_path / "a.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_norm"
    save_file({f"{name}.w_norm": torch.ones(320)}, source, SD1)
    outputs = [tmp_path / "b.safetensors"]
    if format == "cloneofsimo":
        outputs.append(tmp_path / "b.pt")
    for out in outputs:
        call("convert", source, out, "--to", format, status=2)
        text = capsys.readouterr().err
        assert "cannot hold the changes of norms and biases (1 in unet" in text
        assert "the format kohya does" in text and not out.exists()


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"input_blocks_1_1_norm.w_norm": (7,)}, "expected [320]"),
        (
            {"input_blocks_1_1_transformer_blocks_0_attn2_to_k.diff_b": (320,)},
            "has a change of its bias, which this model's lacks",
        ),
        (
            {"input_blocks_1_1_norm.w_norm": (320,), "input_blocks_1_1_norm.diff": (320,)},
            "two changes of its weight",
        ),
        (
            {
                "input_blocks_1_1_norm.w_norm": (320,),
                "input_blocks_1_1_transformer_blocks_0_attn2_to_k.w_norm": (320,),
            },
            "unknown key",
        ),
    ],
)
def test_changes_that_fit_no_parameter_are_refused(tmp_path, tensors, what):
    file = tmp_path / "a.safetensors"
    save_file({f"lora_unet_{key}": torch.ones(shape) for key, shape in tensors.items()}, file)
    assert what in sentence(formats.load, file, known.published_layout("sd1"))


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "flux-dev"])
def test_every_norm_and_bias_comes_back_from_kohyas_names(kind):
    layout = known.published_layout(kind)
    parameters = {}
    for name, component in layout.components.items():
        if layout.encoders.get(name) != "t5":
            parameters[name] = {
                path: torch.full(shape, float(i))
                for i, (path, shape) in enumerate(component.parameters.items(), 1)
            }
    state = AdapterState(parameters=parameters)
    kohya = formats.FORMATS["kohya"]
    tensors, header = kohya.write(state, layout, "a")
    read = kohya.read(tensors, header, layout, "a").parameters
    assert read.keys() == parameters.keys()
    for name, own in parameters.items():
        assert read[name].keys() == own.keys()
        assert all(torch.equal(read[name][path], change) for path, change in own.items())
    grammar, stored = kohya_names(layout)
    assert tensors.keys() <= list_known_keys(grammar, stored).keys()
