"""peft's own files: a folder with adapter_model.safetensors (or .bin) and adapter_config.json, keys `base_model.model.{path}.lora_A.weight`; and
files without any component's name before their paths, such as those of a UNet's attention processors or of one transformer.

The component is the one whose layers the paths name; where several have them (two CLIP text encoders) the shapes decide, or a folder that is called
like one. The strength is alpha / r of the config, with use_rslora alpha / sqrt(r): r and alpha by layer in rank_pattern and alpha_pattern, where the
first pattern wins that matches the end of a path from a dot on. diffusers has the same fields in a header, with the component before each name.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import joined_layers, kohya
from lora_core.formats.grammar import (
    STRICT,
    Grammar,
    ReadOptions,
    Update,
    decode_adapter,
    find_leaves,
    is_adapter_key,
    list_known_keys,
    to_adapter_state,
)
from lora_core.formats.layout import COMPONENTS, Layout

HEADER = "lora_adapter_metadata"  # peft's LoraConfig fields as JSON, "unet.r" and so on
CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
MODULE = "base_model.model"
DEFAULT = 8  # peft's rank and alpha
PROCESSORS = {  # how a projection's path ends -> its names in attention processors, with and without that level
    **{f"to_{x}": (f"processor.to_{x}", f"to_{x}") for x in "qkv"},
    "to_out.0": ("processor.to_out", "to_out"),
    **{f"self_attn.{x}_proj": (f"self_attn.to_{x}",) for x in "qkv"},
    "self_attn.out_proj": ("self_attn.to_out",),
}


@dataclass(frozen=True)
class PeftSettings:
    """The fields of a LoraConfig that say how strong a layer's update is."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]  # pattern -> rank
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool

    def scale(self, path: str, rank: int, where: str) -> float:
        """alpha / r of a layer. Raises UserError where the tensors have another rank than r."""
        said, alpha = (
            _value_by_pattern(self.ranks, path, self.rank),
            _value_by_pattern(self.alphas, path, self.alpha),
        )
        if said != rank:
            raise UserError(
                f"{where} has tensors of rank {rank}, its settings say r = {said}; one of them is from another file"
            )
        return alpha / rank ** (0.5 if self.rslora else 1)

    def check(self, modules: Mapping[str, Update], where: str) -> None:
        """Raises UserError where use_dora is set and a magnitude is missing."""
        for path, update in modules.items():
            if self.dora and update.magnitude is None:
                raise UserError(
                    f"{where} has no magnitude for {path}, but its settings say use_dora; the file is incomplete"
                )


def header_settings(header: Mapping[str, str], source: str) -> dict[str, PeftSettings]:
    """Component -> settings in a file's header; none without one. Raises UserError for a broken one."""
    if HEADER not in header:
        return {}
    where = f"{source} has a broken header {HEADER}"
    fields = _parse_json(header[HEADER], where)
    own = {
        name: {k.removeprefix(f"{name}."): v for k, v in fields.items() if k.startswith(f"{name}.")}
        for name in COMPONENTS
    }
    return {name: _parse_settings(values, where) for name, values in own.items() if "r" in values}


def processor_names(path: str) -> Iterator[str]:
    """Names under which files of attention processors have a layer."""
    for end, names in PROCESSORS.items():
        if path == end or path.endswith("." + end):
            yield from (path[: -len(end)] + name for name in names)


def is_peft_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def peft_weights(folder: Path) -> Path:
    """The file of weights in peft's folder. Raises UserError without one."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} has an {CONFIG} but neither {' nor '.join(WEIGHTS)}; fetch or save it again"
    )


def detect_peft(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any key ends like a factor; what comes before is known from a layout only."""
    return any(is_adapter_key(key) for key in tensors)


def read_peft(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layout: Layout | None,
    source: str,
    how: ReadOptions = STRICT,
) -> AdapterState:
    """The file's state, with the settings of the config beside it, if there is one. Raises UserError without a layout, and for paths of no component,
    or of several.
    """
    if layout is None:
        raise UserError(
            f"{source} does not say which network its keys ({next(iter(tensors))} ...) belong to; name the model"
        )
    settings, stored, leaves = (
        _read_config(Path(source)),
        joined_layers.join_layout(layout),
        find_leaves(tensors, source),
    )
    known = {
        name: list_known_keys(
            _peft_grammar(stored), replace(stored, components={name: part}), leaves
        )
        for name, part in stored.components.items()
    }
    counts = {name: sum(key in own for key in tensors) for name, own in known.items()}
    likely = [name for name, count in counts.items() if count == max(counts.values())]
    if (folder := Path(source).parent.name) in likely:
        likely = [folder]
    fitting, errors = {}, []
    for name in likely:
        try:
            scales = {name: settings.scale} if settings else {}
            fitting[name] = decode_adapter(
                tensors, known[name], stored, source, how=how, scales=scales
            )
        except UserError as error:
            errors.append(error)
    if not fitting:
        raise errors[0]
    if len(fitting) > 1:
        raise UserError(
            f"{source} fits {' and '.join(fitting)} alike; put it into a folder called like the one it belongs to"
        )
    ((name, found),) = fitting.items()
    if settings:
        settings.check(found.get(name, {}), source)
    elif any(key.startswith(MODULE) for key in tensors) and not any(
        key.endswith(".alpha") for key in tensors
    ):
        print(
            f"{source} has peft's names but no {CONFIG} beside it; its strength is taken as alpha = r",
            file=sys.stderr,
        )
    return to_adapter_state(joined_layers.separate_layers(found, layout, source), header)


def _peft_grammar(layout: Layout) -> Grammar:
    original = {
        name: kohya.original_names(component) for name, component in layout.components.items()
    }
    every = {path: name for names in original.values() for path, name in names.items()}
    return Grammar(
        heads=lambda name, component: (MODULE, ""),
        names=lambda component, path: (
            path,
            *processor_names(path),
            *([every[path]] if path in every else []),
        ),
        leaves={},
        scale="folded",
        magnitude=lambda out, ndim: (out,),
    )


def _read_config(file: Path) -> PeftSettings | None:
    """The settings beside a file. Raises UserError for a broken config, and for another method than LoRA."""
    path = file.parent / CONFIG
    if file.name not in WEIGHTS or not path.is_file():
        return None
    try:
        fields = _parse_json(path.read_text(encoding="utf-8"), f"{path} is broken")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch or save it again") from None
    if (method := fields.get("peft_type", "LORA")) != "LORA":
        raise UserError(
            f"{path} is of a {method} adapter, expected LORA; other methods of peft are not read"
        )
    return _parse_settings(fields, f"{path} is broken")


def _parse_json(text: str, broken: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{broken} ({error}); remove or mend it") from None
    if not isinstance(fields, dict):
        raise UserError(
            f"{broken} (expected a JSON object, got {type(fields).__name__}); remove or mend it"
        )
    return fields


def _parse_settings(values: Mapping[str, Any], broken: str) -> PeftSettings:
    """Raises UserError, beginning with `broken`, for values that are no ranks, alphas or patterns."""
    rank, alpha = values.get("r", DEFAULT), values.get("lora_alpha", DEFAULT)
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise UserError(
            f"{broken} (rank_pattern {ranks!r:.60}, alpha_pattern {alphas!r:.60}); expected patterns and numbers"
        )
    for number in (rank, *ranks.values()):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UserError(f"{broken} (a rank of {number!r:.60}); expected a number above 0")
    for number in (alpha, *alphas.values()):
        if (
            not isinstance(number, int | float)
            or isinstance(number, bool)
            or not abs(number) < float("inf")
        ):
            raise UserError(f"{broken} (an alpha of {number!r:.60}); expected a finite number")
    for pattern in (*ranks, *alphas):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{broken} (the pattern {pattern!r:.60} is no regular expression: {error}); remove or mend it"
            ) from None
    return PeftSettings(
        rank,
        float(alpha),
        ranks,
        {key: float(a) for key, a in alphas.items()},
        bool(values.get("use_rslora")),
        bool(values.get("use_dora")),
    )


def _value_by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a path, as peft.utils.get_pattern_key takes them."""
    return next(
        (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)),
        default,
    )
