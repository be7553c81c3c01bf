"""kohya's format: names, header and alphas as sd-scripts writes them, DoRA by rows or columns."""

import hashlib
import json
import struct
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import nn

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank, delta_weight, scaled_product
from lora_core.errors import UserError
from lora_core.formats import Layout, kohya, layout_of
from lora_core.formats.grammar import list_known_keys
from tests.adapter_checks import apply_state, assert_equal_states, assert_same, header
from tests.adapter_examples import dora_file, meta_sd15, save_file
from tests.tiny_pipeline import pipeline, random_state


def test_kohya_with_one_alpha_for_all_is_the_same_update(pipe, pipe_layout, tmp_path):
    state = random_state(pipe, mixed=True, scale=0.7)
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=pipe_layout)
    assert (
        len(
            {
                t.item()
                for key, t in load_file(tmp_path / "a.safetensors").items()
                if key.endswith(".alpha")
            }
        )
        == 1
    )
    read = formats.load(tmp_path / "a.safetensors", pipe_layout)
    for component, modules in state.components.items():
        for path, lr in modules.items():
            other = read.components[component][path]
            exact, got = (
                scaled_product(x._replace(down=x.down.double(), up=x.up.double()))
                for x in (lr, other)
            )
            size = scaled_product(lr._replace(down=lr.down.double().abs(), up=lr.up.double().abs()))
            # alpha, the factor that up is multiplied by, and up are rounded once each
            assert ((got - exact).abs() <= 1.5 * torch.finfo(torch.float32).eps * size).all()
    off = AdapterState(
        {"unet": {path: lr._replace(scale=0.0) for path, lr in state.components["unet"].items()}}
    )
    formats.save(off, tmp_path / "b.safetensors", format="kohya", layout=pipe_layout)
    assert not scaled_product(
        next(
            iter(formats.load(tmp_path / "b.safetensors", pipe_layout).components["unet"].values())
        )
    ).any()


def test_kohya_names_and_header_are_those_of_sd_scripts(pipe, pipe_layout, tmp_path):
    """Names as sd-scripts prints them for SD 1.5.

    They are diffusers' module names, lora_te with the text_model level, 4-D proj_in, float alpha.
    """
    formats.save(
        random_state(pipe, rank=3, scale=0.5),
        tmp_path / "dog.safetensors",
        format="kohya",
        layout=pipe_layout,
    )
    tensors, meta = load_file(tmp_path / "dog.safetensors"), header(tmp_path / "dog.safetensors")
    for name in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_up_blocks_1_resnets_0_time_emb_proj",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_1_mlp_fc2",
    ):
        assert {
            f"{name}.{leaf}" for leaf in ("lora_down.weight", "lora_up.weight", "alpha")
        } <= set(tensors)
    assert tensors["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape == (
        3,
        8,
        1,
        1,
    )
    alpha = tensors["lora_te_text_model_encoder_layers_1_mlp_fc2.alpha"]
    assert alpha.is_floating_point() and alpha.shape == () and alpha == 1.5
    body = (tmp_path / "dog.safetensors").read_bytes()
    body = body[8 + struct.unpack("<Q", body[:8])[0] :]
    assert meta == {
        "sshs_model_hash": hashlib.sha256(body).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256().hexdigest()[:8],
        "modelspec.sai_model_spec": "1.0.1",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "1.5",
        "ss_network_args": "{}",
        "ss_output_name": "dog",
        "modelspec.title": "dog",
        "modelspec.architecture": "arch/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.hash_sha256": f"0x{hashlib.sha256(body).hexdigest()}",
    }
    formats.save(
        random_state(pipe, mixed=True, dora=True),
        tmp_path / "dora.safetensors",
        format="kohya",
        layout=pipe_layout,
    )
    assert header(tmp_path / "dora.safetensors")["ss_network_dim"] == "Dynamic"
    shapes = {
        t.ndim: tuple(t.shape[1:])
        for key, t in load_file(tmp_path / "dora.safetensors").items()
        if key.endswith("dora_scale")
    }
    assert shapes == {2: (1,), 4: (1, 1, 1)}


@pytest.mark.parametrize(
    "old, new",
    [
        ("lora_te_text", "lora_te1_text"),
        ("lora_te_text_model_", "lora_te1_"),
        ("lora_te_text_model_", "lora_te_"),
    ],
)
def test_other_spellings_of_the_text_encoder_are_read(pipe, pipe_layout, tmp_path, old, new):
    state = random_state(pipe)
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=pipe_layout)
    renamed = {
        key.replace(old, new): tensor
        for key, tensor in load_file(tmp_path / "a.safetensors").items()
    }
    assert any(new in key for key in renamed)
    save_file(renamed, tmp_path / "b.safetensors")
    assert_same(formats.load(tmp_path / "b.safetensors", pipe_layout), state, folded=False)


def test_the_real_architecture_has_kohyas_module_counts():
    """SD 1.5 on the meta device: sd-scripts makes 192 UNet and 72 text encoder modules.

    With conv_dim 86 more.
    """
    unet, text = meta_sd15()
    layout = layout_of({"unet": unet, "text_encoder": text})
    names = {
        key.split(".")[0] for key in list_known_keys(kohya.GRAMMAR, layout, {".alpha": "alpha"})
    }
    unet_names = {name for name in names if name.startswith("lora_unet_")}
    assert sum("_attentions_" in name for name in unet_names) == 192
    assert sum("_resnets_" in name or "samplers_0_conv" in name for name in unet_names) == 86
    assert sum(name.startswith("lora_te_text_model_encoder_") for name in names) == 72


def test_a_family_may_spell_its_modules_otherwise_for_kohya(tmp_path):
    """As where kohya's files use the original code's names, diffusers' the library's."""
    network = nn.ModuleDict({"down_blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    plain = layout_of({"unet": network}).components["unet"]
    layout = Layout(
        "f", "v1", {"unet": replace(plain, names={"down_blocks.1": "input_blocks.4.1"})}, {}
    )
    state = AdapterState(
        {
            "unet": {
                path: LowRank(torch.randn(1, 2), torch.randn(2, 1), 2.0) for path in plain.shapes
            }
        }
    )
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
    assert {key.split(".")[0] for key in load_file(tmp_path / "a.safetensors")} == {
        "lora_unet_down_blocks_0",
        "lora_unet_input_blocks_4_1",
    }
    assert_same(formats.load(tmp_path / "a.safetensors", layout), state, folded=False)


def test_two_modules_that_kohya_cannot_tell_apart_are_refused(tmp_path):
    net = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    layout = layout_of({"unet": net})
    state = AdapterState({"unet": {"a.b": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}})
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
    with pytest.raises(ValueError, match=r"would name both a_b and a\.b"):
        formats.load(tmp_path / "a.safetensors", layout)


def test_kohya_dora_is_lycoris_formula(pipe, pipe_layout, tmp_path):
    """The file's numbers through LyCORIS' (wd_on_output) merge, written out.

    It is (W + alpha / r up down) * dora_scale / row norm.
    """
    state = random_state(pipe, dora=True, scale=0.5)
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=pipe_layout)
    tensors, mine = load_file(tmp_path / "a.safetensors"), pipeline()
    apply_state(mine, formats.load(tmp_path / "a.safetensors", pipe_layout), pipe_layout)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    module = pipe.unet.get_submodule("down_blocks.0.resnets.0.conv1")
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    merged = module.weight + (tensors[f"{name}.alpha"] / len(down)) * (
        up.flatten(1) @ down.flatten(1)
    ).reshape(module.weight.shape)
    norm = merged.reshape(len(merged), -1).norm(dim=1).reshape(-1, 1, 1, 1)
    x = torch.randn(1, 8, 5, 5)
    expected = torch.conv2d(
        x, merged * tensors[f"{name}.dora_scale"] / norm, module.bias, padding=1
    )
    torch.testing.assert_close(
        mine.unet.get_submodule("down_blocks.0.resnets.0.conv1")(x), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Linear(5, 5), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)], ids=str
)
def test_a_dora_by_columns_is_lycoris_formula(tmp_path, layer):
    """(W + P) * m / norm over all but the inputs, as LyCORIS merges it without wd_on_output.

    It survives a round trip.
    """
    weight = layer.weight.detach()
    layout = layout_of({"unet": nn.ModuleDict({"a": layer})})
    magnitude = torch.rand(1, weight.shape[1], *[1] * (weight.ndim - 2)) + 0.5
    file = dora_file(tmp_path, weight.shape, magnitude)
    with pytest.raises(UserError, match=r"is a DoRA by columns; merge\.py convert --as lora"):
        formats.load(file, layout)
    state = formats.load(file, layout, merging=True)
    lr = state.components["unet"]["a"]
    merged = weight + scaled_product(lr)
    norm = (
        merged.transpose(0, 1)
        .reshape(weight.shape[1], -1)
        .norm(dim=1)
        .reshape(-1, *[1] * (weight.ndim - 1))
        .transpose(0, 1)
    )
    torch.testing.assert_close(
        weight + delta_weight(lr, weight), merged * magnitude / norm, rtol=1e-6, atol=1e-6
    )
    formats.save(state, tmp_path / "b.safetensors", format="kohya", layout=layout)
    assert_equal_states(formats.load(tmp_path / "b.safetensors", layout, merging=True), state)
    assert (
        json.loads(
            safetensors.safe_open(tmp_path / "b.safetensors", "pt").metadata()["ss_network_args"]
        )["wd_on_output"]
        == "False"
    )
    with pytest.raises(
        UserError, match=r"unet.a is a DoRA by columns, which only kohya's format holds"
    ):
        formats.save(state, tmp_path / "c.safetensors", layout=layout)


def test_a_flat_magnitude_of_a_square_layer_is_never_guessed(tmp_path):
    layout = layout_of({"unet": nn.ModuleDict({"a": nn.Linear(5, 5)})})
    flat = torch.rand(5)
    with pytest.raises(
        UserError,
        match=r"by the rows or columns of \[5, 5\]; "
        r'choose dora_axis="rows" .* or dora_axis="columns"',
    ):
        formats.load(dora_file(tmp_path, (5, 5), flat), layout, merging=True)

    def shape(file, **options):
        return tuple(
            formats.load(file, layout, merging=True, **options)
            .components["unet"]["a"]
            .magnitude.shape
        )

    assert shape(dora_file(tmp_path, (5, 5), flat), dora_axis="rows") == (5,)
    assert shape(dora_file(tmp_path, (5, 5), flat), dora_axis="columns") == (1, 5)
    for said, expected in (("True", (5,)), ("False", (1, 5))):
        file = dora_file(
            tmp_path, (5, 5), flat, {"ss_network_args": json.dumps({"wd_on_output": said})}
        )
        assert shape(file) == expected and shape(file, dora_axis="rows") == (5,)
    by_rows = dora_file(
        tmp_path, (5, 5), flat[:, None], {"ss_network_args": json.dumps({"wd_on_output": "False"})}
    )
    assert shape(by_rows) == (5,)  # the shape tells
    with pytest.raises(UserError, match="goes by rows, not by columns; leave the axis out"):
        shape(by_rows, dora_axis="columns")
    with pytest.raises(UserError, match="expected rows or columns"):
        shape(by_rows, dora_axis="row")
    wide = layout_of({"unet": nn.ModuleDict({"a": nn.Linear(6, 4)})})
    for length, expected in ((4, (4,)), (6, (1, 6))):
        state = formats.load(dora_file(tmp_path, (4, 6), torch.rand(length)), wide, merging=True)
        assert tuple(state.components["unet"]["a"].magnitude.shape) == expected
    with pytest.raises(
        UserError,
        match=r"DoRA magnitude \[7\], expected one number per output, \[4\] or \[4, 1\], "
        r"or one per input, \[1, 6\]",
    ):
        formats.load(dora_file(tmp_path, (4, 6), torch.rand(7)), wide, merging=True)
