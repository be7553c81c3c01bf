"""Families: found by the name of a pipeline, imported when needed; other models are refused."""

import gc
import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import infer
import train
from lora_core.config import Config, Stage
from lora_core.errors import UserError
from models import FAMILIES, load_family, read_layout, use_device
from models.families import save_family, without_collection
from tests.tiny_pipeline import save_sd_pipeline
from training import results


@pytest.mark.parametrize("is_enabled", [True, False])
def test_garbage_is_looked_for_again_after_an_import(is_enabled: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "isenabled", lambda: is_enabled)
        calls: list[str] = []
        patch.setattr(gc, "disable", lambda: calls.append("disable"))
        patch.setattr(gc, "enable", lambda: calls.append("enable"))
        with pytest.raises(ImportError), without_collection():
            importlib.import_module("no_such_family")
    assert calls == ["disable", *(["enable"] if is_enabled else [])]


def test_other_models_are_refused(tmp_path: Path) -> None:
    save_sd_pipeline(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "SanaPipeline"))
    with pytest.raises(UserError, match=r"SanaPipeline.*supported are StableDiffusionPipeline"):
        load_family(str(tmp_path))
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        load_family("model.safetensors")
    with pytest.raises(UserError, match="--model"):
        load_family("")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 20)
    index.write_text(index.read_text().replace("SanaPipeline", "StableDiffusionPipeline"))
    with pytest.raises(UserError, match="unet"):
        load_family(str(tmp_path))


def test_a_library_that_is_too_old_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a weight is read; another error of an import stays what it is."""
    (tmp_path / "tomorrow.py").write_text("from diffusers import ModelOfTomorrow")
    (tmp_path / "broken.py").write_text("import no_such_library")
    (tmp_path / "model_index.json").write_text('{"_class_name": "TomorrowPipeline"}')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FAMILIES, "TomorrowPipeline", "tomorrow")
    sentence = (
        r"models of a TomorrowPipeline need a newer diffusers than [\d.]+: cannot import name "
        r"'ModelOfTomorrow' from 'diffusers'; install the versions of constraints\.txt"
    )
    for read in (load_family, read_layout):
        with pytest.raises(UserError, match=sentence):
            read(str(tmp_path))
    monkeypatch.setitem(FAMILIES, "TomorrowPipeline", "broken")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        load_family(str(tmp_path))


def test_every_pipeline_of_a_family_is_found_by_its_name() -> None:
    by_file: dict[str, list[str]] = {}
    for name, file in FAMILIES.items():
        by_file.setdefault(file, []).append(name)
    for file, names in by_file.items():
        assert tuple(names) == importlib.import_module(file).PIPELINES


def test_a_family_is_imported_when_a_model_of_it_is_opened() -> None:
    code = "import sys, models; print([name for name in sys.modules if name.startswith(PREFIXES)])"
    prefixes = ("diffusers", "transformers", "models.sd", "models.flux", "models.single_file")
    code = f"PREFIXES = {prefixes}; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["../private", "{private}", "vae/../../private", ".", ".."])
def test_a_model_copies_no_folder_but_its_own(tmp_path: Path, name: str) -> None:
    """model_index.json of a stranger's model names the folders that a whole model is made of."""
    save_sd_pipeline(tmp_path / "model")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    index = tmp_path / "model" / "model_index.json"
    table = json.loads(index.read_text()) | {name.format(private=tmp_path / "private"): ["a", "b"]}
    index.write_text(json.dumps(table))
    family = load_family(str(tmp_path / "model"))
    states = {"unet": family.unet.state_dict()}
    save_family(family, str(tmp_path / "model"), tmp_path / "deep" / "out", states)
    assert [path.parent.name for path in tmp_path.rglob("key")] == ["private"]
    assert str(tmp_path) not in (tmp_path / "deep" / "out" / "unet" / "config.json").read_text()


OWN_FAMILY = """
from lora_core.family import FamilyFunctions
from models import sd


def load(path, how):
    family = sd.FAMILY.load(path, how)
    family.name = "mine"
    return family


FAMILY = FamilyFunctions(load, sd.FAMILY.read_layout, sd.FAMILY.read_schedule)
"""


def test_a_family_of_a_file_trains_compares_and_draws(
    config: Config, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model whose pipeline no built-in family reads, by the code that the command line names."""
    model = tmp_path / "model"
    shutil.copytree(config.model, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": "MyPipeline"}))
    (tmp_path / "own.py").write_text(OWN_FAMILY)
    config = replace(config, model=str(model), stages=(Stage(1, ("denoiser",)),))
    with pytest.raises(UserError, match=r"is a MyPipeline.*also take a family of yours"):
        train.train(config)
    own = replace(config, family=f"{tmp_path / 'own.py'}:FAMILY")
    with pytest.raises(UserError, match=r"own\.py:load is a function; expected a"):
        train.train(replace(config, family=f"{tmp_path / 'own.py'}:load"))
    with pytest.raises(UserError, match=r"own\.py has no family 'FAMILIE'"):
        train.train(replace(config, family=f"{tmp_path / 'own.py'}:FAMILIE"))
    run = train.train(own)
    assert f'family = "{own.family}"' in (run / "config.toml").read_text()
    assert results.preview_noise_levels(own).is_file()
    words = ["--model", str(model), "--lora", str(run), "--prompt", "a TOK", "--steps", "1"]
    words += ["--out", str(tmp_path / "a.png")]
    assert infer.main(words) == 2 and "MyPipeline" in capsys.readouterr().err
    assert infer.main([*words, "--family", own.family]) == 0 and (tmp_path / "a.png").is_file()
    assert "family" not in Image.open(tmp_path / "a.png").text["lora_core"]


@pytest.mark.parametrize(
    ("name", "number"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_a_gpu_has_a_number_without_which_torch_cannot_use_it(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the calls of the driver are replaced: torch.cuda.set_device looks at what it gets."""

    def place(size: int, device: str) -> Any:
        return SimpleNamespace(device=torch.device(device if ":" in device else f"{device}:0"))

    used: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", place)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", used.append, raising=False)
    with pytest.raises(ValueError, match="with a specified index"):
        torch.cuda.set_device(torch.device("cuda"))
    assert use_device(name) == torch.device("cuda", number)
    assert used == [number]


def test_a_cpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_device", pytest.fail)
    assert use_device("auto") == use_device("cpu") == torch.device("cpu")
