"""How few frames of Python an adapted layer takes."""

import pytest
import torch
from torch import nn

from benchmarks import host_time
from lora_core.adapters.injection import AdapterSpec, inject, set_strength


@pytest.mark.parametrize("width", [64, 256])  # a merged weight; two products
def test_a_lora_linear_takes_ten_frames_in_three_files(width: int) -> None:
    """Every Python frame of ours in one forward on a CPU, the autograd function's included."""
    model = nn.Sequential(nn.Linear(width, width)).requires_grad_(False)
    inject(model, AdapterSpec(targets=("*",), rank=4))
    x = torch.randn(5, width).requires_grad_()
    for strength in (1.0, 0.5):
        set_strength(model, "default", strength)
        frames, files = host_time.count_frames(model, x, host_time.FOLDERS["ours"])
        assert 0 < frames <= 10 and files <= 3


def test_a_disabled_layer_is_one_frame() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, AdapterSpec(targets=("*",), rank=4))
    model[0].enabled = False
    assert host_time.count_frames(model, torch.randn(5, 8), host_time.FOLDERS["ours"]) == (1, 1)
