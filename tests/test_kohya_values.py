"""kohya's options with values of the wrong kind: taken, or one sentence, never a traceback."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from lora_core.errors import UserError
from tests.conftest import save_photos
from training.translation.kohya_dataset import INHERITED, OF_A_DATASET, OF_A_SUBSET
from training.translation.kohya_options import KOHYA_DEFAULTS, read_config_file, read_flags
from training.translation.kohya_runs import TranslatedRun, translate_run

ODD: tuple[Any, ...] = ("x", -1, 0, 1.5, True, [], {}, 7, "64x64", [1.5, "y"], float("nan"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("values")
    save_photos(path / "images", "TOK, a, b", side=16, count=2)
    return path


def good_training(folder: Path, model: Path) -> dict[str, Any]:
    own: dict[str, Any] = {"pretrained_model_name_or_path": str(model), "max_train_steps": 2}
    own |= {"network_module": "networks.lora", "network_dim": 4, "output_dir": str(folder / "out")}
    return own | {"learning_rate": 1e-4, "caption_extension": ".txt", "resolution": 16}


def good_dataset(folder: Path) -> dict[str, Any]:
    subset = {"image_dir": str(folder / "images"), "num_repeats": 1}
    return {"general": {}, "datasets": [{"resolution": 16, "subsets": [subset]}]}


def translate(folder: Path, training: dict[str, Any], dataset: dict[str, Any]) -> TranslatedRun:
    (folder / "train.toml").write_text(tomli_w.dumps({"all": training}))
    (folder / "dataset.toml").write_text(tomli_w.dumps(dataset))
    run = translate_run(read_config_file(folder / "train.toml"), folder / "dataset.toml")
    run.format_tables()
    return run


@pytest.mark.parametrize("name", KOHYA_DEFAULTS)
def test_a_training_file_is_taken_or_one_sentence(name: str, folder: Path, model: Path) -> None:
    for value in ODD:
        training = good_training(folder, model) | {name: value}
        try:
            translate(folder, training, good_dataset(folder))
        except UserError as error:
            assert len(str(error)) > 20


@pytest.mark.parametrize("place", ["general", "datasets", "subsets"])
@pytest.mark.parametrize("name", dict.fromkeys((*INHERITED, *OF_A_DATASET, *OF_A_SUBSET)))
def test_a_dataset_file_is_taken_or_one_sentence(
    name: str, place: str, folder: Path, model: Path
) -> None:
    for value in ODD:
        dataset = good_dataset(folder)
        whole = dataset["datasets"][0]
        places = {"general": dataset["general"], "datasets": whole, "subsets": whole["subsets"][0]}
        places[place][name] = value
        try:
            translate(folder, good_training(folder, model), dataset)
        except UserError as error:
            assert len(str(error)) > 20


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seed", "fortytwo", 'train.toml: seed = "fortytwo" of kohya: expected a whole number'),
        ("output_name", 7, "output_name = 7 of kohya: expected a text"),
        ("flip_aug", "yes", 'flip_aug = "yes" of kohya: expected true or false'),
        ("network_args", 7, "expected a list of texts"),
        ("network_dim", 1.5, "network_dim = 1.5 of kohya: expected a whole number of at least 1"),
        ("max_train_epochs", 1.5, "expected a whole number of at least 1"),
        ("unet_lr", True, "unet_lr = true of kohya: expected a number"),
        ("resolution", "64x64", "expected a number of pixels, or width and height"),
        ("resolution", [], "expected a number of pixels"),
        ("max_token_length", 200, "expected one of 75, 150, 225"),
        ("save_model_as", "onnx", "expected one of safetensors, ckpt, pt"),
    ],
)
def test_the_sentence_names_the_file_and_what_is_expected(
    name: str, value: Any, words: str, folder: Path, model: Path
) -> None:
    with pytest.raises(UserError) as found:
        translate(folder, good_training(folder, model) | {name: value}, good_dataset(folder))
    assert words in str(found.value) and "train.toml" in str(found.value)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ({"datasets": {"resolution": 16}}, r"datasets is no list .*\[\[datasets\]\]"),
        ({"datasets": 7}, "datasets is no list"),
        ({"datasets": [{"subsets": {"image_dir": "a"}}]}, r"subsets is no list .*\.subsets\]\]"),
        ({"general": 7}, "general is no section"),
        ({"datasets": [{"batch_size": 0}]}, r"datasets\.0\.batch_size = 0 .*of at least 1"),
        ({"datasets": [{"batch_size": "two"}]}, r"dataset\.toml: .*expected a whole number"),
        ({"datasets": [{"network_dim": 4}]}, "network_dim belongs in the training file"),
        ({"general": {"train_batch_size": 4}}, r"nearest is general\.batch_size"),
    ],
)
def test_a_dataset_file_of_another_shape(
    dataset: dict[str, Any], words: str, folder: Path, model: Path
) -> None:
    with pytest.raises(UserError, match=words):
        translate(folder, good_training(folder, model), dataset)


def test_numbers_may_be_texts_and_texts_of_flags_may_be_numbers(folder: Path, model: Path) -> None:
    training = good_training(folder, model) | {"seed": "42", "network_dim": 8.0, "unet_lr": "1e-3"}
    config = translate(folder, training, good_dataset(folder)).config
    assert (config.seed, config.adapter.rank) == (42, 8)
    assert config.optimizer.lr["denoiser"] == 1e-3
    assert read_flags(["--output_name=7", "--seed=7", "--resolution=64,96"]) == {
        "output_name": "7",
        "seed": 7,
        "resolution": "64,96",
    }
    with pytest.raises(UserError, match="seed = .*expected a whole number"):
        read_flags(["--seed=fortytwo"])
