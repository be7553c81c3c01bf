"""All benchmarks in one file: what works is collected, what does not is recorded."""

import itertools
import json

import pytest
import torch

from benchmarks import all as every
from benchmarks import train_step


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Benchmarks that work, fail, say nothing, and hang, in a package of that name."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "good.py").write_text(
        "import json, sys\njson.dump(sys.argv[1:-2], open(sys.argv[-1], 'w'))\nprint('a table')\n"
    )
    (package / "bad.py").write_text("raise ValueError('no such layer')\n")
    (package / "mute.py").touch()
    (package / "slow.py").write_text(
        "import sys, time\nopen(sys.argv[-1], 'w').write('[1]')\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(every, "HERE", package)
    return package


def test_all_collects_what_works_and_records_what_does_not(folder, monkeypatch, capsys, tmp_path):
    parts = {
        "one": every.BenchmarkPart("bad", 60),
        "two": every.BenchmarkPart("mute", 60),
        "three": every.BenchmarkPart("slow", 1),
        "four": every.BenchmarkPart("good --model x", 60),
    }
    monkeypatch.setitem(every.PARTS, "cpu", parts)
    out = tmp_path / "results" / "here.json"
    assert every.main(["--device", "cpu", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["parts"]["one"]["error"] == "exit status 1: ValueError: no such layer"
    assert "no numbers" in report["parts"]["two"]["error"]
    assert report["parts"]["three"]["error"] == "not done after 1 s"
    assert report["parts"]["three"]["results"] == [1], "what it had by then"
    assert report["parts"]["three"]["seconds"] < 30
    assert report["parts"]["four"]["results"] == ["--model", "x"]
    assert report["parts"]["four"]["command"] == "python -m benchmarks.good --model x"
    assert report["versions"]["torch"] == torch.__version__
    assert {"machine", "commit", "began", "date", "command"} <= set(report)
    assert "failed: one, two, three" in capsys.readouterr().out
    assert every.main(["--device", "cpu", "--out", str(out), "--only", "four"]) == 0
    with pytest.raises(SystemExit):
        every.main(["--device", "cpu", "--only", "five"])


def test_a_gpu_is_done_in_nine_minutes_and_every_command_is_one():
    assert sum(part.seconds for part in every.PARTS["cuda"].values()) <= 9 * 60
    tables = [*every.PARTS.values(), *every.QUICK.values()]
    for part in itertools.chain(*(parts.values() for parts in tables)):
        module, *words = part.words.split()
        if module == "train_step":
            args = train_step.train_step_parser().parse_args(words)
            models = set(args.model or train_step.MODELS[args.device])
            assert models <= {"toy", "sd15", "sdxl", "flux"}
            assert args.limit * len(models) <= part.seconds
