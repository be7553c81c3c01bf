"""The output by place and as --out, and the quotes that a shell or a sum needs."""

import pytest

import merge
from merging.arguments import is_flag, join_words
from merging.commands import COMMANDS
from tests.merge_commands import call, snapshot

LINES = {  # command -> its words before the output, and flags
    "mix": (["0.5*a.safetensors"], ["--rank", "1"]),
    "fold": (["base", "0.5*a.safetensors"], []),
    "fuse": (["run", "c.safetensors"], ["--base", "base", "--how", "sum"]),
    "add": (["a.safetensors", "a.safetensors"], ["--mode", "ljl"]),
    "distill": (["base", "base"], ["--rank", "1"]),
    "resize": (["a.safetensors"], ["--rank", "1"]),
    "convert": (["a.safetensors"], ["--to", "kohya"]),
    "redo": (["a.safetensors"], []),
}


def read_options(monkeypatch, *words, lora_add=False):
    """The options that a command line is read as."""
    seen = []
    monkeypatch.setattr(merge, "run_merge_command", lambda name, options: seen.append(options))
    call(*words, lora_add=lora_add)
    return seen[0]


def test_the_lines_are_of_every_command_with_an_output():
    assert set(LINES) == {name for name, own in COMMANDS.items() if hasattr(own.options(), "out")}


@pytest.mark.parametrize("name", [name for name in LINES if name != "add"])
def test_the_output_is_a_flag_and_the_last_word(name, monkeypatch):
    words, flags = LINES[name]
    by_flag = read_options(monkeypatch, name, *words, "--out", "o.safetensors", *flags)
    assert by_flag.out == "o.safetensors"
    for line in (
        [*words, "o.safetensors", *flags],
        [*flags, *words, "o.safetensors"],
        ["--out=o.safetensors", *words, *flags],
        [words[0], *flags, *words[1:], "--out", "o.safetensors"],
    ):
        assert read_options(monkeypatch, name, *line) == by_flag


@pytest.mark.parametrize("name", ["mix", "resize", "convert"])
def test_both_ways_write_the_same_file(here, name):
    words, flags = LINES[name]
    call(name, *words, "--out", "flag/o.safetensors", *flags, "--model", "base")
    call(name, *words, "place/o.safetensors", *flags, "--model", "base")
    first, second = (here / place / "o.safetensors" for place in ("flag", "place"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ("x", "y", "o", "0.2", "0.3"),
        ("x", "y", "0.2", "0.3", "--out", "o"),
        ("x", "y", "--output-path=o", "0.2", "--alpha-2", "0.3"),
        ("x", "y", "--output_path", "o", "--alpha", "0.2", "--alpha_2=0.3"),
    ],
)
def test_lora_add_has_the_order_of_the_seed_and_the_flag(words, monkeypatch, states, here):
    alike = "x", "y", "o", "0.2", "0.3"
    joined = "merging.add.LoraAddition"
    seen = []

    def record(*job):
        seen.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(joined, record)
    for line in (words, alike):
        call(*line, lora_add=True, status=130)
    assert seen[0] == seen[1] == ("x", "y", 0.2, 0.3, "lpl", False, "")


@pytest.mark.parametrize("name", LINES)
def test_an_output_that_is_given_twice_is_one_sentence(here, name, capsys):
    words, flags = LINES[name]
    before = snapshot(here)
    call(name, *words, "o.safetensors", "--out", "p.safetensors", *flags, status=2)
    said = capsys.readouterr().err.splitlines()
    twice = "the output is given twice, as o.safetensors and as --out p.safetensors; give one"
    assert len(said) == 1 and twice in said[0]
    assert snapshot(here) == before


@pytest.mark.parametrize("name", [name for name in LINES if name not in ("add", "redo")])
def test_no_output_names_the_flag(name, capsys):
    call(name, *LINES[name][0], status=2)
    assert "--out is required; see merge.py" in capsys.readouterr().err


def test_a_minus_is_not_a_flag(here, monkeypatch):
    for word in ("-0.5*a.safetensors", "-a.safetensors + 2*b.safetensors", "-2(a.safetensors)"):
        assert read_options(monkeypatch, "mix", word, "--out", "o").sum == word
    assert read_options(monkeypatch, "convert", "-a.safetensors", "--out", "-o.pt").out == "-o.pt"
    options = read_options(monkeypatch, "x", "y", "o", "-0.5", "--alpha-2", "-1", lora_add=True)
    assert options.words[3] == "-0.5" and options.alpha_2 == "-1"


def test_flags_are_told_from_names():
    assert all(map(is_flag, ("--out", "-h", "-out", "--rank=4", "--output-path=a.safetensors")))
    assert not any(map(is_flag, ("-", "a", "-0.5", "-1*a", "-a.safetensors", "- b", "-(a)", "")))
    assert join_words(["a", "b", "c"]) == "a, b and c" and join_words(["a"]) == "a"


@pytest.mark.parametrize("flag", ["-o", "-O", "--output"])
@pytest.mark.parametrize("name", LINES)
def test_other_names_of_the_output_lead_to_the_right_one(name, flag, capsys):
    words, flags = LINES[name]
    call(name, *words, flag, "o.safetensors", *flags, status=2)
    assert "; the nearest flag is --out;" in capsys.readouterr().err
    assert merge.main(["mix", "a.safetensors", "--lora", "b.safetensors"]) == 2
    assert "nearest" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("add", "a", "b", "--out"), "argument --out: no value"),
        (("add", "a", "b", "o", "--alpha"), "argument --alpha-1: no value"),
        (("mix", "a", "--out"), "argument --out: no value"),
        (("info", "a", "--top", "-1"), "argument --top: invalid number: '-1', expected 1 or more"),
        (("info", "a", "--top", "0"), "argument --top: invalid number: '0', expected 1 or more"),
        (("diff", "a", "b", "--top", "x"), "argument --top: invalid number: 'x', expected 1"),
        (("resize", "a", "o", "--budget", "0"), "--budget 0 is not a number of ranks or a size"),
        (("mix", "a", "o", "--budget", "0.0MB"), "--budget 0.0MB is not a number of ranks"),
    ],
)
def test_a_value_that_means_nothing_is_said_with_its_flag(words, said, capsys):
    call(*words, status=2)
    assert said in capsys.readouterr().err


def test_the_only_choice_of_a_flag_is_named_alone(capsys):
    call("convert", "a", "o", "--as", "dora", status=2)
    assert "invalid choice: 'dora' (choose from lora);" in capsys.readouterr().err
