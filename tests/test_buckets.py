"""buckets: their sizes, the nearest one, and batches of one size, a function of their step."""

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lora_core.data import buckets
from lora_core.data.dataset import (
    ImageDataset,
    ImageSettings,
    describe_upscaled,
    iterate_batches,
    scan_folder,
)
from lora_core.data.sample_order import BucketOrder
from lora_core.errors import UserError

SHAPES = [
    (20, 20),
    (40, 20),
    (38, 20),
    (20, 41),
    (16, 16),
    (90, 10),
    (21, 20),
    (33, 16),
    (8, 12),
    (20, 19),
    (60, 61),
]  # w, h
WILD = ImageSettings(
    16, crop="random", zoom=1.4, flip=True, jitter=True, buckets=True, bucket_step=4
)


def noise_image(width, height, seed=0, mode="RGB"):
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(
        mode, (width, height), random.Random(seed).randbytes(width * height * bands)
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i, size in enumerate(SHAPES):
        noise_image(*size, seed=i).save(tmp_path / "images" / f"{i:02d}.png")
        (tmp_path / "images" / f"{i:02d}.txt").write_text(f"image {i}")
    return tmp_path / "images"


def pixels_of(image):
    values = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(
        image.height, image.width, 3
    )
    return (2 * values - 255).permute(2, 0, 1) / 255


def kohya_sizes(area, low, high, step):
    """sd-scripts' rule, (w, h): the square, and for each width the longest height that fits, both
    ways round.
    """
    found = {(math.isqrt(area) // step * step,) * 2}
    for width in range(low, high + 1, step):
        height = min(high, area // width // step * step)
        found |= {(width, height), (height, width)} if height >= low else set()
    return found


# ---------------------------------------------------------------- sizes


def test_at_512_the_sizes_are_those_of_sd_scripts():
    assert set(buckets.bucket_sizes(512, 64)) == kohya_sizes(512**2, 256, 1024, 64)
    assert len(buckets.bucket_sizes(512, 64)) == len(set(buckets.bucket_sizes(512, 64))) and list(
        buckets.bucket_sizes(512, 64)
    ) == sorted(buckets.bucket_sizes(512, 64))
    assert (
        (1024, 1024) in buckets.bucket_sizes(1024, 64)
        and (832, 1216) in buckets.bucket_sizes(1024, 64)
        and (768, 1344) in buckets.bucket_sizes(1024, 64)
    )  # SDXL's own


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 700))
def test_sizes_are_all_that_fit_but_those_inside_a_longer_one(step, more):
    resolution = step + more
    found = buckets.bucket_sizes(resolution, step)
    low, high = (
        max(step, round(resolution // 2 / step + 1e-9) * step),
        2 * resolution // step * step,
    )
    sides = range(step, high + 1, step)
    every = set(found)
    if len(sides) < 60:
        pairs = itertools.product(sides, sides)
        every = {(h, w) for h, w in pairs if h * w <= resolution**2 and min(h, w) >= low}
    assert set(found) <= every | {(resolution // step * step,) * 2}
    assert all((w, h) in found for h, w in found)
    assert all(any(h <= H and w <= W for H, W in found) for h, w in every)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.integers(0, 20), st.integers(8, 600), st.integers(0, 900))
def test_sizes_between_given_sides_are_those_of_sd_scripts(step8, less, more, longer):
    step = 8 * step8
    resolution = step + more
    low, high = max(step, resolution - less * step), resolution + longer
    rounded = low // step * step, -(-high // step) * step
    theirs = kohya_sizes(resolution**2, *rounded, step)
    assert set(buckets.bucket_sizes(resolution, step, low, high)) == theirs


def kohya_kept(width, height, area, step):
    """(bucket, resized size), (w, h): sd-scripts' BucketManager.select_bucket with no_upscale."""

    def round_to_steps(x):
        x = int(x + 0.5)
        return x - x % step

    resized = (width, height)
    aspect = width / height
    if width * height > area:
        wide = math.sqrt(area * aspect)
        by_width = round_to_steps(wide)
        width_error = abs(by_width / round_to_steps(by_width / aspect) - aspect)
        by_height = round_to_steps(area / wide)
        height_error = abs(round_to_steps(by_height * aspect) / by_height - aspect)
        resized = (int(by_height * aspect + 0.5), by_height)
        if width_error < height_error:
            resized = (by_width, int(by_width / aspect + 0.5))
    return tuple(side - side % step for side in resized), resized


@settings(max_examples=400, deadline=None)
@given(st.integers(64, 3000), st.integers(64, 3000), st.sampled_from([256, 512, 768, 1024]))
def test_images_that_are_not_enlarged_have_the_buckets_of_sd_scripts(w, h, resolution):
    own = ImageSettings(resolution, buckets=True, bucket_upscale=False, bucket_step=32)
    try:
        bucket, resized = kohya_kept(w, h, resolution**2, 32)
    except ZeroDivisionError:  # it has no bucket for so long an image
        return
    if 0 in bucket:
        with pytest.raises(UserError, match=r"less than --data\.bucket-step 32 on a"):
            buckets.cut_size(own, (h, w), "a.png")
        return
    assert buckets.kept_size(own, (h, w)) == resized[::-1]
    assert buckets.cut_size(own, (h, w)) == bucket[::-1]
    assert math.prod(bucket) <= resolution**2 * (1 + 32 / min(bucket)) ** 2


def test_an_image_that_is_not_enlarged_is_cut_out_of_its_own_pixels(folder):
    """A small image loses its edges alone; a large one is scaled to the area first."""
    own = ImageSettings(32, buckets=True, bucket_upscale=False, bucket_step=8)
    dataset = ImageDataset(scan_folder(folder), own)
    for index, (w, h) in enumerate(SHAPES):
        height, width = dataset.sizes[index]
        example = dataset.example(index, 0)
        assert example.pixels.shape[1:] == (height, width)
        if w * h <= 32**2:
            assert (height, width) == (h // 8 * 8, w // 8 * 8)
            image = noise_image(w, h, seed=index)
            top, left = round((h - height) / 2), round((w - width) / 2)
            cut = image.crop((left, top, left + width, top + height))
            assert torch.equal(example.pixels, pixels_of(cut)) and example.crop == (top, left)
    assert describe_upscaled(dataset) == ""
    larger = dataset.example(0, 0, (48, 48))  # another's size: it is enlarged to cover that
    assert larger.pixels.shape[1:] == (48, 48)
    keys = {dataset.cache_key(dataset.records[0], 0)}
    enlarged = ImageDataset(scan_folder(folder), ImageSettings(16, buckets=True, bucket_step=8))
    keys.add(enlarged.cache_key(enlarged.records[0], 0))
    assert dataset.sizes[0] == enlarged.sizes[0] and len(keys) == 2
    for resolution in (18, 20):  # its own 20 pixels fit the second: other pixels, cut to one size
        kept = ImageSettings(resolution, buckets=True, bucket_upscale=False, bucket_step=8)
        other = ImageDataset(scan_folder(folder)[:1], kept)
        assert other.sizes[0] == (16, 16)
        keys.add(other.cache_key(other.records[0], 0))
    assert len(keys) == 3


def test_limits_of_buckets_that_leave_out_the_resolution_are_refused():
    for limits in ({"bucket_min": 65}, {"bucket_max": 63}):
        with pytest.raises(UserError, match=r"without --data\.resolution 64"):
            ImageSettings(64, buckets=True, **limits)
    with pytest.raises(UserError, match=r"--data\.zoom 1\.5 enlarges images"):
        ImageSettings(64, buckets=True, bucket_upscale=False, crop="random", zoom=1.5)


def test_a_step_beyond_the_resolution_is_refused():
    for resolution, step in ((63, 64), (64, 0)):
        with pytest.raises(UserError, match=r"--data\.bucket-step is"):
            ImageSettings(resolution, buckets=True, bucket_step=step)
    ImageSettings(63, bucket_step=64)  # not used


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_nearest_is_the_least_difference_of_log_aspects_and_a_neighbour_of_kohyas_choice(h, w):
    choice = buckets.bucket_sizes(512, 64)
    chosen = buckets.nearest_size((h, w), choice)
    gap = {size: abs(math.log(h / w) - math.log(size[0] / size[1])) for size in choice}
    assert (h, w) in choice or gap[chosen] <= min(gap.values()) + 1e-12
    kohya = min(choice, key=lambda size: abs(w / h - size[1] / size[0]))  # sd-scripts
    order = sorted({Fraction(*size) for size in choice})
    assert abs(order.index(Fraction(*chosen)) - order.index(Fraction(*kohya))) <= 1
    assert buckets.nearest_size((w, h), choice) == chosen[::-1] or h == w


def test_nearest_takes_the_exact_size_then_the_larger_area_then_the_first():
    assert buckets.nearest_size((320, 704), buckets.bucket_sizes(512, 64)) == (320, 704)
    assert buckets.nearest_size((100, 200), [(10, 20), (40, 80), (20, 40)]) == (40, 80)
    assert buckets.nearest_size((10, 20), [(40, 80), (10, 20)]) == (10, 20)
    assert buckets.nearest_size((7, 7), [(4, 6), (6, 4)]) == (4, 6) and buckets.nearest_size(
        (7, 7), [(6, 4), (4, 6)]
    ) == (6, 4)


# ---------------------------------------------------------------- batches


def everything(batch):
    mask = None if batch.mask is None else batch.mask.tolist()
    return (
        batch.pixels.tolist(),
        mask,
        batch.captions,
        batch.keys,
        batch.visits,
        batch.is_prior.tolist(),
        batch.original_sizes,
        batch.crops,
    )


@pytest.mark.parametrize("batch, repeats", [(1, 1), (2, 1), (3, 2), (5, 3)])
def test_no_image_is_dropped_no_visit_comes_twice_and_batches_have_one_size(folder, batch, repeats):
    (folder / "99.png").write_bytes((folder / "03.png").read_bytes())  # a copy
    (folder / "99.txt").write_text("the same again")
    made = ImageDataset(scan_folder(folder, repeats=repeats), WILD)
    steps = BucketOrder(made.sizes, batch, 0).steps
    stream = list(iterate_batches(made, batch=batch, seed=0, stop=4 * steps))
    seen = []
    for b in stream:
        seen += zip(b.keys, b.visits, strict=True)
    assert len(set(seen)) == len(seen) == 4 * steps * batch
    for b in stream:
        sized = zip(made.records, made.sizes, strict=True)
        assert set(b.keys) <= {r.key for r, size in sized if size == b.pixels.shape[-2:]}
    least = Counter(r.key for r in made.records)
    for epoch in range(4):
        batches = stream[epoch * steps : (epoch + 1) * steps]
        count = Counter(itertools.chain.from_iterable(b.keys for b in batches))
        assert all(count[key] >= n for key, n in least.items())


def test_workers_and_resume_change_no_bit(folder):
    noise_image(20, 20, 3, "L").save(folder / "00.mask.png")
    prior = ImageDataset(
        scan_folder(folder, captions="one", caption="a photo", masks="none", is_prior=True), WILD
    )
    serial = [
        everything(b)
        for b in iterate_batches(
            ImageDataset(scan_folder(folder), WILD), prior, batch=2, seed=3, stop=20
        )
    ]
    assert [
        everything(b)
        for b in iterate_batches(
            ImageDataset(scan_folder(folder), WILD), prior, batch=2, seed=3, stop=20, workers=3
        )
    ] == serial
    assert [
        everything(b)
        for b in iterate_batches(
            ImageDataset(scan_folder(folder), WILD),
            prior,
            batch=2,
            seed=3,
            start=13,
            stop=20,
            workers=1,
        )
    ] == serial[13:]


def test_a_cut_is_the_resized_image_at_its_crop(folder):
    """Scaled to cover the bucket, mirrored, then cut at `crop`: the corner is one of the mirrored
    image (diffusers' scripts, semantics 2.5).
    """
    mirrored = 0
    for how in (
        ImageSettings(16, buckets=True, bucket_step=4),
        ImageSettings(16, crop="random", flip=True, buckets=True, bucket_step=4),
    ):
        made = ImageDataset(scan_folder(folder), how)
        for i, record in enumerate(made.records):
            image = Image.open(record.path)
            height, width = made.sizes[i]
            scale = max(Fraction(width, image.width), Fraction(height, image.height))
            whole = image.resize(
                (int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR
            )
            assert whole.width == width or whole.height == height  # no more is lost than must be
            for visit in range(6):
                example = made.example(i, visit)
                top, left = example.crop
                cuts = [
                    v.crop((left, top, left + width, top + height))
                    for v in (whole, ImageOps.mirror(whole))
                ]
                same = [torch.equal(example.pixels, pixels_of(c)) for c in cuts]
                assert any(same), (record.path, visit)
                mirrored += same[1] and not same[0]
                assert example.pixels.shape == (3, height, width) and example.original_size == (
                    image.height,
                    image.width,
                )
                assert how.crop == "random" or example.crop == (
                    round((whole.height - height) / 2),
                    round((whole.width - width) / 2),
                )
    assert mirrored > 10


def test_images_of_every_aspect_lose_little(folder):
    made = ImageDataset(scan_folder(folder), ImageSettings(16, buckets=True, bucket_step=4))
    assert all(h * w <= 256 and h % 4 == w % 4 == 0 for h, w in made.sizes)
    of = {r.path.stem: size for r, size in zip(made.records, made.sizes, strict=True)}
    assert (
        of["00"] == of["04"] == (16, 16)
        and of["01"] == of["02"] == (12, 20)
        and of["03"] == of["08"] == (20, 12)
    )
    assert of["05"] == (8, 32)  # more extreme than any bucket: the most extreme one, not left out


def test_prior_rows_are_cut_to_the_size_of_the_batch(folder, tmp_path):
    (tmp_path / "class").mkdir()
    for i in range(3):
        noise_image(19, 13, 50 + i).save(tmp_path / "class" / f"{i}.png")
    instance = ImageDataset(scan_folder(folder), WILD)
    prior = ImageDataset(scan_folder(tmp_path / "class", caption="a dog", is_prior=True), WILD)
    sizes = set()
    for alone, both in zip(
        iterate_batches(instance, batch=2, seed=0, stop=12),
        iterate_batches(instance, prior, batch=2, seed=0, stop=12),
        strict=True,
    ):
        assert everything(both.rows(slice(0, 2))) == everything(
            alone
        ) and both.is_prior.tolist() == [False, False, True, True]
        sizes.add(tuple(both.pixels.shape[-2:]))
    assert len(sizes) > 3
    still = ImageDataset(prior.records, ImageSettings(16))
    for size in sizes:
        assert prior.example(0, 3, size).pixels.shape == (3, *size)
        assert torch.equal(
            still.example(0, 0, size).pixels,
            ImageDataset(prior.records, ImageSettings(16)).example(0, 0, size).pixels,
        )


def test_the_size_enters_the_cache_key(folder):
    made = ImageDataset(scan_folder(folder), ImageSettings(16, buckets=True, bucket_step=4))
    record = made.records[1]
    keys = {made.cache_key(record, 0, size) for size in buckets.bucket_sizes(16, 4)}
    assert (
        len(keys) == len(buckets.bucket_sizes(16, 4))
        and made.cache_key(record, 0) == made.cache_key(record, 7, made.sizes[1]) in keys
    )
    squares = ImageDataset(made.records, ImageSettings(16))
    assert squares.cache_key(record, 0) == made.cache_key(record, 0, (16, 16))  # the same pixels
    assert torch.equal(squares.example(1, 0).pixels, made.example(1, 0, (16, 16)).pixels)


def test_the_report_counts_images_and_further_visits():
    assert (
        buckets.describe_buckets([(16, 16)] * 4, 2)
        == "one bucket, 16 x 16: 4 images in 2 batches of 2"
    )
    text = buckets.describe_buckets([(16, 16)] * 3 + [(8, 28)], 4)
    assert text.splitlines()[1:] == [
        "  28 x 8: 1 image in 1 batch of 4, 4 times",
        "  16 x 16: 3 images in 1 batch of 4, 1 of them twice",
    ]


@pytest.mark.parametrize(
    "count, batch, said",
    [
        (5, 2, "5 images in 3 batches of 2, 1 of them twice"),
        (2, 5, "2 images in 1 batch of 5, 1 of them twice, 1 of them 3 times"),
        (2, 4, "2 images in 1 batch of 4, each twice"),
        (1, 1, "1 image in 1 batch of 1"),
    ],
)
def test_the_report_says_how_often_images_are_visited(count: int, batch: int, said: str) -> None:
    """As often as the order of an epoch has them."""
    assert buckets.describe_buckets([(8, 8)] * count, batch) == f"one bucket, 8 x 8: {said}"
    order = BucketOrder(["8 x 8"] * count, batch, seed=1)
    visits = itertools.chain.from_iterable(map(order.visits, range(order.steps)))
    seen = Counter(index for index, _ in visits)
    each, more = divmod(order.steps * batch, count)
    assert sorted(seen.values()) == [each] * (count - more) + [each + 1] * more


def test_images_that_are_scaled_up_are_counted(folder):
    records = scan_folder(folder, repeats=2)
    assert describe_upscaled(ImageDataset(records, ImageSettings(8))) == ""
    assert (
        describe_upscaled(ImageDataset(records, ImageSettings(20)))
        == "5 of 11 images are smaller than 20 pixels and scaled up, first 04.png (16 x 16)"
    )
    assert (
        describe_upscaled(ImageDataset(records, ImageSettings(11)))
        == "2 of 11 images are smaller than 11 pixels and scaled up, first 05.png (90 x 10)"
    )
    assert (
        describe_upscaled(ImageDataset(records[8:9], ImageSettings(9)))
        == "1 of 1 images is smaller than 9 pixels and scaled up, first 08.png (8 x 12)"
    )
    assert "are smaller than their bucket and scaled up, first " in describe_upscaled(
        ImageDataset(records, ImageSettings(24, buckets=True, bucket_step=4))
    )
