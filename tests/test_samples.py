"""Which prompts a run draws, and that a model for inpainting draws too."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageChops

import infer
import train
from lora_core.config import NEW_PROMPTS, Config, PriorConfig, SamplesConfig, Stage
from lora_core.errors import UserError
from lora_core.runs import pictures
from lora_core.runs.pictures import ImageRow
from tests import tiny_sdxl
from tests.conftest import merged, save_photos, save_pipeline
from tests.opened_run import open_parts
from tests.tiny_sd2 import second_pipeline
from training.samples import before_after_grid, save_sample_grid, wrap_row


def test_an_inpainting_model_trains_and_draws(
    config: Config, plain: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()  # draws for real
    run = train.train(
        replace(
            config,
            model=str(save_pipeline(tmp_path / "inpaint", channels=9)),
            prior=PriorConfig("a cat", count=1),
        )
    )
    assert Image.open(run / "before_after.png").size[0] > 300


def save_inpainting_model(family: str, folder: Path) -> Path:
    """A tiny model with 9 input channels."""
    if family == "sd":
        return save_pipeline(folder, channels=9)
    if family == "sdxl":
        tiny_sdxl.save(folder, channels=9)
        return folder
    pipe = second_pipeline()
    settings = dict(pipe.unet.config) | {"in_channels": 9, "_use_default_values": []}
    pipe.unet = UNet2DConditionModel.from_config(settings)
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "family, use", [("sd", "loss"), ("sd2", "both"), ("sdxl", "loss"), ("sdxl", "both")]
)
def test_every_family_learns_to_paint_holes_and_its_files_load(
    config: Config, plain: None, tmp_path: Path, family: str, use: str
) -> None:
    """Random rectangles with a masked loss, or the masks themselves."""
    folder = save_inpainting_model(family, tmp_path / "inpaint")
    config = replace(config, model=str(folder), stages=(Stage(1, ("denoiser", "text_encoder")),))
    run = train.train(merged(config, {"data": {"masks": "file", "mask_use": use}}))
    Image.effect_noise((32, 32), 90).convert("RGB").save(tmp_path / "start.png")
    hole = Image.new("L", (32, 32))
    hole.paste(255, (0, 0, 16, 32))
    hole.save(tmp_path / "hole.png")
    words = ["--model", str(folder), "--prompt", "a", "--steps", "2", "--guidance", "1.5"]
    words += ["--init-image", str(tmp_path / "start.png"), "--mask", str(tmp_path / "hole.png")]
    drawn = []
    for name, lora in (("base", []), ("ours", ["--lora", f"{run}:30"])):
        assert infer.main([*words, *lora, "--out", str(tmp_path / f"{name}.png")]) == 0
        drawn.append(Image.open(tmp_path / f"{name}.png").tobytes())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("count", [1, 5, 6, 11])
def test_images_beyond_the_columns_go_on_below(count: int) -> None:
    row = ImageRow(
        "label",
        [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(count)],
        [f"prompt {i}" for i in range(count)],
        notes=[f"note {i}" for i in range(count)],
    )
    cut = list(wrap_row(row, 5))
    assert [len(r.images) for r in cut] == [5] * (count // 5) + ([count % 5] if count % 5 else [])
    assert list(itertools.chain.from_iterable(r.captions for r in cut)) == row.captions
    assert list(itertools.chain.from_iterable(r.notes or () for r in cut)) == row.notes
    assert list(itertools.chain.from_iterable(r.images for r in cut)) == row.images


def drawn_sheets(monkeypatch: pytest.MonkeyPatch) -> list[list[ImageRow]]:
    """The rows of every sheet that is drawn from now on."""
    sheets: list[list[ImageRow]] = []
    blank = Image.new("RGB", (1, 1))
    monkeypatch.setattr(
        pictures, "draw_grid", lambda rows, **_: (sheets.append(list(rows)), blank)[1]
    )
    return sheets


def test_one_caption_has_four_seeds_and_new_places(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's first command: one caption for all images. The images of a sheet differ, and
    those before and after training have the same seeds.
    """
    monkeypatch.undo()
    data = replace(config.data, captions="one", caption="a photo of TOK")
    look = SamplesConfig(steps=1, guidance=1.0)
    stages = (Stage(1, ("denoiser", "tokens")),)
    s = open_parts(replace(config, data=data, samples=look, stages=stages))
    drawn = s.samples.draw(s.samples.prompts)
    assert len({image.tobytes() for image in drawn}) == 4
    sheets = drawn_sheets(monkeypatch)
    before_after_grid(s.samples, drawn, "")
    assert [(row.role, len(row.images)) for row in sheets[0]] == [
        ("base", 4),
        ("tokens", 4),
        ("after", 4),
        ("new", 4),
    ]
    after, new = sheets[0][2:]
    assert list(after.captions) == [f"a photo of TOK, seed {i}" for i in range(4)]
    assert after.notes == [f"seed {i}" for i in range(4)] and "a photo of TOK" in after.label
    assert new.captions[0] == "a photo of TOK in the snow"
    alone = s.samples.batch_of(["a photo of TOK"], [2])
    with s.model.evaluating():
        (image,) = s.samples._generate([alone], "drawing")[0]
    difference = ImageChops.difference(image, drawn[2]).getextrema()
    assert max(high for _, high in difference) <= 1  # in a batch of other images


def test_new_places_have_a_subject_or_are_left_out(config: Config, quick: None) -> None:
    two = replace(config.samples, prompts=("a TOK", "TOK in a box"), new_prompts=NEW_PROMPTS)
    s = open_parts(replace(config, samples=two))
    assert s.samples.subject == "" and s.samples.new_prompts == []
    s = open_parts(replace(config, samples=two, stages=(Stage(1, ("denoiser", "tokens")),)))
    assert s.samples.new_prompts[1] == "a photo of TOK on a beach"
    own = replace(two, new_prompts=("a house, {}", "a"))
    with pytest.raises(UserError, match="write the words themselves"):
        open_parts(replace(config, samples=own))


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
            config,
            samples=SamplesConfig(
                steps=1, guidance=1.0, prompts=prompts, new_prompts=new, show_data=True
            ),
        )
    )
    sheets = drawn_sheets(monkeypatch)
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


def test_a_sample_sheet_has_a_row_for_each_strength(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mix-of-Show's alpha_list; 0 is the tokens alone, and training goes on at strength 1."""
    monkeypatch.undo()
    samples = replace(config.samples, strengths=(0.0, 0.7, 1.0))
    s = open_parts(replace(config, samples=samples))
    for name, parameter in s.model.denoiser.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.ones_(parameter)
    sheets = drawn_sheets(monkeypatch)
    run = SimpleNamespace(folder=Path(config.out), writes=True)
    save_sample_grid(s.samples, run, 3)  # type: ignore[arg-type]
    rows = sheets[0]
    assert [row.label for row in rows] == ["strength 0", "strength 0.7", "strength 1"]
    images = [row.images[0].tobytes() for row in rows]
    assert len(set(images)) == 3
    assert images[2] == s.samples.draw(["a TOK"])[0].tobytes()
    with s.model.without_adapters():
        assert images[0] == s.samples.draw(["a TOK"])[0].tobytes()
