"""ED-LoRA files of Mix-of-Show, as its trainer writes them and as its loader reads them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_core import formats
from lora_core.adapters.patch import patch
from lora_core.adapters.weight_updates import LowRank, delta_weight
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.formats.layout import layout_of
from lora_core.formats.mixofshow import concept_names
from lora_core.placeholders import bind_layers
from merging.adapter_sums import layers_by_key
from tests.layered_files import (
    LAYERS,
    WORDS,
    deep_layout,
    deep_pipeline,
    layered_state,
    save_deep_folder,
)
from tests.merge_commands import call, deltas
from tests.tiny_pipeline import outputs, pipeline, random_state

PIPE = pipeline()
LAYOUT = layout_of({"unet": PIPE.unet, "text_encoder": PIPE.text_encoder})


def file(path, state, concepts=()):
    """What torch.save of Mix-of-Show's trainer leaves: 1x1 factors as convolutions, no scale."""
    own = {}
    for name, modules in state.components.items():
        own[name] = {}
        for key, lr in modules.items():
            own[name] |= {f"{key}.lora_down.weight": lr.down, f"{key}.lora_up.weight": lr.up}
    rows = {
        concept: torch.randn(16, 16, generator=torch.Generator().manual_seed(i))
        for i, concept in enumerate(concepts)
    }
    torch.save({"params": {"new_concept_embedding": rows, **own}}, path)
    return rows


def test_factors_and_rows_are_read(tmp_path):
    state = random_state(PIPE, scale=1.0, unet=("*attn?.to_*",), text=("*self_attn*proj",))
    rows = file(tmp_path / "edlora.pth", state, ["<dog1>", "<dog2>"])
    found = formats.load(tmp_path / "edlora.pth", LAYOUT)
    assert {n: set(m) for n, m in found.components.items()} == {
        n: set(m) for n, m in state.components.items()
    }
    for name, modules in state.components.items():
        for path, lr in modules.items():
            torch.testing.assert_close(
                delta_weight(found.components[name][path]), delta_weight(lr), rtol=0, atol=0
            )
    assert torch.equal(found.tokens["clip_l"], torch.cat(list(rows.values())))
    assert (
        found.token_names[0] == "<new0>"
        and found.token_names[16] == "<new16>"
        and len(found.token_names) == 32
    )


def test_it_acts_and_its_rows_belong_to_layers(tmp_path):
    pipe = deep_pipeline()
    state = random_state(pipe, scale=1.0, unet=("*attn?.to_*",), text=())
    file(tmp_path / "edlora.pth", state, ["<dog1>"])
    modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    before = outputs(pipe)[0]
    with patch(modules, tmp_path / "edlora.pth", layout=deep_layout(pipe)) as p:
        assert (outputs(pipe)[0] - before).abs().max() > 1e-3
        assert p.placeholders[0].layers == 16
        assert bind_layers("a <dog1>", p.placeholders)[3] == "a <new3>"
        assert "<new3>" in pipe.tokenizer.get_vocab()
    assert torch.equal(outputs(pipe)[0], before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda p: p["unet"].update(
                {
                    "nowhere.lora_down.weight": torch.ones(1, 2),
                    "nowhere.lora_up.weight": torch.ones(2, 1),
                }
            ),
            "nearest known",
        ),
        (lambda p: p["unet"].popitem(), "is not a factor of a pair"),
        (lambda p: p["new_concept_embedding"].update({"<a>": torch.ones(3)}), "has no rows"),
        (
            lambda p: p["new_concept_embedding"].update(
                {"<a>": torch.full((16, 16), float("nan"))}
            ),
            "NaN or Inf",
        ),
    ],
)
def test_damage_is_one_sentence(tmp_path, change, said):
    file(tmp_path / "x.pth", random_state(PIPE, unet=("*attn1.to_q",), text=()), ["<dog1>"])
    data = torch.load(tmp_path / "x.pth", weights_only=True)
    change(data["params"])
    torch.save(data, tmp_path / "x.pth")
    with pytest.raises(UserError, match=said):
        formats.load(tmp_path / "x.pth", LAYOUT)


# ---------------------------------------------------------------- writing


@pytest.fixture(scope="module")
def deep():
    return deep_pipeline()


@pytest.fixture
def written(deep, tmp_path: Path):
    """(state, what torch.load reads of its file)."""
    state = layered_state(deep)
    formats.save(state, tmp_path / "x.pth", format="mixofshow", layout=deep_layout(deep))
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    assert list(content) == ["params"]
    assert list(content["params"]) == ["new_concept_embedding", "text_encoder", "unet"]
    return state, content["params"]


def loaded_update(params: dict[str, dict[str, Tensor]], component: str, path: str) -> Tensor:
    """The update of a weight by the loader's rule: all axes of size 1 of convolutions removed."""
    down = params[component][f"{path}.lora_down.weight"].double()
    up = params[component][f"{path}.lora_up.weight"].double()
    if down.ndim == 4:
        return (up.squeeze() @ down.squeeze())[..., None, None]
    return up @ down


def test_the_loader_finds_the_same_updates(written) -> None:
    """Of ranks 1 to 3 and scales 0.5 and 1, in linear layers and 1 x 1 convolutions."""
    state, params = written
    layers = layers_by_key(state)
    keys = [*params["unet"], *params["text_encoder"]]
    assert len(keys) == 2 * len(layers)
    for (component, path), lr in layers.items():
        update = delta_weight(lr).double()
        error = (loaded_update(params, component, path) - update).abs().max()
        # the scale's product and `delta_weight` itself round to fp32: an error of three roundings
        assert error <= 3 * 2**-24 * float(lr.up.abs().amax() * lr.down.abs().amax() * lr.rank)


def test_a_concept_has_one_row_in_each_layer(written) -> None:
    state, params = written
    rows, concepts = state.tokens["clip_l"], params["new_concept_embedding"]
    assert list(concepts) == ["<dog1>", "<dog2>", "<TOK>", "<cat>"]
    own = rows[: 2 * LAYERS].unflatten(0, (LAYERS, 2))
    assert torch.equal(concepts["<dog1>"], own[:, 0]) and torch.equal(concepts["<dog2>"], own[:, 1])
    assert torch.equal(concepts["<TOK>"], rows[2 * LAYERS : 3 * LAYERS])
    assert torch.equal(concepts["<cat>"], rows[3 * LAYERS :]) and len(concepts["<cat>"]) == 1
    tensors = [*concepts.values(), *params["unet"].values(), *params["text_encoder"].values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_a_file_of_the_trainer_is_written_back_bit_for_bit(tmp_path: Path, deep) -> None:
    state = random_state(deep, rank=4, scale=1.0, unet=("*attn?.to_*", "*.proj_in"))
    file(tmp_path / "theirs.pth", state, ["<dog1>", "<dog2>"])
    layout = deep_layout(deep)
    found = formats.load(tmp_path / "theirs.pth", layout)
    formats.save(found, tmp_path / "ours.pth", format="mixofshow", layout=layout)
    one, other = [
        torch.load(tmp_path / f"{name}.pth", weights_only=True)["params"]
        for name in ("theirs", "ours")
    ]
    for name, table in one.items():
        assert list(table) == list(other[name])
        assert all(torch.equal(tensor, other[name][key]) for key, tensor in table.items())
    again = formats.load(tmp_path / "ours.pth", layout)
    assert again.metadata == found.metadata and again.token_names == found.token_names


def test_names_of_concepts_are_never_parts_of_each_other(deep) -> None:
    """The source replaces them in prompts wherever they stand; its fusion wants < >."""
    words = {"TOK": (1, LAYERS), "TOK2": (1, LAYERS), "my dog": (2, LAYERS), "<a>": (1, 0)}
    assert concept_names(layered_state(deep, words)) == {
        "TOK": ("<TOK>",),
        "TOK2": ("<TOK2>",),
        "my dog": ("<my-dog1>", "<my-dog2>"),
        "<a>": ("<a>",),
    }


def broken(deep, kind: str):
    state = layered_state(deep)
    unet = dict(state.components["unet"])
    path, lr = next(iter(unet.items()))
    if kind == "dora":
        unet[path] = lr._replace(magnitude=torch.ones(len(lr.up)))
    if kind == "layer":
        unet["time_embedding.linear_1"] = lr
    if kind == "convolution":
        unet["down_blocks.0.attentions.0.proj_in"] = LowRank(
            torch.ones(2, 8, 3, 3), torch.ones(8, 2, 1, 1), 1.0
        )
    changes = {
        "network": {"components": {"transformer": unet}},
        "encoder": {"tokens": state.tokens | {"clip_g": state.tokens["clip_l"]}},
        "no concept": {"tokens": {}, "token_names": (), "metadata": {}},
        "names": {"metadata": embeddings.placeholder_header({"<s>": ["<s0>"], "s": ["<s1>"]})},
        "number": {"metadata": embeddings.placeholder_header(
            {"TOK": list(state.token_names[:8])}, {"TOK": 4})},
    }  # fmt: skip
    return replace(state, **changes.get(kind, {"components": {"unet": unet}}))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("dora", "is a DoRA; merge.py convert --as lora"),
        ("layer", "unet.time_embedding.linear_1 is a layer that Mix-of-Show's loader passes over"),
        ("convolution", "larger than 1 x 1"),
        ("network", "one text_encoder, not a transformer"),
        ("encoder", "these are of clip_l and clip_g"),
        ("no concept", "its loader needs a concept"),
        ("names", "two words would be the concept <s>"),
        ("number", "tokens for 16 layers, TOK has them for 4"),
    ],
)
def test_what_the_loader_would_pass_over_is_refused(tmp_path, deep, kind, said) -> None:
    with pytest.raises(UserError, match=said) as error:
        formats.save(broken(deep, kind), tmp_path / "x.pth", format="mixofshow")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_model_of_other_layers_and_another_ending_are_refused(tmp_path, deep) -> None:
    state = layered_state(deep, {"cat": (1, 0)})
    shallow = replace(LAYOUT, cross_attention=("a", "b"))
    with pytest.raises(UserError, match="the model has 2 cross-attention layers"):
        formats.save(state, tmp_path / "x.pth", format="mixofshow", layout=shallow)
    with pytest.raises(UserError, match=r"such files end in \.pth"):
        formats.save(state, tmp_path / "x.pt", format="mixofshow", layout=deep_layout(deep))


# ---------------------------------------------------------------- commands


@pytest.fixture
def folder(deep_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for file in deep_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deep_folder(tmp_path_factory.mktemp("deep"))


def test_convert_writes_and_reads_it(folder: Path, deep, capsys) -> None:
    call("convert", "run", "x.pth", "--model", "model")
    said = capsys.readouterr()
    assert "<dog> is <dog1> <dog2> in Mix-of-Show's prompts" in said.err
    assert "TOK is <TOK> in Mix-of-Show's prompts" in said.err and "written: x.pth" in said.out
    call("convert", "x.pth", "y.safetensors", "--model", "model")
    first, last = [formats.load(name, deep_layout(deep)) for name in ("run", "x.pth")]
    updates = deltas(last)
    for key, update in deltas(first).items():
        torch.testing.assert_close(updates[key], update, rtol=0, atol=1e-6)
    rows = embeddings.word_layers(formats.load("y_emb.safetensors"))
    assert rows == {"<dog1>": LAYERS, "<dog2>": LAYERS, "<TOK>": LAYERS}
    capsys.readouterr()
    call("info", "x.pth", "--model", "model")
    assert "1 for each of 16 cross-attention layers (P+)" in capsys.readouterr().out


def test_mixes_keep_the_layers_and_rename_the_words(folder: Path, deep, capsys) -> None:
    call("mix", "0.5*a.pth + 0.5*b.pth", "--out", "c.pth", "--model", "model")
    assert "<dog1> of b.pth is called <dog1-2> in the result" in capsys.readouterr().err
    layout = deep_layout(deep)
    a, b, c = [formats.load(f"{name}.pth", layout) for name in "abc"]
    words = ("<dog1>", "<dog2>", "<dog1-2>", "<dog2-2>")
    assert embeddings.word_layers(c) == dict.fromkeys(words, LAYERS)
    assert torch.equal(c.tokens["clip_l"], torch.cat([a.tokens["clip_l"], b.tokens["clip_l"]]))
    own = deltas(a), deltas(b)
    for key, update in deltas(c).items():
        expected = 0.5 * own[0][key] + 0.5 * own[1][key]
        torch.testing.assert_close(update, expected, rtol=0, atol=1e-6)
    call("mix", "a.pth + b.pth", "--out", "d.safetensors", "--model", "model")
    assert formats.detect_format("d.safetensors") == "diffusers"
    assert embeddings.word_layers(formats.load("d_emb.safetensors")) == dict.fromkeys(words, LAYERS)


@pytest.mark.parametrize("to", ["a1111", "textual_inversion", "cloneofsimo"])
def test_formats_without_layers_refuse_such_words(folder: Path, to: str, capsys) -> None:
    call("convert", "a.pth", "x.safetensors", "--to", to, "--model", "model", status=2)
    said = capsys.readouterr().err
    assert "write the format embeddings" in said and not Path("x.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("x.safetensors", "--to", "mixofshow"), "a file of the format mixofshow ends in .pth"),
        (("x.pth", "--to", "kohya"), "a file of the format kohya ends in .safetensors"),
    ],
)
def test_its_ending_is_pth(folder: Path, words: tuple[str, ...], said: str, capsys) -> None:
    call("convert", "a.pth", *words, "--model", "model", status=2)
    assert said in capsys.readouterr().err


def test_words_alone_have_a_file_too(folder: Path) -> None:
    call("convert", "run/run_emb.safetensors", "x.pth", "--to", "mixofshow", "--model", "model")
    params = torch.load("x.pth", weights_only=True)["params"]
    assert list(params["new_concept_embedding"]) == ["<dog1>", "<dog2>", "<TOK>", "<cat>"]
    assert params["unet"] == params["text_encoder"] == {}
    assert set(WORDS) == {"<dog>", "TOK", "cat"}
