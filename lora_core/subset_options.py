"""The options of one of several folders of training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from lora_core.settings import AtLeast, Share

CaptionSource = Literal["auto", "txt", "metadata", "filename", "one", "object", "style"]


@dataclass(frozen=True)
class Subset:
    """One of several folders of training images, [[data.subsets]].

    Options that are not set are those of [data].
    """

    images: str = ""
    """Folder with images, as --data.images."""
    repeats: Annotated[int | None, AtLeast(1)] = None
    """Visits of each of its images in an epoch."""
    prior: bool = False
    """Its images are class images, whose loss --prior.weight weights. They take their turns among
    the others, and are repeated or left out until they are as many as those (kohya's is_reg)."""
    captions: CaptionSource | None = None
    """Where its captions come from."""
    caption: str | None = None
    """The caption of its images without a text of their own, or of all of them with captions
    one (kohya's class_tokens)."""
    caption_extension: str | None = None
    """Ending of its caption files."""
    caption_lines: Literal["any", "first"] | None = None
    """Which line of its caption files is the caption."""
    caption_prefix: str | None = None
    """Text before its captions."""
    caption_suffix: str | None = None
    """Text after its captions."""
    wildcards: bool | None = None
    """Whether {red|blue} in its captions is a choice."""
    shuffle_caption: bool | None = None
    """Whether the tags of its captions change places."""
    keep_tokens: Annotated[int | None, AtLeast(0)] = None
    """Tags at the beginning of its captions that stay."""
    keep_tokens_separator: str | None = None
    """Text between tags that stay and the others in its captions."""
    tag_dropout: Annotated[float | None, Share()] = None
    """Probability that a tag of its captions is left out, [0, 1)."""
    tag_separator: str | None = None
    """Text between the tags of its captions."""
    secondary_separator: str | None = None
    """Text between tags of its captions that stay together."""
