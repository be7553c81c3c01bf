"""The scale of peft's adapters, from the LoraConfig in a header or in a folder.

It is alpha / r, or alpha / sqrt(r) with use_rslora. rank_pattern and alpha_pattern have r and alpha
by layer: the first pattern that matches the end of a path, after a dot, wins. peft writes these
fields into adapter_config.json, diffusers into a file's header with the component in front, as in
"unet.r".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapters.weight_updates import LayerUpdate
from lora_core.errors import UserError
from lora_core.formats.known_formats import COMPONENTS, PEFT_HEADER
from lora_core.json_files import LARGEST_NUMBER, parse_object, read_object
from lora_core.text import shorten_value

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DEFAULT = 8  # peft's rank and alpha
# Limits of regular expressions that others wrote. One that repeats a group, or repeats a dozen
# times, can take longer than the universe is old; peft and diffusers write the layers' names.
SLOW_PATTERN = re.compile(r"\)[*+?{]|([*+}].*){4}|\\[1-9]", re.DOTALL)
LONGEST_PATTERN = 400
MOST_PATTERNS = 5_000  # twice the layers of the largest model


@dataclass(frozen=True)
class PeftSettings:
    """The fields of a LoraConfig on which the strength of a layer's update depends."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]  # pattern -> rank
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool

    def scale(self, path: str, rank: int, where: str) -> float:
        """alpha / r of a layer. Raises UserError where the tensors have another rank than r."""
        expected = _value_by_pattern(self.ranks, path, self.rank)
        alpha = _value_by_pattern(self.alphas, path, self.alpha)
        if expected != rank:
            raise UserError(
                f"{where} has tensors of rank {rank}, its settings have r = {expected}; "
                "one of them is from another file"
            )
        return alpha / rank ** (0.5 if self.rslora else 1)

    def check(self, modules: Mapping[str, LayerUpdate | Tensor], where: str) -> None:
        """Raises UserError where use_dora is set and a magnitude is missing."""
        for path, update in modules.items():
            if isinstance(update, Tensor):  # of a norm or bias
                continue
            if self.dora and update.magnitude is None:
                raise UserError(
                    f"{where} has no magnitude for {path}, but its settings have use_dora; "
                    "the file is incomplete"
                )


def header_settings(header: Mapping[str, str], source: str) -> dict[str, PeftSettings]:
    """Component -> settings in a file's header. Raises UserError for a broken one."""
    where = f"{source} has a broken header {PEFT_HEADER}"
    fields = parse_object(header[PEFT_HEADER], where, "remove or fix it")
    settings = {}
    for name in COMPONENTS:
        start = f"{name}."
        own = {key.removeprefix(start): v for key, v in fields.items() if key.startswith(start)}
        if "r" in own:
            settings[name] = _parse_settings(own, where)
    return settings


def find_peft_files(folder: Path) -> list[Path]:
    """The files of weights in a folder of peft's, or in its folders called like components.

    None for other folders. Raises UserError for a config without weights.
    """
    folders = [folder, *(folder / name for name in COMPONENTS)]
    peft = [place for place in folders if (place / CONFIG).is_file()]
    if folder in peft:
        peft = [folder]
    return [_weights_in(place) for place in peft]


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} has an {CONFIG} but neither {' nor '.join(WEIGHTS)}; fetch or save it again"
    )


def folder_settings(file: Path) -> PeftSettings | None:
    """The settings next to a file; None where there are none.

    Raises UserError for a broken config, and for another method than LoRA.
    """
    path = file.parent / CONFIG
    if file.name not in WEIGHTS or not path.is_file():
        return None
    fields = read_object(path, "fetch or save it again")
    if (method := fields.get("peft_type", "LORA")) != "LORA":
        raise UserError(
            f"{path} is of a {method} adapter, expected LORA; other methods of peft are not read"
        )
    return _parse_settings(fields, f"{path} is broken")


def _parse_settings(values: Mapping[str, Any], broken: str) -> PeftSettings:
    """The settings. Raises UserError for values that are no ranks, alphas or patterns.

    The error begins with `broken`.
    """
    rank = values.get("r", DEFAULT)
    alpha = values.get("lora_alpha", DEFAULT)
    ranks = values.get("rank_pattern") or {}
    alphas = values.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise UserError(
            f"{broken} (rank_pattern {shorten_value(ranks)}, "
            f"alpha_pattern {shorten_value(alphas)}); expected patterns and numbers"
        )
    for number in (rank, *ranks.values()):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UserError(
                f"{broken} (a rank of {shorten_value(number)}); expected a number above 0"
            )
    for number in (alpha, *alphas.values()):
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not abs(number) <= LARGEST_NUMBER:
            raise UserError(
                f"{broken} (an alpha of {shorten_value(number)}); expected a finite number"
            )
    if len(ranks) + len(alphas) > MOST_PATTERNS:
        raise UserError(f"{broken} ({len(ranks) + len(alphas)} patterns); a layer has one of each")
    for pattern in (*ranks, *alphas):
        try:
            if SLOW_PATTERN.search(pattern) or len(pattern) > LONGEST_PATTERN:
                raise re.error("it may take for ever")
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"{broken} (the pattern {shorten_value(pattern)} is not a regular expression: "
                f"{error}); remove or fix it"
            ) from None
    return PeftSettings(
        rank,
        float(alpha),
        ranks,
        {key: float(value) for key, value in alphas.items()},
        bool(values.get("use_rslora")),
        bool(values.get("use_dora")),
    )


def _value_by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a path, else `default`.

    As peft.utils.get_pattern_key takes them.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
