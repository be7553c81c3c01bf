"""The benchmark of the training loop: its clock, and the model and images that both sides read."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks import sdxl_loop


def test_the_first_steps_are_not_timed() -> None:
    clock = sdxl_loop.Clock()
    slow = [(100.0 * i, 100.0 * i) for i in range(sdxl_loop.WARM)]
    start = slow[-1][0]
    clock.marks = [*slow, *((start + 0.5 * i, start + 0.25 * i) for i in range(1, 6))]
    assert clock.rates == pytest.approx((2.0, 4.0))


def test_token_tables_have_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    model = sdxl_loop.make_model(tmp_path / "model", 99)
    for name in ("text_encoder", "text_encoder_2"):
        tables = load_file(model / name / "model.safetensors")
        (table,) = [t for key, t in tables.items() if key.endswith("token_embedding.weight")]
        config = json.loads((model / name / "config.json").read_text())
        assert len(table) == config["vocab_size"] == 99
    images = sdxl_loop.make_images(tmp_path / "images")
    lines = (images / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in lines] == sorted(
        file.name for file in images.glob("*.png")
    )
