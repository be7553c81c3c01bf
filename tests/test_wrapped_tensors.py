"""Optimizer state of tensors that consist of others: saved and loaded, it goes on bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import train
from lora_core.config import AdapterConfig, Config, OptimizerConfig, Stage
from lora_core.optim.wrapped_tensors import TensorParts, load_state, plain_tensors, split_tensor
from lora_core.runs.run_folder import Run, flatten_state, nonfinite_names, unflatten_state
from tests.conftest import final, rows, same
from training.checks.optimizer_check import try_optimizer

LOW = ["torchao.optim.AdamW8bit", "torchao.optim.AdamW4bit", "torchao.optim.AdamWFp8"]
BNB = ["bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.Lion8bit"]
SHAPES = [(128, 64), (8192,), (16, 8)]  # the last one is too small for 8 bits


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """torchao compiles its step for every shape: seconds each, and the same formulas."""
    with torch.compiler.set_stance("force_eager"):
        yield


def build(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    from lora_core.optim.building import build_optimizer

    return build_optimizer(name, [{"params": params, "lr": 1e-2, "name": "a", "ratio": 1.0}], {})


def take_steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], first: int) -> None:
    for step in range(first, first + 3):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def made_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors, _ = flatten_state(optimizer.state_dict())
    return sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("name", [*LOW, *BNB])
def test_a_state_goes_through_a_checkpoint_to_the_bit(name: str, tmp_path: Any) -> None:
    pytest.importorskip(name.split(".")[0])
    params, run = made_params(), Run.open(tmp_path / "run")
    optimizer = build(name, params)
    take_steps(optimizer, params, 0)
    saved = [p.detach().clone() for p in params]
    run.save_checkpoint(3, *flatten_state(optimizer.state_dict()))
    take_steps(optimizer, params, 3)
    found = run.load_checkpoint()
    assert found is not None
    copies = [nn.Parameter(p) for p in saved]
    resumed = build(name, copies)
    before = torch.get_rng_state()
    load_state(resumed, unflatten_state(found.tensors, found.meta))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(copies, saved))
    take_steps(resumed, copies, 3)
    assert all(map(torch.equal, copies, params))
    ours, theirs = flatten_state(resumed.state_dict()), flatten_state(optimizer.state_dict())
    assert ours[1] == theirs[1] and same(ours[0], theirs[0])


@pytest.mark.parametrize(("name", "share"), zip([*LOW, BNB[0]], [0.27, 0.15, 0.27, 0.27]))
def test_the_state_of_large_parameters_is_small(name: str, share: float) -> None:
    pytest.importorskip(name.split(".")[0])
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(512, 512, generator=generator))]
    low, full = build(name, params), build("torch.optim.AdamW", params)
    for optimizer in (low, full):
        take_steps(optimizer, params, 0)
    assert state_bytes(low) < share * state_bytes(full)


def test_parts_are_found_at_any_depth_and_are_no_class() -> None:
    subclass_8bit = pytest.importorskip("torchao.optim.subclass_8bit")
    tensor = subclass_8bit.OptimState8bit.zeros((64, 64))
    plain = torch.ones(3)
    assert split_tensor(plain) is None and plain_tensors(plain) == [plain]
    assert split_tensor(tensor).keys() == {"codes", "scale", "qmap"}  # type: ignore[union-attr]
    tensors, meta = flatten_state({"a": [tensor, plain]})
    assert "OptimState8bit" not in str(meta)
    assert tensors.keys() == {"a/0/codes", "a/0/scale", "a/0/qmap", "a/1"}
    tree = unflatten_state(tensors, meta)
    assert isinstance(tree["a"][0], TensorParts) and torch.equal(tree["a"][1], plain)
    assert nonfinite_names({"x": tensor, "y": plain}) == []
    tensor.scale[0] = torch.nan
    assert nonfinite_names({"x": tensor, "y": plain}) == ["x"]


@pytest.mark.parametrize("change", ["shape", "names", "plain"])
def test_parts_of_another_state_are_refused(change: str) -> None:
    pytest.importorskip("torchao")
    params = made_params()
    optimizer = build(LOW[0], params)
    take_steps(optimizer, params, 0)
    tree = unflatten_state(*flatten_state(optimizer.state_dict()))
    average = tree["state"][0]["exp_avg"]
    said = "exp_avg has the parts"
    if change == "shape":
        average["scale"] = average["scale"][1:]
        said = r"exp_avg/scale is torch.float32 \[31\], expected torch.float32 \[32\]"
    elif change == "names":
        average["other"] = average.pop("qmap")
    other = "torch.optim.AdamW" if change == "plain" else LOW[0]
    with pytest.raises(ValueError, match=said):
        load_state(build(other, made_params()), tree)


@pytest.mark.parametrize("name", [LOW[0], BNB[0]])
def test_a_resumed_run_ends_with_the_same_bits(config: Config, quick: None, name: str) -> None:
    pytest.importorskip(name.split(".")[0])
    settings = OptimizerConfig(name, lr={"denoiser": 1e-2, "tokens": 1e-2})
    adapter = AdapterConfig(kind="full", targets=("all",))
    base = replace(
        config, optimizer=settings, adapter=adapter, stages=(Stage(2, ("tokens",)), Stage(3))
    )
    whole = train.train(base)
    state = final(whole)
    assert any(t.dtype == torch.uint8 for t in state.values())  # 8 bits in the end
    part = replace(base, out=base.out + "part", stages=(base.stages[0], Stage(2)))
    train.train(part)
    resumed = train.train(replace(base, out=part.out, resume=True))
    assert same(final(resumed), state) and rows(resumed)[-2:] == rows(whole)[-2:]


def test_every_low_precision_class_passes_the_trial() -> None:
    pytest.importorskip("torchao")
    settings = {name: {"name": name, "lr": 1e-3} for name in ("denoiser", "tokens")}
    for name in [*LOW, *BNB]:
        assert try_optimizer(name, settings, {}, torch.device("cpu")) == []


def test_a_state_without_parts_is_loaded_as_it_is() -> None:
    class Recorder(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Tensor | None:
            Recorder.steps += 1
            return super().step(closure)

    params = made_params()
    optimizer = Recorder(params, lr=1.0, momentum=0.9)
    take_steps(optimizer, params, 0)
    load_state(Recorder(made_params(), lr=1.0, momentum=0.9), optimizer.state_dict())
    assert Recorder.steps == 3
