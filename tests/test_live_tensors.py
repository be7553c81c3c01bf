"""Bytes of living tensors: counted by hand, and against the allocator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_core.memory.live_tensors import LiveTensors, ResultShapes, tensor_bytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_computation_counted_by_hand(device: str) -> None:
    x = torch.ones(10, device=device)  # before the block: not counted
    with LiveTensors({"exp": lambda x: 1000}) as live:
        y = x * 2  # 40 bytes
        z = y.view(2, 5).exp()  # 40 more, and 1000 inside
        del y
        w = z + 1
        z.add_(1)
        assert live.live == 80
        del z, w
    assert (live.live, live.peak, live.peak_inside) == (0, 80, 1080)


def test_bytes_of_a_tree_count_a_storage_once() -> None:
    x = torch.ones(10)
    assert tensor_bytes([x, {"a": x[:2]}, torch.ones(3, dtype=torch.bfloat16)]) == 46


def test_shapes_that_are_remembered_are_torchs() -> None:
    x, w = torch.empty(3, 8, device="meta"), torch.empty(5, 8, device="meta")
    image = torch.empty(2, 4, 6, 6, device="meta").to(memory_format=torch.channels_last)
    aten = torch.ops.aten
    calls = (
        (aten.mm.default, (x, w.t()), {}),
        (aten.native_layer_norm.default, (x, [8], None, None, 1e-5), {}),
        (aten._to_copy.default, (x,), {"dtype": torch.bfloat16}),
        (aten.cat.default, ([x, x], 1), {}),
        (aten.silu.default, (image,), {}),
        (aten.native_group_norm.default, (image, None, None, 2, 4, 36, 2, 1e-5), {}),
    )
    shapes = ResultShapes()
    for func, args, kwargs in calls:
        expected = func(*args, **kwargs)
        for _ in range(2):
            assert _forms(shapes.call(func, args, kwargs)) == _forms(expected)
    assert len([own for own in shapes.known.values() if own is not None]) == len(calls)
    assert shapes.call(aten._local_scalar_dense.default, (torch.empty((), device="meta"),), {}) == 1


def _forms(out: Tensor | tuple[Tensor, ...]) -> list[tuple[object, ...]]:
    parts = out if isinstance(out, tuple) else (out,)
    return [(part.shape, part.stride(), part.dtype, part.device) for part in parts]


def test_the_peak_is_the_allocators() -> None:
    """torch's profiler counts what its CPU allocator gives and takes back. (Of convolutions it also
    counts what oneDNN allocates inside them.)
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64))
    x = torch.randn(512, 64)

    def step() -> None:
        network(x).square().mean().backward()
        network.zero_grad(set_to_none=True)

    step()
    with LiveTensors() as live:
        step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    assert live.peak == pytest.approx(allocator_peak(profile), rel=0.05)


def allocator_peak(profile: torch.profiler.profile) -> int:
    """The largest sum of the allocations that a profile has recorded, in bytes."""
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
