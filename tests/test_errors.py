"""The status that a script ends with."""

import errno
import signal

import pytest

from lora_core.errors import UserError, exit_status


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
    with pytest.raises(ZeroDivisionError):
        end(ZeroDivisionError())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a.png"),
            "a.png: No space left on device",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", b"b\xff"), "Is a directory"),
        (OSError("the hub is away"), "the hub is away"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_an_error_of_the_machine_is_one_sentence(capsys, error, said):
    def fail():
        raise error

    assert exit_status(fail, undone="nothing was written") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and lines[0].endswith("; nothing was written")
