"""placeholders: whole words in any script, the longest first, replaced once by their tokens."""

import pytest

from lora_core.errors import UserError
from lora_core.placeholders import (
    Placeholder,
    bind_placeholders,
    has_placeholder,
    make_placeholders,
)


def test_names_are_numbered_through_all_abstractions():
    first, second = make_placeholders({"TOK": "dog", "TOK2": "zero"}, vectors=3)
    assert (first.names, second.names) == (("<s0>", "<s1>", "<s2>"), ("<s3>", "<s4>", "<s5>"))
    assert (first.init, second.init) == ("dog", "zero")
    assert (
        make_placeholders(["TOK"], vectors=1)
        == make_placeholders("TOK", vectors=1)
        == (Placeholder("TOK", ("<s0>",), "random"),)
    )


def test_tokens_have_the_names_that_are_given():
    first, second = make_placeholders(["TOK", "<b>"], vectors=[2, 1], names=["<s1>", "<s2>", "<b>"])
    assert (first.names, second.names) == (("<s1>", "<s2>"), ("<b>",))
    (whole,) = make_placeholders(["<s1><s2>"], names=["<s1>", "<s2>"])
    assert bind_placeholders("in the style of <s1><s2>", [whole]) == "in the style of <s1><s2>"
    with pytest.raises(UserError, match=r"got 1 names for 2 learned tokens: <s1>; name each"):
        make_placeholders(["TOK"], names=["<s1>"])


@pytest.mark.parametrize("order", [("TOK", "TOK2"), ("TOK2", "TOK")])
def test_bind_takes_the_longest_word_whatever_the_order(order):
    bound = bind_placeholders(
        "TOK2 beside TOK, TOK's and TOKEN", make_placeholders(order, vectors=2)
    )
    tok, tok2 = ("<s0><s1>", "<s2><s3>") if order[0] == "TOK" else ("<s2><s3>", "<s0><s1>")
    assert bound == f"{tok2} beside {tok}, {tok}'s and TOKEN"


def test_bind_never_corrupts_an_undeclared_longer_word_and_replaces_once():
    assert bind_placeholders("TOK2 TOK", make_placeholders(["TOK"], vectors=1)) == "TOK2 <s0>"
    chain = (Placeholder("A", ("B",)), Placeholder("B", ("<x>",)))
    assert bind_placeholders("A B", chain) == "B <x>"
    assert (
        bind_placeholders("一张TOK的照片", make_placeholders(["TOK"], vectors=1))
        == "一张<s0>的照片"
    )
    assert bind_placeholders("a <*> b", make_placeholders(["<*>"], vectors=1)) == "a <s0> b"
    assert (
        bind_placeholders("a TOK cat", make_placeholders(["TOK", "TOK cat"], vectors=1)) == "a <s1>"
    )  # longest, though both are whole words
    assert bind_placeholders("anything", ()) == "anything"


@pytest.mark.parametrize(
    "caption, word, bound",
    [
        ("René, Ren and Renée", "Ren", "René, <s0> and Renée"),
        ("Rene\u0301 and Rene", "Rene", "René and <s0>"),
        ("Rene\u0301s and Rene\u0301", "René", "Renés and <s0>"),
        ("un Rene\u0301", "Rene\u0301", "un <s0>"),
        ("x\u030cTOK and TOK\u20dd", "TOK", "x\u030cTOK and TOK\u20dd"),
        ("ÅTOK, TOKß, TOK٣ и ТTOK", "TOK", "ÅTOK, TOKß, TOK٣ и ТTOK"),
        ("кот и котик", "кот", "<s0> и котик"),
        ("一张TOK的照片", "TOK", "一张<s0>的照片"),
        ("これはTOKです、TOK은 ไทยTOKไทย", "TOK", "これは<s0>です、<s0>은 ไทย<s0>ไทย"),
        ("我的猫咪", "猫", "我的<s0>咪"),
        ("TOK’s “TOK”—TOK\x0bTOK", "TOK", "<s0>’s “<s0>”—<s0>\x0b<s0>"),
    ],
)
def test_words_are_whole_in_any_script(caption, word, bound):
    assert bind_placeholders(caption, make_placeholders([word], vectors=1)) == bound
    assert has_placeholder(caption, word) == ("<s0>" in bound)


def test_a_word_given_in_two_normal_forms_is_one_word():
    with pytest.raises(UserError, match="different placeholder words"):
        make_placeholders(["Rene\u0301", "René"])


def test_each_word_may_have_its_own_number_of_vectors():
    made = make_placeholders({"TOK": "dog", "B": "red cat", "C": "zero"}, vectors=[1, 3, 2])
    assert [a.names for a in made] == [("<s0>",), ("<s1>", "<s2>", "<s3>"), ("<s4>", "<s5>")]
    assert bind_placeholders("TOK B C", made) == "<s0> <s1><s2><s3> <s4><s5>"


@pytest.mark.parametrize(
    "words, vectors",
    [
        ([], 1),
        (["TOK", "TOK"], 1),
        ([""], 1),
        ([" TOK"], 1),
        (["TOK"], 0),
        (["TOK"], [1, 2]),
        (["TOK", "B"], [1, 0]),
    ],
)
def test_bad_abstractions_are_refused(words, vectors):
    with pytest.raises(UserError):
        make_placeholders(words, vectors=vectors)


def test_trap_14_replacing_words_one_after_the_other_corrupts_the_longer():
    made = make_placeholders(["TOK", "TOK2"], vectors=2)
    wrong = "TOK2 and TOK"
    for a in made:
        wrong = wrong.replace(a.word, "".join(a.names))
    assert wrong == "<s0><s1>2 and <s0><s1>"
    assert bind_placeholders("TOK2 and TOK", made) == "<s2><s3> and <s0><s1>"
