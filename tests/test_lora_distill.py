"""lora_distill and lora_add by the lines of cloneofsimo's README, as they are typed."""

import contextlib
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank, scaled_product
from lora_core.errors import UserError
from lora_core.formats import Layout
from merging.lora_distill import translate_words
from models.published_layouts import published_layout
from tests.installed_commands import typed_words
from tests.tiny_pipeline import pipeline, random_state

PLAIN = ("*attn?.to_*", "*ff.net.0.proj")
RESNET = "down_blocks.0.resnets.0.conv1"


@pytest.fixture
def here(tmp_path: Path, model: Path, layout: Layout) -> Path:
    """The places that the README names: a model under its hub id, and LoRA files of rank 4."""
    shutil.copytree(model, tmp_path / "runwayml/stable-diffusion-v1-5")
    (tmp_path / "example_loras").mkdir()
    pipe = pipeline()
    for seed, name in enumerate(("lora_krk", "analog_svd_rank4")):
        state = random_state(pipe, rank=4, seed=seed, unet=PLAIN, text=("*self_attn*",))
        file = tmp_path / "example_loras" / f"{name}.safetensors"
        formats.save(state, file, format="cloneofsimo", layout=layout)
    return tmp_path


def type_line(line: str, here: Path, run: Callable[[list[str]], int]) -> None:
    (words,) = typed_words(line, here)
    with contextlib.chdir(here):
        assert run(words) == 0


def test_lora_add_merges_a_full_model_with_a_lora(here: Path, layout: Layout) -> None:
    line = "lora_add runwayml/stable-diffusion-v1-5 ./example_loras/lora_krk.safetensors "
    type_line(f"{line} ./output_merged 0.8 --mode upl", here, merge.lora_add)
    unet = "unet/diffusion_pytorch_model.safetensors"
    before = load_file(here / "runwayml/stable-diffusion-v1-5" / unet)
    after = load_file(here / "output_merged" / unet)
    state = formats.load(here / "example_loras/lora_krk.safetensors", layout)
    for path, lr in state.components["unet"].items():
        name = f"{path}.weight"
        update = scaled_product(lr).double()  # type: ignore[arg-type]
        expected = before[name].double() + 0.8 * update
        assert torch.allclose(after[name].double(), expected, atol=1e-6), path


def test_lora_add_writes_the_original_ckpt_format(here: Path) -> None:
    line = "lora_add runwayml/stable-diffusion-v1-5 ./example_loras/lora_krk.safetensors "
    type_line(f"{line} ./output_merged.ckpt 0.7 --mode upl-ckpt-v2", here, merge.lora_add)
    content = torch.load(here / "output_merged.ckpt", weights_only=True)
    assert any(key.startswith("model.diffusion_model.") for key in content["state_dict"])


def save_sd15_file(file: Path, seed: int) -> None:
    """A rank-4 file of the 144 and 48 layers of lora_pti in Stable Diffusion 1.5."""
    layout, noise = published_layout("sd1"), torch.Generator().manual_seed(seed)
    components: dict[str, dict[str, LowRank]] = {"unet": {}, "text_encoder": {}}
    for component, globs in (("unet", PLAIN), ("text_encoder", ("*self_attn*",))):
        for path, shape in layout.component(component).shapes.items():
            if any(fnmatch(path, glob) for glob in globs) and len(shape) == 2:
                down = torch.randn(4, shape[1], generator=noise)
                up = torch.randn(shape[0], 4, generator=noise)
                components[component][path] = LowRank(down, up, 1.0)
    assert [len(modules) for modules in components.values()] == [144, 48]
    formats.save(AdapterState(components), file, format="cloneofsimo", layout=layout)


def test_lora_add_merges_a_lora_with_a_lora(here: Path) -> None:
    for seed, name in enumerate(("lora_krk", "analog_svd_rank4")):
        save_sd15_file(here / f"example_loras/{name}.safetensors", seed)
    line = "lora_add ./example_loras/analog_svd_rank4.safetensors "
    line += "./example_loras/lora_krk.safetensors ./krk_analog.safetensors 2.0 0.7"
    type_line(line, here, merge.lora_add)
    names = ("analog_svd_rank4", "lora_krk")
    first, second = (load_file(here / f"example_loras/{name}.safetensors") for name in names)
    for key, value in load_file(here / "krk_analog.safetensors").items():
        assert torch.allclose(value, 2.0 * first[key] + 0.7 * second[key], atol=1e-5), key


def test_lora_distill_writes_the_nearest_file_of_its_rank(
    here: Path, layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(here / "runwayml/stable-diffusion-v1-5", here / "tuned")
    noise = torch.Generator().manual_seed(0)
    file = here / "tuned/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    changes = {}
    for name, value in weights.items():
        if value.ndim > 1:
            changes[name] = 0.1 * torch.randn(value.shape, generator=noise)
            weights[name] = value + changes[name]
    save_file(weights, file, {"format": "pt"})
    line = "lora_distill --target_model=tuned --base_model=runwayml/stable-diffusion-v1-5 "
    line += "--rank=2 --clamp_quantile=0.99 --device='cuda:0' --save_path=lora.safetensors"
    type_line(line, here, merge.lora_distill)
    assert "no entry was clipped" in capsys.readouterr().out
    state = formats.load(here / "lora.safetensors", layout)
    assert RESNET in state.components["unet"]
    for path, lr in state.components["unet"].items():
        change = changes[f"{path}.weight"].flatten(1)
        u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
        best = (change.double() - (u[:, :2] * s[:2]) @ v[:2]).norm()
        error = (scaled_product(lr).flatten(1).double() - change).norm()  # type: ignore[arg-type]
        assert error <= 1.05 * best, path


def test_words_of_lora_distill(capsys: pytest.CaptureFixture[str]) -> None:
    options = translate_words(["tuned", "base"])
    assert (options.base, options.tuned, options.keep.rank) == ("base", "tuned", 4)
    assert options.out == "svd_distill.safetensors" and options.files.format == "cloneofsimo"
    for words, said in (
        (["tuned"], "needs --base_model"),
        (["a", "b", "--clamp_quantile=2"], r"expected a number in \(0, 1\]"),
        (["a", "b", "--save_path=x.pt"], r"ends in \.safetensors"),
    ):
        with pytest.raises(UserError, match=said):
            translate_words(words)
    assert merge.lora_distill(["--help"]) == 0 and merge.lora_distill([]) == 2
    assert "--clamp_quantile" in capsys.readouterr().out


@pytest.mark.parametrize("command", [merge.lora_add, merge.lora_distill])
def test_without_words_they_print_their_page(
    command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["--help"]) == 0
    page = capsys.readouterr()
    assert f"example: {command.__name__} " in page.out and not page.err
    assert command([]) == 2
    assert capsys.readouterr() == page
