"""What people publish of a run holds nothing of its training images, and no home folder."""

import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, TiffImagePlugin
from safetensors import safe_open

import train
from lora_core.config import AdapterConfig, Config
from lora_core.errors import UserError
from lora_core.runs import card as cards
from lora_core.toml import from_table, to_toml
from tests.conftest import save_pipeline
from tests.test_configs import put
from training.shared_config import shared_config

FACE = (255, 0, 254)  # the color of every private image, which no network draws exactly
SECRETS = ("alice", "anna", "garden", "Nikon", "client")
GPS = b"GPS\x01\x02\x03"


def save_private_photos(folder: Path) -> Path:
    """Photos of one color, with captions and EXIF data that say who and where."""
    folder.mkdir(parents=True)
    for number in range(2):
        exif = Image.Exif()
        exif[0x010F], exif[0x010E] = "Nikon of alice", "anna in the garden"
        degrees = TiffImagePlugin.IFDRational(52, 1)
        exif.get_ifd(0x8825).update({1: "N", 2: (degrees, degrees, degrees)})
        image = Image.new("RGB", (16, 16), FACE)
        image.save(folder / f"anna_{number}.png", exif=exif)
        (folder / f"anna_{number}.txt").write_text(f"TOK anna in the garden {number}")
    return folder


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Path -> content of what is uploaded to the hub."""
    files: dict[str, bytes] = {}
    made: list[bool] = []  # whether each repository was asked for as a private one

    class Api:
        def create_repo(self, repo_id: str, *, private: bool, **_: Any) -> str:
            made.append(private)
            return repo_id

        def model_info(self, repo_id: str) -> Any:
            return SimpleNamespace(private=made[-1])

        def upload_folder(self, *, folder_path: str, ignore_patterns: list[str], **_: Any) -> None:
            for path in Path(folder_path).rglob("*"):
                name = path.relative_to(folder_path).as_posix()
                if path.is_file() and not any(fnmatch(name, each) for each in ignore_patterns):
                    files[name] = path.read_bytes()

        def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, **_: Any) -> None:
            files[path_in_repo] = path_or_fileobj

    monkeypatch.setattr(cards, "HfApi", Api)
    yield files
    assert made and all(made)  # no test here asks for a public one


@pytest.fixture
def private(config: Config, plain: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The config of a run on private photos, everything below a home folder that is named."""
    monkeypatch.undo()  # draws for real
    home = tmp_path / "home" / "alice"
    monkeypatch.setenv("HOME", str(home))
    images = save_private_photos(home / "photos of anna")
    shutil.copytree(config.model, home / "base")
    data = replace(config.data, images=str(images), cache=str(home / "cache"))
    return replace(
        config,
        model=str(home / "base"),
        out=str(home / "client" / "run"),
        data=data,
        validation=replace(config.validation, images=str(images), every=0),
        samples=replace(config.samples, every=1, steps=1),
        push_to_hub="me/run",
    )


def has_color(content: bytes, path: Path) -> bool:
    path.write_bytes(content)
    pixels = Image.open(path).convert("RGB").getcolors(1 << 24) or []
    return FACE in [color for _, color in pixels]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_nothing_private_is_published(
    private: Config, uploaded: dict[str, bytes], tmp_path: Path, kind: str
) -> None:
    if kind == "full":
        private = replace(private, adapter=AdapterConfig(kind="full", targets=("all",)))
    run = train.train(private)
    for logs in ("wandb", "tensorboard"):
        (run / logs).mkdir()
        (run / logs / "events.0.alices-machine").write_text("alice")
    cards.push_to_hub(run, "me/run", contents={"config.toml": b""})  # once more, by hand
    assert {"README.md", "config.toml", "before_after.png"} <= uploaded.keys()
    for name, content in uploaded.items():
        for secret in SECRETS:
            assert secret.encode() not in content, (name, secret)
        if name.endswith(".png"):
            assert not has_color(content, tmp_path / "x.png"), name
            image = Image.open(tmp_path / "x.png")
            assert not image.getexif() and not image.info.keys() & {"exif", "xmp", "comment"}
    assert "alice" in (run / "config.toml").read_text()  # from which the run is resumed


def test_training_data_is_shown_on_demand(
    private: Config, uploaded: dict[str, bytes], tmp_path: Path
) -> None:
    train.train(replace(private, samples=replace(private.samples, show_data=True)))
    assert has_color(uploaded["before_after.png"], tmp_path / "x.png")
    assert b"anna in the garden" in uploaded["README.md"]
    assert b"anna in the garden" in uploaded["report.html"]
    assert b"photos of anna" not in b"".join(uploaded.values())


def test_an_inpainting_model_shows_no_surroundings(
    private: Config, uploaded: dict[str, bytes], tmp_path: Path
) -> None:
    model = save_pipeline(tmp_path / "inpaint", channels=9)
    train.train(replace(private, model=str(model)))
    assert not [name for name in uploaded if name.startswith(("samples/", "before_after"))]
    assert b"samples/" not in uploaded["README.md"]
    assert b"before_after" not in uploaded["README.md"]
    assert b"data:image/jpeg" not in uploaded["report.html"]
    assert b"surroundings of validation images" in uploaded["report.html"]


def test_prompts_that_are_options_are_shown(private: Config, uploaded: dict[str, bytes]) -> None:
    prompts = ("a photo of TOK on mars",)
    train.train(replace(private, samples=replace(private.samples, prompts=prompts)))
    assert b"on mars" in uploaded["README.md"]


def test_the_shared_config_is_one(private: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(private.model).parent
    data = replace(private.data, dataset=str(home))
    config = replace(private, step=f"{home / 'my.py'}:step", vae="some/vae", data=data)
    shared = shared_config(config, config.out)
    assert from_table(tomllib.loads(to_toml(shared))) == shared
    assert (shared.model, shared.vae, shared.out) == ("~/base", "some/vae", "run")
    assert shared.step == "~/my.py:step" and "alice" not in to_toml(shared)
    left_out = {"images": "", "cache": "", "dataset": ""}
    assert shared.data == replace(config.data, **left_out)
    assert shared.stages == config.stages and shared.seed == config.seed


@pytest.mark.parametrize("header", ["full", "no_captions", "short"])
def test_headers_hold_the_shared_config(private: Config, quick: None, header: Any) -> None:
    """Captions are only where kohya's trainer has them, or nowhere; names of folders nowhere."""
    files = replace(private.files, header=header)
    run = train.train(replace(private, push_to_hub="", files=files))
    for file in run.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            entries = opened.metadata() or {}
        text = str(entries)
        assert "alice" not in text and "photos of anna" not in text, file
        named = {key for key, value in entries.items() if "anna" in value}
        is_result = file.name != "state.safetensors"
        in_captions = {"ss_tag_frequency", "ss_datasets"}
        assert named == (in_captions if header == "full" and is_result else set()), file


def test_nothing_that_is_published_names_a_folder_of_this_disk(
    config: Config, uploaded: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model, the images, the class images, a loss in a file, --out: none of them below the home
    folder or the current one, each with a name that nothing else has.
    """
    places = {name: tmp_path / f"secret_{name}" for name in ("model", "data", "class", "code")}
    shutil.copytree(config.model, places["model"] / "base")
    save_private_photos(places["data"])
    save_private_photos(places["class"])
    for text in places["class"].glob("*.txt"):
        text.write_text("a person")
    places["code"].mkdir()
    loss = places["code"] / "my_loss.py"
    loss.write_text(
        "def my_loss(step):\n    return (step.out - step.target).abs().mean((1, 2, 3))\n"
    )
    home = tmp_path / "home" / "alice"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    values = {
        "model": str(places["model"] / "base"),
        "vae": str(places["model"] / "base" / "vae"),
        "data.images": str(places["data"]),
        "data.cache": str(tmp_path / "secret_cache"),
        "prior.prompt": "a person",
        "prior.images": str(places["class"]),
        "prior.count": 1,
        "validation.images": str(places["data"]),
        "loss": f"{loss}:my_loss",
        "out": str(tmp_path / "secret_out" / "run"),
        "push_to_hub": "me/run",
        "files.sidecars": True,
        "samples.every": 1,
        "stages.0.groups": ("denoiser", "tokens"),
    }
    run = train.train(put(config, values))
    assert {"run.safetensors", "run.json", "config.toml", "report.html"} <= uploaded.keys()
    paths = [str(tmp_path), str(Path.cwd()), str(home), "secret_", "alice", "/tmp", "/home"]
    for name, content in uploaded.items():
        for path in paths:
            assert path.encode() not in content, (name, path)
    published = tomllib.loads(uploaded["config.toml"].decode())
    assert (published["model"], published["vae"], published["out"]) == ("base", "vae", "run")
    assert published["loss"] == "my_loss.py:my_loss" and published["data"]["images"] == ""
    kept = tomllib.loads((run / "config.toml").read_text())
    assert kept["model"] == values["model"] and kept["loss"] == values["loss"]  # for --resume
    assert 'from_pretrained("base")' in uploaded["README.md"].decode()


@pytest.mark.parametrize("exists", ["private", "public"])
def test_a_public_repository_is_written_to_only_on_demand(
    private: Config, monkeypatch: pytest.MonkeyPatch, exists: str
) -> None:
    asked: list[bool] = []

    class Api:
        def create_repo(self, repo_id: str, *, private: bool, **_: Any) -> str:
            asked.append(private)
            return repo_id

        def model_info(self, repo_id: str) -> Any:
            return SimpleNamespace(private=exists == "private")

    monkeypatch.setattr(cards, "HfApi", Api)
    cards.check_push_target("me/run", public=True)
    if exists == "public":
        with pytest.raises(
            UserError, match=r"is a public repository; add --files.public to publish"
        ):
            cards.check_push_target("me/run")
    else:
        cards.check_push_target("me/run")
    assert asked == [False, True]
