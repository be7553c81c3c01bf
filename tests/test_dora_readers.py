"""A DoRA by rows in A1111 and ComfyUI: their formulas, written out element by element."""

import pytest
import torch

from lora_core.adapters.weight_updates import AdapterState, LowRank, delta_weight
from lora_core.formats import dora_readers

KERNELS = [(), (1, 1), (3, 3)]


def example(kernel, *, out=5, inner=7, rank=2):
    ones = [1] * len(kernel)
    weight = torch.randn(out, inner, *kernel).double()
    down, up = torch.randn(rank, inner, *kernel), 0.3 * torch.randn(out, rank, *ones)
    return weight, LowRank(down.double(), up.double(), 0.5, torch.rand(out).double() + 0.5)


def tuned_weight(weight, lr):
    """W + delta W, entry by entry."""
    product = torch.einsum("or,ri...->oi...", lr.up.flatten(1), lr.down)
    return weight + lr.scale * product


@pytest.mark.parametrize("kernel", KERNELS)
def test_a1111_divides_by_the_norms_of_columns(kernel):
    weight, lr = example(kernel)
    tuned = tuned_weight(weight, lr)
    found = dora_readers.apply_as_a1111(lr, weight)
    for row in range(5):
        for column in range(7):
            norm = sum(float(tuned[i, column].square().sum()) for i in range(5)) ** 0.5
            wanted = tuned[row, column] * lr.magnitude[row] / norm - weight[row, column]
            torch.testing.assert_close(found[row, column], wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_comfyui_divides_by_the_norms_of_the_base(kernel):
    weight, lr = example(kernel)
    found, tuned = dora_readers.apply_as_comfyui(lr, weight), tuned_weight(weight, lr)
    for row in range(5):
        wanted = tuned[row] * lr.magnitude[row] / weight[row].norm() - weight[row]
        torch.testing.assert_close(found[row], wanted)


def test_errors_are_over_all_layers_and_vanish_where_the_norms_agree():
    weight, lr = example(())
    other, second = example((3, 3))
    errors = dora_readers.reader_errors([(lr, weight), (second, other)])
    squares, total = dict.fromkeys(dora_readers.READERS, 0.0), 0.0
    for own, base in ((lr, weight), (second, other)):
        wanted = delta_weight(own, base)
        total += float(wanted.square().sum())
        for name, apply_dora in dora_readers.READERS.items():
            squares[name] += float((apply_dora(own, base) - wanted).square().sum())
    for name, square in squares.items():
        assert errors[name] == pytest.approx((square / total) ** 0.5) and errors[name] > 1e-4
    # ComfyUI is right where delta W is orthogonal to W's rows and small: the norm is that of W
    still = LowRank(lr.down, torch.zeros_like(lr.up), 1.0, lr.magnitude)
    assert dora_readers.reader_errors([(still, weight)])["ComfyUI"] < 1e-12
    assert dora_readers.reader_errors([]) == {"A1111": 0.0, "ComfyUI": 0.0}


def test_the_sentence_has_the_errors_of_the_file_or_measured_ones():
    own = dora_readers.describe_reader_errors({"A1111": 5.26, "ComfyUI": 0.108})
    assert "of this one the update is wrong by 526 % in A1111 and 10.8 % in ComfyUI" in own
    measured = dora_readers.describe_reader_errors()
    assert "was wrong by 187 to 543 % in A1111 and 10 to 12 % in ComfyUI" in measured


def test_only_rows_are_applied_otherwise():
    _, lr = example(())
    columns = lr._replace(magnitude=torch.rand(1, 7))
    for layer, is_wrong in ((lr, True), (columns, False), (lr._replace(magnitude=None), False)):
        assert dora_readers.has_row_dora(AdapterState({"unet": {"a": layer}})) is is_wrong
