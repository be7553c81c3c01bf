"""tokens: rows beside a frozen vocabulary, binding, norm control; one step of cloneofsimo's inversion written out here."""

import copy

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from lora_core import tokens
from lora_core.errors import UserError
from lora_core.tokens import Abstraction, bind, install, make_abstractions, uninstall

WORDS = ["a", "photo", "of", "cat", "dog", "red"]


@pytest.fixture
def tokenizer(tmp_path):
    """A CLIP tokenizer that knows single letters and WORDS, every word merged from its letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = {token: i for i, token in enumerate(letters + [x + "</w>" for x in letters])}
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            if merge not in merges:
                merges.append(merge)
            parts = [parts[0] + parts[1], *parts[2:]]
            vocab.setdefault(parts[0], len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def encoder(tokenizer, kind=CLIPTextModel, extra_rows=0):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer) + extra_rows, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=8, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return kind(config).eval()


# ---------------------------------------------------------------- binding


def test_names_are_numbered_through_all_abstractions():
    first, second = make_abstractions({"TOK": "dog", "TOK2": "zero"}, vectors=3)
    assert (first.names, second.names) == (("<s0>", "<s1>", "<s2>"), ("<s3>", "<s4>", "<s5>"))
    assert (first.init, second.init) == ("dog", "zero")
    assert make_abstractions(["TOK"], vectors=1) == make_abstractions("TOK", vectors=1) == (Abstraction("TOK", ("<s0>",), "random"),)


@pytest.mark.parametrize("order", [("TOK", "TOK2"), ("TOK2", "TOK")])
def test_bind_takes_the_longest_word_whatever_the_order(order):
    bound = bind("TOK2 beside TOK, TOK's and TOKEN", make_abstractions(order, vectors=2))
    tok, tok2 = ("<s0><s1>", "<s2><s3>") if order[0] == "TOK" else ("<s2><s3>", "<s0><s1>")
    assert bound == f"{tok2} beside {tok}, {tok}'s and TOKEN"


def test_bind_never_corrupts_an_undeclared_longer_word_and_replaces_once():
    assert bind("TOK2 TOK", make_abstractions(["TOK"], vectors=1)) == "TOK2 <s0>"
    chain = (Abstraction("A", ("B",)), Abstraction("B", ("<x>",)))
    assert bind("A B", chain) == "B <x>"
    assert bind("一张TOK的照片", make_abstractions(["TOK"], vectors=1)) == "一张<s0>的照片"
    assert bind("a <*> b", make_abstractions(["<*>"], vectors=1)) == "a <s0> b"
    assert bind("a TOK cat", make_abstractions(["TOK", "TOK cat"], vectors=1)) == "a <s1>"  # longest, though both are whole words
    assert bind("anything", ()) == "anything"


@pytest.mark.parametrize("words, vectors", [([], 1), (["TOK", "TOK"], 1), ([""], 1), ([" TOK"], 1), (["TOK"], 0)])
def test_bad_abstractions_are_refused(words, vectors):
    with pytest.raises(UserError):
        make_abstractions(words, vectors=vectors)


# ---------------------------------------------------------------- install


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_forward_is_that_of_a_table_with_the_rows_appended(tokenizer, kind):
    ours = encoder(tokenizer, kind)
    theirs = copy.deepcopy(ours)
    embedding = install(ours, tokenizer, make_abstractions(["TOK"], vectors=2), seed=3)
    grown = torch.cat([theirs.get_input_embeddings().weight, embedding.rows]).detach()
    theirs.set_input_embeddings(nn.Embedding.from_pretrained(grown))
    ids = tokenizer("a photo of <s0><s1> cat", return_tensors="pt").input_ids
    assert ids[0, 4:6].tolist() == [embedding.first_id, embedding.first_id + 1]
    assert torch.equal(ours(ids)[0], theirs(ids)[0])
    assert ours.get_input_embeddings() is embedding


def test_ids_follow_the_tokenizer_when_the_table_is_longer(tokenizer):
    model = encoder(tokenizer, extra_rows=5)
    length = len(tokenizer)
    embedding = install(model, tokenizer, make_abstractions(["TOK"], vectors=2), seed=0)
    assert embedding.first_id == length and embedding.num_embeddings == length + 5
    ids = torch.arange(length - 1, length + 4)
    expected = embedding.weight[ids].clone()
    expected[1:3] = embedding.rows.detach()
    assert torch.equal(embedding(ids), expected)


def test_tied_embeddings_of_an_encoder_with_two_names_for_its_table(tokenizer):
    model = T5EncoderModel(T5Config(vocab_size=80, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).eval()
    before = model(torch.arange(4)[None]).last_hidden_state
    embedding = install(model, tokenizer, make_abstractions(["TOK"], vectors=1), seed=0)
    assert model.shared is embedding and model.encoder.embed_tokens is embedding
    assert torch.equal(model(torch.arange(4)[None]).last_hidden_state, before)
    model(torch.tensor([[embedding.first_id]])).last_hidden_state.sum().backward()
    assert embedding.rows.grad.abs().sum() > 0


def test_output_has_the_tables_dtype_and_the_rows_stay_fp32(tokenizer):
    embedding = install(encoder(tokenizer).to(torch.bfloat16), tokenizer, make_abstractions(["TOK"], vectors=1), seed=0)
    out = embedding(torch.tensor([0, embedding.first_id]))
    assert out.dtype == torch.bfloat16 and embedding.rows.dtype == torch.float32
    assert torch.equal(out[1], embedding.rows[0].detach().bfloat16())


def test_uninstall_gives_back_the_very_same_table_and_tokenizer(tokenizer):
    model = encoder(tokenizer)
    table, vocabulary, ids = model.get_input_embeddings(), tokenizer.get_vocab(), tokenizer("a <s0>").input_ids
    install(model, tokenizer, make_abstractions(["TOK"], vectors=1), seed=0)
    install(model, tokenizer, (Abstraction("MORE", ("<m0>",), "<s0>"),), seed=0)
    assert torch.equal(model.get_input_embeddings().rows, model.get_input_embeddings().table.rows)  # started from the first learned token
    uninstall(model, tokenizer)
    assert "<m0>" not in tokenizer.get_vocab() and "<s0>" in tokenizer.get_vocab()
    uninstall(model, tokenizer)
    assert model.get_input_embeddings() is table and table.weight.requires_grad
    assert tokenizer.get_vocab() == vocabulary and tokenizer("a <s0>").input_ids == ids and len(tokenizer) == len(vocabulary)
    with pytest.raises(ValueError, match="install first"):
        uninstall(model, tokenizer)
    install(model, tokenizer, make_abstractions(["TOK"], vectors=1), seed=0)


def test_an_existing_token_is_refused_and_nothing_changes(tokenizer):
    model = encoder(tokenizer)
    table = model.get_input_embeddings()
    taken = tokenizer.convert_tokens_to_ids("dog</w>")
    with pytest.raises(UserError, match=rf"dog</w> is already .* \(id {taken}\)"):
        install(model, tokenizer, (Abstraction("A", ("<new>",)), Abstraction("TOK", ("dog</w>",))), seed=0)
    assert model.get_input_embeddings() is table and "<new>" not in tokenizer.get_vocab()
    install(model, tokenizer, make_abstractions(["TOK"], vectors=1), seed=0)
    with pytest.raises(UserError, match="<s0> is already"):
        install(model, tokenizer, make_abstractions(["OTHER"], vectors=1), seed=0)


def test_names_that_the_tokenizer_cannot_tell_apart_are_refused(tokenizer):
    model = encoder(tokenizer)
    with pytest.raises(UserError, match="reads them glued"):
        install(model, tokenizer, (Abstraction("TOK", ("<x>", "<X>")),), seed=0)  # this tokenizer lower-cases
    assert "<x>" not in tokenizer.get_vocab() and isinstance(model.get_input_embeddings(), nn.Embedding)


# ---------------------------------------------------------------- initial rows


def test_random_rows_have_the_tables_std_and_their_own_keys(tokenizer):
    model = encoder(tokenizer)
    many = (Abstraction("TOK", tuple(f"<r{i}>" for i in range(4000))),)
    embedding = install(model, tokenizer, many, seed=1)
    std = embedding.weight.std()
    assert torch.equal(tokens.table_std(embedding), std)
    n = embedding.rows.numel()
    assert abs(embedding.rows.std() / std - 1) < 5 / (2 * n) ** 0.5 and embedding.rows.mean().abs() < 5 * std / n**0.5
    rows = tokens.state(embedding)
    uninstall(model, tokenizer)
    alone = install(model, tokenizer, (Abstraction("TOK", ("<r7>",)),), seed=1)
    assert torch.equal(alone.rows[0], rows[7])
    uninstall(model, tokenizer)
    assert not torch.equal(install(model, tokenizer, (Abstraction("TOK", ("<r7>",)),), seed=2).rows[0], rows[7])


def test_zero_and_word_rows(tokenizer):
    model = encoder(tokenizer)
    table = model.get_input_embeddings().weight
    row = lambda word: table[tokenizer.convert_tokens_to_ids(word + "</w>")]  # noqa: E731
    made = (
        Abstraction("A", ("<a0>", "<a1>"), "zero"),
        Abstraction("B", ("<b0>", "<b1>"), "red dog"),
        Abstraction("C", ("<c0>", "<c1>", "<c2>"), "cat"),
    )
    rows = install(model, tokenizer, made, seed=0).rows
    expected = torch.stack([torch.zeros(8), torch.zeros(8), row("red"), row("dog"), row("cat"), row("cat"), row("cat")])
    assert torch.equal(rows, expected)


@pytest.mark.parametrize(
    "words, match", [("red dog", "is 2 tokens, expected 1 or 3"), ("a red cat dog", "is 4 tokens, expected 1 or 3"), ("", "does not know")]
)
def test_an_initializer_of_another_length_is_refused_with_both_numbers(tokenizer, words, match):
    model = encoder(tokenizer)
    with pytest.raises(UserError, match=match):
        install(model, tokenizer, (Abstraction("TOK", ("<a>", "<b>", "<c>"), words),), seed=0)
    assert isinstance(model.get_input_embeddings(), nn.Embedding) and "<a>" not in tokenizer.get_vocab()


# ---------------------------------------------------------------- training


def test_only_the_rows_train_and_the_vocabulary_keeps_its_bits(tokenizer):
    model = encoder(tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    embedding = install(model, tokenizer, make_abstractions(["TOK"], vectors=2), seed=0)
    start = tokens.state(embedding)
    ids = tokenizer("a photo of <s0><s1> dog", return_tensors="pt").input_ids
    optimiser = torch.optim.AdamW([p for p in embedding.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    assert [p.shape for group in optimiser.param_groups for p in group["params"]] == [(2, 8)]
    for _ in range(4):
        optimiser.zero_grad()
        model(ids)[0].square().sum().backward()
        optimiser.step()
    assert (tokens.state(embedding) - start).abs().min() > 0
    assert embedding.weight.grad is None and not embedding.weight.requires_grad
    uninstall(model, tokenizer)
    table = before.pop(next(name for name in before if name.endswith("token_embedding.weight")))
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())


def test_a_step_of_the_inversion_equals_cloneofsimos_formulas(tokenizer):
    """Theirs (semantics 1.11): the whole table trains under AdamW, each placeholder row is pulled to norm 0.4 with lambda = min(1, 100 lr), and every
    other row is put back. Ours: rows only. Several steps, so that moments, decay and pull all enter; float64 except for the rows' own fp32."""
    lr, decay = 2e-3, 0.1
    ours = encoder(tokenizer)
    theirs = copy.deepcopy(ours)
    embedding = install(ours, tokenizer, make_abstractions(["TOK"], vectors=2), seed=0)
    first, last = embedding.first_id, embedding.first_id + 2
    table = nn.Parameter(torch.cat([theirs.get_input_embeddings().weight, embedding.rows]).detach().clone())
    theirs.set_input_embeddings(nn.Embedding(*table.shape))
    theirs.get_input_embeddings().weight = table
    original = table.detach().clone()
    ids = tokenizer(["a photo of <s0><s1> dog", "<s1> of a red cat photo"], return_tensors="pt").input_ids
    target = torch.randn(*ids.shape, 8, generator=torch.Generator().manual_seed(0))
    options = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay}
    our_optimiser, their_optimiser = torch.optim.AdamW([embedding.rows], **options), torch.optim.AdamW([table], **options)
    for _ in range(3):
        for model, optimiser in ((ours, our_optimiser), (theirs, their_optimiser)):
            optimiser.zero_grad()
            (model(ids)[0] - target).square().mean().backward()
            optimiser.step()
        tokens.pull_norms_(embedding.rows, 0.4, rate=min(1.0, 100 * lr))
        with torch.no_grad():
            new = table[first:last].double()
            norm = new.norm(dim=-1, keepdim=True)
            table[first:last] = (new / norm * (norm + min(1.0, 100 * lr) * (0.4 - norm))).float()
            table[:first] = original[:first]
            table[last:] = original[last:]
    torch.testing.assert_close(embedding.rows, table[first:last], rtol=1e-6, atol=1e-7)
    assert torch.equal(embedding.weight, original[:first])


def test_the_norm_prior_moves_each_norm_by_its_rate_and_keeps_directions():
    rows = torch.randn(5, 7, dtype=torch.float64)
    rows[0] *= 0.9 / rows[0].norm()
    rows[4] = 0
    before = rows.clone()
    tokens.pull_norms_(rows, 0.4, rate=0.05)
    assert rows[0].norm().item() == pytest.approx(0.875)  # semantics section 8
    torch.testing.assert_close(rows.norm(dim=-1)[:4], before.norm(dim=-1)[:4] * 0.95 + 0.4 * 0.05)
    torch.testing.assert_close(torch.cosine_similarity(rows, before)[:4], torch.ones(4, dtype=torch.float64))
    assert torch.equal(rows[4], torch.zeros(7, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"1\.5"):
        tokens.pull_norms_(rows, rate=1.5)


def test_the_std_rescale_converges_geometrically():
    """One step takes the ratio q of the standard deviations to q ** 0.9, so 1.5 is 1.152, 1.051 and 1.002 after 10, 20 and 50."""
    rows = torch.randn(4, 64, dtype=torch.float64)
    rows *= 1.5 * 0.01 / rows.std()
    for step in range(1, 51):
        tokens.rescale_std_(rows, 0.01)
        assert (rows.std() / 0.01).item() == pytest.approx(1.5 ** (0.9**step), rel=1e-12)
    zeros = torch.zeros(2, 3)
    assert torch.equal(tokens.rescale_std_(zeros, 0.01), torch.zeros(2, 3))


# ---------------------------------------------------------------- the rest


def test_pooling_at_the_first_eos_is_not_the_largest_id():
    ids = torch.tensor([[0, 5, 9, 9, 9], [0, 12, 3, 4, 9], [9, 1, 2, 12, 9]])  # 9 ends a text, 12 is a learned token
    assert tokens.first_eos(ids, 9).tolist() == [2, 4, 0]
    with pytest.raises(ValueError, match=r"9 in row\(s\) \[1\]"):
        tokens.first_eos(torch.tensor([[0, 9], [0, 1]]), 9)


def test_pooling_agrees_with_transformers_for_a_text_of_the_vocabulary(tokenizer):
    model = encoder(tokenizer)
    ids = tokenizer(["a photo of cat", "dog"], padding="max_length", return_tensors="pt").input_ids
    out = model(ids)
    assert torch.equal(out.pooler_output, out.last_hidden_state[torch.arange(2), tokens.first_eos(ids, tokenizer.eos_token_id)])


def test_state_round_trip_and_refusals(tokenizer):
    model = encoder(tokenizer)
    embedding = install(model, tokenizer, make_abstractions(["TOK"], vectors=2), seed=0)
    rows = torch.randn(2, 8)
    tokens.load_state(embedding, rows)
    assert torch.equal(tokens.state(embedding), rows)
    with pytest.raises(UserError, match=r"\[3, 8\].*\[2, 8\]"):
        tokens.load_state(embedding, torch.zeros(3, 8))
    with pytest.raises(UserError, match="<s0>, <s1> hold NaN"):
        tokens.load_state(embedding, torch.full((2, 8), float("nan")))
    assert torch.equal(tokens.state(embedding), rows)


def test_report_names_the_nearest_words_the_norm_and_the_drift(tokenizer):
    model = encoder(tokenizer)
    embedding = install(model, tokenizer, (Abstraction("TOK", ("<s0>",), "dog"),), seed=0)
    with torch.no_grad():
        embedding.rows.mul_(3)
    (line,) = tokens.report(embedding, tokenizer, k=2)
    assert line.name == "<s0>" and line.nearest[0][0] == "dog</w>" and line.nearest[0][1] == pytest.approx(1, abs=1e-6)
    assert len(line.nearest) == 2 and line.nearest[1][1] < line.nearest[0][1]
    assert line.norm == pytest.approx(embedding.rows.norm().item()) and line.drift == pytest.approx(line.norm * 2 / 3, rel=1e-6)
