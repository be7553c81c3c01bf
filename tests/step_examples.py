"""Steps of Prodigy and AdamW on their ops' examples, in one mode of the kernels or another."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from lora_core import kernels
from lora_core.kernels import OPS, steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def example(name: str, dtype: torch.dtype, **changes) -> tuple:
    """The op's example with other settings; the same numbers in every dtype."""
    if name == "adamw_step":
        args = OPS[name].example(3, dtype, DEVICE)
        return *args[:-1], args[-1]._replace(**changes)
    scalars, found_inf, grad_scale, groups = OPS[name].example(3, dtype, DEVICE)
    changed = tuple(change_settings(group, **changes) for group in groups)
    return scalars, found_inf, grad_scale, changed


def change_settings(group: steps.MovingGroup, **changes) -> steps.MovingGroup:
    """The group with other settings and the state that belongs to them."""
    settings, flat = group.settings._replace(**changes), group.flat
    states = []
    for p, (_, _, old) in zip(flat.params, flat.iterate_tensors(flat.params)):
        p0 = old["p0"][:: settings.slice_p].clone()
        state = {"p0": p0, "s": 2**-20 * p0, "exp_avg_sq": old["exp_avg_sq"].view(p.shape)}
        if settings.beta1 > 0:
            state["exp_avg"] = old["exp_avg"].view(p.shape)
        states.append(state)
    flat = steps.FlatParameters(flat.params, states, settings.slice_p)
    return group._replace(settings=settings, flat=flat)


def outcome(name: str, args: tuple) -> list[torch.Tensor]:
    """Everything that a step may write, in fp64: scalars, then each parameter and its state."""
    if name == "adamw_step":
        flats, found = [args[3]], []
    else:
        flats, found = [group.flat for group in args[3]], list(args[0].double().clone().unbind())
    for flat in flats:
        parts: dict[str, list[torch.Tensor]] = {"param": []}
        for x, _, state in flat.iterate_tensors(flat.params):
            parts["param"].append(x)
            for key, value in state.items():
                parts.setdefault(key, []).append(value)
        found += [torch.cat(tensors).double() for tensors in parts.values()]
    return found


@contextlib.contextmanager
def use_mode(mode: str) -> Iterator[None]:
    """A mode of the kernels; "flat": the fused one without a compiler, in torch operations."""
    with pytest.MonkeyPatch.context() as patch, kernels.use_kernels(mode.replace("flat", "fused")):
        if mode == "flat":
            patch.setattr(kernels.loops, "load_library", lambda: None)
        yield


def run(name: str, mode: str, dtype: torch.dtype, **changes) -> list[torch.Tensor]:
    args = example(name, dtype, **changes)
    with use_mode(mode):
        for _ in range(2):
            kernels.call(name, *args)
    return outcome(name, args)


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    largest = 0.0
    for a, b in zip(found, exact, strict=True):
        largest = max(largest, ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item())
    return largest
