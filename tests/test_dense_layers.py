"""LyCORIS' updates in merges: kept in their own form where that is exact, distilled or refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, scaled_product
from merging.adapter_sums import DenseOptions, Term
from merging.commands import KeepOptions, MergeMethod
from merging.dense_layers import settle_update
from merging.mix import merge_terms
from merging.stored_layers import stored_layers
from tests.adapter_checks import header
from tests.adapter_examples import fused_layout
from tests.merge_commands import SQUARE, call

Q, K, V = (SQUARE.replace("to_q", name) for name in ("to_q", "to_k", "to_v"))
M = ("--model", "base")


def lokr(path, *, rank=1, seed=3, dtype=torch.float32):
    """A LoKr of a layer [8, 8] as a file's tensors; without a rank w2 is whole."""
    noise = torch.Generator().manual_seed(seed)
    shapes = {"lokr_w1": (2, 2), "lokr_w2_a": (4, rank), "lokr_w2_b": (rank, 4)}
    if not rank:
        shapes = {"lokr_w1": (2, 2), "lokr_w2": (4, 4)}
    start = f"lora_unet_{path.replace('.', '_')}"
    tensors = {
        f"{start}.{role}": torch.randn(shape, generator=noise).to(dtype)
        for role, shape in shapes.items()
    }
    return tensors | {f"{start}.alpha": torch.tensor(1.0)}


def product(file, layout, path=SQUARE):
    return scaled_product(formats.load(file, layout).updates()["unet"][path]).double()


def test_a_converted_file_has_the_same_bits(here, layout):
    tensors = lokr(Q) | lokr(K, rank=0)
    save_file(tensors, "k.safetensors")
    call("convert", "k.safetensors", "o.safetensors", "--to", "kohya", *M)
    again = load_file("o.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    assert '"algo": "lokr"' in header("o.safetensors")["ss_network_args"]
    assert header("o.safetensors")["ss_network_module"] == "lycoris.kohya"


def test_a_weight_goes_into_alpha_or_into_w1(here, layout, capsys):
    tensors = lokr(Q) | lokr(K, rank=0)
    save_file(tensors, "k.safetensors")
    call("mix", "0.3*k.safetensors", "--out", "o.safetensors", *M)
    assert float(capsys.readouterr().out.splitlines()[1].split()[-1]) < 1e-7  # w1 in fp32
    again = load_file("o.safetensors")
    changed = {key for key in tensors if not torch.equal(again[key], tensors[key])}
    names = {key.rsplit("to_", 1)[1] for key in changed}
    assert names == {"q.alpha", "k.lokr_w1"}
    for path in (Q, K):
        expected = 0.3 * product("k.safetensors", layout, path)
        torch.testing.assert_close(product("o.safetensors", layout, path), expected, rtol=1e-6,
                                   atol=1e-7)  # fmt: skip


@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("dtype", [(), ("--dtype", "fp16")])
def test_the_printed_error_of_rounding_is_true(here, layout, capsys, rank, dtype):
    save_file(lokr(Q, rank=rank, dtype=torch.float32 if dtype else torch.float16), "k.safetensors")
    call("mix", "0.3*k.safetensors", "--out", "o.safetensors", *M, *dtype)
    expected, found = 0.3 * product("k.safetensors", layout), product("o.safetensors", layout)
    printed = float(capsys.readouterr().out.splitlines()[1].split()[-1])
    error = float((found - expected).norm() / expected.norm())
    assert printed == pytest.approx(error, rel=0.01, abs=2e-7)  # fp32 rounds the products here
    assert (error > 1e-5) == bool(dtype or not rank)
    assert {t.dtype for key, t in load_file("o.safetensors").items() if "alpha" not in key} == {
        torch.float16
    }


def test_files_of_other_layers_are_joined_in_their_own_form(here, layout):
    save_file(lokr(Q), "k.safetensors")
    save_file(lokr(K, seed=4), "l.safetensors")
    call("mix", "k.safetensors + 2*l.safetensors + b.safetensors@to_v", "--out", "o.safetensors",
         *M)  # fmt: skip
    found = formats.load("o.safetensors", layout)
    assert found.dense["unet"].keys() == {Q, K} and V in found.components["unet"]
    torch.testing.assert_close(
        product("o.safetensors", layout, K), 2 * product("l.safetensors", layout, K)
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("k.safetensors + l.safetensors",), "is an update of LyCORIS, not a product of two"),
        (("k.safetensors", "--format", "diffusers"), "is an update of LyCORIS, not a product"),
        (("k.safetensors + a.safetensors", "--budget", "500"), "is an update of LyCORIS, not a"),
        (("0.5*k.safetensors + 0.5*l.safetensors", "--method", "ties"), "is an update of LyCORIS"),
        (("0.5*m.safetensors",), "is an update of LyCORIS, not a product of two factors"),
    ],
)
def test_other_sums_are_refused(here, layout, capsys, words, said):
    save_file(lokr(Q), "k.safetensors")
    save_file(lokr(Q, seed=4), "l.safetensors")
    start = f"lora_unet_{Q.replace('.', '_')}"
    arguments = {"ss_network_args": '{"wd_on_output": "True"}'}
    save_file(lokr(Q) | {f"{start}.dora_scale": torch.ones(8, 1)}, "m.safetensors", arguments)
    call("mix", words[0], "--out", "x.safetensors", *words[1:], *M, status=2)
    assert said in capsys.readouterr().err and not Path("x.safetensors").exists()


def test_as_lora_prints_the_error_that_the_lora_has(here, layout, capsys):
    save_file(lokr(Q, rank=0), "k.safetensors")
    call("convert", "k.safetensors", "o.safetensors", "--as", "lora", "--rank", "3", *M)
    expected, found = product("k.safetensors", layout), product("o.safetensors", layout)
    error = float((found - expected).norm() / expected.norm())
    assert float(capsys.readouterr().out.splitlines()[1].split()[-1]) == pytest.approx(error, 0.01)
    sigma = torch.linalg.svdvals(expected)
    assert error == pytest.approx(float(sigma[3:].norm() / sigma.norm()), rel=1e-3)


def test_tensors_that_overflow_are_refused(here, capsys):
    save_file({key: tensor * 1e5 for key, tensor in lokr(Q).items()}, "k.safetensors")
    call("mix", "k.safetensors", "--dtype", "fp16", "--out", "x.safetensors", *M, status=2)
    assert "its tensors overflow torch.float16; choose --dtype bf16" in capsys.readouterr().err


# ---------------------------------------------------------------- layers that files join


def joined_file(path):
    """A LoKr of the joined layer [16, 6] and one of the layer with swapped halves, [8, 6]."""
    noise = torch.Generator().manual_seed(3)
    tensors = {
        "lora_unet_one_qkm.lokr_w1": torch.randn(4, 2, generator=noise),
        "lora_unet_one_qkm.lokr_w2": torch.randn(4, 3, generator=noise),
        "lora_unet_one_qkm.alpha": torch.tensor(1.0),
        "lora_unet_n.lokr_w1": torch.randn(2, 2, generator=noise),
        "lora_unet_n.lokr_w2": torch.randn(4, 3, generator=noise),
        "lora_unet_n.alpha": torch.tensor(1.0),
    }
    save_file(tensors, path)
    return tensors


def test_parts_of_a_joined_layer_are_that_layer_again(tmp_path):
    layout, tensors = fused_layout(), joined_file(tmp_path / "a.safetensors")
    state = formats.load(tmp_path / "a.safetensors", layout, merging=True)
    formats.save(state, tmp_path / "b.safetensors", format="kohya", layout=layout)
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    merged = merge_terms(
        [Term(AdapterState(state.updates()), 0.5)], KeepOptions(), MergeMethod(), torch.float16,
        DenseOptions(), stored_layers("kohya", layout),
    )  # fmt: skip
    formats.save(merged.state, tmp_path / "c.safetensors", format="kohya", layout=layout)
    half = load_file(tmp_path / "c.safetensors")
    for key, tensor in tensors.items():
        factor = 0.5 if key.endswith("w1") else 1.0
        assert torch.equal(half[key], (factor * tensor).to(half[key].dtype))
        assert half[key].dtype == (torch.float32 if "alpha" in key else torch.float16)


def test_one_part_of_a_joined_layer_has_no_form_of_its_own(tmp_path):
    layout = fused_layout()
    joined_file(tmp_path / "a.safetensors")
    state = formats.load(tmp_path / "a.safetensors", layout, merging=True)
    state.dense["transformer"] = {"q": state.dense["transformer"]["q"]}
    with pytest.raises(ValueError, match="q is a part of a LoKr update of a larger layer"):
        formats.save(state, tmp_path / "b.safetensors", format="kohya", layout=layout)
    with pytest.raises(ValueError, match=r"transformer.q is an update of LyCORIS"):
        merge_terms(
            [Term(AdapterState(state.updates()))], KeepOptions(), MergeMethod(), None,
            DenseOptions(), stored_layers("kohya", layout),
        )  # fmt: skip


def test_a_trained_part_is_stored_under_lycoris_names(tmp_path):
    layout = fused_layout()
    tensors = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(2, 3)}
    state = AdapterState(dense={"transformer": {"q": DenseUpdate("LoKr", (4, 6), tensors)}})
    formats.save(state, tmp_path / "a.safetensors", format="kohya", layout=layout)
    stored = load_file(tmp_path / "a.safetensors")
    assert stored.keys() == {f"lycoris_q.{name}" for name in (*tensors, "alpha")}
    again = formats.load(tmp_path / "a.safetensors", layout).dense["transformer"]["q"]
    assert all(torch.equal(again.tensors[role], own) for role, own in tensors.items())
    swapped = AdapterState(dense={"transformer": {"n": DenseUpdate("LoKr", (8, 6), tensors)}})
    with pytest.raises(ValueError, match="n is a LoKr update, but files store this layer with its"):
        formats.save(swapped, tmp_path / "b.safetensors", format="kohya", layout=layout)


def test_a_full_update_is_scaled_in_its_tensor():
    update = DenseUpdate("full", (2, 3), {"diff": torch.ones(2, 3).half()}, 0.1)
    settled, report = settle_update(("unet", "a"), update, None)
    assert settled.scale == 1 and settled.tensors["diff"].dtype == torch.float16
    error = float((settled.build().double() - 0.1).norm())
    assert report.lost == pytest.approx(error, rel=1e-4) and report.norm == pytest.approx(
        0.1 * 6**0.5
    )
    assert settle_update(("unet", "a"), update.scaled(10), torch.float32)[1].lost < 1e-7
