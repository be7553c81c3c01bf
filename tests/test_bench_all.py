"""The benchmarks of whole steps.

Contenders do the same work on the same weights; what is measured, and the files and images of it.
"""

import itertools
import json
import statistics

import pytest
import torch
from PIL import Image

from benchmarks import all as every
from benchmarks import contenders, plot, tables, train_step
from benchmarks.contenders import FrozenStep, OurStep, PeftStep
from models import flux
from tests import tiny_flux, tiny_pipeline, tiny_sdxl
from training import cuda_graph

ATTENTION = ("*attn?.to_*",)
NAMES = ("frozen", "ours lora", "ours dora", "peft lora", "peft dora")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(name: str = "sd") -> contenders.Problem:
    """A problem of the tiny networks, rank 4, batch 2, 8 x 8 latents."""
    if name == "flux":
        pipe = tiny_flux.pipeline()
        inputs = {
            "encoder_hidden_states": random(2, 6, 32),
            "pooled_projections": random(2, 16),
            "guidance": torch.ones(2),
        }
        inputs |= {"img_ids": flux.image_position_ids(8, 8), "txt_ids": torch.zeros(6, 3)}
        return contenders.build_problem(
            name,
            pipe.transformer,
            inputs,
            random(2, 4, 8, 8),
            dict(pipe.scheduler.config),
            ("*.to_q", "*.to_v"),
            4,
        )
    if name == "sdxl":
        pipe = tiny_sdxl.pipeline(scheduler="ddim")
        inputs = {
            "encoder_hidden_states": random(2, 5, 40),
            "added_cond_kwargs": {"text_embeds": random(2, 12), "time_ids": random(2, 6)},
        }
    else:
        pipe, inputs = tiny_pipeline.pipeline(), {"encoder_hidden_states": random(2, 5, 16)}
    return contenders.build_problem(
        name, pipe.unet, inputs, random(2, 4, 8, 8), dict(pipe.scheduler.config), ATTENTION, 4
    )


# ---------------------------------------------------------------- the contenders


def test_a_clone_shares_every_parameter():
    network = tiny().network
    clone = contenders.clone_network(network)
    assert clone is not network
    assert all(a is b for a, b in zip(network.parameters(), clone.parameters(), strict=True))
    last = contenders.clone_network(network, channels_last=True)
    for a, b in zip(network.parameters(), last.parameters(), strict=True):
        assert torch.equal(a, b)
        assert (a is b) == (a.ndim != 4)
        assert a.is_contiguous(), "the layout of the others' weights has changed"


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_ours_begins_where_the_frozen_network_is_and_both_peers_train(name):
    problem = tiny(name)
    before = [p.clone() for p in problem.network.parameters()]
    frozen = FrozenStep(problem, contenders.clone_network(problem.network))
    expected = float(frozen())
    for kind in ("lora", "dora"):
        ours = OurStep(problem, kind, contenders.clone_network(problem.network))
        assert float(ours()) == pytest.approx(expected, rel=1e-5)
        peer = PeftStep(problem, kind, contenders.clone_network(problem.network))
        peer()
        for step in (ours, peer):
            start = [p.detach().clone() for p in step.parameters]
            step()
            assert all(
                not torch.equal(a, b) for a, b in zip(start, step.parameters, strict=True)
            ), f"{type(step).__name__} {kind} does not train"
        assert sum(p.numel() for p in ours.parameters) == sum(p.numel() for p in peer.parameters)
        assert {p.dtype for p in (*ours.parameters, *peer.parameters)} == {torch.float32}
    assert all(
        torch.equal(a, b) and b.grad is None
        for a, b in zip(before, problem.network.parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_ours_and_the_peer_compute_the_same_gradients(kind):
    problem = tiny()
    ours, peer = (
        OurStep(problem, kind, contenders.clone_network(problem.network)),
        PeftStep(problem, kind, contenders.clone_network(problem.network)),
    )
    theirs = {name: p for name, p in peer.network.named_parameters() if p.requires_grad}
    pairs = []
    names = {
        "down": "lora_A.default.weight",
        "up": "lora_B.default.weight",
        "magnitude": "lora_magnitude_vector.default.weight",
    }
    for path in problem.paths:
        adapter = ours.network.get_submodule(path).adapter("default")
        pairs += [
            (getattr(adapter, own), theirs[f"{path}.{name}"])
            for own, name in names.items()
            if hasattr(adapter, own)
        ]
    assert len(pairs) == len(theirs) == len(ours.parameters)
    with torch.no_grad():
        for i, (mine, other) in enumerate(pairs):
            mine.copy_(mine * 1.1 if mine.ndim == 1 else random(*mine.shape, seed=i) * 0.2)
            other.copy_(mine)
    x_t, t = random(2, 4, 8, 8, seed=1), torch.tensor([3, 700])
    for step in (ours, peer):
        (problem.out(step.network, x_t, t) * random(2, 4, 8, 8, seed=2)).sum().backward()
    for mine, other in pairs:
        assert torch.allclose(
            mine.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max())
        )
        assert mine.grad.abs().max() > 0


def test_frozen_goes_back_to_the_first_adapted_layers_and_no_further():
    problem = tiny()
    reached = []
    network = contenders.clone_network(problem.network)
    frozen = FrozenStep(problem, network)

    def watch(name):
        def seen(_module, _args, y):
            if y.requires_grad:
                y.register_hook(lambda grad: reached.append(name))

        network.get_submodule(name).register_forward_hook(seen)

    for name in ("down_blocks.0.resnets.0", *problem.paths):
        watch(name)
    frozen()
    assert set(problem.paths) == set(reached), (
        "the gradient stops short of a layer that an adapter trains, or passes the first ones"
    )


def test_a_graph_replays_the_device_part_on_new_random_numbers(monkeypatch):
    """The recording is a stand-in: what is replayed is seen from the inputs that it overwrites."""

    class Kept:
        def record(self):
            return torch.no_grad().__class__()  # any context will do

        def replay(self):
            pass

    monkeypatch.setattr(cuda_graph, "CudaGraph", Kept)
    problem, seen = tiny(), []
    step = OurStep(problem, "lora", contenders.clone_network(problem.network), graph=True)
    monkeypatch.setattr(
        step, "update", lambda sampled: (seen.append(sampled) or sampled.eps.sum(),)
    )
    assert isinstance(step.optimizer.param_groups[0]["lr"], torch.Tensor)
    found = [float(step()) for _ in range(cuda_graph.WARMUP_CALLS + 3)]
    assert len(seen) == cuda_graph.WARMUP_CALLS + 1, "captured once, after the warm calls"
    assert len(set(found[: cuda_graph.WARMUP_CALLS + 1])) == cuda_graph.WARMUP_CALLS + 1
    held, fresh = seen[-1], step.sample_step()
    assert not torch.equal(held.eps, fresh.eps)
    step.visit -= 1
    step()
    assert torch.equal(held.eps, fresh.eps)
    assert torch.equal(held.level.t, fresh.level.t)


def test_unknown_contenders_are_refused(capsys):
    for bad in ("ours", "theirs lora", "peft lora graf", "ours full", "peft dora graph"):
        assert train_step.main(["--device", "cpu", "--contenders", bad]) == 2
        assert repr(bad) in capsys.readouterr().err


# ---------------------------------------------------------------- the figures


def test_numbers_below_one_and_idle_options_are_refused(capsys):
    for argv, said in (
        (["--batch", "0"], "--batch is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--profile", "--json", "x"], "--json has no effect"),
    ):
        assert train_step.main(["--device", "cpu", "--model", "toy", *argv]) == 2
        assert said in capsys.readouterr().err


def test_memory_is_that_of_the_step():
    held = []

    def step():
        x = torch.ones(2**24)  # 64 MB
        y = x + 1
        held.append(y[:1].clone())

    large, small = (
        train_step.peak_memory(step, torch.device("cpu")),
        train_step.peak_memory(lambda: torch.ones(2**10), torch.device("cpu")),
    )
    if large is not None:  # Linux
        assert 120e6 < large < 160e6
        assert small < 16e6


def test_gradients_that_a_loop_leaves_are_not_taken_off_its_peak():
    weight, found = torch.zeros(3, requires_grad=True), []

    class Step:
        def __init__(self):
            self.parameters = [weight]

        def __call__(self):
            found.append(weight.grad)
            weight.grad = torch.ones(3)

    train_step.peak_memory(Step(), torch.device("cpu"))
    assert found == [None, None]


def test_each_contender_is_measured_over_the_frozen_one_of_its_words():
    assert train_step.frozen_contender("ours lora", NAMES) == "frozen"
    assert (
        train_step.frozen_contender("ours lora graph", (*NAMES, "frozen graph")) == "frozen graph"
    )
    assert train_step.frozen_contender("ours dora fused", (*NAMES, "frozen graph")) == "frozen"
    assert train_step.frozen_contender("ours dora", ("ours dora",)) == ""


def test_train_step_measures_all_contenders(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(contenders, "open_problem", lambda name, **_: tiny())
    assert (
        train_step.main(
            [
                "--device",
                "cpu",
                "--model",
                "toy",
                "--rounds",
                "3",
                "--json",
                str(tmp_path / "found.json"),
            ]
        )
        == 0
    )
    said, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    (result,) = found["results"]
    assert list(result["contenders"]) == list(NAMES)
    assert result["rounds"] == 3
    assert (result["batch"], result["latents"], result["rank"]) == (2, 8, 4)
    frozen, ours = result["contenders"]["frozen"], result["contenders"]["ours lora"]
    paired = statistics.median(
        a / b for a, b in zip(ours["processor"], frozen["processor"], strict=True)
    )
    assert ours["ratio"] == pytest.approx(paired)
    assert f"{ours['ratio']:.3f}" in said
    assert ours["steps_per_second"] == pytest.approx(1 / statistics.median(ours["clock"]))
    assert all(name in said for name in NAMES)


def test_the_profile_names_what_is_called_more_often():
    problem = tiny()
    said = train_step.profile_difference(problem, ("frozen", "peft lora"), steps=1, rows=100)
    assert "peft lora beyond frozen" in said
    calls = {
        line.split()[0]: int(line.split()[-2])
        for line in said.splitlines()
        if line.endswith("calls")
    }
    assert calls["aten::linear"] == 2 * len(problem.paths)
    assert "aten::convolution" not in calls, "called as often as without adapters"


# ---------------------------------------------------------------- all of them in one file


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


# ---------------------------------------------------------------- the image


def report(tmp_path, **changes):
    def step(add: float) -> dict[str, float]:
        return {"ops": 100 * (1 + add), "elementwise": 10 * (1 + add), "saved": 5 * (1 + add)}

    counted = {
        "frozen": step(0),
        "peft lora": step(2),
        "triton lora": step(0.5),
        "triton dora": step(0.9),
    }
    timed = [
        {
            "model": "sd15",
            "batch": 1,
            "contenders": {
                "frozen": {},
                "ours lora": {"ratio": 1.03},
                "peft lora": {"ratio": 1.06},
            },
        }
    ]
    parts = {
        "step cost": {"results": {"models": {"sdxl": {"step": counted}}}},
        "train step": {"results": {"results": timed}},
    }
    whole = {
        "machine": "a machine, 2 cores",
        "device": "cpu",
        "commit": "0123456789",
        "began": "2026-11-21T05:00",
        "parts": parts,
    } | changes
    (tmp_path / "all.json").write_text(json.dumps(whole))
    return tmp_path / "all.json"


def test_the_plot_shows_what_the_file_has(tmp_path, capsys):
    file = report(tmp_path)
    panels = plot.gather_panels(json.loads(file.read_text()))
    assert panels["operations launched"] == {
        "SDXL LoRA": {"ours": 1.5, "peft": 3.0},
        "SDXL DoRA": {"ours": pytest.approx(1.9)},
    }
    assert panels["time of a step, CPU"] == {"SD1.5 LoRA": {"ours": 1.03, "peft": 1.06}}
    assert plot.main([str(file), "--out", str(tmp_path / "docs" / "b.png")]) == 0
    with Image.open(tmp_path / "docs" / "b.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(2**24)) > 50
    assert (
        "times: not run"
        in plot.figure_caption(json.loads(file.read_text()), {"saved activations": {}}).lower()
    )


def test_a_file_without_figures_is_refused(tmp_path, capsys):
    assert (
        plot.main(
            [
                str(report(tmp_path, parts={"merge": {"error": "exit status 1"}})),
                "--out",
                str(tmp_path / "b.png"),
            ]
        )
        == 2
    )
    assert "neither counts nor times" in capsys.readouterr().err
    assert plot.main([str(tmp_path / "none.json")]) == 2
    assert not (tmp_path / "b.png").exists()


# ---------------------------------------------------------------- the tables of the README


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
