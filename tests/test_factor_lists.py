"""cloneofsimo's lists of factors: written and read beside each other, nothing else is taken."""

import pytest
import torch

from lora_core.errors import UserError
from lora_core.formats import cloneofsimo, factor_lists
from tests.adapter_checks import assert_equal_factors
from tests.numbered_files import EXTENDED, TEXT, with_tokens
from tests.pickle_examples import Danger
from tests.tiny_pipeline import random_state


def test_lists_are_written_and_read_beside_each_other(pipe, layout, tmp_path):
    state = with_tokens(random_state(pipe, unet=EXTENDED, text=TEXT, scale=1.0, mixed=False))
    written = factor_lists.write_factor_lists(state, tmp_path / "my.lora.pt", layout)
    assert [file.name for file in written] == [
        "my.lora.pt",
        "my.lora.text_encoder.pt",
        "my.lora.ti.pt",
    ]
    data = torch.load(written[0], weights_only=True)
    assert (
        type(data) is list
        and factor_lists.is_factor_list(data)
        and data[0].shape == (8, 3)
        and data[1].shape == (3, 8)
    )
    assert set(torch.load(written[2], weights_only=True)) == {"<s2>", "<s10>", "<dog>"}
    read = factor_lists.read_factor_lists(written[0], layout)
    assert_equal_factors(read, state)
    assert read.token_names == ("<dog>", "<s10>", "<s2>") and torch.equal(
        read.tokens["clip_l"], state.tokens["clip_l"][[2, 1, 0]]
    )
    alone = factor_lists.read_factor_lists(written[1], layout)
    assert set(alone.components) == {"text_encoder"} and not alone.tokens
    tensors, header = cloneofsimo.write_cloneofsimo(
        read, layout, "x"
    )  # cloneofsimo's own convert, with the ranks that the factors have
    assert_equal_factors(cloneofsimo.read_cloneofsimo(tensors, header, layout, "x"), state)
    first = written[0].read_bytes()
    factor_lists.write_factor_lists(state, tmp_path / "my.lora.pt", layout)
    assert written[0].read_bytes() == first


@pytest.mark.parametrize(
    "content",
    [
        [],
        [torch.ones(8, 1)],
        {"a": 1},
        [Danger(), Danger()],
        [torch.ones(2).int()] * 2,
        [torch.full((8, 1), float("nan"))] * 2,
    ],
)
def test_what_is_no_list_of_factors_is_refused_unexecuted(layout, tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt"):
        factor_lists.read_factor_lists(tmp_path / "x.pt", layout)
