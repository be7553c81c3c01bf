"""Inputs of a denoiser other than x_t: rows taken apart and put together, and sizes of images."""

import torch

from lora_core.family import Conditioning, Sizes


def test_rows_put_together_are_the_whole() -> None:
    noise = torch.Generator().manual_seed(0)
    embeds, pooled = torch.randn(5, 3, 4, generator=noise), torch.randn(5, 2, generator=noise)
    whole = Conditioning(embeds, {"pooled": pooled})
    again = Conditioning.cat([whole.rows(slice(0, 2)), whole.rows(torch.tensor([2, 3, 4]))])
    assert torch.equal(again.prompt_embeds, embeds) and torch.equal(again.extra["pooled"], pooled)


def test_zeroed_members_keep_the_rows_that_are_kept() -> None:
    whole = Conditioning(torch.ones(3, 2, 2), {"pooled": torch.ones(3, 2)})
    some = whole.zeroed(["pooled", "absent"], torch.tensor([1, 0, 1]))
    assert torch.equal(some.prompt_embeds, whole.prompt_embeds)
    assert some.extra["pooled"].tolist() == [[1, 1], [0, 0], [1, 1]]


def test_sizes_are_six_numbers_a_row() -> None:
    assert Sizes.uncropped(8, 6, 2).to_tensor("cpu").tolist() == [[8, 6, 0, 0, 8, 6]] * 2
