"""Adapters in files of torch.save: named tensors are read as from safetensors."""

import torch

from lora_core import formats
from tests.adapter_checks import assert_equal_states
from tests.adapter_examples import respelled
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
