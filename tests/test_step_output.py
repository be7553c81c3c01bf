"""StepOutput: members that are computed when a loss reads them."""

import pytest
import torch

from lora_core.diffusion.prediction import PREDICTIONS
from lora_core.errors import UserError
from tests.test_losses import make


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
