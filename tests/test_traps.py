"""Traps of training that belong to no single module: special tokens and the pivot.

The others are named in the tests of their modules.

Each test also computes what the public scripts do, and shows that it is something else.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prodigyopt import Prodigy as Prodigyopt
from safetensors.torch import load_file
from torch import Tensor

import train
from lora_core.config import Config, OptimizerConfig, Stage
from models import load_family
from tests.conftest import rows, same
from training.inputs.step_inputs import StepInputs
from training.setup import Model
from training.stages import stage_spans
from training.step import Loss

PIVOT = (Stage(4, ("denoiser", "tokens"), schedule="cosine"), Stage(4, ("denoiser",)))


# ---------------------------------------------------------------- 13: BOS and EOS


def test_trap_13_prompts_have_bos_and_eos(model: Path) -> None:
    family = load_family(str(model))
    seen: list[Tensor] = []
    family.modules["text_encoder"].register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["input_ids"]),
        with_kwargs=True,
    )
    ours = family.encode_prompts(["a cat"]).prompt_embeds
    tokenizer = family.tokenizers["text_encoder"]
    ids = seen[0][0].tolist()
    assert (
        ids[0] == tokenizer.bos_token_id
        and ids.index(tokenizer.eos_token_id) == len(tokenizer("a cat").input_ids) - 1
    )
    bare = tokenizer(
        "a cat",
        add_special_tokens=False,
        padding="max_length",
        max_length=len(ids),
        return_tensors="pt",
    ).input_ids
    assert (
        family.modules["text_encoder"](bare).last_hidden_state - ours
    ).abs().max() > 0.1  # what a script without special tokens trains on


# ---------------------------------------------------------------- 17: the pivot


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_trap_17_tokens_stand_still_after_the_pivot(config: Config, quick: None, name: str) -> None:
    optimizer = OptimizerConfig(
        name,
        args={"d0": 1e-3} if name == "prodigy" else {},
        lr={"tokens": 1.0 if name == "prodigy" else 0.1},
    )
    run = train.train(replace(config, stages=PIVOT, optimizer=optimizer, save_every=1, keep=9))
    at = {step: load_file(_tokens(run, step))["clip_l"] for step in (1, 4, 5, 8)}
    assert not torch.equal(at[1], at[4])
    assert torch.equal(at[4], at[5]) and torch.equal(
        at[4], at[8]
    )  # not retracted, decayed or carried on by momentum
    moved = [row for row in rows(run) if "lr_tokens" in row]
    assert [row["step"] for row in moved] == [1, 2, 3, 4]


def test_trap_17_a_learning_rate_of_zero_is_no_pivot_in_prodigyopt() -> None:
    token, other = (
        torch.nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(i)))
        for i in range(2)
    )
    optimizer = Prodigyopt([{"params": [other]}, {"params": [token]}], d0=1e-2)
    for step in range(8):
        if step == 4:
            optimizer.param_groups[1]["lr"], before = 0.0, token.detach().clone()
        optimizer.zero_grad()
        (token.square().sum() + (other - 3).square().sum()).backward()
        optimizer.step()
    assert not torch.equal(token, before)


def test_trap_17_the_pivot_is_a_number_of_steps(config: Config) -> None:
    """One epoch of five images in batches of two: a number of epochs would be int(0.5 * 1) = 0.

    The tokens would learn nothing.
    """
    spans = [
        (first, last)
        for _, first, last in stage_spans(
            (Stage(2, ("denoiser", "tokens")), Stage(1, ("denoiser",)))
        )
    ]
    assert spans == [(0, 2), (2, 3)] and int(0.5 * 1) == 0


def test_trap_17_tokens_are_in_every_checkpoint_and_come_back(config: Config, quick: None) -> None:
    stages = (Stage(2, ("denoiser", "tokens")), Stage(2, ("denoiser",)))
    whole = train.train(replace(config, stages=stages, save_every=1, keep=9))
    opened: list[dict[str, Tensor]] = []

    def stop(model: Model, x: StepInputs, config: Config, loss: Loss) -> Tensor:
        if x.number == 3:
            raise KeyboardInterrupt
        return train.training_step(model, x, config, loss)

    def look(model: Model, x: StepInputs, config: Config, loss: Loss) -> Tensor:
        opened.append({name: e.rows.detach().clone() for name, e in model.embeddings.items()})
        return train.training_step(model, x, config, loss)

    half = replace(config, stages=stages, save_every=1, keep=9, out=config.out + "_half")
    with pytest.raises(KeyboardInterrupt):
        train.train(half, step=stop)
    run = train.train(replace(half, resume=True, resume_anyway=True), step=look)
    assert torch.equal(opened[0]["text_encoder"], load_file(_tokens(whole, 3))["clip_l"])
    assert same(load_file(_tokens(run, 4)), load_file(_tokens(whole, 4)))


def _tokens(run: Path, step: int) -> Path:
    """The token rows in a checkpoint."""
    (file,) = (run / "checkpoints" / str(step)).glob("*_emb.safetensors")
    assert json.loads((run / "checkpoints" / str(step) / "state.json").read_text())["step"] == step
    return file
