"""A warning where a DoRA is written under kohya's names, with the errors of other tools."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats.dora_readers import (
    HOW_TO_CONVERT,
    describe_reader_errors,
    has_row_dora,
    is_row_dora,
    reader_errors,
)
from merging.adapter_sums import layers_by_key
from merging.commands import OpenOptions
from merging.opening import is_whole_model
from merging.output import Output, print_warning


def warn_of_dora_readers(state: AdapterState, output: Output, reading: OpenOptions) -> None:
    """Prints how A1111 and ComfyUI apply the DoRAs of a file under kohya's names.

    With the errors of this file where --model has weights on this disk, else with measured ones.
    """
    if output.format != "kohya" or not has_row_dora(state):
        return
    errors: dict[str, float] = {}
    if Path(reading.model).exists() and is_whole_model(reading.model):
        with contextlib.suppress(UserError):  # a folder of configs has no weights
            errors = _reader_errors_on_model(state, reading)
    print_warning(f"{describe_reader_errors(errors)}; {HOW_TO_CONVERT}")


def _reader_errors_on_model(state: AdapterState, reading: OpenOptions) -> dict[str, float]:
    # imports the networks' libraries
    from merging.base_models import base_weight_reader, open_base_model

    read = base_weight_reader(open_base_model(reading.model, reading))
    layers = layers_by_key(state).items()
    return reader_errors((lr, read(*key)) for key, lr in layers if is_row_dora(lr))
