"""Prompts of several chunks: each is encoded as a prompt of its own, as in kohya's sd-scripts."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import infer
import train
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.family import Family, LoadOptions
from lora_core.runs.loras import read_run_settings
from models import load_family
from models.prompt_chunks import long_prompt_length, split_chunks
from tests import tiny_flux, tiny_sdxl
from tests.opened_run import open_parts
from tests.tiny_pipeline import CHUNK, LETTERS
from training.checks.model_checks import token_limits
from training.inputs.caption_tokens import CaptionReader


def words(count: int, seed: int = 0) -> list[str]:
    """So many words of one token each."""
    return random.Random(seed).choices(LETTERS, k=count)


@cache
def long_family(path: Path, length: int = 225, **more: Any) -> Family:
    """A family that reads long prompts, opened once; 0: the usual ones."""
    return load_family(str(path), LoadOptions(max_token_length=length, **more))


def joined_parts(family: Family, own: list[str], count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The law: hidden states of the chunks, each encoded as a prompt of one chunk."""
    texts = [" ".join(own[CHUNK * i : CHUNK * (i + 1)]) for i in range(count)]
    conds = [family.encode_prompts([text]) for text in texts]
    states = [cond.prompt_embeds for cond in conds]
    inner = [state[:, 1:-1] for state in states]
    return torch.cat([states[0][:, :1], *inner, states[-1][:, -1:]], 1), conds[0].extra


@pytest.mark.parametrize("count", [0, 1, 13, 14, 15, 27, 28, 29, 41, 42, 60])
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_each_chunk_is_encoded_as_a_prompt_of_its_own(
    model: Path, sdxl: Path, count: int, clip_skip: int
) -> None:
    own = words(count)
    for path in (model, sdxl):
        one = long_family(path, 0, clip_skip=clip_skip)
        three = long_family(path, clip_skip=clip_skip)
        # another row in the batch, of another length
        cond = three.encode_prompts([" ".join(own), "a b"])
        states, extra = joined_parts(one, own[: 3 * CHUNK], 3)
        assert cond.prompt_embeds.shape[1] == 3 * CHUNK + 2
        torch.testing.assert_close(cond.prompt_embeds[:1], states, rtol=1e-4, atol=1e-5)
        for name, values in extra.items():  # pooled: of the first chunk
            torch.testing.assert_close(cond.extra[name][:1], values, rtol=1e-4, atol=1e-5)
        assert three.tokenize([" "]).keys() == one.tokenize([" "]).keys()


def test_one_chunk_is_the_usual_prompt(model: Path, sdxl: Path) -> None:
    for path in (model, sdxl):
        text = " ".join(words(20))
        usual = load_family(str(path)).encode_prompts([text])
        for length in (0, 75):
            assert torch.equal(
                long_family(path, length).encode_prompts([text]).prompt_embeds, usual.prompt_embeds
            )


def test_ids_of_chunks_are_kohyas_with_both_kinds_of_padding() -> None:
    """sd-scripts, TokenizeStrategy._get_input_ids, for prompts without the padding's own word."""
    for pad in ("<|endoftext|>", "!"):
        tokenizer = tiny_sdxl.tokenizer(pad)
        eos, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
        for count in range(46):
            length = long_prompt_length(tokenizer, 225)
            given = {"padding": "max_length", "max_length": length, "truncation": True}
            flat = tokenizer(" ".join(words(count)), return_tensors="pt", **given).input_ids
            theirs = []
            for i in range(1, length - 16 + 2, CHUNK):
                chunk = torch.cat([flat[0, :1], flat[0, i : i + CHUNK], flat[0, -1:]])
                if pad == "!":
                    if chunk[-2] not in (eos, padding):
                        chunk[-1] = eos
                    if chunk[1] == padding:
                        chunk[1] = eos
                theirs.append(chunk)
            assert torch.equal(split_chunks(flat, tokenizer), torch.stack(theirs))


def test_places_of_tokens_and_the_limit_are_those_of_the_whole_prompt(model: Path) -> None:
    assert token_limits(long_family(model, 150)) == {"text_encoder": 2 * CHUNK + 2}


def test_a_run_trains_on_long_captions_and_images_read_them_the_same(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for image in Path(config.data.images).glob("?.png"):
        (photos / image.name).write_bytes(image.read_bytes())
        (photos / f"{image.stem}.txt").write_text(" ".join([*words(20), "TOK", *words(3)]))
    own = replace(config, max_token_length=150, data=replace(config.data, images=str(photos)))
    folder = train.train(own)
    assert read_run_settings([str(folder)]).text == {"max_token_length": 150}
    capsys.readouterr()
    out = tmp_path / "a.png"
    base = ["--model", config.model, "--steps", "1", "--device", "cpu", "--out", str(out)]
    base += ["--lora", str(folder), "--prompt", " ".join(words(25))]
    assert infer.main(base) == 0
    said = capsys.readouterr().err
    assert "'max_token_length': 150" in said and "cut off" not in said
    assert infer.main([*base, "--max-token-length", "75", "--overwrite"]) == 0
    assert "cut off" in capsys.readouterr().err


def test_tokens_learn_in_the_second_chunk_where_attention_finds_them(
    config: Config, tmp_path: Path, quick: None
) -> None:
    """The placeholder lies across the end of the first 14 tokens; a run of one chunk refuses it."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for image in Path(config.data.images).glob("*.png"):
        (photos / image.name).write_bytes(image.read_bytes())
    for image in photos.glob("?.png"):
        (photos / f"{image.stem}.txt").write_text(" ".join([*words(12), "TOK"]))
    stage = replace(config.stages[0], groups=("tokens", "denoiser"))
    data = replace(config.data, images=str(photos), masks="file")
    own = replace(config, data=data, stages=(stage,), optimizer=replace(config.optimizer, lr={}))
    own = replace(own, tokens=replace(own.tokens, vectors=4), loss="attention")
    long = replace(own, max_token_length=150)
    parts = open_parts(long)
    reader = CaptionReader(parts.data, parts.model, keeps_text=True)
    (caption,) = {record.captions[0] for record in parts.data.training.records}
    assert reader.read([caption]).learned.tolist() == [[13, 14, 15, 16]]
    shutil.rmtree(long.out)
    train.train(long)
    with pytest.raises(UserError, match="lies beyond the 16 tokens"):
        train.train(replace(own, out=str(tmp_path / "short")))


def test_other_lengths_and_models_without_chunks_are_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UserError, match="expected one of 75, 150, 225"):
        long_family(model, 100)
    folder = tmp_path / "flux"
    tiny_flux.save(folder)
    with pytest.raises(UserError, match="T5 reads --max-sequence-length tokens"):
        long_family(folder, 150)
