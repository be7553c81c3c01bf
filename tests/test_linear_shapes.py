"""Which arguments the Triton kernels of adapted layers take, and the words of each refusal."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lora_core import kernels
from lora_core.kernels import OPS, reference, use_kernels
from lora_core.kernels.reference import Drop
from tests.linear_cases import one

pytestmark = pytest.mark.usefixtures("patched_once")


def test_dispatch_takes_them_and_refusals_say_why() -> None:
    x, m = one()
    with use_kernels("triton"):
        torch.testing.assert_close(
            kernels.call("lora_linear", x, *m), reference.lora_linear(x, *m), rtol=1e-5, atol=1e-5
        )
    supports = OPS["lora_linear"].supports
    assert supports is not None and supports(x, *m) is None
    assert "float64" in str(supports(x.double(), *m))
    assert "bfloat16" in str(supports(x, m.weight.bfloat16(), *m[1:]))
    trained = m.weight.detach().requires_grad_()
    assert "requires a gradient" in str(supports(x, trained, *m[1:]))
    with torch.no_grad():
        assert supports(x, trained, *m[1:]) is None
    assert "factor is bfloat16" in str(supports(x, *m[:2], m.down.bfloat16(), *m[3:]))
    assert "p = 1.0" in str(
        supports(x, *m[:-1], Drop(1.0, 1, 2, torch.tensor(3), torch.arange(12)))
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in str(supports(x, *m))
    arguments = list(OPS["lora_conv"].example())
    assert "2 groups" in str(OPS["lora_conv"].supports(*arguments))  # type: ignore[misc]
    arguments[-3:] = "same", (1, 1), 1
    assert "same" in str(OPS["lora_conv"].supports(*arguments))  # type: ignore[misc]
