"""The warning where a DoRA is written under kohya's names, by A1111's and ComfyUI's formulas."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_core.formats.model_folders import open_model_folder
from tests.merge_commands import SQUARE, call, save_dora


@pytest.mark.parametrize("command", ["convert", "mix"])
def test_a_dora_under_kohyas_names_is_warned_of(here, command, capsys):
    """With A1111's and ComfyUI's own errors where the base model is there."""
    update = save_dora("e.safetensors")
    words = ("e.safetensors", "o.safetensors", "--to", "kohya")
    if command == "mix":
        words = ("e.safetensors", "--out", "o.safetensors", "--format", "kohya")
    call(command, *words, "--model", "base")
    said = capsys.readouterr().err
    saved = load_file("o.safetensors")
    down, up, scale = (
        next(tensor.double() for key, tensor in saved.items() if key.endswith(end))
        for end in ("down.weight", "up.weight", "dora_scale")
    )
    weight = open_model_folder("base")["unet"].read(f"{SQUARE}.weight").double()
    tuned = weight + up @ down
    readers = {
        "A1111": tuned * (scale / tuned.norm(dim=0, keepdim=True)) - weight,
        "ComfyUI": tuned * (scale / weight.norm(dim=1, keepdim=True)) - weight,
    }
    for name, wrong in readers.items():
        error = float((wrong - update).norm() / update.norm())
        assert f"{100 * error:.3g} % in {name}" in said
    assert said.startswith("warning: A1111 and ComfyUI apply a DoRA")
    Path("configs").mkdir()
    for part in ("unet", "text_encoder", "vae", "scheduler", "tokenizer"):
        if (Path("base") / part).is_dir():
            shutil.copytree(Path("base") / part, Path("configs") / part,
                            ignore=shutil.ignore_patterns("*.safetensors"))  # fmt: skip
    shutil.copy("base/model_index.json", "configs")
    call(command, *words, "--model", "configs", "--overwrite")
    assert "was wrong by 187 to 543 % in A1111" in capsys.readouterr().err


@pytest.mark.parametrize("columns, format", [(True, "kohya"), (False, "diffusers")])
def test_a_dora_that_is_applied_alike_is_not_warned_of(here, columns, format, capsys):
    save_dora("e.safetensors", columns=columns)
    call("convert", "e.safetensors", "o.safetensors", "--to", format, "--model", "base")
    assert not capsys.readouterr().err
