"""The cache of computed tensors: rows stay with their images, files with their settings; many
processes fill one folder.
"""

import os
import random
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.data import cache as module
from lora_core.data.cache import TensorCache
from lora_core.data.dataset import ImageDataset, iterate_batches
from lora_core.data.records import scan_folder
from lora_core.errors import UserError
from tests.image_examples import WILD


def test_cached_rows_stay_with_their_images_when_the_order_changes(image_folder, tmp_path):
    """The public defect: a cache filled in one order and read in another. Here the 'latents' are
    the pixels' own mean.
    """
    made = ImageDataset(scan_folder(image_folder), replace(WILD, variants=2))
    for cache in (TensorCache({"vae": "x"}), TensorCache({"vae": "x"}, tmp_path / "cache")):
        computed = 0
        for batch in iterate_batches(made, batch=3, seed=0, stop=10):
            places = {r.key: i for i, r in enumerate(made.records)}

            def compute(i, batch=batch):
                nonlocal computed
                computed += 1
                return {"mean": batch.pixels[i].mean(dim=0), "std": batch.pixels[i].std(dim=0)}

            for i, (k, v) in enumerate(zip(batch.keys, batch.visits, strict=True)):
                key = made.cache_key(made.records[places[k]], v)
                row = cache.row(key, partial(compute, i))
                assert torch.equal(row["mean"], batch.pixels[i].mean(dim=0))
                assert torch.equal(row["std"], batch.pixels[i].std(dim=0))
        assert computed == len(cache.rows) == 10  # five images, two variants


@pytest.mark.parametrize("wide", [False, True], ids=["squares", "buckets"])
def test_trap_18_cached_latents_stay_with_their_captions_and_sizes(image_folder, wide):
    """Filled in one order, read in another batch size, seed and stage: each row meets the caption,
    crop and size of the pixels it was made from.

    The public scripts read a list of batches by step number while the loader shuffles anew; on this
    stream that gives other rows.
    """
    made = ImageDataset(
        scan_folder(image_folder), replace(WILD, variants=2, buckets=wide, bucket_step=2)
    )
    records = {r.key: r for r in made.records}
    captions = {r.key: r.captions[0] for r in made.records}
    cache, by_step, wrong, sizes = TensorCache({}), [], 0, set()

    def rows(batch):
        found = []
        for i, (k, v) in enumerate(zip(batch.keys, batch.visits, strict=True)):
            key = made.cache_key(records[k], v, tuple(batch.pixels.shape[-2:]))
            own = {"pixels": batch.pixels[i], "crop": torch.tensor(batch.crops[i])}
            found.append(cache.row(key, lambda own=own: own))
        return {name: torch.stack([row[name] for row in found]) for name in ("pixels", "crop")}

    for batch in iterate_batches(made, batch=2, seed=0, stop=10):
        by_step.append(rows(batch)["pixels"])
    for step, batch in enumerate(iterate_batches(made, batch=2, seed=1, stop=10)):
        found = rows(batch)
        assert torch.equal(found["pixels"], batch.pixels) and found["crop"].tolist() == [
            list(crop) for crop in batch.crops
        ]
        assert batch.captions == [captions[k] for k in batch.keys] and batch.original_sizes == [
            records[k].size for k in batch.keys
        ]
        wrong += by_step[step].shape != batch.pixels.shape or not torch.equal(
            by_step[step], batch.pixels
        )
        sizes.add(tuple(batch.pixels.shape[-2:]))
    assert wrong > 5 and len(cache.rows) == 10 and (len(sizes) > 1) == wide


def test_a_cache_on_disk_is_read_again_for_the_same_settings_only(tmp_path):
    rows = {
        "mean": torch.randn(2, 3).T,
        "ids": torch.arange(3, dtype=torch.int32),
        "half": torch.randn(2).bfloat16(),
    }

    def cache(model: str) -> TensorCache:
        return TensorCache({"model": model, "dtype": torch.float16}, tmp_path / "c")

    first = cache("a")
    first.row("k/1: odd", lambda: rows)
    first.row("k2", lambda: rows)
    refuse = lambda: pytest.fail("computed again")  # noqa: E731
    again = TensorCache({"dtype": torch.float16, "model": "a"}, tmp_path / "c")
    for key in ("k2", "k/1: odd"):
        row = again.row(key, refuse)
        assert all(torch.equal(rows[n], row[n]) and row[n].dtype == rows[n].dtype for n in rows)
    here = cache("a")
    assert torch.equal(here.row((7, "k2"), refuse, disk_key="k2")["ids"], rows["ids"])
    assert here.row((7, "k2"), refuse) is here.rows[7, "k2"]  # in memory
    asked = []
    cache("b").row("k2", lambda: asked.append("k2") or rows)
    assert asked == ["k2"]
    files = [f for f in (tmp_path / "c").rglob("*") if f.is_file()]
    assert len(files) == 3 and all(
        f.suffix == ".safetensors" and not f.name.startswith(".") for f in files
    )
    assert torch.equal(load_file(files[0])["ids"], rows["ids"])


def test_a_cache_keeps_its_own_copies_and_refuses_what_does_not_fit(tmp_path):
    row = torch.zeros(3)
    cache = TensorCache({}, tmp_path)
    cache.row("a", lambda: {"x": row})
    row.add_(1)
    assert torch.equal(cache.row("a", lambda: {"x": row})["x"], torch.zeros(3))
    cache.row("b", lambda: {"x": torch.zeros(4)})
    with pytest.raises(UserError, match=r"cache file .* holds x \[4\], expected x \[3\]; delete"):
        TensorCache({}, tmp_path).row("b", lambda: {"x": row}, {"x": (3,)})

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        cache.row("c", fail)
    assert len(list(tmp_path.glob("*/*"))) == 2


# ---------------------------------------------------------------- damage, memory, older folders


@pytest.mark.parametrize("length", [0, 7, 20, -1], ids=["empty", "no header", "cut", "cut in data"])
def test_a_file_that_is_cut_off_is_made_anew_and_said(tmp_path, capsys, length):
    """A loss of power may leave such a file; it costs one encoding."""
    row = {"x": torch.randn(5)}
    TensorCache({}, tmp_path).row("a", lambda: row)
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    assert torch.equal(TensorCache({}, tmp_path).row("a", lambda: row)["x"], row["x"])
    said = capsys.readouterr().err
    assert said.startswith(f"warning: the cache file {path} is damaged (") and "made anew" in said
    refuse = lambda: pytest.fail("computed again")  # noqa: E731
    assert torch.equal(TensorCache({}, tmp_path).row("a", refuse)["x"], row["x"])


def test_numbers_that_did_not_reach_the_disk_are_noticed(tmp_path, capsys):
    """As after a loss of power: the file has its length, and zeros in it."""
    row = {"x": torch.randn(500), "y": torch.randn(3).bfloat16(), "n": torch.tensor(3)}
    TensorCache({}, tmp_path).row("a", lambda: row)
    (path,) = tmp_path.glob("*/*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-600] + bytes(600))
    assert load_file(path)["y"].shape == (3,)  # a file like any other
    again = TensorCache({}, tmp_path).row("a", lambda: row)
    assert all(torch.equal(again[name], row[name]) for name in row)
    assert "its checksum does not fit its numbers" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_memory_is_bounded_where_the_disk_has_the_rows(tmp_path):
    """10 rows of 4 KB in at most 12 KB; without a folder all stay."""
    made = {i: {"x": torch.full((1024,), float(i))} for i in range(10)}
    asked = []

    def compute(i):
        asked.append(i)
        return made[i]

    for folder in (None, tmp_path):
        cache = TensorCache({}, folder, keep_bytes=12_500)
        asked.clear()
        for i in [*made, *made, *made]:
            row = cache.row(i, partial(compute, i))
            assert torch.equal(row["x"], made[i]["x"])
            if folder:
                assert len(cache.rows) <= 3 and cache.bytes_in_memory <= 12_500
        assert asked == list(range(10))
        assert len(cache.rows) == (3 if folder else 10)
    first = next(iter(cache.rows))
    cache.row(first, lambda: pytest.fail("computed again"))
    assert next(reversed(cache.rows)) == first  # read last, forgotten last
    cache.clear()
    assert not cache.rows and not cache.bytes_in_memory


def test_files_of_earlier_versions_are_read_where_they_are(tmp_path):
    cache = TensorCache({}, tmp_path)
    cache.row("a", lambda: {"x": torch.ones(2)})
    (path,) = tmp_path.glob("*/*.safetensors")
    path.rename(tmp_path / path.name)
    path.parent.rmdir()
    older = TensorCache({}, tmp_path)
    assert older.has_row("a") and not older.has_row("b")
    older.row("a", lambda: pytest.fail("computed again"))
    assert [f.name for f in tmp_path.iterdir()] == [path.name]
    (tmp_path / path.name).write_bytes(b"")  # made anew where it is
    TensorCache({}, tmp_path).row("a", lambda: {"x": torch.ones(2)})
    assert [f.name for f in tmp_path.iterdir()] == [path.name]


def test_what_does_not_fit_is_said_before_it_is_made(tmp_path, monkeypatch):
    row = {"x": torch.zeros(250)}
    TensorCache({}).check_room(row, 10**3, "captions")
    monkeypatch.setattr(module, "available_memory", lambda: 10**6)
    said = r"2,000 captions take 2 MB .* and 1 MB are free in memory; .*--data\.cache FOLDER"
    with pytest.raises(UserError, match=said):
        TensorCache({}).check_room(row, 2000, "captions")
    TensorCache({}, tmp_path).check_room(row, 2000, "captions")
    with pytest.raises(UserError, match=r"on the disk of .*free some space"):
        TensorCache({}, tmp_path).check_room(row, 10**15, "captions")


# ---------------------------------------------------------------- many processes, some killed

ROWS, PROCESSES, KILLED = 60, 4, 2


def fill_folder(folder: Path, log: Path, dies_at: int) -> None:
    """What a process of the test does: all rows, in an order of its own; the one that dies does so
    in the middle of writing a file.
    """
    cache, order = TensorCache({"vae": 1}, folder), list(range(ROWS))
    random.Random(os.getpid()).shuffle(order)
    computed = 0

    def compute(i: int) -> dict[str, torch.Tensor]:
        nonlocal computed
        computed += 1
        with log.open("a") as file:
            file.write(f"{i}\n")
        time.sleep(0.002)
        return {"x": torch.full((2048,), float(i))}

    def save_half(row: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(row, path, metadata)
        if computed == dies_at:
            os.truncate(path, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    module.save_file = save_half
    for i in order:
        cache.row(str(i), partial(compute, i))


def test_processes_share_a_folder_and_some_are_killed(tmp_path):
    folder, logs = tmp_path / "cache", [tmp_path / f"{i}.log" for i in range(PROCESSES)]
    children = []
    for number, log in enumerate(logs):
        child = os.fork()
        if not child:
            status = 1
            try:
                fill_folder(folder, log, 5 + number if number < KILLED else 0)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    ended = [os.waitpid(child, 0)[1] for child in children]
    assert ended == [signal.SIGKILL] * KILLED + [0] * (PROCESSES - KILLED)
    made = [int(line) for line in " ".join(log.read_text() for log in logs).split()]
    assert set(made) == set(range(ROWS))
    assert len(made) <= 1.5 * ROWS  # alone, each would make all: here two at once now and then
    files = list(folder.glob("*/[!.]*.safetensors"))
    assert len(files) == ROWS
    after = TensorCache({"vae": 1}, folder)
    for i in range(ROWS):
        row = after.row(str(i), lambda: pytest.fail("a file is missing or torn"))
        assert row["x"].unique().tolist() == [i]
    left = list(folder.glob("*/.*"))
    assert len(left) == KILLED
    for file in left:  # as if killed the day before yesterday
        os.utime(file, (time.time() - 2 * 86_400,) * 2)
    cache = TensorCache({"vae": 1}, folder)
    for place in {file.parent for file in left}:  # one, where both died at one row
        numbers = (f"new {i}" for i in range(10**6))
        key = next(k for k in numbers if cache._file(k).parent == place)
        cache.row(key, lambda: {"x": torch.ones(1)})
    assert not any(file.exists() for file in left)


@pytest.mark.soak
def test_the_cost_of_a_row_does_not_grow_with_the_folder(tmp_path):
    """100,000 rows: writing, looking for and reading one costs at most twice what it costs in a
    folder of 1,000, and the memory does not follow the folder.
    """
    row = {"mean": torch.randn(4, 8, 8), "std": torch.rand(4, 8, 8)}
    size = 2 * row["mean"].numel() * 4

    def seconds(work, keys):
        times = []
        for key in keys:
            began = time.perf_counter()
            work(str(key))
            times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 2]

    found = {}
    for count in (1_000, 100_000):
        cache = TensorCache({}, tmp_path, keep_bytes=2_000 * size)
        write = seconds(lambda key: cache.row(key, lambda: row), range(count))  # noqa: B023
        again = TensorCache({}, tmp_path, keep_bytes=2_000 * size)
        keys = random.Random(0).sample(range(count), 1_000)
        look = seconds(again.has_row, keys)
        read = seconds(lambda key: again.row(key, lambda: row), keys)  # noqa: B023
        assert len(cache.rows) <= 2_000 and cache.bytes_in_memory <= 2_000 * size
        found[count] = write, look, read
    print({count: [f"{1e3 * t:.3f} ms" for t in times] for count, times in found.items()})
    for small, large in zip(found[1_000], found[100_000], strict=True):
        assert large <= 2 * small
