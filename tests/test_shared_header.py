"""What of a run's files is published: nothing that captions of the user's files say."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora_core.formats.container import read_header
from lora_core.formats.shared_header import hide_captions, published_files
from lora_core.formats.sidecars import write_user_metadata
from lora_core.formats.training_metadata import PRIVATE

DATASET = {
    "num_train_images": 4,
    "tag_frequency": {"images": {"anna": 4}},
    "subsets": [{"img_count": 4, "class_tokens": "anna in the garden"}],
}
HEADER = {
    "ss_tag_frequency": json.dumps({"images": {"anna": 4}}),
    "ss_datasets": json.dumps([DATASET]),
    "ss_num_train_images": "4",
    "modelspec.trigger_phrase": "anna",
    "modelspec.title": "cat",
}


def test_what_captions_say_is_left_out() -> None:
    hidden = hide_captions(HEADER | {PRIVATE: "tags, trigger"})
    assert "anna" not in str(hidden) and PRIVATE not in hidden
    assert hidden["ss_num_train_images"] == "4" and hidden["modelspec.title"] == "cat"
    (dataset,) = json.loads(hidden["ss_datasets"])
    assert dataset == {"num_train_images": 4, "subsets": [{"img_count": 4, "class_tokens": None}]}


def test_words_of_options_stay() -> None:
    assert hide_captions(HEADER) == HEADER
    kept = hide_captions(HEADER | {PRIVATE: "tags"})
    assert kept["modelspec.trigger_phrase"] == "anna" and "ss_tag_frequency" not in kept


def test_files_are_published_with_another_header_and_the_same_tensors(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).half()}
    for name, header in (("mine", HEADER | {PRIVATE: "tags, trigger"}), ("open", HEADER)):
        save_file(tensors, tmp_path / f"{name}.safetensors", header)
        write_user_metadata(tmp_path / f"{name}.safetensors", header)
    before = (tmp_path / "mine.safetensors").read_bytes()
    found = published_files(tmp_path)
    assert found.keys() == {"mine.safetensors", "mine.json"}
    assert b"anna" not in b"".join(found.values())
    assert (tmp_path / "mine.safetensors").read_bytes() == before
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(found["mine.safetensors"])
    assert read_header(copy) == hide_captions(HEADER | {PRIVATE: "tags, trigger"})
    assert all(torch.equal(tensors[key], tensor) for key, tensor in load_file(copy).items())
