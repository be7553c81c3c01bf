"""Token rows in files of torch.save: A1111's dictionaries, and what is refused unexecuted."""

import pytest
import torch

from lora_core.errors import UserError
from lora_core.formats import embedding_pickles, embeddings
from tests.pickle_examples import Danger
from tests.token_examples import A1111, ONE, PAIR, ROWS, WIDE, parameters


@pytest.mark.parametrize(
    "change", [{}, {"string_to_param": parameters(ROWS)}, {"name": None}, {"name": ""}]
)
@pytest.mark.parametrize("older", [False, True])
def test_a1111_dictionaries(tmp_path, change, older):
    torch.save(A1111 | change, tmp_path / "cat.pt", _use_new_zipfile_serialization=not older)
    state = embedding_pickles.read_pickled_embeddings(tmp_path / "cat.pt", ONE)
    word = "dog" if "name" not in change else "cat"
    assert torch.equal(state.tokens["clip_l"], ROWS) and embeddings.placeholder_words(state) == {
        word: (f"<{word}>", f"<{word}>_1")
    }


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"IN01": ROWS, "MID": ROWS, "OUT03": ROWS}, "3 blocks of a network; expected kohya's 16"),
        (A1111 | {"string_to_param": {}}, "holds 0 entries"),
        (A1111 | {"string_to_param": {"*": ROWS, "+": ROWS}}, "holds 2 entries"),
        (A1111 | {"string_to_param": Danger()}, "holds 0 entries"),
        (A1111 | {"string_to_param": {"*": ROWS * float("nan")}}, "NaN or Inf"),
        (A1111 | {"string_to_param": {"*": torch.ones(2, 2, 4)}}, r"shape \[2, 2, 4\]"),
        (
            A1111 | {"string_to_param": {"*": torch.ones(2, 5)}},
            r"width 5 and fit no encoder, their widths are 4 \(clip_l\), 6 \(clip_g\)",
        ),
        ({"<a>": Danger()}, "'<a>' in .* has type Inert"),
        ({"<a>": torch.ones(2, 4).int()}, "torch.int32; expected an embedding"),
        ({"<a>": ROWS, "<b>": WIDE}, "rows for clip_g and for clip_l"),
        ({}, "no token rows"),
        ({3: ROWS}, "3 in .* floating-point token rows"),
        ([ROWS], "holds a list, no embedding"),
        ({"a b": ROWS, "a-b": ROWS}, "different names"),
    ],
)
def test_pickles_that_are_no_plain_rows_are_refused_unexecuted(tmp_path, content, expected):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=expected) as error:
        embedding_pickles.read_pickled_embeddings(tmp_path / "x.pt", PAIR)
    assert "\n" not in str(error.value)
