"""Adapters without a low-rank form: saved as their own parameters and as a whole model.

Which files are written is decided before the first step.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import infer
import train
from lora_core import formats, patch
from lora_core.adapters import custom_files, injection
from lora_core.adapters.folded_weights import merged_state_dict
from lora_core.adapters.injection import AdapterSpec
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.config import Config, OptimizerConfig, Stage
from lora_core.errors import UserError
from lora_core.formats.known_formats import CUSTOM_KIND
from models import load_family, save_family
from tests.conftest import final, same
from training import setup

IA3 = "examples/my_adapter.py:IA3"
# classes with and without a state for adapter files
FORMS = '''
import torch
from torch import nn
from lora_core.errors import UserError
from lora_core.adapters.kinds import LoRA

class Shift(nn.Module):
    """delta W = one number a layer."""
    def __init__(self, base, layer):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(()))
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, base, x, strength):
        return base(x) + self.update(base, x, None, strength)
    def update(self, base, x, y0, strength):
        total = x.sum(-1, keepdim=True)
        return strength * self.by * total
    def delta_weight(self, base):
        return self.by.detach().expand(base.weight.shape)

class Refuses(Shift):
    def state(self):
        raise UserError("no factors")

class NotYet(Shift):
    def state(self):
        raise NotImplementedError

class Nothing(nn.Module):
    def __init__(self, base, layer):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(()))
    def forward(self, base, x, strength):
        return base(x) + self.by

class Crooked(Shift):
    def delta_weight(self, base):
        return self.by.detach()

class Counting(Shift):
    """Its update grows with the number of training forwards, which a buffer counts."""
    options = ("rank",)
    def __init__(self, base, layer):
        super().__init__(base, layer)
        self.rank = layer.rank
    def gain(self):
        return self.rank * (1 + 0.1 * self.calls)
    def update(self, base, x, y0, strength):
        if torch.is_grad_enabled():
            self.calls += 1
        return self.gain() * super().update(base, x, y0, strength)
    def delta_weight(self, base):
        return self.gain() * super().delta_weight(base)

class Half(LoRA):
    pass
'''

FACTORED = (
    "Refuses",
    "NotYet",
    "Half",
    "dora",
)  # what has a `state`, so that a rank may have a part in it


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("forms") / "forms.py"
    file.write_text(FORMS)
    return str(file)


def injected(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.SiLU(), torch.nn.Conv2d(6, 4, 1))
    injection.inject(
        model, AdapterSpec(("0",), kind=kind, rank=2 if kind.split(":")[-1] in FACTORED else 16)
    )
    return model


@pytest.mark.parametrize(
    ("kind", "has"), [("Shift", False), ("Refuses", False), ("NotYet", False), ("Half", True)]
)
def test_whether_there_are_factors_is_asked_of_the_class(forms: str, kind: str, has: bool) -> None:
    assert custom_files.has_factors(injected(f"{forms}:{kind}")) is has
    assert (
        not custom_files.has_factors(injected(IA3))
        and not custom_files.has_factors(injected("full"))
        and custom_files.has_factors(injected("dora"))
    )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Nothing", r"neither factors nor a weight update.*unet.0"),
        ("Crooked", r"delta_weight of .* is \[\]"),
    ],
)
def test_what_no_file_could_hold_is_refused(forms: str, kind: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        custom_files.check_custom_kind(
            {"unet": injected(f"{forms}:{kind}")}, f"{forms}:{kind}", "run"
        )


@pytest.mark.parametrize("kind", ["Shift", "IA3"])
def test_own_parameters_come_back_and_what_does_not_fit_is_refused(
    forms: str, tmp_path: Path, kind: str
) -> None:
    kind = IA3 if kind == "IA3" else f"{forms}:{kind}"
    model, other = injected(kind), injected(kind)
    with torch.no_grad():
        for p in injection.adapter_parameters(model):
            p.normal_()
    x = torch.randn(3, 4)
    file = custom_files.save_adapters({"unet": model}, tmp_path / "a.safetensors", {"k": "v"})
    assert not torch.equal(model[0](x), other[0](x))
    custom_files.load_adapters({"unet": other}, file)
    assert torch.equal(model[0](x), other[0](x))
    folded = merged_state_dict(model)
    assert torch.allclose(
        torch.nn.functional.linear(x, folded["0.weight"], folded["0.bias"]), model[0](x), atol=1e-6
    )
    tensors = load_file(file)
    name = next(iter(tensors))
    for changed, said in (
        ({}, "holds no tensors"),
        ({"unet.9.x": torch.ones(1)}, "only the model has"),
        (tensors | {"unet.9.x": torch.ones(1)}, "only the file has"),
        (tensors | {name: torch.ones(9)}, "9"),
    ):
        save_file(changed, tmp_path / "b.safetensors")
        before = [p.clone() for p in injection.adapter_parameters(other)]
        with pytest.raises(UserError, match=said):
            custom_files.load_adapters({"unet": other}, tmp_path / "b.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(before, injection.adapter_parameters(other)))


def test_a_run_writes_its_own_form_and_the_whole_model(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    own = replace(
        config,
        adapter=replace(config.adapter, kind=IA3, rank=16),
        stages=(Stage(4, ("denoiser", "text_encoder")),),
        optimizer=OptimizerConfig(),
    )
    run = train.train(own)
    out = capsys.readouterr().out
    assert (
        f"{IA3} has no low-rank form: the run writes run_adapter.safetensors" in out
        and "rank" not in out.replace("low-rank", "")
    )
    for name in ("unet", "text_encoder"):
        said = rf"^model/: {name} with its adapters folded in, error of the update \d\.\de-0[4-8]$"
        assert re.search(said, out, re.MULTILINE), out
    assert (
        not (run / "pytorch_lora_weights.safetensors").exists()
        and not (run / "run.safetensors").exists()
    )
    assert "run_adapter.safetensors" in json.loads((run / "summary.json").read_text())["files"]
    with safe_open(run / "run_adapter.safetensors", "pt") as file:
        assert IA3 in file.metadata()["lora_core.config"]
    card = (run / "README.md").read_text()
    assert (
        "run_adapter.safetensors" in card
        and "no low-rank form" in card
        and "[model](model)" in card
        and "rank 16" not in card
    )
    for place in (
        run,
        run / "run_adapter.safetensors",
    ):  # read as a LoRA, by infer.py --lora and merge.py
        said = rf"holds adapters without a low-rank form.*, {IA3} by its header.*{run / 'model'}"
        with pytest.raises(UserError, match=said):
            formats.load(place)
    tuned, plain = load_family(str(run / "model")), load_family(config.model)
    for name in ("unet", "text_encoder"):
        injection.inject(
            plain.modules[name], AdapterSpec(plain.layout.presets[name]["attention"], kind=IA3)
        )
    modules = {name: plain.modules[name] for name in ("unet", "text_encoder")}
    custom_files.load_adapters(modules, run / "run_adapter.safetensors")
    for name, module in modules.items():
        folded, written = merged_state_dict(module), tuned.modules[name].state_dict()
        assert all(torch.allclose(folded[key], written[key], atol=1e-6) for key in written)
    train.train(
        replace(own, out=config.out + "part", stages=(Stage(2, ("denoiser", "text_encoder")),))
    )
    assert same(final(train.train(replace(own, out=config.out + "part", resume=True))), final(run))


def test_a_kind_that_is_wrong_is_refused_before_any_weight(
    config: Config, forms: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_family", lambda *_: pytest.fail("weights were read"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kind": IA3, "rank": 4}, "--adapter.rank is 4, which has no effect on"),
        ({"kind": IA3, "rank": 16, "dropout": 0.1}, "--adapter.dropout is 0.1"),
        ({"kind": "examples/my_adapter.py:IA4"}, "has no class 'IA4'"),
        ({"kind": "nothing.py:IA3"}, "names no Python file"),
    ]
    for change, said in cases:
        with pytest.raises(UserError, match=said):
            train.train(replace(config, adapter=replace(config.adapter, **change)))


def test_a_folder_that_holds_a_whole_model_is_no_lora(tmp_path: Path) -> None:
    (tmp_path / "run/model").mkdir(parents=True)
    with pytest.raises(
        UserError,
        match=r"has no LoRA: its run trained the whole model, which is .*run/model; "
        "give that as the model",
    ):
        formats.load(tmp_path / "run")


def test_buffers_are_resumed_and_settings_are_the_runs(
    config: Config, forms: str, quick: None, tmp_path: Path
) -> None:
    kind = f"{forms}:Counting"
    own = replace(
        config,
        adapter=replace(config.adapter, kind=kind, rank=3),
        optimizer=OptimizerConfig(lr={"denoiser": 1e-4}),
        stages=(Stage(4, ("denoiser",)),),
    )
    run = train.train(own)
    part = replace(own, out=config.out + "part", stages=(Stage(2, ("denoiser",)),))
    train.train(part)
    resumed = train.train(replace(own, out=part.out, resume=True))
    assert same(final(resumed), final(run))
    written = load_file(run / "run_adapter.safetensors")
    calls = {key: float(tensor) for key, tensor in written.items() if key.endswith("calls")}
    assert calls and set(calls.values()) == {4.0}
    family = load_family(config.model)
    unet = family.modules["unet"]
    weights = load_family(str(run / "model")).modules["unet"].state_dict()
    with patch(unet, run / "run_adapter.safetensors", kind=kind) as applied:
        (adapter, *_) = [m for m in unet.modules() if type(m).__name__ == "Counting"]
        assert adapter.rank == 3 and adapter.calls == 4
        folded = merged_state_dict(unet, applied.name)
        assert all(torch.allclose(folded[key], weights[key], atol=1e-6) for key in weights)
        applied.set_strength(0.5)
    assert not any(type(m).__name__ == "Counting" for m in unet.modules())


def test_a_class_runs_only_when_it_is_named_again(forms: str, tmp_path: Path) -> None:
    kind, unet = f"{forms}:Shift", torch.nn.ModuleDict({"a": torch.nn.Linear(4, 6)})
    injection.inject(unet, AdapterSpec(("a",), kind=kind))
    header = {CUSTOM_KIND: kind}
    file = custom_files.save_adapters({"unet": unet}, tmp_path / "x.safetensors", header)
    injection.remove(unet)
    modules = {"unet": unet}
    with pytest.raises(UserError, match=r"Its code is not run unasked: name the class again"):
        patch(modules, file)
    with pytest.raises(UserError, match=r"only the file has unet.a"):
        patch(modules, file, kind=IA3)
    with pytest.raises(UserError, match=r"adapts unet, but only text_encoder was given"):
        patch({"text_encoder": unet}, file, kind=kind)
    other = {"unet": torch.nn.ModuleDict({"b": torch.nn.Linear(4, 6)})}
    with pytest.raises(UserError, match=r"has no layer of unet.a.by of .* for another model"):
        patch(other, file, kind=kind)
    save_file(load_file(file), file, {**header, "lora_core.config": "[adapter]\nrank = 'x'"})
    with pytest.raises(UserError, match="rank"):
        patch(modules, file, kind=kind)
    assert isinstance(unet["a"], torch.nn.Linear)
    layout = formats.layout_of(modules)
    update = {"a": LowRank(torch.ones(1, 4), torch.ones(6, 1), 1.0)}
    formats.save(AdapterState({"unet": update}), tmp_path / "l.safetensors", layout=layout)
    with pytest.raises(UserError, match=r"holds no adapters of a class of its own"):
        patch(modules, tmp_path / "l.safetensors", kind=kind)


def test_infer_draws_as_the_folded_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = load_family(str(model))
    unet = family.modules["unet"]
    injection.inject(unet, AdapterSpec(family.layout.presets["unet"]["attention"], kind=IA3))
    with torch.no_grad():
        for p in injection.adapter_parameters(unet):
            p.normal_(generator=torch.Generator().manual_seed(len(p)))
    file = tmp_path / "x_adapter.safetensors"
    custom_files.save_adapters({"unet": unet}, file, {CUSTOM_KIND: IA3})
    states = {"unet": merged_state_dict(unet)}
    save_family(family, str(model), tmp_path / "folded", states, "")
    common = ["--prompt", "a", "--steps", "2", "--out"]
    applied = ["--model", model, "--lora", file, "--adapter-kind", IA3]
    images = []
    for words in (["--model", tmp_path / "folded"], applied, ["--model", model]):
        out = tmp_path / f"{len(images)}.png"
        assert infer.main([str(word) for word in (*words, *common, out)]) == 0
        images.append(numpy.asarray(Image.open(out)).astype(int))
    folded, drawn, plain = images
    assert abs(folded - drawn).max() <= 2 < abs(folded - plain).max()
    again = ["--from", tmp_path / "1.png", "--out", tmp_path / "again.png"]
    for words, said in (
        (["--model", model, "--lora", file, *common, out], "is not run unasked"),
        (["--model", model, "--adapter-kind", IA3, *common, "new.png"], "has no effect: no --lora"),
        (again, "is not run unasked"),  # an image does not name code
    ):
        capsys.readouterr()
        assert infer.main([str(word) for word in (*words, "--overwrite")]) == 2
        assert said in capsys.readouterr().err
