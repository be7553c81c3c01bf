"""Token files: every kind there is, read; ours, in diffusers and by A1111's and ComfyUI's rules."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import merge
from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import embedding_pickles, embeddings, known_formats, layout_of
from lora_core.formats.container import read_tensors, write_tensors
from lora_core.formats.pickles import read_pickle
from models import sd
from tests.adapter_checks import header
from tests.adapter_examples import save_file
from tests.tiny_pipeline import pipeline
from tests.token_examples import ONE, PAIR, ROWS, WIDE, layout_of_widths


def is_embedding(tensors):
    return known_formats.is_embedding({key: t.shape for key, t in tensors.items()})


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "tensors, encoder, names, words",
    [
        ({"emb_params": ROWS}, "clip_l", ("<cat>", "<cat>_1"), {"cat": ("<cat>", "<cat>_1")}),
        ({"emb_params": WIDE[:1]}, "clip_g", ("<cat>",), {"cat": ("<cat>",)}),
        ({"<dog>": ROWS[0]}, "clip_l", ("<dog>",), {}),
        ({"<dog>": ROWS}, "clip_l", ("<dog>", "<dog>_1"), {"<dog>": ("<dog>", "<dog>_1")}),
        ({"my dog": ROWS[:1]}, "clip_l", ("<my-dog>",), {"my dog": ("<my-dog>",)}),
        ({"<s2>": ROWS[1], "<s1>": ROWS[0]}, "clip_l", ("<s1>", "<s2>"), {}),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_a_single_tensor_is_for_the_encoder_of_its_width(
    tmp_path, tensors, encoder, names, words, pickled
):
    file = tmp_path / ("cat.bin" if pickled else "cat.safetensors")
    if pickled:
        torch.save(tensors, file)
        assert embedding_pickles.is_pickled_embedding(read_pickle(file))
        state = embedding_pickles.read_pickled_embeddings(file, PAIR)
    else:
        write_tensors(file, tensors, {"seed": "1"})
        assert is_embedding(load_file(file))
        state = embeddings.read_embeddings(*read_tensors(file), PAIR, str(file))
        assert state.metadata["seed"] == "1"
    rows = torch.cat([t.reshape(-1, t.shape[-1]) for _, t in sorted(tensors.items())])
    assert list(state.tokens) == [encoder] and torch.equal(state.tokens[encoder], rows)
    assert state.token_names == names and embeddings.placeholder_words(state) == words


@pytest.mark.parametrize(
    "tensors",
    [
        {"clip_l": ROWS, "clip_g": WIDE},
        {"text_encoders_0": ROWS, "text_encoders_1": WIDE},
        {"text_encoders_0": ROWS, "clip_g": WIDE},
    ],
)
def test_pairs_of_encoders(tmp_path, tensors):
    write_tensors(tmp_path / "e.pti", tensors, {})  # cog's .pti is a .safetensors
    torch.save(tensors, tmp_path / "e.pt")
    for state in (
        embeddings.read_embeddings(*read_tensors(tmp_path / "e.pti"), PAIR, "e"),
        embedding_pickles.read_pickled_embeddings(tmp_path / "e.pt", PAIR),
    ):
        assert (
            torch.equal(state.tokens["clip_l"], ROWS)
            and torch.equal(state.tokens["clip_g"], WIDE)
            and state.token_names == ("<s0>", "<s1>")
        )


def test_without_a_layout_the_usual_widths_decide():
    for width, encoder in ((768, "clip_l"), (1024, "clip_l"), (1280, "clip_g"), (4096, "t5")):
        assert list(
            embeddings.read_embeddings({"emb_params": torch.ones(1, width)}, {}, None, "x").tokens
        ) == [encoder]
    plain = layout_of(
        {"text_encoder": nn.ModuleDict({"a": nn.Linear(2, 2)})}
    )  # no table, no width: there is one choice
    assert list(embeddings.read_embeddings({"emb_params": ROWS}, {}, plain, "x").tokens) == [
        "clip_l"
    ]


def test_the_headers_order_of_tokens_is_kept():
    tensors = {"<s2>": ROWS[1], "<s10>": ROWS[0]}
    state = embeddings.read_embeddings(tensors, {"token_names": '["<s2>", "<s10>"]'}, ONE, "x")
    assert state.token_names == ("<s2>", "<s10>") and torch.equal(
        state.tokens["clip_l"], ROWS[[1, 0]]
    )
    with pytest.raises(UserError, match="2 rows of clip_l for 1 tokens"):
        embeddings.read_embeddings(tensors, {"token_names": '["<s2>"]'}, ONE, "x")


def test_rows_bundled_in_a_lora_are_taken_out_of_it():
    factor = torch.ones(1, 1)
    lora = {"lora_unet_x.lora_down.weight": factor}
    bundles = {
        "bundle_emb.b.clip_l": ROWS,
        "bundle_emb.b.clip_g": WIDE,
        "bundle_emb.a dog.clip_l": ROWS[:1],
        "bundle_emb.a dog.clip_g": WIDE[:1],
    }
    rest, state = embeddings.split_bundled_tokens(lora | bundles, PAIR, "x")
    assert rest == lora and state.token_names == ("<a-dog>", "<b>", "<b>_1")
    assert torch.equal(state.tokens["clip_g"], torch.cat([WIDE[:1], WIDE]))
    assert embeddings.placeholder_words(state) == {"a dog": ("<a-dog>",), "b": ("<b>", "<b>_1")}
    merged = replace(
        state,
        metadata={"token_names": '["<old>"]', "placeholders": '{"TOK": ["<old>"]}'}
        | state.metadata,
    )  # as a LoRA's header has it
    assert embeddings.placeholder_words(merged) == embeddings.placeholder_words(
        state
    ) and json.loads(merged.metadata["token_names"]) == list(state.token_names)
    for key in ("string_to_param.*", "emb_params", "<a>"):
        rest, state = embeddings.split_bundled_tokens(
            lora | {f"bundle_emb.<a>.{key}": ROWS[0]}, ONE, "x"
        )
        assert (
            torch.equal(state.tokens["clip_l"], ROWS[:1])
            and state.token_names == ("<a>",)
            and embeddings.placeholder_words(state) == {}
        )
    assert embeddings.split_bundled_tokens(lora, ONE, "x") == (lora, None)
    for more, expected in (
        (
            {"bundle_emb.b.emb_params": ROWS, "bundle_emb.b.<x>": ROWS},
            "the bundle b in x has 2 tensors",
        ),
        (
            {"bundle_emb.a.clip_l": ROWS, "bundle_emb.b.clip_g": WIDE},
            "rows for clip_g and for clip_l",
        ),
        (
            {"bundle_emb.a.clip_l": ROWS, "bundle_emb.b.emb_params": WIDE},
            "rows for clip_g and for clip_l",
        ),
    ):
        with pytest.raises(UserError, match=expected):
            embeddings.split_bundled_tokens(lora | more, PAIR, "x")


# ---------------------------------------------------------------- writing


def a1111_reader(data):
    """A1111's and ComfyUI's rule: string_to_param's first entry, else the only tensor."""
    if "string_to_param" in data:
        return next(iter(data["string_to_param"].values()))
    assert len(data) == 1
    return next(iter(data.values()))


WORD = {"placeholders": '{"TOK": ["<s0>", "<s1>"]}'}


@pytest.mark.parametrize("words", [{}, WORD])
@pytest.mark.parametrize(
    "writer", [embeddings.write_a1111, embeddings.write_textual_inversion, None]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_single_files_read_back_bit_for_bit_with_names_and_words(tmp_path, words, writer, dtype):
    state = AdapterState(
        tokens={"clip_l": ROWS.to(dtype)}, token_names=("<s0>", "<s1>"), metadata=dict(words)
    )
    file = tmp_path / "dog.pt"
    if writer is None:
        embedding_pickles.write_pickled_embedding(state, file)
        first, read, raw = (
            file.read_bytes(),
            embedding_pickles.read_pickled_embeddings(file, ONE),
            torch.load(file, weights_only=True),
        )
        embedding_pickles.write_pickled_embedding(state, file)
        assert file.read_bytes() == first and raw["name"] == "dog"
    else:
        tensors, own = writer(state, ONE, "dog")
        header = (
            state.metadata | own | {"token_names": json.dumps(state.token_names)}
        )  # as formats.save does
        write_tensors(file, tensors, header)
        raw, read = tensors, embeddings.read_embeddings(*read_tensors(file), ONE, str(file))
        assert list(raw) == (
            ["emb_params"] if writer is embeddings.write_a1111 else ["TOK" if words else "dog"]
        )
    assert torch.equal(a1111_reader(raw), state.tokens["clip_l"])
    assert (
        torch.equal(read.tokens["clip_l"], state.tokens["clip_l"])
        and read.tokens["clip_l"].dtype == dtype
    )
    assert read.token_names == state.token_names and embeddings.placeholder_words(
        read
    ) == embeddings.placeholder_words(state)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["a1111.pt", "emb_params", "learned", "learned.bin"])
def test_diffusers_loads_what_is_written(tmp_path, kind, count):
    pipe, rows = pipeline(), torch.randn(count, 16)
    own = sd.sd_layout(pipe.unet, pipe.text_encoder, {})
    names = ("<dog>",) if count == 1 else ("<dog>", "<dog>_1", "<dog>_2")
    state = AdapterState(
        tokens={"clip_l": rows},
        token_names=names,
        metadata={} if count == 1 else embeddings.placeholder_header({"<dog>": names}),
    )
    file = tmp_path / ("<dog>" + (".safetensors" if kind in ("emb_params", "learned") else ".pt"))
    if kind == "a1111.pt":
        embedding_pickles.write_pickled_embedding(state, file)
    elif kind == "learned.bin":
        torch.save(embeddings.write_textual_inversion(state, own, "x")[0], file)
    else:
        write_tensors(
            file,
            *(
                embeddings.write_a1111
                if kind == "emb_params"
                else embeddings.write_textual_inversion
            )(state, own, "x"),
        )
    pipe.load_textual_inversion(str(file), token="<dog>" if kind == "emb_params" else None)
    ids = pipe.tokenizer(
        pipe.maybe_convert_prompt("<dog>", pipe.tokenizer), add_special_tokens=False
    ).input_ids
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], rows)


@pytest.mark.parametrize(
    "write",
    [
        embeddings.write_a1111,
        embeddings.write_textual_inversion,
        lambda s, own, title: embedding_pickles.write_pickled_embedding(s, title, own),
    ],
)
def test_what_a_single_file_cannot_hold_is_refused(tmp_path, write):
    names = ("<s0>", "<s1>")
    for state, expected in (
        (
            AdapterState(tokens={"clip_l": ROWS, "clip_g": WIDE}, token_names=names),
            "rows of clip_l and clip_g, .* those of one; write the format embed",
        ),
        (
            AdapterState(
                tokens={"clip_l": ROWS},
                token_names=names,
                metadata={"placeholders": '{"A": ["<s0>"], "B": ["<s1>"]}'},
            ),
            "the words A, B",
        ),
        (
            AdapterState(
                tokens={"clip_l": ROWS},
                token_names=names,
                metadata={"placeholders": '{"A": ["<s0>"]}'},
            ),
            "the words A, <s1>",
        ),
        (AdapterState(), "rows of no encoder"),
    ):
        with pytest.raises(UserError, match=expected):
            write(state, PAIR, str(tmp_path / "x.pt"))
    assert not list(tmp_path.iterdir())


def test_diffusers_loads_the_token_rows(tmp_path, pipe_layout):
    pipe, rows = pipeline(), torch.randn(2, 16, dtype=torch.float64).float()
    words = embeddings.placeholder_header({"TOK": ("<s0>", "<s1>")})
    state = AdapterState(tokens={"clip_l": rows}, token_names=("<s0>", "<s1>"))
    (file,) = formats.save_run(state, tmp_path / "dog", layout=pipe_layout, metadata=words)
    assert file.name == "dog_emb.safetensors"
    assert json.loads(header(file)["token_names"]) == ["<s0>", "<s1>"] and json.loads(
        header(file)["placeholders"]
    ) == {"TOK": ["<s0>", "<s1>"]}
    pipe.load_textual_inversion(
        load_file(file)["clip_l"],
        token=["<s0>", "<s1>"],
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
    )
    ids = pipe.tokenizer("<s0><s1>", add_special_tokens=False).input_ids
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], rows)
    read = formats.load(tmp_path / "dog", pipe_layout)
    assert (
        torch.equal(read.tokens["clip_l"], rows)
        and read.token_names == ("<s0>", "<s1>")
        and embeddings.placeholder_words(read) == {"TOK": ("<s0>", "<s1>")}
    )


def test_t5_rows_are_found_under_both_names_and_must_agree(tmp_path):
    rows = torch.randn(1, 6)
    formats.save(
        AdapterState(tokens={"clip_l": rows, "t5": rows + 1}, token_names=("<x>",)),
        tmp_path / "a.safetensors",
        format="embeddings",
    )
    tensors = load_file(tmp_path / "a.safetensors")
    assert set(tensors) == {"clip_l", "t5", "t5xxl"} and torch.equal(
        formats.load(tmp_path / "a.safetensors").tokens["t5"], rows + 1
    )
    save_file(tensors | {"t5": rows}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="different rows under t5 and t5xxl"):
        formats.load(tmp_path / "b.safetensors")


# ---------------------------------------------------------------- refusals


def test_a_width_that_two_encoders_have_is_refused():
    with pytest.raises(
        UserError, match="width 4 and may be for clip_l or clip_g; name the encoder"
    ):
        embeddings.read_embeddings(
            {"emb_params": ROWS}, {}, layout_of_widths(clip_l=4, clip_g=4), "x"
        )
    with pytest.raises(UserError, match="width 4 and fit no encoder, their widths are 768"):
        embeddings.read_embeddings({"emb_params": ROWS}, {}, None, "x")
    with pytest.raises(UserError, match="the key more in addition to emb_params"):
        embeddings.read_embeddings({"emb_params": ROWS, "more": ROWS}, {}, ONE, "x")


def test_weights_of_networks_are_not_taken_for_tokens():
    assert not is_embedding({"down_blocks.0.weight": ROWS})
    assert not is_embedding({"<a>": torch.ones(2, 2, 2)})
    assert not is_embedding({"unet:0:up": ROWS})
    assert not is_embedding({"alpha": torch.ones(())})
    for data in ([ROWS], {}, {"a.weight": ROWS, "b": 1}):
        assert not embedding_pickles.is_pickled_embedding(data)


def test_mutated_files_are_read_or_refused_in_a_sentence():
    files = [
        ({"emb_params": ROWS}, {}),
        ({"<a>": ROWS[0], "<b>": ROWS[1]}, {}),
        ({"clip_l": ROWS, "clip_g": WIDE}, {"token_names": '["<x>", "<y>"]'}),
        ({"bundle_emb.a.clip_l": ROWS, "bundle_emb.b.string_to_param.*": ROWS}, WORD),
    ]
    dice, refused = random.Random(0), 0
    for _ in range(400):
        tensors, header = (dict(part) for part in dice.choice(files))
        for _ in range(dice.randint(1, 2)):
            key = dice.choice(list(tensors))
            tensor = tensors.pop(key)
            at = dice.randrange(len(key))
            name = key[:at] + dice.choice(["", "<", ".", "ü", "clip_g"]) + key[at + 1 :]
            tensors[dice.choice([key, name])] = dice.choice(
                [
                    tensor,
                    tensor.reshape(-1)[:-1],
                    tensor.sum(),
                    tensor.reshape(-1)[:0],
                    tensor[None],
                    tensor * float("inf"),
                ]
            )
            if dice.random() < 0.3:
                header[dice.choice(["token_names", "placeholders"])] = dice.choice(
                    ["", "[]", "null", "[" * 3000, '["<x>", "<y>"]', '{"A": 3}']
                )
        try:
            rest, bundled = embeddings.split_bundled_tokens(tensors, PAIR, "x")
            embeddings.placeholder_words(
                embeddings.read_embeddings(rest, header, PAIR, "x") if rest else bundled
            )
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 200 < refused < 400


def test_broken_token_files_are_refused(pipe_layout, tmp_path):
    rows = torch.randn(2, 16)
    for tensors, meta, expected in (
        ({"clip_l": rows, "clip_x": rows}, {}, "clip_x in addition to its token rows"),
        ({"clip_l": rows[0]}, {}, r"expected token rows \[n, d\]"),
        (
            {"clip_l": rows, "clip_g": rows},
            {},
            "token rows for clip_g; this model's encoders are clip_l",
        ),
        ({"clip_l": rows}, {"token_names": '["<a>"]'}, "2 rows of clip_l for 1 tokens"),
        ({"clip_l": rows}, {"token_names": '["<a>", "<a>"]'}, "different names"),
        ({"clip_l": rows}, {"token_names": "["}, "not JSON"),
    ):
        save_file(tensors, tmp_path / "a.safetensors", meta)
        with pytest.raises(UserError, match=expected):
            formats.load(tmp_path / "a.safetensors", pipe_layout)
    save_file({"clip_l": rows}, tmp_path / "a.safetensors")
    assert formats.load(tmp_path / "a.safetensors", pipe_layout).token_names == (
        "<s0>",
        "<s1>",
    )  # diffusers' scripts do not write names
    for entry in ('{"TOK": ["<s7>"]}', '{"TOK": []}', "[1]"):
        with pytest.raises(UserError, match="expected words and their tokens"):
            embeddings.placeholder_words(
                AdapterState(token_names=("<s0>",), metadata={"placeholders": entry})
            )


@pytest.mark.parametrize(("count", "shape"), [(1, (8,)), (2, (2, 8)), (5, (5, 8))])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_a_single_learned_row_has_one_axis(tmp_path, count, shape, ending):
    """InvokeAI takes the first size of a learned embedding for its width."""
    rows = tmp_path / "rows.safetensors"
    save_file({"clip_l": torch.randn(count, 8)}, rows)
    out = tmp_path / f"cat{ending}"
    words = ["convert", str(rows), "--out", str(out), "--to", "textual_inversion"]
    assert merge.main(words) == 0
    read = load_file if ending == ".safetensors" else torch.load
    (tensor,) = read(out).values()
    assert tuple(tensor.shape) == shape
    assert torch.equal(tensor.reshape(count, 8), load_file(rows)["clip_l"])
