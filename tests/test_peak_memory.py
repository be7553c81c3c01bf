"""The most memory of a run."""

import json

import torch

import train
from lora_core.byte_sizes import format_bytes
from lora_core.config import Config
from lora_core.report import write_report
from training.memory.peak_memory import describe_peak, measure_peak


def test_the_process_has_had_what_it_filled() -> None:
    before = measure_peak(torch.device("cpu"))["bytes"]
    filled = torch.ones(before // 4 + 10_000_000)
    after = measure_peak(torch.device("cpu"))
    assert after["bytes"] >= filled.nbytes and after["of"] == "the process"
    words = f"{format_bytes(after['bytes'])} of the process"
    assert describe_peak(measure_peak(torch.device("cpu"))) == words


def test_a_run_says_its_peak(config: Config, quick: None) -> None:
    folder = train.train(config)
    peak = json.loads((folder / "summary.json").read_text())["peak_memory"]
    assert peak["of"] == "the process" and peak["bytes"] > 10**7
    assert f"{format_bytes(peak['bytes'])} of the process" in (folder / "README.md").read_text()
    write_report([folder])
    assert "peak memory" in (folder / "report.html").read_text()
