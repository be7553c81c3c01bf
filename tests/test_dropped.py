"""Dropped captions: zeros where the model samples an empty prompt with zeros, or its encoding;
never what a caption is that is really empty.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train
from lora_core.config import AdapterConfig, Config, DataConfig, Stage
from lora_core.data.dataset import Batch, ImageDataset, ImageSettings, collate, scan_folder
from lora_core.errors import UserError
from lora_core.family import Conditioning, Sizes
from models import load_family
from tests import tiny_sdxl
from tests.conftest import learned, same
from tests.opened_run import OpenedRun, open_parts
from training.inputs.caption_cache import CaptionCache, CaptionRows, TokenIds
from training.step import encode_conditioning

SIDE = 16
TEXT, NO_TEXT = Stage(1, ("denoiser", "text_encoder")), Stage(1, ("denoiser",))


def opened(config: Config, model: Path, photos: Path, name: str = "", **data: Any) -> OpenedRun:
    how = {"captions": "txt", "caption_dropout": 0.5, **data}
    return open_parts(
        replace(
            config,
            model=str(model),
            out=config.out + name,
            data=DataConfig(images=str(photos), resolution=SIDE, **how),
        )
    )


def batch_of(s: OpenedRun, captions: list[str], dropped: list[bool]) -> Batch:
    batch = collate([s.data.training.example(i, 0) for i in range(len(captions))])
    return replace(batch, captions=captions, dropped=tuple(dropped))


def make_text(s: OpenedRun, batch: Batch, stage: Stage) -> Conditioning | TokenIds:
    return s.source.captions.make_text(CaptionRows(batch.captions, batch.dropped), stage)


def test_the_rows_that_are_dropped_are_known_and_as_many_as_before(photos: Path) -> None:
    records = [
        replace(record, captions=("",))
        for record in scan_folder(photos, captions="txt", masks="none")
    ]  # captions that are really empty
    folder = ImageDataset(records, ImageSettings(SIDE), caption_dropout=0.4)
    seen = [folder.example(number % 5, number // 5) for number in range(300)]
    share = sum(e.dropped for e in seen) / len(seen)
    assert 0.3 < share < 0.5 and all(e.caption == "" for e in seen)
    batch = collate(seen[:6])
    assert (
        batch.dropped == tuple(e.dropped for e in seen[:6])
        and batch.rows(slice(1, None, 2)).dropped == batch.dropped[1::2]
    )
    assert not any(
        ImageDataset(records, ImageSettings(SIDE)).example(i, 0).dropped for i in range(5)
    )


@pytest.mark.parametrize("trains", [False, True], ids=["cached", "text trains"])
def test_zeros_stand_for_a_dropped_caption_and_not_for_an_empty_one(
    config: Config, sdxl: Path, photos: Path, trains: bool
) -> None:
    s = opened(config, sdxl, photos)
    batch = batch_of(s, ["a cat", "", ""], [False, True, False])
    text = make_text(s, batch, TEXT if trains else NO_TEXT)
    if trains:
        assert isinstance(text, TokenIds) and text.kept.tolist() == [1, 0, 1]
    else:
        assert isinstance(text, Conditioning)
    sizes = Sizes(batch.original_sizes, batch.crops, batch.pixels.shape[-2:])
    family = s.model.family
    with torch.no_grad():
        cond, plain = (
            encode_conditioning(s.model, text, sizes),
            family.encode_prompts(["a cat", "", ""]),
        )
        negative = family.add_size_embeddings(
            family.encode_negative([""]),
            sizes._replace(original=sizes.original[1:2], crop=sizes.crop[1:2]),
            1.0,
        )
    for name, rows in (
        ("prompt_embeds", cond.prompt_embeds),
        ("text_embeds", cond.extra["text_embeds"]),
    ):
        expected = plain.prompt_embeds if name == "prompt_embeds" else plain.extra[name]
        assert (
            not rows[1].any()
            and torch.allclose(rows[[0, 2]], expected[[0, 2]], atol=1e-5)
            and expected[1].any()
        )
    assert torch.equal(cond.rows(slice(1, 2)).prompt_embeds.abs(), negative.prompt_embeds.abs())
    assert torch.equal(
        cond.extra["time_ids"][1:2], negative.extra["time_ids"]
    )  # the sizes are said all the same


def test_the_empty_prompts_encoding_is_an_option(config: Config, sdxl: Path, photos: Path) -> None:
    s = opened(config, sdxl, photos, dropped="empty")
    batch = batch_of(s, ["a cat", ""], [False, True])
    text = make_text(s, batch, NO_TEXT)
    encoded = s.model.family.encode_prompts(["a cat", ""])
    assert torch.allclose(text.prompt_embeds, encoded.prompt_embeds, atol=1e-5)
    assert make_text(s, batch, TEXT).kept is None


def test_rows_of_a_zero_get_no_gradient_and_the_others_theirs(sdxl: Path) -> None:
    family = load_family(str(sdxl))
    ids = TokenIds(family.tokenize(["a cat", "a dog"]), kept=torch.tensor([1.0, 0.0]))
    weight = family.modules["text_encoder"].get_input_embeddings().weight.requires_grad_()
    cond = family.encode(ids.ids).zeroed(family.zeros, ids.kept)
    cond.prompt_embeds[1].sum().backward(retain_graph=True)
    assert weight.grad is not None and not weight.grad.any()
    cond.prompt_embeds[0].square().sum().backward()
    assert weight.grad.any()


def test_models_without_zeros_refuse_the_choice(
    config: Config, quick: None, sdxl: Path, photos: Path, tmp_path: Path
) -> None:
    for dropped in ("zeros", "empty"):
        with pytest.raises(
            UserError, match=f"--data.dropped {dropped} has no effect on this model"
        ):
            open_parts(
                replace(config, data=replace(config.data, caption_dropout=0.5, dropped=dropped))
            )  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"--data\.dropped has no effect without --data.caption-dropout"
    ):
        open_parts(replace(config, data=replace(config.data, dropped="empty")))
    other = tmp_path / "encodes"
    tiny_sdxl.save(other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(
        json.dumps(index | {"force_zeros_for_empty_prompt": False})
    )
    with pytest.raises(UserError, match=r"--data\.dropped zeros has no effect on this model"):
        opened(config, other, photos, dropped="zeros")
    s = opened(config, other, photos)
    batch = batch_of(s, ["", ""], [True, False])
    assert make_text(s, batch, NO_TEXT).prompt_embeds.any()


def test_class_prompts_in_their_place_are_dropped_too(sdxl: Path) -> None:
    family = load_family(str(sdxl))
    model = SimpleNamespace(
        family=family,
        device=torch.device("cpu"),
        encoders={},
        frozen=torch.no_grad,
        embeddings={},
        adapted={},
        placeholders=(),
    )
    config = Config(data=DataConfig(caption_dropout=0.5))
    captions = CaptionCache(config, model)  # type: ignore[arg-type]
    base = captions.encode_without_adapters(CaptionRows(["", "a dog"], (True, False)))
    assert not base.prompt_embeds[0].any() and base.prompt_embeds[1].any()


def test_the_two_choices_train_to_different_weights(
    config: Config, sdxl: Path, photos: Path, plain: None, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for dropped in ("model", "zeros", "empty"):
        data = DataConfig(
            images=str(photos),
            resolution=SIDE,
            captions="txt",
            caption_dropout=0.9,
            dropped=dropped,
        )  # type: ignore[arg-type]
        groups = ("denoiser", "text_encoder")
        stages = (Stage(1, ("denoiser",)), Stage(2, groups))
        c = replace(
            config,
            model=str(sdxl),
            out=f"{config.out}_{dropped}",
            data=data,
            stages=stages,
            adapter=AdapterConfig(rank=2),
        )  # type: ignore[arg-type]
        runs.append(learned(train.train(c)))
        assert ("dropped captions: zeros" in capsys.readouterr().out) == (dropped != "empty")
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
