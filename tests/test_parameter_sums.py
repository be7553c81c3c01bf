"""Changes of norms and biases in mix, fold, explain, diff and lora_add: plain weighted sums."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState
from merging.adapter_sums import Term
from merging.parameter_sums import sum_parameters, weighted_parameters
from tests.merge_commands import call
from tests.norm_files import NORM, TEXT_NORM, TO_OUT, norm_changes, save_changes
from tests.refusals import sentence
from tests.tiny_pipeline import pipeline

WEIGHTS = (0.5, -2.0)


@pytest.fixture
def files(here):
    """`here` with n0.safetensors and n1.safetensors, which change norms and biases only."""
    pipe = pipeline()
    found = []
    for seed in range(2):
        changes = norm_changes(pipe.unet, pipe.text_encoder, seed=seed)
        save_changes(changes, here / f"n{seed}.safetensors")
        found.append(changes)
    return found


def read_changes(path):
    from models import read_layout

    state = formats.load(path, read_layout("base"))
    found = {}
    for component, changes in state.parameters.items():
        for name, change in changes.items():
            found[component, name] = change
    return found


def assert_sum(found, files, weights):
    assert found.keys() == files[0].keys()
    for key, change in found.items():
        exact = sum(w * own[key].double() for w, own in zip(weights, files))
        torch.testing.assert_close(change.double(), exact, rtol=1e-6, atol=1e-6)


def test_mix_adds_them_with_the_weights(files):
    flags = ("--model", "base", "--format", "kohya")
    call("mix", "0.5*n0.safetensors - 2*n1.safetensors", "--out", "o.safetensors", *flags)
    assert_sum(read_changes("o.safetensors"), files, WEIGHTS)
    call("mix", "n0.safetensors", "--out", "copy.safetensors", *flags)
    for key, change in read_changes("copy.safetensors").items():
        assert torch.equal(change, files[0][key])


def test_a_choice_of_layers_means_the_norms_and_biases_in_it(files):
    flags = ("--model", "base", "--format", "kohya")
    call("mix", f"n0.safetensors@unet.{NORM}=0.5", "--out", "norm.safetensors", *flags)
    found = read_changes("norm.safetensors")
    assert found.keys() == {("unet", f"{NORM}.weight"), ("unet", f"{NORM}.bias")}
    for key, change in found.items():
        torch.testing.assert_close(change, 0.5 * files[0][key])
    call("mix", "n0.safetensors@~text", "--out", "unet.safetensors", *flags)
    assert {component for component, _ in read_changes("unet.safetensors")} == {"unet"}
    call("mix", "n0.safetensors@nowhere", "--out", "x.safetensors", *flags, status=2)


def test_fold_adds_them_to_norms_and_biases_with_one_rounding(files, capsys):
    before = load_file("base/unet/diffusion_pytorch_model.safetensors")
    text = load_file("base/text_encoder/model.safetensors")
    call("fold", "base", "0.5*n0.safetensors - 2*n1.safetensors", "out")
    assert "5 norms and biases are changed too" in capsys.readouterr().out
    after = load_file("out/unet/diffusion_pytorch_model.safetensors")
    for key, tensor in before.items():
        change = sum(w * own.get(("unet", key), 0) for w, own in zip(WEIGHTS, files))
        exact = tensor.double() + change
        torch.testing.assert_close(after[key].double(), exact.double(), rtol=2e-7, atol=1e-7)
        if ("unet", key) not in files[0]:
            assert torch.equal(after[key], tensor)
    after = load_file("out/text_encoder/model.safetensors")
    moved = [key for key, tensor in text.items() if not torch.equal(after[key], tensor)]
    short = TEXT_NORM.removeprefix("text_model.")
    assert len(moved) == 2 and all(short in key for key in moved)


def test_explain_finds_the_weights_with_which_they_were_folded(files, capsys):
    call("fold", "base", "0.75*n0.safetensors - 0.5*n1.safetensors", "tuned")
    capsys.readouterr()
    call("explain", "tuned", "base", "n0.safetensors", "n1.safetensors")
    out = capsys.readouterr().out
    assert "0.7500" in out and "-0.5000" in out and "0.000 %" in out


def test_diff_compares_them(files, capsys):
    call("mix", "2*n0.safetensors", "--out", "o.safetensors", "--model", "base")
    call("diff", "n0.safetensors", "o.safetensors", "--model", "base")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line for line in lines if "biases" in line}
    assert rows.keys() == {"unet,", "text_encoder,"}
    for row in rows.values():
        assert float(row[-2]) == pytest.approx(1) and float(row[-1]) == pytest.approx(1)


@pytest.mark.parametrize("mode", ["lpl", "ljl"])
def test_lora_add_adds_them_next_to_the_layers(files, mode):
    layer = f"lora_unet_{TO_OUT.replace('.', '_')}"
    width = files[0]["unet", f"{TO_OUT}.bias"].numel()
    for name in ("n0", "n1"):
        factors = {f"{layer}.lora_down.weight": torch.ones(2, width)}
        factors[f"{layer}.lora_up.weight"] = torch.ones(width, 2)
        save_file(load_file(f"{name}.safetensors") | factors, f"{name}.safetensors")
    words = ["n0.safetensors", "n1.safetensors", "o.safetensors"]
    weights = WEIGHTS if mode == "lpl" else (1.0, 1.0)
    words += map(str, weights) if mode == "lpl" else []
    call(*words, "--mode", mode, "--model", "base", lora_add=True)
    assert_sum(read_changes("o.safetensors"), files, weights)


def test_methods_of_layers_do_not_drop_them(files, capsys):
    for method in ("ties", "dare", "slerp"):
        flags = ("--method", method, "--rank", "2", "--model", "base")
        call(
            "mix", "0.5*n0.safetensors + 0.5*n1.safetensors", "--out", "o.safetensors", *flags,
            status=2,
        )  # fmt: skip
        assert "also change norms and biases" in capsys.readouterr().err


def test_resize_and_dtype_keep_them(files):
    layer = f"lora_unet_{TO_OUT.replace('.', '_')}"
    width = files[0]["unet", f"{TO_OUT}.bias"].numel()
    generator = torch.Generator().manual_seed(0)
    full = {f"{layer}.diff": torch.randn(width, width, generator=generator)}
    save_file(load_file("n0.safetensors") | full, "full.safetensors")
    flags = ("--model", "base", "--dtype", "bf16")
    call("resize", "full.safetensors", "o.safetensors", "--rank", "2", *flags)
    written = load_file("o.safetensors")
    assert written[f"{layer}.diff_b"].dtype == torch.bfloat16
    assert torch.equal(written[f"{layer}.diff_b"], files[0]["unet", f"{TO_OUT}.bias"].bfloat16())
    assert f"{layer}.lora_up.weight" in written


def test_what_other_tools_leave_out_is_said(files, capsys):
    """Counts of other tools' own code, in docs/formats.md."""
    layer = f"lora_unet_{TO_OUT.replace('.', '_')}"
    width = files[0]["unet", f"{TO_OUT}.bias"].numel()
    factors = {f"{layer}.lora_down.weight": torch.ones(2, width)}
    factors[f"{layer}.lora_up.weight"] = torch.ones(width, 2)
    changes = load_file("n0.safetensors")
    save_file(changes | factors, "both.safetensors")
    norms = {key: tensor for key, tensor in changes.items() if "_norm" in key and "unet" in key}
    save_file(norms | factors, "unet_norms.safetensors")
    for words in (("convert", "{}", "o.safetensors"), ("mix", "0.5*{}", "--out", "o.safetensors")):
        said = {}
        for name in ("n0", "both", "unet_norms"):
            line = [word.format(f"{name}.safetensors") for word in words]
            format = ("--to", "kohya") if words[0] == "convert" else ()
            call(*line, *format, "--model", "base", "--overwrite")
            said[name] = capsys.readouterr().err
        for name in ("n0", "both"):
            assert "scripts leave out changes of biases (1); ComfyUI leaves out" in said[name]
            assert "text encoders' norms (1)" in said[name] and "merge.py fold" in said[name]
        assert (
            "A1111 refuses the file" in said["n0"] and f"(1, such as unet.{TO_OUT})" in said["n0"]
        )
        assert "refuses" not in said["both"]
        assert "leave" not in said["unet_norms"]


def test_a_weight_of_zero_and_lengths_that_differ():
    states = [AdapterState(parameters={"unet": {"a.bias": torch.ones(n)}}) for n in (3, 4)]
    assert not weighted_parameters([Term(states[0], 0.0)])
    text = sentence(sum_parameters, [Term(state) for state in states])
    assert "unet.a.bias have 3 and 4 numbers" in text
