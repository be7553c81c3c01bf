"""What tests compare adapters by: factors bit for bit, updates, headers, a pipeline's outputs."""

import pytest
import torch
from safetensors import safe_open

from lora_core.adapters import injection
from lora_core.adapters.weight_updates import scaled_product


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def apply_state(pipe, state, layout):
    for name, modules in state.components.items():
        injection.load_factors(
            getattr(pipe, name),
            {layout.module_path(name, path): lr for path, lr in modules.items()},
            "ours",
        )


def assert_same(read, written, *, folded):
    """Bitwise, except that a folded scale has moved into up."""
    assert {c: set(m) for c, m in read.components.items()} == {
        c: set(m) for c, m in written.components.items()
    }
    for component, modules in written.components.items():
        for path, lr in modules.items():
            got = read.components[component][path]
            assert torch.equal(got.down, lr.down) and got.down.shape == lr.down.shape
            assert torch.equal(got.up, lr.up * lr.scale if folded else lr.up)
            assert got.scale == (1.0 if folded else lr.scale)
            assert (got.magnitude is None) == (lr.magnitude is None) and (
                lr.magnitude is None or torch.equal(got.magnitude, lr.magnitude)
            )


def disagreement(ours, theirs, base):
    """Largest difference, relative to what the adapter did; fails if the adapter did nothing."""
    effect = [(a - b).abs().max() for a, b in zip(theirs, base, strict=True)]
    assert min(effect) > 1e-2
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def assert_equal_states(read, written):
    """Bitwise."""
    assert {c: set(m) for c, m in read.components.items()} == {
        c: set(m) for c, m in written.components.items()
    }
    for component, modules in written.components.items():
        for path, lr in modules.items():
            got = read.components[component][path]
            assert (
                torch.equal(got.down, lr.down)
                and torch.equal(got.up, lr.up)
                and got.scale == pytest.approx(lr.scale, rel=1e-7)
            ), path
            assert (got.magnitude is None) == (lr.magnitude is None) and (
                lr.magnitude is None or torch.equal(got.magnitude, lr.magnitude)
            )


def assert_equal_updates(read, written):
    for component, modules in written.components.items():
        assert set(read.components[component]) == set(modules)
        for path, lr in modules.items():
            torch.testing.assert_close(
                scaled_product(read.components[component][path]),
                scaled_product(lr),
                rtol=1e-6,
                atol=1e-6,
            )


def assert_equal_factors(read, written):
    assert {c: set(m) for c, m in read.components.items()} == {
        c: set(m) for c, m in written.components.items()
    }
    for component, modules in written.components.items():
        for path, lr in modules.items():
            got = read.components[component][path]
            assert (
                torch.equal(got.down, lr.down) and torch.equal(got.up, lr.up) and got.scale == 1.0
            )
