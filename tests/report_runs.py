"""Folders of runs as training leaves them, written without any training."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora_core.runs import pictures
from lora_core.runs.pictures import ImageRow
from lora_core.toml import from_table, to_table, to_toml

STEPS = 8
TIMES = (125.0, 375.0, 625.0, 875.0)
STRENGTHS = (0.5, 1.0)


def color_of(step: int, strength: float, prompt: int) -> tuple[int, int, int]:
    """The color of a sample, so that a test knows it again."""
    return (20 * step, round(200 * strength), 40 + 60 * prompt)


def flat(color: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (8, 8), color)


def write_jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def loss_of(step: int, t: float, image: int, seed: int, scale: float) -> float:
    """A validation loss that falls with the steps, differently for each image and seed."""
    wobble = 0.02 * math.sin(17.0 * image + 5.0 * seed + t)
    return scale * (1 - 0.04 * step) * (0.1 + 0.2 * t / 1000) + wobble * step / STEPS


def write_run(
    folder: Path,
    changes: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    scale: float = 1.0,
    prompts: Sequence[str] = ("a TOK", "a TOK in the snow"),
    finished: bool = True,
) -> Path:
    """A run of two stages with samples, validation and metrics; `changes` are of its config."""
    folder.mkdir(parents=True)
    table = {
        "model": "toy/model",
        "out": str(folder),
        "seed": seed,
        "stages": [{"steps": 3, "groups": ["tokens"]}, {"steps": 5, "groups": ["denoiser"]}],
        **(changes or {}),
    }
    config = from_table(table)
    (folder / "config.toml").write_text(to_toml(config))
    shows_data = to_table(config)["samples"]["show_data"]
    write_jsonl(folder / "metrics.jsonl", metric_rows(seed))
    scores = []
    for step in (0, 4, 8):
        for image in range(3):
            for i, t in enumerate(TIMES):
                loss = loss_of(step, t, image, seed, scale)
                place = {"key": f"key{image}", "draw": 0, "bin": i, "t": t}
                scores.append({"step": step, **place, "loss": loss})
    write_jsonl(folder / "val.jsonl", scores)
    for step in (4, 8):
        write_sheet(folder / "samples" / f"step_{step:06d}.png", step, prompts)
    if finished:
        write_end(folder, prompts, shows_data=shows_data)
    return folder


def metric_rows(seed: int) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; `reading` is a loss's own."""
    rows: list[dict[str, Any]] = [{"step": 0, "val_loss": 0.2}]
    for step in range(1, STEPS + 1):
        row = {"step": step, "loss": 0.3 + 0.1 * math.sin(step + seed), "grad_norm": 10.0**-step}
        group = "tokens" if step <= 3 else "denoiser"
        row |= {f"lr_{group}": 1.0, f"d_{group}": 1e-4 * step, "reading": step**2}
        rows.append(row)
    return rows


def write_sheet(file: Path, step: int, prompts: Sequence[str], *, private: bool = False) -> None:
    """A sheet of samples with a row for each strength."""
    rows = []
    for strength in STRENGTHS:
        images = [flat(color_of(step, strength, i)) for i in range(len(prompts))]
        rows.append(ImageRow(f"strength {strength:g}", images, prompts, "sample", strength))
    sheet = pictures.draw_grid(rows, title=f"after {step} steps", cell=24)
    pictures.save_sheet(sheet, file, step=step, is_private=private)


def write_end(folder: Path, prompts: Sequence[str], *, shows_data: bool) -> None:
    """What a run writes at its end."""
    rows = [
        ImageRow("before", [flat((255, 0, 0))] * len(prompts), prompts, "base"),
        ImageRow("new", [flat((0, 0, 255))], ["TOK on mars"], "new"),
    ]
    if shows_data:
        rows.insert(0, ImageRow("photos", [flat((255, 0, 254))], role="training"))
    sheet = pictures.draw_grid(rows, title="before and after", cell=24)
    pictures.save_sheet(sheet, folder / "before_after.png", step=STEPS, is_private=False)
    token = {"encoder": "clip_l", "name": "<s0>", "norm": 0.4, "drift": 1.25}
    summary = {
        "seconds": 3.0,
        "steps": STEPS,
        "val_loss_before": 0.2,
        "val_loss_after": 0.15,
        "tokens": [{**token, "nearest": [["cat</w>", 0.7]]}],
        "images": 1,
        "scored": "held-out loss",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / f"{folder.name}.safetensors").write_bytes(bytes(2_000))
    card = (
        "---\ntags:\n- lora\n---\n\n# run\n\n## diffusers\n\n```python\npipe = load(x < y)\n```\n"
    )
    (folder / "README.md").write_text(card)
