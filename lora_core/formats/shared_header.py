"""A run's files as they are published: without what captions from the user's files say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.formats.container import read_header, with_header
from lora_core.formats.sidecars import encode_user_metadata, user_metadata_path
from lora_core.formats.training_metadata import PRIVATE, TRIGGER

TAGS, DATASETS = "ss_tag_frequency", "ss_datasets"


def published_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files in a run's folder that are published with another header than
    they have there, and of NAME.json beside them.
    """
    contents = {}
    for file in sorted(folder.glob("[!.]*.safetensors")):
        header = read_header(file)
        if PRIVATE not in header:
            continue
        shown = hide_captions(header)
        contents[file.name] = with_header(file, shown)
        if (beside := user_metadata_path(file)).is_file():
            contents[beside.name] = encode_user_metadata(shown)
    return contents


def hide_captions(header: Mapping[str, str]) -> dict[str, str]:
    """A header without tags and captions of the user's files, and without trigger words that are
    taken from them. One of captions that are options stays as it is.
    """
    shown = {key: text for key, text in header.items() if key != PRIVATE}
    private = header.get(PRIVATE, "")
    if not private:
        return shown
    shown.pop(TAGS, None)
    if DATASETS in shown:
        shown[DATASETS] = json.dumps(
            [_hide_captions_of(own) for own in json.loads(shown[DATASETS])]
        )
    if "trigger" in private:
        shown.pop(TRIGGER, None)
    return shown


def _hide_captions_of(dataset: dict[str, Any]) -> dict[str, Any]:
    subsets = [subset | {"class_tokens": None} for subset in dataset["subsets"]]
    rest = {key: value for key, value in dataset.items() if key != "tag_frequency"}
    return rest | {"subsets": subsets}
