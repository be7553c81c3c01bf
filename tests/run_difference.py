"""The trained parameters of runs, compared."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def trained_parameters(run: Path) -> dict[str, torch.Tensor]:
    """The trained parameters in the newest checkpoint, in float64."""
    newest = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    state = load_file(newest / "state.safetensors")
    return {name: t.double() for name, t in state.items() if name.startswith("groups")}


def largest_difference(first: Path, other: Path) -> float:
    """The largest difference of a parameter between two runs, relative to the largest number in
    that parameter.
    """
    a, b = trained_parameters(first), trained_parameters(other)
    assert a.keys() == b.keys() and a
    return max(float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-12)) for k in a)
