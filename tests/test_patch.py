"""patch: a file on live networks in one call.

Undone, the very same modules, tables, tokenizer contents and outputs are back.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_core
from lora_core import formats, patch, tokens
from lora_core.adapters import injection
from lora_core.adapters.adapted_layer import Adapted
from lora_core.errors import UserError
from lora_core.formats import NATIVE, embeddings, layout_of
from lora_core.placeholders import bind_placeholders
from lora_core.tokens import LearnedEmbedding
from tests import layered_files
from tests.tiny_pipeline import DEEP_UNET, outputs, pipeline, random_state

TEXT = "a cat <s0><s1>"


@pytest.fixture
def pipe():
    return pipeline()


@pytest.fixture
def modules(pipe):
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "dog", seed=1)


def make_run(folder, *, seed, names=("<s0>", "<s1>"), word="TOK", dora=False):
    """A finished run's files: both networks and two tokens."""
    pipe = pipeline()
    state = random_state(pipe, seed=seed, dora=dora)
    state.tokens = {
        "clip_l": torch.randn(len(names), 16, generator=torch.Generator().manual_seed(seed))
    }
    state.token_names = tuple(names)
    layout = layout_of({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    formats.save_run(
        state, folder, layout=layout, metadata=embeddings.placeholder_header({word: names})
    )
    return folder


def snapshot(modules):
    """Everything that undo must give back.

    Identities of all modules and parameters, flags, and the tokenizer's answers.
    """
    networks = [module for module in modules.values() if isinstance(module, nn.Module)]
    tree, parameters = [], []
    for network in networks:
        for path, module in network.named_modules():
            tree.append((path, id(module), module.training))
        for path, p in network.named_parameters():
            parameters.append((path, id(p), p.requires_grad, p.dtype))
    tokenizer = modules["tokenizer"]
    return (
        tree,
        parameters,
        id(tokenizer),
        len(tokenizer),
        tokenizer.get_vocab(),
        tokenizer(TEXT).input_ids,
        tokenizer.backend_tokenizer.to_str(),
    )


def assert_close(a, b, tolerance=1e-5):
    assert all((x - y).abs().max() <= tolerance for x, y in zip(a, b, strict=True))


def assert_far(a, b):
    assert all((x - y).abs().max() > 1e-2 for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- on and off


def test_a_run_folder_is_denoiser_text_encoder_and_tokens_at_once_as_diffusers_has_it(
    pipe, modules, run
):
    theirs = pipeline()
    rows = load_file(run / "dog_emb.safetensors")["clip_l"]
    theirs.load_lora_weights(str(run))
    theirs.load_textual_inversion(rows, token=["<s0>", "<s1>"])
    plain = outputs(pipe, TEXT)
    with patch(modules, run) as p:
        assert p.bind("a cat TOK") == TEXT and p.report == ()
        assert_close(outputs(pipe, p.bind("a cat TOK")), outputs(theirs, TEXT))
        assert_far(outputs(pipe, TEXT), plain)
        assert not any(parameter.requires_grad for parameter in p.parameters())
    assert_close(outputs(pipe, TEXT), plain, 0)


@pytest.mark.parametrize("how", ["with", "undo", "error"])
def test_undo_gives_back_the_very_same_things(pipe, modules, run, how):
    before = snapshot(modules)
    if how == "undo":
        p = patch(modules, run, 0.5)
        assert snapshot(modules) != before and any(
            isinstance(m, Adapted) for m in pipe.unet.modules()
        )
        p.undo()
        p.undo()
    elif how == "with":
        with patch(modules, run) as p:
            p.undo()
    else:
        with pytest.raises(ZeroDivisionError), patch(modules, run):
            1 / 0  # noqa: B018
    assert snapshot(modules) == before


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("file", ["run_a/" + NATIVE, "run_a/run_a.safetensors"])
def test_a_single_file_is_the_lora_alone_in_either_format(pipe, modules, tmp_path, file, dora):
    folder, other = make_run(tmp_path / "run_a", seed=3, dora=dora), pipeline()
    layout = layout_of({"unet": other.unet, "text_encoder": other.text_encoder})
    for name, factors in formats.load(folder / NATIVE).components.items():
        injection.load_factors(
            getattr(other, name),
            {layout.module_path(name, path): lr for path, lr in factors.items()},
            "x",
            0.7,
        )
    with patch(modules, tmp_path / file, 0.7) as p:
        assert_close(outputs(pipe), outputs(other))
        assert p.report == (
            f"the learned tokens of TOK are in run_a_emb.safetensors, not in {Path(file).name}; "
            "give it too, or the run's folder",
        )
        assert len(modules["tokenizer"]) == len(other.tokenizer)
    (folder / "run_a_emb.safetensors").unlink()
    with patch(modules, tmp_path / file, 0.7) as p:
        assert p.report == (
            f"no token file beside {Path(file).name} (expected run_a_emb.safetensors), so TOK is "
            "an ordinary word",
        )


def test_strength_is_a_factor_of_the_update_by_component(pipe, modules, run):
    """proj_in of the UNet and fc1 of the text encoder: W x + t s B A x, written out."""
    state = formats.load(run)
    text, unet = (
        "encoder.layers.1.mlp.fc1",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    )
    x = torch.randn(3, 16)
    layers = {
        "text_encoder": pipe.text_encoder.get_submodule(text),
        "unet": pipe.unet.get_submodule(unet),
    }
    factors = {
        "text_encoder": state.components["text_encoder"]["text_model." + text],
        "unet": state.components["unet"][unet],
    }

    def check(strengths):
        for name, path in (("unet", unet), ("text_encoder", text)):
            lr = factors[name]
            expected = layers[name](x) + strengths[name] * lr.scale * x @ lr.down.T @ lr.up.T
            torch.testing.assert_close(
                modules[name].get_submodule(path)(x), expected, rtol=1e-5, atol=1e-5
            )

    with patch(modules, run, {"unet": 0.6, "text_encoder": -0.9}) as p:
        check({"unet": 0.6, "text_encoder": -0.9})
        p.set_strength(0.25)
        check({"unet": 0.25, "text_encoder": 0.25})
        p.set_strength({"unet": 0, "text_encoder": 2})
        check({"unet": 0, "text_encoder": 2})


def test_a_half_precision_pipeline_can_be_patched(pipe, modules, run):
    pipe.unet.to(torch.bfloat16), pipe.text_encoder.to(torch.bfloat16)
    before = snapshot(modules)
    with patch(modules, run):
        ids = pipe.tokenizer(TEXT, return_tensors="pt").input_ids
        hidden = pipe.text_encoder(ids).last_hidden_state
        assert hidden.dtype == torch.bfloat16 and hidden.isfinite().all()
    assert snapshot(modules) == before


def test_tokens_alone(pipe, modules, run):
    before = snapshot(modules)
    with patch(
        {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer},
        run / "dog_emb.safetensors",
    ):
        ids = pipe.tokenizer("<s0><s1>", add_special_tokens=False, return_tensors="pt").input_ids
        assert torch.equal(
            pipe.text_encoder.get_input_embeddings()(ids)[0],
            load_file(run / "dog_emb.safetensors")["clip_l"],
        )
    assert snapshot(modules) == before
    with pytest.raises(
        UserError, match=r"learned tokens only, which have no strength; leave 0.5 out"
    ):
        patch(modules, run / "dog_emb.safetensors", 0.5)


# ---------------------------------------------------------------- several at once


def test_several_patches_add_up_and_keep_their_own_tokens(pipe, modules, run, tmp_path):
    other = make_run(tmp_path / "cat", seed=9, names=("<c0>",), word="CAT")
    before, layer = snapshot(modules), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    base, x = pipe.unet.get_submodule(layer), torch.randn(2, 16)
    with patch(modules, run) as dog, patch(modules, other, 0.5) as cat:
        a, b = (formats.load(folder).components["unet"][layer] for folder in (run, other))
        expected = base(x) + x @ a.down.T @ a.up.T + 0.5 * x @ b.down.T @ b.up.T
        torch.testing.assert_close(
            pipe.unet.get_submodule(layer)(x), expected, rtol=1e-5, atol=1e-5
        )
        prompt = bind_placeholders("TOK and CAT", [*dog.placeholders, *cat.placeholders])
        assert prompt == "<s0><s1> and <c0>"
        ids = pipe.tokenizer(
            "<s0><s1><c0>", add_special_tokens=False, return_tensors="pt"
        ).input_ids[0]
        rows = torch.cat(
            [
                load_file(run / "dog_emb.safetensors")["clip_l"],
                load_file(other / "cat_emb.safetensors")["clip_l"],
            ]
        )
        assert torch.equal(pipe.text_encoder.get_input_embeddings()(ids), rows)
        middle = snapshot(modules)
        with pytest.raises(UserError, match="undo the later patch first"):
            dog.undo()
        assert snapshot(modules) == middle
    assert snapshot(modules) == before


def test_patches_without_tokens_come_off_in_any_order_and_a_file_can_be_on_twice(
    pipe, modules, run
):
    before, plain = snapshot(modules), outputs(pipe)
    first = patch(modules, run / NATIVE, 0.5)
    once = outputs(pipe)
    second = patch(modules, run / NATIVE, 0.25)
    assert first.name != second.name
    third = patch(modules, run / NATIVE, -0.75)
    assert_close(outputs(pipe), plain, 1e-4)
    first.undo()
    third.undo()
    assert_far(outputs(pipe), once)
    second.undo()
    assert snapshot(modules) == before


def test_renamed_tokens_of_words_for_each_layer_are_one_sentence(tmp_path):
    folder = layered_files.save_deep_folder(tmp_path)
    alone = patch(pipeline(blocks=DEEP_UNET), folder / "run" / NATIVE)
    assert len(alone.report[0]) < 300 and alone.report[0].endswith(", or the run's folder")
    state = formats.load(folder / "run", merging=True)
    names = {name: f"{name[:-1]}-2>" for name in state.token_names}
    other = pipeline(blocks=DEEP_UNET)
    with patch(other, folder / "run", rename={**names, "TOK": "CAT"}) as p:
        last = state.token_names[-1]
        renamed = f"the {len(names)} tokens <s0> to {last} of {folder / 'run'} are called"
        assert p.report == (
            f"{renamed} <s0-2> to {names[last]} here",
            f"TOK of {folder / 'run'} is called CAT here",
        )


def test_a_taken_token_is_refused_and_renaming_keeps_both(pipe, modules, run, tmp_path):
    other = make_run(tmp_path / "cat", seed=9)
    before = snapshot(modules)
    with patch(modules, run):
        middle = snapshot(modules)
        with pytest.raises(
            UserError,
            match=r"<s0>, <s1> of .*cat is already in the tokenizer.* "
            r'rename=\{"<s0>": "<other-s0>"\}',
        ):
            patch(modules, other)
        assert snapshot(modules) == middle
        with patch(modules, other, rename={"<s0>": "<c0>", "<s1>": "<c1>", "TOK": "CAT"}) as cat:
            assert cat.bind("CAT, not TOK") == "<c0><c1>, not TOK"
            assert len(cat.report) == 3 and "<s0>" in cat.report[0] and "<c0>" in cat.report[0]
            ids = pipe.tokenizer(
                "<c0><s1>", add_special_tokens=False, return_tensors="pt"
            ).input_ids[0]
            rows = [
                load_file(other / "cat_emb.safetensors")["clip_l"][0],
                load_file(run / "dog_emb.safetensors")["clip_l"][1],
            ]
            assert torch.equal(pipe.text_encoder.get_input_embeddings()(ids), torch.stack(rows))
        assert snapshot(modules) == middle
        for rename, expected in (
            ({"<s7>": "<x>"}, "no token or word <s7>"),
            ({"<s0>": "<s1>"}, "must differ"),
        ):
            with pytest.raises(UserError, match=expected):
                patch(modules, other, rename=rename)
    assert snapshot(modules) == before


# ---------------------------------------------------------------- refused before any change


def broken(run, tmp_path, kind):
    """A copy of the native file with one thing wrong, and what the sentence must say."""
    tensors, file = load_file(run / NATIVE), tmp_path / "bad.safetensors"
    key = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight"
    if kind == "truncated":
        file.write_bytes((run / NATIVE).read_bytes()[:-1])
        return file, "truncated"
    if kind == "empty":
        file.write_bytes(b"")
        return file, "empty"
    if kind == "pickle":
        torch.save({"unet.x.lora_A.weight": tmp_path}, tmp_path / "bad.pt")
        return tmp_path / "bad.pt", "pickle"
    changes = {
        "shape": ({key: torch.ones(17, 3)}, r"encoder.layers.1.self_attn.q_proj .*up \[17, 3\]"),
        "nan": ({key: tensors[key] * math.nan}, f"{key} .*NaN"),
        "leftover": (
            {key.replace("q_proj", "q_prj"): tensors[key].clone()},
            f"q_prj.*nearest known: {key}",
        ),
        "component": (
            {"text_encoder_2.text_model.x.lora_A.weight": torch.ones(1, 2)},
            "adapts text_encoder_2, but only unet, text_encoder was given",
        ),
    }
    change, expected = changes[kind]
    save_file(tensors | change, file)
    return file, expected


@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "pickle", "shape", "nan", "leftover", "component"]
)
def test_a_bad_file_touches_nothing(modules, run, tmp_path, kind):
    file, expected = broken(run, tmp_path, kind)
    before = snapshot(modules)
    with pytest.raises(UserError, match=expected) as error:
        patch(modules, file)
    assert "\n" not in str(error.value) and snapshot(modules) == before


@pytest.mark.parametrize(
    "strength, expected",
    [
        ({"unet": 1.0}, "adapts text_encoder, which has no strength"),
        ({"unet": 1, "text_encoder": 1, "vae": 1}, "a strength for vae"),
        (math.nan, "finite"),
        ({"unet": 1, "text_encoder": math.inf}, "finite"),
    ],
)
def test_a_strength_that_cannot_be_meant_is_refused(modules, run, strength, expected):
    before = snapshot(modules)
    with pytest.raises(UserError, match=expected):
        patch(modules, run, strength)
    assert snapshot(modules) == before


def test_what_the_file_needs_must_be_given(pipe, modules, run, tmp_path):
    before = snapshot(modules)
    with pytest.raises(UserError, match="text_encoder"):
        patch({"unet": pipe.unet}, run)
    with pytest.raises(UserError, match="needs a tokenizer in the modules"):
        patch({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, run)
    wide = tmp_path / "wide_emb.safetensors"
    save_file({"clip_l": torch.ones(1, 17)}, wide, {"token_names": json.dumps(["<w>"])})
    with pytest.raises(UserError, match="width 17, this text_encoder takes 16"):
        patch(modules, wide)
    assert snapshot(modules) == before


def test_a_failure_halfway_is_undone(monkeypatch, modules, run):
    before = snapshot(modules)

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tokens, "load_token_rows", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        patch(modules, run)
    assert snapshot(modules) == before


def test_the_package_exports_patch():
    assert lora_core.patch is patch and callable(lora_core.patch) and lora_core.__version__
    assert issubclass(lora_core.Patch, object) and LearnedEmbedding.__module__ == "lora_core.tokens"
