"""merge.py add and lora_add: cloneofsimo's modes, formulas and flags."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_core import formats
from lora_core.adapters.weight_updates import scaled_product
from lora_core.formats.factor_lists import write_factor_lists
from lora_core.formats.model_folders import open_model_folder
from tests.merge_commands import SQUARE, assert_equal, call, deltas, summed
from tests.tiny_pipeline import pipeline, random_state


@pytest.mark.parametrize(("alpha", "times"), [(1.0, 4.0), (0.5, 1.0)])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_lpl_of_a_file_with_itself(here, states, layout, alpha, times, suffix, capsys):
    if suffix == "pt":
        plain = replace(states["c"], tokens={}, token_names=())
        write_factor_lists(plain, "c.pt", layout)
        exact = summed([(times, plain)])
    else:
        exact = summed([(times, states["c"])])
    words = (
        f"c.{suffix}",
        f"c.{suffix}",
        f"o.{suffix}",
        *((str(alpha), str(alpha)) if alpha != 0.5 else ()),
    )
    call(*words, *(("--with_text_lora",) if suffix == "pt" else ("--model", "base")), lora_add=True)
    said = capsys.readouterr()
    assert "warning: lpl adds factors" in said.err and "mix" in said.err
    if suffix == "safetensors":
        assert f"lpl gives {times:g} times; the sum would be {2 * alpha:g} times" in said.err
    assert_equal(deltas(formats.load(f"o.{suffix}", layout)), exact, 1e-5)


def test_lpl_is_the_seeds_formula(here, states, layout):
    """As cloneofsimo's tool does on the tensors of its files."""
    other = random_state(
        pipeline(),
        rank=3,
        seed=7,
        unet=("*attn?.to_*", "*ff.net.0.proj"),
        text=("*self_attn*proj",),
    )
    formats.save(other, "e.safetensors", format="cloneofsimo", layout=layout)
    call(
        "c.safetensors",
        "e.safetensors",
        "o.safetensors",
        "2.0",
        "0.7",
        "--model",
        "base",
        lora_add=True,
    )
    first, second, ours = (load_file(f"{name}.safetensors") for name in "ceo")
    for key in second:
        torch.testing.assert_close(ours[key], 2.0 * first[key] + 0.7 * second[key])
    assert torch.equal(ours["<s1>"], first["<s1>"])


def test_lpl_of_unlike_files_is_refused(here, states, layout, capsys):
    call(
        "a.safetensors",
        "b.safetensors",
        "o.safetensors",
        "--model",
        "base",
        lora_add=True,
        status=2,
    )
    call(
        "a.safetensors",
        "c.safetensors",
        "o.safetensors",
        "--model",
        "base",
        lora_add=True,
        status=2,
    )
    for name, rank in (("p", 2), ("q", 3)):
        write_factor_lists(
            random_state(pipeline(), rank=rank, unet=("*attn?.to_*", "*ff.net.0.proj"), text=()),
            f"{name}.pt",
            layout,
        )
    call("p.pt", "q.pt", "o.pt", lora_add=True, status=2)
    torch.save(torch.load("p.pt")[:-2], "short.pt")
    call("p.pt", "short.pt", "o.pt", lora_add=True, status=2)
    sentences = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(sentences) == 4 and all("mix" in line for line in sentences)
    assert not Path("o.safetensors").exists() and not Path("o.pt").exists()


def test_ljl_joins_exactly(here, states, layout, capsys):
    call(
        "--mode=ljl",
        "c.safetensors",
        "run",
        "o.safetensors",
        "--model",
        "base",
        "--format",
        "diffusers",
        lora_add=True,
    )
    assert_equal(
        deltas(formats.load("o.safetensors", layout)), summed([(1, states["a"]), (1, states["c"])])
    )
    assert formats.load("o_emb.safetensors", layout).token_names == (
        "<s0-0>",
        "<s0-1>",
        "<s1-0>",
        "<s1-1>",
    )
    call("c.safetensors", "run", "p.safetensors", "0.5", "--mode", "ljl", lora_add=True, status=2)
    assert "takes no alphas" in capsys.readouterr().err


def test_upl_ckpt_writes_a_checkpoint_and_an_embedding(here, states, capsys):
    call(
        "base", "c.safetensors", "./krk.ckpt", "--alpha", "0.7", "--mode=upl-ckpt-v2", lora_add=True
    )
    state = torch.load("krk.ckpt")["state_dict"]
    key = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    expected = open_model_folder("base")["unet"].read(f"{SQUARE}.weight") + 0.7 * scaled_product(
        states["c"].components["unet"][SQUARE]
    )
    assert torch.equal(state[f"model.diffusion_model.{key}"], expected.half())
    rows = torch.load("krk.pt")
    assert (
        torch.equal(rows["string_to_param"]["*"], states["c"].tokens["clip_l"])
        and rows["string_to_token"] == {"*": 265}
        and rows["name"] == "krk"
    )
    assert "<s1>" not in capsys.readouterr().err
    call("base", "c.safetensors", "krk.safetensors", "--mode=upl-ckpt-v2", lora_add=True, status=2)
    assert "should end in .ckpt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        (
            "--path_1=c.safetensors",
            "--path_2",
            "c.safetensors",
            "--output_path",
            "o.safetensors",
            "--alpha_1",
            "0.5",
            "--alpha_2=0.5",
        ),
        (
            "c.safetensors",
            "c.safetensors",
            "--output-path=o.safetensors",
            "0.5",
            "--alpha-2",
            "0.5",
        ),
        (
            "--alpha",
            "0.5",
            "c.safetensors",
            "--with_text_lora=True",
            "c.safetensors",
            "--mode",
            "lpl",
            "o.safetensors",
        ),
        ("c.safetensors", "c.safetensors", "o.safetensors", "--with_text_lora", "0.5", "0.5"),
    ],
)
def test_flags_of_python_fire_are_understood(here, states, layout, words):
    call(*words, "--model", "base", lora_add=True)
    assert_equal(deltas(formats.load("o.safetensors", layout)), deltas(states["c"]), 1e-5)


def save_numbered(layout, name, seed, **changes):
    """A file for the layers of c.safetensors, of other random factors."""
    state = random_state(
        pipeline(),
        rank=3,
        seed=seed,
        unet=("*attn?.to_*", "*ff.net.0.proj"),
        text=("*self_attn*proj",),
        **changes,
    )
    formats.save(state, name, format="cloneofsimo", layout=layout)
    return state


def test_files_of_one_update_are_told_from_unrelated_ones(here, states, layout, capsys):
    """By the cosine of the updates: factors of the same product may differ."""
    e = save_numbered(layout, "e.safetensors", 7)
    modules = {}
    for component, own in e.components.items():
        modules[component] = {}
        for path, lr in own.items():
            turn = torch.linalg.qr(torch.randn(lr.rank, lr.rank)).Q
            down = torch.einsum("ij,j...->i...", turn.T, lr.down)
            up = torch.einsum("oi...,ij->oj...", lr.up, turn)
            modules[component][path] = lr._replace(up=up, down=down)
    formats.save(replace(e, components=modules), "t.safetensors", format="cloneofsimo",
                 layout=layout)  # fmt: skip
    doubled = {c: {p: lr._replace(scale=2 * lr.scale) for p, lr in own.items()}
               for c, own in e.components.items()}  # fmt: skip
    formats.save(replace(e, components=doubled), "w.safetensors", format="cloneofsimo",
                 layout=layout)  # fmt: skip
    formats.save(e, "h.safetensors", format="cloneofsimo", layout=layout, dtype=torch.bfloat16)
    said = {}
    for name in "cethw":
        call("e.safetensors", f"{name}.safetensors", f"o{name}.safetensors", "1", "1",
             "--model", "base", lora_add=True)  # fmt: skip
        said[name] = capsys.readouterr().err
    assert {name for name, text in said.items() if "same update" in text} == set("ethw")
    assert "lpl gives 4 times; the sum would be 2 times" in said["e"]
    assert "lpl gives 6 times; the sum would be 3 times" in said["w"]  # (1 + 2)(1 + 1) and 1 + 2
    sums = {name: deltas(formats.load(f"o{name}.safetensors", layout)) for name in "et"}
    own = deltas(e)
    square = sum(float((value**2).sum()) for value in own.values())
    times = sum(float((sums["t"][key] * value).sum()) for key, value in own.items()) / square
    assert f"lpl gives {times:.3g} times" in said["t"]


def test_files_without_a_common_layer_are_not_the_same_update(here, states, layout, capsys):
    """Which was said of them before they were refused."""
    for name, targets in (("p", "*attn1.to_q"), ("q", "*attn2.to_k")):
        state = random_state(pipeline(), rank=2, unet=(targets,), text=())
        formats.save(state, f"{name}.safetensors", layout=layout)
    call("p.safetensors", "q.safetensors", "o.safetensors", lora_add=True, status=2)
    said = capsys.readouterr().err
    assert "same update" not in said and "lpl needs the same layers" in said
