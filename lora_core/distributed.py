"""Processes that work on one run together, as torchrun starts them: torch.distributed over gloo on
CPUs and NCCL on GPUs.

In a single process every function here does nothing, or returns what it was given. Everything that
communicates must be called by all processes in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_core.errors import UserError, first_line

T = TypeVar("T")

# One process may draw, encode or upload for long while the others wait; a process that died ends
# the others at once, without this.
TIMEOUT = timedelta(hours=12)
MEETING_TIME = timedelta(minutes=10)  # for which the first process waits for the others to start
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
OTHER_LAUNCHERS = {  # variable with the number of processes -> the launchers that set it
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    SLURM_TASKS: "srun",
}


class PeerEndedError(UserError):
    """Another process ended, and this one cannot go on without it."""


# ---------------------------------------------------------------- which process this is


def process_count() -> int:
    """The processes that work on this run; 1 outside of `join_processes`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def process_slice() -> slice:
    """Every n-th item of a sequence, from this process's number on."""
    return slice(process_rank(), None, process_count())


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return process_rank() == 0


def local_rank() -> int:
    """The number of this process on its machine, which is the number of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if process_count() > 1 else 0


def check_launch(environment: Mapping[str, str]) -> None:
    """Raises UserError if a launcher started several processes in another way than torchrun."""
    counts = {name: environment.get(name, "") for name in OTHER_LAUNCHERS}
    # A batch script sees the number of its job's tasks, and is one process: only a step counts.
    if environment.get("SLURM_STEP_ID") or environment.get("SLURM_PROCID", "0") != "0":
        counts[SLURM_TASKS] = counts[SLURM_TASKS] or environment.get("SLURM_NTASKS", "")
    missing = [name for name in RENDEZVOUS if not environment.get(name)]
    if is_one_of_several(environment):
        if missing:
            raise UserError(
                f"WORLD_SIZE is {environment['WORLD_SIZE']} and {', '.join(missing)} is not set; "
                "start several processes with torchrun --nproc-per-node N train.py ..."
            )
        return
    for name, count in counts.items():
        if _is_several(count):
            raise UserError(
                f"{OTHER_LAUNCHERS[name]} started {count} processes ({name}) that do not know of "
                "each other; let it start one torchrun on each machine: torchrun --nnodes M "
                "--nproc-per-node N --rdzv-backend c10d --rdzv-endpoint HOST:PORT train.py ..."
            )


def check_alone(environment: Mapping[str, str], script: str) -> None:
    """Raises UserError where a launcher started several processes of a script that works in one."""
    check_launch(environment)
    if is_one_of_several(environment):
        raise UserError(
            f"{environment['WORLD_SIZE']} processes of {script} were started, and each would do "
            f"the same; start it with python {script}"
        )


def is_one_of_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started several processes, by its variables: also before they meet."""
    return _is_several(environment.get("WORLD_SIZE", ""))


def _is_several(count: str) -> bool:
    return count.isdecimal() and int(count) > 1


@contextmanager
def join_processes(
    *, on_cpu: bool = False, environment: Mapping[str, str] = os.environ
) -> Iterator[None]:
    """Inside the block, the processes that torchrun or `accelerate launch` started know each other;
    each has a GPU of its own where there are any, but `on_cpu`.

    Raises UserError for a launch that is not supported, and PeerEndedError where a process is lost.
    """
    check_launch(environment)
    if not is_one_of_several(environment):
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available() and not on_cpu:
        backend = "cpu:gloo,cuda:nccl"
        gpus, wanted = torch.cuda.device_count(), int(environment.get("LOCAL_WORLD_SIZE", "1"))
        if wanted > gpus:
            raise UserError(
                f"{wanted} processes were started on a machine with {gpus} GPU"
                f"{'s' * (gpus > 1)}; give torchrun --nproc-per-node {gpus}"
            )
    _meet(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Start torch.distributed with all processes. Raises UserError where some do not come."""
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=MEETING_TIME))
    except dist.DistError as error:
        minutes = MEETING_TIME.total_seconds() / 60
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} processes (WORLD_SIZE) did not meet in {minutes:g} "
            f"minutes ({first_line(error)}); start as many, with torchrun --nproc-per-node N "
            "train.py ..."
        ) from error
    store.set_timeout(TIMEOUT)
    with lost_peers():
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)


@contextmanager
def lost_peers() -> Iterator[None]:
    """A block in which the errors of torch.distributed are a PeerEndedError."""
    try:
        yield
    except UserError:
        raise
    except RuntimeError as error:  # DistError, DistNetworkError, and gloo's own
        raise _peer_ended(error) from error


@contextmanager
def lost_peers_of_torch() -> Iterator[None]:
    """A block in which such errors of what torch sends by itself, as for --shard, are a
    PeerEndedError too; other errors stay as they are.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "/gloo/transport/" in str(error):
            raise _peer_ended(error) from error
        raise


def _peer_ended(error: RuntimeError) -> PeerEndedError:
    reason = first_line(error).rpartition("] ")[2].partition(". ")[0]  # gloo names its source
    return PeerEndedError(f"process {os.environ['RANK']} ends, for it lost another one ({reason})")


# ---------------------------------------------------------------- sharing work and results


def is_one_machine() -> bool:
    """Whether all processes are on one machine, and so see the same files."""
    return process_count() == int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def take_share(items: Sequence[T], *, even: bool = False) -> Sequence[T]:
    """The items of this process: every n-th of them. With `even` all processes have as many, for
    which some have the last item again.
    """
    count = process_count()
    if even and items:
        items = [*items, *[items[-1]] * (-len(items) % count)]
    return items if count == 1 else items[process_rank() :: count]


def gather_shares(share: Sequence[T]) -> list[T]:
    """The results for all items, in their order, from each process's results for `take_share`;
    those of items that were taken again come last.
    """
    if process_count() == 1:
        return list(share)
    shares = gather_values(list(share))
    whole: list[T] = [shares[0][0]] * sum(map(len, shares)) if shares[0] else []
    for rank, part in enumerate(shares):
        whole[rank :: len(shares)] = part
    return whole


def gather_values(value: T) -> list[T]:
    """The values of all processes, which may be any that pickle can hold."""
    count = process_count()
    if count == 1:
        return [value]
    values: list[T | None] = [None] * count
    with lost_peers():
        dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def read_once(read: Callable[[], T]) -> T:
    """What `read()` returns in the main process, in every process: files may be on its machine
    alone.
    """
    if process_count() == 1:
        return read()
    values = [read() if is_main_process() else None]
    with lost_peers():
        dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process goes through the block first, and the others find what it writes there."""
    if not is_main_process():
        wait_for_all()
    yield
    if is_main_process():
        wait_for_all()


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if process_count() > 1:
        with lost_peers():
            dist.all_reduce(torch.zeros(1))


# ---------------------------------------------------------------- gradients


@torch.no_grad()
def sum_gradients_(params: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Replace each gradient by its sum over the processes, in one all-reduce; returns the sum of
    `loss` []. A parameter stays without a gradient where it has none in any process.
    """
    with lost_peers():
        has_gradient = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8)
        dist.all_reduce(has_gradient, dist.ReduceOp.MAX)
        held = [p for p, has in zip(params, has_gradient.tolist()) if has]
        for p in held:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in held if p.grad is not None]
        flat = torch.cat([*map(torch.flatten, gradients), loss.reshape(1).to(gradients[0].dtype)])
        dist.all_reduce(flat)
    sums = flat.split([g.numel() for g in gradients] + [1])
    torch._foreach_copy_(gradients, [s.view_as(g) for s, g in zip(sums, gradients)])
    return sums[-1].reshape(()).to(loss.dtype)


class AgreedNumber:
    """The largest of the processes' numbers, one call late, so that no call waits for the others.

    Each call sends this process's number and returns the largest that the calls before sent.
    """

    def __init__(self) -> None:
        self.sent = torch.zeros(1, dtype=torch.int64)
        self.work: dist.Work | None = None
        self.largest = 0

    def exchange(self, number: int) -> int:
        """Send `number`; returns the largest of those of the calls before, 0 at first."""
        with lost_peers():
            if self.work is not None:
                self.work.wait()
                self.largest = max(self.largest, int(self.sent))
            self.sent = torch.tensor([number])
            self.work = dist.all_reduce(self.sent, dist.ReduceOp.MAX, async_op=True)
        return self.largest

    def finish(self) -> None:
        """Wait for what the last call sent."""
        if self.work is not None:
            self.work.wait()
