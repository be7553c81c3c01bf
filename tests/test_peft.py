"""peft's own files: the network that nameless keys belong to."""

import json

import pytest
import torch
from torch import nn

from lora_core import formats
from lora_core.errors import UserError
from lora_core.formats import layout_of
from tests.adapter_examples import save_file


def test_peft_finds_its_network_by_paths_then_shapes_then_the_folders_name(tmp_path, capsys):
    small, large, equal = (
        nn.ModuleDict({"encoder": nn.ModuleDict({"fc1": nn.Linear(n, 4)})}) for n in (6, 8, 8)
    )
    layout = layout_of(
        {
            "unet": nn.ModuleDict({"conv": nn.Conv2d(4, 6, 1)}),
            "text_encoder": small,
            "text_encoder_2": large,
            "text_encoder_3": equal,
        }
    )
    for inner, expected in ((6, "text_encoder"), (8, "text_encoder_2")):
        tensors = {
            "base_model.model.encoder.fc1.lora_A.weight": torch.ones(1, inner),
            "base_model.model.encoder.fc1.lora_B.weight": torch.ones(4, 1),
        }
        file = save_file(tensors, tmp_path / "adapter_model.safetensors")
        if inner == 6:
            assert list(formats.load(file, layout).components) == [expected]
            assert (
                "no adapter_config.json next to it; its strength is taken as alpha = r"
                in capsys.readouterr().err
            )
        else:
            with pytest.raises(
                UserError,
                match="fits text_encoder_2 and text_encoder_3 alike; "
                "put it into a folder called like",
            ):
                formats.load(file, layout)
    (tmp_path / "pipe" / "text_encoder_3").mkdir(parents=True)
    (tmp_path / "pipe" / "unet").mkdir()
    (tmp_path / "pipe" / "text_encoder_3" / "adapter_config.json").write_text(
        json.dumps({"r": 1, "lora_alpha": 3})
    )
    file.rename(tmp_path / "pipe" / "text_encoder_3" / file.name)
    (tmp_path / "pipe" / "unet" / "adapter_config.json").write_text(
        json.dumps({"r": 2, "lora_alpha": 3})
    )
    factors = {
        "base_model.model.conv.lora_A.weight": torch.ones(2, 4, 1, 1),
        "base_model.model.conv.lora_B.weight": torch.ones(6, 2, 1, 1),
    }
    save_file(factors, tmp_path / "pipe" / "unet" / file.name)
    read = formats.load(tmp_path / "pipe", layout).components
    assert {name: [lr.scale for lr in modules.values()] for name, modules in read.items()} == {
        "unet": [1.5],
        "text_encoder_3": [3.0],
    }
