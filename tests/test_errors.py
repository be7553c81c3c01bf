"""The status that a script ends with."""

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
