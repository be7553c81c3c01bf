"""merge.py explain: the weights with which adapters were folded are found."""

import re

from tests.merge_commands import call


def test_explain_finds_the_coefficients(here, capsys):
    call("fold", "base", "0.8*a.safetensors - 0.3*c.safetensors", "tuned")
    capsys.readouterr()
    call("explain", "tuned", "base", "a.safetensors", "c.safetensors")
    said = capsys.readouterr().out
    assert (
        re.search(r"total .* 0\.00\d % +0\.8000 +-0\.3000", said)
        and "tuned = base + 0.8*a.safetensors - 0.3*c.safetensors" in said
    )
    call("explain", "tuned", "base", "c.safetensors")
    assert float(re.search(r"total +\S+ +(\S+) %", capsys.readouterr().out)[1]) > 80
