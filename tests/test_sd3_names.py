"""Names of Stable Diffusion 3's original code: diffusers' own conversion undoes them."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from models.sd3_names import original_sd3_names
from tests.original_weights import assert_stored_once, fill_randomly, module_paths, original_weights

VARIANTS = {  # keyword arguments of the transformer
    "3": {},
    "3.5 medium": dict(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
    "3.5 large": dict(qk_norm="rms_norm"),
}


def sd3_transformer(layers, **options):
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=layers,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        **options,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_converts_the_original_names_back(variant):
    network = fill_randomly(sd3_transformer(3, **VARIANTS[variant]))
    weights = network.state_dict()
    paths = module_paths(network)
    fields = original_sd3_names(paths)
    assert_stored_once(paths, fields)
    stored = original_weights(weights, fields) | {"pos_embed": weights["pos_embed.pos_embed"]}
    read = convert_sd3_transformer_checkpoint_to_diffusers(stored)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[key], weights[key]) for key in weights)


@pytest.mark.parametrize(("layers", "dual", "count"), [(24, 0, 237), (24, 13, 263), (38, 0, 377)])
def test_the_blocks_have_as_many_layers_as_sd_scripts_adapts(layers, dual, count):
    """It wraps every Linear of a block: five of the image, five of the text, two in the last block,
    and two of a second attention.
    """
    paths = module_paths(sd3_transformer(layers, dual_attention_layers=tuple(range(dual))))
    fields = original_sd3_names([path for path in paths if path.startswith("transformer_blocks.")])
    assert len(fields["names"]) + len(fields["fused"]) == count


def test_the_last_modulation_of_the_text_is_swapped():
    fields = original_sd3_names(module_paths(sd3_transformer(12)))
    assert fields["swapped"] == {"norm_out.linear", "transformer_blocks.11.norm1_context.linear"}
