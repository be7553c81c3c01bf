"""Attention regularization against Mix-of-Show's formula, in float64 and written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.cross_attention import AttentionMap
from lora_core.diffusion.attention_losses import attention_outside, mixofshow_regularization
from lora_core.diffusion.losses import LOSSES, add_preservation
from lora_core.diffusion.noise import NoiseLevel
from lora_core.diffusion.step_output import StepOutput
from lora_core.errors import UserError
from lora_core.plugins import bind_arguments

GRIDS = (16, 8, 8, 4)


def maps(b: int = 2, *, seed: int = 0) -> list[AttentionMap]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, side in enumerate(GRIDS):
        scores = torch.randn(b, 3, side * side, 9, generator=generator, dtype=torch.float64)
        found.append(AttentionMap(str(i), scores.softmax(-1).requires_grad_(), side, side))
    return found


def corner(b: int = 2) -> Tensor:
    mask = torch.zeros(b, 1, 16, 16, dtype=torch.float64)
    mask[:, :, :7, 3:] = 1
    return mask


POSITIONS = torch.tensor([[3, 4], [5, 8]])


@pytest.mark.parametrize("full_identity", [True, False])
def test_the_sources_formula(full_identity: bool) -> None:
    recorded, mask = maps(), corner()
    total = torch.zeros((), dtype=torch.float64)
    for side in sorted(set(GRIDS)):
        heads = [m.probabilities for m in recorded if m.h == side]
        mean = torch.cat(heads, 1).mean(1).unflatten(1, (side, side))
        adjective = torch.stack([mean[i, ..., POSITIONS[i, 0]] for i in range(2)])
        subject = torch.stack([mean[i, ..., POSITIONS[i, 1]] for i in range(2)])
        adjective, subject = adjective / adjective.max(), subject / subject.max()
        target = F.interpolate(mask, (side, side), mode="nearest")[:, 0]
        outside = subject[target == 0].mean()
        total += F.mse_loss(subject, target) if full_identity else outside
        total += adjective[target == 0].mean()
    ours = mixofshow_regularization(recorded, POSITIONS, mask, full_identity=full_identity)
    torch.testing.assert_close(ours, total, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(total, [m.probabilities for m in recorded])
    found = torch.autograd.grad(ours, [m.probabilities for m in recorded])
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-18)


def test_a_mask_of_ones_leaves_the_term_out_without_nan() -> None:
    recorded = maps()
    ours = mixofshow_regularization(
        recorded, POSITIONS, torch.ones_like(corner()), full_identity=True
    )
    assert ours == 0
    for gradient in torch.autograd.grad(ours, [m.probabilities for m in recorded]):
        assert not gradient.any()


@pytest.mark.parametrize("formula", [mixofshow_regularization, attention_outside])
def test_examples_without_learned_tokens_do_not_count(formula) -> None:
    alone = formula(maps()[:1], POSITIONS, corner(), full_identity=False)
    first = maps()[0]
    both = [first._replace(probabilities=torch.cat([first.probabilities] * 2))]
    positions = torch.cat([POSITIONS, torch.full_like(POSITIONS, -1)])
    ours = formula(both, positions, corner(4), full_identity=False)
    assert torch.allclose(ours[:2] if ours.ndim else ours, alone)
    assert ours.ndim == 0 or not ours[2:].any()


@pytest.mark.parametrize("full_identity", [True, False])
@pytest.mark.parametrize("formula", [mixofshow_regularization, attention_outside])
def test_a_batch_without_learned_tokens_has_neither_a_value_nor_gradients(
    formula, full_identity: bool
) -> None:
    """Dropped captions and class images alone: a maximum over no example must not be divided by."""
    recorded = maps()
    none = torch.full_like(POSITIONS, -1)
    ours = formula(recorded, none, corner(), full_identity=full_identity)
    assert not ours.any()
    for gradient in torch.autograd.grad(ours.sum(), [m.probabilities for m in recorded]):
        assert gradient.isfinite().all() and not gradient.any()


@pytest.mark.parametrize("formula", [mixofshow_regularization, attention_outside])
def test_the_only_token_of_a_prompt_is_adjective_and_subject(formula) -> None:
    """Words of one vector, whichever words the prompts beside it have."""
    one, two = torch.tensor([[3], [5]]), torch.tensor([[3, -1], [5, -1]])
    alone = formula(maps(), one, corner(), full_identity=True)
    assert alone.any()
    assert torch.equal(formula(maps(), two, corner(), full_identity=True), alone)
    twice = formula(maps(), one.expand(2, 2), corner(), full_identity=True)
    assert torch.equal(twice, alone)


def test_the_normalized_form_is_a_share_of_each_example() -> None:
    """Uniform attention: the share outside is the area outside, at any resolution and batch."""
    uniform = []
    for side in (16, 8):
        uniform.append(AttentionMap("a", torch.full((2, 1, side * side, 9), 1 / 9), side, side))
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, :8] = 1
    mask[1, :, :4] = 1
    ours = attention_outside(uniform, POSITIONS, mask, full_identity=False)
    torch.testing.assert_close(ours, torch.tensor([1.0, 1.5]))
    full = attention_outside(uniform, POSITIONS, mask, full_identity=True)
    torch.testing.assert_close(full, torch.tensor([0.5 + 0.5, 0.75 + 0.75]))
    inside = torch.zeros(2, 1, 16, 16, 9)
    inside[0, :, :8], inside[1, :, :4] = 0.1, 0.1
    perfect = [AttentionMap("a", inside.flatten(2, 3), 16, 16)]
    for full_identity in (True, False):
        ours = attention_outside(perfect, POSITIONS, mask, full_identity=full_identity)
        torch.testing.assert_close(ours, torch.zeros(2), atol=1e-6, rtol=0)


def test_an_empty_mask_is_zero_and_finite() -> None:
    ours = attention_outside(maps(), POSITIONS, 0 * corner(), full_identity=True)
    assert not ours.any() and math.isfinite(float(ours.sum()))


# ---------------------------------------------------------------- the rows of LOSSES


def step_output(**changes) -> StepOutput:
    generator = torch.Generator().manual_seed(9)
    out, target, x0, eps = torch.randn(4, 2, 3, 16, 16, generator=generator, dtype=torch.float64)
    level = NoiseLevel(*torch.full((3, 2), 0.5, dtype=torch.float64))
    recorded = maps()
    given = dict(
        out=out.requires_grad_(), target=target, x0=x0, eps=eps, x_t=x0, level=level,
        prediction="epsilon", mask=corner(), is_prior=torch.tensor([False, False]), step=0,
        lazy={"attention": lambda: recorded}, token_positions=POSITIONS,
    )  # fmt: skip
    return StepOutput(**(given | changes))


def test_edlora_is_the_objective_of_the_trainer() -> None:
    """sum(m e) / sum(m) of each example, which is c = 3 times the masked mean, and 0.01 times the
    regularization for the batch.
    """
    step = step_output()
    error = (step.out - step.target) ** 2 * step.mask
    masked = error.sum((1, 2, 3)) / step.mask.sum((1, 2, 3))
    for full_identity in (True, False):
        own = mixofshow_regularization(
            step.attention, POSITIONS, step.mask, full_identity=full_identity
        )
        rows = LOSSES["edlora"](step, full_identity=full_identity)
        torch.testing.assert_close(rows, masked + 0.01 * own, rtol=1e-12, atol=0)


def test_attention_adds_its_share_to_mse() -> None:
    step = step_output()
    share = attention_outside(step.attention, POSITIONS, step.mask, full_identity=True)
    rows = LOSSES["attention"](step, attention_weight=0.5, full_identity=True)
    torch.testing.assert_close(rows, LOSSES["mse"](step) + 0.5 * share, rtol=1e-12, atol=0)


def test_prior_examples_get_no_regularization() -> None:
    prior = torch.tensor([False, True])
    rows = LOSSES["edlora"](step_output(is_prior=prior), attention_weight=100.0)
    plain = LOSSES["edlora"](step_output(), attention_weight=0.0)
    assert rows[1] == plain[1] and rows[0] > plain[0]


@pytest.mark.parametrize("name", ["attention", "edlora"])
def test_losses_that_wrap_and_bind_ask_for_maps_too(name: str) -> None:
    for loss in (LOSSES[name], bind_arguments(LOSSES[name], name, {"attention_weight": 0.1})):
        assert loss.reads_attention and add_preservation(loss, 1.0).reads_attention


@pytest.mark.parametrize("name", ["attention", "edlora"])
def test_without_tokens_masks_or_maps_it_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="reads learns none; train tokens"):
        LOSSES[name](step_output(token_positions=None))
    with pytest.raises(UserError, match=r"there are none; set --data\.masks"):
        LOSSES[name](step_output(mask=None))
    with pytest.raises(UserError, match=r"write my_loss\.reads_attention = True below"):
        LOSSES[name](step_output(lazy={}))


@pytest.mark.parametrize("name", ["attention", "edlora"])
def test_arguments_without_sense_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"attention_weight must be 0 or more, got -1"):
        LOSSES[name](step_output(), attention_weight=-1.0)
    with pytest.raises(UserError, match=f"full_identity of {name} is 'False', expected true or"):
        bind_arguments(LOSSES[name], name, {"full_identity": "False"})
