"""The device functions in a kernel that is not one of ours."""

from __future__ import annotations

import pytest
import torch

from lora_core.kernels import reference
from tests.kernel_checks import DEVICE

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from lora_core.kernels import device_functions, dropout  # noqa: E402

pytestmark = pytest.mark.usefixtures("patched_once")


@triton.jit
def inlined_kernel(out, step, rows, size, state, threshold, BLOCK: tl.constexpr):
    """What a kernel that drops its own tile does, as the head of dropout.py tells."""
    i, element = tl.arange(0, 4), tl.arange(0, BLOCK)
    key, second = device_functions.row_keys(state, tl.load(step), tl.load(rows + i))
    kept = device_functions.keep_elements(
        element[None, :], key[:, None], second[:, None], threshold
    )
    tl.store(
        out + i[:, None] * size + element[None, :],
        kept.to(tl.float32),
        mask=element[None, :] < size,
    )


def test_the_device_functions_serve_another_kernel() -> None:
    step, rows, x = (
        torch.tensor(9, device=DEVICE),
        torch.arange(4, device=DEVICE) - 2,
        torch.ones(4, 13, device=DEVICE),
    )
    out = torch.empty_like(x)
    inlined_kernel[(1,)](
        out, step, rows, 13, dropout.hash_stream(3, 2**31 + 5), dropout.keep_threshold(0.7), 16
    )
    assert torch.equal(
        out, (reference.keyed_dropout(x, 0.7, 3, 2**31 + 5, step, rows) != 0).float()
    )
