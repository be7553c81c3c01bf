"""merge.py and lora_add in this process: sums are sums, every command does what it says, and
mistakes are one sentence with nothing touched.
"""

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import merge
from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank, delta_weight, scaled_product
from lora_core.formats import embeddings
from lora_core.formats.factor_lists import write_factor_lists
from lora_core.formats.model_folders import open_model_folder, weight_key
from lora_core.runs import run_folder
from merging import base_models
from merging.adapter_sums import Term, collect_layers, layers_by_key, mix_layers_dense
from merging.commands import FileReadOptions
from merging.factor_sums import cosine_similarity
from merging.ties_dare import ties
from merging.truncation import Keep
from models import read_layout
from tests.tiny_pipeline import pipeline, random_state

SQUARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def layout(model):
    return read_layout(str(model))


@pytest.fixture(scope="module")
def made(model, layout, tmp_path_factory):
    """Files of three formats, of different ranks and layers; two with tokens of the same names."""
    folder = tmp_path_factory.mktemp("loras")
    pipe = pipeline()
    noise = torch.Generator().manual_seed(9)
    states = {
        "a": random_state(pipe, rank=2, seed=1),
        "b": random_state(pipe, mixed=True, seed=2),
        "d": random_state(pipe, rank=2, dora=True, seed=4),
        "c": random_state(
            pipe, rank=3, seed=3, unet=("*attn?.to_*", "*ff.net.0.proj"), text=("*self_attn*proj",)
        ),
    }
    for name, format in (
        ("a", "diffusers"),
        ("b", "kohya"),
        ("c", "cloneofsimo"),
        ("d", "diffusers"),
    ):
        state = states[name]
        if name in "ac":
            words = {"TOK": ("<s1>", "<s2>")} if name == "a" else {}
            metadata = embeddings.placeholder_header(words) | {
                embeddings.TOKEN_NAMES: '["<s1>", "<s2>"]'
            }
            state = states[name] = replace(
                state,
                tokens={"clip_l": torch.randn(2, 16, generator=noise)},
                token_names=("<s1>", "<s2>"),
                metadata=metadata,
            )
        formats.save(state, folder / f"{name}.safetensors", format=format, layout=layout)
    run_folder = folder / "run"
    formats.save_run(states["a"], run_folder, layout=layout)
    return folder, states


@pytest.fixture
def here(made, model, tmp_path, monkeypatch):
    """A folder with the files in it, and the model beside them."""
    for file in made[0].iterdir():
        (shutil.copytree if file.is_dir() else shutil.copy)(file, tmp_path / file.name)
    (tmp_path / "base").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words, status=0, lora_add=False):
    """Runs a command line and checks its status."""
    assert (merge.lora_add if lora_add else merge.main)([str(word) for word in words]) == status


def deltas(state):
    return {key: scaled_product(lr).double() for key, lr in layers_by_key(state).items()}


def summed(terms):
    total = {}
    for weight, state in terms:
        for key, value in deltas(state).items():
            total[key] = total.get(key, 0) + weight * value
    return total


def assert_equal(ours, theirs, tolerance=1e-6):
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert float((ours[key] - value).norm()) <= tolerance * max(float(value.norm()), 1e-12), key


def header(path):
    with safe_open(path, "pt") as opened:
        return opened.metadata()


# ---------------------------------------------------------------- mix


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_mix_is_the_sum_of_the_updates(here, made, layout, format):
    states = made[1]
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


def test_layers_after_the_at_count_alone(here, made, layout, capsys):
    a, b = made[1]["a"], made[1]["b"]
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
def test_what_is_kept_is_what_was_asked_for(here, made, layout, flag, capsys):
    call("mix", "a.safetensors + b.safetensors", "--out", "m.safetensors", "--model", "base", *flag)
    said = capsys.readouterr().out
    state, exact = (
        formats.load("m.safetensors", layout),
        summed([(1, made[1]["a"]), (1, made[1]["b"])]),
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


def test_methods_beside_the_sum(here, made, layout, capsys):
    a, c = made[1]["a"], made[1]["c"]
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


def test_tokens_that_clash_are_renamed_and_reported(here, made, layout, capsys):
    call(
        "mix", "0.5*run + 0.5*c.safetensors + run@unet", "--out", "m.safetensors", "--model", "base"
    )
    said = capsys.readouterr()
    assert (
        "<s1> of c.safetensors is called <s1-2> in the result" in said.err
        and said.err.count("is called") == 2
    )
    assert "written: m_emb.safetensors" in said.out
    state = formats.load("m_emb.safetensors", layout)
    assert state.token_names == ("<s1>", "<s2>", "<s1-2>", "<s2-2>")
    assert torch.equal(
        state.tokens["clip_l"],
        torch.cat([made[1]["a"].tokens["clip_l"], made[1]["c"].tokens["clip_l"]]),
    )
    assert embeddings.placeholder_words(state) == {"TOK": ("<s1>", "<s2>")}
    shutil.copytree("run", "run2")
    call("mix", "run + run2", "--out", "w.safetensors", "--model", "base")
    assert embeddings.placeholder_words(formats.load("w_emb.safetensors", layout)) == {
        "TOK": ("<s1>", "<s2>"),
        "TOK2": ("<s1-2>", "<s2-2>"),
    }
    assert "TOK of run2 is called TOK2" in capsys.readouterr().err
    call(
        "mix",
        "run@cross + c.safetensors@cross",
        "--out",
        "i.safetensors",
        "--model",
        "base",
        "--format",
        "cloneofsimo",
    )
    assert (
        formats.load("i.safetensors", layout).token_names == state.token_names
        and not Path("i_emb.safetensors").exists()
    )


def test_a_dora_needs_its_model(here, made, layout, capsys):
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
    exact = 0.5 * delta_weight(made[1]["d"].components["unet"][SQUARE], base) + scaled_product(
        made[1]["a"].components["unet"][SQUARE]
    )
    assert_equal(
        {key: deltas(formats.load("m.safetensors", layout))[key]}, {key: exact.double()}, 1e-5
    )
    call("mix", "d.safetensors", "--out", "same.safetensors", "--model", "base")
    assert torch.equal(
        formats.load("same.safetensors", layout).components["unet"][SQUARE].magnitude,
        made[1]["d"].components["unet"][SQUARE].magnitude,
    )


# ---------------------------------------------------------------- redo


@pytest.mark.parametrize(
    "words",
    [
        ("mix", "0.7*a.safetensors + 0.3*c.safetensors@attn", "--rank", "3", "--out"),
        ("resize", "b.safetensors", "--energy", "0.9"),
        (
            "mix",
            "a.safetensors - b.safetensors",
            "--method",
            "dare",
            "--rank",
            "2",
            "--seed",
            "5",
            "--dtype",
            "fp16",
            "--out",
        ),
        ("add", "a.safetensors", "a.safetensors", "--mode", "lpl"),
        ("fold", "base", "0.5*a.safetensors"),
        ("convert", "c.safetensors", "--to", "kohya"),
    ],
)
def test_redo_gives_the_same_bytes(here, words, capsys):
    command = (
        [*words, "m.safetensors"]
        if words[0] != "add"
        else [*words[:3], "m.safetensors", *words[3:]]
    )
    call(*command, *(("--model", "base") if words[0] != "fold" else ()))
    before = Path("m.safetensors").read_bytes()
    call("redo", "m.safetensors")
    assert "the same as before: m.safetensors" in capsys.readouterr().out
    os.mkdir("other")
    call("redo", "m.safetensors", "--out", "other/m.safetensors")
    assert Path("other/m.safetensors").read_bytes() == before == Path("m.safetensors").read_bytes()
    assert not [name for name in os.listdir() if name.startswith(".")]


def test_redo_wants_the_same_inputs(here, capsys, monkeypatch):
    call("mix", "0.7*a.safetensors", "--out", "m.safetensors", "--model", "base")
    recipe = json.loads(header("m.safetensors")["lora_core.merge"])
    assert recipe["options"] == {"sum": "0.7*a.safetensors", "model": "base"} and list(
        recipe["inputs"]
    ) == ["a.safetensors"]
    monkeypatch.chdir("/")
    call("redo", here / "m.safetensors")  # inputs beside the file are found
    monkeypatch.chdir(here)
    shutil.copy("m.safetensors", "old.safetensors")
    state = load_file("m.safetensors")
    save_file(
        {key: 2 * value for key, value in state.items()}, "m.safetensors", header("m.safetensors")
    )
    call("redo", "m.safetensors", status=2)
    assert "comes out differently" in capsys.readouterr().err
    call("redo", "m.safetensors", "--overwrite")
    assert Path("m.safetensors").read_bytes() == Path("old.safetensors").read_bytes()
    shutil.copy("c.safetensors", "a.safetensors")
    call("redo", "m.safetensors", status=2)
    os.remove("a.safetensors")
    call("redo", "m.safetensors", status=2)
    call("redo", "b.safetensors", status=2)
    assert re.search(
        r"(?s)its sha256 differs.*neither below.*has no recipe", capsys.readouterr().err
    )


def test_redo_of_a_model_folder(here, capsys):
    call("fold", "base", "0.5*run", "folded")
    call("redo", "folded")
    assert "the same as before: folded" in capsys.readouterr().out


# ---------------------------------------------------------------- lora_add


@pytest.mark.parametrize(("alpha", "times"), [(1.0, 4.0), (0.5, 1.0)])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_lpl_of_a_file_with_itself(here, made, layout, alpha, times, suffix, capsys):
    if suffix == "pt":
        plain = replace(made[1]["c"], tokens={}, token_names=())
        write_factor_lists(plain, "c.pt", layout)
        exact = summed([(times, plain)])
    else:
        exact = summed([(times, made[1]["c"])])
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
        assert f"lpl gives {times:g} times" in said.err
    assert_equal(deltas(formats.load(f"o.{suffix}", layout)), exact, 1e-5)


def test_lpl_is_the_seeds_formula(here, made, layout):
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


def test_lpl_of_unlike_files_is_refused(here, made, layout, capsys):
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


def test_ljl_joins_exactly(here, made, layout, capsys):
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
        deltas(formats.load("o.safetensors", layout)),
        summed([(1, made[1]["a"]), (1, made[1]["c"])]),
    )
    assert formats.load("o_emb.safetensors", layout).token_names == (
        "<s0-0>",
        "<s0-1>",
        "<s1-0>",
        "<s1-1>",
    )
    call("c.safetensors", "run", "p.safetensors", "0.5", "--mode", "ljl", lora_add=True, status=2)
    assert "takes no alphas" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["base", "runwayml/stable-diffusion-v1-5"])
def test_upl_writes_the_model_with_its_tokens(here, made, layout, model, name, monkeypatch, capsys):
    monkeypatch.setattr("models.hub_models.download_model", lambda _: model)
    call(name, "./c.safetensors", "./output_merged", "0.8", "--mode", "upl", lora_add=True)
    assert "100.00 % of the update's energy survived" in capsys.readouterr().out
    pipe = StableDiffusionPipeline.from_pretrained("output_merged", safety_checker=None)
    ids = pipe.tokenizer("a<s1><s2>", add_special_tokens=False).input_ids[1:]
    assert ids == pipe.tokenizer.convert_tokens_to_ids(
        ["<s1>", "<s2>"]
    ) and pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)
    assert torch.equal(
        pipe.text_encoder.get_input_embeddings().weight[ids], made[1]["c"].tokens["clip_l"]
    )
    before = open_model_folder("base")
    for (component, path), update in deltas(made[1]["c"]).items():
        weight = getattr(pipe, component).get_submodule(layout.module_path(component, path)).weight
        expected = (
            before[component].read(weight_key(before[component], layout, component, path))
            + 0.8 * update
        )
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)


def test_upl_ckpt_writes_a_checkpoint_and_an_embedding(here, made, capsys):
    call(
        "base", "c.safetensors", "./krk.ckpt", "--alpha", "0.7", "--mode=upl-ckpt-v2", lora_add=True
    )
    state = torch.load("krk.ckpt")["state_dict"]
    key = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    expected = open_model_folder("base")["unet"].read(f"{SQUARE}.weight") + 0.7 * scaled_product(
        made[1]["c"].components["unet"][SQUARE]
    )
    assert torch.equal(state[f"model.diffusion_model.{key}"], expected.half())
    rows = torch.load("krk.pt")
    assert (
        torch.equal(rows["string_to_param"]["*"], made[1]["c"].tokens["clip_l"])
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
def test_flags_of_python_fire_are_understood(here, made, layout, words):
    call(*words, "--model", "base", lora_add=True)
    assert_equal(deltas(formats.load("o.safetensors", layout)), deltas(made[1]["c"]), 1e-5)


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("out", ["merged", "merged.safetensors", "merged.ckpt"])
def test_a_fold_is_the_sum_of_weights(here, made, layout, out):
    call("fold", "base", "0.7*a.safetensors - 0.2*b.safetensors@unet", out)
    folded = base_models.open_base_model(
        out, FileReadOptions(model_config="" if out == "merged" else "base")
    )
    before = open_model_folder("base")
    wished = summed(
        [(0.7, made[1]["a"]), (-0.2, AdapterState({"unet": made[1]["b"].components["unet"]}))]
    )
    for (name, path), update in wished.items():
        weight = base_models.base_weight_reader(folded)(name, path)
        torch.testing.assert_close(
            weight.double(),
            before[name].read(weight_key(before[name], layout, name, path)) + update,
            rtol=0,
            atol=1e-6,
        )
    assert torch.equal(
        folded.model["vae"].read("decoder.conv_in.weight"),
        before["vae"].read("decoder.conv_in.weight"),
    )
    assert (out != "merged.safetensors") or "lora_core.merge" in header(out)


def test_rounding_is_reported_and_the_residual_saved(here, made, layout, capsys):
    call(
        "fold",
        "base",
        "0.0001*a.safetensors",
        "m",
        "--dtype",
        "bf16",
        "--residual",
        "r.safetensors",
        "--residual-rank",
        "4",
    )
    said = capsys.readouterr()
    assert (
        "0.00 % of the update's energy survived" in said.out
        and "less than 95 %" in said.err
        and "--residual" in said.err
    )
    weight = open_model_folder("m")["unet"].read(f"{SQUARE}.weight")
    assert weight.dtype == torch.bfloat16
    assert formats.load("r.safetensors", layout).components["unet"][SQUARE].rank == 4


def test_models_add_up_with_adapters_on_top(here, made, layout, capsys):
    call("fold", "base", "a.safetensors", "tuned.safetensors")
    call(
        "mix",
        "0.6*base + 0.4*tuned.safetensors + 0.5*b.safetensors@unet",
        "--out",
        "both",
        "--model-config",
        "base",
    )
    before, after = open_model_folder("base"), open_model_folder("both")
    for (name, path), update in summed(
        [(0.4, made[1]["a"]), (0.5, AdapterState({"unet": made[1]["b"].components["unet"]}))]
    ).items():
        weight = after[name].read(weight_key(after[name], layout, name, path))
        torch.testing.assert_close(
            weight.double(),
            before[name].read(weight_key(before[name], layout, name, path)) + update,
            rtol=0,
            atol=2e-6,
        )
    call("mix", "0.6*base + 0.6*both", "--out", "more")
    call("mix", "base - both", "--out", "x", status=2)
    call("mix", "base + both", "--out", "x", "--rank", "4", status=2)
    assert re.search(r"(?s)add up to 1.2.*distill makes.*no rank", capsys.readouterr().err)
    call("convert", "tuned.safetensors", "tuned", "--model-config", "base")
    single = base_models.open_base_model(
        "tuned.safetensors", FileReadOptions(model_config="base")
    ).model
    for name, weights in open_model_folder("tuned").items():
        assert all(torch.equal(weights.read(key), single[name].read(key)) for key in weights.infos)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_distill_is_exact_or_optimal(here, made, layout, svd, capsys):
    call("fold", "base", "a.safetensors + b.safetensors", "tuned")
    capsys.readouterr()
    exact = summed([(1, made[1]["a"]), (1, made[1]["b"])])
    call("distill", "base", "tuned", "full.safetensors", "--rank", "8", "--svd", svd)
    assert_equal(deltas(formats.load("full.safetensors", layout)), exact, 1e-5)
    assert any("time_emb_proj" in path for _, path in exact) and any(
        "conv" in path for _, path in exact
    )
    call("distill", "base", "tuned", "low.safetensors", "--rank", "2", "--svd", svd)
    low = deltas(formats.load("low.safetensors", layout))
    for key, value in exact.items():
        best = float(torch.linalg.svdvals(value.flatten(1))[2:].norm())
        assert float((low[key] - value).norm()) == pytest.approx(best, rel=1e-3, abs=1e-5)
    call(
        "distill",
        "base",
        "tuned",
        "attn.safetensors",
        "--max-error",
        "0.2",
        "--layers",
        "unet,~conv",
    )
    assert set(formats.load("attn.safetensors", layout).components) == {"unet"}
    assert "differ too: norms, biases" in capsys.readouterr().err
    call("distill", "base", "base", "x.safetensors", "--rank", "2", status=2)
    assert "nothing to distil" in capsys.readouterr().err


def test_explain_finds_the_coefficients(here, capsys):
    call("fold", "base", "0.8*a.safetensors - 0.3*c.safetensors", "tuned")
    capsys.readouterr()
    call("explain", "tuned", "base", "a.safetensors", "c.safetensors")
    said = capsys.readouterr().out
    assert (
        re.search(r"total .* 0\.00\d % +0\.8000 +-0\.3000", said)
        and "tuned = base + 0.8*a.safetensors - 0.3*c.safetensors" in said
    )
    call("explain", "tuned", "base", "c.safetensors")
    assert float(re.search(r"total +\S+ +(\S+) %", capsys.readouterr().out)[1]) > 80


# ---------------------------------------------------------------- one file


def test_resize_keeps_dtype_tokens_and_layers(here, made, layout, capsys):
    call("resize", "run", "small.safetensors", "--rank", "1", "--model", "base", "--dtype", "fp16")
    small = formats.load("small.safetensors", layout)
    for lr in layers_by_key(small).values():
        assert lr.rank == 1 and lr.down.dtype == torch.float16
    assert formats.load("small_emb.safetensors", layout).token_names == ("<s1>", "<s2>")
    call("resize", "small.safetensors", "one.safetensors", "--energy", "1", "--model", "base")
    call("mix", "small.safetensors", "--out", "wide.safetensors", "--model", "base")
    assert (
        load_file("one.safetensors").popitem()[1].dtype == torch.float16
        and load_file("wide.safetensors").popitem()[1].dtype == torch.float32
    )
    call("resize", "run", "x.safetensors", "--model", "base", status=2)
    assert "choose how much" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["kohya", "diffusers", "cloneofsimo"])
def test_convert_changes_names_only(here, made, layout, format):
    call("convert", "c.safetensors", "o.safetensors", "--to", format, "--model", "base")
    assert_equal(deltas(formats.load("o.safetensors", layout)), deltas(made[1]["c"]))
    tokens = formats.load(
        "o.safetensors" if format == "cloneofsimo" else "o_emb.safetensors", layout
    )
    assert torch.equal(tokens.tokens["clip_l"], made[1]["c"].tokens["clip_l"])


def test_info_and_diff_tell_what_is_there(here, made, capsys):
    call("info", "a.safetensors", "--plot", "s.png", "--model", "base", "--top", "3")
    said = capsys.readouterr().out
    assert (
        "a.safetensors: diffusers, sd (sd_v1), fp32" in said and Path("s.png").stat().st_size > 1000
    )
    state = made[1]["a"]
    size = sum(float(value.square().sum()) for value in deltas(state).values()) ** 0.5
    assert re.search(rf"total +\d+ +\d+ +0 +2 +2 +{size:.4g} ", said)
    call("info", "run", "--model", "base")
    assert "word TOK stands for <s1><s2>" in capsys.readouterr().out
    call("diff", "a.safetensors", "a.safetensors", "--model", "base")
    assert re.search(r"total .* 1\.0000 +\S+\n", capsys.readouterr().out)
    call("diff", "a.safetensors", "c.safetensors", "--model", "base", "--top", "1")
    said = capsys.readouterr().out
    inner = sum(
        float((deltas(state)[key] * value).sum()) for key, value in deltas(made[1]["c"]).items()
    )
    other = sum(float(value.square().sum()) for value in deltas(made[1]["c"]).values()) ** 0.5
    assert f"{inner / size / other:.4f}" in said and "90" in said
    call("info", "base")
    assert "unet" in capsys.readouterr().out


def test_the_family_is_told_by_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = SQUARE.replace("attn1.to_q", "attn2.to_k").replace(".", "_")
    save_file(
        {
            f"lora_unet_{path}.lora_{side}.weight": torch.randn(shape)
            for side, shape in (("down", (2, 768)), ("up", (320, 2)))
        },
        "k.safetensors",
    )
    call("mix", "2*k.safetensors@IN01", "--out", "o.safetensors")
    call("info", "o.safetensors")
    assert "o.safetensors: kohya, sd (sd_v1)" in capsys.readouterr().out
    xl = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file(
        {
            f"{xl}.lora_{side}.weight": torch.randn(shape)
            for side, shape in (("down", (2, 2048)), ("up", (640, 2)))
        },
        "x.safetensors",
    )
    call("mix", "x.safetensors@IN04", "--out", "y.safetensors")
    call("mix", "k.safetensors + x.safetensors", "--out", "z.safetensors", status=2)
    assert "x.safetensors" in capsys.readouterr().err
    call("info", "k.safetensors", "--model", "sd1")
    call("mix", "2*k.safetensors@OUT03", "--out", "p.safetensors", status=2)
    assert "matches none of the 1 layers" in capsys.readouterr().err


# ---------------------------------------------------------------- mistakes

BAD = [
    (("mix", "0.7*a.safetensors + ", "--out", "o.safetensors"), "ends too early"),
    (("mix", "a.safetensors", "--out", ""), "no output"),
    (
        ("mix", "nowhere.safetensors", "--out", "o.safetensors"),
        "nowhere.safetensors does not exist",
    ),
    (
        ("mix", "a.safetensors@nowhere", "--out", "o.safetensors"),
        "a.safetensors: @nowhere matches none",
    ),
    (("mix", "a.safetensors", "--out", "taken.safetensors"), "--overwrite"),
    (("mix", "a.safetensors", "--out", "run"), "is a folder"),
    (("mix", "a.safetensors", "--out", "o.txt"), "should end in .safetensors"),
    (("mix", "a.safetensors", "--out", "locked/o.safetensors"), "not writable"),
    (("mix", "a.safetensors", "--out", "a.safetensors/o.safetensors"), "not a folder"),
    (("mix", "nan.safetensors", "--out", "o.safetensors"), "NaN or Inf"),
    (("mix", "cut.safetensors", "--out", "o.safetensors"), "cannot be read|truncated"),
    (("mix", "empty.safetensors", "--out", "o.safetensors"), "is empty"),
    (
        ("mix", "other.safetensors", "--out", "o.safetensors", "--model", "base"),
        "other.safetensors",
    ),
    (("mix", "1e30*a.safetensors", "--out", "o.safetensors", "--dtype", "fp16"), "overflow"),
    (
        ("mix", "a.safetensors", "--out", "o.safetensors", "--rank", "2", "--energy", "0.5"),
        "exclude each other",
    ),
    (("mix", "a.safetensors", "--out", "o.safetensors", "--rank", "0"), "a rank is at least 1"),
    (
        ("mix", "a.safetensors", "--out", "o.safetensors", "--budget", "many"),
        "not a number of ranks",
    ),
    (
        ("mix", "a.safetensors", "--out", "o.safetensors", "--density", "0.1"),
        "--density has no effect",
    ),
    (
        ("mix", "a.safetensors", "--out", "o.safetensors", "--residual", "r.safetensors"),
        "--residual has no effect",
    ),
    (("mix", "0.5*base + 0.5*base@attn", "--out", "o"), "layers can be chosen of adapters only"),
    (("fold", "a.safetensors", "a.safetensors", "o"), "is not a whole model"),
    (("fold", "base", "base", "o"), "is a whole model"),
    (("fold", "base", "a.safetensors", "run"), "is there already"),
    (("fold", "base", "a.safetensors", "a.safetensors"), "is there already"),
    (("fold", "nowhere/none", "a.safetensors", "o"), "the hub gave no model"),
    (("distill", "base", "a.safetensors", "o.safetensors", "--rank", "2"), "is not a whole model"),
    (("distill", "base", "base", "o.safetensors"), "choose how much"),
    (("convert", "base", "o.safetensors", "--to", "kohya"), "drop --to"),
    (("convert", "d.safetensors", "o.safetensors", "--to", "cloneofsimo"), "DoRA"),
    (("info", "nowhere.safetensors"), "does not exist"),
    (("info", "base", "--plot", "s.png"), "whole model"),
    (("diff", "a.safetensors", "base"), "whole model"),
    (("explain", "base", "base", "a.safetensors"), "nothing to explain"),
    (("redo", "nowhere"), "does not exist"),
    (("add", "a.safetensors", "b.safetensors"), "one of these is missing"),
    (("add", "a.safetensors", "b.safetensors", "o.safetensors", "x"), "is not a number"),
    (("add", "a.safetensors", "b.safetensors", "o.safetensors", "1", "1", "1"), "in addition"),
    (("add", "a.safetensors", "c.safetensors", "o", "--mode", "upl"), "first"),
    (("add", "base", "a.safetensors", "o", "1", "1", "--mode", "upl"), "one alpha"),
    (("add", "base", "a.safetensors", "o.safetensors"), "choose --mode upl"),
    (("mix",), "error: SUM is required; see merge.py mix --help"),
    (("fold",), "BASE, SUM and OUT are required; see merge.py fold --help"),
    (("explain", "tuned"), "BASE and LORAS are required"),
    (("mix", "a", "--rank", "x"), "invalid int"),
    (("nothing",), "there is no command"),
    (("mix", "a", "--outt", "b"), "nearest flag is --out;"),
    (("mix", "a", "--rank"), "argument --rank: no value; see merge.py mix --help"),
    (("resize", "a", "b", "--overwrite=yes"), "argument --overwrite takes no value, got 'yes'"),
]


@pytest.fixture
def spoiled(here, monkeypatch):
    """Files that are no good, and an output that exists."""
    tensors = load_file("a.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, "nan.safetensors")
    Path("cut.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:1000])
    Path("empty.safetensors").write_bytes(b"")
    save_file(
        {f"unet.elsewhere.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"},
        "other.safetensors",
    )
    Path("taken.safetensors").write_bytes(b"precious")
    os.mkdir("locked")
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda place, mode: "locked" not in str(place) and access(place, mode)
    )  # root may write anywhere

    def refuse(self, name):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", refuse)
    return here


@pytest.mark.parametrize(("words", "sentence"), BAD, ids=[" ".join(words)[:60] for words, _ in BAD])
def test_mistakes_are_one_sentence_and_touch_nothing(spoiled, words, sentence, capsys):
    before = snapshot(spoiled)
    model = (
        ("--model", "base")
        if words[0] in ("mix", "convert", "info", "diff", "add")
        and "--model" not in words
        and len(words) > 1
        else ()
    )
    call(*words, *model, status=2)
    said = [
        line
        for line in capsys.readouterr().err.splitlines()
        if not line.startswith(("warning", "note"))
    ]
    assert re.search(sentence, "\n".join(said)), said
    assert len(said) <= 3 and not any("Traceback" in line for line in said)
    assert snapshot(spoiled) == before


def snapshot(folder):
    return {
        str(path): path.stat().st_mtime_ns if path.is_file() else 0 for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    "words",
    [
        ("mix", "a.safetensors", "--out", "taken.safetensors", "--overwrite"),
        ("fold", "base", "a.safetensors", "taken.safetensors", "--overwrite"),
        ("fold", "base", "a.safetensors", "run", "--overwrite"),
        ("add", "c.safetensors", "c.safetensors", "taken.safetensors", "--overwrite"),
        ("fold", "base", "a.safetensors", "o.ckpt"),
    ],
)
def test_a_full_disk_leaves_everything_as_it_was(spoiled, words, monkeypatch, capsys):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = snapshot(spoiled)
    monkeypatch.setattr(run_folder.os, "fsync", full)
    call(*words, *(("--model", "base") if words[0] != "fold" else ()), status=2)
    assert re.search("disk is full|No space left", capsys.readouterr().err)
    assert snapshot(spoiled) == before


@pytest.mark.parametrize(
    "words",
    [
        ("mix", "a.safetensors", "--out", "taken.safetensors"),
        ("fold", "base", "run", "o"),
        ("fold", "base", "run", "o.ckpt"),
        ("distill", "base", "tuned", "o.safetensors", "--rank", "2"),
        ("resize", "a.safetensors", "o.safetensors", "--rank", "1"),
        ("convert", "a.safetensors", "o.safetensors", "--to", "kohya"),
        ("add", "a.safetensors", "a.safetensors", "o.safetensors"),
        ("add", "base", "c.safetensors", "o.ckpt", "--mode", "upl-ckpt-v2"),
    ],
)
def test_dry_runs_report_and_write_nothing(spoiled, words, capsys):
    if "tuned" in words:
        call("fold", "base", "a.safetensors", "tuned")
        capsys.readouterr()
    before = snapshot(spoiled)
    call(*words, "--dry-run", *(("--model", "base") if words[0] not in ("fold", "distill") else ()))
    said = capsys.readouterr().out
    assert "dry run: " in said and re.search(r"total +\d+ +\d+ ", said)
    assert snapshot(spoiled) == before


@pytest.mark.parametrize("command", ["", *merge.COMMANDS])
def test_help_fits_on_a_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("tyro._fmtlib._FORCE_UTF8_BOXES", True)  # as on a terminal
    call(*([command] if command else []), "--help")
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) <= 36
        and max(map(len, lines)) <= 120
        and any(line.startswith("example: merge.py") for line in lines)
    )


def test_examples_of_the_help_are_commands(monkeypatch):
    import shlex

    seen = []
    monkeypatch.setattr(merge, "run_merge_command", lambda name, options: seen.append(name))
    for name, command in merge.COMMANDS.items():
        call(name, *shlex.split(command.example))
    assert seen == list(merge.COMMANDS)


def test_an_interruption_is_said(here, monkeypatch, capsys):
    def stop(name, options):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "run_merge_command", stop)
    call("info", "a.safetensors", status=130)
    assert "interrupted" in capsys.readouterr().err


def test_keys_that_mean_nothing_can_be_allowed(here, capsys):
    tensors = load_file("a.safetensors")
    save_file(
        tensors
        | {
            "unet.nothing.lora_A.weight": torch.ones(2, 2),
            "unet.nothing.lora_B.weight": torch.ones(2, 2),
        },
        "odd.safetensors",
    )
    call("mix", "odd.safetensors", "--out", "o.safetensors", "--model", "base", status=2)
    call("mix", "odd.safetensors", "--out", "o.safetensors", "--model", "base", "--allow-extra")
    assert capsys.readouterr().err.count("nothing") >= 2


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
    call("mix", "0.5*hada.safetensors", "--out", "o.safetensors", "--model", "base", status=2)
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


def test_the_shape_of_an_adapter_must_fit(here, layout, capsys):
    state = AdapterState({"unet": {SQUARE: LowRank(torch.ones(1, 9), torch.ones(8, 1), 1.0)}})
    formats.save(state, "wrong.safetensors", format="diffusers")
    call("fold", "base", "wrong.safetensors", "o", status=2)
    call("mix", "a.safetensors + wrong.safetensors", "--out", "o.safetensors", status=2)
    said = capsys.readouterr().err
    assert said.count(SQUARE) >= 2
