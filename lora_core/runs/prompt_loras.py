"""LoRA files that prompts name in A1111's tags, <lora:NAME:0.7>, and words that prompts lack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_core.errors import UserError
from lora_core.placeholders import Placeholder, has_placeholder
from lora_core.prompt_tags import LoraTag, find_tagged_file, parse_lora_tags
from lora_core.runs.loras import LoraSource
from lora_core.text import read_lines

SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class TaggedPrompt:
    """A prompt without its tags, and the LoRAs that they named."""

    text: str
    loras: tuple[LoraSource, ...] = ()


def read_prompt_lines(prompt: str, file: str) -> list[str]:
    """The prompt, or the lines of a prompt file. Raises UserError for both, neither, and a file
    without any.
    """
    if bool(prompt) == bool(file):
        raise UserError("give either --prompt TEXT or --prompts FILE")
    if prompt:
        return [prompt]
    try:
        lines = read_lines(Path(file))
    except OSError as error:
        raise UserError(f"cannot read the prompt file {file}: {error}") from None
    if not lines:
        raise UserError(f"the prompt file {file} has no prompt")
    return lines


def read_tagged_prompt(prompt: str) -> TaggedPrompt:
    """The prompt and the LoRAs of its tags, by path or by name in the current folder.

    Raises UserError for a file that is not there, block weights, and a LoRA that is named twice.
    """
    text, tags = parse_lora_tags(prompt)
    if not tags:
        return TaggedPrompt(prompt)
    loras = tuple(_read_tag(tag) for tag in tags)
    _refuse_repeats(loras, "the prompt")
    return TaggedPrompt(text.strip(), loras)


def combine_loras(given: Sequence[LoraSource], prompts: Sequence[TaggedPrompt]) -> list[LoraSource]:
    """The LoRAs of --lora, then those of the prompts' tags, each once.

    Raises UserError for a LoRA that both name.
    """
    tagged: dict[str, LoraSource] = {}
    for prompt in prompts:
        for lora in prompt.loras:
            tagged.setdefault(lora.path, lora)
    if tagged:
        _refuse_repeats([*given, *tagged.values()], "--lora and a tag of a prompt")
    return [*given, *tagged.values()]


def loras_of_prompt(
    loras: Sequence[LoraSource], given: int, prompt: TaggedPrompt
) -> list[LoraSource]:
    """The combined LoRAs with this prompt's strengths: 0 for those that only others name.

    The first `given` ones are of --lora and act on every prompt.
    """
    own = {lora.path: lora for lora in prompt.loras}
    others = [own.get(lora.path, lora._replace(strength=0.0)) for lora in loras[given:]]
    return [*loras[:given], *others]


def prompts_without_words(
    prompts: Sequence[str], placeholders: Sequence[Placeholder], others: Sequence[str] = ()
) -> str:
    """One sentence about prompts that use no learned word or token, or "".

    `others` are texts of every image, such as those of regions; a word in one of them is enough.
    """
    if any(_has_learned_word(text, placeholders) for text in others):
        return ""
    lacking = [prompt for prompt in prompts if not _has_learned_word(prompt, placeholders)]
    if not placeholders or not lacking:
        return ""
    words = ", ".join(dict.fromkeys(placeholder.word for placeholder in placeholders))
    first = lacking[0] if len(lacking[0]) <= SHOWN else lacking[0][:SHOWN] + "..."
    which = f"the prompt {first!r} has"
    if len(prompts) > 1:
        which = f"{len(lacking)} of {len(prompts)} prompts, first {first!r}, have"
    return f"{which} none of the learned words: {words}"


def _read_tag(tag: LoraTag) -> LoraSource:
    if tag.blocks:
        raise UserError(
            f"<lora:{tag.name}> has the block weights {tag.blocks}, which only merge.py mix takes; "
            "write a file with them there, and name that"
        )
    path = find_tagged_file(tag.name)
    if tag.unet == tag.text:
        return LoraSource(path, tag.unet)
    given = {"unet": tag.unet, "text": tag.text}
    # A network that is not named has strength 1, and may be missing in the file.
    return LoraSource(path, {name: value for name, value in given.items() if value != 1})


def _refuse_repeats(loras: Sequence[LoraSource], where: str) -> None:
    seen: set[Path] = set()
    for lora in loras:
        place = Path(lora.path).resolve()
        if place in seen:
            raise UserError(f"{lora.path} is named twice, by {where}; give its strength once")
        seen.add(place)


def _has_learned_word(prompt: str, placeholders: Sequence[Placeholder]) -> bool:
    for placeholder in placeholders:
        names = (placeholder.word, *placeholder.names)
        if any(has_placeholder(prompt, name) for name in names):
            return True
    return False
