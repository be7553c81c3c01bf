"""Learning rates and gradient hooks that a kind of adapter asks for."""

from pathlib import Path

import pytest
from torch import nn

from lora_core.adapters import injection, training_requests
from lora_core.adapters.injection import AdapterSpec
from lora_core.errors import UserError

FILE = """
import torch
from lora_core.adapters.kinds import LoRA

class Wrong(LoRA):
    rates = {"left": 4.0}

class Backwards(LoRA):
    rates = {"up": -1.0}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "asks.py").write_text(FILE)
    return str(tmp_path / "asks.py")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Wrong", "rates of Wrong names 'left', which is no parameter of 0; it has down, up"),
        ("Backwards", r"the rate of 'up' in rates of Backwards is -1.0; expected a positive"),
    ],
)
def test_rates_that_are_none_are_refused(file: str, kind: str, said: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    injection.inject(model, AdapterSpec(("0",), rank=2, kind=f"{file}:{kind}"))
    with pytest.raises(UserError, match=said):
        training_requests.parameter_rates(model)
    assert not training_requests.gradient_hooks(model)
