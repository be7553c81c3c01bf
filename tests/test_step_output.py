"""StepOutput: members that are computed when a loss reads them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_core.cross_attention import AttentionMap, attention_on_tokens
from lora_core.diffusion.noise import NoiseLevel, add_noise
from lora_core.diffusion.prediction import PREDICTIONS
from lora_core.diffusion.step_output import CaptionTokens, add_reading
from lora_core.errors import UserError
from lora_core.kernels import choice
from tests.test_losses import SD, make


def test_pairs_are_every_second_row_and_their_loss_belongs_to_both() -> None:
    step = make()
    step.is_loser = torch.tensor([False, True, False, True])
    winners, losers = step.split_pairs(step.x0)
    assert torch.equal(winners, step.x0[~step.is_loser])
    assert torch.equal(losers, step.x0[step.is_loser])
    rows = torch.tensor([1.0, 3.0]).repeat_interleave(2)
    assert rows.tolist() == [1, 1, 3, 3] and rows.mean() == 2
    step.is_loser = None
    with pytest.raises(UserError, match=r"there are none; .* with --data\.pairs"):
        step.split_pairs(step.x0)


def test_lazy_members_are_computed_once_when_touched() -> None:
    calls = []
    step = make(base_out=lambda: calls.append(1) or torch.zeros(4))
    assert not calls
    assert step.base_out is step.base_out and calls == [1]
    with pytest.raises(UserError, match=r"step\.attention.*it has base_out"):
        _ = step.attention


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_pred_of_a_perfect_output_is_x0(prediction: str) -> None:
    step = make(prediction)
    step.out = step.target
    torch.testing.assert_close(step.x0_pred, step.x0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("network", ["epsilon", "v_prediction", "edm"])
@pytest.mark.parametrize("space", ["model", "edm"])
@pytest.mark.parametrize("name", ["out_at", "base_out_at"])
def test_a_perfect_second_output_is_its_target_at_any_level(
    network: str, space: str, name: str
) -> None:
    """The network is given the noised latents of the level that the loss names, and its output
    comes back in the parameterization of `out`.
    """
    calls = []

    def perfect(level: NoiseLevel, x_t: Tensor) -> Tensor:
        calls.append((level, x_t))
        return PREDICTIONS[network].target(step.x0, step.eps, level)

    step = make(network, **{name: perfect})
    if space == "edm":
        step = replace(step, prediction="sample", network=network)
    other = SD.level(SD.ts[[900, 3, 41, 600]])
    found = getattr(step, name)(other)
    torch.testing.assert_close(found, step.target_at(other), rtol=0, atol=1e-6)
    ((level, x_t),) = calls
    assert level is other
    assert torch.equal(x_t, other.like(x_t).alpha * step.x0 + other.like(x_t).sigma * step.eps)
    own = add_noise(step.x0, -step.eps, other)
    getattr(step, name)(other, own)
    assert calls[1][1] is own
    with pytest.raises(UserError, match=rf"step\.{name} takes a NoiseLevel, got Tensor"):
        getattr(step, name)(other.t)


def test_attention_of_a_word_is_that_of_its_tokens_in_the_encoder_that_attention_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 2, 6, 9, generator=generator)
    maps = [AttentionMap("a", scores.softmax(-1), 2, 3)]
    places = torch.tensor([[2, 3], [1, -1], [-1, -1], [8, -1]])
    found = torch.tensor([[5], [5], [-1], [0]])
    tokens = CaptionTokens(("a",) * 4, {"t5": {"TOK": places}, "clip_l": {}}, "t5")
    step = replace(make(attention=lambda: maps), caption_tokens=tokens)
    assert torch.equal(step.attention_of("TOK"), attention_on_tokens(maps, places, (5, 7)))
    assert step.attention_of("TOK").shape == (4, 5, 7) and not step.attention_of("TOK")[2].any()
    assert step.token_places["t5"]["TOK"] is places and step.captions == ("a",) * 4
    with pytest.raises(UserError, match=r"attention_of\('dog'\) names no.*\(TOK\).*--cuda-graph"):
        step.attention_of("dog")
    step = replace(step, caption_tokens=tokens._replace(find={"dog": found}.__getitem__))
    assert torch.equal(step.attention_of("dog"), attention_on_tokens(maps, found, (5, 7)))


def test_text_that_is_not_there_is_refused_with_the_reason() -> None:
    graph = replace(make(), caption_tokens=CaptionTokens(()))
    with pytest.raises(UserError, match=r"step\.captions.*with --cuda-graph"):
        _ = graph.captions
    with pytest.raises(UserError, match=r"write my_loss\.reads_attention = True below"):
        _ = graph.token_places


def test_readings_are_means_and_keep_the_names_of_the_program_free() -> None:
    step = replace(make(), readings={})
    step.log("share", torch.tensor([1.0, 2.0], requires_grad=True))
    step.log("share", 3)
    assert [float(value) for value in step.readings["share"]] == [1.5, 3.0]
    assert not step.readings["share"][0].requires_grad
    for name in ("loss", "grad_norm", "lr_denoiser", "d_tokens", "val_loss", "step"):
        with pytest.raises(UserError, match=f"step.log got the name '{name}'"):
            add_reading({}, name, 1.0)
    make().log("anything", 1.0)  # a step that keeps no readings
    with choice.replayed(), pytest.raises(UserError, match="number 3, which --cuda-graph would"):
        step.log("share", 3)
