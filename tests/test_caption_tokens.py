"""Captions and token places of a step, as the tokenizers of each encoder cut them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from examples.attention_in_mask import attention_in_mask
from lora_core.config import AdapterConfig, Config, Stage
from lora_core.cross_attention import attention_on_tokens
from lora_core.diffusion.losses import StepOutput, mse
from lora_core.errors import UserError
from lora_core.placeholders import make_placeholders, word_positions
from tests.conftest import merged, rows
from tests.opened_run import open_parts
from tests.test_losses import make
from training.inputs.step_inputs import make_step_inputs

STAGES = (Stage(1, ("denoiser", "tokens")),)


def first_inputs(config: Config, loss: str = "attention"):
    s = open_parts(replace(config, loss=loss, stages=STAGES))
    batch = next(iter(s.data.batches(s.config, 0, 1)))
    (inputs,) = make_step_inputs(s.source, batch, STAGES[0], 0, check=True)
    return s, batch, inputs.caption_tokens


def read_back(s, component: str, caption: str, places: Tensor) -> str:
    """The text of the tokens at these places, as the tokenizer itself decodes them."""
    tokenizer = s.model.family.tokenizers[component]
    bound = caption.replace("TOK", "<s0><s1>")
    ids = tokenizer(bound).input_ids
    kept = [ids[place] for place in places.tolist() if place >= 0]
    pieces = tokenizer.convert_ids_to_tokens(kept)
    text = "".join("?" if piece == tokenizer.unk_token else piece for piece in pieces)
    return text.replace("</w>", "").lstrip("\u2581")


def test_places_are_those_of_every_encoder_learned_or_read_as_plain_text(
    config: Config, tmp_path: Path
) -> None:
    """SDXL's second encoder learns the word, the first reads <s0><s1> in pieces."""
    from tests import tiny_sdxl

    tiny_sdxl.save(tmp_path / "xl")
    changes = {"data": {"captions": "one", "caption": "a big TOK", "masks": "file"}}
    changes |= {"tokens": {"encoders": ("clip_g",)}, "model": str(tmp_path / "xl")}
    changes |= {"adapter": AdapterConfig(), "optimizer": {"lr": {}}}
    s, batch, tokens = first_inputs(merged(config, changes))
    assert tokens.captions == tuple(batch.captions) and tokens.attended == "clip_g"
    assert set(tokens.places) == {"clip_l", "clip_g"}
    # the tiny vocabulary has letters only: "<s0><s1>" is two pieces of it among unknown ones
    for caption, places in zip(batch.captions, tokens.places["clip_l"]["TOK"]):
        assert read_back(s, "text_encoder", caption, places) == "?s???s??"
    for caption, places in zip(batch.captions, tokens.places["clip_g"]["TOK"]):
        assert read_back(s, "text_encoder_2", caption, places) == "<s0><s1>"
    assert torch.equal(tokens.places["clip_g"]["TOK"], tokens.learned)
    assert tokens.places["clip_l"]["TOK"].shape[1] > 2


def test_flux_finds_words_in_t5(config: Config, tmp_path: Path) -> None:
    from tests import tiny_flux

    tiny_flux.save(tmp_path / "dev")
    changes = {"data": {"captions": "one", "caption": "a TOK on red", "masks": "file"}}
    changes |= {"model": str(tmp_path / "dev"), "max_sequence_length": 24}
    changes |= {"tokens": {"encoders": ("t5",)}, "adapter": AdapterConfig()}
    changes |= {"optimizer": {"lr": {}}}
    s, batch, tokens = first_inputs(merged(config, changes))
    assert tokens.attended == "t5"
    for caption, learned, red in zip(
        batch.captions, tokens.places["t5"]["TOK"], tokens.find("red")
    ):
        assert read_back(s, "text_encoder_2", caption, learned) == "<s0><s1>"
        assert read_back(s, "text_encoder_2", caption, red) == "red"


def test_a_word_no_caption_has_is_refused(config: Config) -> None:
    changes = {"data": {"captions": "one", "caption": "a TOK", "masks": "file"}}
    _, _, tokens = first_inputs(merged(config, changes))
    with pytest.raises(UserError, match=r"names a word that no caption has.*'a TOK'"):
        tokens.find("dog")


def test_phrases_repetitions_and_cut_captions(config: Config) -> None:
    changes = {"data": {"captions": "one", "caption": "a TOK", "masks": "file"}}
    s, *_ = first_inputs(merged(config, changes))
    tokenizer = s.model.family.tokenizers["text_encoder"]
    given = make_placeholders(("TOK",), 2)
    assert word_positions("TOK", "TOK a TOK", given, tokenizer, 77) == [1, 2, 4, 5]
    assert word_positions("a TOK", "TOK a TOK", given, tokenizer, 77) == [3, 4, 5]
    assert word_positions("TOK", "TOK a TOK", given, tokenizer, 5) == [1, 2]
    assert word_positions("TOK", "TOKEN", given, tokenizer, 77) == []


def test_the_example_is_its_formula_and_logs_its_share(config: Config, quick: None) -> None:
    """In float64, with the map of the word averaged by loops; and the log has what it logged."""
    seen = []

    def checked(step: StepOutput) -> Tensor:
        ours = attention_in_mask(step, weight=0.5)
        places = step.token_places["clip_l"]["TOK"]
        maps = [m._replace(probabilities=m.probabilities.double()) for m in step.attention]
        word = attention_on_tokens(maps, places, tuple(step.x0.shape[-2:]))
        for i in range(len(ours)):
            outside = (word[i] * (1 - step.drawn_mask[i, 0])).sum() / word[i].sum()
            wanted = float((mse(step)[i] + 0.5 * outside).detach())
            assert float(ours[i].detach()) == pytest.approx(wanted, rel=1e-5)
            seen.append(float(outside.detach()))
        return ours

    checked.reads_attention = True  # type: ignore[attr-defined]
    changes = {"data": {"masks": "file"}, "stages": (Stage(2, ("denoiser", "tokens")),)}
    run = train.train(merged(config, changes), loss=checked)
    logged = [row["outside"] for row in rows(run) if "outside" in row]
    size = len(seen) // 2
    wanted = [sum(seen[:size]) / size, sum(seen[size:]) / size]
    assert logged == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(UserError, match=r"attention_in_mask needs masks, .* --data\.masks"):
        attention_in_mask(make())
