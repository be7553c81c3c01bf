"""What is refused before data and model are read: machines, ranks, services and CUDA graphs that
cannot be had.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from lora_core.config import AdapterConfig, Config, DataConfig, Stage
from lora_core.diffusion.losses import StepOutput, mse
from lora_core.errors import UserError
from tests.conftest import merged, rows
from training import cuda_graph
from training.checks import config_checks


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


def test_push_targets_and_logins_are_tried_before_data_is_read(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    from lora_core.runs import card

    asked: list[str] = []

    class Api:
        def create_repo(self, repo_id: str, **_: object) -> None:
            asked.append(repo_id)

        def auth_check(self, repo_id: str, *, write: bool) -> None:
            if repo_id != "me/mine":
                raise PermissionError(f"no right to write to {repo_id}\nmore")

        def model_info(self, repo_id: str) -> object:
            return types.SimpleNamespace(private=repo_id == "me/mine")

    monkeypatch.setattr(card, "HfApi", Api)
    nowhere = replace(config, data=DataConfig(images="nowhere"), adapter=AdapterConfig(rank=2))
    with pytest.raises(
        UserError,
        match=r"--push-to-hub you/yours cannot be written to: no right to write to you/yours; log",
    ):
        train.train(replace(nowhere, push_to_hub="you/yours"))
    with pytest.raises(UserError, match="nowhere does not exist"):
        train.train(replace(nowhere, push_to_hub="me/mine"))
    assert asked == ["you/yours", "me/mine"] and not os.path.exists(config.out)
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    wandb.login = lambda: False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match="--report wandb: there is no login; run `wandb login`"):
        train.train(replace(nowhere, report="wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="nowhere does not exist"):
        train.train(replace(nowhere, report="wandb"))


def test_what_a_loss_says_of_itself_is_kept_or_refused(config: Config, quick: None) -> None:
    """An x0 loss is weighted by nothing, in EDM's space neither; a loss over the batch gets it."""

    def of_x0(step: StepOutput) -> Tensor:
        assert step.network == "epsilon" and len(step.x0) == 2
        return (step.x0_pred - step.x0).square().mean((1, 2, 3))

    of_x0.whole_batch = True  # type: ignore[attr-defined]
    of_x0.weighting = "min_snr"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"of_x0\.weighting is 'min_snr'; expected \"none\""):
        train.train(config, loss=of_x0)
    of_x0.weighting = "none"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"--weighting min_snr would weight the loss of_x0.*give"):
        train.train(replace(config, weighting="min_snr"), loss=of_x0)
    with pytest.raises(UserError, match=r"of_x0 compares.*--accumulation 3.*--batch-size 6"):
        train.train(replace(config, accumulation=3), loss=of_x0)
    masked = merged(config, {"data": {"masks": "file"}, "mask_scale": "unnormalized"})
    with pytest.raises(UserError, match="--accumulation 2 gives it a part"):
        train.train(replace(masked, accumulation=2), loss=of_x0)  # through a loss made of it
    assert not Path(config.out).exists()
    edm = merged(config, {"noise": {"space": "edm"}, "stages": (Stage(1),)})
    seen = []
    run = train.train(edm, loss=lambda step: seen.append(of_x0(step)) or mse(step))
    plain = train.train(replace(edm, out=edm.out + "_x0"), loss=of_x0)
    logged = rows(plain)[1]["loss"]
    assert logged == pytest.approx(float(seen[0].mean().detach()), rel=1e-5)
    assert abs(rows(run)[1]["loss"] / logged - 1) > 0.1  # the same error, weighted by snr
    assert "not weighted by noise level" in (plain / "README.md").read_text()


def test_a_graph_needs_a_gpu_and_a_loss_that_is_the_same_each_step(
    config: Config, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--cuda-graph needs an NVIDIA GPU"):
        train.train(replace(config, cuda_graph=True, device="cpu"))
    monkeypatch.setattr(config_checks, "check_device", lambda *_: None)

    def fickle(step: Any) -> Tensor:
        return (step.out - step.target).square().mean((1, 2, 3))

    with pytest.raises(UserError, match=r"fickle\.capturable = True"):
        train.train(replace(config, cuda_graph=True), loss=fickle)
    with pytest.raises(UserError, match=r"step\.capturable = True"):
        train.train(replace(config, cuda_graph=True), step=lambda *a: train.training_step(*a))
    assert not Path(config.out).exists()
