"""Apply LoRA files and run folders to a model: strengths, tokens, and the runs' settings."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lora_core import formats
from lora_core.adapters import noise_levels
from lora_core.adapters.patch import Patch, patch
from lora_core.errors import UserError
from lora_core.escaped_output import print_note
from lora_core.family import Family
from lora_core.formats import embeddings
from lora_core.formats.recognition import model_of_run, recognize_file, refuse_other_kinds
from lora_core.formats.token_files import find_token_file, token_file_of
from lora_core.formats.training_metadata import TRAINED_BY
from lora_core.placeholders import Placeholder
from lora_core.settings import scheduler_changes
from lora_core.text import is_number, shorten_value
from lora_core.toml import parse_toml

TEXT_SETTINGS = ("clip_skip", "max_token_length", "max_sequence_length")
WHOLE_RANGE = (0.0, 1.0)
RANGE = re.compile(r"[\d.]+-[\d.]+")  # of noise levels, as --lora has it behind an @
LARGEST_SETTING = 100_000  # layers or tokens


class LoraSource(NamedTuple):
    """A LoRA file or run folder, and its strength: one for all networks, or one for each.

    In the denoiser it acts at noise levels whose share, NoiseLevel.share, is in `shares`.
    """

    path: str
    strength: float | dict[str, float]
    shares: tuple[float, float] = WHOLE_RANGE  # lowest and highest, both included


def parse_lora(text: str, option: str = "--lora") -> LoraSource:
    """Parses PATH, PATH:0.8 or PATH:unet=0.6,text=0.9, and a range PATH:0.8@0.2-1 or PATH@0.2-1.

    A path that exists is a path, whatever is in it. Raises UserError, which calls the text a value
    of `option`, for a strength that is no number and a range that is none.
    """
    path, colon, tail = text.rpartition(":")
    if not text.strip() or (colon and not path.strip()):
        raise UserError(f"{option} {text!r} names no file; write PATH:0.8")
    if not colon or "/" in tail or "\\" in tail or Path(text).exists():
        return _parse_bare_path(text, option)
    tail, at, ends = tail.partition("@")
    shares = _parse_shares(ends, f"{option} {text}") if at else WHOLE_RANGE
    try:
        if "=" not in tail:
            return LoraSource(path, float(tail), shares)
        pairs = (pair.split("=") for pair in tail.split(","))
        return LoraSource(path, {name: float(value) for name, value in pairs}, shares)
    except ValueError:
        raise UserError(
            f"{option} {text}: cannot read the strength {tail!r}; "
            "write PATH:0.8 or PATH:unet=0.6,text=0.9"
        ) from None


def _parse_bare_path(text: str, option: str) -> LoraSource:
    """PATH or PATH@LOW-HIGH, at strength 1."""
    path, _, ends = text.rpartition("@")
    if not path.strip() or not RANGE.fullmatch(ends) or Path(text).exists():
        return LoraSource(text, 1.0)
    return LoraSource(path, 1.0, _parse_shares(ends, f"{option} {text}"))


def _parse_shares(text: str, option: str) -> tuple[float, float]:
    """The range LOW-HIGH of noise levels. Raises UserError for another text."""
    low, dash, high = text.partition("-")
    if dash and is_number(low) and is_number(high):
        shares = float(low), float(high)
        if 0 <= shares[0] < shares[1] <= 1:
            return shares
    raise UserError(
        f"{option}: cannot read the range {text!r}; write the lowest and the highest noise level "
        "of 0 to 1, such as 0.2-1"
    )


def lora_text(lora: LoraSource) -> str:
    """The text that `parse_lora` reads as this LoRA."""
    ends = "" if lora.shares == WHOLE_RANGE else f"@{lora.shares[0]}-{lora.shares[1]}"
    if isinstance(lora.strength, dict):
        given = ",".join(f"{name}={value}" for name, value in lora.strength.items())
        return f"{lora.path}:{given}{ends}"
    return f"{lora.path}:{lora.strength}{ends}"


def strengths_by_component(lora: LoraSource, components: Collection[str]) -> dict[str, float]:
    """The strength of each network that a LoRA adapts; 1 for those that it does not name."""
    if not isinstance(lora.strength, dict):
        return dict.fromkeys(components, lora.strength)
    strengths: dict[str, float] = dict.fromkeys(components, 1.0)
    for name, value in lora.strength.items():
        named = match_components(name, components, lora.path, value)
        strengths |= dict.fromkeys(named, value)
    return strengths


def apply_loras(
    family: Family,
    loras: Sequence[LoraSource],
    stack: ExitStack,
    words: Sequence[Placeholder] = (),
    *,
    kind: str = "",
) -> list[Patch]:
    """Patches the model with every LoRA, in order, until the stack closes.

    Then come the tokens in the folders of LoRAs that are given as single files. Words and tokens
    that the model, whose own words are `words`, or an earlier file has already are renamed and
    reported. `kind` is the class of those files that have adapters of a user's class; raises
    UserError for one without such a file.
    """
    modules = dict(family.modules)
    del modules["vae"]
    for name, tokenizer in family.tokenizers.items():
        modules[name.replace("text_encoder", "tokenizer")] = tokenizer
    patches: list[Patch] = []
    has_custom = False
    for lora in (*loras, *_token_files(loras)):
        state = formats.load(lora.path, family.layout, merging=True, custom=bool(kind))
        has_custom = has_custom or bool(state.custom)
        strength = lora.strength
        if isinstance(strength, dict):
            strength = strengths_by_component(lora, state.changed_components)
        names = (*embeddings.placeholder_words(state, lora.path), *state.token_names)
        applied = patch(
            modules,
            lora.path,
            strength,
            layout=family.layout,
            rename=_free_names(names, _taken_names(family, words, patches)),
            kind=kind if state.custom else "",
        )
        noise_levels.set_largest_timestep(modules[family.denoiser], family.schedule.t_max)
        patches.append(stack.enter_context(applied))
        if not find_token_file(lora.path):  # else its tokens are still to come, from their own file
            for sentence in applied.report:
                print_note(sentence)
    if kind and not has_custom:
        raise UserError(
            f"--adapter-kind {kind} has no effect: no --lora has adapters of a class of its own; "
            "leave it out"
        )
    return patches


def _token_files(loras: Sequence[LoraSource]) -> list[LoraSource]:
    """The token files of LoRAs that are single files, each once, without those that are given."""
    found = {}
    given = {Path(lora.path).resolve() for lora in loras}
    for lora in loras:
        file = Path(find_token_file(lora.path))
        if not file.name or file.resolve() in given:
            continue
        if file not in found and file.name != token_file_of(lora.path).name:
            print_note(f"{lora.path} names {file.name}, whose tokens are taken")
        found[file] = LoraSource(str(file), 1.0)
    return list(found.values())


def read_headers(path: str) -> dict[str, str]:
    """The header entries of a LoRA file, or of all files of a run folder.

    Empty for a file that cannot be read; loading it later raises the error.
    """
    found: dict[str, str] = {}
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                found |= opened.metadata() or {}
        except (OSError, SafetensorError):
            continue
    return found


class RunSettings(NamedTuple):
    """The settings of a training run that sampling has to repeat."""

    scheduler: dict[str, Any]  # keys of the model's scheduler_config.json that it replaces
    text: dict[str, int]  # those of TEXT_SETTINGS that are not 0


def read_run_settings(paths: Sequence[str]) -> RunSettings:
    """The settings of the runs that trained the LoRA files; later files override earlier ones."""
    scheduler: dict[str, Any] = {}
    text: dict[str, int] = {}
    for path in paths:
        where = f"the header entry {TRAINED_BY} of {path}"
        trained = parse_toml(read_headers(path).get(TRAINED_BY, ""), where)
        noise = _read_setting(trained, "noise", {}, where)
        scheduler |= scheduler_changes(
            _read_setting(noise, "prediction", "model", where),
            zero_terminal_snr=_read_setting(noise, "zero_terminal_snr", False, where),
        )
        for name in TEXT_SETTINGS:
            if value := _read_setting(trained, name, 0, where):
                text[name] = value
    return RunSettings(scheduler, text)


def _read_setting(table: Mapping[str, Any], name: str, default: Any, where: str) -> Any:
    """A setting of a config, the default where it is missing.

    Raises UserError for a value of another type, and for integers that are no number of tokens.
    """
    value = table.get(name, default)
    is_large = type(value) is int and not 0 <= value <= LARGEST_SETTING
    if type(value) is not type(default) or is_large:
        expected = type(default).__name__
        raise UserError(
            f"{where} has {shorten_value(value)} as {name}, expected a {expected}; "
            "is the file damaged?"
        )
    return value


def refuse_other_files(loras: Sequence[LoraSource]) -> None:
    """Raises UserError for a file that is no adapter, before a model is loaded.

    Files that cannot be read are left to their reader.
    """
    for lora in loras:
        if Path(lora.path).is_file():
            refuse_other_kinds(recognize_file(lora.path), lora.path)


def warn_of_whole_model(model: str, run: Path) -> None:
    """Prints a warning for a run of full fine-tuning, if another model than its own is given.

    On another model the run's folder adds only its tokens, if its class of adapters is not named.
    """
    own = model_of_run(run)
    if own and Path(model).resolve() != own.resolve():
        print(
            f"warning: {run} trained the whole model, which is {own}; "
            f"--model {model} lacks that, give --model {own}",
            file=sys.stderr,
        )


def match_components(
    name: str, components: Collection[str], source: str, value: float
) -> list[str]:
    """The networks that a name means: unet is any denoiser, text every text encoder.

    Raises UserError where the file adapts none of them.
    """
    aliases = {"unet": ("transformer",)}.get(name, ())
    found = [
        component
        for component in components
        if component == name
        or component in aliases
        or (name == "text" and component.startswith("text_encoder"))
    ]
    if not found:
        raise UserError(
            f"{source} adapts {', '.join(components) or 'no network'}, "
            f"so the strength {name}={value:g} would have no effect"
        )
    return found


def _free_names(names: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """Old name -> new name, of the words and tokens that are taken."""
    return {name: _numbered_name(name, {*taken, *names}) for name in names if name in taken}


def _taken_names(
    family: Family, words: Sequence[Placeholder], patches: Sequence[Patch]
) -> set[str]:
    """The words and tokens that the model and earlier patches have."""
    taken: set[str] = set()
    for placeholder in (*words, *chain.from_iterable(applied.placeholders for applied in patches)):
        taken |= {placeholder.word, *placeholder.names}
    for tokenizer in family.tokenizers.values():
        taken |= set(tokenizer.get_added_vocab())
    return taken


def _numbered_name(name: str, taken: Collection[str]) -> str:
    """The first of TOK2, TOK3 ..., or <s0-2>, <s0-3> ..., that is not taken."""
    for number in count(2):
        other = f"{name[:-1]}-{number}>" if name.endswith(">") else f"{name}{number}"
        if other not in taken:
            return other
    raise AssertionError("unreachable")
