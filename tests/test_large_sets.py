"""Sets of 1,000 to 100,000 images: start-up is linear, a record is small, and a step does not
depend on the size of the set. The cases that print figures are marked `soak`.
"""

import itertools
import json
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_core.config import Config
from lora_core.data.dataset import ImageDataset, ImageSettings, Record, iterate_batches, scan_folder
from lora_core.data.image_checks import ImageChecks
from lora_core.runs.run_folder import flatten_state
from tests.opened_run import open_parts
from tests.shard_examples import encoded
from training.inputs import step_inputs
from training.inputs.step_inputs import InputSource
from training.run_identity import run_identity

BUCKETS = ImageSettings(16, buckets=True, bucket_step=4)


def write_images(folder: Path, count: int) -> Path:
    """Small JPEG files, each of its own bytes, with a table of captions."""
    folder.mkdir(parents=True)
    whole = encoded(0, "JPEG", side=16)
    rows = []
    for i in range(count):
        (folder / f"{i:06d}.jpg").write_bytes(whole + i.to_bytes(8, "little"))
        rows.append(json.dumps({"file_name": f"{i:06d}.jpg", "text": f"a photo of TOK {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def many_records(folder: Path, count: int) -> list[Record]:
    """As many records as of a large set, of a few files, in two sizes."""
    few = scan_folder(write_images(folder, 2))
    few[1] = replace(few[1], size=(16, 32))
    return [replace(few[i % 2], key=f"{i:032x}", captions=(f"TOK {i}",)) for i in range(count)]


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """The number of Python calls inside, in all threads."""
    count = [0]

    def on_event(frame: Any, event: str, _: Any) -> None:
        count[0] += event == "call"

    threading.setprofile(on_event)
    sys.setprofile(on_event)
    try:
        yield count
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("settings", [ImageSettings(16), BUCKETS])
def test_batches_cost_the_same_in_a_larger_set(tmp_path: Path, settings: ImageSettings) -> None:
    counts = []
    for size in (1_000, 10_000):
        records = many_records(tmp_path / str(size), size)
        batches = iterate_batches(ImageDataset(records, settings), batch=4, seed=0, stop=40)
        next(batches)  # an epoch is ordered once
        with counted_calls() as count:
            list(batches)
        counts.append(count[0])
    assert counts[1] <= 1.02 * counts[0]  # images of one bucket need no scaling


def test_a_training_step_costs_the_same_in_a_larger_set(config: Config, tmp_path: Path) -> None:
    run = open_parts(config)
    counts = []
    for size in (1_000, 10_000):
        records = many_records(tmp_path / str(size), size)
        training = ImageDataset(records, config.data, seed=config.seed)
        run.data = replace(run.data, training=training)
        run.source = InputSource(config, run.data, run.model)
        run.take_steps(1)
        with counted_calls() as count:
            take_further_steps(run)
        counts.append(count[0])
    assert counts[1] <= 1.01 * counts[0]  # sizes of hash tables, and the collector, are not ours


def take_further_steps(run: Any) -> None:
    for batch in run.data.batches(run.config, 1, 3):
        step_inputs.make_step_inputs(run.source, batch, run.config.stages[0], 1, check=False)


def test_start_up_is_linear_and_a_record_small(tmp_path: Path) -> None:
    calls, memory = [], []
    for size in (60, 240):
        folder = write_images(tmp_path / str(size), size)
        with counted_calls() as count:
            scan_folder(folder)
        calls.append(count[0] / size)
        tracemalloc.start()
        records = scan_folder(folder)
        ImageDataset(records, BUCKETS)
        memory.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert calls[1] < 1.1 * calls[0]
    assert (memory[1] - memory[0]) / 180 < 2_000


# ---------------------------------------------------------------- figures


def measured(call: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds of this process on a core) of a call."""
    began = time.process_time()
    return call(), time.process_time() - began


@pytest.mark.soak
@pytest.mark.parametrize("sizes", [(1_000, 10_000, 100_000)])
def test_figures_of_large_sets(
    tmp_path: Path, sizes: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Seconds of one core: of the first start, of a later one with --data.cache, of a step's data
    (median of 5 x 20 steps of batch 4); bytes of memory and of a checkpoint, for each image.
    """
    table = []
    for size in sizes:
        folder, cache = write_images(tmp_path / str(size), size), tmp_path / f"cache{size}"
        time.sleep(3)  # results of files that were just written are not kept
        _, first = measured(lambda: scan_folder(folder, checks=ImageChecks(cache)))  # noqa: B023
        tracemalloc.start()
        records = scan_folder(folder, checks=ImageChecks(cache))
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        _, again = measured(lambda: scan_folder(folder, checks=ImageChecks(cache)))  # noqa: B023
        data = ImageDataset(records, BUCKETS)
        batches = iterate_batches(data, batch=4, seed=0, stop=200)
        _, opening = measured(partial(next, batches))
        steps = sorted(measured(partial(take, batches, 20))[1] for _ in range(5))
        identity, _ = measured(lambda: run_identity({"stages": []}, records, (), {}))  # noqa: B023
        written, writing = measured(lambda: json.dumps(flatten_state(identity)))  # noqa: B023
        table.append((
            size, first, again, held / size, opening, steps[2] / 20 * 1e3,
            len(written) / size, writing,
        ))  # fmt: skip
    with capsys.disabled():
        print("\nimages  first start s  later s  B/image  order s  step ms  state B/image  state s")
        for row in table:
            print(" ".join(f"{value:10.3f}" for value in row))
    before, last = table[-2:]
    for column in (1, 2):  # linear
        assert last[column] / last[0] < 1.5 * before[column] / before[0]
    assert last[3] < 2_000 and last[5] < 1.5 * table[0][5]


def take(batches: Iterator[Any], count: int) -> list[Any]:
    return list(itertools.islice(batches, count))
