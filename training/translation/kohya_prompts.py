"""kohya's sample_prompts: a line each with --n --w --h --d --l --s, or TOML and JSON tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_core.errors import UserError
from lora_core.text import is_number, parse_json, read_lines, read_text
from training.translation.kohya_options import read_foreign_toml

# Letter -> (name of the option, what its value begins with).
LETTERS = {
    "w": ("width", r"\d+"),
    "h": ("height", r"\d+"),
    "d": ("seed", r"\d+"),
    "s": ("sample_steps", r"\d+"),
    "l": ("scale", r"[\d.]+"),
    "g": ("guidance_scale", r"[\d.]+"),
    "n": ("negative_prompt", r".+"),
    "ss": ("sample_sampler", r".+"),
}
MOST_STEPS = 1000


class SamplePrompt(NamedTuple):
    """A prompt and what stands with it: width, seed, scale, negative_prompt ..."""

    prompt: str
    options: dict[str, Any]


def read_sample_prompts(value: Any) -> list[SamplePrompt]:
    """The prompts of a file, .txt, .toml or .json; of a list of texts, those themselves.

    Raises UserError for a missing file or one of another kind.
    """
    if isinstance(value, list):
        return [read_prompt_line(str(line)) for line in value]
    path = Path(str(value))
    if not path.is_file():
        raise UserError(f"the file of sample_prompts, {path}, does not exist; check the path")
    if path.suffix == ".txt":
        lines = [line for line in read_lines(path) if not line.startswith("#")]
        return [read_prompt_line(line) for line in lines]
    if path.suffix == ".toml":
        table = read_foreign_toml(path).get("prompt", {})
        common = {name: own for name, own in table.items() if name != "subset"}
        return [_from_table(common | subset) for subset in table.get("subset", [])]
    if path.suffix == ".json":
        rows = parse_json(read_text(path), str(path), "correct it")
        return [read_prompt_line(row) if isinstance(row, str) else _from_table(row) for row in rows]
    raise UserError(f"sample_prompts is {path}; expected a .txt, .toml or .json file")


def _from_table(table: Mapping[str, Any]) -> SamplePrompt:
    options = {name: value for name, value in table.items() if name != "prompt"}
    return SamplePrompt(str(table.get("prompt", "")), options)


def read_prompt_line(line: str) -> SamplePrompt:
    """The prompt and options of a line, "a cat --n ugly --w 512 --s 28": text up to the first
    " --", then letters with their values; later values win, unknown letters are no options.
    """
    prompt, *parts = line.strip().split(" --")
    options: dict[str, Any] = {}
    for part in parts:
        letter, _, text = part.partition(" ")
        if letter.lower() not in LETTERS:
            continue
        name, pattern = LETTERS[letter.lower()]
        if match := re.match(pattern, text):
            options[name] = _read_number(match[0])
    if "sample_steps" in options:
        options["sample_steps"] = max(1, min(MOST_STEPS, options["sample_steps"]))
    return SamplePrompt(prompt, options)


def _read_number(text: str) -> Any:
    """The number that a text is, else the text."""
    if text.isdigit():
        return int(text)
    return float(text) if is_number(text) else text
