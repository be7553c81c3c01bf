"""The parser's boxes as sentences."""

import pytest

import train
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.flags.command_line import parse_command_line
from lora_core.flags.parser_errors import read_parser_error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--optimzer.lr", "1"],
            "unrecognized arguments: --optimzer.lr 1; the nearest flag is --optimizer.lr",
        ),
        (["--rank", "4"], "unrecognized arguments: --rank 4; the nearest flag is --adapter.rank"),
        (["--zzz", "1"], "unrecognized arguments: --zzz 1; see"),
        (["--batch"], "unrecognized arguments: --batch; the nearest flag is --batch-size"),
        (["stray"], "unrecognized arguments: stray"),
        (["--adapter.rank", "x"], "argument --adapter.rank: 'x' is no whole number"),
        (["--noise.low", "x"], "argument --noise.low: 'x' is no number"),
        (["--adapter.rank"], "argument --adapter.rank: no value"),
        (
            ["--precision", "fp8"],
            "argument --precision: invalid choice: 'fp8' (choose from fp32, bf16, fp16, fp64)",
        ),
        (
            ["--noise.density", "foo"],
            "argument --noise.density: unknown density 'foo'; choose uniform",
        ),
        (["--loss-arg", "5"], "argument --loss-arg: expected KEY=VALUE, got 5"),
    ],
)
def test_a_wrong_flag_is_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_command_line(Config, ["--seed", "1", *words], prog="train.py", example="")
    sentence = str(caught.value)
    assert sentence.startswith(said) and sentence.endswith("; see train.py --help")
    assert "\n" not in sentence and "│" not in sentence


def test_the_status_is_2_and_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--seed", "x"]) == 2
    out, err = capsys.readouterr()
    assert (
        err == "error: argument --seed: 'x' is no whole number; see train.py --help\n" and not out
    )


def test_colors_are_no_part_of_the_sentence() -> None:
    box = "╭─ \x1b[1mError\x1b[0m ─╮\n│ \x1b[31mMissing value for argument '--a.b'.\x1b[0m │\n╰──╯"
    assert read_parser_error(box) == "argument --a.b: no value"
