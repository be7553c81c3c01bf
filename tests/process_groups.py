"""Groups of processes as torchrun starts them: forks of one process that imported everything."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# Imports once; then each line of its input is a job (number of processes, port, module:function,
# arguments, folder): the function is called in as many forks, which print to FOLDER/RANK.out.
SERVER = """
import gc, importlib, json, os, sys, time
import models.sd, torch._dynamo, train
from training import results
results.reports.plot_metrics = lambda folder, scored: []
results.write_report = lambda runs: None
gc.freeze()

def work(rank, count, port, call, arguments, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                   "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    said = os.open(f"{folder}/{rank}.out", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    module, _, function = call.partition(":")
    status = 1
    try:
        status = getattr(importlib.import_module(module), function)(*arguments) or 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

for line in sys.stdin:
    count, port, call, arguments, folder = json.loads(line)
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            work(rank, count, port, call, arguments, folder)
        children.append(child)
    status = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("STATUS", json.dumps(status), flush=True)
"""


class Ended(NamedTuple):
    """The processes of a group after their end, by rank."""

    status: list[int]
    output: list[str]


class ProcessGroups:
    """Starts groups of processes, one after the other."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self.server, self.folder = server, folder

    def call(self, count: int, function: str, *arguments: object) -> Ended:
        """Call module:function with the arguments, which JSON can hold, in `count` processes."""
        job = [count, str(free_port()), function, arguments, str(self.folder)]
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(job), file=self.server.stdin, flush=True)
        status: list[int] = []
        for line in self.server.stdout:
            if line.startswith("STATUS"):
                status = json.loads(line.removeprefix("STATUS"))
                break
        said = [(self.folder / f"{rank}.out").read_text() for rank in range(count)]
        return Ended(status, said)

    def train(self, count: int, words: Sequence[str]) -> Ended:
        """`train.py WORDS` in `count` processes."""
        return self.call(count, "train:main", list(words))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def process_groups(folder: Path, cwd: Path | None = None) -> Iterator[ProcessGroups]:
    """A server of process groups in a working folder, whose output goes to `folder`."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
    ) as server:
        try:
            yield ProcessGroups(server, folder)
        finally:
            assert server.stdin is not None
            server.stdin.close()
