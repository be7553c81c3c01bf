"""merge.py mix: sums are sums of updates, methods, ranks and DoRAs."""

import re

import pytest
import torch
from safetensors.torch import save_file

from lora_core import formats
from lora_core.adapters.weight_updates import delta_weight, scaled_product
from lora_core.formats.model_folders import open_model_folder
from merging.adapter_sums import Term, collect_layers, layers_by_key, mix_layers_dense
from merging.factor_sums import cosine_similarity
from merging.ties_dare import ties
from merging.truncation import Keep
from tests.merge_commands import SQUARE, assert_equal, call, deltas, summed


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_mix_is_the_sum_of_the_updates(here, states, layout, format):
    call(
        "mix",
        "0.7*a.safetensors + 0.3*b.safetensors - 1.5*c.safetensors",
        "--out",
        "m.safetensors",
        "--model",
        "base",
        "--format",
        format,
    )
    assert_equal(
        deltas(formats.load("m.safetensors", layout)),
        summed([(0.7, states["a"]), (0.3, states["b"]), (-1.5, states["c"])]),
    )


def test_layers_after_the_at_count_alone(here, states, layout, capsys):
    a, b = states["a"], states["b"]
    call(
        "mix",
        "2*(a.safetensors@attn - 'b.safetensors'@unet)@~conv + a.safetensors@to_q=0.5",
        "--out",
        "m.safetensors",
        "--model",
        "base",
    )
    found = deltas(formats.load("m.safetensors", layout))
    ours, theirs = deltas(a), deltas(b)
    assert_equal(
        {("unet", SQUARE): found["unet", SQUARE]},
        {("unet", SQUARE): 2.5 * ours["unet", SQUARE] - 2 * theirs["unet", SQUARE]},
    )
    feed_forward = "unet", SQUARE.replace("attn1.to_q", "ff.net.2")
    assert_equal({feed_forward: found[feed_forward]}, {feed_forward: -2 * theirs[feed_forward]})
    assert not any(path.endswith("conv1") for _, path in found)
    assert re.search(r"unet +\d+ +\d+ +\d+ +100\.0000 % +0\.00e\+00", capsys.readouterr().out)


@pytest.mark.parametrize(
    "flag",
    [
        ("--rank", "2"),
        ("--max-error", "0.3"),
        ("--energy", "0.9"),
        ("--budget", "60"),
        ("--budget", "9kb"),
    ],
)
def test_what_is_kept_is_what_was_asked_for(here, states, layout, flag, capsys):
    call("mix", "a.safetensors + b.safetensors", "--out", "m.safetensors", "--model", "base", *flag)
    said = capsys.readouterr().out
    state, exact = (
        formats.load("m.safetensors", layout),
        summed([(1, states["a"]), (1, states["b"])]),
    )
    found = deltas(state)
    errors = {
        key: float((value - found.get(key, 0)).norm() / value.norm())
        for key, value in exact.items()
    }
    total = sum(float((value - found.get(key, 0)).square().sum()) for key, value in exact.items())
    printed = float(re.search(r"total .* (\S+)\n", said)[1])
    assert printed == pytest.approx(
        (total / sum(float(v.square().sum()) for v in exact.values())) ** 0.5, rel=5e-3
    )
    layers = layers_by_key(state).values()
    ranks = [lr.rank for lr in layers]
    if flag[0] == "--rank":
        assert max(ranks) == 2
        for key, value in exact.items():  # Eckart and Young
            best = torch.linalg.svdvals(value.flatten(1))[2:].norm() / value.norm()
            assert errors[key] == pytest.approx(float(best), rel=1e-3, abs=1e-6)
    elif flag[0] == "--budget":
        size = sum(lr.down.numel() + lr.up.numel() for lr in layers)
        assert sum(ranks) == 60 if flag[1] == "60" else 2000 < size <= 2250
    else:
        assert (
            max(errors.values()) <= (0.3 if flag[0] == "--max-error" else 0.1**0.5) + 1e-6
            and len(set(ranks)) > 1
        )


def test_methods_beside_the_sum(here, states, layout, capsys):
    a, c = states["a"], states["c"]
    words = ("mix", "0.75*a.safetensors + 0.25*c.safetensors", "--model", "base")
    call(
        *words,
        "--out",
        "t.safetensors",
        "--method",
        "ties",
        "--rank",
        "4",
        "--density",
        "0.3",
        "--svd",
        "exact",
        "--format",
        "diffusers",
    )
    expected, _ = collect_layers(
        mix_layers_dense([Term(a, 0.75), Term(c, 0.25)], ties, Keep(rank=4), density=0.3, seed=0)
    )
    assert_equal(deltas(formats.load("t.safetensors", layout)), deltas(expected), 1e-4)
    for method in ("dare", "dare_ties", "magnitude"):
        call(*words, "--out", f"{method}.safetensors", "--method", method, "--energy", "0.9")
    call(*words, "--out", "s.safetensors", "--method", "slerp")
    between = formats.load("s.safetensors", layout)
    for name, path in deltas(c):
        lr = between.components[name][path]
        assert cosine_similarity(lr, a.components[name][path]) > cosine_similarity(
            a.components[name][path], c.components[name][path]
        )
    capsys.readouterr()
    call(
        "mix",
        "a.safetensors + c.safetensors",
        "--model",
        "base",
        "--out",
        "x.safetensors",
        "--method",
        "slerp",
        status=2,
    )
    call(*words, "--out", "x.safetensors", "--method", "ties", status=2)
    assert re.search(r"(?s)add up to 1.*choose how much", capsys.readouterr().err)


def test_a_dora_needs_its_model(here, states, layout, capsys):
    call("mix", "d.safetensors + a.safetensors", "--out", "m.safetensors", "--rank", "8", status=2)
    assert "name it with --model" in capsys.readouterr().err
    call(
        "mix",
        "0.5*d.safetensors + a.safetensors",
        "--out",
        "m.safetensors",
        "--rank",
        "8",
        "--model",
        "base",
        "--svd",
        "exact",
    )
    base, key = open_model_folder("base")["unet"].read(f"{SQUARE}.weight"), ("unet", SQUARE)
    exact = 0.5 * delta_weight(states["d"].components["unet"][SQUARE], base) + scaled_product(
        states["a"].components["unet"][SQUARE]
    )
    assert_equal(
        {key: deltas(formats.load("m.safetensors", layout))[key]}, {key: exact.double()}, 1e-5
    )
    call("mix", "d.safetensors", "--out", "same.safetensors", "--model", "base")
    assert torch.equal(
        formats.load("same.safetensors", layout).components["unet"][SQUARE].magnitude,
        states["d"].components["unet"][SQUARE].magnitude,
    )


def test_lycoris_updates_are_cut_or_folded(here, layout, capsys):
    noise = torch.Generator().manual_seed(3)
    name = f"lora_unet_{SQUARE.replace('.', '_')}"
    parts = {}
    for i in "12":
        parts[f"{name}.hada_w{i}_a"] = torch.randn(8, 2, generator=noise)
        parts[f"{name}.hada_w{i}_b"] = torch.randn(2, 8, generator=noise)
    save_file(parts | {f"{name}.alpha": torch.tensor(2.0)}, "hada.safetensors")
    exact = (parts[f"{name}.hada_w1_a"] @ parts[f"{name}.hada_w1_b"]) * (
        parts[f"{name}.hada_w2_a"] @ parts[f"{name}.hada_w2_b"]
    )
    words = ("--out", "o.safetensors", "--model", "base", "--format", "diffusers")
    call("mix", "0.5*hada.safetensors", *words, status=2)
    assert "not a product of two factors" in capsys.readouterr().err
    call(
        "mix",
        "0.5*hada.safetensors + a.safetensors@to_k",
        "--out",
        "o.safetensors",
        "--model",
        "base",
        "--rank",
        "4",
        "--format",
        "diffusers",
    )
    found = formats.load("o.safetensors", layout).components["unet"][SQUARE]
    assert_equal({"x": scaled_product(found).double()}, {"x": 0.5 * exact.double()}, 1e-5)
    call("info", "hada.safetensors", "--model", "base")
    call("fold", "base", "hada.safetensors", "m")
    torch.testing.assert_close(
        open_model_folder("m")["unet"].read(f"{SQUARE}.weight"),
        open_model_folder("base")["unet"].read(f"{SQUARE}.weight") + exact,
    )


@pytest.mark.parametrize(
    ("text", "unet", "encoder"),
    [
        ("<lora:a:0.7> <lora:b:0.3>", (0.7, 0.3), (0.7, 0.3)),
        ("<lora:a:0.5:2> + <lora:b:te=0>", (2, 0), (0.5, 0)),
        ("<lora:b:0.3:te=0.25>, <lora:a:2:unet=1>", (1, 0.25), (2, 0.25)),
    ],
)
def test_tags_of_prompts_are_summed(here, states, layout, text, unet, encoder):
    call("mix", text, "--out", "m.safetensors", "--model", "base")
    found = deltas(formats.load("m.safetensors", layout))
    whole = {}
    for place, name in enumerate("ab"):
        for (component, path), value in deltas(states[name]).items():
            weight = (encoder if component == "text_encoder" else unet)[place]
            if weight:
                whole[component, path] = whole.get((component, path), 0) + weight * value
    assert_equal(found, whole)
    call("redo", "m.safetensors")
