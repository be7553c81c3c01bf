"""Images, masks and batches of a data set: every choice depends on the example alone."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from lora_core.data import dataset
from lora_core.data.dataset import (
    ImageDataset,
    ImageSettings,
    images_missing_word,
    iterate_batches,
    scan_folder,
)
from lora_core.errors import UserError
from tests.image_examples import WILD, noise_image, save_image

PHOTOS = Path(__file__).parents[2] / "shared" / "data"  # beside the checkout, where there is one


def pixels_of(image):
    """[-1, 1] fp32 [3, h, w], written without the code under test."""
    values = [
        [[image.getpixel((x, y))[c] for x in range(image.width)] for y in range(image.height)]
        for c in range(3)
    ]
    return torch.tensor(values, dtype=torch.float64).div(255).mul(2).sub(1).float()


# ---------------------------------------------------------------- captions


def test_caption_dropout_is_drawn_by_the_example_alone(image_folder):
    """A visit loses its caption with the asked probability, whatever the batch; pixels, visits and
    cache keys stay, prior rows keep theirs.
    """
    records = scan_folder(image_folder)
    plain, dropped = ImageDataset(records, WILD), ImageDataset(records, WILD, caption_dropout=0.3)
    visits = itertools.product(range(5), range(120))
    lost = [dropped.example(i, v).caption == "" for i, v in visits]
    assert abs(sum(lost) / 600 - 0.3) < 5 * (0.21 / 600) ** 0.5
    assert (
        len({tuple(lost[i * 120 : i * 120 + 120]) for i in range(5)}) == 5
    )  # each image its own draws
    twice = sum(a and b for a, b in zip(lost[::2], lost[1::2], strict=True)) / 300
    assert abs(twice - 0.09) < 5 * (0.09 * 0.91 / 300) ** 0.5  # and each visit
    streams = []
    for batch, workers in ((1, 0), (3, 0), (4, 2)):
        made = iterate_batches(dropped, batch=batch, seed=0, stop=24 // batch, workers=workers)
        stream = []
        for b in made:
            stream += zip(b.keys, b.visits, b.captions, strict=True)
        streams.append(stream)
    assert streams[0] == streams[1] == streams[2] and 0 < sum(c == "" for *_, c in streams[0]) < 20
    for without, with_ in zip(
        iterate_batches(plain, batch=4, seed=0, stop=6),
        iterate_batches(dropped, batch=4, seed=0, stop=6),
        strict=True,
    ):
        assert torch.equal(without.pixels, with_.pixels) and without.visits == with_.visits
        assert all(b in (a, "") for a, b in zip(without.captions, with_.captions, strict=True))
    still = ImageSettings(8)
    assert ImageDataset(records, still).cache_key(records[0], 0) == ImageDataset(
        records, still, caption_dropout=0.3
    ).cache_key(records[0], 0)
    prior = ImageDataset(
        scan_folder(image_folder, captions="one", caption="a dog", is_prior=True),
        WILD,
        caption_dropout=0.9,
    )
    assert {prior.example(0, v).caption for v in range(50)} == {"a dog"}
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="caption dropout"):
            ImageDataset(records, WILD, caption_dropout=bad)


# ---------------------------------------------------------------- images and masks


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
def test_a_truncated_image_is_refused_by_name(image_folder, suffix, part):
    path = save_image(noise_image(64, 64), image_folder / f"9.{suffix}")
    (image_folder / "9.txt").write_text("a TOK")
    assert len(scan_folder(image_folder)) == 6
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(UserError, match=rf"cannot read the image .*9\.{suffix}"):
        scan_folder(image_folder)


def test_content_that_is_not_an_image_is_refused_by_name(image_folder):
    (image_folder / "2.png").write_text("an HTML page, perhaps")
    with pytest.raises(UserError, match=r"cannot read the image .*2\.png"):
        scan_folder(image_folder)


def test_pixels_are_the_centre_of_the_image_resized_to_cover(image_folder):
    for i, record in enumerate(scan_folder(image_folder)):
        image = Image.open(record.path)
        short = min(image.size)
        size = tuple(8 if side == short else int(8 * side / short) for side in image.size)
        resized = image.resize(size, Image.Resampling.BILINEAR)
        left, top = round((size[0] - 8) / 2), round((size[1] - 8) / 2)
        example = ImageDataset([record], ImageSettings(8)).example(0, 0)
        assert torch.equal(
            example.pixels, pixels_of(resized.crop((left, top, left + 8, top + 8)))
        ), i
        assert (
            example.crop == (top, left)
            and example.original_size == (image.height, image.width)
            and example.mask is None
        )


def test_interpolation_is_pillows_and_masks_stay_bilinear(tmp_path):
    image, mask = noise_image(20, 14), noise_image(20, 14, 1, "L")
    save_image(image, tmp_path / "x.png")
    save_image(mask, tmp_path / "x.mask.png")
    records = scan_folder(tmp_path, caption="TOK")
    soft = mask.resize((11, 8), Image.Resampling.BILINEAR).crop((2, 0, 10, 8))
    seen = []
    for name in ("bilinear", "bicubic", "lanczos"):
        example = ImageDataset(records, ImageSettings(8, interpolation=name)).example(0, 0)
        whole = image.resize((11, 8), Image.Resampling[name.upper()])
        assert example.crop == (0, 2) and torch.equal(
            example.pixels, pixels_of(whole.crop((2, 0, 10, 8)))
        )
        assert torch.equal(example.mask[0], torch.tensor(list(soft.tobytes())).view(8, 8) / 255)
        seen.append(
            (
                example.pixels,
                ImageDataset(records, ImageSettings(8, interpolation=name)).cache_key(
                    records[0], 0
                ),
            )
        )
        wide = ImageDataset(records, ImageSettings(8, zoom=1.5, interpolation=name)).example(0, 0)
        assert wide.pixels.shape == (3, 8, 8)
        seen[-1] += (wide.pixels,)
    assert len({key for _, key, _ in seen}) == 3
    for i in (0, 2):
        assert not any(torch.equal(seen[a][i], seen[b][i]) for a, b in ((0, 1), (0, 2), (1, 2)))
    with pytest.raises(
        UserError, match="interpolation is 'box'; expected one of bilinear, bicubic, lanczos"
    ):
        ImageSettings(8, interpolation="box")


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (7, 3), (101, 100)])
def test_any_image_fills_any_resolution(tmp_path, size):
    save_image(noise_image(*size), tmp_path / "x.png")
    records = scan_folder(tmp_path, caption="TOK")
    for resolution in (1, 7, 16):
        settings = ImageSettings(resolution, crop="random", zoom=1.7, flip=True, jitter=True)
        for visit in range(5):
            pixels = ImageDataset(records, settings).example(0, visit).pixels
            assert (
                pixels.shape == (3, resolution, resolution)
                and pixels.dtype == torch.float32
                and pixels.abs().max() <= 1
            )


def test_exif_orientation_palette_grey_and_transparency(tmp_path):
    image = noise_image(8, 8)
    turned = Image.Exif()
    turned[0x0112] = 6  # stored lying on its side
    wide = noise_image(16, 8, 1)
    wide.save(tmp_path / "a.png", exif=turned)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    save_image(clear, tmp_path / "b.png")
    save_image(noise_image(8, 8, 2, "L"), tmp_path / "c.png")
    Image.new("I;16", (8, 8), 65535 // 2).save(tmp_path / "d.png")
    save_image(noise_image(8, 8, 3, "CMYK"), tmp_path / "e.jpg")
    save_image(image.quantize(8), tmp_path / "f.png")
    made = ImageDataset(scan_folder(tmp_path, caption="TOK"), ImageSettings(8))
    upright = wide.transpose(Image.Transpose.ROTATE_270)
    assert made.example(0, 0).original_size == (16, 8)
    assert torch.equal(made.example(0, 0).pixels, pixels_of(upright.crop((0, 4, 8, 12))))
    assert torch.equal(made.example(1, 0).pixels, torch.ones(3, 8, 8))  # composited on white
    assert (made.example(2, 0).pixels.std(dim=0) == 0).all()
    assert made.example(3, 0).pixels.abs().max() < 0.01  # 16 bits scaled, not clipped
    assert torch.equal(made.example(5, 0).pixels, pixels_of(image.quantize(8).convert("RGB")))


def test_a_mask_follows_crop_and_flip_and_never_the_jitter(tmp_path):
    """The mask is the image's red band, so wherever the pixels go the mask must go."""
    image = noise_image(20, 14)
    save_image(image, tmp_path / "x.png")
    save_image(image.getchannel("R"), tmp_path / "x.mask.png")
    records = scan_folder(tmp_path, caption="TOK")
    settings = ImageSettings(8, crop="random", zoom=1.5, flip=True)
    seen = set()
    for visit in range(30):
        plain, jittered = (
            ImageDataset(records, replace(settings, jitter=jitter)).example(0, visit)
            for jitter in (False, True)
        )
        assert torch.allclose(plain.mask, (plain.pixels[:1] + 1) / 2, atol=1e-6)
        assert plain.mask.min() >= 0 and plain.mask.max() <= 1
        assert torch.equal(plain.mask, jittered.mask) and plain.crop == jittered.crop
        assert not torch.equal(plain.pixels, jittered.pixels)
        seen.add(plain.crop)
    assert len(seen) > 10


def test_alpha_as_mask_and_masks_in_a_mixed_batch(tmp_path):
    image = noise_image(8, 8)
    alpha = noise_image(8, 8, 5, "L")
    clear = image.copy()
    clear.putalpha(alpha)
    save_image(clear, tmp_path / "x.png")
    record = scan_folder(tmp_path, caption="TOK", masks="alpha")[0]
    example = ImageDataset([record], ImageSettings(8)).example(0, 0)
    assert torch.equal(example.pixels, pixels_of(image))  # colours under the mask are kept
    torch.testing.assert_close(example.mask[0], (pixels_of(alpha.convert("RGB"))[0] + 1) / 2)
    assert scan_folder(tmp_path, caption="TOK")[0].key != record.key
    save_image(noise_image(8, 8, 6), tmp_path / "y.png")
    save_image(alpha, tmp_path / "y.mask.png")
    both = next(
        iterate_batches(
            ImageDataset(scan_folder(tmp_path, caption="TOK"), ImageSettings(8)),
            batch=2,
            seed=0,
            stop=1,
        )
    )
    means = dict(zip(both.keys, both.mask.mean(dim=(1, 2, 3)).tolist(), strict=True))
    assert means[scan_folder(tmp_path, caption="TOK")[0].key] == 1 and min(means.values()) < 0.9
    with pytest.raises(UserError, match=r"y\.png has no alpha channel"):
        scan_folder(tmp_path, caption="TOK", masks="alpha")
    with pytest.raises(UserError, match=r"1 of 2 images lack a mask, first .*x\.png"):
        scan_folder(tmp_path, caption="TOK", masks="file")
    assert all(r.mask_path is None for r in scan_folder(tmp_path, caption="TOK", masks="none"))


# ---------------------------------------------------------------- augmentation


def test_flip_mirrors_half_the_visits_and_jitter_stays_within_ten_percent(tmp_path):
    image = noise_image(8, 8)
    save_image(image, tmp_path / "x.png")
    records = scan_folder(tmp_path, caption="TOK")
    straight, mirrored = pixels_of(image), pixels_of(ImageOps.mirror(image))
    made = [
        ImageDataset(records, ImageSettings(8, flip=True)).example(0, visit).pixels
        for visit in range(200)
    ]
    flips = sum(torch.equal(p, mirrored) for p in made)
    assert (
        flips + sum(torch.equal(p, straight) for p in made) == 200 and 65 < flips < 135
    )  # five standard deviations
    save_image(Image.new("RGB", (8, 8), (100, 100, 100)), tmp_path / "x.png")
    flat = ImageDataset(scan_folder(tmp_path, caption="TOK"), ImageSettings(8, jitter=True))
    levels = torch.tensor(
        [((flat.example(0, v).pixels + 1) * 127.5).mean().item() for v in range(200)]
    )
    assert levels.min() >= 89 and levels.max() <= 110.5 and levels.min() < 92 and levels.max() > 108


def test_variants_repeat_pixels_but_not_captions(image_folder):
    (image_folder / "0.txt").write_text("\n".join(f"TOK number {i}" for i in range(50)))
    records = scan_folder(image_folder)
    made = ImageDataset(
        records, ImageSettings(8, crop="random", zoom=1.4, flip=True, jitter=True, variants=3)
    )
    examples = [made.example(0, visit) for visit in range(9)]
    for visit, example in enumerate(examples):
        assert (
            torch.equal(example.pixels, examples[visit % 3].pixels)
            and example.crop == examples[visit % 3].crop
            and example.visit == visit
        )
    assert (
        len({e.pixels.sum().item() for e in examples}) == 3
        and len({e.caption for e in examples}) > 3
    )


@pytest.mark.parametrize(
    "bad", [{"resolution": 0}, {"zoom": 0.5}, {"variants": -1}, {"crop": "left"}]
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError):
        ImageSettings(**{"resolution": 8, **bad})


# ---------------------------------------------------------------- the stream


def everything(batch):
    return [batch.pixels, batch.mask, batch.is_prior], [
        batch.captions,
        batch.keys,
        batch.visits,
        batch.original_sizes,
        batch.crops,
    ]


def assert_same(left, right):
    (tensors, plain), (tensors2, plain2) = everything(left), everything(right)
    assert plain == plain2
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(tensors, tensors2, strict=True))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_no_bit(image_folder, workers):
    save_image(noise_image(12, 10, 3, "L"), image_folder / "0.mask.png")
    serial = list(
        iterate_batches(ImageDataset(scan_folder(image_folder), WILD), batch=3, seed=0, stop=9)
    )
    threaded = list(
        iterate_batches(
            ImageDataset(scan_folder(image_folder), WILD), batch=3, seed=0, stop=9, workers=workers
        )
    )
    assert len(serial) == len(threaded) == 9
    for left, right in zip(serial, threaded, strict=True):
        assert_same(left, right)


def test_a_resumed_stream_goes_on_where_it_was(image_folder):
    whole = list(
        iterate_batches(ImageDataset(scan_folder(image_folder), WILD), batch=2, seed=0, stop=8)
    )
    rest = list(
        iterate_batches(
            ImageDataset(scan_folder(image_folder), WILD),
            batch=2,
            seed=0,
            start=5,
            stop=8,
            workers=2,
        )
    )
    for left, right in zip(whole[5:], rest, strict=True):
        assert_same(left, right)


def test_a_sample_looks_the_same_for_any_batch_size(image_folder):
    streams = []
    for batch in (1, 2, 3, 6):
        made = iterate_batches(
            ImageDataset(scan_folder(image_folder), WILD), batch=batch, seed=0, stop=12 // batch
        )
        stream = []
        for b in made:
            stream += zip(b.keys, b.visits, b.captions, b.pixels, b.crops, strict=True)
        streams.append(stream)
    for stream in streams[1:]:
        for left, right in zip(streams[0], stream, strict=True):
            assert left[:3] == right[:3] and left[4] == right[4] and torch.equal(left[3], right[3])


def test_copies_of_an_image_take_turns_so_no_visit_comes_twice(image_folder):
    (image_folder / "7.png").write_bytes((image_folder / "0.png").read_bytes())
    (image_folder / "7.txt").write_text("the same file again")
    records = scan_folder(image_folder, repeats=2)
    assert len(records) == 12
    drawn = []
    for b in iterate_batches(ImageDataset(records, WILD), batch=4, seed=0, stop=9):
        drawn += zip(b.keys, b.visits, strict=True)
    assert len(set(drawn)) == 36
    for record, visits in ((records[0], 12), (records[1], 6)):
        assert sorted(v for k, v in drawn if k == record.key) == list(range(visits))


def test_an_abandoned_stream_ends_its_threads_and_a_bad_file_is_named(image_folder):
    made = ImageDataset(scan_folder(image_folder), WILD)
    stream = iterate_batches(made, batch=1, seed=0, stop=10**9, workers=2)
    next(stream)
    stream.close()
    (image_folder / "3.png").unlink()
    with pytest.raises(UserError, match=r"3\.png"):
        list(iterate_batches(ImageDataset(made.records, WILD), batch=5, seed=0, stop=1, workers=2))


def test_prior_rows_come_last_and_do_not_disturb_the_others(image_folder, tmp_path):
    for i in range(3):
        save_image(noise_image(9, 9, 20 + i), tmp_path / "class" / f"{i}.jpg")
    prior = ImageDataset(
        scan_folder(tmp_path / "class", caption="a photo of a dog", is_prior=True), WILD
    )
    instance = ImageDataset(scan_folder(image_folder), WILD)
    for alone, both in zip(
        iterate_batches(instance, batch=2, seed=0, stop=6),
        iterate_batches(instance, prior, batch=2, seed=0, stop=6),
        strict=True,
    ):
        assert (
            both.is_prior.tolist() == [False, False, True, True]
            and both.captions[2:] == ["a photo of a dog"] * 2
        )
        assert_same(both.rows(slice(0, 2)), alone)
    seen = []
    for b in iterate_batches(instance, prior, batch=1, seed=0, stop=3):
        seen += b.keys[1:]
    assert sorted(seen) == sorted(r.key for r in prior.records)
    with pytest.raises(ValueError, match="is_prior=True"):
        iterate_batches(instance, instance, batch=1, seed=0, stop=1)


def test_a_small_data_set_is_decoded_once(image_folder, monkeypatch):
    reads = []
    made = ImageDataset(scan_folder(image_folder), replace(WILD, zoom=1.0))
    read = dataset.read_image
    monkeypatch.setattr(
        dataset,
        "read_image",
        lambda path, *args, **kwargs: reads.append(path) or read(path, *args, **kwargs),
    )
    list(iterate_batches(made, batch=5, seed=0, stop=4))
    assert sorted(reads) == sorted(r.path for r in made.records)
    assert (
        made._recent.bytes
        == sum(p.image.width * p.image.height * 4 for p in made._recent._images.values())
        > 0
    )
    bounded = ImageDataset(made.records, made.settings)
    bounded._recent.limit_bytes = 0
    for left, right in zip(
        iterate_batches(made, batch=5, seed=0, stop=2),
        iterate_batches(bounded, batch=5, seed=0, stop=2),
        strict=True,
    ):
        assert_same(left, right)
    assert len(reads) == 15 and bounded._recent.bytes == 0


# ---------------------------------------------------------------- caches


def test_cache_keys_follow_content_and_every_setting_that_changes_pixels(image_folder):
    record = scan_folder(image_folder)[0]
    base = replace(WILD, variants=4)
    key = ImageDataset([record], base).cache_key(record, 1)
    changes = [
        {"resolution": 9},
        {"interpolation": "lanczos"},
        {"crop": "center"},
        {"zoom": 1.6},
        {"flip": False},
        {"jitter": False},
    ]
    keys = {key} | {
        ImageDataset([record], replace(base, **change)).cache_key(record, 1) for change in changes
    }
    keys.add(ImageDataset([record], base, seed=5).cache_key(record, 1))
    assert len(keys) == 8
    made = ImageDataset([record], base)
    assert made.cache_key(record, 5) == key != made.cache_key(record, 2)
    (image_folder / "0.txt").write_text("another caption")
    (image_folder / "0.png").rename(image_folder / "99.png")
    (image_folder / "0.txt").rename(image_folder / "99.txt")
    moved = next(r for r in scan_folder(image_folder) if r.path.name == "99.png")
    assert made.cache_key(moved, 1) == key  # neither the name, nor the place, nor the caption
    save_image(noise_image(12, 10, 3, "L"), image_folder / "99.mask.png")
    assert (
        made.cache_key(next(r for r in scan_folder(image_folder) if r.path.name == "99.png"), 1)
        != key
    )
    still = ImageDataset([record], ImageSettings(8))
    assert (
        still.cache_key(record, 0)
        == still.cache_key(record, 9)
        == ImageDataset([record], ImageSettings(8), seed=3).cache_key(record, 1)
    )
    with pytest.raises(UserError, match="set variants"):
        ImageDataset([record], WILD).cache_key(record, 0)


@pytest.mark.parametrize("wide", [False, True], ids=["squares", "buckets"])
def test_trap_23_prior_rows_pair_with_prior_captions(image_folder, tmp_path, wide):
    """Rows are i..i c..c in every member of a batch; the public scripts' captions i c i c would
    meet other pixels.
    """
    for i in range(3):
        save_image(noise_image(9, 9 + i, 20 + i), tmp_path / "class" / f"{i}.png")
        (tmp_path / "class" / f"{i}.txt").write_text(f"a dog {i}")
    how = replace(WILD, buckets=wide, bucket_step=2)
    instance, prior = (
        ImageDataset(scan_folder(image_folder), how),
        ImageDataset(scan_folder(tmp_path / "class", is_prior=True), how),
    )
    records = {r.key: r for r in (*instance.records, *prior.records)}
    for b in (1, 2, 3):
        for batch in iterate_batches(instance, prior, batch=b, seed=0, stop=8):
            assert (
                batch.is_prior.tolist()
                == [False] * b + [True] * b
                == [records[k].is_prior for k in batch.keys]
            )
            assert batch.captions == [
                records[k].captions[0] for k in batch.keys
            ] and batch.original_sizes == [records[k].size for k in batch.keys]
            pairs = zip(batch.captions[:b], batch.captions[b:], strict=True)
            interleaved = list(itertools.chain.from_iterable(pairs))
            assert (interleaved == batch.captions) == (b == 1)
            for i, key in enumerate(batch.keys):
                source = prior if batch.is_prior[i] else instance
                again = source.example(
                    [r.key for r in source.records].index(key),
                    batch.visits[i],
                    tuple(batch.pixels.shape[-2:]),
                )
                assert (
                    torch.equal(again.pixels, batch.pixels[i])
                    and again.crop == batch.crops[i]
                    and again.caption == batch.captions[i]
                )


# ---------------------------------------------------------------- real photos


@pytest.mark.parametrize("name, count, side", [("dog", 6, 512), ("monster_toy", 5, 768)])
def test_real_photos(name, count, side):
    if not (PHOTOS / name).is_dir():
        pytest.skip(f"the photos of {PHOTOS / name} are not on this machine")
    records = scan_folder(
        PHOTOS / name, **({} if name == "monster_toy" else {"captions": "object", "caption": "TOK"})
    )
    assert len(records) == count and images_missing_word(records, "TOK") == []
    made = ImageDataset(records, ImageSettings(64, crop="random", zoom=1.3, flip=True, jitter=True))
    for batch in iterate_batches(made, batch=3, seed=0, stop=2):
        assert (
            batch.pixels.shape == (3, 3, 64, 64)
            and batch.pixels.std() > 0.1
            and all(side in size for size in batch.original_sizes)
        )
