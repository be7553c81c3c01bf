"""Flags of other tools: what is answered, that the answers are words that we read, and that
docs/flags.md has the same flags.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

import infer
import merge
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.flags.command_line import parse_command_line, top_flags
from lora_core.flags.flag_values import DIFFUSERS, KOHYA, PTI, OtherFlag
from lora_core.flags.other_flags import explain_flag, refuse_other_flags, split_flags
from lora_core.flags.program_flags import DRAW_FLAGS, MERGE_FLAGS
from lora_core.flags.trainer_flags import TRAIN_FLAGS
from lora_core.stage_settings import GROUPS
from merging.commands import COMMANDS, flatten
from merging.commands import Mix as MixOptions

PAGE = (Path(__file__).parent.parent / "docs/flags.md").read_text(encoding="utf-8")
TRAINERS, WITHOUT, DRAWERS, MERGERS = re.split(r"\n## .+\n", PAGE)
COLUMNS = {DIFFUSERS: 2, PTI: 3, KOHYA: 4}
EXAMPLES = ("16", "150", "0.5", "cosine", "lanczos", "object", "bf16", "euler", "fp16", "mode",
            "sigmoid", "tensorboard", "a=1", "a.safetensors", "public")  # fmt: skip
# Words of ours that stand for what only the user knows.
PLACEHOLDERS = {"my_schedule.py:fn": "my_schedule.py:fn", "SHARE": "0.1", "PATH": "a"}


def answer(words: str, table: Sequence[OtherFlag] = TRAIN_FLAGS, cls: type = Config) -> str:
    with pytest.raises(UserError) as caught:
        refuse_other_flags(shlex.split(words), table, top_flags(cls))
    return str(caught.value)


# ---------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--network_dim 16", "--network_dim is kohya's name; here it is --adapter.rank 16"),
        ("--network-dim=16", "--network-dim is kohya's name; here it is --adapter.rank 16"),
        ("--rank", "--rank is diffusers' name; here it is --adapter.rank VALUE"),
        ("--max_timestep 800", "here it is --noise.high 0.8 (a fraction of 1)"),
        ("--resolution 512,512", "here it is --data.resolution 512 (one number"),
        ("--resolution 768,512", "here it is --data.resolution VALUE (one number"),
        ("--logit_mean -0.5", "here it is --noise.density-args mean=0.5 (the sign"),
        ("--mixed_precision no", "here it is --precision fp32"),
        ("--lr_scheduler cosine_with_restarts", "--optimizer.schedule cosine_restarts"),
        ("--sample_sampler euler_a", "--samples.sampler euler_ancestral"),
        ("--sample_sampler heun", "--samples.sampler VALUE"),
        ('--placeholder_tokens "<s1>|<s2>"', "--tokens.words WORD --tokens.vectors 2"),
        ("--lora_layers attn.to_k,attn.to_q", "--adapter.targets attn.to_k attn.to_q"),
        (
            "--optimizer_args weight_decay=0.1 eps=1e-6",
            "--optimizer.args weight_decay=0.1 eps=1e-6",
        ),
        ("--instance_prompt 'a b'", "--data.caption 'a b'"),
        ("--use_dora=False", "leave it out for False, or write --adapter.kind dora for True"),
        ("--xformers", "--xformers is kohya's name; attention always uses torch's SDPA"),
        (
            "--steps 10",
            "--stages.0.steps 10 (of the first stage; each stage has its own, --stages.1",
        ),
        (
            "--max_train_steps=100",
            "here it is --stages.0.steps 100 (of the first stage; each stage",
        ),
        ("--seed 3 --lr 1e-4", "--lr is other tools' name; here it is --optimizer.lr 1e-4"),
    ],
)
def test_a_flag_is_answered_in_a_sentence(words: str, said: str) -> None:
    assert said in answer(words) and "\n" not in answer(words)


def test_every_flag_of_a_command_line_has_its_line() -> None:
    lines = answer("config.toml --network_dim 8 --seed 1 --unet_lr 1e-4 --network_dim 8").split(
        "\n"
    )
    assert [line.split()[0] for line in lines] == ["--network_dim", "--unet_lr"]


def test_our_own_flags_are_no_one_elses() -> None:
    own = "--gradient_checkpointing all --seed 1 --device cpu --push-to-hub a/b --clip_skip 1"
    refuse_other_flags(own.split(), TRAIN_FLAGS, top_flags(Config))
    refuse_other_flags(["--from", "a.png", "--steps", "3"], DRAW_FLAGS, top_flags(infer.Infer))
    refuse_other_flags(["--model", "m"], MERGE_FLAGS, set(flatten(MixOptions())))


def test_a_strangers_word_cannot_end_the_sentence() -> None:
    assert "\\n" in answer("--network_dim '1\nerror: gone'")


def test_values_stand_behind_an_equals_sign_or_in_the_next_words() -> None:
    words = ["c.toml", "--a=1", "--b", "-2", "x", "--c", "-d", "5"]
    assert list(split_flags(words)) == [
        ("--a", ("1",)), ("--b", ("-2", "x")), ("--c", ()), ("-d", ("5",))
    ]  # fmt: skip


# ---------------------------------------------------------------- laws of the tables


def test_seventy_flags_and_more_are_known() -> None:
    names = " ".join(row.names for row in TRAIN_FLAGS).split()
    assert len(set(names)) > 150 and len(names) == len(set(names))


def readable(words: str, cls: type) -> bool:
    """Whether our parser takes the words, among them placeholders of the answers."""
    for name, value in PLACEHOLDERS.items():
        words = words.replace(name, value)
    try:
        parse_command_line(cls, shlex.split(words), prog="train.py", example="")
    except UserError:
        return False
    return True


def said_here(row: OtherFlag) -> list[str]:
    """Our words in the answers to a flag with each of the example values."""
    name = row.names.split()[0]
    answers = [explain_flag(f"--{name}", [value], row) for value in EXAMPLES]
    words = [said.partition("here it is ")[2] for said in answers]
    plain = [text.removesuffix(f" ({row.remark})") for text in words]
    return [text for text in plain if text and "VALUE" not in text]


@pytest.mark.parametrize("row", [row for row in TRAIN_FLAGS if row.here], ids=lambda r: r.names)
def test_answers_are_words_that_train_reads(row: OtherFlag) -> None:
    assert any(readable(words, Config) for words in said_here(row)), said_here(row)


@pytest.mark.parametrize("row", [row for row in DRAW_FLAGS if row.here], ids=lambda r: r.names)
def test_answers_are_words_that_infer_reads(row: OtherFlag) -> None:
    assert any(readable(words, infer.Infer) for words in said_here(row)), said_here(row)


@pytest.mark.parametrize("row", [row for row in MERGE_FLAGS if row.here], ids=lambda r: r.names)
def test_answers_are_words_that_merge_reads(row: OtherFlag) -> None:
    (words, *_) = said_here(row)
    command, *rest = shlex.split(words if words.split()[0] in COMMANDS else f"resize f {words}")
    flags = {word.removeprefix("--") for word in rest if word.startswith("--")}
    assert flags <= set(flatten(COMMANDS[command].options()))
    if "out" in flags and command != "resize":
        assert merge.parse_options(command, rest, "merge.py")


# ---------------------------------------------------------------- docs/flags.md


def page_options(cell: str) -> set[str]:
    """The options that a cell of the page names, as the command line has them."""
    names = re.findall(r"`(?:--)?([\w.-]+)[^`]*`", cell)
    return {name.replace("stages.I", "stages.0").replace("-", "_") for name in names}


def row_options(row: OtherFlag) -> set[str]:
    """The options in our answer to a flag, in its value or in its remark."""
    readings = " ".join(said_here(row))
    found = re.findall(r"--([a-z][\w.-]*)", f"{row.here} {row.remark} {readings}")
    found = [name.rstrip(".").replace(".no-", ".") for name in found]  # a switch that is turned off
    names = {name.replace("stages.1", "stages.0").replace("-", "_") for name in found}
    groups = re.findall(r"denoiser|text_encoder|tokens", row.here) or GROUPS
    return names | {f"optimizer.lr.{group}" for group in groups if ".lr" in row.here}


def other_names(cell: str) -> set[str]:
    return set(re.findall(r"`--(\w+)", cell))


ROWS = [line.split("|") for line in TRAINERS.splitlines() if line.startswith(("| `", "| the"))]


def by_name(table: Sequence[OtherFlag]) -> dict[str, OtherFlag]:
    rows: dict[str, OtherFlag] = {}
    for row in table:
        rows |= dict.fromkeys(row.names.split(), row)
    return rows


@pytest.mark.parametrize("tool", COLUMNS)
def test_the_page_and_the_table_have_the_same_flags_of_a_trainer(tool: str) -> None:
    ours = {name for name, row in by_name(TRAIN_FLAGS).items() if tool in row.tools}
    own = top_flags(Config)
    on_page = set()
    for cells in ROWS:
        on_page |= other_names(cells[COLUMNS[tool]])
    assert on_page - own <= ours, "on the page, and not in TRAIN_FLAGS"
    beside = set(re.findall(r"`(\w+)`", " ".join(cells[COLUMNS[tool]] for cells in ROWS)))
    assert ours - on_page - beside - other_names(WITHOUT) == set(), "not on the page"


def test_the_page_and_the_table_give_the_same_option() -> None:
    table = by_name(TRAIN_FLAGS)
    offenders = []
    for cells in ROWS:
        if not page_options(cells[1]):  # three rates at once
            continue
        for tool, column in COLUMNS.items():
            for name in other_names(cells[column]) & table.keys():
                row = table[name]
                if tool not in row.tools or row_options(row) & page_options(cells[1]):
                    continue
                if not any(
                    row_options(row) & page_options(other[1])
                    for other in ROWS
                    if name in other_names(other[column])
                ):
                    offenders.append(f"--{name}: {row.here or row.remark}, page: {cells[1]}")
    assert not offenders


def test_a_flag_without_a_counterpart_has_none_in_the_table() -> None:
    table = by_name(TRAIN_FLAGS)
    names = other_names(WITHOUT)
    assert not {name for name in names if name not in table}
    assert not {name for name in names if table[name].here}


@pytest.mark.parametrize(
    ("page", "table"), [(DRAWERS, DRAW_FLAGS), (MERGERS, MERGE_FLAGS)], ids=["infer", "merge"]
)
def test_the_page_has_the_flags_of_programs(page: str, table: tuple[OtherFlag, ...]) -> None:
    rows = by_name(table)
    on_page = {}
    for line in page.splitlines():
        if line.startswith("| `") or line.startswith("| none"):
            _, ours, others, _ = line.split("|")
            on_page |= dict.fromkeys(other_names(others), ours)
    assert on_page.keys() == rows.keys()
    for name, row in rows.items():
        words = set(re.findall(r"[a-z][\w-]+", f"{row.here} {row.remark}"))
        if row.here:
            assert words & set(re.findall(r"[\w-]+", on_page[name].replace("--", ""))), name
