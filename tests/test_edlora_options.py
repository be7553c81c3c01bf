"""Mix-of-Show's YAML files: their numbers, their transforms, and what is not known here."""

import contextlib
from pathlib import Path

import pytest

from lora_core.errors import UserError
from tests.mixofshow_example import save_example
from training.translation.edlora_options import flatten_options, read_options, translate_options


def test_numbers_and_transforms_are_read(tmp_path: Path) -> None:
    """1e-3 is a text for YAML, and a number for the library that Mix-of-Show reads it with."""
    file = tmp_path / "a.yml"
    file.write_text(
        "lr: 1e-3\na:\n  b: !!float 2e-4\n  t:\n  - {type: Crop, size: 8}\n  m: [1, 2]\n"
    )
    assert flatten_options(read_options(file)) == {
        "lr": 1e-3,
        "a.b": 2e-4,
        "a.t.Crop": {"size": 8},
        "a.m": [1, 2],
    }


@pytest.mark.parametrize("text", ["- a\n", "a: [", "just text", "a: !!python/object:os.system x"])
def test_other_files_are_refused_and_no_object_is_made(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(UserError, match=r"a\.yml is"):
        read_options(tmp_path / "a.yml")


def test_every_option_is_in_the_table_and_unknown_ones_are_said(tmp_path: Path) -> None:
    file = save_example(tmp_path)
    file.write_text(file.read_text().replace("  noise_offset", "  use_dora: true\n  noise_offset"))
    with contextlib.chdir(tmp_path):
        job = translate_options(file.relative_to(tmp_path))
    first = [line.split("|")[0].strip() for line in job.table.splitlines()]
    names = "".join(first)  # a long one goes on in the next line
    for name in flatten_options(read_options(file)):
        assert name in names, name
    assert "no such option is known" in job.table
    assert job.concepts == ("<hermione1>", "<hermione2>")
    assert job.config.out == "experiments/EDLoRA_hermione_RV51.yml"
    assert job.config.stages[0].steps == 3  # 3 images x 2 / 2
    assert job.config.samples.prompts == ("a <TOK>", "<TOK> b")


def test_parts_between_commas_are_shuffled_where_there_are_some(tmp_path: Path) -> None:
    file = save_example(tmp_path)
    with contextlib.chdir(tmp_path):
        assert not translate_options(file).config.data.shuffle_caption
        (file.parent / "caption/0.txt").write_text("a <TOK>, b, c\n")
        data = translate_options(file).config.data
    assert (data.shuffle_caption, data.keep_tokens) == (True, 1)


def test_without_captions_the_concepts_prompt_is_the_caption(tmp_path: Path) -> None:
    file = save_example(tmp_path)
    text = file.read_text().replace("use_caption: true", "use_caption: false")
    file.write_text(text.replace("enable_edlora: true", "enable_edlora: false"))
    with contextlib.chdir(tmp_path):
        job = translate_options(file)
    assert job.config.data.caption == "photo of a <TOK>" and job.config.data.captions == "one"
    assert job.model_name == "lora_model-latest.pth" and not job.config.tokens.per_layer
