"""The header of a run's files, through the reading rules of A1111 and of ComfyUI-Lora-Manager."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import train
from lora_core.config import Config, PriorConfig, Stage
from tests.conftest import save_photos
from tests.manager_readers import raw_header, read_as_lora_manager, read_as_webui, tensor_hash
from tests.test_configs import put

BOTH = (Stage(2, groups=("denoiser", "tokens")),)
DENOISER = (Stage(2, groups=("denoiser",)),)


@pytest.fixture
def concepts(tmp_path: Path) -> Path:
    """kohya's folders: 3 images twice with tags, 2 images once with the folder's name."""
    root = tmp_path / "concepts"
    save_photos(root / "2_cat", captions="sks, sitting, red", count=3)
    (root / "2_cat" / "0.txt").write_text("SKS, sitting")
    for file in save_photos(root / "1_sks dog", count=2).glob("*.txt"):
        file.unlink()
    for mask in root.rglob("*.mask.png"):
        mask.unlink()
    return root


def test_managers_read_the_trigger_the_tags_and_the_training(
    config: Config, quick: None, concepts: Path
) -> None:
    values = {
        "data.images": str(concepts),
        "data.masks": "none",
        "data.buckets": True,
        "data.bucket_step": 8,
        "stages": DENOISER,
        "batch_size": 2,
        "clip_skip": 1,
        "files.sidecars": True,
        "files.description": "A cat and a dog.",
        "files.license": "CC-BY-4.0",
    }
    run = train.train(put(config, values))
    file = run / "run.safetensors"
    page, card = read_as_webui(file), read_as_lora_manager(file)
    assert (page.alias, page.version) == ("run", "SD1")
    assert dict(page.tags) == {"sks": 3, "sitting": 3, "red": 2, "sks dog": 2}
    assert page.rows["Dataset size"] == "5" and page.rows["Clip skip"] == "2"
    assert page.rows["Model"] == Path(config.model).name
    assert page.rows["Kohya module"] == "networks.lora"
    assert page.rows["Date trained"] == "2023-11-14 22:13"  # of SOURCE_DATE_EPOCH
    assert page.hash == tensor_hash(file) and card.autov3 == page.hash[:12]
    assert page.user["description"] == "A cat and a dog." and "CC-BY-4.0" in page.user["notes"]
    assert card.preview == page.preview == str(run / "run.preview.png")
    assert card.class_tokens == "sks dog"  # of the first folder, which has no caption files
    assert card.words == [("sks dog", 2)]
    header = raw_header(file)
    (dataset,) = json.loads(header["ss_datasets"])
    counts = [(own["img_count"], own["num_repeats"]) for own in dataset["subsets"]]
    assert counts == [(2, 1), (3, 2)] and dataset["num_train_images"] == 8
    assert header["ss_num_train_images"] == "8" and header["ss_num_reg_images"] == "0"
    buckets = json.loads(header["ss_bucket_info"])["buckets"]
    assert sum(own["count"] for own in buckets.values()) == 8
    assert page.rows["Resolutions"]  # several, as the images are


def test_learned_tokens_are_called_by_their_file(config: Config, quick: None) -> None:
    """A1111 inserts the rows where the prompt has the file's name, so that is the trigger, in the
    tags as well; a checkpoint has files of another name.
    """
    values = {"stages": BOTH, "files.sidecars": True, "save_every": 1}
    run = train.train(put(config, values))
    page = read_as_webui(run / "run.safetensors")
    assert page.prompt == "<lora:run:1> run_emb" and (run / "run_emb.safetensors").is_file()
    assert dict(page.tags) == {"run_emb": 5, "photo": 5}  # words of "a photo of run_emb"
    assert read_as_lora_manager(run / "run.safetensors").class_tokens == "a photo of run_emb"
    hint = raw_header(run / "run.safetensors")["modelspec.usage_hint"]
    assert "embedding:run_emb in ComfyUI" in hint
    step = raw_header(run / "checkpoints" / "1" / "run-000001.safetensors")
    assert step["modelspec.trigger_phrase"] == "run-000001_emb"
    assert (step["ss_output_name"], step["modelspec.title"]) == ("run", "run-000001")
    assert (step["ss_steps"], step["ss_max_train_steps"]) == ("1", "2")
    rows = raw_header(run / "run_emb.safetensors")
    assert rows["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"


def test_class_images_are_counted_apart(config: Config, quick: None) -> None:
    prior = PriorConfig(prompt="a photo of a dog", count=3, weight=0.5)
    run = train.train(replace(config, stages=DENOISER, prior=prior))
    header = raw_header(run / "run.safetensors")
    assert (header["ss_num_train_images"], header["ss_num_reg_images"]) == ("5", "3")
    assert header["ss_prior_loss_weight"] == "0.5"
    assert json.loads(header["ss_reg_dataset_dirs"]) == {
        "class images": {"n_repeats": 1, "img_count": 3}
    }
    (dataset,) = json.loads(header["ss_datasets"])
    assert [own["is_reg"] for own in dataset["subsets"]] == [False, True]
    assert dataset["subsets"][1]["class_tokens"] == "a photo of a dog"
    assert read_as_webui(run / "run.safetensors").rows["Dataset size"] == "5"


@pytest.mark.parametrize("header", ["no_captions", "short"])
def test_entries_can_be_left_out(config: Config, quick: None, header: str) -> None:
    run = train.train(put(config, {"stages": DENOISER, "files.header": header}))
    found = raw_header(run / "run.safetensors")
    (photo,) = {file.read_text() for file in Path(config.data.images).glob("*.txt")}
    said = {key for key, value in found.items() if photo in value and "config" not in key}
    assert not said and "ss_tag_frequency" not in found
    assert ("ss_steps" in found) == (header == "no_captions")
    assert found["ss_network_dim"] and found["modelspec.trigger_phrase"] == "TOK"
