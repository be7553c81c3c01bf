"""The processor of cross-attention against diffusers' own, formulas in float64, and by hand."""

import functools

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_core.adapters.injection import AdapterSpec, inject
from lora_core.cross_attention import (
    AttentionMap,
    Box,
    CrossAttention,
    Region,
    attention_on_tokens,
    attention_probabilities,
    cross_attention_paths,
    grid_size,
    pack_layers,
)
from lora_core.errors import UserError
from lora_core.family import Conditioning
from tests.tiny_pipeline import pipeline

PATHS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
]
TIMESTEP = torch.tensor([10, 500])


@pytest.fixture
def unet():
    return pipeline().unet.requires_grad_(False)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def embeds(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed))


def run(unet, x: Tensor, text: Tensor) -> Tensor:
    return unet(x, TIMESTEP, encoder_hidden_states=text).sample


def test_layers_are_counted_down_middle_up(unet) -> None:
    """Mix-of-Show's order; `named_modules` has the middle block last."""
    keys = [name for name, _ in unet.named_modules() if name.endswith("attn2.to_k")]
    assert list(cross_attention_paths(keys)) == PATHS
    assert [name.removesuffix(".to_k") for name in keys] != PATHS


def test_without_requests_it_is_diffusers_to_the_bit(unet, noise: Tensor) -> None:
    text = embeds(2, 16)
    theirs = run(unet, noise, text)
    CrossAttention(unet, PATHS)
    assert torch.equal(run(unet, noise, text), theirs)


class OneText:
    """diffusers' processor, reading a text of its own: per-layer conditioning done by hand."""

    def __init__(self, text: Tensor) -> None:
        self.text, self.inner = text, AttnProcessor2_0()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return self.inner(attn, hidden_states, self.text, attention_mask)


@pytest.mark.parametrize("with_lora", [False, True])
def test_each_layer_reads_its_own_text(unet, noise: Tensor, with_lora: bool) -> None:
    if with_lora:
        inject(unet, AdapterSpec(("*attn?.to_*",), rank=2))
        for name, parameter in unet.named_parameters():
            if name.endswith(".up"):
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    text = embeds(2, 4, 16)
    for index, path in enumerate(PATHS):
        unet.get_submodule(path).set_processor(OneText(text[:, index]))
    by_hand = run(unet, noise, text[:, 0])
    CrossAttention(unet, PATHS)
    ours = run(unet, noise, text)
    assert torch.equal(ours, by_hand)
    assert (ours - run(unet, noise, text[:, 0])).abs().max() > 1e-4


def test_sixteen_layers_of_stable_diffusion_read_sixteen_texts() -> None:
    """SD 1.5's blocks, narrow: one call equals a UNet whose processors hold their texts, in the
    order in which Mix-of-Show walks over the blocks.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16, 16), norm_num_groups=4,
        cross_attention_dim=16, attention_head_dim=4,
    ).requires_grad_(False)  # fmt: skip
    text = embeds(1, 16, 7)
    walk = []
    for block in ("down_blocks", "mid_block", "up_blocks"):
        inside = unet.get_submodule(block).named_modules(prefix=block)
        walk += [name for name, _ in inside if name.endswith(".attn2")]
    assert len(walk) == 16
    for index, path in enumerate(walk):
        unet.get_submodule(path).set_processor(OneText(text[:, index]))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([300])
    by_hand = unet(x, t, encoder_hidden_states=text[:, 0]).sample
    keys = [name for name, _ in unet.named_modules() if name.endswith("attn2.to_k")]
    CrossAttention(unet, cross_attention_paths(keys))
    assert torch.equal(unet(x, t, encoder_hidden_states=text).sample, by_hand)


def test_equal_texts_in_all_layers_are_one_text(unet, noise: Tensor) -> None:
    CrossAttention(unet, PATHS)
    text = embeds(2, 16)
    wide = text[:, None].expand(-1, 4, -1, -1)
    assert torch.equal(run(unet, noise, wide), run(unet, noise, text))


def test_packed_texts_are_the_same_texts(unet, noise: Tensor) -> None:
    """diffusers' pipelines take three axes; a long plain text is not taken for a packed one."""
    CrossAttention(unet, PATHS)
    text = embeds(2, 4, 7)
    packed = pack_layers(text)
    assert packed.shape == (2, 7, 4 * 16)
    assert torch.equal(packed[1, 3, 32:48], text[1, 2, 3])
    assert torch.equal(run(unet, noise, packed), run(unet, noise, text))
    assert torch.isfinite(run(unet, noise, embeds(2, 4 * 16))).all()


def recorded(unet, x: Tensor, text: Tensor) -> tuple[Tensor, list[AttentionMap]]:
    shared = CrossAttention(unet, PATHS)
    maps: list[AttentionMap] = []
    with shared.forward_pass((8, 8), (), maps):
        out = run(unet, x, text)
    assert all(layer.queries is None for layer in shared.layers.values())
    return out, maps


def test_maps_have_layers_sizes_and_gradients_in_one_pass(unet, noise: Tensor) -> None:
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    text = embeds(2, 16).requires_grad_()
    _, maps = recorded(unet, noise, text)
    assert len(calls) == 1 and [m.name for m in maps] == PATHS
    assert [(m.h, m.w) for m in maps] == [(8, 8), (4, 4), (8, 8), (8, 8)]
    assert all(m.probabilities.shape == (2, 4, m.h * m.w, 16) for m in maps)
    for m in maps:
        assert torch.allclose(m.probabilities.sum(-1), torch.ones(()), atol=1e-5)
    (gradient,) = torch.autograd.grad(maps[1].probabilities[..., 3].sum(), text)
    assert gradient.abs().max() > 0


def test_probabilities_are_fp32_under_autocast() -> None:
    q, k = 4 * torch.randn(1, 2, 9, 8), 4 * torch.randn(1, 2, 7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_probabilities(q.bfloat16(), k.bfloat16())
    scores = q.bfloat16().double() @ k.bfloat16().double().mT / 8**0.5
    torch.testing.assert_close(found, scores.softmax(-1).float(), rtol=1e-4, atol=1e-6)


def test_attention_on_tokens_is_their_sum_averaged_over_heads_and_layers() -> None:
    """Against loops over examples, layers and tokens, in float64."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for side in (8, 4):
        scores = torch.randn(3, 2, side * side, 7, generator=generator, dtype=torch.float64)
        maps.append(AttentionMap("a", scores.softmax(-1), side, side))
    positions = torch.tensor([[1, 2], [6, -1], [-1, -1]])
    ours = attention_on_tokens(maps, positions, (8, 8))
    for i, tokens in enumerate([[1, 2], [6], []]):
        wanted = torch.zeros(8, 8, dtype=torch.float64)
        for m in maps:
            for token in tokens:
                grid = m.probabilities[i, :, :, token].mean(0).view(1, 1, m.h, m.w)
                wanted += torch.nn.functional.interpolate(grid, (8, 8), mode="bilinear")[0, 0] / 2
        assert torch.allclose(ours[i], wanted, atol=1e-12)
    uniform = [AttentionMap("a", torch.full((1, 2, 64, 7), 1 / 7), 8, 8)]
    assert torch.allclose(
        attention_on_tokens(uniform, torch.tensor([[0, 3]]), (16, 16)), torch.tensor(2 / 7)
    )


def test_gradient_checkpointing_changes_no_gradient(unet, noise: Tensor) -> None:
    def gradient() -> tuple[Tensor, ...]:
        text = embeds(2, 16).requires_grad_()
        out, maps = recorded(unet, noise, text)
        total = out.square().mean() + sum(m.probabilities.square().mean() for m in maps)
        return torch.autograd.grad(total, text)

    plain = gradient()
    unet.train()
    unet.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False))
    assert torch.equal(gradient()[0], plain[0])


def by_formula(attn, x: Tensor, text: Tensor, regions: list[Region], size) -> Tensor:
    """Mix-of-Show's rule in float64: attention to the context's text, replaced inside boxes."""

    def attend(rows: Tensor, own: Tensor) -> Tensor:
        weights = {n: getattr(attn, n).weight.double() for n in ("to_q", "to_k", "to_v")}
        q, k, v = (
            (y.double() @ weights[n].T).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for n, y in (("to_q", rows), ("to_k", own), ("to_v", own))
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return (scores @ v).transpose(1, 2).flatten(2)

    height, width = size
    context = attend(x, text).unflatten(1, size)
    total, count = torch.zeros_like(context), torch.zeros(height, width)
    for box, own in regions:
        inside = attend(x, own).unflatten(1, size)
        for row in range(height):
            for column in range(width):
                fits = box.left * width <= column and column + 1 <= box.right * width
                if fits and box.top * height <= row and row + 1 <= box.bottom * height:
                    total[:, row, column] += inside[:, row, column]
                    count[row, column] += 1
    mixed = torch.where(
        count[..., None] > 0, total / count.clamp(min=1)[..., None].double(), context
    ).flatten(1, 2)
    out = attn.to_out[0]
    return mixed @ out.weight.double().T + out.bias.double()


@pytest.mark.parametrize("layers", [0, 4])
def test_regions_replace_the_output_inside_their_boxes(unet, layers: int) -> None:
    """Two boxes that overlap, one of which cuts through cells, and an odd grid."""
    shared = CrossAttention(unet, PATHS)
    attn = unet.get_submodule(PATHS[0])
    shape = (2, layers, 5) if layers else (2, 5)
    text, left, right = (embeds(*shape, seed=seed) for seed in (4, 5, 6))
    regions = [Region(Box(0.0, 0.0, 0.6, 1.0), left), Region(Box(0.4, 0.2, 1.0, 0.75), right)]
    size = (6, 9)
    x = torch.randn(2, 54, 8, generator=torch.Generator().manual_seed(7))
    with shared.forward_pass(size, regions, None):
        ours = attn(x, encoder_hidden_states=text)
        shared.unused.clear()
    own = [t[:, 0] if layers else t for t in (text, left, right)]
    plain = [Region(r.box, t) for r, t in zip(regions, own[1:])]
    assert torch.allclose(ours.double(), by_formula(attn, x, own[0], plain, size), atol=1e-6)


def test_a_region_over_the_whole_image_is_its_prompt(unet, noise: Tensor) -> None:
    shared = CrossAttention(unet, PATHS)
    text, other = embeds(2, 16), embeds(2, 16, seed=8)
    with shared.forward_pass((8, 8), [Region(Box(0, 0, 1, 1), other)], None):
        ours = run(unet, noise, text)
    assert torch.allclose(ours, run(unet, noise, other), atol=1e-6)
    assert not shared.regions


def test_a_region_smaller_than_a_cell_is_refused(unet, noise: Tensor) -> None:
    shared = CrossAttention(unet, PATHS)
    small = Region(Box(0.01, 0.01, 0.1, 0.1), embeds(2, 16))
    with (
        pytest.raises(UserError, match="no whole cell of any attention layer"),
        shared.forward_pass((8, 8), [small], None),
    ):
        run(unet, noise, embeds(2, 16))


def test_cells_of_thirds_are_not_moved_by_rounding() -> None:
    third = Box(1 / 3, 0, 2 / 3, 1)
    assert third.cells(1, 12) == (slice(0, 1), slice(4, 8))
    assert Box(0.1, 0.1, 0.9, 0.9).cells(10, 4) == (slice(1, 9), slice(1, 3))


def test_the_grid_is_the_latents_halved_with_odd_sides_rounded_up() -> None:
    assert [grid_size((9, 13), n) for n in (117, 35, 12, 4)] == [(9, 13), (5, 7), (3, 4), (2, 2)]
    with pytest.raises(UserError, match="no halving"):
        grid_size((8, 8), 30)


def test_conditionings_of_layers_and_plain_ones_stand_in_one_batch() -> None:
    plain, layered = Conditioning(embeds(1, 5)), Conditioning(embeds(2, 3, 5))
    both = Conditioning.cat([plain, layered])
    assert both.prompt_embeds.shape == (3, 3, 5, 16)
    assert torch.equal(both.prompt_embeds[0, 2], plain.prompt_embeds[0])
    assert torch.equal(both.rows(slice(1, 3)).prompt_embeds, layered.prompt_embeds)
    box = Box(0, 0, 0.5, 1)
    parts = [Conditioning(embeds(1, 5), {}, (Region(box, embeds(1, 5, seed=i)),)) for i in (1, 2)]
    region = Conditioning.cat(parts).regions[0]
    assert region.box == box and region.prompt_embeds.shape == (2, 5, 16)
