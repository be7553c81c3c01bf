"""Loss, masks, accumulation and ranks of Mix-of-Show's options."""

import contextlib
from pathlib import Path

import pytest

from lora_core.config import Config
from tests.mixofshow_example import save_example
from training.translation.edlora_options import translate_options


def config_with(folder: Path, **changes: str) -> Config:
    """The config of the example, its options replaced: use_mask="false"."""
    file = save_example(folder)
    lines = file.read_text().split("\n")
    for name, value in changes.items():
        found = [i for i, line in enumerate(lines) if line.strip().startswith(f"{name}:")]
        for i in found:
            lines[i] = f"{lines[i].partition(':')[0]}: {value}"
        assert found, name
    file.write_text("\n".join(lines))
    with contextlib.chdir(folder):
        return translate_options(file).config


@pytest.mark.parametrize(
    "mask, attention, loss, expected",
    [
        ("true", "0.02", "true", ("edlora", "file", "mean")),
        ("true", "~", "true", ("mse", "file", "mixofshow")),
        ("true", "~", "false", ("mse", "none", "mean")),
        ("false", "0.01", "true", ("mse", "none", "mean")),
    ],
)
def test_masks_are_read_by_the_loss_or_by_its_attention(
    tmp_path: Path, mask: str, attention: str, loss: str, expected: tuple[str, str, str]
) -> None:
    config = config_with(tmp_path, use_mask=mask, attn_reg_weight=attention, use_mask_loss=loss)
    assert (config.loss, config.data.masks, config.mask_scale) == expected
    weight = {"attention_weight": 0.02, "full_identity": False}
    assert config.loss_arg == (weight if config.loss == "edlora" else {})


def test_accumulation_is_a_larger_batch_where_attention_reads_it_whole(tmp_path: Path) -> None:
    whole = config_with(tmp_path / "a", gradient_accumulation_steps="2")
    assert (whole.batch_size, whole.accumulation, whole.stages[0].steps) == (4, 1, 2)
    apart = config_with(tmp_path / "b", gradient_accumulation_steps="2", use_mask="false")
    assert (apart.batch_size, apart.accumulation, apart.stages[0].steps) == (2, 2, 2)


def test_the_text_encoder_has_a_rank_of_its_own(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    assert config.adapter.rank_pattern == {"*.self_attn.*": 2.0}
    assert config.adapter.alpha_pattern == {"*.self_attn.*": 2.0}
    assert config.tokens.norm == "stop" and config.tokens.norm_target == 5.5
