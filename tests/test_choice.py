"""Which implementation runs: modes, their order, the fastest by measurement, and the cost of that
choice.
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace

import pytest
import torch

from lora_core import kernels
from lora_core.errors import UserError
from lora_core.kernels import OPS, call, choice, use_kernels, winners
from tests.conftest import measured_rows


def test_a_mode_without_an_implementation_takes_the_next_plainer_one_and_warns(monkeypatch):
    monkeypatch.setitem(OPS, "dora_norm", replace(OPS["dora_norm"], fused=None, triton=None))
    monkeypatch.setattr(choice, "_warned", set())
    args = OPS["dora_norm"].example()
    expected = OPS["dora_norm"].reference(*args)
    with use_kernels("fused"):
        assert torch.equal(call("dora_norm", *args), expected)
    with (
        use_kernels("triton"),
        pytest.warns(UserWarning, match="dora_norm runs without its triton kernel: there is none"),
    ):
        assert torch.equal(call("dora_norm", *args), expected)
    assert kernels.current_mode() == "auto"


def test_modes_nest_and_read_the_environment(monkeypatch):
    with use_kernels("reference"):
        with use_kernels("fused"):
            assert kernels.current_mode() == "fused"
        assert kernels.current_mode() == "reference"
    monkeypatch.setattr(kernels.dispatch, "mode", None)  # as in a process that has not read it
    monkeypatch.setenv("LORA_KERNELS", "reference")
    assert kernels.current_mode() == "reference"
    monkeypatch.setenv("LORA_KERNELS", "fused")
    assert kernels.current_mode() == "reference"  # read once
    kernels.set_mode(None)
    assert kernels.current_mode() == "fused"
    monkeypatch.setenv("LORA_KERNELS", "fast")
    kernels.set_mode(None)
    with pytest.raises(UserError, match=r"'fast'.*auto, reference, fused, triton"):
        kernels.current_mode()
    with pytest.raises(UserError, match="'quick'"), use_kernels("quick"):
        pass


def test_a_resolved_function_is_the_implementation_until_the_generation_changes(monkeypatch):
    args = OPS["lora_linear"].example()
    for mode in ("reference", "fused"):
        with use_kernels(mode):
            assert kernels.resolve("lora_linear", *args) is getattr(OPS["lora_linear"], mode)
    found = [kernels.dispatch.generation]
    with use_kernels("fused"):
        found.append(kernels.dispatch.generation)
    found.append(kernels.dispatch.generation)
    monkeypatch.setitem(OPS, "lora_linear", replace(OPS["lora_linear"], triton=None))
    found.append(kernels.dispatch.generation)
    with choice.replayed():
        found.append(kernels.dispatch.generation)
    choice.reload_winners()
    found.append(kernels.dispatch.generation)
    kernels.resolve("lora_linear", *args)
    assert kernels.dispatch.generation == found[-1] and found == sorted(set(found))


def test_auto_takes_fused_and_triton_only_for_cuda(monkeypatch):
    def fused(*args):
        return torch.tensor(1.0)

    def triton(*args):
        return torch.tensor(2.0)

    op = replace(OPS["lora_linear"], fused=fused, triton=triton, supports=lambda *a: "in is odd")
    monkeypatch.setitem(OPS, "lora_linear", op)
    args = op.example()
    assert call("lora_linear", *args) == 1
    monkeypatch.setattr(choice, "_warned", set())
    with (
        use_kernels("triton"),
        pytest.warns(UserWarning, match="lora_linear runs without its triton kernel: in is odd"),
    ):
        assert call("lora_linear", *args) == 1
    with use_kernels("reference"):
        assert call("lora_linear", *args).shape == (2, 5, 11)
    monkeypatch.setitem(OPS, "lora_linear", replace(op, supports=lambda *a: None))
    with use_kernels("triton"):
        assert call("lora_linear", *args) == 2


# --- the fastest by measurement ---


def linear(dtype: torch.dtype = torch.float32) -> tuple:
    return OPS["lora_linear"].example(0, dtype, "cpu")


def chosen(args: tuple | None = None) -> str:
    return choice.choose_winner("lora_linear", OPS["lora_linear"], args or linear())


def test_the_users_rows_precede_the_committed_ones(winners_file, tmp_path, monkeypatch):
    committed = tmp_path / "committed.json"
    monkeypatch.setattr(winners, "COMMITTED", committed)
    rows = [("lora_linear", "float32", "*", "fused"), ("lora_conv", "float32", "*", "reference")]
    committed.write_text(
        json.dumps({"format": winners.FORMAT, "devices": {"cpu": measured_rows(*rows)}})
    )
    choice.reload_winners()
    assert chosen() == "fused"
    choice.store_winners(
        winners_file, "cpu", measured_rows(("lora_linear", "float32", "*", "reference"))
    )
    assert chosen() == "reference"
    assert (
        choice.choose_winner("lora_conv", OPS["lora_conv"], OPS["lora_conv"].example())
        == "reference"
    )  # the committed row stays where there is no other


def test_a_class_has_its_own_winner_and_others_take_the_overall_one(winners_file):
    op, args = OPS["lora_linear"], linear()
    choice.store_winners(
        winners_file,
        "cpu",
        measured_rows(
            ("lora_linear", "float32", winners.shape_class(op, args), "reference"),
            ("lora_linear", "float32", "*", "fused"),
        ),
    )
    long = (args[0].expand(9, 2, 5, 7), *args[1:])
    assert chosen() == "reference"
    assert chosen(long) == "fused"
    assert chosen() == "reference"  # remembered apart
    assert chosen(linear(torch.float64)) in (
        "fused",
        "reference",
    )  # a dtype that nobody measured is no error


def test_a_gpu_that_nobody_measured_takes_the_estimate_and_it_is_said_once(
    winners_file, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Z9")
    with pytest.warns(
        UserWarning, match=r"NVIDIA Z9: .* python -m benchmarks.kernels --tune measures"
    ):
        rows = choice._find_rows("lora_linear", "cuda", 0, "torch.bfloat16", True)
    assert rows == {"*": "fused"}
    assert choice._find_rows("dora_norms", "cuda", 0, "torch.bfloat16", True) == {"*": "triton"}
    with (
        choice.replayed(),
        pytest.warns(UserWarning, match=r"NVIDIA Z9, replayed: .* --tune --graph measures"),
    ):
        assert choice._find_rows("lora_linear", "cuda", 0, "torch.bfloat16", True) == {
            "*": "triton"
        }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without = choice._find_rows("lora_conv", "cuda", 0, "torch.bfloat16", False)
        assert without == {"*": "fused"}  # an op without Triton kernels
        choice.store_winners(
            winners_file, "NVIDIA Z9", measured_rows(("lora_linear", "bfloat16", "*", "fused"))
        )
        assert choice._find_rows("lora_linear", "cuda", 0, "torch.bfloat16", True) == {"*": "fused"}
        choice._find_rows("lora_linear", "meta", None, "torch.bfloat16", True)


def test_a_graph_has_winners_of_its_own(winners_file, monkeypatch):
    """An H100's committed rows, for the same arguments.

    torch's calls in an eager step, the kernel in a captured one.
    """
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    op, class_ = OPS["lora_linear"], "lora 4096,512,512 rank 16"
    assert choice._find_rows("lora_linear", "cuda", 0, "torch.bfloat16", True)[class_] == "fused"
    with choice.replayed():
        assert (
            choice._find_rows("lora_linear", "cuda", 0, "torch.bfloat16", True)[class_] == "triton"
        )
    monkeypatch.setattr(
        winners, "device_name", lambda kind, index, *, graph: f"{kind}, replayed" if graph else kind
    )
    choice.store_winners(
        winners_file, "cpu", measured_rows(("lora_linear", "float32", "*", "reference"))
    )
    choice.store_winners(
        winners_file, "cpu, replayed", measured_rows(("lora_linear", "float32", "*", "fused"))
    )
    monkeypatch.setattr(choice, "_replayed", [])
    found = []
    for _ in range(2):  # the second time from what is remembered
        found.append(choice.choose_winner("lora_linear", op, linear()))
        with choice.replayed():
            found.append(choice.choose_winner("lora_linear", op, linear()))
    assert found == ["reference", "fused"] * 2


def test_nothing_is_said_on_the_cpu(winners_file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, op in OPS.items():
            kernels.call(name, *op.example(0, torch.float32, "cpu"))


def test_a_choice_costs_microseconds_and_asks_for_the_class_once(winners_file):
    asked = []

    def slow(*args):
        asked.append(1)
        return "one"

    op, args = replace(OPS["lora_linear"], shape_class=slow), linear()
    choice.store_winners(
        winners_file,
        "cpu",
        measured_rows(
            ("lora_linear", "float32", "one", "reference"), ("lora_linear", "float32", "*", "fused")
        ),
    )
    assert [choice.choose_winner("lora_linear", op, args) for _ in range(3)] == ["reference"] * 3
    assert len(asked) == 1
    start = time.process_time()
    for _ in range(2000):
        choice.choose_winner("lora_linear", op, args)
    assert (
        time.process_time() - start
    ) / 2000 < 20e-6  # 1.3 us measured; the rest is for a busy machine


def test_a_replaced_row_of_ops_is_asked_anew(winners_file):
    args = linear()
    choice.store_winners(
        winners_file, "cpu", measured_rows(("lora_linear", "float32", "*", "triton"))
    )
    with_triton, without = (
        replace(OPS["lora_linear"], triton=print),
        replace(OPS["lora_linear"], triton=None),
    )
    assert [
        choice.choose_winner("lora_linear", op, args) for op in (with_triton, without, with_triton)
    ] == ["triton", "fused", "triton"]


def test_the_choice_compiles_without_a_graph_break(winners_file):
    args = linear()
    choice.store_winners(
        winners_file,
        "cpu",
        measured_rows(
            ("lora_linear", "float32", winners.shape_class(OPS["lora_linear"], args), "reference"),
            ("lora_linear", "float32", "*", "fused"),
        ),
    )

    def add_choice(x, *rest):
        return x + winners.BACKENDS.index(
            choice.choose_winner("lora_linear", OPS["lora_linear"], (x, *rest))
        )

    compiled = torch.compile(add_choice, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*args), args[0])  # the reference is number 0
    layer = torch.compile(
        lambda *args: kernels.call("lora_linear", *args), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(layer(*args), kernels.call("lora_linear", *args))
