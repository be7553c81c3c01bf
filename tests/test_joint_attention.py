"""Attention of text and image to each other: diffusers' numbers, and maps by its own functions."""

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from lora_core.cross_attention import AttentionMap
from lora_core.family import LoadOptions, Sizes
from models import load_family
from tests import tiny_flux, tiny_sd3


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


def joined_heads(m, kind: str, given: dict) -> Tensor:
    """Rotated queries or keys [b, heads, s + h w, d] of a module, by diffusers' own functions."""
    image = getattr(m, f"to_{kind}")(given["hidden_states"]).unflatten(-1, (2, 16))
    both = getattr(m, f"norm_{kind}")(image)
    if "encoder_hidden_states" in given:
        text = getattr(m, f"add_{kind}_proj")(given["encoder_hidden_states"])
        text = getattr(m, f"norm_added_{kind}")(text.unflatten(-1, (2, 16)))
        both = torch.cat([text, both], dim=1)
    return apply_rotary_emb(both, given["image_rotary_emb"], sequence_dim=1).transpose(1, 2)


def test_maps_are_the_probabilities_of_all_blocks(family) -> None:
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
    assert [m.name for m in maps] == list(blocks)
    kinds = {name.split(".")[0] for name in blocks}
    assert kinds == {"transformer_blocks", "single_transformer_blocks"} and len(maps) == 4
    for m in maps:
        block = blocks[m.name]
        q, k = (joined_heads(block, kind, seen[block]) for kind in "qk")
        expected = (q @ k.transpose(-1, -2) / 4).softmax(-1)[:, :, 24:, :24]
        assert m.probabilities.shape == (2, 2, 3 * 4, 24) and (m.h, m.w) == (3, 4)
        assert torch.allclose(m.probabilities, expected, atol=1e-6)
        assert (m.probabilities.sum(-1) < 1).all()


# ---------------------------------------------------------------- Stable Diffusion 3


@pytest.mark.parametrize("variant", tiny_sd3.VARIANTS)
def test_the_processor_of_sd3_is_diffusers(variant: str, tmp_path: Path) -> None:
    """But for the order of sums: there the image comes before the text."""
    tiny_sd3.save(tmp_path / "m", variant=variant)
    sd3 = load_family(str(tmp_path / "m"), LoadOptions(max_sequence_length=20))
    assert len(sd3.joint_attention) == tiny_sd3.BLOCKS  # none of the image's own attention
    given = inputs(sd3)
    ours = sd3.denoise(*given)
    for path in sd3.joint_attention:
        sd3.transformer.get_submodule(path).set_processor(JointAttnProcessor2_0())
    theirs = sd3.denoise(*given)
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_maps_of_sd3_are_on_clips_tokens_then_on_t5s(tmp_path: Path) -> None:
    tiny_sd3.save(tmp_path / "m")
    sd3 = load_family(str(tmp_path / "m"), LoadOptions(max_sequence_length=20))
    seen: dict = {}
    path = "transformer_blocks.1.attn"
    block = sd3.transformer.get_submodule(path)
    hook = block.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    maps: list[AttentionMap] = []
    x, level, cond = inputs(sd3)
    sd3.denoise(x, level, cond, maps=maps)
    hook.remove()
    assert [m.name for m in maps] == list(sd3.joint_attention)
    found = next(m for m in maps if m.name == path)
    both = {}
    for kind in "qk":
        image = getattr(block, f"to_{kind}")(seen["hidden_states"]).unflatten(-1, (2, 16))
        text = getattr(block, f"add_{kind}_proj")(seen["encoder_hidden_states"])
        image = getattr(block, f"norm_{kind}")(image)
        text = getattr(block, f"norm_added_{kind}")(text.unflatten(-1, (2, 16)))
        both[kind] = torch.cat([image, text], dim=1).transpose(1, 2)
    weights = (both["q"] @ both["k"].transpose(-1, -2) / 4).softmax(-1)
    positions = found.h * found.w
    assert torch.allclose(found.probabilities, weights[:, :, :positions, positions:], atol=1e-6)
    assert found.probabilities.shape[-1] == 16 + 20
