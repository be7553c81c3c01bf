"""Norms and biases of a network in memory: changed at a strength, added up, and put back."""

import pytest
import torch
from torch import nn
from torch.nn.functional import group_norm, layer_norm

import infer
from lora_core import patch
from lora_core.adapters.changed_parameters import (
    add_changes,
    names_of_changes,
    remove_changes,
    set_change_strength,
)
from lora_core.formats import layout_of
from tests.norm_files import NORM, TEXT_NORM, TO_OUT, norm_changes, save_changes
from tests.refusals import sentence
from tests.tiny_pipeline import pipeline, save_sd_pipeline


def small_network():
    torch.manual_seed(0)
    return nn.ModuleDict({"norm": nn.LayerNorm(5), "layer": nn.Linear(5, 3)}).half()


def test_changes_add_up_and_come_off_in_any_order():
    network = small_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    first = {"norm.weight": torch.randn(5, generator=generator)}
    second = {key: torch.randn(len(before[key]), generator=generator) for key in before}
    second = {key: change for key, change in second.items() if before[key].ndim == 1}
    add_changes(network, first, "a", 0.5)
    add_changes(network, second, "b", -2.0)
    exact = before["norm.weight"].float() + 0.5 * first["norm.weight"] - 2 * second["norm.weight"]
    assert torch.equal(network["norm"].weight, exact.half())  # rounded once
    assert names_of_changes(network) == {"a", "b"}
    set_change_strength(network, "b", 0.0)
    remove_changes(network, "a")
    after = network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    set_change_strength(network, "b", 1.0)
    bias = (before["layer.bias"].float() + second["layer.bias"]).half()
    assert torch.equal(network["layer"].bias, bias)
    remove_changes(network, "b")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not names_of_changes(network)


@pytest.mark.parametrize("path", ["norm.weight", "nothing.bias", "layer.weights"])
def test_a_change_that_does_not_fit_changes_nothing(path):
    network = small_network()
    good = {"layer.bias": torch.ones(3)}
    before = network["layer"].bias.clone()
    assert "is it for another model?" in sentence(
        add_changes, network, good | {path: torch.ones(4)}, "a", 1.0
    )
    assert torch.equal(network["layer"].bias, before) and not names_of_changes(network)


@torch.no_grad()
def test_a_patch_changes_norms_and_biases_as_lycoris_defines_it(tmp_path):
    """Their outputs are those of the functions with weight + s * w_norm and bias + s * b_norm."""
    pipe = pipeline()
    modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    layout = layout_of(modules)
    changes = norm_changes(pipe.unet, pipe.text_encoder)
    save_changes(changes, tmp_path / "a.safetensors")
    before = {name: dict(module.state_dict()) for name, module in modules.items()}
    kept = {name: {key: t.clone() for key, t in own.items()} for name, own in before.items()}
    norm, out = pipe.unet.get_submodule(NORM), pipe.unet.get_submodule(TO_OUT)
    x = torch.randn(2, norm.num_channels, 3, 5, generator=torch.Generator().manual_seed(1))
    y = torch.randn(4, out.in_features, generator=torch.Generator().manual_seed(2))
    plain = out(y)
    with patch(modules, tmp_path / "a.safetensors", 0.25, layout=layout) as applied:
        assert sorted(applied.adapted) == ["text_encoder", "unet"]
        weight = kept["unet"][f"{NORM}.weight"] + 0.25 * changes["unet", f"{NORM}.weight"]
        bias = kept["unet"][f"{NORM}.bias"] + 0.25 * changes["unet", f"{NORM}.bias"]
        expected = group_norm(x, norm.num_groups, weight, bias, norm.eps)
        torch.testing.assert_close(norm(x), expected)
        applied.set_strength({"unet": 2.0, "text_encoder": 1.0})
        moved = plain + 2 * changes["unet", f"{TO_OUT}.bias"]
        torch.testing.assert_close(out(y), moved)
        inner = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
        final = inner.final_layer_norm
        z = torch.randn(3, final.normalized_shape[0], generator=torch.Generator().manual_seed(3))
        prefix = layout.components["text_encoder"].module_prefix
        key = f"{TEXT_NORM}.weight".removeprefix(prefix)
        weight = kept["text_encoder"][key] + changes["text_encoder", f"{TEXT_NORM}.weight"]
        bias = kept["text_encoder"][key.replace("weight", "bias")]
        bias = bias + changes["text_encoder", f"{TEXT_NORM}.bias"]
        expected = layer_norm(z, final.normalized_shape, weight, bias, final.eps)
        torch.testing.assert_close(final(z), expected)
    for name, module in modules.items():
        after = module.state_dict()
        assert all(torch.equal(after[key], value) for key, value in kept[name].items())


def test_infer_draws_with_the_changes_and_without_them_at_strength_0(tmp_path):
    pipe = save_sd_pipeline(tmp_path / "model")
    save_changes(norm_changes(pipe.unet, pipe.text_encoder), tmp_path / "a.safetensors")

    def draw(name, *words):
        out = tmp_path / f"{name}.png"
        flags = ["--model", tmp_path / "model", "--prompt", "a", "--steps", "2", "--seed", "3"]
        assert infer.main([str(word) for word in (*flags, "--out", out, *words)]) == 0
        return pixels(out)

    plain = draw("plain")
    assert draw("zero", "--lora", f"{tmp_path / 'a.safetensors'}:0") == plain
    full = draw("full", "--lora", tmp_path / "a.safetensors")
    text = draw("text", "--lora", f"{tmp_path / 'a.safetensors'}:unet=0,text=1")
    assert len({plain, full, text}) == 3


def pixels(path):
    from PIL import Image

    return Image.open(path).tobytes()
