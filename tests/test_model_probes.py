"""Probes of options that need a GPU, shards or an inpainting model: what they say with the option
and without it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.config import Config, DataConfig
from lora_core.data.records import Record
from lora_core.data.shards.stored_files import StoredFile
from lora_core.memory.residency import Residency
from training.probes import input_probes, model_probes


def looked_at(config: Config | None = None, **parts: Any) -> Any:
    """A step of which only some parts are there."""
    return SimpleNamespace(config=config or Config(), **parts)


@pytest.mark.parametrize("moves", [True, False])
def test_networks_that_may_leave_are_seen(moves: bool) -> None:
    residency = Residency({}, torch.device("cpu"), moves=moves)
    step = looked_at(Config(offload=False), model=SimpleNamespace(residency=residency))
    assert model_probes.stays_on_device(step) is not moves


def test_images_outside_the_dataset_are_copies(tmp_path: Path) -> None:
    dataset, elsewhere = tmp_path / "set", tmp_path / "cache"
    shard = dataset / "0.tar"
    stored = StoredFile(shard / "a.png", shard, 512, 100)
    step = looked_at(Config(data=DataConfig(dataset=str(dataset), streaming=True)))

    def reads_shards(path: Path, place: StoredFile | None) -> bool:
        record = Record(path, ("a",), None, False, "key", (8, 8), stored=place)
        step.data = SimpleNamespace(training=SimpleNamespace(records=[record]))
        return input_probes.reads_shards(step)

    assert reads_shards(shard / "a.png", stored)
    assert reads_shards(dataset / "images" / "a.png", None)
    assert not reads_shards(elsewhere / "a.png", None)


MASK = torch.zeros(2, 1, 16, 16)
MASK[:, :, 4:12, 4:12] = 1
HOLE = MASK[:, :, ::8, ::8]  # what `nearest` takes of it for latents of 2 x 2


@pytest.mark.parametrize(
    "use, hole, weights, found",
    [
        ("hole", HOLE, None, True),
        ("both", HOLE, HOLE, True),
        ("hole", 1 - HOLE, None, False),  # another hole than the mask
        ("hole", None, None, False),  # no model that paints
        ("hole", HOLE, HOLE, False),  # weights the loss although only the hole is asked for
        ("both", HOLE, None, False),
    ],
)
def test_masks_are_the_holes(
    use: Any, hole: Tensor | None, weights: Tensor | None, found: bool
) -> None:
    inpaint = None if hole is None else torch.cat([hole, torch.randn(2, 4, 2, 2)], dim=1)
    x = SimpleNamespace(x0=torch.zeros(2, 4, 2, 2), inpaint=inpaint, mask=weights)
    step = looked_at(
        Config(data=DataConfig(masks="file", mask_use=use)),
        inputs=[x],
        micro_batch=SimpleNamespace(mask=MASK),
    )
    assert input_probes.uses_mask_as_hole(step) is found


def test_without_masks_nothing_shows_their_use() -> None:
    step = looked_at(inputs=[SimpleNamespace()], micro_batch=SimpleNamespace(mask=None))
    assert input_probes.uses_mask_as_hole(step) is None
