"""cloneofsimo's index-keyed files: written and read back, damaged, and the one real file.

diffusers' loaders run on the files made of it.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank, scaled_product
from lora_core.errors import UserError
from lora_core.formats import cloneofsimo, diffusers, factor_lists, kohya, layout_of
from lora_core.formats.container import read_tensors, write_tensors
from models import sd
from tests.adapter_checks import assert_equal_factors
from tests.adapter_examples import meta_sd15
from tests.numbered_files import EXTENDED, PLAIN, TEXT, old_order, walk, with_tokens
from tests.tiny_pipeline import pipeline, random_state

DISNEY = (
    Path(__file__).parents[2] / "shared" / "data" / "lora_disney.safetensors"
)  # next to the checkout, where there is one


# ---------------------------------------------------------------- written and read back


@pytest.mark.parametrize(
    "patterns", [PLAIN, EXTENDED, ("*attn2.to_k", "*attn2.to_v"), ("*resnets.0.conv1",)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_written_files_have_the_older_order_and_read_back_bit_for_bit(
    layout, tmp_path, patterns, dtype
):
    """Of layers in the order of their names, as files of other formats have them."""
    pipe = pipeline()
    state = random_state(pipe, mixed=True, unet=patterns, text=TEXT, scale=0.5)
    state = AdapterState(
        {
            c: {p: m[p]._replace(up=m[p].up.to(dtype), down=m[p].down.to(dtype)) for p in sorted(m)}
            for c, m in state.components.items()
        }
    )
    folded = AdapterState(
        {
            c: {p: lr._replace(up=lr.up * lr.scale, scale=1.0) for p, lr in m.items()}
            for c, m in state.components.items()
        }
    )
    tensors, header = cloneofsimo.write_cloneofsimo(state, layout, "x")
    write_tensors(tmp_path / "x.safetensors", tensors, header)
    assert_equal_factors(
        cloneofsimo.read_cloneofsimo(*read_tensors(tmp_path / "x.safetensors"), layout, "x"), folded
    )
    layers = nn.Linear if "ResnetBlock2D" not in header["unet"] else (nn.Linear, nn.Conv2d)
    paths = walk(old_order(pipe.unet), json.loads(header["unet"]), layers)
    assert sum(key.startswith("unet:") for key in tensors) == 2 * len(
        paths
    )  # every layer of the classes, its readers count them
    for i, path in enumerate(paths):
        up, down = tensors[f"unet:{i}:up"], tensors[f"unet:{i}:down"]
        shape = layout.components["unet"].shapes[path]
        assert (
            down.shape[1:] == shape[1:]
            and up.shape[0] == shape[0]
            and header[f"unet:{i}:rank"] == str(len(down))
        )
        if path in folded.components["unet"]:
            assert torch.equal(up, folded.components["unet"][path].up) and up.dtype == dtype
        else:
            assert not up.any() and not down.any()


# ---------------------------------------------------------------- the real file


@pytest.fixture(scope="module")
def full():
    """Stable Diffusion 1.5's networks at full size whose weights are one zero each, repeated.

    Loaders see shapes, memory stays empty.
    """
    unet, text = meta_sd15()
    for module in (*unet.modules(), *text.modules()):
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    zero = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    store[name] = (
                        nn.Parameter(zero, requires_grad=False)
                        if store is module._parameters
                        else zero
                    )
    return unet, text, sd.sd_layout(unet, text, {})


@pytest.fixture(scope="module")
def disney(full):
    if not DISNEY.exists():
        pytest.skip(f"{DISNEY} is not on this machine")
    tensors, header = read_tensors(DISNEY)
    return tensors, header, cloneofsimo.read_cloneofsimo(tensors, header, full[2], str(DISNEY))


def test_the_real_file_fits_its_model(full, disney):
    layout, state = full[2], disney[2]
    assert {component: len(modules) for component, modules in state.components.items()} == {
        "unet": 144,
        "text_encoder": 48,
    }
    for component, modules in state.components.items():
        for path, lr in modules.items():
            assert (
                lr.rank == 1
                and (lr.up.shape[0], lr.down.shape[1]) == layout.components[component].shapes[path]
            )
    assert state.token_names == ("<s1>", "<s2>") and [
        round(n, 4) for n in state.tokens["clip_l"].norm(dim=1).tolist()
    ] == [0.4107, 0.4110]
    assert set(state.metadata) == {
        "token_names"
    }  # what numbers meant is not carried into other formats
    paths = list(state.components["unet"])  # semantics of the published files, written out
    block = "up_blocks.1.attentions.0.transformer_blocks.0."
    assert paths[6 * 9 : 7 * 9] == [
        block + rest
        for rest in (
            *(f"attn1.to_{x}" for x in ("q", "k", "v", "out.0")),
            "ff.net.0.proj",
            *(f"attn2.to_{x}" for x in ("q", "k", "v", "out.0")),
        )
    ]
    assert all(path.startswith("mid_block.") for path in paths[135:])
    assert [path.split(".")[-1] for path in list(state.components["text_encoder"])[4:8]] == [
        "k_proj",
        "v_proj",
        "q_proj",
        "out_proj",
    ]


def test_the_real_file_is_written_back_bit_for_bit(full, disney, tmp_path):
    tensors, header, state = disney
    again, own = cloneofsimo.write_cloneofsimo(state, full[2], "x")
    assert again.keys() == tensors.keys() and all(
        torch.equal(again[key], tensors[key]) for key in tensors
    )
    assert own.keys() == header.keys() and all(
        own[key] == header[key] for key in header if key != "unet"
    )
    assert set(json.loads(own["unet"])) == set(json.loads(header["unet"]))
    factor_lists.write_factor_lists(state, tmp_path / "disney.pt", full[2])
    read = factor_lists.read_factor_lists(tmp_path / "disney.pt", full[2])
    assert_equal_factors(read, state)
    assert (
        torch.equal(read.tokens["clip_l"], state.tokens["clip_l"])
        and read.token_names == state.token_names
    )


def test_the_real_file_does_not_fit_the_newer_order(full, disney):
    tensors, header, _ = disney
    layout = full[2]
    unet = layout.components["unet"]
    newer = replace(unet, numbering=replace(unet.numbering, orders=unet.numbering.orders[1:]))
    expected = (
        r"unet:4 of x has up \[2560, 1\] and down \[1, 320\], which fits no order of the layers, "
        r".*attn2.to_q \[320, 320\] would be the nearest"
    )
    with pytest.raises(UserError, match=expected):
        cloneofsimo.read_cloneofsimo(
            tensors, header, replace(layout, components={**layout.components, "unet": newer}), "x"
        )


@pytest.mark.parametrize("format", [diffusers, kohya])
def test_diffusers_loads_the_converted_real_file_to_the_same_updates(
    full, disney, tmp_path, format
):
    """diffusers' and peft's own code from file to delta W, on networks of full size."""
    (unet, text, layout), state, name = full, disney[2], format.__name__.rpartition(".")[2]
    write_tensors(tmp_path / "x.safetensors", *getattr(format, f"write_{name}")(state, layout, "x"))
    tensors, alphas = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path / "x.safetensors"), unet_config=unet.config
    )[:2]
    StableDiffusionPipeline.load_lora_into_unet(
        tensors, network_alphas=alphas, unet=unet, adapter_name=name
    )
    StableDiffusionPipeline.load_lora_into_text_encoder(
        tensors, network_alphas=alphas, text_encoder=text, adapter_name=name, prefix="text_encoder"
    )
    for component, network, count in (("unet", unet, 144), ("text_encoder", text, 48)):
        loaded = {
            path: module
            for path, module in network.named_modules()
            if name in getattr(module, "lora_A", ())
        }
        assert len(loaded) == count
        for path, lr in state.components[component].items():
            layer = loaded[layout.module_path(component, path)]
            assert torch.equal(layer.lora_A[name].weight, lr.down) and torch.equal(
                layer.lora_B[name].weight * layer.scaling[name], lr.up * lr.scale
            )
        torch.testing.assert_close(
            layer.get_delta_weight(name), scaled_product(lr), rtol=1e-6, atol=0
        )


# ---------------------------------------------------------------- tokens


def test_tokens_keep_names_and_rows_and_their_order_where_the_header_has_it(pipe, layout):
    state = with_tokens(random_state(pipe, unet=PLAIN, text=TEXT, scale=1.0))
    tensors, header = cloneofsimo.write_cloneofsimo(state, layout, "x")
    assert [key for key, value in header.items() if value == "<embed>"] == [
        "<s2>",
        "<s10>",
        "<dog>",
    ] and tensors["<s2>"].shape == (16,)
    read = cloneofsimo.read_cloneofsimo(tensors, header | {"seed": "1"}, layout, "x")
    assert read.token_names == ("<dog>", "<s10>", "<s2>") and torch.equal(
        read.tokens["clip_l"], state.tokens["clip_l"][[2, 1, 0]]
    )
    assert read.metadata["seed"] == "1"
    read = cloneofsimo.read_cloneofsimo(
        tensors, header | {"token_names": '["<s2>", "<s10>", "<dog>"]'}, layout, "x"
    )
    assert read.token_names == state.token_names and torch.equal(
        read.tokens["clip_l"], state.tokens["clip_l"]
    )


# ---------------------------------------------------------------- refusals


def one(path, *, rank=1, shape=(8, 8), dora=False):
    return {
        path: LowRank(
            torch.ones(rank, *shape[1:]),
            torch.ones(shape[0], rank),
            1.0,
            torch.ones(shape[0]) if dora else None,
        )
    }


TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "state, expected",
    [
        (
            AdapterState({"unet": one(TO_Q) | one("time_embedding.linear_1")}),
            "unet.time_embedding.linear_1 has no number in cloneofsimo's format",
        ),
        (
            AdapterState({"text_encoder": one("text_model.encoder.layers.0.mlp.fc1")}),
            "fc1 has no number .* holds layers of CLIPAttention only",
        ),
        (AdapterState({"unet": one("nowhere")}), "no Linear or Conv2d named nowhere"),
        (AdapterState({"unet": one(TO_Q, dora=True)}), "to_q is a DoRA"),
        (
            AdapterState(dense={"unet": {TO_Q: DenseUpdate("LoHa", (8, 8), {})}}),
            "to_q is a LoHa update",
        ),
        (
            AdapterState({"unet": one(TO_Q, rank=9)}),
            "to_q has rank 9, cloneofsimo's reader takes 8 at most",
        ),
        (
            AdapterState({"unet": one(TO_Q)}, {"clip_l": torch.ones(1, 16)}, ("a:b",)),
            "token a:b reads like a factor .* <a-b>",
        ),
        (
            AdapterState({"unet": one(TO_Q)}, {"clip_l": torch.ones(1, 16)}, ("unety",)),
            "token unety reads like a factor",
        ),
        (
            AdapterState({"unet": one(TO_Q)}, {"clip_g": torch.ones(1, 16)}, ("<s1>",)),
            "rows of clip_g have no place",
        ),
        (AdapterState({"transformer": one(TO_Q)}), "not of transformer"),
    ],
)
def test_what_has_no_place_is_refused_by_name(layout, tmp_path, state, expected):
    for write in (
        lambda: cloneofsimo.write_cloneofsimo(state, layout, "x"),
        lambda: factor_lists.write_factor_lists(state, tmp_path / "x.pt", layout),
    ):
        with pytest.raises(UserError, match=expected) as error:
            write()
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_layout_that_numbers_its_layers_is_needed(pipe, layout):
    tensors, header = cloneofsimo.write_cloneofsimo(
        random_state(pipe, unet=PLAIN, text=()), layout, "x"
    )
    with pytest.raises(
        UserError,
        match="cloneofsimo's index-keyed format, whose numbers mean layers of a model's layout",
    ):
        cloneofsimo.read_cloneofsimo(tensors, header, None, "x")
    with pytest.raises(
        UserError,
        match="cloneofsimo's index-keyed format numbers the layers of no network of this model",
    ):
        cloneofsimo.read_cloneofsimo(tensors, header, layout_of({"unet": pipe.unet}), "x")


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            {"unet:0:up": torch.ones(9, 3)},
            r"unet:0 of x has up \[9, 3\] and down \[3, 8\], which fits no order",
        ),
        ({"unet:0:down": None}, "no unet:0:down"),
        ({"unet:7:up": None, "unet:7:down": None}, "no unet:7:up"),
        (
            {"unet:36:up": torch.ones(8, 3), "unet:36:down": torch.ones(3, 8)},
            "37 layers for unet, expected 36;",
        ),
        ({"unet:007:up": torch.ones(8, 3)}, "unet:7:up twice"),
        ({"odd": torch.ones(2)}, "the key odd, neither"),
        ({"vae:0:up": torch.ones(8, 3), "vae:0:down": torch.ones(3, 8)}, "not of vae"),
        ({"<s1>": torch.ones(2, 16)}, r"token <s1> in x has shape \[2, 16\]"),
        ({"<s1>": torch.ones(4)}, "width 4, the model's text_encoder 16"),
        ({"header unet": "{"}, "expected a JSON list"),
        ({"header unet": '["Nonsense"]'}, "class Nonsense in unet"),
        ({"header unet": '["CLIPAttention"]'}, "expected 0"),
        ({"header token_names": '["<x>"]'}, "its header names <x>"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(pipe, layout, change, expected):
    tensors, header = cloneofsimo.write_cloneofsimo(
        with_tokens(random_state(pipe, unet=PLAIN, text=()), ("<s1>",)), layout, "x"
    )
    assert sum(key.endswith(":up") for key in tensors) == 36
    header = {
        **header,
        **{
            key.removeprefix("header "): value
            for key, value in change.items()
            if key.startswith("header ")
        },
    }
    tensors = {
        key: t
        for key, t in (tensors | change).items()
        if t is not None and not key.startswith("header ")
    }
    with pytest.raises(UserError, match=expected) as error:
        cloneofsimo.read_cloneofsimo(tensors, header, layout, "x")
    assert "\n" not in str(error.value)


def test_mutated_files_are_read_or_refused_in_a_sentence(pipe, layout):
    good, header = cloneofsimo.write_cloneofsimo(
        with_tokens(random_state(pipe, unet=PLAIN, text=TEXT)), layout, "x"
    )
    dice, refused = random.Random(0), 0
    for _ in range(300):
        tensors, meta = dict(good), dict(header)
        for _ in range(dice.randint(1, 2)):
            key = dice.choice(list(tensors))
            name = (
                key[: (at := dice.randrange(len(key)))]
                + dice.choice(["", "9", ":", "ü", "unet"])
                + key[at + 1 :]
            )
            action = dice.randrange(5)
            if action < 3:
                tensor = tensors.pop(key)
                tensors |= [
                    {name: tensor},
                    {},
                    {key: tensor[None] if dice.random() < 0.5 else tensor[..., :-1]},
                ][action]
            else:
                entry = dice.choice(list(meta))
                meta.pop(entry) if action == 3 else meta.update(
                    {
                        entry: dice.choice(
                            ["", "[]", "[1]", "null", "<embed>", "[" * 3000, '["GEGLU"]']
                        )
                    }
                )
        try:
            cloneofsimo.read_cloneofsimo(tensors, meta, layout, "x")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 150


def test_the_real_cloneofsimo_file_is_refused_for_a_model_without_its_numbers(pipe_layout):
    if not DISNEY.exists():
        pytest.skip(f"{DISNEY} is not on this machine")
    with pytest.raises(UserError, match="cloneofsimo's index-keyed format"):
        formats.load(DISNEY, pipe_layout)
