"""kohya's options with values of the wrong kind: taken, or one sentence, never a traceback."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from lora_core.errors import UserError
from models import read_layout
from tests.conftest import save_photos
from training.translation import kohya_runs
from training.translation.kohya_data import translate_data
from training.translation.kohya_dataset import INHERITED, OF_A_DATASET, OF_A_SUBSET, read_datasets
from training.translation.kohya_options import (
    IGNORED,
    KOHYA_DEFAULTS,
    LEFT_OUT,
    TRANSLATED,
    read_config_file,
    read_flags,
)
from training.translation.kohya_runs import TranslatedRun, translate_run
from training.translation.translated_options import TranslatedOptions

ODD: tuple[Any, ...] = ("x", -1, 1.5, True, [], {}, 7, float("nan"))


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


@pytest.fixture(scope="module", autouse=True)
def read_once(model: Path) -> Iterator[None]:
    """The layout of the model is read once: it is none of these tests' concern."""
    layout = read_layout(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kohya_runs, "read_layout", lambda *_: layout)
        yield


@pytest.mark.parametrize("name", IGNORED)
def test_options_without_effect_are_read_or_one_sentence(name: str, folder: Path) -> None:
    for value in ODD:
        (folder / "ignored.toml").write_text(tomli_w.dumps({"all": {name: value}}))
        try:
            read_config_file(folder / "ignored.toml")
        except UserError as error:
            assert f"{name} = " in str(error)


@pytest.mark.parametrize("name", TRANSLATED | LEFT_OUT)
def test_a_training_file_is_taken_or_one_sentence(name: str, folder: Path, model: Path) -> None:
    for value in ODD:
        training = good_training(folder, model) | {name: value}
        try:
            translate(folder, training, good_dataset(folder))
        except UserError as error:
            assert len(str(error)) > 20


@pytest.mark.parametrize("place", ["general", "datasets", "subsets"])
@pytest.mark.parametrize("name", dict.fromkeys((*INHERITED, *OF_A_DATASET, *OF_A_SUBSET)))
def test_a_dataset_file_is_taken_or_one_sentence(name: str, place: str, folder: Path) -> None:
    for value in ODD:
        dataset = good_dataset(folder)
        whole = dataset["datasets"][0]
        places = {"general": dataset["general"], "datasets": whole, "subsets": whole["subsets"][0]}
        places[place][name] = value
        try:
            (folder / "dataset.toml").write_text(tomli_w.dumps(dataset))
            options = TranslatedOptions("kohya", KOHYA_DEFAULTS, {"caption_extension": ".txt"})
            data = read_datasets(options, folder / "dataset.toml")
            translate_data(options, data)
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
        ("seed", 10**400, "expected a whole number"),
        ("seed", "9" * 5000, "expected a whole number"),
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
    with pytest.raises(UserError, match=r"seed = .*expected a whole number"):
        read_flags(["--seed=fortytwo"])


@pytest.mark.parametrize(
    ("option", "argument"),
    [
        ("network_args", "conv_dim=many"), ("network_args", "rank_dropout=x"),
        ("network_args", "block_lr_zero_threshold=x"), ("optimizer_args", "weight_decay=much"),
        ("optimizer_args", "betas=0.9,x"), ("network_args", "conv_dim"),
    ],
)  # fmt: skip
def test_a_text_for_a_number_of_an_argument_is_one_sentence(
    option: str, argument: str, folder: Path, model: Path
) -> None:
    training = good_training(folder, model) | {option: [argument]}
    with pytest.raises(UserError, match="expected"):
        translate(folder, training, good_dataset(folder))


def test_rates_of_blocks_of_an_untrained_unet_have_no_effect(folder: Path, model: Path) -> None:
    training = good_training(folder, model) | {"unet_lr": 0, "text_encoder_lr": 1e-4}
    training |= {"network_args": ["down_lr_weight=0,1", "mid_lr_weight=0.5"]}
    run = translate(folder, training, good_dataset(folder))
    entry = next(e for e in run.records[0].entries if "weight: without" in e.remark)
    assert (entry.name, entry.outcome) == ("network_args", "ignored")
    assert "down_lr_weight, mid_lr_weight: without effect" in entry.remark
    assert not run.config.optimizer.lr_pattern
    table = run.format_tables()
    assert table.count("down_lr_weight=0,1") == 1 and "network_args = ..." in table


@pytest.mark.parametrize("name", ["sample_every_n_epochs", "sample_every_n_steps"])
def test_without_prompts_nothing_is_drawn_as_in_kohyas_script(
    name: str, folder: Path, model: Path
) -> None:
    training = good_training(folder, model) | {name: 1}
    run = translate(folder, training, good_dataset(folder))
    assert run.config.samples.every == 0
    entry = next(e for e in run.records[0].entries if e.name == name)
    assert entry.outcome == "ignored" and "draws nothing" in entry.remark


def test_samples_of_epochs_win_over_those_of_steps(folder: Path, model: Path) -> None:
    """sd-scripts: where sample_every_n_epochs is set, sample_every_n_steps is not read."""
    training = good_training(folder, model) | {"sample_prompts": ["a TOK"], "max_train_steps": 9}
    training |= {"sample_every_n_epochs": 2, "sample_every_n_steps": 1}
    run = translate(folder, training, good_dataset(folder))
    assert run.config.samples.every == 2 * 2  # two images of an epoch, each a step
