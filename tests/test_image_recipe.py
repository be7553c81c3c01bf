"""The recipe in a PNG: other text is refused, and a stranger's sets nothing but the image."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

import infer
from lora_core.runs.image_recipe import CALL_OPTIONS, CHUNK, IMAGE_OPTIONS, START_OPTIONS
from lora_core.runs.pictures import save_png
from tests.tiny_pipeline import save_sd_pipeline


def test_an_image_without_recipe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert infer.main(["--from", str(tmp_path / "plain.png")]) == 2
    assert "no recipe" in capsys.readouterr().err


def test_a_setting_of_no_known_name_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "s.png", {CHUNK: '{"precision": "fp8"}'})
    assert infer.main(["--from", str(tmp_path / "s.png")]) == 2
    said = capsys.readouterr().err
    assert "precision: got 'fp8', expected one of fp32, bf16, fp16" in said


@pytest.mark.parametrize("recipe", ["{", "[]", "3", '{"prompt": 3}', '{"foo": 1}', "[" * 100_000])
def test_a_recipe_of_another_kind_is_refused(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "other.png", {CHUNK: recipe})
    assert infer.main(["--from", str(tmp_path / "other.png")]) == 2
    assert "other.png: its recipe" in capsys.readouterr().err


# ---------------------------------------------------------------- recipes of strangers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    save_sd_pipeline(folder / "model")
    return folder / "model"


def save_recipe(path: Path, **options: object) -> Path:
    """A PNG with a recipe that somebody wrote by hand."""
    save_png(Image.new("RGB", (8, 8)), path, {CHUNK: json.dumps(options)})
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> Path:
    """A folder of a user's files, and the current one, in which everything is drawn in a moment."""
    (tmp_path / "model").symlink_to(base)
    (tmp_path / "secret.txt").write_text("the password is 1234\n")
    exif = Image.Exif()
    exif[0x010E] = "at home"
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "face.png", exif=exif)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "option",
    [
        {"out": "face.png"},
        {"out": "../elsewhere.png"},
        {"overwrite": True, "out": "face.png"},
        {"prompts": "secret.txt"},
        {"count": 10**6},
        {"threads": 10**6},
        {"batch": 10**6},
        {"device": "cuda:77"},
        {"source": "other.png"},
        {"init_image": "face.png", "strength": 0.01},
        {"mask": "face.png"},
        {"strength": 0.01},
    ],
)
def test_a_recipe_sets_nothing_but_the_image(
    place: Path, option: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    save_recipe(place / "s.png", prompt="a cat", model="model", steps=1, seed=3, **option)
    save_recipe(place / "plain.png", prompt="a cat", model="model", steps=1, seed=3)
    before = contents(place)
    assert infer.main(["--from", "s.png"]) == 0
    said = capsys.readouterr().err
    for name in option.keys() - {"source"}:  # which is --from itself
        assert f"--{name.replace('_', '-')} {option[name]}" in said.split("left out of")[1], said
    after = contents(place)
    mine = Image.open("out.png")
    del after["out.png"]
    assert after == before and not (place.parent / "elsewhere.png").exists()
    assert "1234" not in str(mine.info) and str(option) not in str(mine.info)
    assert infer.main(["--from", "plain.png", "--out", "plain_out.png"]) == 0
    assert mine.tobytes() == Image.open("plain_out.png").tobytes()


@pytest.mark.parametrize(
    ("asked", "flags", "said"),
    [
        ({"steps": 5000}, ["--steps", "1"], "5000 steps, and a recipe may ask for 150"),
        ({"width": 4096, "height": 4096}, ["--width", "32", "--height", "32"], "16777216 pixels"),
        ({"height": 10**9}, ["--height", "32"], "1000000000 pixels of height"),
        ({"max_sequence_length": 10**9}, [], "1000000000 tokens of a prompt"),
        ({"prompt": "a " * 10**5}, ["--prompt", "a"], "200000 characters"),
        ({"lora": ["x"] * 100}, ["--lora", "none"], "100 LoRA files"),
        ({"prompt": "<lora:x:1>" * 17}, ["--prompt", "a"], "17 LoRA files"),
        ({"lora": ["x"] * 9, "prompt": "a" + "<lyco:y>" * 8}, [], "17 LoRA files"),
        ({"grid": ["seed=0:64", "steps=1:64"]}, ["--grid", "seed=0:2"], "262144 steps in all"),
    ],
)
def test_a_recipe_may_not_cost_hours(
    place: Path,
    asked: dict[str, object],
    flags: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_recipe(place / "s.png", **({"prompt": "a", "model": "model", "steps": 1} | asked))
    assert infer.main(["--from", "s.png", "--out", "mine.png"]) == 2
    error = capsys.readouterr().err
    assert said in error and f"give --{next(iter(asked)).replace('_', '-')}" in error
    assert not Path("mine.png").exists()
    if flags and "lora" not in asked:
        assert infer.main(["--from", "s.png", "--out", "mine.png", *flags]) == 0


@pytest.mark.parametrize("option", ["model", "vae", "refiner", "model_config", "lora"])
def test_no_name_of_a_recipe_is_fetched(
    place: Path, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("infer.load_family", connect)
    asked = {"prompt": "a", "model": "model"}
    asked |= {option: ["mallory/model:0.5"] if option == "lora" else "mallory/model"}
    save_recipe(place / "s.png", **asked)
    assert infer.main(["--from", "s.png", "--out", "mine.png"]) == 2
    error = capsys.readouterr().err
    assert "its recipe names mallory/model, which is not on this disk" in error
    assert f"give --{option.replace('_', '-')} mallory/model" in error


def test_flags_win_over_the_recipe_even_where_they_are_the_default(place: Path) -> None:
    save_recipe(place / "s.png", prompt="a", model="model", steps=3, seed=9, guidance=1.0)
    assert infer.main(["--from", "s.png", "--out", "x.png", "--seed=0", "--steps", "1"]) == 0
    recipe = json.loads(Image.open("x.png").info[CHUNK])
    assert (recipe["seed"], recipe["steps"], recipe["guidance"]) == (0, 1, 1.0)


def test_what_was_taken_is_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_recipe(place / "s.png", prompt="a red cat", model="model", steps=1)
    assert infer.main(["--from", "s.png", "--out", "x.png"]) == 0
    said = capsys.readouterr().err
    assert "taken from s.png: --prompt 'a red cat' --model model --steps 1" in said


def test_a_recipe_names_no_users_folders(
    place: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(base.parent))
    words = ["--prompt", "a", "--steps", "1", "--init-image", str(place / "face.png")]
    words += ["--strength", "1.0", "--out", str(place / "sub" / "x.png")]
    assert infer.main(["--model", str(base), *words]) == 0
    image = Image.open(place / "sub" / "x.png")
    info = image.info
    assert not image.getexif() and "at home" not in str(info)
    assert str(place) not in str(info) and str(base.parent) not in str(info)
    recipe = json.loads(info[CHUNK])
    assert (recipe["model"], recipe["init_image"]) == ("~/model", "face.png")


def test_every_option_is_in_one_of_the_three_tables() -> None:
    tables = (*IMAGE_OPTIONS, *START_OPTIONS, *CALL_OPTIONS)
    assert sorted(tables) == sorted(option.name for option in fields(infer.Infer))


def test_the_strength_comes_with_a_start_image_that_is_given(place: Path) -> None:
    save_recipe(place / "s.png", prompt="a", model="model", steps=4, strength=0.5, guidance=1.0)
    words = ["--from", "s.png", "--init-image", "face.png"]
    assert infer.main([*words, "--out", "x.png"]) == 0
    assert infer.main([*words, "--out", "y.png", "--strength", "1.0"]) == 0
    recorded = [json.loads(Image.open(name).info[CHUNK])["strength"] for name in ("x.png", "y.png")]
    assert recorded == [0.5, 1.0]


def test_a_model_that_was_fetched_before_is_taken(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner named it then: the hub's cache has it."""
    opened: list[str] = []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: file)
    monkeypatch.setattr("infer.open_models", lambda config, _: opened.append(config.model) or 1 / 0)
    save_recipe(place / "s.png", prompt="a", model="mine/model")
    with pytest.raises(ZeroDivisionError):
        infer.main(["--from", "s.png", "--out", "x.png"])
    assert opened == ["mine/model"]


def test_no_sampler_in_a_file_is_run_because_a_recipe_names_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mine.py").write_text("raise SystemExit('the file was run')")
    image = save_recipe(place / "s.png", model="model", prompt="a", sampler="mine.py:fn")
    assert infer.main(["--from", str(image), "--out", "out.png"]) == 2
    said = capsys.readouterr().err
    assert "its recipe samples with mine.py:fn, and no code that only a recipe names is run" in said
