"""The model of a LoRA file that fits no published one: the folder that its header names."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lora_core import formats
from lora_core.formats.layout import Layout
from merging.header_model import find_header_model
from tests.adapter_checks import header
from tests.merge_commands import call

NOTE = "note: model base, as the header of {} says\n"


def name_model(path: str, out: str, **entries: str) -> str:
    """A copy of a file whose header says how it was made."""
    save_file(load_file(path), out, header(Path(path)) | entries)
    return out


def trained_on(model: str) -> dict[str, str]:
    return {"lora_core.config": f'model = "{model}"'}


def merged_for(**options: str) -> dict[str, str]:
    recipe = {"command": "mix", "options": options, "inputs": {}}
    return {"lora_core.merge": json.dumps(recipe)}


@pytest.mark.parametrize(
    ("entries", "is_found"),
    [
        (trained_on("base"), True),
        (merged_for(sum="a + b", model="base"), True),
        (merged_for(base="base", tuned="other"), True),
        ({"ss_sd_model_name": "base"}, True),
        (trained_on("elsewhere/base") | {"ss_sd_model_name": "base"}, True),
        (trained_on("elsewhere/base"), False),
        (trained_on("run"), False),  # a folder of another kind
        (trained_on("foreign"), False),  # a model of a family that is not built in
        (trained_on("//server/base"), False),  # another machine, which is not asked
        ({"ss_sd_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5"}, False),
        ({"lora_core.config": "broken", "lora_core.merge": "broken"}, False),
        ({}, False),
    ],
)
def test_a_header_names_a_folder_of_a_model(
    here: Path, entries: dict[str, str], is_found: bool
) -> None:
    file = name_model("b.safetensors", "named.safetensors", **entries)
    (here / "foreign").mkdir()
    (here / "foreign" / "model_index.json").write_text('{"_class_name": "AuraFlowPipeline"}')
    expected = ("base", file) if is_found else ("", "")
    assert find_header_model(["none.safetensors", "a.safetensors", file]) == expected


def test_the_current_folder_is_not_what_an_empty_name_means(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = name_model("b.safetensors", "named.safetensors", **trained_on(""))
    monkeypatch.chdir(here / "base")
    assert Path("model_index.json").is_file()
    assert find_header_model([str(here / file)]) == ("", "")


def test_a_model_beside_the_file_is_found_from_elsewhere(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(here / name_model("b.safetensors", "named.safetensors", **trained_on("base")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_header_model([file]) == (str(here / "base"), file)


def test_it_is_taken_with_a_note_where_no_published_model_fits(
    here: Path, layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result is that of --model, and its own header names the model again."""
    file = name_model("b.safetensors", "named.safetensors", **trained_on("base"))
    for words in (
        ("mix", f"0.5*{file}"), ("resize", file, "--rank", "1"), ("convert", file)
    ):  # fmt: skip
        call(*words, "--out", "given.safetensors", "--model", "base", "--overwrite")
        capsys.readouterr()
        call(*words, "--out", "found.safetensors", "--overwrite")
        assert capsys.readouterr().err.startswith(NOTE.format(file))
        given, found = Path("given.safetensors"), Path("found.safetensors")
        assert header(found)["lora_core.merge"] == header(given)["lora_core.merge"]
        assert load_file(given).keys() == load_file(found).keys()
        stripped = load_file(found)
        save_file(
            stripped, "sum.safetensors", {"lora_core.merge": header(found)["lora_core.merge"]}
        )
        call("info", "sum.safetensors")
        assert capsys.readouterr().err == NOTE.format("sum.safetensors")


def test_a_format_of_other_names_gets_them_from_it(
    here: Path, layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files in diffusers' names are read without a model; one is looked for where it is needed."""
    file = name_model("run/pytorch_lora_weights.safetensors", "d.safetensors", **trained_on("base"))
    call("mix", file, "--out", "same.safetensors")
    assert "note: model" not in capsys.readouterr().err
    call("convert", file, "k.safetensors", "--to", "kohya")
    assert NOTE.format(file) in capsys.readouterr().err
    assert formats.detect_format("k.safetensors") == "kohya"
    call("info", file)
    said = capsys.readouterr()
    assert "diffusers, sd (sd_v1), fp32" in said.out and said.err == NOTE.format(file)
    call("convert", "run/pytorch_lora_weights.safetensors", "l.safetensors", "--to", "kohya",
         status=2)  # fmt: skip
    assert "needs a model's layout; add --model FOLDER" in capsys.readouterr().err


def test_without_one_the_error_is_a_short_sentence(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = name_model("b.safetensors", "named.safetensors", **trained_on("nowhere/model"))
    call("info", file, status=2)
    assert capsys.readouterr().err == (
        f"error: {file} is of no published model; add --model FOLDER\n"
    )
