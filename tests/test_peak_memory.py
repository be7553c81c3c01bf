"""The most memory of a run."""

import torch

from training.peak_memory import describe_peak, measure_peak


def test_the_process_has_had_what_it_filled() -> None:
    before = measure_peak(torch.device("cpu"))["bytes"]
    filled = torch.ones(before // 4 + 10_000_000)
    after = measure_peak(torch.device("cpu"))
    assert after["bytes"] >= filled.nbytes and after["of"] == "the process"
    assert describe_peak(torch.device("cpu")).endswith("GB of the process")
