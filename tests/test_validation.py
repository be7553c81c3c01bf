"""Which images a run is validated on, and what that is called."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_core.data.records import Record, scan_folder
from lora_core.diffusion import validation


def records(names: str, **changes: Any) -> list[Record]:
    return [
        replace(Record(Path(name), ("",), None, False, f"key of {name}", (8, 8)), **changes)
        for name in names
    ]


@pytest.mark.parametrize(
    ("total", "count", "chosen"),
    [
        (5, 16, [0, 1, 2, 3, 4]),
        (40, 4, [0, 10, 20, 30]),
        (7, 3, [0, 2, 4]),
        (3, 0, [0, 1, 2]),
        (1, 1, [0]),
    ],
)
def test_images_are_chosen_evenly(total: int, count: int, chosen: list[int]) -> None:
    every = records("".join(chr(97 + i) for i in range(total)))
    scored = validation.choose_images(every, None, count)
    assert scored.records == [every[i] for i in chosen]
    assert (
        validation.choose_images(every * 3, None, count).records == scored.records
    )  # repeats are no images
    told = (
        f"{total} training image{'s' if total > 1 else ''}"
        if len(chosen) == total
        else f"{count} of {total} training images, evenly chosen"
    )
    assert scored.sentence.startswith(f"validation: {told}") and (len(chosen) == total) == (
        "--validation.count" not in scored.sentence
    )


def test_only_images_that_are_not_trained_on_are_held_out() -> None:
    training = records("abcd")
    assert validation.choose_images(training, None, 0).words == "loss on the training images"
    assert validation.choose_images(training, records("xyz"), 0).words == "held-out loss"
    assert (
        validation.choose_images(training, records("xa"), 0).words
        == "loss on 1 training image and others"
    )
    assert (
        "2 given images, 1 of them trained on"
        in validation.choose_images(training, records("xa"), 0).sentence
    )
    assert (
        validation.choose_images(training, records("bd"), 0).words == "loss on the training images"
    )
    copies = [
        replace(record, key="key of a") for record in records("x")
    ]  # the same file under another name
    assert validation.choose_images(training, copies, 0).words == "loss on the training images"


def test_a_mask_does_not_change_what_an_image_is_called_in_the_validation(photos: Path) -> None:
    masked, plain = (
        scan_folder(photos, captions="txt", masks="file"),
        scan_folder(photos, captions="txt", masks="none"),
    )
    assert masked[0].key != plain[0].key
    assert validation.choose_images(masked, None, 0).records == plain
