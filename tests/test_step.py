"""What is around a training step: inputs drawn ahead of it, autocast, compiled blocks, the
machine's own line.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor

import train
from lora_core.config import AdapterConfig, Config, OptimizerConfig, PriorConfig, Stage
from lora_core.data.dataset import micro_batches
from lora_core.errors import UserError
from lora_core.kernels import dispatch
from lora_core.toml import read_toml
from tests.conftest import distance, learned, rows
from tests.opened_run import open_parts
from training import config_checks, cuda_graph
from training.setup import Model
from training.stages import begin_stage
from training.step import Loss, optimizer_step
from training.step_inputs import InputSource, StepInputs, TokenIds, make_step_inputs

ALL = ("denoiser", "text_encoder", "tokens")
ROOT = Path(__file__).parent.parent


def test_inputs_drawn_ahead_are_those_drawn_on_the_spot(config: Config, quick: None) -> None:
    config = replace(
        config,
        accumulation=2,
        batch_size=1,
        stages=(Stage(1, ALL),),
        prior=PriorConfig(swap={"TOK": "cat"}),
        adapter=AdapterConfig(rank=2, dropout=0.1),
    )
    s = open_parts(config)
    stage = config.stages[0]
    begin_stage(stage, config, s.model, s.optimization)
    batch = next(iter(s.data.batches(config, 0, 1)))
    inputs = make_step_inputs(s.source, batch, stage, 0, check=True)
    assert len(inputs) == 2
    again = InputSource(config, s.data, s.model)  # encodes and tokenizes anew
    for part, ahead in zip(micro_batches(batch, 2), inputs, strict=True):
        (alone,) = make_step_inputs(
            InputSource(replace(config, accumulation=1), s.data, s.model),
            part, stage, 0, check=True,
        )  # fmt: skip
        given = cuda_graph.tree_tensors(ahead)
        for a, b in zip(cuda_graph.tree_tensors(alone), given, strict=True):
            assert torch.equal(a, b)
    repeated = make_step_inputs(again, batch, stage, 0, check=True)
    for a, b in zip(cuda_graph.tree_tensors(repeated), cuda_graph.tree_tensors(inputs)):
        assert torch.equal(a, b)
    x = inputs[0]
    assert isinstance(x.text, TokenIds) and x.swapped is not None
    assert x.dropout_keys is not None and x.step.item() == x.number == 0
    assert len(cuda_graph.tree_tensors(x)) >= 12


def test_autocast_computes_products_in_bf16_and_keeps_everything_else_wide(
    config: Config, quick: None
) -> None:
    seen: dict[str, set[torch.dtype]] = {"weight": set(), "out": set()}

    def watched(model: Model, x: StepInputs, config: Config, loss: Loss) -> Tensor:
        def look(m: torch.nn.Module, _: object, out: Tensor) -> None:
            seen["weight"].add(m.weight.dtype)  # type: ignore[union-attr, arg-type]
            seen["out"].add(out.dtype)

        handle = next(
            m for m in model.denoiser.modules() if isinstance(m, torch.nn.Conv2d)
        ).register_forward_hook(look)
        try:
            return train.training_step(model, x, config, loss)
        finally:
            handle.remove()

    exact, cast = (
        train.train(config),
        train.train(replace(config, autocast=True, out=config.out + "_cast"), step=watched),
    )
    assert seen == {"weight": {torch.float32}, "out": {torch.bfloat16}}
    a, b = (rows(run)[1]["loss"] for run in (exact, cast))
    assert a != b and a == pytest.approx(b, rel=0.03)
    assert all(value.dtype == torch.float32 for value in learned(cast).values())


def test_compiled_blocks_share_graphs_and_train_alike(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.full)])
def test_a_run_on_triton_kernels_is_the_reference_run(
    config: Config, quick: None, patched_once: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stage = Stage(3, ("denoiser", "tokens"))
    config = replace(
        config,
        adapter=AdapterConfig(rank=3, kind=kind),
        stages=(stage,),
        optimizer=OptimizerConfig(name="prodigy", args={"d0": 1e-4}),
    )
    config = replace(config, device="cuda" if torch.cuda.is_available() else "cpu")
    runs = {}
    for kernels in ("reference", "triton"):
        monkeypatch.setattr(dispatch, "mode", kernels)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a kernel that refuses says so
            runs[kernels] = train.train(replace(config, out=f"{config.out}_{kernels}"))
    losses = [[row["loss"] for row in rows(run) if "loss" in row] for run in runs.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[0])) == 3
    ours, exact = (
        torch.cat([p.flatten() for p in learned(run).values()])
        for run in (runs["triton"], runs["reference"])
    )
    assert (ours - exact).norm() < 1e-5 * exact.norm()


def test_what_a_machine_cannot_do_is_refused_and_what_it_does_is_said(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config_checks.check_device(replace(config, autocast=True), torch.device("cpu"))
    assert "device: cpu, 1 thread, weights in fp32, products in bf16" in capsys.readouterr().out
    monkeypatch.setattr(config_checks.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        config_checks.check_device(replace(config, compile=True), torch.device("cpu"))
    with pytest.raises(UserError, match="--autocast has no effect"):
        config_checks.check_config(replace(config, autocast=True, precision="bf16"))
    with pytest.raises(UserError, match=r"--adapter\.norm-grad has no effect"):
        config_checks.check_config(replace(config, adapter=AdapterConfig(norm_grad="full")))
    with pytest.raises(UserError, match="finds no repeated blocks in Linear"):
        cuda_graph.compile_blocks(torch.nn.Linear(2, 2))


MOST_FUNCTIONS = 85  # of ours
READING_LIST = "## A training step"  # section of docs/architecture.md with the files of a step


def test_one_step_of_the_toy_model_runs_through_few_functions(tmp_path: Path) -> None:
    """Making the inputs, forward, backward and update of one step of the toy model, with latents
    and captions that the steps before have encoded and tokenized: every Python function of ours
    that is entered, generator expressions and lambdas included.
    """
    config = read_toml(Path("configs/toy_pti.toml"))
    data = replace(config.data, crop="center", zoom=1.0, variants=0)
    stages = (replace(config.stages[1], steps=9),)
    config = replace(config, out=str(tmp_path / "run"), data=data, stages=stages)
    s = open_parts(config)
    s.take_steps(3)
    batch = next(iter(s.data.batches(config, 3, 4)))
    entered: set[tuple[str, str]] = set()
    sys.setprofile(lambda frame, event, _: entered.add(_place(frame)) if event == "call" else None)
    try:
        inputs = make_step_inputs(s.source, batch, stages[0], 3, check=False)
        optimizer_step(s.functions, stages[0], config, s.model, s.optimization, False, inputs)
    finally:
        sys.setprofile(None)
    ours = {place for place in entered if is_ours(place[0])}
    by_file: dict[str, list[str]] = {}
    for file, function in sorted(ours):
        by_file.setdefault(os.path.relpath(file, ROOT), []).append(function)
    listing = "\n".join(f"{file}: {', '.join(names)}" for file, names in by_file.items())
    print(f"{len(by_file)} files, {len(ours)} functions\n{listing}")
    assert len(ours) <= MOST_FUNCTIONS, listing
    section = (ROOT / "docs" / "architecture.md").read_text().split(READING_LIST)[1]
    listed = re.findall(r"^\| \[(\S+\.py)\]", section.split("\n## ")[0], re.MULTILINE)
    assert sorted(listed) == sorted(by_file), listing


def _place(frame: FrameType) -> tuple[str, str]:
    return frame.f_code.co_filename, frame.f_code.co_qualname


def is_ours(file: str) -> bool:
    return file.startswith(f"{ROOT}/") and not file.startswith((f"{ROOT}/.venv", f"{ROOT}/tests"))
