"""The two ways to run kohya's configs: train.py --from-kohya FILE, with flags of ours after it, and
the commands in examples/kohya, which read kohya's own flags.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.flags.command_line import parse_command_line
from lora_core.text import print_escaped
from lora_core.toml import to_toml
from training.translation.kohya_options import read_config_file, read_flags
from training.translation.kohya_runs import TranslatedRun, translate_run
from training.translation.run_flags import apply_run_flags, check_free_folder, split_run_flags

FROM_KOHYA, DATASET, WRITE_CONFIG = "--from-kohya", "--dataset", "--write-config"
EXAMPLE = (
    "python train.py --from-kohya train_network_config.toml --out runs/mine\n\n"
    "or: python train.py --from-kohya train_network_config.toml --dataset dataset.toml "
    "--write-config mine.toml"
)


def read_kohya_command(words: Sequence[str]) -> Config | None:
    """The config of `--from-kohya FILE [--dataset FILE] [--write-config FILE] [flags]`; the flags,
    ours, win over the file. Prints the table. None with --write-config, which writes the config.
    """
    rest = list(words)
    file = _take_option(rest, FROM_KOHYA)
    dataset, target = _take_option(rest, DATASET), _take_option(rest, WRITE_CONFIG)
    if file is None:
        raise UserError(f"{FROM_KOHYA} needs the file that kohya's --config_file takes")
    run = translate_run(read_config_file(Path(file)), dataset, processes=_process_count())
    config = parse_command_line(
        Config, rest, prog="train.py", example=EXAMPLE, takes_file=False, default=run.config
    )
    if target is None:
        check_free_folder(config)
    _print_tables(run)
    if target is None:
        return config
    path = Path(target)
    if path.exists():
        raise UserError(f"{path} exists; name another file for {WRITE_CONFIG}, or remove it")
    path.write_text(to_toml(config), encoding="utf-8")
    print(f"config: {path}")
    return None


def _take_option(words: list[str], name: str) -> str | None:
    """The value of a flag, which is taken out of the words; None where it is not there."""
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag != name:
            continue
        if equals:
            del words[i]
            return value
        if i + 1 == len(words) or words[i + 1].startswith("--"):
            raise UserError(f"{name} needs a file after it")
        value = words[i + 1]
        del words[i : i + 2]
        return value
    return None


def translate_kohya_flags(words: Sequence[str], *, script: str = "") -> TranslatedRun:
    """The run of a command line of kohya's: --config_file=FILE, over which other flags win."""
    flags = read_flags(words)
    file = flags.pop("config_file", None)
    given = read_config_file(Path(file)) if file else {}
    return translate_run(given | flags, script=script, processes=_process_count())


def run_kohya_command(
    words: Sequence[str], train: Callable[[Config], Path], *, script: str = ""
) -> None:
    """Train as a command line of kohya's, with our RUN_FLAGS, says; prints the table first."""
    own, words = split_run_flags(words)
    run = translate_kohya_flags(words, script=script)
    config = apply_run_flags(run.config, own)
    check_free_folder(config)
    _print_tables(run)
    folder = train(config)
    if _is_first():
        print(f"done: {folder}")


def _print_tables(run: TranslatedRun) -> None:
    if _is_first():
        print_escaped(run.format_tables())


def _process_count() -> int:
    """The processes that torchrun or accelerate started, before they have met."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
