"""Block lists of 12, 17, 20, 26 and 61 numbers, by the rules of A1111's extension."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_core.errors import UserError
from merging.block_weights import (
    BLOCK_LISTS,
    BLOCKS,
    STREAM_BLOCKS,
    factor_by_block,
    find_block_table,
    parse_block_weights,
)
from models.published_layouts import published_layout

NAMES = {  # in A1111's extension (where MID is M00) and in sd-scripts
    12: "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
    17: "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID "
    "OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    20: "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 MID "
    "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08",
    26: " ".join(BLOCKS),
}


PRESETS = {  # the extension's own lists, as they stand in its table
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": ",".join(["0.5"] * 17),
    "FLUXALL": ",".join(["1"] * 61),
}


@pytest.mark.parametrize("name", PRESETS)
def test_names_of_lists_mean_the_extensions_lists(name):
    assert parse_block_weights(name) == parse_block_weights(PRESETS[name])


@pytest.mark.parametrize("length", NAMES)
def test_lists_name_their_blocks(length):
    assert [BLOCKS[i] for i in BLOCK_LISTS[length]] == NAMES[length].split() and len(
        BLOCK_LISTS[length]
    ) == length
    weights = parse_block_weights(",".join(str(i + 2) for i in range(length)))
    assert len(weights) == 26
    assert {BLOCKS[i]: weights[i] for i in BLOCK_LISTS[length]} == {
        name: i + 2.0 for i, name in enumerate(NAMES[length].split())
    }
    assert all(weights[i] == 0.0 for i in range(26) if i not in BLOCK_LISTS[length])


def test_spellings():
    plain = parse_block_weights("1,0.5,-1,0,0,0,0,0,0,0,0,1e-1")
    assert plain[0] == 1 and plain[5] == 0.5 and plain[6] == -1 and plain[19] == 0.1
    assert (
        parse_block_weights("[1, 0.5, -1, 0,0,0,0,0,0,0,0, 0.1]")
        == parse_block_weights("MIDD: 1,0.5,-1,0,0,0,0,0,0,0,0,0.1")
        == plain
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1,2,3",
        "1," * 12,
        "a" + ",1" * 11,
        "NaN:" + "1," * 11 + "x",
        ",".join(["null"] * 12),
        ",".join(["[1]"] * 12),
    ],
)
def test_wrong_lists_are_one_sentence(text):
    with pytest.raises(UserError):
        parse_block_weights(text)


def test_a_list_of_another_family_is_refused():
    with pytest.raises(
        UserError, match="got 12 block weights; this model takes a list of 17 or 26"
    ):
        parse_block_weights(",".join("1" * 12), lengths=(17, 26))


def test_shares_by_block():
    weights = parse_block_weights(",".join(str(i) for i in range(17)))
    table = {"mid.0": 13, "down.1": 2, "time": None}
    share = factor_by_block(
        weights, lambda component, path: 0 if component == "text_encoder" else table[path]
    )
    assert (
        share("text_encoder", "x") == 0
        and share("unet", "mid.0") == 7
        and share("unet", "down.1") == 1
        and share("unet", "time") == 1
    )


@pytest.mark.parametrize(
    ("component", "path", "place"),
    [  # in a list of 61: the two text encoders, the embedders, 19 and 38 blocks, the last layer
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", 0),
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q", 1),
        ("transformer", "x_embedder", 2),
        ("transformer", "context_embedder", 2),
        ("transformer", "time_text_embed.text_embedder.linear_1", 2),
        ("transformer", "transformer_blocks.0.attn.to_q", 3),
        ("transformer", "transformer_blocks.0.ff_context.net.2", 3),
        ("transformer", "transformer_blocks.18.norm1.linear", 21),
        ("transformer", "single_transformer_blocks.0.attn.to_v", 22),
        ("transformer", "single_transformer_blocks.10.proj_mlp", 32),
        ("transformer", "single_transformer_blocks.37.proj_out", 59),
        ("transformer", "norm_out.linear", 60),
        ("transformer", "proj_out", 60),
    ],
)
def test_a_list_of_61_weighs_the_streams_of_flux(component, path, place):
    table = find_block_table(published_layout("flux-dev"))
    weights = parse_block_weights(",".join(str(i) for i in range(61)), table.lengths)
    assert table.lengths == (61,) and len(STREAM_BLOCKS) == 61
    assert factor_by_block(weights, table.block_of)(component, path) == place


def test_a_layout_without_such_blocks_has_no_table():
    assert find_block_table(published_layout("sdxl")).lengths == (12, 20, 26)
    flux = published_layout("flux-schnell")
    encoders = {name: part for name, part in flux.components.items() if name in flux.encoders}
    assert find_block_table(replace(flux, components=encoders)) is None
