"""The tables of benchmarks/README.md, from a file of all benchmarks."""

import json

from benchmarks import all as every
from benchmarks import tables


def full_report():
    """A file of benchmarks.all with one model and one layer in each part."""

    def step(ops):
        return {"ops": ops, "elementwise": ops * 1e7, "bytes": ops * 3e7, "saved": ops * 1e6}

    counts = {
        "frozen": step(100),
        "peft lora": step(300),
        "peft dora": step(500),
        "triton lora": step(120),
        "triton dora": step(140),
    }
    optimizers = [
        ("prodigy", "ours", 2, 0, 0.25),
        ("prodigy", "prodigyopt", 900, 90, 1.0),
        ("adamw", "ours", 1, 0, 0.5),
        ("adamw", "torch, fused", 2, 0, 1.0),
    ]
    one = {"clock": [0.5], "processor": [0.4], "steps_per_second": 2.0, "peak_bytes": 2**21}
    means = {"ours / peft": 0.7, "ours / frozen": 1.2}
    found = {
        "step_cost": {"models": {"sdxl": {"linears": 10, "step": counts}}},
        "kernels --quick": {
            "graph": False,
            "summary": {
                "lora_linear LoRA": means,
                "lora_linear DoRA": means | {"ours / peft": 0.5},
                "dora_norm 1280 x 1280": {"times as fast as peft": 4.2, "error": 2e-7},
            },
        },
        "optimizer": {
            "rows": [
                {
                    "network": "sdxl",
                    "tensors": 1120,
                    "optimiser": a,
                    "contender": b,
                    "launches": c,
                    "waits": d,
                    "ms": 3.0,
                    "ratio": r,
                    "error": 1e-7,
                    "error of d": None,
                }
                for a, b, c, d, r in optimizers
            ]
        },
        "train_step": {
            "results": [
                {
                    "model": "sd15",
                    "batch": 1,
                    "contenders": {
                        "frozen": one,
                        "ours lora": one
                        | {
                            "ratio": 1.03,
                            "clock_ratio": 1.04,
                            "spread": [1.02, 1.05],
                            "to_peer": 0.9,
                        },
                    },
                }
            ]
        },
    }
    parts = {
        words: {"command": f"python -m benchmarks.{words}", "seconds": 1.0, "results": one}
        for words, one in found.items()
    }
    parts["merge"] = {
        "command": "python -m benchmarks.merge --quick",
        "seconds": 2.0,
        "error": "exit status 1",
    }
    return {
        "machine": "a machine",
        "device": "cpu",
        "commit": "0123456789",
        "began": "2026-11-21T05:00",
        "parts": parts,
    }


def test_the_tables_are_written_between_their_marks(tmp_path, capsys):
    file, text = tmp_path / "all.json", tmp_path / "README.md"
    file.write_text(json.dumps(full_report()))
    text.write_text(
        "# before\n"
        + "\n".join(f"<!-- {name} -->\nold\n<!-- end -->\nafter {name}" for name in tables.TABLES)
    )
    for _ in range(2):  # the second time nothing changes
        assert tables.main([str(file), "--write", str(text)]) == 0
        written = text.read_text()
        assert "old" not in written
        assert written.startswith("# before\n")
        assert all(f"after {name}" in written for name in tables.TABLES)
        assert (
            "| sdxl triton lora | 120 (1.20x) | 2.00 | 1.20 (1.20x) | 3.60 (1.20x) | 0.12 (1.20x) |"
            in written
        )
        assert (
            "| sd15, batch 1: ours lora | 2 | 400 | 1.030 | 1.020-1.050 | 1.040 | 0.900 | 2 |"
            in written
        )
        assert "<!-- merge -->\nnot run\n<!-- end -->" in written
        assert "exit status 1" in written
    text.write_text("nothing")
    assert tables.main([str(file), "--write", str(text)]) == 2
    assert "where" in capsys.readouterr().err
    assert text.read_text() == "nothing"


def test_the_figures_to_reach():
    lines = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:]
        for line in tables.targets_table(full_report()).splitlines()
    }
    assert lines["extra ops an adapted linear, SDXL: LoRA / DoRA"] == [
        "20.00 / 40.00",
        "4 / 6",
        "2.00 / 4.00 |",
    ]
    assert lines["saved activations, SDXL, over frozen"] == [
        "3.00 / 5.00",
        "1.15 / 1.3",
        "1.20 / 1.40 |",
    ]
    assert lines["Prodigy, SDXL's tensors: launches, waits for the device"] == [
        "900, 90",
        "8, 0",
        "2, 0 |",
    ]
    assert (
        lines["Prodigy / AdamW step, SDXL's tensors, times as fast as the peer"][-1]
        == "4.00 / 2.00 |"
    )
    assert (
        lines["six layers, bf16, one CPU thread, ours / peft: LoRA / DoRA"][-1] == "0.70 / 0.50 |"
    )
    assert (
        lines["DoRA norm 1280 x 1280, one CPU thread: times as fast, error"][-1] == "4.2, 2e-07 |"
    )
    assert lines["SD1.5 256 px bf16 on the CPU, over frozen: LoRA / DoRA"] == [
        "not run",
        "1.05 / 1.12",
        "1.030 |",
    ]
    assert "1.030" not in tables.targets_table(full_report() | {"device": "cuda"}), (
        "a CPU's figure in the CPU's row only"
    )


def test_the_figures_of_a_gpu():
    assert "| NVIDIA L40S |" in tables.gpu_table(
        full_report() | {"machine": "NVIDIA L40S (CUDA 13), a CPU", "device": "cuda"}
    )
    cuda_graph = {
        "graph": {
            "command": "python -m benchmarks.kernels --graph",
            "results": {"graph": True, "summary": {"lora_linear LoRA": {"ours / peft": 0.6}}},
        }
    }
    table = tables.gpu_table(full_report() | {"device": "cuda", "parts": cuda_graph})
    assert "ours / peft: LoRA / DoRA | 1 / 1 | 0.65 / 0.35 | 0.60 |" in table
    assert table.count("not run") == 5, (
        "of a part that the file does not have; one row's peer was not run either"
    )


def test_the_readme_has_every_table():
    for wanted in (tables.TABLES, tables.GPU_TABLES):
        tables.fill_tables((every.HERE / "README.md").read_text(), full_report(), wanted)
