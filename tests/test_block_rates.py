"""kohya's learning rates by block, as the globs of --optimizer.lr-pattern and --adapter.exclude."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNet2DConditionModel

from lora_core.adapters.targets import last_match, matches_pattern
from lora_core.errors import UserError
from models import sd
from tests import tiny_sdxl
from training.block_rates import block_globs, block_rate_patterns, parse_rate_list


def test_curves_and_lists_are_those_of_sd_scripts() -> None:
    assert parse_rate_list("sine+.5", 12, "") == pytest.approx(
        [math.sin(math.pi * (i / 11) / 2) + 0.5 for i in range(12)]
    )
    assert parse_rate_list("cosine", 9, "") == pytest.approx(
        [math.sin(math.pi * (i / 8) / 2) for i in reversed(range(9))]
    )
    assert parse_rate_list("linear", 9, "") == [i / 8 for i in range(9)]
    assert parse_rate_list("reverse_linear+1", 9, "") == [1 + i / 8 for i in range(8, -1, -1)]
    assert parse_rate_list("zeros+0.3", 3, "") == [0.3] * 3
    assert parse_rate_list("0.5, ,2", 5, "") == [0.5, 0.0, 2.0, 1.0, 1.0]
    assert parse_rate_list("1,2,3,4", 2, "") == [1.0, 2.0]
    for text in ("sinus", "1;2", "sine+x", "1,a"):
        with pytest.raises(UserError, match="down_lr_weight is"):
            parse_rate_list(text, 12, "down_lr_weight")


@pytest.mark.parametrize("count", [12, 9])
def test_each_layer_is_in_the_block_of_kohyas_numbering(count: int) -> None:
    """The places are those of A1111's and kohya's block weights, from the published names."""
    with torch.device("meta"):
        unet = UNet2DConditionModel() if count == 12 else tiny_sdxl.full_size()[0]
    paths = [name for name, module in unet.named_modules() if not list(module.children())]
    indices = sd.block_indices(paths)
    down, mid, up = block_globs(count)
    assert (len(down), len(mid), len(up)) == (count, 1 if count == 12 else 3, count)
    for path, index in indices.items():
        for first, globs in ((1, down), (14, up)):
            places = [
                place
                for place, own in enumerate(globs)
                if any(matches_pattern(path, glob) for glob in own)
            ]
            inside = first <= index < first + 12 and index != 13
            assert places == ([index - first] if inside else []), path
        found = [any(matches_pattern(path, glob) for glob in own) for own in mid]
        assert sum(found) == (index == 13), path


def test_weights_become_rates_and_layers_without_an_adapter() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel()
    paths = [name for name, m in unet.named_modules() if isinstance(m, torch.nn.Linear)]
    weights = ("0,0,0.5", "0.1", None)
    rates, excluded = block_rate_patterns(weights, 12, paths, threshold=0.1)
    factors = {path: last_match(path, rates, 1.0) for path in paths}
    inner = "transformer_blocks.0.attn1.to_q"
    assert factors[f"down_blocks.0.attentions.1.{inner}"] == 0.5
    assert factors[f"up_blocks.3.attentions.2.{inner}"] == 1
    assert set(excluded) >= {"down_blocks.0.attentions.0.*", "mid_block.*"}
    assert all(any(matches_pattern(path, glob) for path in paths) for glob in (*rates, *excluded))
