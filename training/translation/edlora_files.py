"""The files of Mix-of-Show's experiments/NAME.yml: its options and edlora_model-latest.pth."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats.embeddings import LAYERS, PLACEHOLDERS, placeholder_words, word_layers
from models import read_layout
from training.translation.edlora_options import EdloraJob


def save_experiment(folder: Path, job: EdloraJob) -> Path:
    """Write the .pth of a finished run under the concepts' names, and the options beside it.

    Returns the .pth, or the folder where that format cannot hold the model, which is printed.
    """
    shutil.copyfile(job.file, folder / job.file.name)
    layout = read_layout(job.config.model, job.config.model_config, job.config.family)
    state = rename_concepts(formats.load(folder, layout), job.concepts)
    path = folder / "models" / job.model_name
    path.parent.mkdir(exist_ok=True)
    try:
        formats.save(state, path, format="mixofshow", layout=layout)
    except UserError as error:
        print(f"note: {error}; test_edlora.py takes the folder of the run, --lora-path {folder}")
        return folder
    return path


def rename_concepts(state: AdapterState, concepts: tuple[str, ...]) -> AdapterState:
    """The state with a word for each vector of a word: <TOK> of two becomes <hermione1> and
    <hermione2>, in the order of the words and their vectors.
    """
    words, layers = placeholder_words(state), word_layers(state)
    named: dict[str, tuple[str, ...]] = {}
    counts: dict[str, int] = {}
    names = iter(concepts)
    for word, tokens in words.items():
        depth = layers.get(word, 1)
        width = len(tokens) // depth
        for vector in range(width):
            concept = next(names)
            named[concept] = tokens[vector::width]
            counts[concept] = depth if depth > 1 else 0
    kept = {k: v for k, v in state.metadata.items() if k not in (PLACEHOLDERS, LAYERS)}
    return replace(state, metadata=kept | formats.placeholder_header(named, counts))
