"""Every op at its example."""

from __future__ import annotations

import pytest
import torch

from lora_core.kernels import OPS, call, reference, use_kernels


@pytest.mark.parametrize("name", OPS)
def test_reference_runs_its_example_and_keeps_the_dtype(name):
    for dtype in (torch.float64, torch.bfloat16):
        args = OPS[name].example(0, dtype, "cpu")
        out = call(name, *args)
        for y in out if isinstance(out, tuple) else (out,):
            assert torch.isfinite(y).all()
            assert y.dtype == (
                reference.wide_dtype(dtype)
                if name in ("dora_norm", "dora_norms", "snr_weighted_mse")
                else dtype
            )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [name for name, op in OPS.items() if op.triton and name not in ("prodigy_step", "adamw_step")],
)
def test_triton_kernels_are_the_reference_on_a_gpu(name, dtype):
    """The example of each row: at most twice the reference's error to float64, in one dtype."""
    op, results = OPS[name], {}
    if reason := op.supports and op.supports(*op.example(0, dtype, "cuda")):
        pytest.skip(f"the kernel refuses this example: {reason}")
    for mode, kind in (("exact", torch.float64), ("reference", dtype), ("triton", dtype)):
        args = OPS[name].example(0, dtype, "cuda")
        args = torch.utils._pytree.tree_map(
            lambda a, kind=kind: (
                a.to(kind) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            ),
            args,
        )
        with use_kernels("triton" if mode == "triton" else "reference"):
            results[mode] = torch.cat(
                [y.double().flatten() for y in torch.utils._pytree.tree_leaves(call(name, *args))]
            )
    error, eager = ((results[mode] - results["exact"]).norm() for mode in ("triton", "reference"))
    assert error <= 2 * eager + 1e-6 * results["exact"].norm()
