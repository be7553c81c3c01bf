"""merge.py fold: weights plus updates, rounded once, in every form of a model."""

import pytest
import torch

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.formats.model_folders import open_model_folder, weight_key
from merging import base_models
from merging.commands import FileReadOptions
from tests.adapter_checks import header
from tests.merge_commands import SQUARE, call, summed


@pytest.mark.parametrize("out", ["merged", "merged.safetensors", "merged.ckpt"])
def test_a_fold_is_the_sum_of_weights(here, states, layout, out):
    call("fold", "base", "0.7*a.safetensors - 0.2*b.safetensors@unet", out)
    folded = base_models.open_base_model(
        out, FileReadOptions(model_config="" if out == "merged" else "base")
    )
    before = open_model_folder("base")
    wished = summed(
        [(0.7, states["a"]), (-0.2, AdapterState({"unet": states["b"].components["unet"]}))]
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


def test_rounding_is_reported_and_the_residual_saved(here, states, layout, capsys):
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


def test_the_shape_of_an_adapter_must_fit(here, layout, capsys):
    state = AdapterState({"unet": {SQUARE: LowRank(torch.ones(1, 9), torch.ones(8, 1), 1.0)}})
    formats.save(state, "wrong.safetensors", format="diffusers")
    call("fold", "base", "wrong.safetensors", "o", status=2)
    call("mix", "a.safetensors + wrong.safetensors", "--out", "o.safetensors", status=2)
    said = capsys.readouterr().err
    assert said.count(SQUARE) >= 2
