"""Stability's specification of header entries, modelspec.*, which programs show of a model.

Source: github.com/Stability-AI/ModelSpec, version 1.0.0, and the 1.0.1 of kohya's sd-scripts, whose
names of architectures and implementations these are.
"""

from __future__ import annotations

from lora_core.formats.layout import Layout
from lora_core.formats.training_metadata import SPEC_VERSION

PREFIX = "modelspec."
DIFFUSERS = "diffusers"
STABILITY = "https://github.com/Stability-AI/generative-models"  # in sd-scripts also of embeddings
LORA, EMBEDDING = "/lora", "/textual-inversion"  # ends of architectures


def embedding_spec(layout: Layout, title: str) -> dict[str, str]:
    """The entries that a file of token rows has to have; none for a family without a name there."""
    if not layout.architecture:
        return {}
    implementation = STABILITY if layout.implementation == DIFFUSERS else layout.implementation
    entries = {
        "sai_model_spec": SPEC_VERSION,
        "title": title,
        "architecture": layout.architecture.removesuffix(LORA) + EMBEDDING,
        "implementation": implementation,
    }
    return {f"{PREFIX}{name}": text for name, text in entries.items()}
