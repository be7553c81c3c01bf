"""Sums of whole models, with adapters on top, and their conversion."""

import re

import torch

from lora_core.adapters.weight_updates import AdapterState
from lora_core.formats.model_folders import open_model_folder, weight_key
from merging import base_models
from merging.commands import FileReadOptions
from tests.merge_commands import call, summed


def test_models_add_up_with_adapters_on_top(here, states, layout, capsys):
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
        [(0.4, states["a"]), (0.5, AdapterState({"unet": states["b"].components["unet"]}))]
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
