"""Training steps: gradients of micro-batches, autocast, lazy members of a loss, and how much code a
step runs through.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from lora_core.config import (
    AdapterConfig,
    Config,
    OptimizerConfig,
    PriorConfig,
    Stage,
    ValidationConfig,
)
from lora_core.diffusion.losses import StepOutput, mse
from lora_core.kernels import dispatch
from lora_core.toml import read_toml
from tests.conftest import distance, learned, rows
from tests.opened_run import open_parts
from training import step as step_module
from training.inputs.step_inputs import StepInputs, make_step_inputs
from training.setup import Model
from training.step import Loss, optimizer_step

ALL = ("denoiser", "text_encoder", "tokens")
ROOT = Path(__file__).parent.parent


def gradients(config: Config) -> dict[str, Tensor]:
    """Of the first step, before clipping."""
    found: dict[str, Tensor] = {}
    update = step_module.update_parameters

    def keep(moving: Any, model: Model, *rest: Any) -> Tensor:
        for name, params in model.groups.items():
            for i, p in enumerate(params):
                if p.grad is not None:
                    found.setdefault(f"{name}/{i}", p.grad.clone())
        return update(moving, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "update_parameters", keep)
        train.train(config)
    return found


def gradient_error(found: dict[str, Tensor], exact: dict[str, Tensor], group: str) -> float:
    """Of a group's gradient as one vector, relative to its length."""
    a, b = (
        torch.cat([g.flatten().double() for name, g in of.items() if name.startswith(f"{group}/")])
        for of in (found, exact)
    )
    return float((a - b).norm() / b.norm())


@pytest.fixture
def splits(config: Config) -> list[Config]:
    """Batch 4 as 4 x 1, 2 x 2 and 1 x 4 passes, all groups, with class images."""
    config = replace(
        config,
        stages=(Stage(1, ALL),),
        prior=PriorConfig("a cat", count=3, weight=0.7),
        weighting="min_snr",
    )
    return [
        replace(config, batch_size=4 // n, accumulation=n, out=f"{config.out}{n}")
        for n in (1, 2, 4)
    ]


@pytest.mark.parametrize("prior", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    splits: list[Config], quick: None, prior: bool
) -> None:
    """Whatever the split, a gradient is no further from float64 than twice the whole batch's own,
    and a rounding for each sum.
    """
    splits = [c if prior else replace(c, prior=PriorConfig()) for c in splits]
    whole, *parts = map(gradients, splits)
    exact = gradients(replace(splits[0], precision="fp64", out=splits[0].out + "_fp64"))
    assert {name.split("/")[0] for name in exact} == set(ALL)
    for group in ALL:
        allowed = 2 * gradient_error(whole, exact, group)
        for config, part in zip(splits[1:], parts, strict=True):
            assert (
                gradient_error(part, exact, group)
                <= allowed + config.accumulation * torch.finfo(torch.float32).eps / 2
            )


@pytest.mark.parametrize("prior", [False, True])
def test_twenty_accumulated_steps_agree_in_float64(
    splits: list[Config], quick: None, prior: bool
) -> None:
    longer = [
        replace(
            c,
            precision="fp64",
            data=replace(c.data, resolution=8),
            stages=(Stage(20, ALL),),
            prior=c.prior if prior else PriorConfig(),
        )
        for c in splits[:: 2 if prior else 1][:2]
    ]
    whole, *parts = [learned(train.train(c)) for c in longer]
    assert all(p.dtype == torch.float64 for p in whole.values())
    for part in parts:
        assert distance(part, whole) < 1e-10


def test_lazy_members_of_a_step_work_in_a_loss(config: Config, quick: None) -> None:
    seen: dict[str, Any] = {}

    def loss(step: StepOutput) -> Tensor:
        seen.update(base=step.base_out, attention=step.attention, pixels=step.pixels, out=step.out)
        return (
            mse(step)
            + 0.1 * (step.base_out - step.out).square().flatten(1).mean(1)
            + 0.1 * step.pixels.abs().flatten(1).mean(1)
            + sum(layer.probabilities.square().flatten(1).mean(1) for layer in step.attention)
        )

    loss.reads_attention = True  # type: ignore[attr-defined]
    run = train.train(replace(config, stages=(Stage(3, ("denoiser", "tokens")),)), loss=loss)
    assert (
        seen["pixels"].shape == (2, 3, 16, 16)
        and seen["pixels"].abs().max() <= 1
        and seen["pixels"].requires_grad
    )
    assert not seen["base"].requires_grad and not torch.equal(seen["base"], seen["out"])
    maps = [layer.probabilities for layer in seen["attention"]]
    assert len(maps) == 3 + 1 and all(
        a.shape[0] == 2 and torch.allclose(a.sum(-1), torch.ones(())) for a in maps
    )
    assert maps[0].requires_grad and len(rows(run)) == 5


def test_preservation_holds_the_class_to_the_base_model(config: Config, quick: None) -> None:
    """With an overwhelming weight on it the adapter learns next to nothing that shows on the class
    caption.
    """

    def shift(weight: float) -> float:
        seen: list[float] = []
        swap = PriorConfig(swap={"TOK": "cat"}, swap_weight=weight)

        def loss(step: StepOutput) -> Tensor:
            now, base = step.preserved
            seen.append((now - base).square().mean().item())
            return mse(step) + weight * (now - base).square().flatten(1).mean(1)

        c = replace(
            config,
            out=f"{config.out}{weight:g}",
            stages=(Stage(12),),
            prior=replace(swap, swap_weight=0.0),
        )
        train.train(c, loss=loss)
        return sum(seen[-4:])

    assert shift(300.0) < 0.3 * shift(0.0)


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
        validation=ValidationConfig(every=-1),
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
