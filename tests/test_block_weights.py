"""Block lists of 12, 17, 20 and 26, and globs."""

from __future__ import annotations

import pytest

from lora_core.errors import UserError
from merging.block_weights import BLOCK_LISTS, BLOCKS, factor_by_block, parse_block_weights

NAMES = {  # semantics of sd-scripts
    12: "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
    17: "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID "
    "OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    20: "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 MID "
    "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08",
    26: " ".join(BLOCKS),
}


@pytest.mark.parametrize("length", BLOCK_LISTS)
def test_lists_name_their_blocks(length):
    assert [BLOCKS[i] for i in BLOCK_LISTS[length]] == NAMES[length].split() and len(
        BLOCK_LISTS[length]
    ) == length
    weights = parse_block_weights(",".join(str(i + 2) for i in range(length)))
    assert len(weights) == 26
    assert {BLOCKS[i]: weights[i] for i in BLOCK_LISTS[length]} == {
        name: i + 2.0 for i, name in enumerate(NAMES[length].split())
    }
    assert all(weights[i] == 1.0 for i in range(26) if i not in BLOCK_LISTS[length])


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
