"""The most memory of a run."""

import json

import torch

import train
from lora_core.config import Config
from lora_core.memory.memory_errors import format_bytes
from lora_core.report import write_report
from training.memory.peak_memory import describe_peak, measure_peak


def test_the_process_has_had_what_it_filled() -> None:
    before = measure_peak(torch.device("cpu"))["bytes"]
    filled = torch.ones(before // 4 + 10_000_000)
    after = measure_peak(torch.device("cpu"))
    assert after["bytes"] >= filled.nbytes and after["of"] == "the process"
    assert describe_peak(torch.device("cpu")).endswith("GB of the process")


def test_a_run_says_its_peak(config: Config, quick: None) -> None:
    folder = train.train(config)
    peak = json.loads((folder / "summary.json").read_text())["peak_memory"]
    assert peak["of"] == "the process" and peak["bytes"] > 10**7
    words = format_bytes(peak["bytes"]).split()[1]
    assert f"{words} of the process" in (folder / "README.md").read_text()
    write_report([folder])
    assert "peak memory" in (folder / "report.html").read_text()
