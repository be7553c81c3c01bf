"""cloneofsimo's .pt lists [up, down, up, ...] added by position, by the lossy formula of lpl."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import LowRank
from lora_core.errors import UserError
from lora_core.formats.container import check_finite
from lora_core.formats.pickles import read_pickle
from merging.factor_sums import concat_factors, frobenius_norm, lpl
from merging.output import round_adapter
from merging.truncation import ApproximationReport

Pair = tuple[float, float]


def lpl_of_lists(
    first: Path, second: Path, name: str, alphas: Pair, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], dict[tuple[str, str], ApproximationReport]]:
    """([up, down, up, ...] of the lossy sum, its reports by (name, number of the layer)).

    In `dtype`, or in the first list's dtypes. Raises UserError for lists of different lengths or
    shapes, and for factors that overflow the dtype.
    """
    a, b = _read_pt_list(first), _read_pt_list(second)
    if len(a) != len(b):
        raise UserError(
            f"{first} has {len(a) // 2} layers, {second} {len(b) // 2}; lpl needs the same, mix "
            "takes any (with --model)"
        )
    tensors: list[Tensor] = []
    reports = {}
    for i in range(0, len(a), 2):
        pair = LowRank(a[i + 1], a[i], 1.0), LowRank(b[i + 1], b[i], 1.0)
        try:
            merged = lpl(*pair, *alphas)
            report = compare_with_sum(merged, pair, alphas)
            cast, reports[name, str(i // 2)] = round_adapter(merged, report, dtype or a[i].dtype)
        except UserError as error:
            raise UserError(f"layer {i // 2}: {error}") from None
        tensors += [cast.up.clone(), cast.down.clone()]
    return tensors, reports


def compare_with_sum(
    lr: LowRank, pair: tuple[LowRank, LowRank], alphas: Pair
) -> ApproximationReport:
    """The error of a lossy sum against the exact one."""
    exact = concat_factors(list(zip(alphas, pair)))
    lost = frobenius_norm(concat_factors([(1.0, exact), (-1.0, lr)]))
    return ApproximationReport(lr.rank, exact.rank, frobenius_norm(exact), lost)


def _read_pt_list(path: Path) -> list[Tensor]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a LoRA file")
    data = read_pickle(path)
    is_pairs = isinstance(data, list) and data and len(data) % 2 == 0
    if not is_pairs or not all(map(_is_factor, data)):
        raise UserError(
            f"{path} is not a list of up and down factors; give a LoRA saved by cloneofsimo's tools"
        )
    check_finite({str(i): part for i, part in enumerate(data)}, str(path))
    return data


def _is_factor(part: object) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()
