"""Header entries of a training that stay true when a file is written anew, or added to others.

kohya's sd-scripts write about eighty entries ss_* (tag frequencies, learning rates, the base
model), and Stability's model spec modelspec.* (title, author, licence). They are about the training
or the author's, and stay; as in kohya's own resize_lora.py, only what describes the tensors is
written anew: ranks, alphas, the module that reads them, hashes. Of a sum less is true: see
`join_metadata`, after kohya's merge_lora.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_core.adapters.weight_updates import AdapterState
from lora_core.formats.known_formats import EMBEDDINGS

TRAINED_BY = "lora_core.config"  # header entry: the config of the run, as TOML
NETWORK_ARGS = "ss_network_args"
SPEC_VERSION = "1.0.1"  # of modelspec.*, as sd-scripts write it
# entries that describe the tensors, or the format, of the file they were read from
DESCRIBES_TENSORS = re.compile(
    r"format|lora_adapter_metadata|ss_network_(dim|alpha|module|args)|sshs_.*"
    r"|modelspec\.(hash_sha256|(unet|vae)_dtype)"
)
# network arguments of a training that leave no trace in the shapes of its tensors
TRAINING_ARGS = re.compile(r"(rank_|module_)?dropout|loraplus_.*|(down|mid|up)_lr_weight")
TITLE, MERGED_FROM = "modelspec.title", "modelspec.merged_from"
OUTPUT_NAME = "ss_output_name"
NAMES = (OUTPUT_NAME, TITLE)  # given by the author, not by the file's name
# entries that say what kind of file theirs is, and its name
OF_FILE = (TITLE, "modelspec.architecture", "modelspec.implementation", "modelspec.sai_model_spec")
# entries about the base model, which stay where all inputs agree
BASE_MODEL = (
    "ss_base_model_version",
    "ss_v2",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_new_sd_model_hash",
    "modelspec.architecture",
    "modelspec.prediction_type",
    "modelspec.implementation",
    "modelspec.resolution",
)
# entries that are true of a sum where all inputs agree; of different ones none is
SHARED = (*BASE_MODEL, "modelspec.license", "modelspec.author")
# entries of several files that a sum has all of: texts between commas, each once
TRIGGER, HINT = "modelspec.trigger_phrase", "modelspec.usage_hint"
LISTED = (TRIGGER, "modelspec.tags")
CAPTIONS = ("ss_tag_frequency", "ss_datasets")  # entries with captions, as they are prompted
# Entry of a header whose captions come from files of the user, not from options: what of it says
# more than its own words, "tags" or "tags, trigger".
PRIVATE = "lora_core.private_captions"
TOKEN_FILE = EMBEDDINGS.removesuffix(".safetensors")  # how names of token files end


def carry_metadata(old: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The header of a file written anew: `old` is that of the file it was read from.

    `own` are the entries that the writer makes for the new tensors; they replace those of `old`,
    except for the names that its author gave, and where the writer knows nothing ("").
    """
    kept = {key: text for key, text in old.items() if not DESCRIBES_TENSORS.fullmatch(key)}
    header = kept | {key: text for key, text in own.items() if text or key not in kept}
    header |= {key: kept[key] for key in NAMES if key in kept}
    if NETWORK_ARGS in own and NETWORK_ARGS in old:
        args = _training_args(old[NETWORK_ARGS]) | json.loads(own[NETWORK_ARGS])
        header[NETWORK_ARGS] = json.dumps(args)
    return header


def without_file_entries(header: Mapping[str, str]) -> dict[str, str]:
    """The entries of a token file that are true of the LoRA beside it too."""
    return {key: text for key, text in header.items() if key not in OF_FILE}


def join_metadata(
    states: Sequence[AdapterState], paths: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """(header entries of a merge without those of its tokens, a sentence about entries left out).

    One input keeps its header. Of several, the entries about the base model, license and author in
    which all agree, all trigger words, tags and hints, and their titles (or file names without
    folders) as modelspec.merged_from.
    """
    if len(states) == 1:
        return dict(states[0].metadata), []
    headers = [state.metadata for state in states]
    joined = {}
    for key in SHARED:
        if len({header.get(key) for header in headers}) == 1 and key in headers[0]:
            joined[key] = headers[0][key]
    titles = [header.get(TITLE) or Path(path).stem for header, path in zip(headers, paths)]
    joined[MERGED_FROM] = ", ".join(titles)
    for key in LISTED:
        if words := list_once([header.get(key, "") for header in headers]):
            joined[key] = ", ".join(words)
    if hints := dict.fromkeys([header[HINT] for header in headers if header.get(HINT)]):
        joined[HINT] = "; ".join(hints)
    if private := list_once([header.get(PRIVATE, "") for header in headers]):
        joined[PRIVATE] = ", ".join(private)
    left_out: set[str] = set()
    for header in headers:
        left_out |= {key for key in header if key.startswith("ss_")}
    left_out -= {*BASE_MODEL, *NAMES}
    count = len([key for key in left_out if not DESCRIBES_TENSORS.fullmatch(key)])
    notes = []
    if count:
        notes = [
            f"the training metadata of {len(states)} files ({count} entries ss_*) is left out of "
            "their sum"
        ]
    return joined, notes


def rename_token_file(header: Mapping[str, str], stem: str) -> dict[str, str]:
    """The header of a LoRA whose token rows are now in STEM.safetensors: trigger words, hints and
    tags that name their old files name this one.
    """
    words = list_once([header.get(TRIGGER, "")])
    old = [word for word in words if word.endswith(TOKEN_FILE)]
    renamed = dict(header)
    if not old:
        return renamed
    others = [stem if word in old else word for word in words]
    renamed[TRIGGER] = ", ".join(dict.fromkeys(others))
    for key in (HINT, *CAPTIONS):
        text = renamed.get(key, "")
        for word in sorted(old, key=len, reverse=True):
            text = text.replace(word, stem)
        if text:
            renamed[key] = text
    return renamed


def list_once(texts: Sequence[str]) -> list[str]:
    """What stands between the commas of these texts, each once, in the order in which it is met."""
    words: dict[str, None] = {}
    for text in texts:
        words |= dict.fromkeys(word.strip() for word in text.split(",") if word.strip())
    return list(words)


def _training_args(text: str) -> dict[str, Any]:
    """The network arguments that describe the training alone; none where the entry is broken."""
    try:
        args = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(args, dict):
        return {}
    return {name: value for name, value in args.items() if TRAINING_ARGS.fullmatch(name)}
