"""The configs of the published models give their schedules."""

import pytest
import torch

from models import read_schedule
from models.published import PUBLISHED_MODELS
from models.published_configs import published_configs


def test_known_schedulers():
    expected = {
        "sd1": "epsilon",
        "sd2": "epsilon",
        "sd2-v": "v_prediction",
        "sdxl": "epsilon",
        "sdxl-refiner": "epsilon",
        "flux-dev": "flow",
    }
    assert {
        kind: read_schedule(str(published_configs(kind)), {}, 1024)[1] for kind in expected
    } == expected
    sigma = read_schedule(str(published_configs("sdxl")), {})[0].level(torch.tensor([999]))
    assert (sigma.sigma / sigma.alpha).item() == pytest.approx(
        14.6146, abs=1e-3
    )  # the largest of the scaled linear schedule
    assert all(
        (published_configs(kind) / "model_index.json").is_file() for kind in PUBLISHED_MODELS
    )
