"""merge.py info: the norms of dense updates, tokens, a plot, and the networks of a model."""

import re
from pathlib import Path

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
