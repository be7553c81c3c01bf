"""Lists of factors added by position: the lossy formula, factor by factor, and its error."""

import pytest
import torch

from lora_core.formats.pickles import write_pickle
from merging.pt_lists import lpl_of_lists
from tests.random_adapters import randn
from tests.refusals import sentence


def save_pairs(path, *, layers=2, seed=0):
    """[up, down, up, ...] of layers [5, 7] with rank 3."""
    factors = []
    for i in range(layers):
        factors += [randn(5, 3, seed=seed + 2 * i), randn(3, 7, seed=seed + 2 * i + 1)]
    write_pickle(path, [factor.float() for factor in factors])
    return torch.load(path)


def test_factors_are_added_one_by_one(tmp_path):
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    a, b = save_pairs(first), save_pairs(second, seed=9)
    tensors, reports = lpl_of_lists(first, second, "unet", (0.7, 0.3))
    for ours, one, other in zip(tensors, a, b, strict=True):
        torch.testing.assert_close(ours, 0.7 * one + 0.3 * other)
    assert list(reports) == [("unet", "0"), ("unet", "1")]
    exact = 0.7 * a[0] @ a[1] + 0.3 * b[0] @ b[1]
    lost = float((exact - tensors[0] @ tensors[1]).norm())
    assert reports["unet", "0"].lost == pytest.approx(lost, rel=1e-5)


def test_lists_of_other_lengths_are_refused(tmp_path):
    save_pairs(tmp_path / "a.pt")
    save_pairs(tmp_path / "b.pt", layers=1)
    said = sentence(lpl_of_lists, tmp_path / "a.pt", tmp_path / "b.pt", "unet", (1.0, 1.0))
    assert "a.pt has 2 layers" in said and "b.pt 1" in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_error_is_that_of_the_rounded_factors(tmp_path, dtype):
    a = save_pairs(tmp_path / "a.pt")
    same = (tmp_path / "a.pt", tmp_path / "a.pt", "unet", (0.5, 0.5))
    tensors, reports = lpl_of_lists(*same, dtype)
    for i in range(2):
        up, down = tensors[2 * i : 2 * i + 2]
        assert up.dtype == down.dtype == dtype
        exact = a[2 * i].double() @ a[2 * i + 1].double()
        lost = float((up.double() @ down.double() - exact).norm())
        assert reports["unet", str(i)].lost == pytest.approx(lost, rel=1e-3) and lost > 1e-4


def test_factors_that_overflow_the_dtype_are_refused(tmp_path):
    write_pickle(tmp_path / "a.pt", [torch.full((5, 1), 1e5), torch.ones(1, 7)])
    same = (tmp_path / "a.pt", tmp_path / "a.pt", "unet", (0.5, 0.5))
    assert "layer 0" in sentence(lpl_of_lists, *same, torch.float16)
