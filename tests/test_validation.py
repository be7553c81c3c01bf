"""Which images a run is validated on, what that is called, what it costs, and a run without
validation.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train
from lora_core.config import Config, SamplesConfig, ValidationConfig
from lora_core.data.records import Record, scan_folder
from lora_core.diffusion import validation
from lora_core.runs import pictures, reports
from lora_core.runs.pictures import ImageRow
from tests.conftest import rows, save_photos
from tests.opened_run import open_parts
from training.samples import before_after_grid, save_sample_grid, wrap_row


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


@pytest.mark.parametrize(("batch", "count"), [(1, 0), (2, 0), (3, 4), (5, 0), (7, 0)])
def test_it_costs_a_batch_at_a_time_and_reads_each_image_once(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch, batch: int, count: int
) -> None:
    s = open_parts(
        replace(config, batch_size=batch, validation=ValidationConfig(bins=2, draws=2, count=count))
    )
    sizes: list[int] = []
    read: list[int] = []
    prompts: list[int] = []
    family, images = s.model.family, s.data.validation
    denoise, example, encode = family.denoise, images.example, family.encode_prompts
    monkeypatch.setattr(family, "denoise", lambda x, *a: (sizes.append(len(x)), denoise(x, *a))[1])
    monkeypatch.setattr(family, "encode_prompts", lambda p: (prompts.append(len(p)), encode(p))[1])
    monkeypatch.setattr(images, "example", lambda i, visit: (read.append(i), example(i, visit))[1])
    for done in (0, 1):
        s.log.validate(done, s.scorer)
    number = count or 5
    assert set(sizes) == {min(batch, number)} == set(prompts) and sorted(read) == list(
        range(number)
    )
    assert s.log.scores[0] == s.log.scores[1] and [x.key for x in s.log.scores[0][:number]] == [
        r.key for r in images.records
    ]
    expected = []
    for place in itertools.product(range(2), range(2)):
        expected += [place] * number
    assert [(x.draw, x.bin) for x in s.log.scores[0]] == expected
    assert images._recent.bytes == 0 and all(
        e.pixels.shape == (4, 8, 8) for e in s.scorer.latents.values()
    )


def test_scores_of_other_batches_differ_by_rounding_only(config: Config, quick: None) -> None:
    found = []
    for batch in (1, 2, 5):
        s = open_parts(replace(config, batch_size=batch, validation=ValidationConfig(bins=3)))
        s.log.validate(0, s.scorer)
        found.append(torch.tensor([score.loss for score in s.log.scores[0]]))
        Path(config.out).mkdir(exist_ok=True)
        config = replace(config, out=config.out + "x")
    assert all(torch.allclose(found[0], other, rtol=1e-5, atol=0) for other in found[1:])


def test_a_run_without_validation_has_no_loss_before_and_after(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train.train(replace(config, validation=ValidationConfig(every=-1)))
    out = capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert (
        summary["val_loss_before"] is None
        and summary["val_loss_after"] is None
        and not (run / "val.jsonl").exists()
    )
    assert (
        "no validation" in out
        and "held-out" not in out
        and not any("val_loss" in row for row in rows(run))
    )
    assert "loss before" not in (run / "README.md").read_text()
    other = train.train(replace(config, out=config.out + "2"))
    text = (other / "README.md").read_text()
    assert (
        "loss on the training images" in text + capsys.readouterr().out and "held-out" not in text
    )
    assert train.main(["--compare", str(run), str(other)]) == 2
    assert "was trained without validation" in capsys.readouterr().err


def test_the_plot_says_which_images_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "val_loss": 0.5 - i / 10}) + "\n" for i in range(3))
    )
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        pictures,
        "plot_lines",
        lambda series, path, *, axes, title: seen.update(series=list(series), title=title),
    )
    reports.plot_metrics(tmp_path, "loss on the training images")
    assert seen == {
        "series": ["loss on the training images"],
        "title": "loss on the training images, at fixed timesteps and noise",
    }


# ---------------------------------------------------------------- every prompt is shown


@pytest.mark.parametrize("count", [1, 5, 6, 11])
def test_prompts_beyond_five_go_on_below(count: int) -> None:
    row = ImageRow(
        "label",
        [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(count)],
        [f"prompt {i}" for i in range(count)],
    )
    cut = list(wrap_row(row))
    assert [len(r.images) for r in cut] == [5] * (count // 5) + ([count % 5] if count % 5 else [])
    assert list(itertools.chain.from_iterable(r.captions for r in cut)) == row.captions
    assert list(itertools.chain.from_iterable(r.images for r in cut)) == row.images


def test_all_prompts_of_the_config_are_drawn_before_and_after(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    prompts, new = (
        tuple(f"a TOK {i}" for i in range(7)),
        tuple(f"TOK on mars {i}" for i in range(6)),
    )
    s = open_parts(
        replace(
            config, samples=SamplesConfig(steps=1, guidance=1.0, prompts=prompts, new_prompts=new)
        )
    )
    sheets: list[list[ImageRow]] = []
    monkeypatch.setattr(
        pictures,
        "draw_grid",
        lambda rows, **_: (sheets.append(list(rows)), Image.new("RGB", (1, 1)))[1],
    )
    before_after_grid(s.samples, s.samples.draw(s.samples.prompts), "")
    labels = [(row.label.split(":")[0], len(row.images)) for row in sheets[0]]
    assert labels == [
        ("what it learned from", 5),
        ("before", 5),
        ("after", 5),
        ("before", 2),
        ("after", 2),
        ("after", 5),
        ("after", 1),
    ]
    assert [*sheets[0][-2].captions, *sheets[0][-1].captions] == list(new)
    save_sample_grid(s.samples, s.run, 1)
    shown = itertools.chain.from_iterable(row.captions for row in sheets[1])
    assert list(shown) == list(prompts)


def test_captions_stand_for_prompts_up_to_five(config: Config, quick: None, tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "many")
    for i in range(7):
        Image.new("RGB", (16, 16), (30 * i, 9, 9)).save(folder / f"x{i}.png")
        (folder / f"x{i}.txt").write_text(f"a photo {i}")
    s = open_parts(
        replace(
            config,
            data=replace(config.data, images=str(folder)),
            samples=SamplesConfig(steps=1, guidance=1.0),
        )
    )
    assert len(s.samples.prompts) == 5
