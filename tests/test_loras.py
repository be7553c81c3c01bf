"""LoRA files on a model: how strengths are written, and runs that trained the whole model."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from lora_core.errors import UserError
from lora_core.runs.loras import LoraSource, apply_loras, parse_lora, warn_of_whole_model
from models import load_family
from tests.merge_commands import call


def test_strengths_are_read_as_documented() -> None:
    assert parse_lora("runs/a:0.8") == ("runs/a", 0.8, (0, 1))
    assert parse_lora("runs/a:unet=0.6,text=0.9") == ("runs/a", {"unet": 0.6, "text": 0.9}, (0, 1))
    assert parse_lora("C:/runs/a") == ("C:/runs/a", 1.0, (0, 1))
    with pytest.raises(UserError, match="--lora"):
        parse_lora("runs/a:strong")
    for text in ("", " ", ":0.5", " :unet=0.5"):  # else the current folder, as Path("") is
        with pytest.raises(UserError, match="names no file"):
            parse_lora(text)


def test_the_base_model_is_not_the_model_of_a_run_that_trained_it_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run" / "model"
    own.mkdir(parents=True)
    warn_of_whole_model("toy/model", tmp_path / "run")  # its token rows alone would be drawn with
    assert f"--model toy/model lacks that, give --model {own}" in capsys.readouterr().err
    warn_of_whole_model(str(own), tmp_path / "run")
    assert not capsys.readouterr().err


def applied_words(*paths: str) -> list[list[str]]:
    """The learned words of every file that is applied: the LoRAs, then their token files."""
    with ExitStack() as stack:
        patches = apply_loras(load_family("base"), [LoraSource(path, 1.0) for path in paths], stack)
        return [[placeholder.word for placeholder in own.placeholders] for own in patches]


def test_each_lora_of_a_folder_brings_its_own_tokens_once(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        shutil.copy("run/run.safetensors", f"{name}.safetensors")
        shutil.copy("run/run_emb.safetensors", f"{name}_emb.safetensors")
    assert applied_words("one.safetensors") == [[], ["TOK"]]
    assert applied_words("one.safetensors", "two.safetensors") == [[], [], ["TOK"], ["TOK2"]]
    assert applied_words("one.safetensors", "one_emb.safetensors") == [[], ["TOK"]]
    both = ("run/run.safetensors", "run/pytorch_lora_weights.safetensors")
    assert applied_words(*both) == [[], [], ["TOK"]]
    call("resize", "run", "--out", "small.safetensors", "--rank", "1", "--model", "base")
    capsys.readouterr()
    assert applied_words("small.safetensors") == [[], ["TOK"]]
    assert not capsys.readouterr().err
    Path("small_emb.safetensors").unlink()
    assert applied_words("small.safetensors") == [[]]
    assert capsys.readouterr().err == (
        "note: no token file beside small.safetensors (expected small_emb.safetensors), so TOK is "
        "an ordinary word\n"
    )


def test_a_token_file_of_another_name_is_taken_with_a_note(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("apart").mkdir()
    shutil.copy("run/run.safetensors", "apart/new.safetensors")
    shutil.copy("run/run_emb.safetensors", "apart/run_emb.safetensors")
    assert applied_words("apart/new.safetensors") == [[], ["TOK"]]
    assert capsys.readouterr().err == (
        "note: apart/new.safetensors names run_emb.safetensors, whose tokens are taken\n"
    )
