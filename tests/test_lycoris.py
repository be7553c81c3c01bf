"""LyCORIS: the updates written out entry by entry, refusals, and uses of other updates."""

import itertools

import pytest
import torch
from safetensors.torch import save_file as save_distinct
from torch import nn

from lora_core import formats
from lora_core.adapters.weight_updates import (
    AdapterState,
    DenseUpdate,
    delta_weight,
    scaled_product,
)
from lora_core.errors import UserError
from lora_core.formats import layout_of
from tests.adapter_examples import fused_layout

LAYERS = {"a": nn.Linear(12, 8), "c": nn.Conv2d(6, 4, (3, 2)), "o": nn.Conv2d(6, 4, 1)}
R = 3


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers in every order of tests: how sums in fp32 round depends on them."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def layout():
    return layout_of({"unet": nn.ModuleDict(LAYERS)})


def save(tensors, path):
    save_distinct({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
    return path


def read(parts, layout, tmp_path, *, module="a", **options):
    file = save(
        {f"lora_unet_{module}.{leaf}": tensor for leaf, tensor in parts.items()},
        tmp_path / "a.safetensors",
    )
    return formats.load(file, layout, merging=True, **options)


def loha(shape, tucker):
    out, inner, *kernel = shape
    flat = inner * torch.Size(kernel).numel()
    parts = {}
    for i in "12":
        a, b = (
            (torch.randn(R, out), torch.randn(R, inner))
            if tucker
            else (torch.randn(out, R), torch.randn(R, flat))
        )
        parts |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b} | (
            {f"hada_t{i}": torch.randn(R, R, *kernel)} if tucker else {}
        )
    return parts


def entry(parts, i, o, n, *k):
    """One entry of one of LoHa's two brackets, in float64."""
    a, b, t = (parts.get(key) for key in (f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}"))
    if t is None:
        return sum(a[o, r].item() * b[r, n].item() for r in range(R))
    total = 0.0
    for r, s in itertools.product(range(R), range(R)):
        total += t[(r, s, *k)].item() * a[r, o].item() * b[s, n].item()
    return total


@pytest.mark.parametrize(
    "module, tucker", [("a", False), ("c", False), ("c", True), ("o", False), ("o", True)]
)
@pytest.mark.parametrize(
    "alpha, scale", [(None, 1.0), (torch.tensor(6), 2.0), (torch.tensor(1.5), 0.5)]
)
def test_a_loha_is_the_product_by_entries(layout, tmp_path, module, tucker, alpha, scale):
    shape = LAYERS[module].weight.shape
    parts = loha(shape, tucker) | ({} if alpha is None else {"alpha": alpha})
    update = read(parts, layout, tmp_path, module=module).dense["unet"][module]
    assert update.kind == "LoHa" and update.shape == tuple(shape)
    flat = shape if tucker else (shape[0], shape[1:].numel())
    expected = torch.zeros(flat, dtype=torch.float64)
    for at in itertools.product(*map(range, flat)):
        expected[at] = scale * entry(parts, 1, *at) * entry(parts, 2, *at)
    torch.testing.assert_close(
        scaled_product(update).double(), expected.reshape(shape), rtol=1e-5, atol=1e-6
    )


LOKR = {  # module, shapes of the tensors, rank that divides alpha
    "whole": ("a", {"w1": (2, 3), "w2": (4, 4)}, None),
    "first split": ("a", {"w1_a": (2, R), "w1_b": (R, 3), "w2": (4, 4)}, R),
    "second split": ("a", {"w1": (2, 3), "w2_a": (4, 2), "w2_b": (2, 4)}, 2),
    "both split": ("a", {"w1_a": (2, R), "w1_b": (R, 3), "w2_a": (4, 2), "w2_b": (2, 4)}, 2),
    "convolution, whole": ("c", {"w1": (2, 2), "w2": (2, 3, 3, 2)}, None),
    "convolution, flat": ("c", {"w1": (2, 2), "w2_a": (2, R), "w2_b": (R, 18)}, R),
    "convolution, deep": ("c", {"w1": (2, 2), "w2_a": (2, R), "w2_b": (R, 3, 3, 2)}, R),
    "convolution, core": (
        "c",
        {"w1": (2, 2), "w2_a": (R, 2), "w2_b": (R, 3), "t2": (R, R, 3, 2)},
        R,
    ),
    "1x1 convolution": ("o", {"w1": (2, 2), "w2_a": (2, R), "w2_b": (R, 3)}, R),
}


@pytest.mark.parametrize("case", LOKR)
def test_a_lokr_is_the_kronecker_product(layout, tmp_path, case):
    module, shapes, rank = LOKR[case]
    parts = {f"lokr_{name}": torch.randn(shape) for name, shape in shapes.items()}
    update = read(parts | {"alpha": torch.tensor(5.0)}, layout, tmp_path, module=module).dense[
        "unet"
    ][module]
    out, inner, *kernel = LAYERS[module].weight.shape
    w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_t2" in parts:
        w2 = torch.einsum(
            "xyhw,xo,yi->oihw", parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"]
        )
    else:
        w2 = (
            parts["lokr_w2"]
            if "lokr_w2" in parts
            else parts["lokr_w2_a"] @ parts["lokr_w2_b"].flatten(1)
        )
    w2 = w2.reshape(out // w1.shape[0], inner // w1.shape[1], *kernel)
    expected = torch.zeros(out, inner, *kernel)
    for o, i in itertools.product(range(out), range(inner)):
        expected[o, i] = (
            w1[o // w2.shape[0], i // w2.shape[1]] * w2[o % w2.shape[0], i % w2.shape[1]]
        )
    torch.testing.assert_close(
        scaled_product(update), expected * (5 / rank if rank else 1), rtol=1e-5, atol=1e-5
    )


def test_a_full_update_has_no_scale_and_a_scalar_multiplies_all(layout, tmp_path):
    diff = torch.randn(4, 6, 3, 2)
    update = read(
        {"diff": diff.half(), "alpha": torch.tensor(9.0)}, layout, tmp_path, module="c"
    ).dense["unet"]["c"]
    assert update.kind == "full" and torch.equal(scaled_product(update), diff.half().float())
    parts = loha((8, 12), False)
    once, twice = (
        scaled_product(read(parts | more, layout, tmp_path).dense["unet"]["a"])
        for more in ({}, {"scalar": torch.tensor(2.0)})
    )
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("alpha", [{}, {"alpha": torch.tensor(6.0)}])
@pytest.mark.parametrize("kind", ["linear", "core", "dora"])
def test_a_scalar_multiplies_a_lora_too(layout, tmp_path, kind, alpha):
    module, inner = ("c", (6, 1, 1)) if kind == "core" else ("a", (12,))
    out = 4 if kind == "core" else 8
    parts = {
        "lora_down.weight": torch.randn(R, *inner),
        "lora_up.weight": torch.randn(out, R, *[1] * (len(inner) - 1)),
    } | alpha
    if kind == "core":
        parts["lora_mid.weight"] = torch.randn(R, R, 3, 2)
    if kind == "dora":
        parts["dora_scale"] = torch.rand(out, 1)
    once, third = (
        read(parts | more, layout, tmp_path, module=module).components["unet"][module]
        for more in ({}, {"scalar": torch.tensor(0.3)})
    )
    torch.testing.assert_close(scaled_product(third), 0.3 * scaled_product(once))
    if kind != "dora":
        return
    weight = torch.randn(out, 12).double()
    tuned = weight + 0.3 * scaled_product(once).double()
    wanted = tuned * parts["dora_scale"] / tuned.norm(dim=1, keepdim=True) - weight
    torch.testing.assert_close(delta_weight(third, weight), wanted, rtol=1e-5, atol=1e-6)


def test_a_locon_with_a_core_is_a_lora(layout, tmp_path):
    parts = {
        "lora_down.weight": torch.randn(R, 6, 1, 1),
        "lora_mid.weight": torch.randn(R, R, 3, 2),
        "lora_up.weight": torch.randn(4, R, 1, 1),
    }
    state = read(parts | {"alpha": torch.tensor(6.0)}, layout, tmp_path, module="c")
    lr = state.components["unet"]["c"]
    down, mid, up = (
        tensor.squeeze() if tensor.shape[2:].numel() == 1 else tensor for tensor in parts.values()
    )
    expected = 2 * torch.einsum("mnhw,om,ni->oihw", mid, up, down)
    assert not state.dense and lr.down.shape == (R, 6, 3, 2)
    torch.testing.assert_close(scaled_product(lr), expected, rtol=1e-5, atol=1e-5)
    assert (
        formats.load(tmp_path / "a.safetensors", layout).components["unet"]["c"].rank == R
    )  # needs no merging
    with pytest.raises(UserError, match=r"expected \[r, in, 1, 1\] and \[r, r, kh, kw\]"):
        read(parts | {"lora_mid.weight": torch.randn(2, 2, 3, 2)}, layout, tmp_path, module="c")


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("module", ["a", "c"])
def test_a_magnitude_goes_over_any_of_them(layout, tmp_path, module, axis):
    weight = LAYERS[module].weight.detach()
    keep = 0 if axis == "rows" else 1
    shape = [n if d == keep else 1 for d, n in enumerate(weight.shape)]
    magnitude = torch.rand(shape) + 0.5
    update = read(
        loha(weight.shape, False) | {"dora_scale": magnitude}, layout, tmp_path, module=module
    ).dense["unet"][module]
    merged = weight + scaled_product(update)
    norm = merged.square().sum([d for d in range(weight.ndim) if d != keep], keepdim=True).sqrt()
    torch.testing.assert_close(
        weight + delta_weight(update, weight), merged * magnitude / norm, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="depends on the base weight"):
        delta_weight(update)


def test_a_fused_layer_gives_each_part_its_rows_and_a_turned_one_its_halves(tmp_path):
    layout = fused_layout()
    parts, turned = loha((16, 6), False), loha((8, 6), False)
    file = save(
        {f"lora_unet_one_qkm.{k}": t for k, t in parts.items()}
        | {f"lora_unet_n.{k}": t for k, t in turned.items()},
        tmp_path / "a.safetensors",
    )
    found = formats.load(file, layout, merging=True).dense["transformer"]
    brackets = [
        (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
        for p in (parts, turned)
    ]
    assert [found[path].shape for path in "qkm"] == [(4, 6), (4, 6), (8, 6)]
    torch.testing.assert_close(
        torch.cat([scaled_product(found[path]) for path in "qkm"]), brackets[0]
    )
    torch.testing.assert_close(scaled_product(found["n"]), torch.cat(brackets[1].chunk(2)[::-1]))
    rows = torch.rand(16, 1)
    file = save(
        {f"lora_unet_one_qkm.{k}": t for k, t in (parts | {"dora_scale": rows}).items()},
        tmp_path / "b.safetensors",
    )
    found = formats.load(file, layout, merging=True).dense["transformer"]
    assert torch.equal(torch.cat([found[path].magnitude for path in "qkm"]), rows.flatten())


@pytest.mark.parametrize(
    "parts, expected",
    [
        ({"hada_w1_a": (8, R)}, "LoHa update without its hada_w1_b; the file is incomplete"),
        (
            {"hada_w1_a": (8, R), "hada_w1_b": (R, 12), "hada_w2_a": (8, R), "hada_w2_b": (R, 11)},
            r"hada_w2_b .3, 11., which do not make up",
        ),
        (
            {"hada_w1_a": (12, R), "hada_w1_b": (R, 8), "hada_w2_a": (12, R), "hada_w2_b": (R, 8)},
            r"do not make up its weight \[8, 12\]",
        ),
        (
            {"hada_w1_a": (8, 0), "hada_w1_b": (0, 12), "hada_w2_a": (8, R), "hada_w2_b": (R, 12)},
            "a rank above 0",
        ),
        ({"lokr_w1": (2, 3)}, "LoKr update without its lokr_w2_a"),
        ({"lokr_w1": (2, 3), "lokr_w2": (4, 5)}, "do not make up"),
        ({"lokr_w1": (2,), "lokr_w2": (4, 4)}, "do not make up"),
        ({"diff": (12, 8)}, "do not make up"),
        ({"diff": (), "alpha": (1,)}, "do not make up"),
        ({"diff": (8, 12), "lokr_w1": (2, 3)}, "is a LoKr update with a diff"),
        ({"diff": (8, 12), "scalar": (2,)}, r"a scalar of shape \[2\]"),
        (
            {"lokr_w1_a": (2, 3), "lokr_w1_b": (3, 3), "lokr_w2": (4, 4), "alpha": (2,)},
            r"an alpha of shape \[2\]",
        ),
        ({"diff": (8, 12), "diff_b": (7,)}, r"a change \[7\] of a.bias, expected \[8\]"),
    ],
)
def test_what_does_not_make_up_a_weight_is_refused(layout, tmp_path, parts, expected):
    with pytest.raises(UserError, match=expected) as error:
        read({name: torch.randn(shape) for name, shape in parts.items()}, layout, tmp_path)
    assert "a.safetensors" in str(error.value) and "\n" not in str(error.value)


ADVICE = (
    r"merge\.py convert --as lora --model BASE makes a LoRA of it, "
    r"merge\.py fold puts it into a model"
)


def test_what_no_run_trains_can_be_merged_and_nothing_else(layout, tmp_path):
    parts = loha((8, 12), False)
    for untrained, what in (
        ({"diff": torch.ones(8, 12)}, "full update"),
        (parts | {"dora_scale": torch.ones(8, 1)}, "LoHa update with a DoRA's magnitude"),
    ):
        read(untrained, layout, tmp_path)
        said = f"updates that no run trains: unet.a is a {what}, not a product of two factors"
        with pytest.raises(UserError, match=f"{said}; {ADVICE}"):
            formats.load(tmp_path / "a.safetensors", layout)
    read(parts, layout, tmp_path)
    state = formats.load(tmp_path / "a.safetensors", layout)
    assert not state.components and state.updates()["unet"]["a"].kind == "LoHa"


def test_it_is_written_under_kohyas_names_only(layout, tmp_path):
    state = read(loha((8, 12), False), layout, tmp_path)
    said = (
        "in the format diffusers, cannot be written: unet.a is a LoHa update, not a product of two "
        f"factors; the format kohya holds it under LyCORIS' names, {ADVICE}"
    )
    with pytest.raises(UserError, match=said):
        formats.save(state, tmp_path / "b.safetensors", format="diffusers", layout=layout)
    file = save(
        {f"unet.a.{leaf}": tensor for leaf, tensor in loha((8, 12), False).items()},
        tmp_path / "c.safetensors",
    )
    assert formats.load(file, layout, merging=True).dense["unet"]["a"].kind == "LoHa"
    with pytest.raises(UserError, match="known from a model's layout only; name the model"):
        formats.load(file, merging=True)


def test_a_magnitude_by_columns_has_no_rows():
    update = DenseUpdate("full", (4, 3), {"diff": torch.ones(4, 3)}, magnitude=torch.ones(1, 3))
    with pytest.raises(ValueError, match="other norms"):
        update.rows(0, 2)
    assert update.rolled(1).magnitude is update.magnitude and AdapterState().dense == {}
