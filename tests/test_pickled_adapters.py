"""Adapters in files of torch.save: named tensors are read as from safetensors."""

import pytest
import torch

from lora_core import formats
from lora_core.errors import UserError
from tests.adapter_checks import assert_equal_states
from tests.adapter_examples import respelled
from tests.merge_commands import call
from tests.tiny_pipeline import random_state


def test_a_state_dict_of_torch_save_is_read_without_executing_it(pipe, pipe_layout, tmp_path):
    state = random_state(pipe, scale=1.0)
    torch.save(respelled(state, "A B"), tmp_path / "pytorch_lora_weights.bin")
    assert_equal_states(formats.load(tmp_path / "pytorch_lora_weights.bin", pipe_layout), state)
    torch.save(
        {"state_dict": respelled(state, "A B")},
        tmp_path / "old.ckpt",
        _use_new_zipfile_serialization=False,
    )
    assert_equal_states(formats.load(tmp_path / "old.ckpt", pipe_layout), state)


LINEAR = {"linear.0.weight": torch.ones(2, 2), "linear.0.bias": torch.ones(2)}
HYPERNETWORK = {768: (LINEAR, LINEAR), "step": 10, "layer_structure": [1, 2, 1]}
IP_ADAPTER = {
    "image_proj": {"proj.weight": torch.ones(2, 2)},
    "ip_adapter": {"1.to_k_ip.weight": torch.ones(2, 2)},
}


@pytest.mark.parametrize(
    ("content", "name", "what"),
    [
        (HYPERNETWORK, "h.pt", "is a hypernetwork of A1111's"),
        (IP_ADAPTER, "i.bin", "is an IP-Adapter"),
        ({"state_dict": IP_ADAPTER}, "i.ckpt", "is an IP-Adapter"),
        ({"control_model.zero_convs.0.0.weight": torch.ones(2, 2)}, "c.pth", "is a ControlNet"),
    ],
)
def test_other_networks_in_pickles_are_refused_by_their_name(
    tmp_path, monkeypatch, capsys, content, name, what
):
    monkeypatch.chdir(tmp_path)
    torch.save(content, name)
    for words in (("info", name), ("convert", name, "o.safetensors"), ("mix", name, "o.pt")):
        call(*words, status=2)
        assert f"error: {name} {what}" in capsys.readouterr().err
    with pytest.raises(UserError, match=what):
        formats.load(name)
