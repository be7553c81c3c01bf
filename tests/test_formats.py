"""Adapter files: reading undoes writing, refusals name the key, diffusers' loaders read ours.

The loaders run on a tiny pipeline.
"""

import hashlib
import itertools
import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as save_distinct
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_core import formats
from lora_core.adapters import injection
from lora_core.adapters.weight_updates import AdapterState, LowRank, scaled_product
from lora_core.errors import UserError
from lora_core.formats import NATIVE, Layout, embeddings, kohya, layout_of
from lora_core.formats.grammar import list_known_keys
from tests.tiny_pipeline import outputs, pipeline, random_state

DISNEY = (
    Path(__file__).parents[2] / "shared" / "data" / "lora_disney.safetensors"
)  # next to the checkout, where there is one


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.fixture(scope="module")
def layout(pipe):
    return layout_of(
        {"unet": pipe.unet, "text_encoder": pipe.text_encoder},
        base_model_version="sd_v1",
        architecture="arch/lora",
    )


def save_file(tensors, path, metadata=None):
    """Hand-made files may repeat a tensor."""
    save_distinct({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata)


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def apply(pipe, state, layout):
    for name, modules in state.components.items():
        injection.load_factors(
            getattr(pipe, name),
            {layout.module_path(name, path): lr for path, lr in modules.items()},
            "ours",
        )


def assert_same(read, written, *, folded):
    """Bitwise, except that a folded scale has moved into up."""
    assert {c: set(m) for c, m in read.components.items()} == {
        c: set(m) for c, m in written.components.items()
    }
    for component, modules in written.components.items():
        for path, lr in modules.items():
            got = read.components[component][path]
            assert torch.equal(got.down, lr.down) and got.down.shape == lr.down.shape
            assert torch.equal(got.up, lr.up * lr.scale if folded else lr.up)
            assert got.scale == (1.0 if folded else lr.scale)
            assert (got.magnitude is None) == (lr.magnitude is None) and (
                lr.magnitude is None or torch.equal(got.magnitude, lr.magnitude)
            )


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_what_is_written_reads_back_bit_for_bit(pipe, layout, tmp_path, format, dora):
    state = random_state(pipe, dora=dora, mixed=format == "diffusers", scale=0.75)
    formats.save(state, tmp_path / "a.safetensors", format=format, layout=layout)
    assert_same(
        formats.load(tmp_path / "a.safetensors", layout), state, folded=format == "diffusers"
    )


def test_kohya_with_one_alpha_for_all_is_the_same_update(pipe, layout, tmp_path):
    state = random_state(pipe, mixed=True, scale=0.7)
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
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
    read = formats.load(tmp_path / "a.safetensors", layout)
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
    formats.save(off, tmp_path / "b.safetensors", format="kohya", layout=layout)
    assert not scaled_product(
        next(iter(formats.load(tmp_path / "b.safetensors", layout).components["unet"].values()))
    ).any()


def test_native_reads_and_writes_without_a_layout(pipe, layout, tmp_path):
    state = random_state(pipe, dora=True, scale=1.0)
    formats.save(state, tmp_path / "a.safetensors")
    formats.save(state, tmp_path / "b.safetensors", layout=layout)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert_same(formats.load(tmp_path / "a.safetensors"), state, folded=True)


def test_same_state_same_bytes_and_aligned_tensors(pipe, layout, tmp_path):
    state, more = random_state(pipe), {f"k{i}": "ü" * i for i in range(9)}
    for name in ("a", "b"):
        formats.save(
            state, tmp_path / name / "x.safetensors", format="kohya", layout=layout, metadata=more
        )
    data = (tmp_path / "a/x.safetensors").read_bytes()
    assert data == (tmp_path / "b/x.safetensors").read_bytes()
    assert (
        struct.unpack("<Q", data[:8])[0] % 8 == 0
        and header(tmp_path / "a/x.safetensors")["k3"] == "üüü"
    )


def test_dtype_is_what_the_factors_get_and_an_overflow_is_refused(pipe, layout, tmp_path):
    state = random_state(pipe, dora=True)
    formats.save(
        state, tmp_path / "a.safetensors", format="kohya", layout=layout, dtype=torch.bfloat16
    )
    for key, tensor in load_file(tmp_path / "a.safetensors").items():
        assert tensor.dtype == (
            torch.float32 if key.endswith(("alpha", "dora_scale")) else torch.bfloat16
        )
    path, lr = next(iter(state.components["unet"].items()))
    state.components["unet"][path] = lr._replace(up=lr.up * 1e6)
    with pytest.raises(UserError, match=r"lora_B.*NaN or Inf.*float16"):
        formats.save(state, tmp_path / "b.safetensors", layout=layout, dtype=torch.float16)
    assert not (tmp_path / "b.safetensors").exists()


def test_linear_and_1x1_convolution_forms_stand_for_each_other(tmp_path):
    """SD 1.x writers disagree on proj_in: 2-D or 4-D; the layout decides."""
    net = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 1), "linear": nn.Linear(4, 6)})
    layout = layout_of({"unet": net})
    down, up = torch.randn(2, 4), torch.randn(6, 2)
    flat, deep = (
        {"down": down, "up": up},
        {"down": down[..., None, None], "up": up[..., None, None]},
    )
    for i, (conv, linear) in enumerate([(flat, deep), (deep, flat)]):
        tensors = {}
        for m, parts in (("conv", conv), ("linear", linear)):
            tensors |= {f"lora_unet_{m}.lora_{leaf}.weight": t for leaf, t in parts.items()}
        save_file(tensors, tmp_path / f"{i}.safetensors")
        read = formats.load(tmp_path / f"{i}.safetensors", layout).components["unet"]
        assert (
            read["conv"].down.shape == (2, 4, 1, 1)
            and read["conv"].up.shape == (6, 2, 1, 1)
            and read["linear"].down.shape == (2, 4)
        )
        assert (
            torch.equal(read["conv"].down.flatten(1), down)
            and torch.equal(read["linear"].up, up)
            and read["conv"].scale == 1.0
        )  # no alpha: 1


# ---------------------------------------------------------------- names


def test_kohya_names_and_header_are_those_of_sd_scripts(pipe, layout, tmp_path):
    """Names as sd-scripts prints them for SD 1.5.

    They are diffusers' module names, lora_te with the text_model level, 4-D proj_in, float alpha.
    """
    formats.save(
        random_state(pipe, rank=3, scale=0.5),
        tmp_path / "dog.safetensors",
        format="kohya",
        layout=layout,
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
    }
    formats.save(
        random_state(pipe, mixed=True, dora=True),
        tmp_path / "dora.safetensors",
        format="kohya",
        layout=layout,
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
def test_other_spellings_of_the_text_encoder_are_read(pipe, layout, tmp_path, old, new):
    state = random_state(pipe)
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
    renamed = {
        key.replace(old, new): tensor
        for key, tensor in load_file(tmp_path / "a.safetensors").items()
    }
    assert any(new in key for key in renamed)
    save_file(renamed, tmp_path / "b.safetensors")
    assert_same(formats.load(tmp_path / "b.safetensors", layout), state, folded=False)


@pytest.mark.parametrize("with_layout", [True, False])
def test_a_native_text_encoder_without_its_level_is_published_with_it(
    pipe, layout, tmp_path, with_layout
):
    formats.save(random_state(pipe, scale=1.0), tmp_path / "a.safetensors")
    save_file(
        {k.replace("text_model.", ""): t for k, t in load_file(tmp_path / "a.safetensors").items()},
        tmp_path / "b.safetensors",
    )
    assert_same(
        formats.load(tmp_path / "b.safetensors", layout if with_layout else None),
        random_state(pipe, scale=1.0),
        folded=True,
    )


def test_layout_finds_published_names_in_both_clip_classes_and_back():
    config = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
    )
    plain, projected = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    layout = layout_of({"text_encoder": plain, "text_encoder_2": projected})
    name = "text_model.encoder.layers.0.mlp.fc1"
    assert layout.published("text_encoder", layout.module_path("text_encoder", name)) == name
    assert layout.published("text_encoder_2", layout.module_path("text_encoder_2", name)) == name
    assert (
        plain.get_submodule(layout.module_path("text_encoder", name)).weight.shape
        == layout.components["text_encoder"].shapes[name]
    )
    assert projected.get_submodule(layout.module_path("text_encoder_2", name)).weight.shape == (
        16,
        8,
    )
    assert [c.prefixes[0] for c in layout.components.values()] == ["lora_te1", "lora_te2"]
    with pytest.raises(
        UserError,
        match=r"no Linear or Conv2d named text_model.encoder.layers.0.mlp.fc3; "
        r"the nearest is \S*mlp.fc",
    ):
        layout.module_path("text_encoder", "text_model.encoder.layers.0.mlp.fc3")


def test_the_real_architecture_has_kohyas_module_counts():
    """SD 1.5 on the meta device: sd-scripts makes 192 UNet and 72 text encoder modules.

    With conv_dim 86 more.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
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


def test_an_adapted_module_counts_as_its_base(pipe):
    modules = {"unet": pipeline().unet}
    before = layout_of(modules)
    injection.inject(modules["unet"], injection.AdapterSpec(targets=("*.to_q", "*.conv1"), rank=2))
    assert layout_of(modules) == before


def test_two_modules_that_kohya_cannot_tell_apart_are_refused(tmp_path):
    net = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    layout = layout_of({"unet": net})
    state = AdapterState({"unet": {"a.b": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}})
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
    with pytest.raises(ValueError, match=r"would name both a_b and a\.b"):
        formats.load(tmp_path / "a.safetensors", layout)


# ---------------------------------------------------------------- layers that files store as one


def fused_layout():
    """q, k (4 outputs each) and m (8) in one layer "one.qkm", p renamed, n with swapped halves."""
    net = nn.ModuleDict(
        {
            name: nn.Linear(6, out)
            for name, out in (("q", 4), ("k", 4), ("m", 8), ("p", 6), ("n", 8))
        }
    )
    layout = layout_of({"transformer": net, "text_encoder": nn.ModuleDict({"t": nn.Linear(6, 6)})})
    part = replace(
        layout.components["transformer"],
        names={"p": "one.proj"},
        fused={"one.qkm": ("q", "k", "m")},
        swapped=frozenset({"n"}),
    )
    return replace(layout, components={**layout.components, "transformer": part})


def factors(layout, paths, *, ranks=(2, 2, 2, 2, 2), scales=(0.5, 0.5, 0.5, 0.5, 0.5), dora=""):
    shapes = layout.components["transformer"].shapes
    found = {}
    for path, rank, scale in zip("qkmpn", ranks, scales, strict=True):
        out = shapes[path][0]
        if path in paths:
            found[path] = LowRank(
                torch.randn(rank, 6),
                torch.randn(out, rank),
                scale,
                torch.rand(out) if path in dora else None,
            )
    return AdapterState({"transformer": found})


def dense(tensors, name):
    """scale * up @ down of one module in a kohya file."""
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    return tensors[f"{name}.alpha"] / len(down) * up @ down


@pytest.mark.parametrize("paths", ["qkmpn", "qkm", "qk", "m", "km", "qm", "p"])
@pytest.mark.parametrize("ranks", [(2, 2, 2, 2, 2), (3, 1, 2, 2, 1)])
def test_fused_layers_read_back_bit_for_bit(tmp_path, paths, ranks):
    layout = fused_layout()
    state = factors(layout, paths, ranks=ranks)
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
    assert_same(formats.load(tmp_path / "a.safetensors", layout), state, folded=False)
    doras = factors(layout, paths, ranks=ranks, dora=paths)
    if set("qkm") <= set(paths) or not set("qkm") & set(paths):
        formats.save(doras, tmp_path / "b.safetensors", format="kohya", layout=layout)
        assert_same(formats.load(tmp_path / "b.safetensors", layout), doras, folded=False)


def test_trap_7_a_fused_layer_is_the_stack_of_its_parts(tmp_path):
    """alpha grows with the number of parts: else the file would have a third of its strength."""
    layout = fused_layout()
    state = factors(layout, "qkmpn")
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
    tensors, parts = load_file(tmp_path / "a.safetensors"), state.components["transformer"]
    assert {key.split(".")[0] for key in tensors} == {
        "lora_unet_one_qkm",
        "lora_unet_one_proj",
        "lora_unet_n",
    }
    assert tensors["lora_unet_one_qkm.alpha"] == 3 and tensors["lora_unet_one_proj.alpha"] == 1
    stack = torch.cat([scaled_product(parts[path]) for path in "qkm"])
    torch.testing.assert_close(dense(tensors, "lora_unet_one_qkm"), stack)
    torch.testing.assert_close(
        dense(tensors, "lora_unet_n"), torch.cat(scaled_product(parts["n"]).chunk(2)[::-1])
    )
    meta = header(tmp_path / "a.safetensors")
    assert (meta["ss_network_dim"], meta["ss_network_alpha"]) == ("2", "1.0")


def test_parts_of_other_scales_are_brought_to_one_and_modules_keep_their_alphas(tmp_path):
    layout = fused_layout()
    state = factors(layout, "qkmpn", ranks=(1, 2, 3, 2, 2), scales=(0.0, 0.7, 0.3, 2.0, 0.1))
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
    tensors, read = (
        load_file(tmp_path / "a.safetensors"),
        formats.load(tmp_path / "a.safetensors", layout).components["transformer"],
    )
    assert tensors["lora_unet_one_proj.alpha"] == 4 and tensors[
        "lora_unet_n.alpha"
    ].item() == pytest.approx(0.2)
    assert header(tmp_path / "a.safetensors")["ss_network_alpha"] == "Dynamic"
    parts = state.components["transformer"]
    torch.testing.assert_close(
        dense(tensors, "lora_unet_one_qkm"),
        torch.cat([scaled_product(parts[path]) for path in "qkm"]),
    )
    for path in "kmpn":
        torch.testing.assert_close(scaled_product(read[path]), scaled_product(parts[path]))
    half = {path: lr._replace(down=lr.down.half(), up=lr.up.half()) for path, lr in parts.items()}
    formats.save(
        AdapterState({"transformer": half}),
        tmp_path / "b.safetensors",
        format="kohya",
        layout=layout,
    )
    assert (
        load_file(tmp_path / "b.safetensors")["lora_unet_one_qkm.lora_up.weight"].dtype
        == torch.float16
    )


def test_a_dense_fused_layer_is_split_by_rows(tmp_path):
    """As kohya trains it: every part has the whole down, alpha and rank are its own."""
    layout, down, up = fused_layout(), torch.randn(3, 6), torch.randn(16, 3)
    up[4:8] = 0  # a dense up proves nothing about a part that did not move
    name = "lora_unet_one_qkm"
    save_file(
        {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(1.5),
        },
        tmp_path / "a.safetensors",
    )
    read = formats.load(tmp_path / "a.safetensors", layout).components["transformer"]
    assert list(read) == ["k", "m", "q"] and all(
        torch.equal(lr.down, down) and lr.scale == 0.5 for lr in read.values()
    )
    assert torch.equal(torch.cat([read[path].up for path in "qkm"]), up)
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up[:, :1] @ torch.ones(1, 3)},
        tmp_path / "b.safetensors",
    )
    assert formats.load(tmp_path / "b.safetensors", layout).components["transformer"][
        "q"
    ].down.shape == (3, 6)


@pytest.mark.parametrize("rank, own", [(3, [1, 1, 1]), (6, [2, 2, 2]), (4, [4, 4, 4])])
def test_an_untrained_fused_layer_keeps_all_its_parts(tmp_path, rank, own):
    layout, name = fused_layout(), "lora_unet_one_qkm"
    save_file(
        {
            f"{name}.lora_down.weight": torch.randn(rank, 6),
            f"{name}.lora_up.weight": torch.zeros(16, rank),
        },
        tmp_path / "a.safetensors",
    )
    read = formats.load(tmp_path / "a.safetensors", layout).components["transformer"]
    assert [read[path].rank for path in "qkm"] == own


def test_columns_of_zeros_change_nothing(tmp_path):
    """An up with dead columns, in another order, with unequal ranks, gives the same updates."""
    layout, name = fused_layout(), "lora_unet_one_qkm"
    down, up = torch.randn(7, 6), torch.zeros(16, 7)
    for column, rows in ((1, slice(8, 16)), (2, slice(0, 4)), (4, slice(8, 16)), (5, slice(0, 4))):
        up[rows, column] = torch.randn(rows.stop - rows.start)
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.safetensors"
    )
    read = formats.load(tmp_path / "a.safetensors", layout).components["transformer"]
    assert set(read) == {"q", "m"} and read["q"].rank + read["m"].rank == 7
    torch.testing.assert_close(
        torch.cat([scaled_product(read["q"]), torch.zeros(4, 6), scaled_product(read["m"])]),
        up @ down,
    )


def test_a_dora_whose_rows_did_not_all_move_keeps_every_magnitude(tmp_path):
    layout, name = fused_layout(), "lora_unet_one_qkm"
    up = torch.zeros(16, 2)
    up[:4] = 1
    file = {
        f"{name}.lora_down.weight": torch.randn(2, 6),
        f"{name}.lora_up.weight": up,
        f"{name}.dora_scale": torch.rand(16, 1),
    }
    save_file(file, tmp_path / "a.safetensors")
    read = formats.load(tmp_path / "a.safetensors", layout).components["transformer"]
    assert torch.equal(
        torch.cat([read[path].magnitude for path in "qkm"]), file[f"{name}.dora_scale"].flatten()
    )


@pytest.mark.parametrize("paths, dora", [("qk", "qk"), ("qkm", "q"), ("qkmpn", "km")])
def test_a_dora_on_part_of_a_fused_layer_has_no_kohya_file(tmp_path, capsys, paths, dora):
    layout = fused_layout()
    state = factors(layout, paths, dora=dora)
    with pytest.raises(
        UserError, match=r"is a DoRA and [qkm] is not, but .* one.qkm; adapt all of it or none"
    ):
        formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
    written = formats.save_run(state, tmp_path / "run", layout=layout)
    assert (
        [file.name for file in written]
        == [NATIVE]
        == [file.name for file in (tmp_path / "run").iterdir()]
    )
    said = capsys.readouterr().err
    assert said.startswith("run.safetensors") and "is not written" in said and said.count("\n") == 1
    assert_same(formats.load(tmp_path / "run", layout), state, folded=True)


def test_parts_may_be_named_apart_but_not_twice(tmp_path):
    layout = fused_layout()
    state = factors(layout, "qkm")
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
    lr = state.components["transformer"]["q"]
    apart = {"lora_unet_q.lora_down.weight": lr.down, "lora_unet_q.lora_up.weight": lr.up}
    save_file(apart, tmp_path / "b.safetensors")
    assert torch.equal(
        formats.load(tmp_path / "b.safetensors", layout).components["transformer"]["q"].up, lr.up
    )
    save_file(load_file(tmp_path / "a.safetensors") | apart, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"c.safetensors has q twice, alone and in one.qkm"):
        formats.load(tmp_path / "c.safetensors", layout)


def test_prefixes_and_token_keys_follow_what_an_encoder_is():
    net = nn.ModuleDict({"a": nn.Linear(2, 2)})
    modules = {"transformer": net, "text_encoder": net, "text_encoder_2": net}
    layout = layout_of(modules, encoders={"text_encoder": "clip_l", "text_encoder_2": "t5"})
    assert [c.prefixes[0] for c in layout.components.values()] == [
        "lora_unet",
        "lora_te1",
        "lora_te3",
    ] and layout.encoders["text_encoder_2"] == "t5"
    assert [c.prefixes[0] for c in layout_of(modules).components.values()] == [
        "lora_unet",
        "lora_te1",
        "lora_te2",
    ]


# ---------------------------------------------------------------- diffusers reads what we write


def disagreement(ours, theirs, base):
    """Largest difference, relative to what the adapter did; fails if the adapter did nothing."""
    effect = [(a - b).abs().max() for a, b in zip(theirs, base, strict=True)]
    assert min(effect) > 1e-2
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


KINDS_OF_FILE = [
    {"scale": 0.5},
    {"mixed": True, "scale": 0.75},
    {"unet": ("*to_q", "*proj_in"), "text": ()},
]  # the last: diffusers' first-key trap


CASES = [("diffusers", {"dora": True}), *itertools.product(("diffusers", "kohya"), KINDS_OF_FILE)]


@pytest.mark.parametrize("format, kind", CASES, ids=str)
def test_diffusers_loads_the_file_to_the_same_outputs(layout, tmp_path, format, kind):
    theirs, mine = pipeline(), pipeline()
    base, state = outputs(mine), random_state(mine, **kind)
    run = tmp_path / "run"
    formats.save_run(state, run, layout=layout, metadata={"config": "seed = 1"})
    name = NATIVE if format == "diffusers" else "run.safetensors"
    theirs.load_lora_weights(str(run), **({} if format == "diffusers" else {"weight_name": name}))
    apply(mine, formats.load(run / name, layout), layout)
    components = slice(None) if "text_encoder" in state.components else slice(1)
    assert (
        disagreement(outputs(mine)[components], outputs(theirs)[components], base[components])
        < 1e-5
    )


def test_the_scale_in_peft_headers_is_honoured(layout, tmp_path):
    """A file as diffusers' newer scripts write it: alpha in the header only."""
    theirs, mine = pipeline(), pipeline()
    base, state = outputs(mine), random_state(mine, rank=4, scale=1.0)
    formats.save(state, tmp_path / "a.safetensors", layout=layout)
    fields = {}
    for c in state.components:
        fields |= {f"{c}.r": 4, f"{c}.lora_alpha": 2, f"{c}.target_modules": ["to_q"]}
    for c, level in (("unet", ""), ("text_encoder", "text_model.")):
        fields[f"{c}.target_modules"] = [path.removeprefix(level) for path in state.components[c]]
    save_file(
        load_file(tmp_path / "a.safetensors"),
        tmp_path / "b.safetensors",
        {"lora_adapter_metadata": json.dumps(fields)},
    )
    theirs.load_lora_weights(str(tmp_path), weight_name="b.safetensors")
    read = formats.load(tmp_path / "b.safetensors", layout)
    for modules in read.components.values():
        assert {lr.scale for lr in modules.values()} == {0.5}
    apply(mine, read, layout)
    assert disagreement(outputs(mine), outputs(theirs), base) < 1e-5
    formats.save(read, tmp_path / "c.safetensors", layout=layout, metadata=None)
    assert "lora_adapter_metadata" not in header(
        tmp_path / "c.safetensors"
    )  # the scale has moved into lora_B: it must not act twice


def test_kohya_dora_is_lycoris_formula(pipe, layout, tmp_path):
    """The file's numbers through LyCORIS' (wd_on_output) merge, written out.

    It is (W + alpha / r up down) * dora_scale / row norm.
    """
    state = random_state(pipe, dora=True, scale=0.5)
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
    tensors, mine = load_file(tmp_path / "a.safetensors"), pipeline()
    apply(mine, formats.load(tmp_path / "a.safetensors", layout), layout)
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


def test_diffusers_loads_the_token_rows(tmp_path, layout):
    pipe, rows = pipeline(), torch.randn(2, 16, dtype=torch.float64).float()
    words = embeddings.placeholder_header({"TOK": ("<s0>", "<s1>")})
    state = AdapterState(tokens={"clip_l": rows}, token_names=("<s0>", "<s1>"))
    (file,) = formats.save_run(state, tmp_path / "dog", layout=layout, metadata=words)
    assert file.name == "dog_emb.safetensors"
    assert json.loads(header(file)["token_names"]) == ["<s0>", "<s1>"] and json.loads(
        header(file)["placeholders"]
    ) == {"TOK": ["<s0>", "<s1>"]}
    pipe.load_textual_inversion(
        load_file(file)["clip_l"],
        token=["<s0>", "<s1>"],
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
    )
    ids = pipe.tokenizer("<s0><s1>", add_special_tokens=False).input_ids
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], rows)
    read = formats.load(tmp_path / "dog", layout)
    assert (
        torch.equal(read.tokens["clip_l"], rows)
        and read.token_names == ("<s0>", "<s1>")
        and embeddings.placeholder_words(read) == {"TOK": ("<s0>", "<s1>")}
    )


# ---------------------------------------------------------------- a run's folder


def test_a_run_writes_three_files_and_reads_back_as_one(pipe, layout, tmp_path):
    state = random_state(pipe, scale=1.0)
    state.tokens, state.token_names = {"clip_l": torch.randn(3, 16)}, ("<s0>", "<s1>", "<s2>")
    recipe = {"config": "x = 1", **embeddings.placeholder_header({"TOK": state.token_names})}
    written = formats.save_run(state, tmp_path / "my.run", layout=layout, metadata=recipe)
    assert [p.name for p in written] == [NATIVE, "my.run.safetensors", "my.run_emb.safetensors"]
    assert all(
        header(p)["config"] == "x = 1"
        and json.loads(header(p)["token_names"]) == list(state.token_names)
        for p in written
    )
    assert header(written[1])["ss_output_name"] == "my.run"
    read = formats.load(tmp_path / "my.run", layout)
    assert_same(read, state, folded=True)
    assert torch.equal(
        read.tokens["clip_l"], state.tokens["clip_l"]
    ) and embeddings.placeholder_words(read) == {"TOK": state.token_names}
    (tmp_path / "my.run" / ".left.0a1b.tmp_emb.safetensors").write_bytes(b"")  # of a killed writer
    assert formats.load(tmp_path / "my.run", layout).token_names == state.token_names
    embeddings_alone = AdapterState(tokens={"clip_l": torch.randn(1, 16)}, token_names=("<x>",))
    formats.save(embeddings_alone, written[2], format="embeddings")
    with pytest.raises(UserError, match="trained with the tokens <s0>, <s1>, <s2>"):
        formats.load(tmp_path / "my.run", layout)
    formats.save(embeddings_alone, tmp_path / "my.run" / "b_emb.safetensors", format="embeddings")
    with pytest.raises(UserError, match="2 files to choose from"):
        formats.load(tmp_path / "my.run", layout)


def test_t5_rows_are_found_under_both_names_and_must_agree(tmp_path):
    rows = torch.randn(1, 6)
    formats.save(
        AdapterState(tokens={"clip_l": rows, "t5": rows + 1}, token_names=("<x>",)),
        tmp_path / "a.safetensors",
        format="embeddings",
    )
    tensors = load_file(tmp_path / "a.safetensors")
    assert set(tensors) == {"clip_l", "t5", "t5xxl"} and torch.equal(
        formats.load(tmp_path / "a.safetensors").tokens["t5"], rows + 1
    )
    save_file(tensors | {"t5": rows}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="different rows under t5 and t5xxl"):
        formats.load(tmp_path / "b.safetensors")


# ---------------------------------------------------------------- refusals


def good(tmp_path, pipe, layout, format="kohya"):
    formats.save(random_state(pipe), tmp_path / "good.safetensors", format=format, layout=layout)
    return load_file(tmp_path / "good.safetensors")


def bad_tensors(tensors):
    """(fault, tensors, expected sentence)"""
    name = "lora_unet_mid_block_attentions_0_proj_in"
    down, up, alpha = (f"{name}.{leaf}" for leaf in ("lora_down.weight", "lora_up.weight", "alpha"))
    return [
        (
            "leftover",
            tensors | {name + "x.lora_up.weight": tensors[up]},
            f"1 unknown key.s.: {name}x.lora_up.*nearest known: {name}",
        ),
        (
            "leftovers",
            tensors | {f"odd{i}": tensors[up] for i in range(5)},
            "5 key.s. .* odd0, odd1, odd2 and 2 more",
        ),
        (
            "no up",
            {k: t for k, t in tensors.items() if k != up},
            "mid_block.attentions.0.proj_in .* no up",
        ),
        ("no down", {k: t for k, t in tensors.items() if k != down}, "no down"),
        (
            "shape",
            tensors | {down: torch.ones(3, 9, 1, 1)},
            r"mid_block.attentions.0.proj_in .* down \[3, 9, 1, 1\] .* expected \[r, 16, 1, 1\]",
        ),
        ("ranks", tensors | {up: torch.ones(16, 4, 1, 1)}, r"up \[16, 4, 1, 1\]"),
        ("nan", tensors | {up: tensors[up] * float("nan")}, f"{up} .* NaN or Inf"),
        ("inf", tensors | {alpha: torch.tensor(float("inf"))}, f"{alpha} .* NaN or Inf"),
        ("two alphas", tensors | {alpha: torch.ones(2)}, "an alpha of shape"),
        ("quantised", tensors | {up: tensors[up].to(torch.int8)}, "int8, expected floating point"),
        (
            "columns",
            tensors | {f"{name}.dora_scale": torch.ones(1, 16, 1, 1)},
            "is a DoRA by columns; merge.py fold",
        ),
        (
            "no axis",
            tensors | {f"{name}.dora_scale": torch.ones(2, 1)},
            r"DoRA magnitude \[2, 1\], expected one number per output, \[16\]",
        ),
        (
            "twice",
            tensors | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())},
            "two tensors for the alpha",
        ),
        (
            "LoHa",
            tensors | {f"{name}.hada_w1_a": torch.ones(2, 2)},
            "is a LoHa update with a (down|up)",
        ),
    ]


@pytest.mark.parametrize("case", range(14))
def test_bad_tensors_are_refused_by_name(pipe, layout, tmp_path, case):
    _, tensors, expected = bad_tensors(good(tmp_path, pipe, layout))[case]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=expected) as error:
        formats.load(tmp_path / "bad.safetensors", layout)
    assert "bad.safetensors" in str(error.value) and "\n" not in str(error.value)


def twice(data):
    """The file with the name of its first tensor on the second as well."""
    size = struct.unpack("<Q", data[:8])[0]
    names = [name for name in json.loads(data[8 : 8 + size]) if name.endswith("lora_down.weight")]
    header = data[8 : 8 + size].replace(f'"{names[1]}"'.encode(), f'"{names[0]}"'.encode())
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def test_bad_files_are_refused(pipe, layout, tmp_path):
    good(tmp_path, pipe, layout)
    data = (tmp_path / "good.safetensors").read_bytes()
    torch.save({"a": 1, "b": torch.ones(1, 1, 1)}, tmp_path / "none.pt")
    files = {
        "empty.safetensors": (b"", "is empty"),
        "cut.safetensors": (data[:-100], "truncated"),
        "stump.safetensors": (data[:5], "truncated"),
        "text.safetensors": (b"<html>404 not found</html>", "truncated, damaged or no safetensors"),
        "none.pt": (
            (tmp_path / "none.pt").read_bytes(),
            "is a pickle with a int under 'a', expected tensors only; nothing in it was executed",
        ),
        "code.pt": (
            pickle.dumps({"a.lora_A.weight": Path("x")}),
            "is a pickle with an object of pathlib.* under 'a.lora_A.weight'",
        ),
        "void.safetensors": (struct.pack("<Q", 0), "truncated"),
        "twice.safetensors": (twice(data), "has .*lora_down.weight twice in its header"),
        "old.safetensors": (pickle.dumps([1, 2]), "a pickle or damaged"),
    }
    for name, (content, expected) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} .*{expected}"):
            formats.load(tmp_path / name, layout)
    with pytest.raises(UserError, match="does not exist"):
        formats.load(tmp_path / "absent.safetensors", layout)
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"void has no .safetensors file"):
        formats.load(tmp_path / "void", layout)
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="holds no tensors"):
        formats.load(tmp_path / "none.safetensors", layout)
    with pytest.raises(
        UserError, match="kohya's names, which can only be read against a model's layout"
    ):
        formats.load(tmp_path / "good.safetensors")
    other = layout_of(
        {"unet": nn.ModuleDict({"conv": nn.Conv2d(4, 6, 1)}), "text_encoder": pipe.text_encoder}
    )
    with pytest.raises(UserError, match=r"unknown key\(s\): lora_unet_"):
        formats.load(tmp_path / "good.safetensors", other)


@pytest.mark.parametrize(
    "key, what",
    [
        ("base_model.model.to_q.lora_A.weight", "does not say which network"),
        ("diffusion_model.x.lora_A.weight", "ComfyUI"),
        ("lora_controlnet", "control LoRA"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "control LoRA"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("emb_params", "embedding"),
        ("unet.down.attn1.processor.to_q_lora.down.weight", "old attention processors"),
        ("model.diffusion_model.out.2.weight", "checkpoint"),
        ("down_blocks.0.weight", "no adapter file"),
    ],
)
def test_foreign_files_are_refused_by_their_name(tmp_path, key, what):
    save_file({key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=what):
        formats.load(tmp_path / "a.safetensors")


def test_the_real_cloneofsimo_file_is_refused_for_a_model_without_its_numbers(layout):
    if not DISNEY.exists():
        pytest.skip(f"{DISNEY} is not on this machine")
    with pytest.raises(UserError, match="cloneofsimo's index-keyed format"):
        formats.load(DISNEY, layout)


def test_a_broken_or_doubled_strength_in_the_header_is_refused(pipe, layout, tmp_path):
    tensors = good(tmp_path, pipe, layout, "diffusers")
    for value, more, expected in (
        ("{", {}, "broken header"),
        (json.dumps({"unet.r": 0, "unet.lora_alpha": 1}), {}, "broken header"),
        (
            json.dumps({"unet.r": 3, "unet.lora_alpha": 1, "unet.alpha_pattern": {"to_(q": 2}}),
            {},
            "to_.q.* not a regular expression",
        ),
        (
            json.dumps({"unet.r": 3, "unet.lora_alpha": 1, "unet.rank_pattern": {"to_q": "a"}}),
            {},
            "a rank of 'a'",
        ),
        (
            json.dumps({"unet.r": 3, "unet.lora_alpha": 1, "unet.rank_pattern": {"to_q": 2}}),
            {},
            "to_q in .* of rank 3, its settings have r = 2",
        ),
        (
            json.dumps({"unet.r": 3, "unet.lora_alpha": 1, "unet.use_dora": True}),
            {},
            "no magnitude for .* use_dora",
        ),
        ("[1]", {}, "expected a JSON object"),
        (
            json.dumps({"unet.r": 3, "unet.lora_alpha": 1}),
            {"unet.mid_block.attentions.0.proj_in.alpha": torch.ones(())},
            "strength twice",
        ),
    ):
        save_file(tensors | more, tmp_path / "a.safetensors", {"lora_adapter_metadata": value})
        with pytest.raises(UserError, match=expected):
            formats.load(tmp_path / "a.safetensors", layout)


def test_broken_token_files_are_refused(layout, tmp_path):
    rows = torch.randn(2, 16)
    for tensors, meta, expected in (
        ({"clip_l": rows, "clip_x": rows}, {}, "clip_x in addition to its token rows"),
        ({"clip_l": rows[0]}, {}, r"expected token rows \[n, d\]"),
        (
            {"clip_l": rows, "clip_g": rows},
            {},
            "token rows for clip_g; this model's encoders are clip_l",
        ),
        ({"clip_l": rows}, {"token_names": '["<a>"]'}, "2 rows of clip_l for 1 tokens"),
        ({"clip_l": rows}, {"token_names": '["<a>", "<a>"]'}, "different names"),
        ({"clip_l": rows}, {"token_names": "["}, "not JSON"),
    ):
        save_file(tensors, tmp_path / "a.safetensors", meta)
        with pytest.raises(UserError, match=expected):
            formats.load(tmp_path / "a.safetensors", layout)
    save_file({"clip_l": rows}, tmp_path / "a.safetensors")
    assert formats.load(tmp_path / "a.safetensors", layout).token_names == (
        "<s0>",
        "<s1>",
    )  # diffusers' scripts do not write names
    for entry in ('{"TOK": ["<s7>"]}', '{"TOK": []}', "[1]"):
        with pytest.raises(UserError, match="expected words and their tokens"):
            embeddings.placeholder_words(
                AdapterState(token_names=("<s0>",), metadata={"placeholders": entry})
            )


def test_saving_refuses_what_it_cannot_write(pipe, layout, tmp_path):
    state = AdapterState({"unet": {"nowhere": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}})
    with pytest.raises(UserError, match="no Linear or Conv2d named nowhere"):
        formats.save(state, tmp_path / "a.safetensors", layout=layout)
    with pytest.raises(UserError, match="needs a model's layout"):
        formats.save(state, tmp_path / "a.safetensors", format="kohya")
    with pytest.raises(UserError, match="no format koyha; the nearest is kohya"):
        formats.save(state, tmp_path / "a.safetensors", format="koyha")
    with pytest.raises(UserError, match="no token rows"):
        formats.save(state, tmp_path / "a.safetensors", format="embeddings")
    with pytest.raises(UserError, match="no adapted modules"):
        formats.save(AdapterState({"unet": {}}), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
