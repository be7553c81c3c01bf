"""Axes of image grids: SETTING=START:STOP:STEP and SETTING=A,B,C."""

import pytest

from lora_core.errors import UserError
from lora_core.runs.image_grid import parse_axis


def test_axes_are_read_as_documented() -> None:
    assert parse_axis("strength=0:1.2:0.3").values == [0, 0.3, 0.6, 0.9, 1.2]
    assert parse_axis("seed=0:4").values == [0, 1, 2, 3]
    assert parse_axis("lora1.text=1,0").values == [1, 0]


@pytest.mark.parametrize(
    "text",
    [
        "strength",
        "strength=1:0:0",
        "speed=0:1",
        "strength=a:b",
        "strength=0:1000:0.1",
        "seed=0:1e12",
        "seed=0.5,1",
        "steps=nan",
        "guidance=inf",
        "seed=1:",
    ],
)
def test_other_axes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--grid"):
        parse_axis(text)
