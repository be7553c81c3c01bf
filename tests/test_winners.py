"""The table of winners: precedence, warnings, damaged files, and the cost of a choice."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace

import pytest
import torch

from lora_core import kernels
from lora_core.kernels import OPS, choice, winners


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The path of an empty user's cache; both tables are read anew before and after."""
    with monkeypatch.context() as inside:
        inside.setenv("XDG_CACHE_HOME", str(tmp_path))
        choice.reload_winners()
        yield tmp_path / "lora_core" / "winners.json"
    choice.reload_winners()


def part(*rows: tuple[str, str, str, str]) -> dict:
    named = [dict(zip(("op", "dtype", "class", "winner"), row)) for row in rows]
    return {"command": "a test", "date": "2026-11-21", "machine": "here", "rows": named}


def linear(dtype: torch.dtype = torch.float32) -> tuple:
    return OPS["lora_linear"].example(0, dtype, "cpu")


def chosen(args: tuple | None = None) -> str:
    return choice.choose_winner("lora_linear", OPS["lora_linear"], args or linear())


def test_the_users_rows_precede_the_committed_ones(cache, tmp_path, monkeypatch):
    committed = tmp_path / "committed.json"
    monkeypatch.setattr(winners, "COMMITTED", committed)
    rows = [("lora_linear", "float32", "*", "fused"), ("lora_conv", "float32", "*", "reference")]
    committed.write_text(json.dumps({"format": winners.FORMAT, "devices": {"cpu": part(*rows)}}))
    choice.reload_winners()
    assert chosen() == "fused"
    choice.store_winners(cache, "cpu", part(("lora_linear", "float32", "*", "reference")))
    assert chosen() == "reference"
    assert (
        choice.choose_winner("lora_conv", OPS["lora_conv"], OPS["lora_conv"].example())
        == "reference"
    )  # the committed row stays where there is no other


def test_a_class_has_its_own_winner_and_others_take_the_overall_one(cache):
    op, args = OPS["lora_linear"], linear()
    choice.store_winners(
        cache,
        "cpu",
        part(
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


def test_stored_rows_replace_those_of_their_class_and_keep_the_others(cache):
    choice.store_winners(
        cache, "cpu", part(("a", "float32", "x", "fused"), ("a", "float32", "y", "fused"))
    )
    choice.store_winners(cache, "cpu", part(("a", "float32", "x", "reference")))
    choice.store_winners(cache, "A GPU", part(("a", "float32", "x", "triton")))
    tables = winners.read_winners(cache)
    assert tables["cpu"].rows == {("a", "float32"): {"x": "reference", "y": "fused"}}
    assert tables["A GPU"].rows == {("a", "float32"): {"x": "triton"}}
    assert json.loads(cache.read_text())["devices"]["cpu"]["command"] == "a test"


def test_a_gpu_that_nobody_measured_takes_the_estimate_and_it_is_said_once(cache, monkeypatch):
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
        choice.store_winners(cache, "NVIDIA Z9", part(("lora_linear", "bfloat16", "*", "fused")))
        assert choice._find_rows("lora_linear", "cuda", 0, "torch.bfloat16", True) == {"*": "fused"}
        choice._find_rows("lora_linear", "meta", None, "torch.bfloat16", True)


def test_a_graph_has_winners_of_its_own(cache, monkeypatch):
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
    choice.store_winners(cache, "cpu", part(("lora_linear", "float32", "*", "reference")))
    choice.store_winners(cache, "cpu, replayed", part(("lora_linear", "float32", "*", "fused")))
    monkeypatch.setattr(choice, "_replayed", [])
    found = []
    for _ in range(2):  # the second time from what is remembered
        found.append(choice.choose_winner("lora_linear", op, linear()))
        with choice.replayed():
            found.append(choice.choose_winner("lora_linear", op, linear()))
    assert found == ["reference", "fused"] * 2


def test_nothing_is_said_on_the_cpu(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, op in OPS.items():
            kernels.call(name, *op.example(0, torch.float32, "cpu"))


def table_of(cpu: dict) -> str:
    return json.dumps({"format": winners.FORMAT, "devices": {"cpu": cpu}})


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "another", "devices": {}}',
        table_of({"rows": [{"op": "a"}]}),
        table_of(part(("a", "float32", "*", "quickest"))),
    ],
)
def test_a_damaged_or_foreign_cache_is_ignored_in_one_sentence_and_never_written_over(
    cache, content
):
    cache.parent.mkdir()
    cache.write_text(content)
    with pytest.warns(UserWarning, match="winners.json") as said:
        choice.reload_winners()
    assert len(said) == 1 and "delete it" in str(said[0].message)
    assert chosen() in winners.BACKENDS
    with pytest.raises(ValueError, match=r"winners.json"):
        choice.store_winners(cache, "cpu", part())
    assert cache.read_text() == content


def test_a_choice_costs_microseconds_and_asks_for_the_class_once(cache):
    asked = []

    def slow(*args):
        asked.append(1)
        return "one"

    op, args = replace(OPS["lora_linear"], shape_class=slow), linear()
    choice.store_winners(
        cache,
        "cpu",
        part(
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


def test_a_replaced_row_of_ops_is_asked_anew(cache):
    args = linear()
    choice.store_winners(cache, "cpu", part(("lora_linear", "float32", "*", "triton")))
    with_triton, without = (
        replace(OPS["lora_linear"], triton=print),
        replace(OPS["lora_linear"], triton=None),
    )
    assert [
        choice.choose_winner("lora_linear", op, args) for op in (with_triton, without, with_triton)
    ] == ["triton", "fused", "triton"]


def test_the_choice_compiles_without_a_graph_break(cache):
    args = linear()
    choice.store_winners(
        cache,
        "cpu",
        part(
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


def test_the_committed_table_says_what_made_it():
    devices = json.loads(winners.COMMITTED.read_text())["devices"]
    for device, table in devices.items():
        assert table["rows"], device
        assert "estimated" in table or all(table[key] for key in ("command", "date", "machine")), (
            device
        )
    assert {row["op"] for row in devices["cpu"]["rows"]} <= set(OPS)
