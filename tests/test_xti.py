"""kohya's XTI files: a word whose tokens are listed layer by layer, in the order of its blocks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_core import formats
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.formats.compvis import unet_module_names
from lora_core.formats.xti import XTI_BLOCKS
from models.known import published_layout


def blocks(count: int = 2, width: int = 768) -> dict[str, Tensor]:
    """The tensors that kohya's script writes: its list of rows, block by block, in one tensor."""
    noise = torch.Generator().manual_seed(0)
    return {block: torch.randn(count, width, generator=noise) for block in XTI_BLOCKS}


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_blocks_are_the_cross_attention_layers_in_our_order(kind: str) -> None:
    layout = published_layout(kind)
    names = unet_module_names(layout.components["unet"].modules)
    heads = {"input_blocks": "IN", "output_blocks": "OUT"}
    found = []
    for path in layout.cross_attention:
        block, number, *_ = names[f"{path}.to_k"].split(".")
        found.append(f"{heads[block]}{int(number):02d}" if block in heads else "MID")
    assert tuple(found) == XTI_BLOCKS


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_file_is_a_word_with_tokens_for_each_layer(
    tmp_path: Path, ending: str, count: int
) -> None:
    tensors = blocks(count)
    state = formats.load(write(tmp_path / f"my dog{ending}", tensors), published_layout("sd1"))
    assert embeddings.word_layers(state) == {"my dog": 16}
    assert torch.equal(state.tokens["clip_l"], torch.cat(list(tensors.values())))
    names = embeddings.placeholder_words(state)["my dog"]
    assert names == state.token_names and len(names) == 16 * count
    assert names[:2] == ("<my-dog-IN01>", "<my-dog-IN01-1>" if count > 1 else "<my-dog-IN02>")
    assert formats.load(tmp_path / f"my dog{ending}").tokens.keys() == {"clip_l"}


def test_the_documented_form_keeps_the_layers(tmp_path: Path) -> None:
    state = formats.load(write(tmp_path / "dog.pt", blocks()), published_layout("sd1"))
    formats.save(state, tmp_path / "dog.safetensors", format="embeddings")
    again = formats.load(tmp_path / "dog.safetensors")
    assert torch.equal(again.tokens["clip_l"], state.tokens["clip_l"])
    assert embeddings.word_layers(again) == {"dog": 16} and again.token_names == state.token_names


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"IN08": None}, "15 blocks of a network; expected kohya's 16 .*, IN08 is missing"),
        ({"IN08": None, "IN03": torch.ones(2, 768)}, "IN03, IN08 are missing or not among"),
        ({"MID": torch.ones(1, 768)}, r"MID of .* \[1, 768\], .* \[2, 768\] as in IN01"),
        ({"OUT03": torch.ones(768)}, r"OUT03 of .* has shape \[768\]"),
        ({"OUT03": torch.full((2, 768), float("nan"))}, "NaN or Inf"),
    ],
)
def test_other_layers_and_shapes_are_one_sentence(
    tmp_path: Path, ending: str, change: dict[str, Tensor | None], said: str
) -> None:
    tensors = {name: own for name, own in (blocks() | change).items() if own is not None}
    with pytest.raises(UserError, match=said) as error:
        formats.load(write(tmp_path / f"dog{ending}", tensors))
    assert "\n" not in str(error.value)
