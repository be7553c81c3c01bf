"""Words that a prompt needs for a LoRA to act, as managers of files show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lora_core.config import Config
from lora_core.data.records import Record
from lora_core.formats import run_file_names
from lora_core.placeholders import Placeholder, bind_placeholders, has_placeholder

LONGEST_TRIGGER = 200  # characters of a caption that all images share


class Trigger(NamedTuple):
    """Trigger words, and whether they are taken from captions."""

    words: str
    is_caption: bool = False


def find_trigger(
    config: Config, records: Sequence[Record], placeholders: Sequence[Placeholder], name: str
) -> Trigger:
    """The trigger words of files called `name`; "" where they have none.

    --files.trigger, else with learned tokens the name of their file, by which A1111 and ComfyUI
    insert them (words with tokens for each layer, which these do not read, as they are); else the
    placeholder words that all captions have as plain text, else the one caption of all images,
    else the tag that all captions begin with.
    """
    if config.files.trigger:
        return Trigger(config.files.trigger)
    if any(own.layers for own in placeholders):
        return Trigger(", ".join(own.word for own in placeholders))
    if placeholders:
        return Trigger(token_file_stem(name))
    captions: dict[str, None] = {}
    for record in records:
        captions |= dict.fromkeys(record.captions)
    words = [w for w in config.tokens.words if all(has_placeholder(text, w) for text in captions)]
    if words:
        return Trigger(", ".join(words))
    first, *others = captions
    if not others:
        return Trigger(first if len(first) <= LONGEST_TRIGGER else "", is_caption=True)
    tags = {text.split(",")[0].strip() for text in captions}
    is_tag = len(tags) == 1 and any("," in text for text in captions)
    return Trigger(tags.pop() if is_tag else "", is_caption=True)


def usage_hint(placeholders: Sequence[Placeholder], name: str) -> str:
    """What a user has to do besides writing the trigger words; "" without learned tokens."""
    words = ", ".join(own.word for own in placeholders)
    if not placeholders:
        return ""
    if any(own.layers for own in placeholders):
        return f"{words}: tokens for each layer, which lora_core draws with the run's folder"
    stem = token_file_stem(name)
    return (
        f"{words} of the captions is {stem} in prompts of A1111 and embedding:{stem} in ComfyUI, "
        f"with {stem}.safetensors among the embeddings"
    )


def caption_in_tools(caption: str, placeholders: Sequence[Placeholder], name: str) -> str:
    """A caption as A1111 is prompted with it: learned words are the name of their file."""
    if any(own.layers for own in placeholders):
        return caption
    files = [Placeholder(own.word, (token_file_stem(name),)) for own in placeholders]
    return bind_placeholders(caption, files)


def token_file_stem(name: str) -> str:
    """The name of the token file of files called `name`, without its ending."""
    return run_file_names(name)[2].removesuffix(".safetensors")
