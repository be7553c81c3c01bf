"""merge.py diff: the cosine of dense updates, and angles where they have layers in common."""

import re

from tests.merge_commands import call, deltas


def test_a_file_does_not_differ_from_itself(here, capsys):
    call("diff", "a.safetensors", "a.safetensors", "--model", "base")
    assert re.search(r"total .* 1\.0000 +\S+\n", capsys.readouterr().out)


def test_the_cosine_is_that_of_the_updates(here, states, capsys):
    call("diff", "a.safetensors", "c.safetensors", "--model", "base", "--top", "1")
    said = capsys.readouterr().out
    first, second = deltas(states["a"]), deltas(states["c"])
    inner = sum(float((first[key] * value).sum()) for key, value in second.items())
    norms = [
        sum(float(value.square().sum()) for value in own.values()) ** 0.5 for own in (first, second)
    ]
    assert f"{inner / norms[0] / norms[1]:.4f}" in said and "90" in said
