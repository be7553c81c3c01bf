"""Header entries of a training that stay true when a file's tensors are written anew.

kohya's sd-scripts write about eighty entries ss_* (tag frequencies, learning rates, the base
model), and Stability's model spec modelspec.* (title, author, licence). They are about the training
or the author's, and stay; as in kohya's own resize_lora.py, only what describes the tensors is
written anew: ranks, alphas, the module that reads them, hashes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

NETWORK_ARGS = "ss_network_args"
# entries that describe the tensors, or the format, of the file they were read from
DESCRIBES_TENSORS = re.compile(
    r"format|lora_adapter_metadata|ss_network_(dim|alpha|module|args)|sshs_.*"
    r"|modelspec\.(hash_sha256|(unet|vae)_dtype)"
)
# network arguments of a training that leave no trace in the shapes of its tensors
TRAINING_ARGS = re.compile(r"(rank_|module_)?dropout|loraplus_.*|(down|mid|up)_lr_weight")
NAMES = ("ss_output_name", "modelspec.title")  # given by the author, not by the file's name


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


def _training_args(text: str) -> dict[str, Any]:
    """The network arguments that describe the training alone; none where the entry is broken."""
    try:
        args = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(args, dict):
        return {}
    return {name: value for name, value in args.items() if TRAINING_ARGS.fullmatch(name)}
