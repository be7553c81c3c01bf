"""Language models that read prompts: conversations, hidden states, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from transformers.processing_utils import ProcessorMixin

from lora_core.errors import UserError
from models import LoadOptions, language_encoders
from models.flux2 import READERS
from models.planned_tokenizer import PlannedTokenizer
from tests import tiny_flux2

KLEIN, DEV = READERS["Flux2KleinPipeline"], READERS["Flux2Pipeline"]


def tokens_of(tokenizer, reader, prompts, length):
    return language_encoders.tokenize_chats(tokenizer, reader, prompts, length, set())


def test_a_prompt_stands_in_its_conversation():
    tokenizer = tiny_flux2.klein_tokenizer()
    tokens = tokens_of(tokenizer, KLEIN, ["a cat", ""], 80)
    told = [tokenizer.decode(row[mask.bool()]) for row, mask in zip(*tokens.values())]
    assert told == [
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        for prompt in ("a cat", "")
    ]
    assert {rows.shape for rows in tokens.values()} == {(2, 80)}


def test_the_first_token_of_a_text_is_there_once():
    tokenizer = tiny_flux2.dev_tokenizer()
    tokens = tokens_of(tokenizer, DEV, ["a [IMG]cat"], 192)
    ids = tokens["input_ids"][0]
    assert (ids == tokenizer.bos_token_id).sum() == 1 and ids[0] == tokenizer.pad_token_id
    assert tokenizer.decode(ids).endswith("without speculation.[/SYS][INST]a cat[/INST]")


class TextProcessor(ProcessorMixin):
    """transformers' processor with a tokenizer alone. That of FLUX.2 dev reads images, too, for
    which it needs torchvision.
    """

    def __init__(self, tokenizer, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)


@pytest.mark.parametrize("length", [192, 160])  # the longer prompt is cut in the second
def test_tokens_are_those_of_the_processor_in_the_pipeline(length):
    tokenizer, prompts = tiny_flux2.dev_tokenizer(), ["a cat", "", "a [IMG]dog"]
    processor = TextProcessor(tokenizer, chat_template=tiny_flux2.DEV_TEMPLATE)
    theirs = processor.apply_chat_template(
        format_input(prompts), add_generation_prompt=False, tokenize=True, return_dict=True,
        return_tensors="pt", padding="max_length", truncation=True, max_length=length,
    )  # fmt: skip
    ours = tokens_of(tokenizer, DEV, prompts, length)
    for name, rows in ours.items():
        assert torch.equal(rows, theirs[name])


def test_what_a_long_prompt_loses_is_said_once(capsys):
    tokenizer, checked = tiny_flux2.klein_tokenizer(), set()
    for _ in range(2):
        language_encoders.tokenize_chats(tokenizer, KLEIN, ["x" * 40 + "end"], 46, checked)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "Qwen2 reads 46; cut off: 'end<|im_end|>" in said[0]


def test_layers_that_nothing_reads_are_dropped_and_change_nothing():
    tokenizer = tiny_flux2.klein_tokenizer()
    network = tiny_flux2.klein_encoder(tokenizer).model.eval()
    tokens = tokens_of(tokenizer, KLEIN, ["a cat"], 64)
    with torch.no_grad():
        before = language_encoders.read_hidden_states(network, KLEIN, tokens)
        kept = language_encoders.keep_read_layers(network, KLEIN)
        after = language_encoders.read_hidden_states(kept, KLEIN, tokens)
    assert len(kept.layers) == 28 and torch.equal(before, after)
    assert before.shape == (1, 64, 3 * tiny_flux2.WIDTH)
    whole = SimpleNamespace(language_model=tiny_flux2.klein_encoder(tokenizer).model)
    assert language_encoders.keep_read_layers(whole, KLEIN) is whole.language_model


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"model_type": "qwen2"}, "is of type qwen2, expected qwen3; take all parts from one"),
        ({"num_hidden_layers": 27}, "has 27 layers, and the input of layer 27"),
    ],
)
def test_another_language_model_is_refused(tmp_path, change, expected):
    config = {"model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 2560}
    (tmp_path / "text_encoder").mkdir()
    file = tmp_path / "text_encoder" / "config.json"
    file.write_text(json.dumps(config))
    assert language_encoders.check_language_encoder(str(tmp_path), KLEIN) == 7680
    file.write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=expected):
        language_encoders.check_language_encoder(str(tmp_path), KLEIN)


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    tokenizer = tiny_flux2.klein_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    opened = language_encoders.open_chat_tokenizer(str(tmp_path), KLEIN, "cpu")
    assert opened.chat_template == tiny_flux2.KLEIN_TEMPLATE
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template,.* fetch tokenizer/ again"):
        language_encoders.open_chat_tokenizer(str(tmp_path), KLEIN, "cpu")


@pytest.mark.parametrize("reader", [KLEIN, DEV], ids=["klein", "dev"])
def test_a_planned_tokenizer_reads_conversations(reader):
    tokens = tokens_of(PlannedTokenizer(50, 40960), reader, ["a cat", "dog"], 16)
    assert tokens["input_ids"].shape == (2, 16)
    assert tokens["attention_mask"].shape == (2, 1, 16, 16)  # that of causal attention


def test_options_of_clip_are_refused():
    for how in (LoadOptions(clip_skip=1), LoadOptions(max_token_length=150)):
        with pytest.raises(UserError, match=r"has no effect: the text encoder of m is no CLIP"):
            language_encoders.refuse_clip_options("m", how)
    language_encoders.refuse_clip_options("m", LoadOptions())
