"""Every command on damaged files of every kind ends with status 0, or 2 and one sentence.

It is not slow, takes little memory, and writes no partial output and over no other file.
`make fuzz` runs ten times as many cases, and FUZZ_CASE=123 before the command runs one alone.
"""

import collections
import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest

from lora_core.formats import Layout
from tests.fuzz_cases import WEIGHTS, Workspace, cache_models, command_words, run_case, run_command
from tests.fuzz_workspace import COMMANDS, OUT, build_workspace

CASES = int(os.environ.get("FUZZ_CASES", 1000))
SEED = int(os.environ.get("FUZZ_SEED", 0))
ALONE = os.environ.get("FUZZ_CASE", "")
CHUNK = 25  # cases of a test: many tests are begun early where workers share them out
FIRSTS = [int(ALONE)] if ALONE else range(0, CASES, CHUNK)
SHOWN = 10  # failures
TOTAL: collections.Counter[str] = collections.Counter()  # cases by kind of file


@pytest.fixture(scope="module")
def workspace(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("fuzz")
    with contextlib.chdir(folder):
        build_workspace(folder, layout)
        yield Workspace.read(folder)


def test_the_undamaged_files_are_read(
    workspace: Workspace, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_models(monkeypatch, workspace)
    assert set(workspace.targets) == set(COMMANDS) == set(WEIGHTS)
    for kind, targets in workspace.targets.items():
        ends = []
        for command in COMMANDS[kind]:
            words = command_words(command, targets[0], workspace.folder)
            outcome = run_command(words)
            ends.append(outcome.status)
            assert not outcome.raised, words
            workspace.restore()
            shutil.rmtree(workspace.folder / OUT, ignore_errors=True)
        assert 2 * ends.count(0) >= len(ends), (kind, ends)


@pytest.mark.parametrize("first", FIRSTS)
def test_damaged_files_end_in_a_sentence(
    first: int,
    workspace: Workspace,
    plain: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache_models(monkeypatch, workspace)
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    for number in [first] if ALONE else range(first, min(first + CHUNK, CASES)):
        kind, fault = run_case(workspace, SEED, number)
        counts[kind] += 1
        if fault:
            failures.append(f"FUZZ_SEED={SEED} FUZZ_CASE={number} {fault}")
    TOTAL.update(counts)
    if first + CHUNK >= CASES and CASES > 1000:  # for whoever runs make fuzz
        with capsys.disabled():
            print(f"\n{sum(TOTAL.values())} damaged files: {dict(TOTAL)}")
    assert not failures, "\n".join(failures[:SHOWN])
