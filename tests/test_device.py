"""Where Triton kernels can run: on a GPU, on the meta device, and in the interpreter."""

import pytest
import torch

from lora_core.kernels import device
from tests.kernel_checks import DEVICE

pytest.importorskip("triton")


def test_kernels_run_where_the_tests_do_and_on_meta() -> None:
    for place in (DEVICE, "meta"):
        assert device.device_refusal(torch.zeros(1, device=place)) is None


def test_a_cpu_without_the_interpreter_is_told_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreted", lambda: False)
    assert "TRITON_INTERPRET=1" in str(device.device_refusal(torch.zeros(1)))
