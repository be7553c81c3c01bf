"""Ranks, errors and budgets are those of the layers in the file, also where it joins layers."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.adapters.weight_updates import AdapterState
from lora_core.formats.model_folders import open_model_folder
from merging.stored_layers import OWN_LAYERS, StoredLayers
from tests import tiny_flux
from tests.adapter_checks import header
from tests.merge_commands import call

Q, K, V = (f"transformer_blocks.0.attn.to_{name}" for name in "qkv")
SINGLE = "single_transformer_blocks.1"
WIDTH = 32  # of the tiny network
LAYERS = {  # kohya's name -> outputs, inputs
    "double_blocks_0_img_attn_qkv": (96, WIDTH),
    "double_blocks_0_img_attn_proj": (WIDTH, WIDTH),
    "double_blocks_1_txt_attn_qkv": (96, WIDTH),
    "single_blocks_1_linear1": (224, WIDTH),
    "final_layer_adaLN_modulation_1": (64, WIDTH),
}


def shared_file(path, *, rank=6, seed=0, dtype=torch.float32):
    """A file as sd-scripts and ai-toolkit write it: one down and a dense up for each layer."""
    noise = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, inner) in LAYERS.items():
        decay = torch.logspace(0, -2, rank)[:, None]  # a spectrum that can be cut
        down = decay * torch.randn(rank, inner, generator=noise)
        up = torch.randn(out, rank, generator=noise)
        tensors[f"lora_unet_{name}.lora_down.weight"] = down.to(dtype)
        tensors[f"lora_unet_{name}.lora_up.weight"] = up.to(dtype)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path)
    return tensors


def stacked(tensors):
    """Kohya's name -> alpha / rank * up @ down in fp64, with nothing of ours."""
    found = {}
    for key, down in tensors.items():
        module, _, leaf = key.partition(".")
        if leaf == "lora_down.weight":
            up, alpha = tensors[f"{module}.lora_up.weight"], tensors[f"{module}.alpha"]
            product = up.double() @ down.double()
            found[module.removeprefix("lora_unet_")] = float(alpha) / len(down) * product
    return found


def native(tensors):
    """Path -> up @ down in fp64 of a file under diffusers' names."""
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            up = tensors[key.replace("lora_A", "lora_B")]
            path = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            found[path] = up.double() @ down.double()
    return found


def ranks(path):
    found = {}
    for key, tensor in load_file(path).items():
        if key.endswith("down.weight"):
            found[key.split(".")[0].removeprefix("lora_unet_")] = len(tensor)
    return found


def close(found, wanted, tolerance=1e-6):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((found[name] - value).norm()) <= tolerance * float(value.norm()), name


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny_flux.save(folder / "base")
    return folder / "base"


@pytest.fixture
def files(tmp_path, monkeypatch, flux_folder):
    """The working folder, with the model as "base" and two files that share their down."""
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(flux_folder)
    return {name: shared_file(f"{name}.safetensors", seed=i) for i, name in enumerate("ab")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_down_stays_shared(files, dtype, capsys):
    tensors = shared_file("x.safetensors", rank=4, dtype=dtype)
    call("convert", "x.safetensors", "y.safetensors", "--to", "kohya", "--model", "base")
    assert re.search(r"transformer +5 +20 +20 ", capsys.readouterr().out)
    again = load_file("y.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    meta = header("y.safetensors")
    assert (meta["ss_network_dim"], meta["ss_network_alpha"]) == ("4", "2.0")


def test_a_shared_down_survives_diffusers_names(files):
    call("convert", "a.safetensors", "n.safetensors", "--model", "base")
    call("convert", "n.safetensors", "k.safetensors", "--to", "kohya", "--model", "base")
    assert set(ranks("k.safetensors").values()) == {6}
    close(stacked(load_file("k.safetensors")), stacked(files["a"]))


def test_unlike_ranks_are_said_in_the_header(files, capsys):
    """q, k and v of a file under diffusers' names have a down each: the joined layer has three."""
    tensors = {}
    for path in (Q, K, V, "transformer_blocks.0.attn.to_out.0"):
        tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(2, WIDTH)
        tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(WIDTH, 2)
    save_file(tensors, "n.safetensors")
    call("convert", "n.safetensors", "k.safetensors", "--to", "kohya", "--model", "base")
    assert ranks("k.safetensors") == {
        "double_blocks_0_img_attn_qkv": 6,
        "double_blocks_0_img_attn_proj": 2,
    }
    meta = header("k.safetensors")
    assert (meta["ss_network_dim"], meta["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert re.search(r"transformer +2 +8 +8 ", capsys.readouterr().out)
    close(
        stacked(load_file("k.safetensors")),
        {
            "double_blocks_0_img_attn_qkv": torch.cat(
                [native(tensors)[path] for path in (Q, K, V)]
            ),
            "double_blocks_0_img_attn_proj": native(tensors)["transformer_blocks.0.attn.to_out.0"],
        },
    )


def test_resize_is_the_optimum_of_the_stored_layer(files, capsys):
    call("resize", "a.safetensors", "r.safetensors", "--rank", "3", "--model", "base")
    assert set(ranks("r.safetensors").values()) == {3}
    assert header("r.safetensors")["ss_network_dim"] == "3"
    assert re.search(r"transformer +5 +15 +30 ", capsys.readouterr().out)
    found = stacked(load_file("r.safetensors"))
    for name, value in stacked(files["a"]).items():
        best = float(torch.linalg.svdvals(value)[3:].norm())
        assert float((found[name] - value).norm()) == pytest.approx(best, rel=1e-4), name


@pytest.mark.parametrize("flag, allowed", [("--max-error", 0.1), ("--energy", 0.99)])
def test_errors_are_met_by_the_smallest_stored_rank(files, flag, allowed):
    call("resize", "a.safetensors", "r.safetensors", flag, str(allowed), "--model", "base")
    squares = {}
    for name, value in stacked(files["a"]).items():
        sigma = torch.linalg.svdvals(value).square()
        squares[name] = sigma / sigma.sum()
    allowance = 0.1**2 if flag == "--max-error" else 0.01
    for name, rank in ranks("r.safetensors").items():
        assert squares[name][rank:].sum() <= allowance < squares[name][rank - 1 :].sum()


def test_a_budget_in_bytes_is_that_of_the_stored_tensors(files):
    call("resize", "a.safetensors", "r.safetensors", "--budget", "8KB", "--model", "base")
    sizes = [t.nbytes for key, t in load_file("r.safetensors").items() if "alpha" not in key]
    step = 4 * (224 + WIDTH)  # of the largest layer
    assert 8000 - step < sum(sizes) <= 8000
    call("resize", "a.safetensors", "n.safetensors", "--budget", "17", "--model", "base")
    assert sum(ranks("n.safetensors").values()) == 17


def test_sums_of_shared_files_have_the_sum_of_their_ranks(files):
    call(
        "mix", "0.7*a.safetensors - 0.3*b.safetensors", "--out", "m.safetensors", "--model", "base"
    )
    assert set(ranks("m.safetensors").values()) == {12}
    first, second = stacked(files["a"]), stacked(files["b"])
    close(
        stacked(load_file("m.safetensors")),
        {name: 0.7 * first[name] - 0.3 * second[name] for name in first},
    )


def test_a_shared_and_a_block_diagonal_file_are_summed(files):
    """sd-scripts' split_qkv gives one down for each part, stacked in one tensor."""
    down, up = torch.randn(6, WIDTH), torch.zeros(96, 6)
    for part in range(3):
        up[32 * part : 32 * part + 32, 2 * part : 2 * part + 2] = torch.randn(32, 2)
    name = "double_blocks_0_img_attn_qkv"
    split = {
        f"lora_unet_{name}.lora_down.weight": down,
        f"lora_unet_{name}.lora_up.weight": up,
        f"lora_unet_{name}.alpha": torch.tensor(6.0),
    }
    save_file(split, "s.safetensors")
    call("convert", "s.safetensors", "t.safetensors", "--to", "kohya", "--model", "base")
    again = load_file("t.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in split.items())
    call("mix", "a.safetensors + 2*s.safetensors", "--out", "m.safetensors", "--model", "base")
    assert ranks("m.safetensors")[name] == 12
    total = stacked(files["a"])
    total[name] = total[name] + 2 * stacked(split)[name]
    close(stacked(load_file("m.safetensors")), total)


def test_weights_of_parts_stay_right(files):
    """@attn is q, k and v of a layer that the MLP shares; globs may weigh its parts apart."""
    sum_ = f"0.5*a.safetensors + a.safetensors@attn + a.safetensors@{SINGLE}.attn.to_k=-3"
    for words in ((), ("--rank", "12"), ("--rank", "2")):
        out = f"m{len(words)}{words[-1:]}.safetensors"
        call("mix", sum_, "--out", out, "--model", "base", *words)
        whole = stacked(files["a"])
        linear = whole["single_blocks_1_linear1"]
        linear[:32] *= 1.5
        linear[32:64] *= 0.5 + 1 - 3
        linear[64:96] *= 1.5
        linear[96:] *= 0.5
        found = stacked(load_file(out))["single_blocks_1_linear1"]
        lost = torch.linalg.svdvals(linear)[2:].norm() if words[-1:] == ("2",) else 0.0
        assert float((found - linear).norm()) == pytest.approx(
            float(lost), rel=1e-4, abs=1e-5 * float(linear.norm())
        )
        most = {(): 18, ("--rank", "12"): 12, ("--rank", "2"): 2}[words]
        assert ranks(out)["single_blocks_1_linear1"] == most


@pytest.mark.parametrize("method", ["ties", "dare", "magnitude", "slerp"])
def test_methods_act_on_our_layers_and_are_cut_as_stored(files, method):
    """The same merge under diffusers' names, whole, is what the joined layer is cut from."""
    words = ("mix", "0.6*a.safetensors + 0.4*b.safetensors", "--method", method, "--model", "base")
    keep = ("--energy", "1") if method != "slerp" else ()
    call(*words, "--out", "n.safetensors", "--format", "diffusers", *keep)
    call(*words, "--out", "k.safetensors", "--rank", "4", "--svd", "exact")
    parts = native(load_file("n.safetensors"))
    whole = torch.cat([parts[path] for path in (Q, K, V)])
    found = stacked(load_file("k.safetensors"))["double_blocks_0_img_attn_qkv"]
    best = float(torch.linalg.svdvals(whole)[4:].norm())
    assert set(ranks("k.safetensors").values()) == {4}
    assert float((found - whole).norm()) == pytest.approx(best, rel=1e-3)


def weight_of(path):
    weights = open_model_folder(Path("base"))["transformer"]
    return weights.read(f"{path}.weight").double()


@pytest.mark.parametrize("magnitudes", [(Q, K, V), (K,)])
def test_a_dora_in_a_joined_layer_is_cut_as_stored(files, magnitudes):
    """Also where only a part is a DoRA, which kohya's names could not hold as it is."""
    tensors, updates = {}, []
    for path in (Q, K, V):
        down, up, weight = 0.1 * torch.randn(2, WIDTH), torch.randn(WIDTH, 2), weight_of(path)
        tensors[f"transformer.{path}.lora_A.weight"] = down
        tensors[f"transformer.{path}.lora_B.weight"] = up
        tuned = weight + up.double() @ down.double()
        if path in magnitudes:
            magnitude = 1.1 * tuned.norm(dim=1) + 0.1
            tensors[f"transformer.{path}.lora_magnitude_vector"] = magnitude.float()
            tuned = tuned * (magnitude / tuned.norm(dim=1))[:, None]
        updates.append(tuned - weight)
    save_file(tensors, "d.safetensors")
    common = ("--format", "kohya", "--model", "base", "--svd", "exact")
    call("resize", "d.safetensors", "k.safetensors", "--rank", "5", *common)
    whole = torch.cat(updates)
    found = stacked(load_file("k.safetensors"))["double_blocks_0_img_attn_qkv"]
    best = float(torch.linalg.svdvals(whole)[5:].norm())
    assert ranks("k.safetensors") == {"double_blocks_0_img_attn_qkv": 5}
    assert float((found - whole).norm()) == pytest.approx(best, rel=1e-3)


def test_a_loha_of_a_joined_layer_is_cut_as_stored(files):
    name, r = "single_blocks_1_linear1", 2
    parts = {"hada_w1_a": (224, r), "hada_w1_b": (r, 32), "hada_w2_a": (224, r)}
    parts |= {"hada_w2_b": (r, 32)}
    tensors = {f"lora_unet_{name}.{leaf}": torch.randn(shape) for leaf, shape in parts.items()}
    save_file(tensors | {f"lora_unet_{name}.alpha": torch.tensor(1.0)}, "l.safetensors")
    words = ("--rank", "3", "--svd", "exact", "--format", "kohya", "--model", "base")
    call("mix", "l.safetensors + a.safetensors", "--out", "k.safetensors", *words)
    t = {leaf: tensors[f"lora_unet_{name}.{leaf}"].double() for leaf in parts}
    loha = 0.5 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    whole = loha + stacked(files["a"])[name]
    found = stacked(load_file("k.safetensors"))[name]
    best = float(torch.linalg.svdvals(whole)[3:].norm())
    assert set(ranks("k.safetensors").values()) == {3}
    assert float((found - whole).norm()) == pytest.approx(best, rel=1e-3)


def test_distill_cuts_the_stored_layer(files):
    call("fold", "base", "a.safetensors", "tuned", "--model-config", "", "--dtype", "fp32")
    words = ("--rank", "4", "--svd", "exact", "--format", "kohya")
    call("distill", "base", "tuned", "k.safetensors", *words)
    assert set(ranks("k.safetensors").values()) == {4}
    found = stacked(load_file("k.safetensors"))
    for name, value in stacked(files["a"]).items():
        best = float(torch.linalg.svdvals(value)[4:].norm())
        assert float((found[name] - value).norm()) == pytest.approx(best, rel=1e-2), name


def test_lpl_of_shared_files_stays_shared(files, capsys):
    call("a.safetensors", "b.safetensors", "--output-path", "l.safetensors", "--model", "base",
         "--alpha", "1", lora_add=True)  # fmt: skip
    assert set(ranks("l.safetensors").values()) == {6}
    assert re.search(r"transformer +5 +30 +", capsys.readouterr().out)
    call("a.safetensors", "b.safetensors", "j.safetensors", "--mode", "ljl", "--model", "base",
         lora_add=True)  # fmt: skip
    assert set(ranks("j.safetensors").values()) == {12}
    first, second = stacked(files["a"]), stacked(files["b"])
    close(stacked(load_file("j.safetensors")), {key: first[key] + second[key] for key in first})


def test_info_shows_the_layers_of_the_file(files, capsys):
    call("info", "a.safetensors", "--model", "base")
    shown = capsys.readouterr().out
    assert re.search(r"transformer +5 +0 +0 +6 +3 ", shown)
    assert "transformer.single_blocks.1.linear1" in shown
    call("convert", "a.safetensors", "n.safetensors", "--model", "base")
    capsys.readouterr()
    call("info", "n.safetensors", "--model", "base")
    assert re.search(r"transformer +12 +0 +0 +6 +6 ", capsys.readouterr().out)


def test_without_a_layout_every_layer_is_its_own():
    keys = [("unet", "a"), ("unet", "b")]
    assert OWN_LAYERS.group_parts(keys) == {key: [key] for key in keys}
    state = AdapterState()
    assert StoredLayers().join_layers(state) is state


def renamed(tensors, rules):
    found = {}
    for key, tensor in tensors.items():
        for before, after in rules.items():
            key = key.replace(before, after)
        found[key] = tensor
    return found


COMFYUI = {
    "lora_unet_": "diffusion_model.",
    "_blocks_": "_blocks.",
    "_img_attn_": ".img_attn.",
    "_txt_attn_": ".txt_attn.",
    "_linear1": ".linear1",
    "_adaLN_modulation_": ".adaLN_modulation.",
}
PEFTS_LEAVES = {".lora_down.": ".lora_A.", ".lora_up.": ".lora_B."}


@pytest.mark.parametrize("leaves", [{}, PEFTS_LEAVES])
def test_comfyuis_names_stay_shared(files, leaves):
    save_file(renamed(files["a"], COMFYUI | leaves), "c.safetensors")
    call("mix", "c.safetensors", "--out", "k.safetensors", "--model", "base")
    assert set(ranks("k.safetensors").values()) == {6}
    close(stacked(load_file("k.safetensors")), stacked(files["a"]))
    call("resize", "c.safetensors", "r.safetensors", "--rank", "2", "--model", "base")
    assert set(ranks("r.safetensors").values()) == {2}


def test_xlabs_layers_stay_shared(files, capsys):
    """XLabs' trainer has q, k and v of a single block alone: the MLP's rows are zeros."""
    down, up = torch.randn(3, WIDTH), torch.randn(96, 3)
    module = "diffusion_model.single_blocks.1.processor.qkv_lora"
    save_file({f"{module}.down.weight": down, f"{module}.up.weight": up}, "x.safetensors")
    call("info", "x.safetensors", "--model", "base")
    assert re.search(r"transformer +1 +0 +0 +3 +3 ", capsys.readouterr().out)
    call("convert", "x.safetensors", "k.safetensors", "--to", "kohya", "--model", "base")
    assert ranks("k.safetensors") == {"single_blocks_1_linear1": 3}
    whole = torch.cat([up.double() @ down.double(), torch.zeros(128, WIDTH)])
    close(stacked(load_file("k.safetensors")), {"single_blocks_1_linear1": whole})
