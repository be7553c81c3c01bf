"""Which token file belongs to a LoRA file: by its name, or because the LoRA's header says so."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_core.formats.known_formats import NATIVE
from lora_core.formats.token_files import find_token_file, list_words, token_file_of, trained_words

TOKENS = {"token_names": '["<s0>", "<s1>"]', "placeholders": '{"TOK": ["<s0>", "<s1>"]}'}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lora(path: str, **header: str) -> str:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {
        f"{layer}.lora_A.weight": torch.ones(2, 4),
        f"{layer}.lora_B.weight": torch.ones(4, 2),
    }
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    save_file(factors, path, header)
    return path


def write_tokens(path: str, **header: str) -> str:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    save_file({"clip_l": torch.ones(2, 4)}, path, TOKENS | header)
    return path


def trigger(text: str) -> dict[str, str]:
    return TOKENS | {"modelspec.trigger_phrase": text}


def test_the_file_of_the_same_name_belongs_to_a_lora_among_others() -> None:
    """Also where the LoRA's header says nothing, as one that another program wrote."""
    write_tokens("two/zib_emb.safetensors")
    own = write_tokens("two/demo_emb.safetensors")
    assert find_token_file(write_lora("two/zib.safetensors")) == "two/zib_emb.safetensors"
    assert find_token_file(write_lora("two/demo.safetensors", **trigger("zib_emb"))) == own
    assert find_token_file(write_lora("two/demo_adapter.safetensors")) == own
    assert find_token_file(write_lora("two/c.safetensors", **trigger("c_emb"))) == ""
    assert find_token_file("two/demo_emb.safetensors") == "" == find_token_file("two")


def test_another_file_belongs_only_where_the_header_of_the_lora_names_it() -> None:
    """TOK and <s0> are the names in most runs, so that they decide only without trigger words."""
    file = write_tokens("trilo_0_emb.safetensors", **{"modelspec.trigger_phrase": "trilo_0_emb"})
    assert find_token_file(write_lora("demo.safetensors", **trigger("demo_emb"))) == ""
    assert find_token_file(write_lora("plain.safetensors")) == ""
    assert find_token_file(write_lora("new.safetensors", **trigger("ink, trilo_0_emb"))) == file
    assert find_token_file(write_lora("words.safetensors", **TOKENS)) == file
    other = TOKENS | {"placeholders": '{"DOG": ["<s0>", "<s1>"]}'}
    assert find_token_file(write_lora("other.safetensors", **other)) == ""
    os.rename(file, "renamed_emb.safetensors")  # its trigger words are still those of the LoRA
    assert find_token_file("new.safetensors") == "renamed_emb.safetensors"
    write_tokens("more_emb.safetensors")
    assert find_token_file("new.safetensors") == ""


def test_the_file_that_diffusers_reads_has_the_token_file_of_the_run() -> None:
    file = write_tokens("runs/demo/demo_emb.safetensors")
    native = write_lora(f"runs/demo/{NATIVE}")
    assert find_token_file(native) == file
    write_tokens("runs/demo/older_emb.safetensors")
    assert find_token_file(native) == file
    assert token_file_of("runs/demo") == token_file_of(native) == Path(file)
    step = write_tokens("runs/demo/checkpoints/300/demo-000300_emb.safetensors")
    assert find_token_file(write_lora(f"runs/demo/checkpoints/300/{NATIVE}")) == step
    shutil.move(step, "runs/demo/checkpoints/300/300_emb.safetensors")  # of an earlier version
    assert find_token_file(f"runs/demo/checkpoints/300/{NATIVE}").endswith("/300_emb.safetensors")


def test_files_with_tokens_of_their_own_and_of_other_kinds_have_none() -> None:
    write_tokens("a_emb.safetensors")
    save_file({"bundle_emb.dog.clip_l": torch.ones(2, 4)}, "a.safetensors")
    assert find_token_file("a.safetensors") == ""
    write_lora("b_emb.safetensors")  # a LoRA of such a name
    assert find_token_file(write_lora("b.safetensors")) == ""
    Path("c.safetensors").write_bytes(b"damaged")
    assert find_token_file("c.safetensors") == "" == find_token_file("nowhere.safetensors")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (TOKENS, "TOK"),
        ({"token_names": '["<a>", "<b>"]'}, "<a>, <b>"),
        ({"token_names": "broken"}, "broken"),
        ({"modelspec.trigger_phrase": "ink, zib_emb, a_emb"}, "zib_emb, a_emb"),
        ({"token_names": '["a", "b", "c", "d", "e"]'}, "a, b, c, d ..."),
        ({"modelspec.trigger_phrase": "ink"}, ""),
    ],
)
def test_the_words_of_a_training_are_listed(header: dict[str, str], words: str) -> None:
    assert list_words(trained_words(header)) == words
