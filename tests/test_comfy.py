"""ComfyUI's and XLabs' names, against kohya's tensors and diffusers' converter."""

import itertools

import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from safetensors.torch import load_file

from lora_core import formats
from lora_core.errors import UserError
from tests.adapter_checks import assert_equal_states
from tests.adapter_examples import flow_state, save_file


def test_comfyuis_names_of_fused_and_turned_layers(flow_layout, tmp_path):
    """The same tensors as kohya's, under dotted names; a swapped layer is not under our name."""
    state = flow_state(flow_layout, flow_layout.components["transformer"].shapes)
    kohya, comfy = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    formats.save(state, kohya, format="kohya", layout=flow_layout)
    part = formats.joined_layers.join_layout(flow_layout).components["transformer"]
    dotted = {
        ("lora_unet." + part.names.get(path, path)).replace(".", "_"): "diffusion_model."
        + part.names.get(path, path)
        for path in part.shapes
    }
    tensors = load_file(kohya)
    save_file(
        {
            dotted[key.split(".")[0]] + key[len(key.split(".")[0]) :]: tensor
            for key, tensor in tensors.items()
        },
        comfy,
    )
    assert_equal_states(formats.load(comfy, flow_layout), state)
    lr = state.components["transformer"]["norm_out.linear"]
    for module, expected in (
        ("lora_unet_norm_out_linear", lr.up),
        ("lora_unet_final_layer_adaLN_modulation_1", lr.up.roll(len(lr.up) // 2, 0)),
    ):
        file = save_file(
            {f"{module}.lora_down.weight": lr.down, f"{module}.lora_up.weight": lr.up},
            tmp_path / "c.safetensors",
        )
        assert torch.equal(
            formats.load(file, flow_layout).components["transformer"]["norm_out.linear"].up,
            expected,
        )
    twice = {}
    for module in ("lora_unet_norm_out_linear", "lora_unet_final_layer_adaLN_modulation_1"):
        twice |= {f"{module}.lora_down.weight": lr.down, f"{module}.lora_up.weight": lr.up}
    with pytest.raises(
        UserError, match=r"has norm_out.linear twice, alone and in final_layer.adaLN_modulation.1"
    ):
        formats.load(save_file(twice, tmp_path / "d.safetensors"), flow_layout)


@pytest.mark.parametrize("head", ["", "diffusion_model."])
def test_files_of_xlabs_are_read_as_diffusers_converts_them(flow_layout, tmp_path, head):
    width, tensors = 32, {}
    for i in range(2):
        for short, (inner, out) in {
            "qkv_lora1": (1, 3),
            "proj_lora1": (1, 1),
            "qkv_lora2": (1, 3),
            "proj_lora2": (1, 1),
        }.items():
            name = f"{head}double_blocks.{i}.processor.{short}"
            tensors |= {
                f"{name}.down.weight": torch.randn(2, inner * width),
                f"{name}.up.weight": torch.randn(out * width, 2),
            }
        for short, (inner, out) in {"qkv_lora": (1, 3), "proj_lora": (5, 1)}.items():
            name = f"{head}single_blocks.{i}.processor.{short}"
            tensors |= {
                f"{name}.down.weight": torch.randn(2, inner * width),
                f"{name}.up.weight": torch.randn(out * width, 2),
            }
    read = formats.load(save_file(tensors, tmp_path / "a.safetensors"), flow_layout).components[
        "transformer"
    ]
    theirs = lora_conversion_utils._convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    pairs = itertools.product(read, "AB")
    assert {f"transformer.{path}.lora_{x}.weight" for path, x in pairs} == set(theirs) and len(
        read
    ) == 2 * 8 + 2 * 4
    for path, lr in read.items():
        assert torch.equal(lr.down, theirs[f"transformer.{path}.lora_A.weight"]) and torch.equal(
            lr.up, theirs[f"transformer.{path}.lora_B.weight"]
        )
