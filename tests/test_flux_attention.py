"""Attention of Flux's double blocks: diffusers' bits, and maps against its own functions."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from lora_core.cross_attention import AttentionMap
from lora_core.family import LoadOptions, Sizes
from models import load_family
from tests import tiny_flux


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("dev")
    tiny_flux.save(folder)
    return load_family(str(folder), LoadOptions(max_sequence_length=24))


def inputs(family) -> tuple:
    cond = family.add_size_embeddings(
        family.encode_prompts(["a cat", "dog"]), Sizes.uncropped(16, 24, 2), 3.5
    )
    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    return x, family.schedule.level(torch.tensor([0.3, 0.8])), cond


def test_the_processor_is_diffusers_to_the_bit(family) -> None:
    ours = family.denoise(*inputs(family))
    for path, processor in family.joint_attention.items():
        family.transformer.get_submodule(path).set_processor(FluxAttnProcessor())
        theirs = family.denoise(*inputs(family))
        family.transformer.get_submodule(path).set_processor(processor)
        assert torch.equal(ours, theirs)


def test_maps_are_the_probabilities_of_the_double_blocks(family) -> None:
    """In one pass, of the image's positions on the text; what is left of 1 is on the image."""
    seen: dict = {}
    blocks = {path: family.transformer.get_submodule(path) for path in family.joint_attention}
    hooks = []
    for block in blocks.values():
        hooks.append(
            block.register_forward_pre_hook(
                lambda m, args, kwargs: seen.update({m: kwargs}), with_kwargs=True
            )
        )
    maps: list[AttentionMap] = []
    x, level, cond = inputs(family)
    plain = family.denoise(x, level, cond)
    assert torch.equal(family.denoise(x, level, cond, maps=maps), plain)
    for hook in hooks:
        hook.remove()
    assert [m.layer for m in maps] == list(blocks) and len(maps) == 2

    def joined(m, kind: str, given: dict) -> Tensor:
        text, image = given["encoder_hidden_states"], given["hidden_states"]
        added = getattr(m, f"add_{kind}_proj")(text).unflatten(-1, (2, 16))
        own = getattr(m, f"to_{kind}")(image).unflatten(-1, (2, 16))
        norms = getattr(m, f"norm_added_{kind}"), getattr(m, f"norm_{kind}")
        both = torch.cat([norms[0](added), norms[1](own)], dim=1)
        return apply_rotary_emb(both, given["image_rotary_emb"], sequence_dim=1).transpose(1, 2)

    for m in maps:
        given = seen[blocks[m.layer]]
        q, k = (joined(blocks[m.layer], kind, given) for kind in "qk")
        expected = (q @ k.transpose(-1, -2) / 4).softmax(-1)[:, :, 24:, :24]
        assert m.probabilities.shape == (2, 2, 3, 4, 24)
        assert torch.allclose(m.probabilities.flatten(2, 3), expected, atol=1e-6)
        assert (m.probabilities.sum(-1) < 1).all()
