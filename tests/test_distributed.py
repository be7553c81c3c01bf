"""Launches that are joined or refused, and what processes share."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

import infer
import train
from lora_core import distributed
from lora_core.config import Config
from lora_core.errors import UserError
from tests.process_groups import process_groups


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
        ({"PMI_SIZE": "3"}, "mpiexec started 3 processes"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 processes"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, "srun started 2 processes"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "srun started 2 processes"),
    ],
)
def test_other_launchers_are_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], sentence: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{sentence}.*torchrun .*--nproc-per-node N .*train.py"):
        train.train(config)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
        {"WORLD_SIZE": ""},
    ],
)
def test_one_process_is_a_run(environment: dict[str, str]) -> None:
    distributed.check_launch(environment)


def test_images_are_drawn_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in distributed.RENDEZVOUS:
        monkeypatch.setenv(name, "2")
    assert infer.main(["--model", "toy/model", "--prompt", "a", "--out", "none.png"]) == 2
    assert "start it with python infer.py" in capsys.readouterr().err


def test_one_process_shares_with_nobody() -> None:
    assert distributed.process_count() == 1 and distributed.is_main_process()
    assert distributed.take_share([1, 2, 3]) == [1, 2, 3]
    assert distributed.gather_shares([1, 2]) == [1, 2]
    assert distributed.read_once(lambda: 5) == 5
    with distributed.main_process_first():
        distributed.wait_for_all()


def check_sharing() -> None:
    """In each of three processes: values, shares and gradients are those of all."""
    with distributed.join_processes():
        rank, count = distributed.process_rank(), distributed.process_count()
        assert (count, distributed.local_rank()) == (3, rank)
        for n in range(8):  # also fewer items than processes
            share = distributed.take_share(range(n))
            assert distributed.gather_shares([i * i for i in share]) == [i * i for i in range(n)]
        assert distributed.read_once(lambda: f"of {rank}") == "of 0"
        params = [
            nn.Parameter(torch.ones(2, 3)),
            nn.Parameter(torch.ones(4)),
            nn.Parameter(torch.ones(1)),
        ]
        params[0].grad = torch.full((2, 3), float(rank))
        if rank == 1:
            params[1].grad = torch.arange(4.0)
        loss = distributed.sum_gradients_(params, torch.tensor(0.5, dtype=torch.float64))
        assert loss.item() == 1.5 and loss.dtype == torch.float64
        assert params[0].grad.tolist() == [[3.0] * 3] * 2
        assert params[1].grad is not None and params[1].grad.tolist() == [0.0, 1.0, 2.0, 3.0]
        assert params[2].grad is None  # no process has one
        agreed = distributed.AgreedNumber()
        seen = [agreed.exchange(15 if rank == 2 and step == 1 else 0) for step in range(4)]
        agreed.finish()
        assert seen == [0, 0, 15, 15]  # one call late, and everywhere at the same


def lose_a_peer() -> None:
    """One of two processes ends; the other one cannot go on, and says so in a sentence."""
    with distributed.join_processes():
        if distributed.process_rank() == 0:
            return
        with pytest.raises(distributed.PeerEndedError, match="process 1 ends, for it lost another"):
            distributed.wait_for_all()


def wait_in_vain() -> None:
    """The only process that was started of two does not wait for half a day."""
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    distributed.MEETING_TIME = timedelta(seconds=1)
    with (
        pytest.raises(UserError, match=r"the 2 processes \(WORLD_SIZE\) did not meet in"),
        distributed.join_processes(),
    ):
        pass


def test_processes_share(tmp_path: Path) -> None:
    with process_groups(tmp_path) as groups:
        ended = groups.call(3, "tests.test_distributed:check_sharing")
        assert ended.status == [0, 0, 0], "\n".join(ended.output)
        ended = groups.call(2, "tests.test_distributed:lose_a_peer")
        assert ended.status == [0, 0], "\n".join(ended.output)
        ended = groups.call(1, "tests.test_distributed:wait_in_vain")
        assert ended.status == [0], "\n".join(ended.output)
