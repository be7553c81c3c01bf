"""Prompts with a text for each layer: which texts are encoded, and where their rows go."""

import torch

from lora_core.family import Conditioning
from lora_core.layer_prompts import arrange_by_layer, encode_layer_prompts, split_prompts
from lora_core.placeholders import Placeholder, bind_layers


def test_every_different_text_is_encoded_once() -> None:
    seen: list[str] = []

    def encode(texts: list[str]) -> Conditioning:
        seen.extend(texts)
        rows = torch.tensor([[float(len(text)), float(ord(text[-1]))] for text in texts])
        return Conditioning(rows[:, None], {"pooled": rows})

    cond = encode_layer_prompts(encode, [("ab", "c", "c"), "ab", ("c", "ab", "d")])
    assert seen == ["ab", "c", "d"]
    assert cond.prompt_embeds[:, :, 0, 1].tolist() == [[98, 99, 99], [98, 98, 98], [99, 98, 100]]
    assert torch.allclose(cond.extra["pooled"][0], torch.tensor([4 / 3, (98 + 99 + 99) / 3]))


def test_prompts_of_one_text_stay_as_they_are() -> None:
    assert split_prompts(["a", "a", "b"]) == (["a", "a", "b"], None)


def test_a_fixed_number_of_texts_for_a_captured_step() -> None:
    texts, rows = split_prompts([("a", "b"), "c"], distinct=False)
    assert texts == ["a", "b", "c", "c"] and rows == [[0, 1], [2, 3]]


def test_gradients_of_a_shared_text_add_up() -> None:
    embeds = torch.ones(2, 3, requires_grad=True)
    cond = arrange_by_layer(Conditioning(embeds[:, None]), torch.tensor([[0, 1, 0]]))
    cond.prompt_embeds.sum().backward()
    assert embeds.grad is not None and embeds.grad[:, 0].tolist() == [2, 1]


def test_words_are_bound_layer_by_layer() -> None:
    word = Placeholder("TOK", ("<a>", "<b>", "<c>", "<d>"), layers=2)
    plain = Placeholder("DOG", ("<x>",))
    assert bind_layers("a TOK, a DOG", [word, plain]) == ("a <a><b>, a <x>", "a <c><d>, a <x>")
    assert bind_layers("a DOG", [word, plain]) == "a <x>"
    assert bind_layers("a TOK2", [word]) == "a TOK2"
