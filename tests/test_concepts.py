"""Concepts of a fusion: strengths, tokens that live together, prompts of each."""

from pathlib import Path

import pytest
import torch

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank, delta_weight
from lora_core.errors import UserError
from lora_core.formats.layout import Layout
from lora_core.placeholders import Placeholder
from merging.commands import FileReadOptions
from merging.concepts import Concept, add_prompts, join_concepts, prompt_texts, read_concepts
from merging.token_names import TakenNames
from tests.random_adapters import randn

READING = FileReadOptions()
KEY = ("unet", "conv")


def concept(path: str, word: str, *names: str) -> Concept:
    return Concept(path, AdapterState(), {}, (Placeholder(word, names),) if word else ())


def test_strengths_are_read_by_network(here: Path, layout: Layout) -> None:
    first, second = read_concepts(["run:0.8", "c.safetensors:unet=0.5"], layout, READING)
    assert first.strengths == {"unet": 0.8, "text_encoder": 0.8}
    assert second.strengths == {"unet": 0.5, "text_encoder": 1.0}
    assert second.term.factor("unet", "any") == 0.5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run"], "takes two or more concepts; fold puts one"),
        (["run", "run:0.5"], "run is given twice"),
        (["run", "./run/"], r"given twice \(run and ./run/ are the same\)"),
        (["run", "run/run_emb.safetensors"], "given twice"),
        (["run", "base"], "base is a whole model"),
        (["run", "c.safetensors:much"], "the concept c.safetensors:much: cannot read the strength"),
        (["run", "c.safetensors:1@0-0.5"], "has a range of noise levels"),
        (["run", "c.safetensors:nan"], "expected a finite number"),
        (["run", "c.safetensors:text=0.5,transformer=1"], "would have no effect"),
        (["run", "nowhere.safetensors"], "does not exist"),
    ],
)
def test_words_that_are_no_concepts_are_refused(
    here: Path, layout: Layout, words: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        read_concepts(words, layout, READING)


def test_tokens_live_together_and_keep_their_own_words(here: Path, layout: Layout) -> None:
    concepts = read_concepts(["run", "c.safetensors"], layout, READING)
    taken = TakenNames({"<s2>", "TOK"}, {"TOK"})
    placed, learned, notes = join_concepts(concepts, taken)
    assert learned.token_names == ("<s1>", "<s2-2>", "<s1-2>", "<s2-3>")
    assert placed[0].placeholders == (Placeholder("TOK", ("<s1>", "<s2-2>")),)
    assert [own.word for own in placed[1].placeholders] == ["<s1>", "<s2>"]
    assert placed[1].placeholders[1].names == ("<s2-3>",)
    assert "TOK of run is called TOK2 in the result" in notes and len(notes) == 4
    rows = torch.cat([own.state.tokens["clip_l"] for own in concepts])
    assert torch.equal(learned.tokens["clip_l"], rows)


def test_a_file_brings_the_tokens_next_to_it(here: Path, layout: Layout) -> None:
    file = next(path for path in Path("run").glob("*.safetensors") if "_emb" not in path.name)
    alone = read_concepts([str(file), "b.safetensors"], layout, READING)[0]
    assert alone.state.token_names == ("<s1>", "<s2>")


def test_prompts_are_the_sources_or_a_text_or_file_for_each(tmp_path: Path) -> None:
    two = [concept("a", "TOK", "<s0>", "<s1>"), concept("b", "TOK", "<s0-2>")]
    default = add_prompts(two, ())
    assert [own.bound_prompts() for own in default] == [
        ["photo of a <s0><s1>", "<s0><s1>"],
        ["photo of a <s0-2>", "<s0-2>"],
    ]
    file = tmp_path / "prompts.txt"
    file.write_text("a red TOK\n\nTOK in snow\n")
    given = (str(file), "TOK at sea")
    assert [own.prompts for own in add_prompts(two, given)] == [
        ("a red TOK", "TOK in snow"),
        ("TOK at sea",),
    ]
    assert prompt_texts(given) == ("a red TOK\nTOK in snow", "TOK at sea")
    assert add_prompts(two, prompt_texts(given)) == add_prompts(two, given)
    assert add_prompts(two, ["a {}, red"])[1].bound_prompts() == ["a <s0-2>, red"]
    plain = [concept("a", ""), concept("b", "")]
    assert add_prompts(plain, ["sks dog", "xyz cat"])[1].bound_prompts() == ["xyz cat"]


@pytest.mark.parametrize(
    ("words", "given", "sentence"),
    [
        (("TOK", ""), (), "b has no learned words, so its prompts are not known; give --prompts"),
        (("TOK", "ABC"), ("a TOK",), "has 1 texts or files for 2 concepts"),
        (("TOK", "ABC"), ("a {}", "ABC"), "'ABC' has no {} for the words"),
        (
            ("TOK", "ABC"),
            ("a TOK", "a dog"),
            r"no prompt of b has one of its learned words \(ABC\)",
        ),
        (("TOK", "ABC"), ("a TOK", " "), "has no prompt"),
        (("", ""), ("a dog", "lost.txt"), "the prompt file lost.txt does not exist"),
        (("", ""), ("a dog", "a dog"), "a and b have the same prompts"),
    ],
)
def test_prompts_that_cannot_be_meant_are_refused(
    words: tuple[str, str], given: tuple[str, ...], sentence: str
) -> None:
    two = [concept("a", words[0], "<s0>"), concept("b", words[1], "<s1>")]
    with pytest.raises(UserError, match=sentence):
        add_prompts(two, given)


def test_factors_are_the_update_at_its_strength_of_any_kind() -> None:
    weight = randn(6, 4, 3, 3)
    lora = LowRank(randn(2, 4, 3, 3, seed=1), randn(6, 2, 1, 1, seed=2), 0.5)
    full = DenseUpdate("full", (6, 4, 3, 3), {"diff": randn(6, 4, 3, 3, seed=3)})
    for update in (lora, lora._replace(magnitude=randn(6, seed=4).abs()), full):
        state = AdapterState({"unet": {"conv": update}})  # type: ignore[dict-item]
        found = Concept("a", state, {"unet": 0.8}).layer_factors(KEY, weight)
        matrix = found.down if found.up is None else found.up @ found.down
        expected = 0.8 * delta_weight(update, weight).flatten(1)
        torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=1e-12)
    off = Concept("a", AdapterState({"unet": {"conv": lora}}), {"unet": 0.0})
    assert off.layer_factors(KEY, weight).down.shape == (0, 36)


def test_a_convolution_with_groups_is_refused() -> None:
    update = LowRank(randn(2, 2, 3, 3), randn(6, 1, 1, 1), 1.0)
    own = Concept("a", AdapterState({"unet": {"conv": update}}), {"unet": 1.0})
    with pytest.raises(ValueError, match="an update of"):
        own.layer_factors(KEY, randn(6, 4, 3, 3))
