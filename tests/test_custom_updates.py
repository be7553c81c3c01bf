"""Files of adapters of a user's class in merge.py: folded, written as a LoRA, refused unnamed."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merge
from lora_core import formats
from lora_core.adapters import custom_files, injection
from lora_core.adapters.folded_weights import merged_state_dict
from lora_core.adapters.injection import AdapterSpec
from lora_core.adapters.weight_updates import scaled_product
from lora_core.formats.known_formats import CUSTOM_KIND
from models import load_family
from tests.adapter_checks import header
from tests.merge_commands import call

EXAMPLES = Path(merge.__file__).parent / "examples"
IA3, VERA = f"{EXAMPLES}/my_adapter.py:IA3", f"{EXAMPLES}/vera.py:VeRA"
T_LORA = f"{EXAMPLES}/t_lora.py:TLoRA"
CONFIG = "seed = 5\n[adapter]\nrank = 2\n"  # what the header of a run says


@pytest.fixture
def saved(here: Path) -> Any:
    """A function (class -> the model with its adapters), which are in own.safetensors."""

    def save(kind: str) -> Any:
        family = load_family("base")
        names = ("unet",) if kind == T_LORA else ("unet", "text_encoder")
        modules = {name: family.modules[name] for name in names}
        rank = {} if kind == IA3 else {"rank": 2}
        for name, module in modules.items():
            globs = family.layout.presets[name]["attention"]
            injection.inject(module, AdapterSpec(globs, kind=kind, **rank), seed=5)
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for p in injection.adapter_parameters(module):
                    p += torch.randn(p.shape, generator=generator) / 3
        written = {CUSTOM_KIND: kind, custom_files.TRAINED_BY: CONFIG if rank else ""}
        custom_files.save_adapters(modules, here / "own.safetensors", written)
        return family

    return save


def changes(family: Any, name: str) -> dict[str, torch.Tensor]:
    plain = load_family("base").modules[name].state_dict()
    folded = merged_state_dict(family.modules[name])
    return {key: folded[key] - plain[key] for key in plain}


def test_fold_gives_the_weights_of_the_class(saved: Any) -> None:
    family = saved(IA3)
    call("fold", "base", "0.5*own.safetensors", "folded", "--adapter-kind", IA3)
    tuned = load_family("folded")
    for name in ("unet", "text_encoder"):
        plain = load_family("base").modules[name].state_dict()
        found = tuned.modules[name].state_dict()
        for key, change in changes(family, name).items():
            assert torch.allclose(found[key] - plain[key], 0.5 * change, atol=2e-6), key


def test_a_class_with_factors_becomes_a_lora_and_is_mixed(saved: Any, layout: Any) -> None:
    family = saved(VERA)
    words = ("--adapter-kind", VERA, "--model", "base")
    call("convert", "own.safetensors", "lora.safetensors", *words)
    state = formats.load("lora.safetensors", layout)
    for name, own in state.components.items():
        wanted = changes(family, name)
        for path, lr in own.items():
            delta = wanted[f"{layout.module_path(name, path)}.weight"]
            assert lr.rank == 2 and torch.allclose(scaled_product(lr), delta, atol=1e-5)
    call("mix", "lora.safetensors + 0.5*lora.safetensors", "sum.safetensors", "--rank", "2")
    call("resize", "lora.safetensors", "small.safetensors", "--rank", "1")
    small = formats.load("small.safetensors", layout).components["unet"]
    assert {lr.rank for lr in small.values()} == {1}


def test_another_class_becomes_the_nearest_lora_with_its_error(
    saved: Any, layout: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    family = saved(IA3)
    words = ("--adapter-kind", IA3, "--model", "base", "--to", "kohya")
    call("convert", "own.safetensors", "x.safetensors", "--as", "lora", *words, status=2)
    assert "choose --rank or --max-error" in capsys.readouterr().err
    call("convert", "own.safetensors", "o.safetensors", "--as", "lora", "--rank", "3",
         "--svd", "exact", *words)  # fmt: skip
    shown = capsys.readouterr().out
    state, lost, whole = formats.load("o.safetensors", layout), 0.0, 0.0
    for name, own in state.components.items():
        wanted = changes(family, name)
        for path, lr in own.items():
            delta = wanted[f"{layout.module_path(name, path)}.weight"].double()
            error = float((scaled_product(lr).double() - delta).square().sum())
            best = float(torch.linalg.svdvals(delta.flatten(1))[3:].square().sum())
            assert lr.rank == 3 and error == pytest.approx(best, rel=1e-3, abs=1e-9)
            lost, whole = lost + error, whole + float(delta.square().sum())
    assert f"{(lost / whole) ** 0.5:.2e}" in shown
    assert all(path.endswith("bias") for path in state.parameters["unet"])
    call("convert", "own.safetensors", "whole.safetensors", *words)  # LyCORIS' full updates
    whole_file = load_file("whole.safetensors")
    assert any(key.endswith(".diff") for key in whole_file)
    assert CUSTOM_KIND not in header("whole.safetensors")


def test_code_runs_only_where_the_class_is_named(
    saved: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(T_LORA)
    shutil.copy("own.safetensors", "t.safetensors")
    saved(IA3)
    cases = [
        (("fold", "base", "own.safetensors", "o"), "is not run unasked: name the class again"),
        (("fold", "base", "a.safetensors", "o", "--adapter-kind", IA3), "has no effect: no file"),
        (("fold", "base", "own.safetensors", "o", "--adapter-kind", VERA), "do not fit"),
        (("fold", "base", "t.safetensors", "o", "--adapter-kind", T_LORA),
         "gives no update for the weight of .*by the noise level"),
        (("convert", "own.safetensors", "o.safetensors", "--adapter-kind", IA3), "name it with"),
        (("convert", "a.safetensors", "o.safetensors", "--adapter-kind", IA3, "--model", "base"),
         "has no effect: a.safetensors has no adapters of a class"),
        (("convert", "base", "o", "--adapter-kind", IA3), "is a whole model"),
    ]  # fmt: skip
    for words, said in cases:
        capsys.readouterr()
        call(*words, status=2)
        assert re.search(said, capsys.readouterr().err), (words, said)
    call("fold", "base", "own.safetensors", "folded", "--adapter-kind", IA3)
    call("redo", "folded", status=2)
    assert "runs the code of" in capsys.readouterr().err
