"""Names of FLUX.2's original code: diffusers' own conversion undoes them."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

from models.flux2_names import original_flux2_names
from tests.original_weights import assert_stored_once, fill_randomly, module_paths, original_weights


@pytest.mark.parametrize("guidance", [True, False])
def test_diffusers_converts_the_original_names_back(guidance):
    network = Flux2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    )
    weights = fill_randomly(network).state_dict()
    paths = module_paths(network)
    fields = original_flux2_names(paths)
    assert_stored_once(paths, fields)
    stored = original_weights(weights, fields, norm="scale")
    assert ("guidance_in.in_layer.weight" in stored) is guidance
    read = convert_flux2_transformer_checkpoint_to_diffusers(stored)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[key], weights[key]) for key in weights)
