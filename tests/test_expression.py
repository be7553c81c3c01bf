"""A sum of files: read and written, the place of a mistake, and names that need quotes."""

import shlex
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.errors import UserError
from merging.expression import WeightedFile, parse_sum, render_sum
from tests.merge_commands import call, snapshot


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a.safetensors", [WeightedFile(1.0, "a.safetensors")]),
        ("-a", [WeightedFile(-1.0, "a")]),
        (
            "0.7*a + 0.3*b@attn - 0.2*c",
            [WeightedFile(0.7, "a"), WeightedFile(0.3, "b", ("attn",)), WeightedFile(-0.2, "c")],
        ),
        (
            "0.5*(a - 2*(c - d)@unet)@attn",
            [
                WeightedFile(0.5, "a", ("attn",)),
                WeightedFile(-1, "c", ("unet", "attn")),
                WeightedFile(1, "d", ("unet", "attn")),
            ],
        ),
        (
            "my-lora.safetensors - x/other-1.safetensors",
            [WeightedFile(1.0, "my-lora.safetensors"), WeightedFile(-1.0, "x/other-1.safetensors")],
        ),
        (
            "'my (c) + d.st'@[1, 0, 0.5] + 1e-3*\"it's\"",
            [WeightedFile(1.0, "my (c) + d.st", ("[1, 0, 0.5]",)), WeightedFile(0.001, "it's")],
        ),
        (
            "a@unet.*.attn?.to_q,conv=0.5 - 2(b)",
            [WeightedFile(1.0, "a", ("unet.*.attn?.to_q,conv=0.5",)), WeightedFile(-2.0, "b")],
        ),
        (
            "a@b-lora-content+0.5*b",
            [WeightedFile(1.0, "a", ("b-lora-content",)), WeightedFile(0.5, "b")],
        ),
        ("0.5*a + 2*(b + 0.25*a)", [WeightedFile(1.0, "a"), WeightedFile(2.0, "b")]),
        (
            "2*.5*00.safetensors + +3*0.7a",
            [WeightedFile(1.0, "00.safetensors"), WeightedFile(3.0, "0.7a")],
        ),
        (
            "runwayml/sd-v1-5 + -0.5*C:\\loras\\x.pt",
            [WeightedFile(1.0, "runwayml/sd-v1-5"), WeightedFile(-0.5, "C:\\loras\\x.pt")],
        ),
        ("a.safetensors+0.3*b", [WeightedFile(1.0, "a.safetensors"), WeightedFile(0.3, "b")]),
    ],
)
def test_sums_are_read_and_written(text, entries):
    assert parse_sum(text) == entries
    assert parse_sum(render_sum(entries)) == entries


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            WeightedFile,
            st.floats(-1e6, 1e6).filter(bool),
            st.text("ab-+. ()@*'é0", min_size=1, max_size=6),
            st.lists(st.sampled_from(["attn", "[1, 0]", "IN04,MID=0.5", "unet.*"]), max_size=2).map(
                tuple
            ),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda e: (e.path, e.choices),
    )
)
def test_what_is_written_is_read_the_same(entries):
    assert parse_sum(render_sum(entries)) == entries


@pytest.mark.parametrize(
    ("text", "sentence", "place"),
    [
        ("", "it ends too early", 0),
        ("a + ", "it ends too early", 4),
        ("a b", "expected \\+ or -", 2),
        ("a + 1e400*b", "the weight 1e400 is larger", 4),
        ("0.5", "expected \\* and a file", 3),
        ("0.5 + a", "expected \\* and a file", 3),
        ("(a", "not closed", 0),
        ("a + (b", "not closed", 4),
        ("a)", "never opened", 1),
        ("'a", "quote is not closed", 0),
        ("''", "quotes are empty", 0),
        ("0.3**a", "expected a file", 4),
        ("a@ attn", "layers right after", 2),
        ("(a b)", "expected \\+ , - or \\)", 3),
    ],
)
def test_mistakes_are_pointed_at(text, sentence, place):
    with pytest.raises(UserError, match=sentence) as info:
        parse_sum(text)
    assert str(info.value).splitlines()[1:] == [f"  {text}", f"  {' ' * place}^"]


def test_weights_that_cancel_are_refused():
    with pytest.raises(UserError, match="nothing is left"):
        parse_sum("a - 0.5*(a + a)")


# ---------------------------------------------------------------- tags of prompts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("a.safetensors", "b.safetensors", "my c.safetensors", "sub/d-1.pt"):
        (tmp_path / name).touch()


A, B = WeightedFile(0.7, "a.safetensors"), WeightedFile(0.3, "b.safetensors")
OUTD = "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0"


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("<lora:a:0.7> + <lora:b:0.3>", [A, B]),
        ("<lora:a:0.7> <lora:b:0.3>", [A, B]),
        ("<lora:a:0.7><lora:b:0.3>", [A, B]),
        (" <lora:a:0.7>, <lora:b:0.3> ", [A, B]),
        ("<lora:a:0.7> + 0.3*b.safetensors", [A, B]),
        ("0.7*a.safetensors <lora:b:0.3>", [A, B]),
        ("2*(<lora:a:0.35> <lora:b:0.15>)", [A, B]),
        ("<lora:a:0.9> - <lyco:a:0.2> - <lora:b:-0.3>", [WeightedFile(0.7, A.path), B]),
        ("<lora:a:0.7>@attn", [WeightedFile(0.7, A.path, ("attn",))]),
        (f"<lora:a:0.7:lbw={OUTD}>", [WeightedFile(0.7, A.path, (OUTD,))]),
        ("<lora:a:0.7:OUTD>", [WeightedFile(0.7, A.path, ("OUTD",))]),
        ("<lora:a:0.5:0.7>", [WeightedFile(1.0, A.path, ("te=0.5:unet=0.7",))]),
        (
            "<lora:a:te=0.5:unet=0:lbw=MIDD>",
            [WeightedFile(1.0, A.path, ("te=0.5:unet=0.0", "MIDD"))],
        ),
        (
            "<lora:my c> <lora:sub/d-1:2>",
            [WeightedFile(1.0, "my c.safetensors"), WeightedFile(2.0, "sub/d-1.pt")],
        ),
    ],
)
def test_tags_of_prompts_are_weighted_files(folder, text, entries):
    found = parse_sum(text)
    assert [(f.path, f.choices) for f in found] == [(f.path, f.choices) for f in entries]
    assert [f.weight for f in found] == pytest.approx([f.weight for f in entries])
    assert parse_sum(render_sum(found)) == found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<lora:e:0.7>", "neither e nor e.safetensors"),
        ("<lora:a:0.7", "expected a tag such as"),
        ("<lora:a:0.7> b", "expected [+] or -"),
        ("<lora:a:0.7>,", "expected [+] or -"),
        ("<hypernet:a:0.7>", "expected a tag such as"),
        ("<lora:a:stop=3>", "means nothing here"),
        ("<lora:a:0>", "every weight in it is 0"),
    ],
)
def test_tags_that_mean_no_file_are_refused(folder, text, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_sum(text)


# ---------------------------------------------------------------- quotes


ODD_NAMES = [
    "my style.safetensors",
    "style (1).safetensors",
    "a - b.safetensors",
    "night+1.safetensors",
    "3*red.safetensors",
    "cat@home.safetensors",
    "2 dogs.safetensors",
    "it's me.safetensors",
    "-dash.safetensors",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_without_its_quotes_in_a_sum_gets_them_as_advice(here, name, capsys):
    shutil.copy("a.safetensors", name)
    before = snapshot(here)
    for line in (f"0.7*{name} + 0.3*b.safetensors", name, f"b.safetensors + {name}@attn"):
        call("mix", line, "--out", "o.safetensors", "--model", "base", status=2)
        first = capsys.readouterr().err.splitlines()[0]
        assert f"if {name} is one name, write it in quotes" in first
        (advice,) = shlex.split(first.partition("in quotes: ")[2])
    assert snapshot(here) == before
    call("mix", advice, "--out", "o.safetensors", "--model", "base")
    assert (here / "o.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if " " in name])
@pytest.mark.parametrize(
    "line", ["mix 0.7*{}", "mix 0.7*{} --out o.safetensors", "convert {}", "info {}",
             "convert {} --out o.safetensors", "resize {} o.safetensors --rank 1",
             "fold base 0.5*{} out", "add {} a.safetensors o.safetensors", "redo {}",
             "diff {} a.safetensors", "explain base base {}"],
)  # fmt: skip
def test_a_name_that_a_shell_has_split_is_said(here, name, line, capsys):
    shutil.copy("a.safetensors", name)
    before = snapshot(here)
    call(*line.format(name).split(" "), status=2)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"split the name {name} at its spaces" in said[0]
    assert snapshot(here) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a.safetensors", "+", "b.safetensors"], '"a.safetensors + b.safetensors"'),
        (["a.safetensors", "-", "b.safetensors"], '"a.safetensors - b.safetensors"'),
        (["a.safetensors", "-b.safetensors"], '"a.safetensors -b.safetensors"'),
        # *.safetensors without quotes, and 0.7 * a.safetensors
        (
            ["a.safetensors", "b.safetensors", "c.safetensors"],
            '"a.safetensors + b.safetensors + c.safetensors"',
        ),
        (["0.7", "a.safetensors", "b.safetensors", "a.safetensors"], "double quotes"),
        # a shell of Windows, for which ' is no quote
        (["'0.7*a.safetensors", "+", "b.safetensors'"], "double quotes"),
        (["a.safetensors", "b.safetensors"], "double quotes"),
    ],
)
def test_a_sum_that_a_shell_has_split_gets_its_quotes_as_advice(here, words, sentence, capsys):
    before = snapshot(here)
    for out in ([], ["--out", "o.safetensors"]):
        call("mix", *words, *out, status=2)
        said = capsys.readouterr().err
        assert sentence in said and "double quotes" in said and len(said.splitlines()) == 1
    assert snapshot(here) == before


def test_a_path_that_needs_no_quotes_gets_no_advice(here, capsys):
    for line in ("a.safetensors + nowhere.safetensors", "'my style.safetensors'", "a.st b.st"):
        shutil.copy("a.safetensors", "my other style.safetensors")
        call("mix", line, "--out", "o.safetensors", "--model", "base", status=2)
        assert "is one name" not in capsys.readouterr().err
