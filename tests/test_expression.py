"""A sum of files: read and written, and the place of what cannot be read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.errors import UserError
from merging.expression import WeightedFile, parse_sum, render_sum


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
