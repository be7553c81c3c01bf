"""tokens: rows beside a frozen vocabulary, norm control; one step of cloneofsimo's inversion
written out here.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from lora_core import tokens
from lora_core.diffusion.noise import keyed_generator
from lora_core.errors import UserError
from lora_core.placeholders import (
    Placeholder,
    bind_placeholders,
    make_placeholders,
    truncated_tokens,
)
from lora_core.tokens import install_tokens, uninstall_tokens

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
        vocab_size=len(tokenizer) + extra_rows, hidden_size=8, intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=8, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return kind(config).eval()


# ---------------------------------------------------------------- install


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_forward_is_that_of_a_table_with_the_rows_appended(tokenizer, kind):
    ours = encoder(tokenizer, kind)
    theirs = copy.deepcopy(ours)
    embedding = install_tokens(ours, tokenizer, make_placeholders(["TOK"], vectors=2), seed=3)
    grown = torch.cat([theirs.get_input_embeddings().weight, embedding.rows]).detach()
    theirs.set_input_embeddings(nn.Embedding.from_pretrained(grown))
    ids = tokenizer("a photo of <s0><s1> cat", return_tensors="pt").input_ids
    assert ids[0, 4:6].tolist() == [embedding.first_id, embedding.first_id + 1]
    assert torch.equal(ours(ids)[0], theirs(ids)[0])
    assert ours.get_input_embeddings() is embedding


def test_ids_follow_the_tokenizer_when_the_table_is_longer(tokenizer):
    model = encoder(tokenizer, extra_rows=5)
    length = len(tokenizer)
    embedding = install_tokens(model, tokenizer, make_placeholders(["TOK"], vectors=2), seed=0)
    assert embedding.first_id == length and embedding.num_embeddings == length + 5
    ids = torch.arange(length - 1, length + 4)
    expected = embedding.weight[ids].clone()
    expected[1:3] = embedding.rows.detach()
    assert torch.equal(embedding(ids), expected)


def test_tied_embeddings_of_an_encoder_with_two_names_for_its_table(tokenizer):
    model = T5EncoderModel(
        T5Config(vocab_size=80, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    ).eval()
    before = model(torch.arange(4)[None]).last_hidden_state
    embedding = install_tokens(model, tokenizer, make_placeholders(["TOK"], vectors=1), seed=0)
    assert model.shared is embedding and model.encoder.embed_tokens is embedding
    assert torch.equal(model(torch.arange(4)[None]).last_hidden_state, before)
    model(torch.tensor([[embedding.first_id]])).last_hidden_state.sum().backward()
    assert embedding.rows.grad.abs().sum() > 0


def test_output_has_the_tables_dtype_and_the_rows_stay_fp32(tokenizer):
    embedding = install_tokens(
        encoder(tokenizer).to(torch.bfloat16),
        tokenizer,
        make_placeholders(["TOK"], vectors=1),
        seed=0,
    )
    out = embedding(torch.tensor([0, embedding.first_id]))
    assert out.dtype == torch.bfloat16 and embedding.rows.dtype == torch.float32
    assert torch.equal(out[1], embedding.rows[0].detach().bfloat16())


def test_uninstall_gives_back_the_very_same_table_and_tokenizer(tokenizer):
    model = encoder(tokenizer)
    table, vocabulary, ids = (
        model.get_input_embeddings(),
        tokenizer.get_vocab(),
        tokenizer("a <s0>").input_ids,
    )
    install_tokens(model, tokenizer, make_placeholders(["TOK"], vectors=1), seed=0)
    install_tokens(model, tokenizer, (Placeholder("MORE", ("<m0>",), "<s0>"),), seed=0)
    assert torch.equal(
        model.get_input_embeddings().rows, model.get_input_embeddings().table.rows
    )  # started from the first learned token
    uninstall_tokens(model, tokenizer)
    assert "<m0>" not in tokenizer.get_vocab() and "<s0>" in tokenizer.get_vocab()
    uninstall_tokens(model, tokenizer)
    assert model.get_input_embeddings() is table and table.weight.requires_grad
    assert (
        tokenizer.get_vocab() == vocabulary
        and tokenizer("a <s0>").input_ids == ids
        and len(tokenizer) == len(vocabulary)
    )
    with pytest.raises(ValueError, match="install first"):
        uninstall_tokens(model, tokenizer)
    install_tokens(model, tokenizer, make_placeholders(["TOK"], vectors=1), seed=0)


def test_learned_tokens_beyond_the_tokenizers_limit_are_told_apart(tokenizer):
    made = make_placeholders(["TOK", "CAT"], vectors=2)
    install_tokens(encoder(tokenizer), tokenizer, made, seed=0)
    cut = lambda caption: truncated_tokens(caption, made, tokenizer, 16)  # noqa: E731
    assert cut("a photo of TOK") == {"<s0>": False, "<s1>": False}
    assert cut("a " * 13 + "TOK") == {
        "<s0>": False,
        "<s1>": True,
    }  # 14 tokens beside the special ones
    assert cut("TOK " + "a " * 13 + "CAT") == {
        "<s0>": False,
        "<s1>": False,
        "<s2>": True,
        "<s3>": True,
    }
    assert cut("a " * 12 + "TOK TOK") == {"<s0>": True, "<s1>": True}  # the second time
    assert cut("a dog") == {}


def test_an_existing_token_is_refused_and_nothing_changes(tokenizer):
    model = encoder(tokenizer)
    table = model.get_input_embeddings()
    taken = tokenizer.convert_tokens_to_ids("dog</w>")
    with pytest.raises(UserError, match=rf"dog</w> is already .* \(id {taken}\)"):
        install_tokens(
            model,
            tokenizer,
            (Placeholder("A", ("<new>",)), Placeholder("TOK", ("dog</w>",))),
            seed=0,
        )
    assert model.get_input_embeddings() is table and "<new>" not in tokenizer.get_vocab()
    install_tokens(model, tokenizer, make_placeholders(["TOK"], vectors=1), seed=0)
    with pytest.raises(UserError, match="<s0> is already"):
        install_tokens(model, tokenizer, make_placeholders(["OTHER"], vectors=1), seed=0)


def test_names_that_the_tokenizer_cannot_tell_apart_are_refused(tokenizer):
    model = encoder(tokenizer)
    with pytest.raises(UserError, match="reads them joined"):
        install_tokens(
            model, tokenizer, (Placeholder("TOK", ("<x>", "<X>")),), seed=0
        )  # this tokenizer lower-cases
    assert "<x>" not in tokenizer.get_vocab() and isinstance(
        model.get_input_embeddings(), nn.Embedding
    )


# ---------------------------------------------------------------- initial rows


def test_random_rows_have_the_tables_std_and_their_own_keys(tokenizer):
    model = encoder(tokenizer)
    many = (Placeholder("TOK", tuple(f"<r{i}>" for i in range(4000))),)
    embedding = install_tokens(model, tokenizer, many, seed=1)
    std = embedding.weight.std()
    assert torch.equal(tokens.table_std(embedding), std)
    n = embedding.rows.numel()
    assert (
        abs(embedding.rows.std() / std - 1) < 5 / (2 * n) ** 0.5
        and embedding.rows.mean().abs() < 5 * std / n**0.5
    )
    rows = tokens.copy_token_rows(embedding)
    uninstall_tokens(model, tokenizer)
    alone = install_tokens(model, tokenizer, (Placeholder("TOK", ("<r7>",)),), seed=1)
    assert torch.equal(alone.rows[0], rows[7])
    uninstall_tokens(model, tokenizer)
    assert not torch.equal(
        install_tokens(model, tokenizer, (Placeholder("TOK", ("<r7>",)),), seed=2).rows[0], rows[7]
    )


def test_zero_and_word_rows(tokenizer):
    model = encoder(tokenizer)
    table = model.get_input_embeddings().weight
    row = lambda word: table[tokenizer.convert_tokens_to_ids(word + "</w>")]  # noqa: E731
    made = (
        Placeholder("A", ("<a0>", "<a1>"), "zero"),
        Placeholder("B", ("<b0>", "<b1>"), "red dog"),
        Placeholder("C", ("<c0>", "<c1>", "<c2>"), "cat"),
    )
    rows = install_tokens(model, tokenizer, made, seed=0).rows
    expected = torch.stack(
        [torch.zeros(8), torch.zeros(8), row("red"), row("dog"), row("cat"), row("cat"), row("cat")]
    )
    assert torch.equal(rows, expected)


def test_row_k_starts_from_the_initializers_token_k_and_begins_again_after_its_last(tokenizer):
    model = encoder(tokenizer)
    table = model.get_input_embeddings().weight
    rows = install_tokens(
        model, tokenizer, (Placeholder("TOK", ("<a>", "<b>", "<c>"), "red dog"),), seed=0
    ).rows
    red, dog = (table[tokenizer.convert_tokens_to_ids(word + "</w>")] for word in ("red", "dog"))
    assert torch.equal(rows, torch.stack([red, dog, red]))


@pytest.mark.parametrize(
    "words, match",
    [
        ("a red cat dog", r"is 4 tokens, more than its 3 learned vectors; set --tokens\.vectors 4"),
        ("", "does not know"),
    ],
)
def test_an_initializer_of_too_many_tokens_is_refused_with_the_number_to_set(
    tokenizer, words, match
):
    model = encoder(tokenizer)
    with pytest.raises(UserError, match=match):
        install_tokens(
            model, tokenizer, (Placeholder("TOK", ("<a>", "<b>", "<c>"), words),), seed=0
        )
    assert (
        isinstance(model.get_input_embeddings(), nn.Embedding)
        and "<a>" not in tokenizer.get_vocab()
    )


@pytest.mark.parametrize(
    "init, sigma", [("random:0.017", 0.017), ("<rand-0.017>", 0.017), ("random:2e-3", 2e-3)]
)
def test_a_spread_of_ones_own_scales_the_noise_of_the_tables(tokenizer, init, sigma):
    rows = {}
    for how in (init, "random"):
        model = encoder(tokenizer)
        rows[how] = install_tokens(
            model, tokenizer, (Placeholder("TOK", ("<a>", "<b>"), how),), seed=3
        ).rows
        uninstall_tokens(model, tokenizer)
    torch.testing.assert_close(
        rows[init], rows["random"] / encoder(tokenizer).get_input_embeddings().weight.std() * sigma
    )
    assert (
        tokens.is_random_init(init)
        and tokens.is_random_init("<zero>")
        and not tokens.is_random_init("red dog")
    )


def test_zero_in_lora_ptis_spelling(tokenizer):
    assert not install_tokens(
        encoder(tokenizer), tokenizer, (Placeholder("TOK", ("<a>",), "<zero>"),), seed=3
    ).rows.any()


@pytest.mark.parametrize(
    "init",
    ["random:", "random:wide", "random:0", "<rand-0>", "<rand-x>", "<rand-inf>", "random:-1"],
)
def test_a_spread_that_is_no_positive_number_is_refused(tokenizer, init):
    for action in (
        lambda: tokens.is_random_init(init),
        lambda: install_tokens(
            encoder(tokenizer), tokenizer, (Placeholder("TOK", ("<a>",), init),), seed=0
        ),
    ):
        with pytest.raises(UserError, match="no spread that is a positive number"):
            action()


# ---------------------------------------------------------------- several encoders, T5


@pytest.fixture
def sentencepiece():
    """A T5 tokenizer that knows single letters, WORDS and 100 extra ids, and puts its mark before
    every word.
    """
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581", -2.0),
        *[("\u2581" + w, -1.0) for w in WORDS if w != "red"],
    ]
    return T5Tokenizer(vocab=pieces + [(chr(c), -6.0) for c in range(ord("a"), ord("z") + 1)])


def t5(tokenizer, extra_rows=28):
    torch.manual_seed(1)
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer) + extra_rows,
            d_model=8,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
        )
    ).eval()


def test_t5s_tied_table_and_marked_words(sentencepiece):
    model = t5(sentencepiece)
    table, length = model.get_input_embeddings(), len(sentencepiece)
    (abstraction,) = made = make_placeholders({"TOK": "photo dog"}, vectors=3)
    embedding = install_tokens(model, sentencepiece, made, seed=0)
    assert (
        model.shared is embedding
        and model.encoder.embed_tokens is embedding
        and embedding.first_id == length < embedding.num_embeddings
    )
    photo, dog = (
        table.weight[sentencepiece.convert_tokens_to_ids("\u2581" + word)]
        for word in ("photo", "dog")
    )
    assert torch.equal(embedding.rows, torch.stack([photo, dog, photo]))
    ids = sentencepiece(
        bind_placeholders("a photo of TOK cat", made), return_tensors="pt"
    ).input_ids
    words = ["\u2581a", "\u2581photo", "\u2581of", *abstraction.names, "\u2581cat", "</s>"]
    assert sentencepiece.convert_ids_to_tokens(ids[0]) == words
    model(ids).last_hidden_state.square().sum().backward()
    assert embedding.rows.grad.abs().amin(dim=1).min() > 0 and embedding.weight.grad is None
    grown = t5(sentencepiece, extra_rows=0)
    grown.load_state_dict(
        tokens.strip_token_rows(model.state_dict(), embedding, model)
        | _same_rows(model, embedding, len(grown.shared.weight))
    )
    torch.testing.assert_close(model(ids).last_hidden_state, grown(ids).last_hidden_state)
    uninstall_tokens(model, sentencepiece)
    assert (
        model.shared is table
        and model.encoder.embed_tokens is table
        and len(sentencepiece) == length
    )


def _same_rows(model, embedding, length):
    """The table as the public scripts grow it: the vocabulary, then the learned rows over T5's
    unused ones.
    """
    table = torch.cat([embedding.weight[: embedding.first_id], embedding.rows])[:length].detach()
    return dict.fromkeys(
        (
            key
            for key in ("shared.weight", "encoder.embed_tokens.weight")
            if key.replace("weight", "rows") in model.state_dict()
        ),
        table,
    )


def test_vectors_are_counted_where_the_initializer_is_longest(tokenizer, sentencepiece):
    assert tokens.count_initializer_tokens("red dog", [tokenizer]) == 2
    assert (
        tokens.count_initializer_tokens("red dog", [tokenizer, sentencepiece])
        == tokens.count_initializer_tokens("red dog", [sentencepiece])
        == 5
    )  # mark, r, e, d, dog
    assert tokens.count_initializer_tokens("dog", [tokenizer, sentencepiece]) == 1
    for init in ("random", "zero", "<rand-0.1>", "random:0.1"):
        with pytest.raises(UserError, match=r"--tokens\.vectors 0 counts"):
            tokens.count_initializer_tokens(init, [tokenizer])
    with pytest.raises(UserError, match="does not know the initializer '\u00df'"):
        tokens.count_initializer_tokens("\u00df", [tokenizer, sentencepiece])


def test_encoders_of_one_width_differ_by_stream_and_the_default_keeps_its_bits(tokenizer):
    made, rows = make_placeholders(["TOK"], vectors=2), []
    for stream in ("", "clip_g", "clip_l", ""):
        model = encoder(tokenizer)
        rows.append(install_tokens(model, tokenizer, made, seed=5, stream=stream).rows.detach())
        uninstall_tokens(model, tokenizer)
    assert (
        torch.equal(rows[0], rows[3])
        and not torch.equal(rows[0], rows[1])
        and not torch.equal(rows[1], rows[2])
    )
    expected = torch.randn(
        8, generator=keyed_generator(5, "<s1>", 0, "token row 8")
    ) * tokens.table_std(model.get_input_embeddings())
    assert torch.equal(rows[0][1], expected)


def test_a_state_dict_without_rows_is_the_models_own(tokenizer):
    model = encoder(tokenizer)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    install_tokens(model, tokenizer, make_placeholders(["TOK"]), seed=0)
    embedding = install_tokens(model, tokenizer, (Placeholder("MORE", ("<m>",)),), seed=0)
    after = tokens.strip_token_rows(model.state_dict(), embedding, model)
    assert list(after) == list(before) and all(
        torch.equal(after[key], before[key]) for key in before
    )


# ---------------------------------------------------------------- traps of the public scripts


def test_trap_14_the_std_is_that_of_the_table_before_it_grew(tokenizer):
    model = encoder(tokenizer)
    table = model.get_input_embeddings().weight.detach()
    fresh = torch.randn(
        50, 8, generator=torch.Generator().manual_seed(0)
    )  # what a resize appends: table.std() is 1 / 50 of it
    with torch.no_grad():
        table.mul_(0.02 / table.std())
    embedding = install_tokens(model, tokenizer, make_placeholders(["TOK"], vectors=50), seed=0)
    wrong = torch.cat([table, fresh]).std()
    assert tokens.table_std(embedding) == table.std() and wrong > 10 * table.std()
    assert abs(embedding.rows.std() / table.std() - 1) < 5 / (2 * 400) ** 0.5


def test_trap_14_an_initializer_is_its_own_tokens_only(tokenizer):
    """Encoded with special tokens, as `tokenizer(text)` does, row 0 would start from the
    beginning-of-text token.
    """
    model = encoder(tokenizer)
    table = model.get_input_embeddings().weight
    wrong = table[torch.tensor(tokenizer("red dog").input_ids[:2])]
    rows = install_tokens(
        model, tokenizer, (Placeholder("TOK", ("<a>", "<b>"), "red dog"),), seed=0
    ).rows
    assert not torch.equal(rows, wrong) and torch.equal(rows[0], wrong[1])


@pytest.mark.parametrize("wrong", ["decay", "momentum"])
def test_trap_15_no_bit_of_the_vocabulary_moves(tokenizer, wrong):
    """Masking the gradient of the whole table is not enough: weight decay, or the moments of a step
    that came before, move the other rows.
    """
    ours = encoder(tokenizer)
    theirs = copy.deepcopy(ours)
    decay = 0.5 if wrong == "decay" else 0.0
    embedding = install_tokens(ours, tokenizer, make_placeholders(["TOK"], vectors=1), seed=0)
    first = embedding.first_id
    before = embedding.weight.detach().clone()
    theirs.set_input_embeddings(
        nn.Embedding.from_pretrained(torch.cat([before, embedding.rows.detach()]), freeze=False)
    )
    table = theirs.get_input_embeddings().weight
    optimizers = [
        torch.optim.AdamW([p], lr=0.1, weight_decay=decay) for p in (embedding.rows, table)
    ]
    ids = tokenizer("a photo of <s0> dog", return_tensors="pt").input_ids
    for step in range(3):
        for model, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            model(ids)[0].square().sum().backward()
            if model is theirs and (wrong == "decay" or step > 0):
                table.grad[:first] = 0
            optimizer.step()
            if step == 0:
                with torch.no_grad():
                    table[:first] = before  # restored once, as before a pivot
    assert torch.equal(embedding.weight, before) and embedding.rows.grad.any()
    assert not torch.equal(table[:first], before)


def test_trap_16_the_norm_controls_are_not_interchangeable():
    """cloneofsimo pulls each row's norm to 0.4; diffusers multiplies all rows by (std / std(rows))
    ** 0.1; cog does that twice a step; Mix-of-Show stops a row at norm 0.55. From rows of norms
    0.2, 0.4 and 0.9 no two of them agree.
    """
    start = torch.nn.functional.normalize(
        torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1
    )
    start = start * torch.tensor([[0.2], [0.4], [0.9]], dtype=torch.float64)
    std = 0.05
    pulled, scaled = (
        tokens.pull_norms_(start.clone(), 0.4, rate=0.05),
        tokens.rescale_std_(start.clone(), std),
    )
    assert torch.allclose(
        pulled.norm(dim=-1), torch.tensor([0.21, 0.4, 0.875], dtype=torch.float64)
    )
    factor = (std / start.std()) ** 0.1
    assert torch.allclose(scaled, start * factor) and abs(float(factor) - 1) > 0.01
    stopped = torch.where(
        start.norm(dim=-1, keepdim=True) >= 0.55, start, start * 1.01
    )  # a step of growth that norm 0.55 ends
    twice = (
        start
        * (std / start.std()) ** 0.1
        * (std / (start * (std / start.std()) ** 0.1).std()) ** 0.1
    )
    others = {
        "pull": pulled,
        "rescale": scaled,
        "stop": stopped,
        "cog": twice,
        "rescale each row": start * (0.4 / start.norm(dim=-1, keepdim=True)) ** 0.1,
    }
    for one, two in itertools.combinations(others, 2):
        assert (others[one] - others[two]).norm() > 1e-3, (one, two)


# ---------------------------------------------------------------- training


def test_only_the_rows_train_and_the_vocabulary_keeps_its_bits(tokenizer):
    model = encoder(tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    embedding = install_tokens(model, tokenizer, make_placeholders(["TOK"], vectors=2), seed=0)
    start = tokens.copy_token_rows(embedding)
    ids = tokenizer("a photo of <s0><s1> dog", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(
        [p for p in embedding.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5
    )
    (group,) = optimizer.param_groups
    assert [p.shape for p in group["params"]] == [(2, 8)]
    for _ in range(4):
        optimizer.zero_grad()
        model(ids)[0].square().sum().backward()
        optimizer.step()
    assert (tokens.copy_token_rows(embedding) - start).abs().min() > 0
    assert embedding.weight.grad is None and not embedding.weight.requires_grad
    uninstall_tokens(model, tokenizer)
    table = before.pop(next(name for name in before if name.endswith("token_embedding.weight")))
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())


def test_a_step_of_the_inversion_equals_cloneofsimos_formulas(tokenizer):
    """Theirs (semantics 1.11): the whole table trains under AdamW, each placeholder row is pulled
    to norm 0.4 with lambda = min(1, 100 lr), and every other row is put back. Ours: rows only.
    Several steps, so that moments, decay and pull all enter; float64 except for the rows' own fp32.
    """
    lr, decay = 2e-3, 0.1
    ours = encoder(tokenizer)
    theirs = copy.deepcopy(ours)
    embedding = install_tokens(ours, tokenizer, make_placeholders(["TOK"], vectors=2), seed=0)
    first, last = embedding.first_id, embedding.first_id + 2
    table = nn.Parameter(
        torch.cat([theirs.get_input_embeddings().weight, embedding.rows]).detach().clone()
    )
    theirs.set_input_embeddings(nn.Embedding(*table.shape))
    theirs.get_input_embeddings().weight = table
    original = table.detach().clone()
    ids = tokenizer(
        ["a photo of <s0><s1> dog", "<s1> of a red cat photo"], return_tensors="pt"
    ).input_ids
    target = torch.randn(*ids.shape, 8, generator=torch.Generator().manual_seed(0))
    options = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay}
    our_optimizer, their_optimizer = (
        torch.optim.AdamW([embedding.rows], **options),
        torch.optim.AdamW([table], **options),
    )
    for _ in range(3):
        for model, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
            optimizer.zero_grad()
            (model(ids)[0] - target).square().mean().backward()
            optimizer.step()
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
    torch.testing.assert_close(
        torch.cosine_similarity(rows, before)[:4], torch.ones(4, dtype=torch.float64)
    )
    assert torch.equal(rows[4], torch.zeros(7, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"1\.5"):
        tokens.pull_norms_(rows, rate=1.5)


def test_the_std_rescale_converges_geometrically():
    """One step takes the ratio q of the standard deviations to q ** 0.9, so 1.5 is 1.152, 1.051 and
    1.002 after 10, 20 and 50.
    """
    rows = torch.randn(4, 64, dtype=torch.float64)
    rows *= 1.5 * 0.01 / rows.std()
    for step in range(1, 51):
        tokens.rescale_std_(rows, 0.01)
        assert (rows.std() / 0.01).item() == pytest.approx(1.5 ** (0.9**step), rel=1e-12)
    zeros = torch.zeros(2, 3)
    assert torch.equal(tokens.rescale_std_(zeros, 0.01), torch.zeros(2, 3))


# ---------------------------------------------------------------- the rest


def test_pooling_at_the_first_eos_is_not_the_largest_id():
    ids = torch.tensor(
        [[0, 5, 9, 9, 9], [0, 12, 3, 4, 9], [9, 1, 2, 12, 9]]
    )  # 9 ends a text, 12 is a learned token
    assert tokens.first_eos(ids, 9).tolist() == [2, 4, 0]
    with pytest.raises(ValueError, match=r"9 in row\(s\) \[1\]"):
        tokens.first_eos(torch.tensor([[0, 9], [0, 1]]), 9)


def test_pooling_agrees_with_transformers_for_a_text_of_the_vocabulary(tokenizer):
    model = encoder(tokenizer)
    ids = tokenizer(["a photo of cat", "dog"], padding="max_length", return_tensors="pt").input_ids
    out = model(ids)
    assert torch.equal(
        out.pooler_output,
        out.last_hidden_state[torch.arange(2), tokens.first_eos(ids, tokenizer.eos_token_id)],
    )


def test_state_round_trip_and_refusals(tokenizer):
    model = encoder(tokenizer)
    embedding = install_tokens(model, tokenizer, make_placeholders(["TOK"], vectors=2), seed=0)
    rows = torch.randn(2, 8)
    tokens.load_token_rows(embedding, rows)
    assert torch.equal(tokens.copy_token_rows(embedding), rows)
    with pytest.raises(UserError, match=r"\[3, 8\].*\[2, 8\]"):
        tokens.load_token_rows(embedding, torch.zeros(3, 8))
    with pytest.raises(UserError, match="<s0>, <s1> hold NaN"):
        tokens.load_token_rows(embedding, torch.full((2, 8), float("nan")))
    assert torch.equal(tokens.copy_token_rows(embedding), rows)


def test_report_names_the_nearest_words_the_norm_and_the_drift(tokenizer):
    model = encoder(tokenizer)
    embedding = install_tokens(model, tokenizer, (Placeholder("TOK", ("<s0>",), "dog"),), seed=0)
    with torch.no_grad():
        embedding.rows.mul_(3)
    (line,) = tokens.report_tokens(embedding, tokenizer, k=2)
    assert (
        line.name == "<s0>"
        and line.nearest[0][0] == "dog</w>"
        and line.nearest[0][1] == pytest.approx(1, abs=1e-6)
    )
    assert len(line.nearest) == 2 and line.nearest[1][1] < line.nearest[0][1]
    assert line.norm == pytest.approx(embedding.rows.norm().item()) and line.drift == pytest.approx(
        line.norm * 2 / 3, rel=1e-6
    )


def test_ordinary_words_leave_out_the_random_parts() -> None:
    words = {"A": "random:0.1", "B": "<rand-0.013>+red woman", "C": "dog", "D": "zero"}
    placeholders = make_placeholders(words, 2)
    expected = {"A": "", "B": "red woman", "C": "dog", "D": ""}
    assert tokens.ordinary_words(placeholders) == expected
