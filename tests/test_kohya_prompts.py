"""Prompts for sample images. Of each line the expected options are those that kohya's own
`line_to_prompt_dict` (sd-scripts, February 2026) read.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_core.errors import UserError
from training.translation.kohya_options import KOHYA_DEFAULTS
from training.translation.kohya_outputs import translate_outputs
from training.translation.kohya_prompts import SamplePrompt, read_prompt_line, read_sample_prompts
from training.translation.translated_options import TranslatedOptions

LINES: list[tuple[str, dict[str, Any]]] = [
    (
        "a cat --n ugly, bad --w 512 --h 768 --d 1 --l 7.5 --s 28",
        {
            "prompt": "a cat",
            "negative_prompt": "ugly, bad",
            "width": 512,
            "height": 768,
            "seed": 1,
            "scale": 7.5,
            "sample_steps": 28,
        },
    ),
    ("a cat", {"prompt": "a cat"}),
    ("x --W 64 --ss euler_a", {"prompt": "x", "width": 64, "sample_sampler": "euler_a"}),
    ("a -- b --s 0", {"prompt": "a", "sample_steps": 1}),
    ("cat --s 5000 --x 3", {"prompt": "cat", "sample_steps": 1000}),
    ("a --n", {"prompt": "a"}),
    ("a --w abc", {"prompt": "a"}),
    ("a --l 7.5x --g 3.5", {"prompt": "a", "scale": 7.5, "guidance_scale": 3.5}),
    ("a --w 512 --w 640", {"prompt": "a", "width": 640}),
]


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_a_line_is_read_as_kohya_reads_it(line: str, expected: dict[str, Any]) -> None:
    found = read_prompt_line(line)
    assert {"prompt": found.prompt, **found.options} == expected


def test_files_of_three_kinds_have_the_same_prompts(tmp_path: Path) -> None:
    text, table, tree = (tmp_path / f"p.{end}" for end in ("txt", "toml", "json"))
    text.write_text("# a comment\n\na cat --w 64\na dog --w 64\n")
    table.write_text('[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a cat"\n'
                     '[[prompt.subset]]\nprompt = "a dog"\n')  # fmt: skip
    tree.write_text(json.dumps([{"prompt": "a cat", "width": 64}, "a dog --w 64"]))
    expected = [SamplePrompt("a cat", {"width": 64}), SamplePrompt("a dog", {"width": 64})]
    for path in (text, table, tree):
        assert read_sample_prompts(str(path)) == expected
    assert read_sample_prompts(["a cat --w 64"]) == expected[:1]
    with pytest.raises(UserError, match="does not exist"):
        read_sample_prompts(str(tmp_path / "none.txt"))


def outputs(version: str = "sd_v1", **given: Any) -> TranslatedOptions:
    options = TranslatedOptions("kohya", KOHYA_DEFAULTS, given)
    translate_outputs(options, 100, 10, version)
    return options


def test_epochs_between_checkpoints_and_samples_are_steps(tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat --n bad --s 20 --l 5 --w 512\na dog")
    given: dict[str, Any] = {
        "save_every_n_epochs": 2,
        "sample_every_n_epochs": 3,
        "sample_prompts": str(prompts),
    }
    options = outputs(**given, output_dir="out", output_name="mine", sample_sampler="euler_a")
    ours = options.options
    assert ours["out"] == "out/mine" and ours["save_every"] == 20 and ours["keep"] == 5
    assert ours["samples.every"] == 30 and ours["samples.prompts"] == ["a cat", "a dog"]
    assert (ours["samples.steps"], ours["samples.guidance"]) == (20, 5.0)
    assert ours["samples.negative"] == "bad" and ours["samples.sampler"] == "euler_ancestral"
    text = options.format_table()
    assert "width: those of the run" in " ".join(text.split())
    assert outputs(save_n_epoch_ratio=4).options["save_every"] == 20  # 10 epochs // 4
    assert outputs(save_every_n_steps=7, save_last_n_steps=14).options["keep"] == 2
    assert outputs("flux1", sample_prompts=["a"]).options["samples.guidance"] == 3.5
    with pytest.raises(UserError, match="save_precision"):
        outputs(save_precision="fp8")


def test_words_of_the_header_and_the_repository_are_taken() -> None:
    words = ("title", "author", "description", "license", "tags", "trigger_phrase")
    given = {f"metadata_{word}": f"my {word}" for word in words}
    options = outputs(
        **given,
        no_metadata=True,
        save_precision="fp16",
        huggingface_repo_id="me/run",
        huggingface_repo_visibility="public",
    ).options
    for word in words:
        ours = {"trigger_phrase": "trigger"}.get(word, word)
        assert options[f"files.{ours}"] == f"my {word}"
    assert options["files.header"] == "short" and options["files.precision"] == "fp16"
    assert options["push_to_hub"] == "me/run" and options["files.public"] is True
    assert "files.public" not in outputs(huggingface_repo_id="me/run").options
