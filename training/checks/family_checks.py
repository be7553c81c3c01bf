"""A config that was written for a model of another family: what in it says so, in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from lora_core.config import Config
from lora_core.errors import UserError
from models import Layout
from models.families import families_with_preset


class FamilyName(NamedTuple):
    """The name of a family in a sentence, and where its configs are."""

    name: str
    configs: str


FAMILY_NAMES = {
    "sd": FamilyName("Stable Diffusion", "configs/sd15_*.toml"),
    "sdxl": FamilyName("SDXL", "configs/sdxl_*.toml"),
    "flux": FamilyName("Flux", "configs/flux_*.toml"),
    "sd3": FamilyName("Stable Diffusion 3", "configs/sd3_*.toml"),
    "flux2": FamilyName("FLUX.2", "configs/flux2_*.toml"),
}


class FamilyOption(NamedTuple):
    """An option that only models of some families have."""

    words: Callable[[Any], str]  # of the option's value, as they are typed
    families: tuple[str, ...]
    value: Callable[[Config], Any]  # empty where the option is not used


UNETS = ("sd", "sdxl")
WITH_T5 = ("flux", "sd3")
FLOWS = (*WITH_T5, "flux2")
FAMILY_OPTIONS = (
    FamilyOption("--max-sequence-length {}".format, FLOWS, lambda c: c.max_sequence_length),
    FamilyOption(
        "--noise.guidance {:g}".format,
        ("flux", "flux2"),
        lambda c: c.noise.guidance if c.noise.guidance != Config().noise.guidance else None,
    ),
    FamilyOption(
        "--noise.shift {:g}".format, FLOWS, lambda c: c.noise.shift if c.noise.shift != 1 else None
    ),
    FamilyOption(lambda _: "--noise.dynamic-shift", FLOWS, lambda c: c.noise.dynamic_shift),
    FamilyOption(lambda _: "--tokens.encoders t5", WITH_T5, lambda c: "t5" in c.tokens.encoders),
    FamilyOption(
        lambda _: "--tokens.encoders clip_g",
        ("sdxl", "sd3"),
        lambda c: "clip_g" in c.tokens.encoders,
    ),
    FamilyOption(
        "--noise.prediction {}".format,
        UNETS,
        lambda c: c.noise.prediction if c.noise.prediction != "model" else None,
    ),
    FamilyOption(lambda _: "--noise.zero-terminal-snr", UNETS, lambda c: c.noise.zero_terminal_snr),
    FamilyOption("--clip-skip {}".format, (*UNETS, "sd3"), lambda c: c.clip_skip),
    FamilyOption(
        lambda _: "--samples.negative", (*UNETS, "sd3", "flux2"), lambda c: c.samples.negative
    ),
)


def check_family(c: Config, layout: Layout) -> None:
    """Raises UserError where the config has options of other families than the model's.

    Nothing is refused for a family of the user's own, which may have any of them.
    """
    family = layout.family
    if family not in FAMILY_NAMES or c.family:
        return
    found: dict[tuple[str, ...], list[str]] = {}  # families -> words that only they have
    for words, families in _family_words(c, layout):
        if families and family not in families:
            found.setdefault(families, []).append(words)
    if not found:
        return
    name, configs = FAMILY_NAMES[family]
    parts = []
    for families, listed in found.items():
        *others, last = [FAMILY_NAMES[other].name for other in families]
        owners = f"{', '.join(others)} or {last}" if others else last
        parts.append(f"{', '.join(listed)} {'is' if len(listed) == 1 else 'are'} for {owners}")
    them = "it" if sum(map(len, found.values())) == 1 else "them"
    raise UserError(
        f"{c.model} is a model of the family {name}, and {'; '.join(parts)}; leave {them} out, "
        f"take a config for {name} ({configs}), or name another model with --model"
    )


def _family_words(c: Config, layout: Layout) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(words of an option, the families that have it) of all options that are used; no families:
    it is not known which.
    """
    known = set(chain.from_iterable(layout.presets.values()))
    if c.trains("denoiser"):
        for target in set(c.adapter.targets) - known:
            yield f"--adapter.targets {target}", families_with_preset(target)
    for option in FAMILY_OPTIONS:
        value = option.value(c)
        if value:
            yield option.words(value), option.families
