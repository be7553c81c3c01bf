"""A tokenizer without words has the ids that a real one would need."""

from lora_core.placeholders import Placeholder
from lora_core.tokens import first_eos, install_tokens
from models.planned_tokenizer import PlannedTokenizer
from tests.tiny_pipeline import pipeline


def test_prompts_have_the_length_and_an_end() -> None:
    tokenizer = PlannedTokenizer(50, 16)
    ids = tokenizer(["a", "b"], max_length=16, return_tensors="pt").input_ids
    assert ids.shape == (2, 16) and first_eos(ids, tokenizer.eos_token_id).tolist() == [15, 15]
    assert len(tokenizer("a photo of").input_ids) == 4
    assert len(tokenizer.get_vocab()) == 50


def test_learned_tokens_are_installed() -> None:
    encoder = pipeline().text_encoder
    rows = encoder.get_input_embeddings().num_embeddings
    tokenizer = PlannedTokenizer(rows, 16)
    words = [Placeholder("TOK", ("<s0>", "<s1>"), "zero")]
    embedding = install_tokens(encoder, tokenizer, words, seed=0)
    assert embedding.rows.shape[0] == 2 and embedding.first_id == rows
