"""merge.py info: the norms of dense updates, tokens, a plot, and the networks of a model."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.merge_commands import call, deltas


def test_info_tells_what_is_there(here, states, capsys):
    call("info", "a.safetensors", "--plot", "s.png", "--model", "base", "--top", "3")
    said = capsys.readouterr().out
    assert "a.safetensors: diffusers, sd (sd_v1), fp32" in said
    assert Path("s.png").stat().st_size > 1000
    squares = [float(value.square().sum()) for value in deltas(states["a"]).values()]
    assert re.search(rf"total +\d+ +\d+ +0 +2 +2 +{sum(squares) ** 0.5:.4g} ", said)
    call("info", "run", "--model", "base")
    assert "word TOK stands for <s1><s2>" in capsys.readouterr().out
    call("info", "base")
    assert "unet" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "more"), [(3, []), (100, []), (5_000, ["  and 4,900 more"])])
def test_the_entries_of_a_header_are_in_order_and_not_without_end(here, capsys, count, more):
    names = [f"ss_{i:05d}" for i in range(count)]
    save_file(load_file("a.safetensors"), "h.safetensors", metadata=dict.fromkeys(names, "x"))
    call("info", "h.safetensors", "--model", "base")
    listed = [f"  {name}  x" for name in names[:100]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("header:") + 1 :] == listed + more
