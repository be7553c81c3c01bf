"""A tiny model, LoRA files for it and a few pictures on disk, and runs of two steps on them."""

import contextlib
import copy
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_core.adapters.weight_updates import AdapterState
from lora_core.config import (
    AdapterConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    SamplesConfig,
    Stage,
    ValidationConfig,
)
from lora_core.formats import Layout, layout_of
from lora_core.runs.pictures import CELLS, ImageRow

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(
    prefix="lora_core_cache_"
)  # a developer's own measurements are not what is tested
os.environ["SOURCE_DATE_EPOCH"] = "1700000000"  # files of equal content have equal bytes
os.fsync = lambda handle: None  # nothing here outlives a loss of power; a run waits 20 times
torch.set_num_threads(1)  # a second thread waits at every barrier for a core that a neighbour has
os.environ["OMP_NUM_THREADS"] = "1"  # the same for scripts that tests start: equal bits
COLOURS = ["red", "green", "blue", "pink", "navy"]
# words of benchmarks.kernels: one small layer
TINY_LAYER = ["--device", "cpu", "--shape", "16,24,24", "--rank", "4", "--rounds", "3"]


def save_pipeline(folder: Path, *, channels: int = 4) -> Path:
    """The random pipeline of tests/tiny_pipeline.py, with a VAE of factor 2, in the diffusers
    layout.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from tests.tiny_pipeline import pipeline

    pipe = pipeline()
    torch.manual_seed(1)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    pipe.vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks
    )
    if channels != pipe.unet.config.in_channels:
        pipe.unet = UNet2DConditionModel.from_config(
            dict(pipe.unet.config) | {"in_channels": channels, "_use_default_values": []}
        )
    pipe.save_pretrained(folder)
    return folder


def save_photos(
    folder: Path, captions: str = "a photo of TOK", *, side: int = 24, count: int = 5
) -> Path:
    """Pictures that differ in colour and in a rectangle, each with its caption and its mask."""
    folder.mkdir(parents=True)
    for i, colour in enumerate(COLOURS[:count]):
        picture, mask = (
            Image.new("RGB", (side + 4 * i, side), colour),
            Image.new("L", (side + 4 * i, side), 0),
        )
        picture.paste("white", (4, 4 + i, 12, 16 + i))
        mask.paste(255, (4, 4 + i, 16, 20))
        picture.save(folder / f"{i}.png")
        mask.save(folder / f"{i}.mask.png")
        (folder / f"{i}.txt").write_text(captions)
    return folder


def pytest_collection_finish() -> None:
    """The collector looks at the libraries' objects no more: a tenth of the time of all tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def repository() -> Iterator[None]:
    """The working folder of all tests, which name toy/model and examples/, wherever pytest was
    started.
    """
    with contextlib.chdir(Path(__file__).parent.parent):
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="session")
def layout(model: Path) -> Layout:
    """The layout of the tiny model."""
    from models import read_layout

    return read_layout(str(model))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Five noise images of several sizes with captions in text files."""
    from tests.image_examples import noise_image, save_image

    for i, size in enumerate([(12, 10), (9, 17), (8, 8), (23, 11), (10, 13)]):
        save_image(noise_image(*size, seed=i), tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"a photo of TOK {i}\n")
    return tmp_path / "images"


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL model on disk, to be read only."""
    from tests import tiny_sdxl

    folder = tmp_path_factory.mktemp("sdxl") / "model"
    tiny_sdxl.save(folder)
    return folder


@pytest.fixture(scope="session")
def pipe() -> "StableDiffusionPipeline":
    """The tiny pipeline of tests/tiny_pipeline.py, to be read only."""
    from tests.tiny_pipeline import pipeline

    return pipeline()


@pytest.fixture(scope="session")
def pipe_layout() -> Layout:
    """The layout of the tiny pipeline with diffusers' names alone."""
    from tests.tiny_pipeline import pipeline

    pipe = pipeline()
    modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return layout_of(modules, base_model_version="sd_v1", architecture="arch/lora")


@pytest.fixture(scope="session")
def flow_layout() -> Layout:
    """The layout of a tiny Flux, whose files store some layers as one."""
    from models import flux
    from tests import tiny_flux

    flow = tiny_flux.pipeline()
    modules = {"transformer": flow.transformer, "text_encoder": flow.text_encoder}
    return flux.flux_layout({**modules, "text_encoder_2": flow.text_encoder_2})


@pytest.fixture(scope="session")
def lora_files(
    layout: Layout, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, AdapterState]]:
    """(a folder of LoRA files for the tiny model, name -> the content of each)."""
    from tests.merge_commands import save_loras

    folder = tmp_path_factory.mktemp("loras")
    return folder, save_loras(folder, layout)


@pytest.fixture
def states(lora_files: tuple[Path, dict[str, AdapterState]]) -> dict[str, AdapterState]:
    """Name -> the content of each LoRA file in `here`."""
    return lora_files[1]


@pytest.fixture
def here(
    lora_files: tuple[Path, dict[str, AdapterState]],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The working folder, with the LoRA files in it and the model as "base"."""
    for file in lora_files[0].iterdir():
        (shutil.copytree if file.is_dir() else shutil.copy)(file, tmp_path / file.name)
    (tmp_path / "base").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def spoiled(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`here`, with files that are no good, an output that exists and no way to the hub."""
    tensors = load_file("a.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, "nan.safetensors")
    Path("cut.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:1000])
    Path("empty.safetensors").write_bytes(b"")
    foreign = {f"unet.elsewhere.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(foreign, "other.safetensors")
    Path("taken.safetensors").write_bytes(b"precious")
    os.mkdir("locked")
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda place, mode: "locked" not in str(place) and access(place, mode)
    )  # root may write anywhere

    def refuse(self: object, name: str) -> None:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", refuse)
    return here


@pytest.fixture
def config(model: Path, photos: Path, tmp_path: Path) -> Config:
    """Two steps of the denoiser's LoRA at 16 pixels, with as little around them as there can be."""
    return Config(
        model=str(model),
        out=str(tmp_path / "run"),
        device="cpu",
        batch_size=2,
        log_every=1,
        adapter=AdapterConfig(rank=4),
        data=DataConfig(images=str(photos), resolution=16),
        optimizer=OptimizerConfig(lr={"denoiser": 1e-2}),
        stages=(Stage(steps=2),),
        samples=SamplesConfig(steps=1, guidance=1.0, prompts=("a TOK",), seeds=1, new_prompts=()),
        validation=ValidationConfig(bins=1),
    )


def merged(config: Config, change: dict[str, Any]) -> Config:
    """The config with some of its fields replaced, section by section."""
    tables = ("loss_arg", "weighting_arg")
    return replace(
        config,
        **{
            k: replace(getattr(config, k), **v) if isinstance(v, dict) and k not in tables else v
            for k, v in change.items()
        },
    )


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without plots and page at their end."""
    from training import results

    monkeypatch.setattr(results.reports, "plot_metrics", lambda folder, scored: [])
    monkeypatch.setattr(results, "write_report", lambda runs: None)


@pytest.fixture
def plain(without_plots: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without pictures, plots and page at their end: their sheets say what would be there."""
    from training import results, samples

    def draw(self: object, prompts: Sequence[str], **_: bool) -> list[Image.Image]:
        return [Image.new("RGB", (1, 1)) for _ in prompts]

    monkeypatch.setattr(samples.pictures, "draw_grid", blank_grid)
    monkeypatch.setattr(results.SampleImages, "draw", draw)


def blank_grid(rows: Sequence[ImageRow], **_: Any) -> Image.Image:
    """One pixel in the place of a sheet of images, with what it says of them."""
    sheet = Image.new("RGB", (1, 1))
    cells = sheet.info[CELLS] = []
    for row in rows:
        for i in range(len(row.images)):
            caption = row.captions[i] if row.captions else ""
            own = {"role": row.role, "label": row.label, "strength": row.strength}
            cells.append({"box": (0, 0, 1, 1), "caption": caption, **own})
    return sheet


@pytest.fixture
def patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter patches triton.language anew for every function that a kernel calls
    (3.6.0, 3.7.1, 3.9.0).

    Once a launch is enough, for each module that such functions use, and four times faster.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, scopes = interpreter._patch_lang, []
    patched: set[str] = set()

    class Scope:
        def restore(self) -> None:
            patched.clear()
            while scopes:
                scopes.pop().restore()

    def once(fn: object) -> Scope | None:
        seen = {
            name
            for name, of in (("language", tl), ("core", tl.core))
            if any(of is value for value in fn.__globals__.values())
        }
        if seen <= patched:
            return None
        outermost = not scopes
        patched.update(seen)
        scopes.append(patch(fn))
        return Scope() if outermost else None

    monkeypatch.setattr(interpreter, "_patch_lang", once)


def rows(run: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


_FAMILIES: dict[str, object] = {}
_LAYOUTS: dict[tuple[object, ...], Layout] = {}


@pytest.fixture
def quick(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like `plain`, and a model is read from the disk only once."""
    from training import setup

    def load(*args: object, **settings: object) -> object:
        key = repr((args, settings))
        if key not in _FAMILIES:
            _FAMILIES[key] = load_family(*args, **settings)
        return copy.deepcopy(_FAMILIES[key])

    def read(*args: object) -> Layout:
        if args not in _LAYOUTS:
            _LAYOUTS[args] = read_layout(*args)
        return _LAYOUTS[args]

    load_family, read_layout = setup.load_family, setup.read_layout
    monkeypatch.setattr(setup, "load_family", load)
    monkeypatch.setattr(setup, "read_layout", read)


def final(run: Path) -> dict[str, torch.Tensor]:
    """The parameters and the optimiser state in the newest checkpoint of a run."""
    return load_file(
        max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
        / "state.safetensors"
    )


def learned(run: Path) -> dict[str, torch.Tensor]:
    """Group and number -> parameter, of the newest checkpoint."""
    return {name: tensor for name, tensor in final(run).items() if name.startswith("groups/")}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of two sets of tensors."""
    assert a.keys() == b.keys()
    return max(
        ((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-30)).item()
        for k in a
        if a[k].is_floating_point()
    )


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether they agree to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def winners_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of an empty user's table of winners; both tables are read anew before and after."""
    from lora_core.kernels import choice

    with monkeypatch.context() as inside:
        inside.setenv("XDG_CACHE_HOME", str(tmp_path))
        choice.reload_winners()
        yield tmp_path / "lora_core" / "winners.json"
    choice.reload_winners()


def measured_rows(*rows: tuple[str, str, str, str]) -> dict:
    """The part of a table of winners that one device has."""
    named = [dict(zip(("op", "dtype", "class", "winner"), row)) for row in rows]
    return {"command": "a test", "date": "2026-11-21", "machine": "here", "rows": named}


@pytest.fixture
def kernels_benchmark(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """benchmarks.kernels in this process, few repeats: words -> (exit status, stdout, stderr)."""
    from benchmarks import kernels, timing
    from benchmarks.measure import DeviceRates
    from lora_core.kernels import choice

    monkeypatch.setattr(timing, "FLOOR", 0.0)
    monkeypatch.setattr(kernels, "measure_device_rates", lambda setting: DeviceRates(1e10, 1e11))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run(*argv: str) -> tuple[int, str, str]:
        status = kernels.main(list(argv))
        out = capsys.readouterr()
        return status, out.out, out.err

    yield run
    monkeypatch.undo()
    choice.reload_winners()
