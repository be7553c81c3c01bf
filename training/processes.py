"""The processes of a run (torchrun, `accelerate launch`): their number, output and restarts, and
the folder of the run, which the first of them alone writes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from lora_core import distributed
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.runs.run_folder import Run, hold_run
from lora_core.toml import read_toml
from training.networks.sharding import check_sharding

SECONDS_FOR_MAIN = 3  # in which the first process reports the error that another one has, too
LAUNCHES = "lora_core/launch"  # beginning of the keys in the launcher's store


def is_first() -> bool:
    """Whether this process prints, also before and after `join_run`: by torchrun's variables."""
    return int(os.environ.get("RANK") or 0) == 0


@contextlib.contextmanager
def join_run(config: Config) -> Iterator[Config]:
    """The config with the number of processes that a step's images are divided among, and with
    --resume where torchrun restarts a run that had begun.

    Inside the block the processes know each other, and the first of them alone prints. Raises
    UserError for options that do not fit the launch.
    """
    with distributed.join_processes(on_cpu=config.device == "cpu"), _one_voice():
        if distributed.process_count() > 1:
            _check_options(config)
            print(f"processes: {distributed.process_count()}, of which this one prints")
            config = _resume_after_restart(config)
        config = replace(config, processes=_find_count(config))
        count, images = distributed.process_count(), config.images_per_step
        if 0 < images < count:  # batches of 0 are refused with all other ranges
            raise UserError(
                f"a step has {images} image{'s' * (images > 1)} for {count} processes; start fewer "
                "with torchrun --nproc-per-node, or raise --batch-size"
            )
        check_sharding(config)
        yield config


def _find_count(config: Config) -> int:
    """The processes among which the images of a step were divided when the run began; 0 for one."""

    def read() -> int:
        file = Path(config.out) / "config.toml"
        if not (config.resume and file.is_file()):
            return distributed.process_count()
        begun: Config = read_toml(file)
        return begun.processes

    count = config.processes or distributed.read_once(read)
    return count if count > 1 else 0


def _check_options(config: Config) -> None:
    """Raises UserError for options that several processes do not have."""
    if config.cuda_graph:
        raise UserError(
            "--cuda-graph replays the steps of one process; leave it out, or train with "
            "python train.py on one GPU"
        )
    if ":" in config.device:
        raise UserError(
            f"--device {config.device} is one device, and each process takes the GPU of its own "
            "number; give --device cuda, or leave it out"
        )


# ---------------------------------------------------------------- output and errors


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """A block in which only the main process prints, and an error that all have is printed once.

    A signal ends the others without a word: what is saved is known to the main process.
    """
    rank = distributed.process_rank()
    if distributed.process_count() == 1:
        yield
        return
    try:
        with contextlib.ExitStack() as stack:
            if rank:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(distributed.lost_peers_of_torch())
            yield
    except UserError as error:
        if _is_reported(error, rank):
            raise SystemExit(2) from None
        if rank and not isinstance(error, distributed.PeerEndedError):
            raise UserError(f"process {rank}: {error}") from error
        raise
    except KeyboardInterrupt as stop:
        if rank:
            raise SystemExit(128 + getattr(stop, "number", signal.SIGINT)) from None
        raise
    except Exception as error:
        if rank:
            error.add_note(f"process {rank}")
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):  # for the report of torchrun
            get_error_handler().record_exception(error)
        raise


def _is_reported(error: UserError, rank: int) -> bool:
    """Whether the main process prints this error, or an error that made this process end."""
    store = _launch_store()
    if store is None:
        return rank > 0 and isinstance(error, distributed.PeerEndedError)
    key = f"{LAUNCHES}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/error"
    others = [f"{key}/{other}" for other in range(1, int(os.environ["WORLD_SIZE"]))]
    try:
        if rank == 0:
            store.set(key, str(error))
            if not _is_agents_store():  # the store ends with this process
                _wait_for_keys(store, others)
            return False
        if not _wait_for_keys(store, [key]):
            return False
        reported = store.get(key).decode()
        store.set(others[rank - 1], "seen")
    except RuntimeError:  # the main process has another error, or none
        return False
    return isinstance(error, distributed.PeerEndedError) or reported == str(error)


def _wait_for_keys(store: dist.TCPStore, keys: Sequence[str]) -> bool:
    """Whether all keys are in the store in time. TCPStore.wait prints two lines where they are not,
    which nobody could understand.
    """
    end = time.monotonic() + SECONDS_FOR_MAIN
    while not store.check(list(keys)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _is_agents_store() -> bool:
    """Whether the store is that of torchrun's agent, which outlives the processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _launch_store() -> dist.TCPStore | None:
    """The store in which the processes of a launch meet; None where it is not reached."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not (address and port):
        return None
    try:
        return dist.TCPStore(
            address, int(port), is_master=False, timeout=timedelta(seconds=SECONDS_FOR_MAIN)
        )
    except RuntimeError:
        return None


# ---------------------------------------------------------------- restarts and the run's folder


def _resume_after_restart(config: Config) -> Config:
    """The config with --resume, where torchrun --max-restarts starts a run again that had begun."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    if not restarts:
        return config

    def has_begun() -> bool:
        store = _launch_store()
        return store is not None and bool(store.check([_begun_key(config)]))

    if not distributed.read_once(has_begun):
        return config
    print(f"restart {restarts}: the run goes on from its newest checkpoint")
    return replace(config, resume=True, overwrite=False)


def _begun_key(config: Config) -> str:
    return f"{LAUNCHES}/begun/{os.path.abspath(config.out)}"


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """The run's folder, opened and locked by the main process; the others read it."""
    with contextlib.ExitStack() as stack:
        if distributed.is_main_process():
            run = stack.enter_context(
                hold_run(
                    config.out, resume=config.resume, overwrite=config.overwrite, keep=config.keep
                )
            )
            _mark_as_begun(config)
            distributed.wait_for_all()
        else:
            distributed.wait_for_all()
            run = Run(Path(os.path.abspath(config.out)), keep=config.keep, writes=False)
        yield run
        distributed.wait_for_all()


def _mark_as_begun(config: Config) -> None:
    """Note in torchrun's store, which outlives its processes, that a restart is to go on."""
    store = _launch_store() if _is_agents_store() else None
    if store is not None:
        store.set(_begun_key(config), "1")


def launch_words() -> list[str]:
    """The words before `train.py` of the command that starts this run again."""
    count = distributed.process_count()
    if count == 1:
        return ["python"]
    local = os.environ.get("LOCAL_WORLD_SIZE", str(count))
    machines = count // int(local)
    several = ["--nnodes", str(machines), "..."] if machines > 1 else []
    return ["torchrun", *several, "--nproc-per-node", local]
