"""Freed memory goes back to the system, in a process of its own: the setting is the process's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from merging import allocator

# Blocks of 8 MB are freed behind small ones that stay, as beside a result that grows.
PROGRAM = """
import sys
from pathlib import Path
import torch
from merging.allocator import return_large_blocks
if sys.argv[1] == "set" and not return_large_blocks():
    sys.exit(3)
torch.ones(31 << 18)  # freed: glibc's threshold rises to its 31 MB
kept = []
for _ in range(8):
    blocks = [torch.ones(1 << 21) for _ in range(4)]
    kept.append(torch.ones(1 << 14))
    del blocks
print(Path("/proc/self/status").read_text())
"""


def anonymous_megabytes(word):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, check=False
    )
    if result.returncode == 3:
        pytest.skip("this C library maps no blocks apart")
    assert result.returncode == 0, result.stderr
    found = re.search(r"RssAnon:\s+(\d+)", result.stdout)
    return int(found[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_freed_blocks_are_not_held():
    assert anonymous_megabytes("set") < anonymous_megabytes("default") - 20


def test_another_system_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.return_large_blocks()
