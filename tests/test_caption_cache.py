"""Encoded captions: on the disk for a text that no run changes, found by what made them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_core.config import Config, DataConfig, PriorConfig, Stage
from lora_core.errors import UserError
from lora_core.family import Conditioning
from tests import tiny_flux
from tests.conftest import merged
from tests.opened_run import OpenedRun, latent_files, open_parts
from training.inputs.caption_cache import (
    CaptionRows,
    TokenIds,
    hash_networks,
    pack_conditioning,
    unpack_conditioning,
)

TEXTS = ["a photo of TOK", "", "a TOK b"]


def caption_files(cache: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Name -> content of the files of captions."""
    found = {path.name: load_file(path) for path in cache.glob("*/*.safetensors")}
    return {name: row for name, row in found.items() if "prompt_embeds" in row}


def encodings(s: OpenedRun) -> Conditioning:
    rows = CaptionRows(TEXTS, [False] * len(TEXTS))
    text = s.source.captions.make_text(rows, s.config.stages[0])
    assert isinstance(text, Conditioning)
    return text


@pytest.fixture
def cached(config: Config, tmp_path: Path) -> Config:
    return merged(config, {"data": {"cache": str(tmp_path / "cache")}})


def test_captions_are_read_from_the_disk_with_the_bits_they_had(
    cached: Config, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Flux, whose conditioning has two members."""
    tiny_flux.save(tmp_path / "flux")
    own = replace(cached, model=str(tmp_path / "flux"), precision="bf16")
    alone = encodings(open_parts(merged(own, {"data": {"cache": ""}})))
    made = encodings(open_parts(own))
    assert len(caption_files(tmp_path / "cache")) == len(TEXTS)
    again = open_parts(replace(own, out=own.out + "2"))
    monkeypatch.setattr(again.model.family, "encode_prompts", None)
    read = encodings(again)
    for cond in (made, read):
        assert torch.equal(cond.prompt_embeds, alone.prompt_embeds)
        assert cond.prompt_embeds.dtype == torch.bfloat16
        assert cond.extra.keys() == alone.extra.keys() == {"pooled_prompt_embeds"}
        assert torch.equal(*(c.extra["pooled_prompt_embeds"] for c in (cond, alone)))
    longer = replace(own, out=own.out + "3", max_sequence_length=20)
    assert encodings(open_parts(longer)).prompt_embeds.shape[1] == 20
    assert len(caption_files(tmp_path / "cache")) == 2 * len(TEXTS)


def test_other_weights_have_rows_of_their_own(cached: Config, quick: None, tmp_path: Path) -> None:
    """Also where the numbers that tell runs apart, 64 of each tensor, are the same."""
    before = encodings(open_parts(cached))
    s = open_parts(replace(cached, out=cached.out + "2"))
    table = s.model.encoders["text_encoder"].get_input_embeddings().weight
    with torch.no_grad():
        table[:, 1] += 1
    type(s.source).__init__(s.source, s.config, s.data, s.model)  # opened with these weights
    after = encodings(s)
    assert not torch.equal(before.prompt_embeds, after.prompt_embeds)
    assert len(caption_files(tmp_path / "cache")) == 2 * len(TEXTS)
    skipping = encodings(open_parts(replace(cached, out=cached.out + "3", clip_skip=1)))
    assert not torch.equal(before.prompt_embeds, skipping.prompt_embeds)


@pytest.mark.parametrize("group", ["tokens", "text_encoder"])
def test_a_text_that_trains_stays_off_the_disk(
    cached: Config, quick: None, tmp_path: Path, group: Any
) -> None:
    """In a stage that does not train it, too: adapters and token rows are the run's own."""
    stages = (Stage(1, ("denoiser",)), Stage(1, (group,)))
    s = open_parts(merged(replace(cached, stages=stages), {"optimizer": {"lr": {}}}))
    s.take_steps(1)
    first = encodings(s)
    assert latent_files(tmp_path / "cache") and not caption_files(tmp_path / "cache")
    with torch.no_grad():
        for parameter in s.model.groups[group]:
            parameter.add_(1)
    s.source.captions.begin_stage()  # what was encoded before is dropped
    assert not torch.equal(first.prompt_embeds, encodings(s).prompt_embeds)


def test_encoding_ahead_leaves_nothing_for_the_steps(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swapped captions, captions in ordinary words and the empty one among them."""
    prior = PriorConfig(swap={"TOK": "cat"}, outside_mask=1.0)
    own = merged(replace(config, prior=prior), {"data": {"masks": "file"}})
    s, stage = open_parts(own), own.stages[0]
    captions, rows = s.source.captions, CaptionRows(TEXTS, [False] * 3)
    before = [captions.make_text(rows, stage), *captions.swapped_text(rows, stage)]
    before.append(captions.plain_text(rows))
    other = open_parts(replace(own, out=own.out + "2")).source.captions
    # three captions, two of them swapped; the base model reads the swapped ones and the empty one
    assert other.encode_ahead(TEXTS) == 8 and other.encode_ahead(TEXTS) == 0
    monkeypatch.setattr(other.model.family, "encode_prompts", None)
    after = [other.make_text(rows, stage), *other.swapped_text(rows, stage)]
    after.append(other.plain_text(rows))
    for a, b in zip(before, after, strict=True):
        assert isinstance(a, Conditioning) and isinstance(b, Conditioning)
        assert torch.equal(a.prompt_embeds, b.prompt_embeds)


def test_steps_that_train_text_get_token_ids(config: Config, quick: None) -> None:
    stages = (Stage(1, ("denoiser", "tokens")),)
    s = open_parts(merged(replace(config, stages=stages), {"optimizer": {"lr": {}}}))
    text = s.source.captions.make_text(CaptionRows(TEXTS, [False] * 3), s.config.stages[0])
    assert isinstance(text, TokenIds) and len(text.ids["ids"]) == 3


def test_captions_that_fill_the_memory_are_refused(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_core.data.cache.available_memory", lambda: 2000)
    s = open_parts(replace(config, data=DataConfig(images=config.data.images, resolution=16)))
    with pytest.raises(UserError, match=r"3 captions take .* in memory; .*--data\.cache FOLDER"):
        s.source.captions.encode_ahead(TEXTS)


def test_a_row_is_the_conditioning() -> None:
    cond = Conditioning(torch.ones(1, 2, 3), {"pooled": torch.zeros(1, 4)})
    back = unpack_conditioning(pack_conditioning(cond))
    assert back.extra.keys() == cond.extra.keys()
    assert torch.equal(back.prompt_embeds, cond.prompt_embeds)
    assert torch.equal(back.extra["pooled"], cond.extra["pooled"])


def test_a_hash_is_of_every_number_name_and_dtype() -> None:
    network = torch.nn.Linear(300, 5)
    found = hash_networks({"a": network})
    assert found == hash_networks({"a": network}) != hash_networks({"b": network})
    assert found != hash_networks({"a": network.to(torch.float64)})
    network.to(torch.float32)
    assert found == hash_networks({"a": network})
    with torch.no_grad():
        network.weight[3, 217] += 1e-3
    assert found != hash_networks({"a": network})
