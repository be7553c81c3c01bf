"""A step that is replayed gives the numbers of a step that is run. CUDA graphs need a GPU; here a
tape of aten calls replaces them.

Like a graph, the tape repeats the same calls on the same addresses and knows nothing of Python in
between, so what a replay gets wrong on a GPU (a value baked in at the capture, a tensor rebound, an
input left on the host) it gets wrong here; and what a capture refuses (reading a value back,
copying from the host) it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from lora_core.config import (
    AdapterConfig,
    Config,
    OptimizerConfig,
    PriorConfig,
    Stage,
    TokensConfig,
    ValidationConfig,
)
from lora_core.kernels import dispatch
from tests.conftest import distance, final, learned, merged, rows
from training import cuda_graph
from training.checks import config_checks
from training.cuda_graph import GraphReplay

READ_BACK = (
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "unique",
    "masked_select",
)  # wait for the device
FROM_HOST = (
    "lift_fresh",
    "lift_fresh_copy",
)  # torch.tensor([...]): pageable memory, which a capture refuses


class Tape:
    """A Recording on the CPU. A capture does not run what it records; the tape does, so its
    first replay has happened already.
    """

    made = 0

    def __init__(self) -> None:
        Tape.made += 1
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.done = False

    @contextmanager
    def record(self) -> Iterator[None]:
        tape = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                name = func._schema.name.split("::")[1]
                if name in READ_BACK or name in FROM_HOST:
                    raise RuntimeError(f"a capture refuses {name}")
                out = func(*args, **(kwargs or {}))
                tape.calls.append(
                    (
                        func,
                        args,
                        kwargs or {},
                        [t for t in tree_leaves(out) if isinstance(t, Tensor)],
                    )
                )
                return out

        with Mode():
            yield
        self.done = True

    @torch.no_grad()
    def replay(self) -> None:
        if self.done:
            self.done = False
            return
        for func, args, kwargs, outputs in self.calls:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for old, new in zip(outputs, again, strict=True):
                if old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dispatch, "mode", "reference"
    )  # the tape hears torch calls, not the compiled loops of the optimizers on a CPU
    monkeypatch.setattr(cuda_graph, "CudaGraph", Tape)
    monkeypatch.setattr(config_checks, "check_device", lambda *_: None)
    Tape.made = 0


def test_a_replay_copies_new_inputs_in_and_results_out(taped: None) -> None:
    state, replayed = torch.zeros(3), GraphReplay()

    def fn(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        state.add_(inputs["x"] * inputs["n"].more)
        return (state.sum(),)

    results = []
    for i in range(7):
        size = torch.full((3,), float(i))
        results.append(replayed(fn, {"x": size, "n": type("Empty", (), {"more": 2.0})()})[0])
    assert [float(r) for r in results] == [6.0 * sum(range(i + 1)) for i in range(7)]
    assert Tape.made == 1


def test_each_shape_and_key_has_its_own_graph(taped: None) -> None:
    replayed = GraphReplay()
    for _ in range(6):
        for key, n in (("a", 2), ("a", 3), ("b", 2)):
            (out,) = replayed(lambda x: (x * 2,), torch.ones(n), key)
            assert out.tolist() == [2.0] * n
    assert Tape.made == 3


def test_two_captures_never_follow_each_other_directly(taped: None) -> None:
    replayed, ran = GraphReplay(), []

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        ran.append((len(x), Tape.made))
        return (x * 2,)

    for n in [2, 2, 2, 3, 3, 3, 2, 3, 3, 2, 3]:
        assert replayed(fn, torch.ones(n))[0].tolist() == [2.0] * n
    assert ran == [(2, 0)] * 3 + [(3, 0)] * 3 + [
        (2, 1),
        (3, 1),
        (3, 2),
    ]  # 2 is captured; 3 runs once more before it is


def test_the_tape_refuses_what_a_capture_refuses(taped: None) -> None:
    for fn in (lambda x: (x * float(x.sum()),), lambda x: (x + torch.tensor([1.0, 2.0]),)):
        replayed = GraphReplay()
        with pytest.raises(RuntimeError, match="a capture refuses"):
            for _ in range(4):
                replayed(fn, torch.ones(2))


ALL = ("denoiser", "text_encoder", "tokens")
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora, accumulated, warm-up": {
        "adapter": AdapterConfig(rank=2, kind="dora"),
        "accumulation": 2,
        "batch_size": 1,
        "optimizer": OptimizerConfig(warmup=3, schedule="cosine"),
    },
    "dora through the norm": {"adapter": AdapterConfig(rank=2, kind="dora", norm_grad="full")},
    "lokr": {"adapter": AdapterConfig(rank=2, kind="lokr", dropout=0.3, module_dropout=0.2)},
    "dropout": {
        "adapter": AdapterConfig(rank=2, dropout=0.3, rank_dropout=0.2, module_dropout=0.2)
    },
    "everything, prodigy": {
        "stages": (Stage(6, ALL),),
        "optimizer": OptimizerConfig(name="prodigy"),
    },
    "two stages, adamw, average": {
        "stages": (Stage(5, ("tokens",)), Stage(5, ("denoiser", "text_encoder"))),
        "ema": 0.9,
        "validation": {"every": 4},  # between replays
    },
    "prodigy, a distance each, warm-up": {
        "stages": (Stage(7, ALL),),
        "optimizer": OptimizerConfig(
            name="prodigy", args={"distance": "group", "safeguard_warmup": True}, warmup=2
        ),
    },
    "an adapter that reads the level, recomputed": {
        "adapter": AdapterConfig(rank=2, kind="examples/t_lora.py:TLoRA"),
        "gradient_checkpointing": "all",
    },
    "a base in four bits": {"quantize": "int4", "adapter": AdapterConfig(rank=2, kind="dora")},
    "huber": {"loss": "huber", "loss_arg": {"schedule": "snr"}, "weighting": "min_snr"},
    "smooth_l1": {"loss": "smooth_l1", "loss_arg": {"schedule": "exponential"}},
    "l1": {"loss": "l1"},
    "preservation": {"stages": (Stage(6, ALL),), "prior": PriorConfig(swap={"TOK": "cat"})},
    "masks": {
        "data": {"masks": "file"},
        "mask_scale": "cloneofsimo",
        "prior": PriorConfig(outside_mask=0.5),
    },
    "checkpointing": {"gradient_checkpointing": "all"},
    "a text for each layer, rows that stop": {
        "stages": (Stage(6, ALL),),
        "tokens": TokensConfig(per_layer=True, norm="stop", norm_target=5.0),
    },
    "autocast": {"autocast": True},
    "a limit of the updates, rates by layer, long captions": {
        "stages": (Stage(6, ALL),),
        "optimizer": OptimizerConfig(max_update_norm=1e-3, lr_pattern={"*.to_k": 0.5}),
        "max_token_length": 150,
    },
    "attention on a word, logged": {
        "stages": (Stage(6, ALL),),
        "loss": "examples/attention_in_mask.py:attention_in_mask",
        "data": {"masks": "file"},
    },
    "attention": {
        "stages": (Stage(6, ALL),),
        "loss": "edlora",
        "data": {"masks": "file"},
        "gradient_checkpointing": "all",
    },
}


@pytest.mark.full
@pytest.mark.parametrize("case", ["lora", "dora, accumulated, warm-up", "everything, prodigy"])
def test_a_replayed_run_on_triton_kernels_is_the_run(
    config: Config, quick: None, taped: None, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(dispatch, "mode", "triton")
    replay(config, case)


@pytest.mark.parametrize("case", CASES)
def test_a_replayed_run_is_the_run(config: Config, quick: None, taped: None, case: str) -> None:
    replay(config, case)


def replay(config: Config, case: str) -> None:
    usual = {"stages": (Stage(6, ("denoiser",)),), "validation": ValidationConfig(every=-1)}
    changes = {**usual, **CASES[case], "log_every": 1}
    plain = merged(config, changes)
    eager = train.train(plain)
    replayed = train.train(replace(plain, cuda_graph=True, out=plain.out + "_graph"))
    assert Tape.made == len(plain.stages)
    ours, theirs = ([row for row in rows(run) if "loss" in row] for run in (replayed, eager))
    assert len(ours) == len(theirs) == plain.steps
    for a, b in zip(ours, theirs):
        assert {k for k in a if a[k] != pytest.approx(b[k], rel=1e-5)} <= {"time"}, (a, b)
    states = [
        {k: v for k, v in final(run).items() if not k.endswith("/lr")} for run in (replayed, eager)
    ]
    assert distance(*states) < 1e-5


@pytest.mark.parametrize("reads_attention", [False, True])
def test_compiled_blocks_share_graphs_and_train_alike(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch, reads_attention: bool
) -> None:
    """backend="eager": what dynamo traces, run as it is. fullgraph=True refuses any break of the
    graph; blocks of one kind are not compiled apart.
    """
    compiled: list[object] = []
    in_place = torch.nn.Module.compile

    def traced(module: torch.nn.Module, **settings: object) -> None:
        assert settings == {"fullgraph": True}
        compiled.append(module)
        in_place(module, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    config = replace(config, adapter=AdapterConfig(rank=2, kind="dora"))
    if reads_attention:  # and a text for each layer
        stages, tokens = (Stage(2, ALL),), TokensConfig(per_layer=True)
        changes = {"stages": stages, "tokens": tokens, "loss": "edlora", "data": {"masks": "file"}}
        config = merged(config, changes)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = train.train(replace(config, compile=True))
    stats = torch._dynamo.utils.counters["stats"]
    assert (
        len(compiled) == 4
        # the tiny UNet's transformer blocks: two sizes, and at each size one whose input needs no
        # gradient
    )
    assert (
        0 < stats["unique_graphs"] <= 6 and not torch._dynamo.utils.counters["graph_break"]
    )  # 2 in validation, 4 in training
    assert (
        distance(learned(train.train(replace(config, out=config.out + "_eager"))), learned(run))
        < 1e-4
    )
