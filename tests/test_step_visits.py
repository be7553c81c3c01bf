"""The examples of a step are known before they are read: those that its batch has."""

from dataclasses import replace

import pytest

from lora_core.data.dataset import ImageDataset, iterate_batches, make_example
from lora_core.data.records import loser_key, scan_folder
from lora_core.data.step_visits import StepOrder
from tests.image_examples import WILD, noise_image, save_image


@pytest.mark.parametrize("prior", [False, True], ids=["alone", "prior"])
@pytest.mark.parametrize("buckets", [False, True], ids=["squares", "buckets"])
def test_visits_are_the_examples_of_batches(image_folder, tmp_path, buckets, prior):
    settings = replace(WILD, buckets=buckets, bucket_step=2)
    images = ImageDataset(scan_folder(image_folder), settings)
    of_class = None
    if prior:
        for i in range(3):
            save_image(noise_image(12, 10, seed=9 + i), tmp_path / "class" / f"{i}.png")
        found = scan_folder(tmp_path / "class", captions="one", caption="a cat", is_prior=True)
        of_class = ImageDataset(found, settings)
    order = StepOrder(images, of_class, batch=2, seed=3)
    batches = iterate_batches(images, of_class, batch=2, seed=3, start=1, stop=9)
    for step, batch in enumerate(batches, 1):
        visits = order.visits(step)
        assert [visit.visit for visit in visits] == list(batch.visits)
        assert [visit.is_prior for visit in visits] == batch.is_prior.tolist()
        assert {visit.size for visit in visits} == {tuple(batch.pixels.shape[-2:])}
        for i, visit in enumerate(visits):
            example = make_example(images, of_class, visit)
            assert (example.key, example.caption) == (batch.keys[i], batch.captions[i])
            assert example.pixels.equal(batch.pixels[i])


def test_a_pair_is_two_visits(image_folder):
    records = scan_folder(image_folder)
    paired = [
        replace(record, loser=replace(records[i - 1], key=loser_key(record.key)))
        for i, record in enumerate(records)
    ]
    images = ImageDataset(paired, replace(WILD, zoom=1.0))
    visits = StepOrder(images, None, batch=2, seed=0).visits(4)
    assert [visit.is_loser for visit in visits] == [False, True] * 2
    (batch,) = iterate_batches(images, batch=2, seed=0, start=4, stop=5)
    keys = [images.records[visit.record].key for visit in visits]
    assert keys == list(batch.keys) and [visit.visit for visit in visits] == list(batch.visits)
