"""merge.py fuse: the written model draws each concept, alone and with the others."""

from tests.merge_commands import call


def test_try(here, capsys):
    call("fuse", "run", "c.safetensors:0.8", "--base", "base", "--out", "fused", "--steps", "3")
    print(capsys.readouterr())
    call("fuse", "run", "c.safetensors:0.8", "--base", "base", "--out", "summed", "--how", "sum")
    print(capsys.readouterr())
    import os

    print(os.listdir("fused"), open("fused/learned_words.json").read())
    assert 0
