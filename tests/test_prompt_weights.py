"""A1111's grammar of weights in prompts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.errors import UserError
from lora_core.prompt_weights import check_prompt_weights, parse_prompt_weights


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [  # the examples in A1111's own docstring
        ("normal text", [["normal text", 1.0]]),
        ("an (important) word", [["an ", 1.0], ["important", 1.1], [" word", 1.0]]),
        ("(unbalanced", [["unbalanced", 1.1]]),
        (r"\(literal\]", [["(literal]", 1.0]]),
        ("(unnecessary)(parens)", [["unnecessaryparens", 1.1]]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ["a ", 1.0],
                ["house", 1.5730000000000004],
                [" ", 1.1],
                ["on", 1.0],
                [" a ", 1.1],
                ["hill", 0.55],
                [", sun, ", 1.1],
                ["sky", 1.4641000000000006],
                [".", 1.1],
            ],
        ),
        # and what its parser gives for these
        ("", [["", 1.0]]),
        ("a: b", [["a: b", 1.0]]),
        ("[a", [["a", 1 / 1.1]]),
        ("a) b:1.2)", [["a) b:1.2)", 1.0]]),
        ("(a]b)", [["a]b", 1.1]]),
        ("(a [b) c]", [["a ", 1.1], ["b", 1.1 * (1 / 1.1)], [" c", 1 / 1.1]]),
        (r"a\b \\ \[c\)", [["ab \\ [c)", 1.0]]),
        ("(a: 1.4 )", [["a", 1.4]]),
        ("(a:-1)", [["a", -1.0]]),
        ("(a:b:2)", [["a:b", 2.0]]),
    ],
)
def test_prompts_are_read_as_by_a1111(prompt: str, expected: list[list[object]]) -> None:
    assert [list(segment) for segment in parse_prompt_weights(prompt)] == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", "(b)", "[c]", "((d:2) e)"])), st.floats(0.1, 3))
def test_a_weight_around_a_prompt_multiplies_those_inside(parts: list[str], weight: float) -> None:
    weight = round(weight, 2)
    inside = parse_prompt_weights(f"x {' '.join(parts)}")
    outside = parse_prompt_weights(f"(x {' '.join(parts)}:{weight})")
    assert "".join(s.text for s in outside) == "".join(s.text for s in inside)
    assert [s.text for s in outside] == [s.text for s in inside]
    for own, wrapped in zip(inside, outside):
        assert wrapped.weight == pytest.approx(own.weight * weight)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a [cat:dog:0.5]", "changes the prompt during sampling"),
        ("a [cat:3]", "changes the prompt during sampling"),
        ("a [cat|dog]", "alternates between prompts"),
        ("a cat AND a dog", "joins prompts"),
        ("a cat BREAK a dog", "begins a chunk"),
        ("(a:1.2.3)", "has the weight '1.2.3'"),
        ("(a:.)", "has the weight '.'"),
    ],
)
def test_what_has_no_counterpart_is_refused(prompt: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_prompt_weights(prompt)


def test_weights_that_are_text_are_mentioned_and_emphasis_without_any_is_refused() -> None:
    assert check_prompt_weights(["a cat", "a (red:1.2) cat"], "none").startswith(
        "(red:1.2) is read"
    )
    for plain in ("a cat", "a cat (sitting)", "a: b", r"\(a:1.2)"):
        assert check_prompt_weights([plain], "none") == ""
    with pytest.raises(UserError, match="no prompt has a weight"):
        check_prompt_weights(["a cat", r"\(a\)"], "a1111")
    assert check_prompt_weights(["a cat", "[a]"], "a1111") == ""
