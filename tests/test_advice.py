"""Every flag that a message names exists, and so does the value next to it."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from torch.distributed.run import get_args_parser

from infer import Infer
from lora_core.config import Config, Stage
from lora_core.flags.program_flags import DRAW_FLAGS, MERGE_FLAGS
from lora_core.flags.trainer_flags import TRAIN_FLAGS
from lora_core.subset_options import Subset
from merging import lora_distill
from merging.commands import COMMANDS, flatten
from tests.test_house import PRODUCT, ROOT
from training.comparisons.compare_options import CompareRuns
from training.translation import lora_ppim, lora_pti, lora_scripts
from training.translation.kohya_options import KOHYA_DEFAULTS

UNKNOWN = "\0"  # stands for what a message fills in
FLAG = re.compile(r"--([a-z\0][\w.\-\0]*)(?: (\w+))?")
ORDINARY = {
    "and",
    "at",
    "finds",
    "has",
    "is",
    "names",
    "needs",
    "or",
    "other",
    "out",
    "takes",
    "tell",
}  # words that follow a flag and are no value
PIP = re.compile(r"pip install[^;:]*")


def options(cls: type, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every flag of a config and its type; {i} where a stage's number stands."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        name, kind = before + field.name.replace("_", "-"), hints[field.name]
        if is_dataclass(kind):
            yield from options(kind, f"{name}.")
        elif kind == tuple[Stage, ...]:
            yield from options(Stage, f"{name}.0.")
        elif kind == tuple[Subset, ...]:
            yield from options(Subset, f"{name}.0.")
        else:
            yield name, kind
            if kind is bool:
                yield f"{before}no-{field.name.replace('_', '-')}", kind


def choices(kind: Any) -> tuple[str, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) not in (tuple, Union, type(int | str)):
        return ()
    return tuple(chain.from_iterable(map(choices, get_args(kind))))


def merge_flags() -> Iterator[str]:
    for command in COMMANDS.values():
        for name in flatten(command.options()):
            yield name.strip("_").replace("_", "-")  # as_ is --as
    yield from ("alpha", "output-path")  # other names of lora_add's


CONFIG = dict(options(Config))
TAKEN = CONFIG | dict(options(Infer)) | dict(options(CompareRuns))
TAKEN |= dict.fromkeys(merge_flags(), str)
# The launcher's own flags, in the sentences of the files that speak of it.
TORCHRUN = {flag.removeprefix("--") for flag in get_args_parser()._option_string_actions}
# Flags of the scripts that are no options of a config.
OF_SCRIPTS = {"compare", "data.prepare", "dataset", "from-kohya", "help", "list", "plan", "preset"}
OF_SCRIPTS |= {"from", "preview-density", "tyro-print-completion", "version", "write-config"}
# The commands of other tools speak of their own flags.
OF_OTHERS = set(" ".join(row.names for row in (*TRAIN_FLAGS, *DRAW_FLAGS, *MERGE_FLAGS)).split())
OF_OTHERS |= {*lora_pti.DEFAULTS, *lora_pti.OWN, *lora_ppim.ARGUMENTS, *lora_scripts.SHARED}
OF_OTHERS |= {*lora_distill.ARGUMENTS, *KOHYA_DEFAULTS, "lora-path"}
READ_BY_HAND = {
    "distributed.py": TORCHRUN,
    "processes.py": TORCHRUN,
    "sharding.py": TORCHRUN,
    "annotators.py": {"data.prepare"},
    "command_page.py": OF_SCRIPTS | {"ratios", "new_rank"},
    "config_checks.py": {f"data.subsets.{UNKNOWN}"},
    "prepared_files.py": {"data.prepare"},
    "run_presets.py": {"preset"},
    "train.py": OF_SCRIPTS,
    "memory_advice.py": {"plan"},
    "plan_table.py": {"plan"},
    "plugin_lists.py": {"list", "metric", "metric-arg", "op"},
    "config.py": {"data.mask"},  # the other spelling of data.masks
    "image_recipe.py": {"from"},
    "add.py": {"with_text_lora"},
    "arguments.py": {"output"},
    "merge.py": {"help", "with_text_lora"},
}
# Kernels name flags of compilers and of their own command lines.
SPEAKING = [path for path in PRODUCT if path.parent.name != "kernels"]


def messages(path: Path) -> Iterator[str]:
    """The string constants of a file that are no docstrings, an f-string as one."""
    tree = ast.parse(path.read_text())
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in ast.walk(node) if part is not node}
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else UNKNOWN
                for part in node.values
            )
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside | documents
        ):
            yield node.value


def is_taken(name: str, path: Path | None = None) -> bool:
    pattern = re.compile(r"[\w\-.]+".join(map(re.escape, name.split(UNKNOWN))))
    own = READ_BY_HAND.get(path.name, set()) if path else set()
    if path and (path.parent.name == "translation" or path.name == "lora_distill.py"):
        own = own | OF_OTHERS | OF_SCRIPTS
    if path and path.parent.name == "flags":
        own = (
            own
            | OF_SCRIPTS
            | OF_OTHERS
            | {flag.replace("stages.0.", "stages.1.") for flag in CONFIG}
        )
    return (
        name.strip(".-" + UNKNOWN) == ""
        or name in own
        or any(pattern.fullmatch(flag) or flag.startswith(f"{name}.") for flag in TAKEN)
    )


@pytest.mark.parametrize("path", SPEAKING, ids=lambda p: str(p.relative_to(ROOT)))
def test_flags_and_values_in_messages_exist(path: Path) -> None:
    for message in messages(path):
        for name, value in FLAG.findall(PIP.sub("", message)):
            assert is_taken(name.rstrip("."), path), (name, message)
            allowed = choices(CONFIG.get(name))
            if allowed and value and value not in ORDINARY:
                assert value in allowed, (name, value, message)
            assert CONFIG.get(name) is not bool or value not in ("true", "false"), (
                message
            )  # such a flag takes no value


def test_the_search_finds_what_it_is_for() -> None:
    assert (
        "data.masks" in CONFIG
        and "stages.0.mask-temperature" in TAKEN
        and "grid" in TAKEN
        and len(TAKEN) > 100
    )
    assert choices(CONFIG["data.masks"]) == ("none", "file", "alpha", "auto", "any")
    assert (
        not is_taken("data.mask")
        and is_taken(f"stages.{UNKNOWN}.lr")
        and not is_taken(f"stage.{UNKNOWN}.lr")
    )
