"""The status that a script ends with."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_core.errors import CLOSED_PIPE, UserError, exit_status, printed_by

ROOT = Path(__file__).parent.parent


def test_the_status_tells_how_a_script_ended(capsys: pytest.CaptureFixture[str]) -> None:
    def end(error: BaseException | None) -> int:
        def run() -> None:
            if error is not None:
                raise error

        return exit_status(run)

    assert end(None) == 0 and capsys.readouterr().err == ""
    assert end(UserError("a is 3; expected 4")) == 2
    assert capsys.readouterr().err == "error: a is 3; expected 4\n"
    assert end(KeyboardInterrupt()) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "interrupted: nothing was saved\n"
    stop = KeyboardInterrupt("saved after step 3")
    stop.number = signal.SIGTERM  # type: ignore[attr-defined]
    assert end(stop) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "interrupted: saved after step 3\n"
    for error in (ZeroDivisionError(), RuntimeError("The size of tensor a must match")):
        with pytest.raises(type(error)):
            end(error)


# Imports once, then forks a child for each line of its input: the child runs a script as Python
# does, with pipes to readers that have ended, and ends as a program ends.
FORKS = """
import gc, io, json, os, runpy, sys
import infer, train
from merging import add, convert, info, mix, resize

# what takes seconds to import waits for a model: a mistake is told before
print(*{"diffusers", "transformers", "torch._dynamo"} & sys.modules.keys(), end="", file=sys.stderr)
gc.freeze()  # a child that ends looks at its own objects only
for line in sys.stdin:
    words, closed, is_buffered, said = json.loads(line)
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)
        continue
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    for stream in closed:
        os.dup2(writer, stream)
    if not is_buffered:  # as PYTHONUNBUFFERED makes it
        raw = open(1, "wb", 0, closefd=False)
        sys.stdout = io.TextIOWrapper(raw, "utf-8", write_through=True)
    sys.argv = words
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")
    sys.exit()
"""
STREAMS = {"stdout": 1, "stderr": 2}
StatusOf = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def status_of_closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StatusOf]:
    """The status of a command whose reader of some streams has ended, and what it says on stderr.

    As in `python merge.py info a.safetensors | head`, or `2>&1 | head`.
    """
    said = tmp_path_factory.mktemp("said") / "stderr.txt"
    command, pipe = [sys.executable, "-c", FORKS], subprocess.PIPE
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    plain["PYTHONPATH"] = str(ROOT)
    with subprocess.Popen(
        command, cwd=ROOT, env=plain, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as forks:
        assert forks.stdin is not None and forks.stdout is not None and forks.stderr is not None

        def run(words: list[str], *streams: str, is_buffered: bool = True) -> tuple[int, str]:
            said.unlink(missing_ok=True)
            closed = [STREAMS[stream] for stream in streams]
            print(json.dumps([words, closed, is_buffered, str(said)]), file=forks.stdin, flush=True)
            return int(forks.stdout.readline()), said.read_text()

        yield run
        forks.stdin.close()
        assert forks.stderr.read() == ""  # what the imports say


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("merge.py", "info", "FILE"), CLOSED_PIPE),
        (("merge.py", "mix", "FILE", "OUT"), CLOSED_PIPE),
        (("merge.py", "fold", "--help"), 0),
        (("train.py", "--help"), 0),
        (("infer.py", "--help"), 0),
        (("-m", "benchmarks.timing"), CLOSED_PIPE),
    ],
)
def test_a_closed_pipe_ends_a_script_quietly(
    status_of_closed: StatusOf, words: tuple[str, ...], status: int, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    name = "lora_unet_mid_block_attentions_0_proj_in"
    down, up = torch.ones(1, 1280, 1, 1), torch.ones(1280, 1, 1, 1)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, file)
    out = tmp_path / "o.safetensors"
    line = [{"FILE": str(file), "OUT": str(out)}.get(word, word) for word in words]
    assert status_of_closed(line, "stdout") == (status, "")
    assert out.exists() == ("OUT" in words)  # the file was finished before the table was printed


@pytest.mark.parametrize(
    "words",
    [
        ("mix", "0.5*FILE", "OUT"),
        ("resize", "FILE", "OUT", "--max-error", "0.5"),
        ("convert", "FILE", "OUT", "--to", "kohya"),
        ("add", "FILE", "FILE", "OUT"),
        ("add", "FILE", "FILE", "OUT", "--mode", "ljl"),
    ],
)
def test_a_closed_pipe_does_not_cost_the_output(
    status_of_closed: StatusOf, words: tuple[str, ...], tmp_path: Path
) -> None:
    """Where Python writes every line at once (PYTHONUNBUFFERED), the first one finds no reader."""
    file, out = tmp_path / "a.safetensors", tmp_path / "o.safetensors"
    name = "lora_unet_mid_block_attentions_0_proj_in"
    down, up = torch.ones(1, 1280, 1, 1), torch.ones(1280, 1, 1, 1)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, file)
    line = [word.replace("FILE", str(file)).replace("OUT", str(out)) for word in words]
    status, said = status_of_closed(["merge.py", *line], "stdout", is_buffered=False)
    assert (status, "rror" in said, out.exists()) == (CLOSED_PIPE, False, True)


@pytest.mark.parametrize(
    "words",
    [
        ("merge.py", "nothing"),
        ("merge.py", "info", "nowhere"),
        ("infer.py",),
        ("train.py", "x.toml"),
    ],
)
def test_a_mistake_without_a_reader_keeps_its_status(
    status_of_closed: StatusOf, words: tuple[str, ...]
) -> None:
    assert status_of_closed(list(words), "stdout", "stderr")[0] == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a.png"),
            "a.png: No space left on device",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", b"b\xff"), "Is a directory"),
        (OSError("the hub is away"), "the hub is away"),
        (MemoryError(), "error: there is not enough memory for this; nothing was written"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee more."),
            "not enough memory for this (CUDA out of memory. Tried to allocate 2.00 GiB);",
        ),
        (
            RuntimeError("[x.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "not enough memory for this (can't allocate memory: 9 bytes);",
        ),
    ],
)
def test_an_error_of_the_machine_is_one_sentence(capsys, error, said):
    def fail():
        raise error

    assert exit_status(fail, undone="nothing was written") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and lines[0].endswith("; nothing was written")


def test_a_name_cannot_end_a_sentence_and_begin_another() -> None:
    error = UserError("a.safetensors has the key x\nwritten: b.safetensors", "\n  here\n  ^")
    assert str(error) == "a.safetensors has the key x\\nwritten: b.safetensors\n  here\n  ^"
    assert str(UserError(f"again: {UserError('a' + chr(10) + 'b')}")) == "again: a\\nb"


def test_what_is_printed_is_returned_and_nothing_else_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def talk(error: Exception | None = None) -> int:
        print("a table\x1b[2J")
        print("a note", file=sys.stderr)
        if error is not None:
            raise error
        return 7  # of a function that is no command

    assert printed_by(talk) == "a table\\x1b[2J\na note"
    assert printed_by(lambda: talk(UserError("wrong"))) == "a table\\x1b[2J\na note\nerror: wrong"
    full = OSError(errno.ENOSPC, "No space left on device", "a.png")
    assert printed_by(lambda: talk(full)).endswith(": No space left on device; nothing was written")
    with pytest.raises(KeyError):
        printed_by(lambda: talk(KeyError("a mistake of ours")))
    print("after")
    assert capsys.readouterr() == ("after\n", "")


def test_threads_do_not_mix_what_they_print() -> None:
    """Output belongs to the process: without a lock, a thread would take that of another."""

    def count(name: str) -> None:
        for number in range(50):
            print(name, number)
            time.sleep(0.0005)

    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda name: printed_by(partial(count, name)), "abcd"))
    for name, text in zip("abcd", said):
        assert text.splitlines() == [f"{name} {number}" for number in range(50)]
