"""Shuffled, dropped and chosen parts of captions. The expected captions and their shares are those
that kohya's `process_caption` (sd-scripts, February 2026) drew in 3,000 calls for each case.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.data.caption_tags import add_fixed_texts, compose_caption
from lora_core.data.dataset import ImageDataset, iterate_batches, scan_folder
from lora_core.settings import CaptionSettings, ImageSettings
from tests.image_examples import noise_image

SHUFFLED, KEPT = {"shuffle_caption": True}, {"keep_tokens_separator": "|||"}
SIXTH = 1 / 6
# caption, our settings, {caption that kohya's code draws: share of the calls}
DRAWN: list[tuple[str, dict[str, Any], dict[str, float]]] = [
    ("a,  b , c", {}, {"a,  b , c": 1}),
    (
        "a,  b , c",
        SHUFFLED,
        dict.fromkeys(["a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"], SIXTH),
    ),
    ("a, b, c", SHUFFLED | {"keep_tokens": 1}, {"a, b, c": 0.5, "a, c, b": 0.5}),
    ("a, b", SHUFFLED | {"keep_tokens": 5}, {"a, b": 1}),
    ("x, y ||| a, b ||| z", SHUFFLED | KEPT, {"x, y, a, b, z": 0.5, "x, y, b, a, z": 0.5}),
    ("x ||| a, b", SHUFFLED | KEPT | {"keep_tokens": 2}, {"x, a, b": 0.5, "x, b, a": 0.5}),
    ("x ||| a, b", KEPT, {"x ||| a, b": 1}),
    ("a, b, c", SHUFFLED | KEPT | {"keep_tokens": 2}, {"a, b, c": 1}),
    (
        "a, b, c",
        {"tag_dropout": 0.5, "keep_tokens": 1},
        dict.fromkeys(["a", "a, b", "a, b, c", "a, c"], 0.25),
    ),
    ("{red|blue} cat", {"wildcards": True}, {"blue cat": 0.5, "red cat": 0.5}),
    ("{red|blue} cat", {}, {"{red|blue} cat": 1}),
    ("{{red|blue}} {a|b|a}", {"wildcards": True}, {"{red|blue} a": 2 / 3, "{red|blue} b": 1 / 3}),
    (
        "{a, b|c}, d",
        SHUFFLED | {"wildcards": True},
        {"c, d": 0.25, "d, c": 0.25}
        | dict.fromkeys(
            ["a, b, d", "a, d, b", "b, a, d", "b, d, a", "d, a, b", "d, b, a"], SIXTH / 2
        ),
    ),
    ("{}x {|y}", {"wildcards": True}, {"{}x ": 0.5, "{}x y": 0.5}),
    ("a;;;b, c", SHUFFLED | {"secondary_separator": ";;;"}, {"a,b, c": 0.5, "c, a,b": 0.5}),
    ("a;;;b, c", {"secondary_separator": ";;;"}, {"a,b, c": 1}),
    ("a b. c", SHUFFLED | {"tag_separator": "."}, {"a b, c": 0.5, "c, a b": 0.5}),
    (
        "a,, b",
        SHUFFLED,
        dict.fromkeys([", a, b", ", b, a", "a, , b", "a, b, ", "b, , a", "b, a, "], SIXTH),
    ),
    ("a||| |||b,,c|||d", SHUFFLED | KEPT, {"a, b, c|||d": 1}),
    (
        "a;b, c ||| d",
        SHUFFLED | KEPT | {"secondary_separator": ";", "tag_dropout": 0.5},
        {"a,b, c": 0.5, "a,b, c, d": 0.5},
    ),
]


@pytest.mark.parametrize(("caption", "options", "drawn"), DRAWN)
def test_visits_draw_the_captions_of_kohya_as_often(
    caption: str, options: dict[str, Any], drawn: dict[str, float]
) -> None:
    settings, n = CaptionSettings(**options), 1500
    generator = torch.Generator().manual_seed(0)
    found = Counter(compose_caption(caption, settings, generator) for _ in range(n))
    assert found.keys() == drawn.keys()
    for text, share in drawn.items():  # five standard deviations of a binomial count
        assert abs(found[text] - n * share) <= 5 * (n * share * (1 - share)) ** 0.5


def test_the_plain_caption_has_every_tag_in_order_and_the_first_of_each_choice() -> None:
    settings = CaptionSettings(
        wildcards=True, shuffle_caption=True, tag_dropout=0.9, keep_tokens_separator="|||"
    )
    assert compose_caption("TOK ||| {red|blue}, b, c ||| z", settings) == "TOK, red, b, c, z"


def test_prefix_and_suffix_stand_around_every_line() -> None:
    settings = CaptionSettings(caption_prefix="best,", caption_suffix=", side")
    assert add_fixed_texts(["cat", "dog"], settings) == ("best, cat , side", "best, dog , side")
    first = replace(settings, caption_lines="first")
    assert add_fixed_texts(["cat", "dog"], first) == ("best, cat , side",)
    assert add_fixed_texts(["cat", "dog"], CaptionSettings()) == ("cat", "dog")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        noise_image(20, 20, i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.tags").write_text(f"n{i}, a, b, c, d\nsecond line\n")
        (tmp_path / f"{i}.txt").write_text("another caption")
    return tmp_path


def test_a_caption_depends_on_seed_image_and_visit_alone(folder: Path) -> None:
    tags = CaptionSettings(
        caption_extension=".tags", caption_lines="first", shuffle_caption=True, keep_tokens=1
    )
    records = scan_folder(folder, tags=tags)
    assert {record.source.name for record in records if isinstance(record.source, Path)} == {
        "0.tags",
        "1.tags",
        "2.tags",
    }
    images = ImageDataset(records, ImageSettings(resolution=16), seed=1)

    def read(batch: int, start: int = 0) -> list[tuple[str, str, int]]:
        rows = []
        for found in iterate_batches(images, batch=batch, seed=1, start=start, stop=12 // batch):
            rows += zip(found.captions, found.keys, found.visits, strict=True)
        return rows

    once = read(1)
    assert read(3) == once and read(4) == once and read(1, start=5) == once[5:]
    for caption, key, visit in once:  # and a caption asked for by itself, as the caches ask
        index = next(i for i, record in enumerate(records) if record.key == key)
        assert images.caption(index, visit) == caption
        assert caption.startswith(f"n{index}, ") and sorted(caption[4:].split(", ")) == [*"abcd"]
    assert len({caption for caption, _, _ in once}) > 9
    plain = ImageDataset(records, ImageSettings(resolution=16), seed=1, plain_captions=True)
    assert {plain.caption(0, visit) for visit in range(9)} == {"n0, a, b, c, d"}
