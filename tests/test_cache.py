"""The cache of computed tensors: rows stay with their images, files with their settings."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

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
