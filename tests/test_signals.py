"""SIGTERM and SIGHUP end a run as Ctrl-C does; what started it may have asked to ignore them."""

import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from lora_core.config import Config, Stage
from lora_core.toml import to_toml
from training import signals as signals_module
from training.signals import Signals, Stopped

EVERY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", EVERY)
def test_a_signal_waits_for_the_step_and_a_later_one_does_not(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [10.0]
    monkeypatch.setattr(signals_module.time, "monotonic", lambda: clock[0])
    before = [signal.getsignal(n) for n in EVERY]
    with Signals() as signals:
        with signals.deferred() as stop:
            assert not stop
            signal.raise_signal(number)
            assert stop
            with pytest.raises(Stopped) as first:
                stop.raise_if_received()
            clock[0] += 0.9
            for again in (
                number,
                signal.SIGTERM,
                signal.SIGHUP,
            ):  # timeout, a closed terminal, systemd
                signal.raise_signal(again)
            clock[0] += 0.2
            with pytest.raises(Stopped) as second:
                signal.raise_signal(signal.SIGTERM)
        assert (first.value.number, second.value.number) == (number, signal.SIGTERM)
    with Signals(), pytest.raises(Stopped):
        signal.raise_signal(number)
    assert [signal.getsignal(n) for n in EVERY] == before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Signals() as signals, signals.deferred() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_has_no_signals() -> None:
    seen: list[object] = []

    def work() -> None:
        with Signals() as signals:
            seen.append(dict(signals.before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [{}]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_run_saves_and_ends_with_the_signals_status(
    config: Config,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    given = Path(config.out).parent / "given.toml"
    given.write_text(to_toml(replace(config, stages=(Stage(5),))))
    make, calls = train.make_step_inputs, []

    def stopped(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
            signal.raise_signal(number)
        return make(*args, **settings)

    monkeypatch.setattr(train, "make_step_inputs", stopped)
    assert train.main([str(given)]) == code
    assert "the run is saved after step 3, go on with" in capsys.readouterr().err
    assert [path.name for path in (Path(config.out) / "checkpoints").iterdir()] == ["3"]
    assert not (Path(config.out) / ".lock").exists()
