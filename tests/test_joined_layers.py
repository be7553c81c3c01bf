"""Layers that files store as one: the stack of their parts, split again bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank, scaled_product
from lora_core.errors import UserError
from lora_core.formats import NATIVE
from tests.adapter_checks import assert_same, header
from tests.adapter_examples import dora_file, fused_layout, save_file


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
    assert (meta["ss_network_dim"], meta["ss_network_alpha"]) == ("Dynamic", "Dynamic")


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


def test_a_fused_layer_with_a_dora_by_columns_is_refused(flow_layout, tmp_path):
    name, magnitude = "lora_unet_double_blocks_0_img_attn_qkv", torch.rand(1, 32)
    with pytest.raises(
        UserError,
        match=r"double_blocks.0.img_attn.qkv of transformer .* is a DoRA by columns, "
        "whose parts have other norms",
    ):
        formats.load(dora_file(tmp_path, (96, 32), magnitude, name=name), flow_layout, merging=True)
