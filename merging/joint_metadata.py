"""The header of a result with several inputs: what is true of it, as in kohya's merge_lora.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_core.adapters.weight_updates import AdapterState
from lora_core.formats.training_metadata import DESCRIBES_TENSORS, NAMES

TITLE, MERGED_FROM = "modelspec.title", "modelspec.merged_from"
# entries about the base model, which stay where all inputs agree
BASE_MODEL = (
    "ss_base_model_version",
    "ss_v2",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_new_sd_model_hash",
    "modelspec.architecture",
    "modelspec.prediction_type",
)


def join_metadata(
    states: Sequence[AdapterState], paths: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """(header entries of a merge without those of its tokens, a sentence about what is left out).

    One input keeps its header. Of several, the entries about the base model in which all agree,
    and their titles (or file names without folders) as modelspec.merged_from.
    """
    if len(states) == 1:
        return dict(states[0].metadata), []
    headers = [state.metadata for state in states]
    joined = {}
    for key in BASE_MODEL:
        if len({header.get(key) for header in headers}) == 1 and key in headers[0]:
            joined[key] = headers[0][key]
    titles = [header.get(TITLE) or Path(path).stem for header, path in zip(headers, paths)]
    joined[MERGED_FROM] = ", ".join(titles)
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
