"""benchmarks.kernels --tune writes the winners that the ops are chosen by."""

from __future__ import annotations

import json

import torch

from benchmarks.cases import Setting, make_cases
from lora_core.kernels import OPS, choice, winners
from tests.conftest import TINY_LAYER


def test_tuning_writes_the_rows_that_choose_reads(kernels_benchmark, tmp_path):
    status, _, err = kernels_benchmark(
        *TINY_LAYER, "--tune", "--op", "lora_linear", "--dtype", "bf16"
    )
    assert status == 0, err
    table = winners.read_winners(winners.cache_file())["cpu"]
    group = table.rows["lora_linear", "bfloat16"]
    assert set(group) == {"lora 16,32,32 rank 4", "dora 16,32,32 rank 4", winners.ANY}
    (case, _) = make_cases("lora_linear", Setting("cpu", torch.bfloat16, 4), None, [(16, 24, 24)])
    for winner in ("reference", "fused"):
        part = json.loads(winners.cache_file().read_text())["devices"]["cpu"]
        part["rows"] = [row | {"winner": winner} for row in part["rows"]]
        choice.store_winners(winners.cache_file(), "cpu", part)
        assert choice.choose_winner("lora_linear", OPS["lora_linear"], case.args) == winner
    winners.cache_file().write_text("{")
    assert (
        kernels_benchmark(*TINY_LAYER, "--tune", "--op", "lora_linear")[0] == 2
    )  # and what is not ours is not written over
    assert winners.cache_file().read_text() == "{"
