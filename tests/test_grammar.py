"""Keys of adapter files: forms that stand for each other, and bad tensors refused by name."""

import pytest
import torch
from torch import nn

from lora_core import formats
from lora_core.errors import UserError
from lora_core.formats import layout_of
from tests.adapter_examples import save_file, save_good_file


def test_linear_and_1x1_convolution_forms_stand_for_each_other(tmp_path):
    """SD 1.x writers disagree on proj_in: 2-D or 4-D; the layout decides."""
    net = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 1), "linear": nn.Linear(4, 6)})
    layout = layout_of({"unet": net})
    down, up = torch.randn(2, 4), torch.randn(6, 2)
    flat, deep = (
        {"down": down, "up": up},
        {"down": down[..., None, None], "up": up[..., None, None]},
    )
    for i, (conv, linear) in enumerate([(flat, deep), (deep, flat)]):
        tensors = {}
        for m, parts in (("conv", conv), ("linear", linear)):
            tensors |= {f"lora_unet_{m}.lora_{leaf}.weight": t for leaf, t in parts.items()}
        save_file(tensors, tmp_path / f"{i}.safetensors")
        read = formats.load(tmp_path / f"{i}.safetensors", layout).components["unet"]
        assert (
            read["conv"].down.shape == (2, 4, 1, 1)
            and read["conv"].up.shape == (6, 2, 1, 1)
            and read["linear"].down.shape == (2, 4)
        )
        assert (
            torch.equal(read["conv"].down.flatten(1), down)
            and torch.equal(read["linear"].up, up)
            and read["conv"].scale == 1.0
        )  # no alpha: 1


def bad_tensors(tensors):
    """(fault, tensors, expected sentence)"""
    name = "lora_unet_mid_block_attentions_0_proj_in"
    down, up, alpha = (f"{name}.{leaf}" for leaf in ("lora_down.weight", "lora_up.weight", "alpha"))
    return [
        (
            "leftover",
            tensors | {name + "x.lora_up.weight": tensors[up]},
            f"1 unknown key.s.: {name}x.lora_up.*nearest known: {name}",
        ),
        (
            "leftovers",
            tensors | {f"odd{i}": tensors[up] for i in range(5)},
            "5 unknown key.s.: odd0, odd1, odd2 and 2 more",
        ),
        (
            "no up",
            {k: t for k, t in tensors.items() if k != up},
            "mid_block.attentions.0.proj_in .* no up",
        ),
        ("no down", {k: t for k, t in tensors.items() if k != down}, "no down"),
        (
            "shape",
            tensors | {down: torch.ones(3, 9, 1, 1)},
            r"mid_block.attentions.0.proj_in .* down \[3, 9, 1, 1\] .* expected \[r, 16, 1, 1\]",
        ),
        ("ranks", tensors | {up: torch.ones(16, 4, 1, 1)}, r"up \[16, 4, 1, 1\]"),
        ("nan", tensors | {up: tensors[up] * float("nan")}, f"{up} .* NaN or Inf"),
        ("inf", tensors | {alpha: torch.tensor(float("inf"))}, f"{alpha} .* NaN or Inf"),
        ("two alphas", tensors | {alpha: torch.ones(2)}, "an alpha of shape"),
        ("quantised", tensors | {up: tensors[up].to(torch.int8)}, "int8, expected floating point"),
        (
            "columns",
            tensors | {f"{name}.dora_scale": torch.ones(1, 16, 1, 1)},
            "is a DoRA by columns; merge.py convert --as lora",
        ),
        (
            "no axis",
            tensors | {f"{name}.dora_scale": torch.ones(2, 1)},
            r"DoRA magnitude \[2, 1\], expected one number per output, \[16\]",
        ),
        (
            "twice",
            tensors | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())},
            "two tensors for the alpha",
        ),
        (
            "LoHa",
            tensors | {f"{name}.hada_w1_a": torch.ones(2, 2)},
            "is a LoHa update with a (down|up)",
        ),
    ]


@pytest.mark.parametrize("case", range(14))
def test_bad_tensors_are_refused_by_name(pipe, pipe_layout, tmp_path, case):
    _, tensors, expected = bad_tensors(save_good_file(tmp_path, pipe, pipe_layout))[case]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=expected) as error:
        formats.load(tmp_path / "bad.safetensors", pipe_layout)
    assert "bad.safetensors" in str(error.value) and "\n" not in str(error.value)
