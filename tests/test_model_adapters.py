"""lora_core's calls for notebooks: on a family, a pipeline, a dictionary and one network."""

import pydoc
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import lora_core as lc
from lora_core.adapters import custom_files, injection
from lora_core.adapters.model_adapters import adapter_state
from lora_core.adapters.weight_updates import delta_weight
from lora_core.formats.known_formats import CUSTOM_KIND

ROOT = Path(__file__).parent.parent
SPEC = lc.AdapterSpec(("to_k", "to_v"), rank=2)


@pytest.fixture
def pipe(model: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(model)


def fill(model: object, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lc.parameters(model):
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))


def output(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, unet.config.in_channels, 8, 8, generator=generator)
    text = torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([5]), text).sample


def given_models(model: Path, pipe: StableDiffusionPipeline) -> dict[str, object]:
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {
        "family": lc.load_family(str(model)),
        "pipeline": pipe,
        "parts": parts,
        "unet": pipe.unet,
    }


@pytest.mark.parametrize("kind", ["family", "pipeline", "parts", "unet"])
def test_inject_save_load_remove_on_whatever_is_given(
    model: Path, pipe: StableDiffusionPipeline, tmp_path: Path, kind: str
) -> None:
    """The file gives diffusers' own loader the same network."""
    given = given_models(model, pipe)[kind]
    unet = given.modules["unet"] if kind == "family" else pipe.unet
    before = output(unet)
    paths = lc.inject(given, SPEC)
    assert paths and torch.equal(output(unet), before)
    trained = {p for p in unet.parameters() if p.requires_grad}
    assert trained == set(lc.parameters(given))
    fill(given)
    after = output(unet)
    assert not torch.allclose(after, before, atol=1e-4)
    lc.save(given, tmp_path / "mine.safetensors")
    lc.set_strength(given, 0.0)
    assert torch.equal(output(unet), before)
    state = lc.state(given)
    assert list(state.components) == ["unet"] and len(state.components["unet"]) == len(paths)
    lc.remove(given)
    assert torch.equal(output(unet), before)
    theirs = StableDiffusionPipeline.from_pretrained(model)
    theirs.load_lora_weights(tmp_path / "mine.safetensors")
    torch.testing.assert_close(output(theirs.unet), after, atol=1e-5, rtol=1e-5)
    lc.load(given, tmp_path / "mine.safetensors")
    assert torch.equal(output(unet), after)


@pytest.mark.parametrize("kind", ["family", "pipeline"])
def test_a_kind_that_reads_the_level_knows_the_schedule(
    model: Path, pipe: StableDiffusionPipeline, tmp_path: Path, kind: str
) -> None:
    given, spec = given_models(model, pipe)[kind], replace(SPEC, kind="examples/t_lora.py:TLoRA")
    unet = given.modules["unet"] if kind == "family" else pipe.unet
    before = output(unet)
    lc.inject(given, spec)
    fill(given)
    after = output(unet)
    file = tmp_path / "own_adapter.safetensors"
    header = {CUSTOM_KIND: spec.kind, "lora_core.config": "[adapter]\nrank = 2"}
    custom_files.save_adapters({"unet": unet}, file, header)
    lc.remove(given)
    with lc.patch(given, file, kind=spec.kind):
        assert torch.equal(output(unet), after) and not torch.equal(after, before)
    assert torch.equal(output(unet), before) and not unet._forward_pre_hooks


def test_presets_by_name_other_components_and_names(model: Path, tmp_path: Path) -> None:
    family = lc.load_family(str(model))
    paths = lc.inject(family, lc.AdapterSpec(("attention",), rank=2))
    bare = lc.load_family(str(model)).modules["unet"]
    wanted = injection.inject(bare, lc.AdapterSpec(lc.presets(family)["attention"], rank=2))
    assert paths == wanted and "attention" in lc.presets(family, "text_encoder")
    first = lc.parameters(family)
    lc.inject(family, lc.AdapterSpec(("attention",), rank=1), component="text_encoder")
    assert all(p.requires_grad for p in first)  # the second call froze the base alone
    assert len(lc.parameters(family)) > len(first)
    fill(family)
    lc.save(family, tmp_path / "both.safetensors", format="kohya")
    other = lc.load_family(str(model))
    lc.load(other, tmp_path / "both.safetensors", name="other")
    ours, theirs = adapter_state(family), adapter_state(other, "other")
    assert ours.components.keys() == theirs.components.keys() == {"unet", "text_encoder"}
    for component, layers in ours.components.items():
        for path, factors in layers.items():
            loaded = theirs.components[component][path]
            assert torch.equal(delta_weight(loaded), delta_weight(factors))


def test_mistakes_are_sentences(model: Path, pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    family = lc.load_family(str(model))
    with pytest.raises(lc.UserError, match="no network of the model has an adapter 'default'"):
        lc.parameters(family)
    with pytest.raises(lc.UserError, match="the model has no 'text_encoder_2'; it has unet, text_"):
        lc.inject(family, SPEC, component="text_encoder_2")
    with pytest.raises(lc.UserError, match=r"presets belong to a model family; load_family"):
        lc.presets(pipe)
    with pytest.raises(lc.UserError, match=r"'attention' names no layer .*, or inject into load_"):
        lc.inject(pipe, lc.AdapterSpec(("to_q", "attention")))
    with pytest.raises(lc.UserError, match=r"expected an AdapterSpec, got 'attention'"):
        lc.inject(pipe, "attention")
    with pytest.raises(lc.UserError, match=r"targets is the text 'to_q'; expected a tuple"):
        lc.AdapterSpec("to_q")
    own = lc.AdapterSpec(("to_k",), kind=str(ROOT / "examples" / "my_adapter.py:IA3"))
    lc.inject(pipe, own)
    for call in (lc.state, lambda pipe: lc.save(pipe, tmp_path / "own.safetensors")):
        with pytest.raises(lc.UserError, match=r"IA3 has no form in .*save_adapters"):
            call(pipe)
    lc.inject(family, lc.AdapterSpec(("attention",), rank=1), component="text_encoder")
    fill(family)
    lc.save(family, tmp_path / "text.safetensors")
    with pytest.raises(lc.UserError, match=r"adapts text_encoder; the model has unet"):
        lc.load(pipe.unet, tmp_path / "text.safetensors")


def test_help_is_a_page_that_names_every_call() -> None:
    whole = pydoc.plain(pydoc.render_doc(lc))
    assert len(whole.splitlines()) < 160 and "inject = inject_adapters(model" in whole
    page = whole.split("PACKAGE CONTENTS")[0]
    missing = [name for name in lc.PUBLIC if f"lc.{name}" not in page and name != "Patch"]
    assert not missing and max(map(len, page.splitlines())) <= 88
    assert len(page.splitlines()) <= 45
    for name in lc.PUBLIC:
        assert getattr(lc, name).__doc__
    probe = "import sys, lora_core; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT).returncode == 0


def test_the_notebook_trains_and_diffusers_loads_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own text, with fewer steps."""
    (tmp_path / "toy").symlink_to(ROOT / "toy")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "examples" / "notebook.py").read_text()
    code = [line for line in text.splitlines() if line and not line.startswith('"')]
    assert len(code) <= 25
    short = text.replace("range(200)", "range(2)").replace("=4)", "=4, num_inference_steps=2)")
    (tmp_path / "short.py").write_text(short)
    runpy.run_path(str(tmp_path / "short.py"))
    assert (tmp_path / "zib.png").stat().st_size > 1000
    assert (tmp_path / "zib.safetensors").is_file()
