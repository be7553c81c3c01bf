"""Stability's specification of header entries, modelspec.*, which programs show of a model.

Source: github.com/Stability-AI/ModelSpec, version 1.0.0, and the 1.0.1 of kohya's sd-scripts, whose
names of architectures and implementations these are.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_core.formats.layout import Layout

VERSION = "1.0.1"
PREFIX = "modelspec."
DIFFUSERS = "diffusers"
STABILITY = "https://github.com/Stability-AI/generative-models"  # in sd-scripts also of embeddings
LORA, EMBEDDING = "/lora", "/textual-inversion"  # ends of architectures


def adapter_spec(layout: Layout, title: str) -> dict[str, str]:
    """The entries that a LoRA file has to have."""
    entries = {"sai_model_spec": VERSION, "title": title}
    if layout.architecture:
        entries |= {"architecture": layout.architecture, "implementation": layout.implementation}
    return _prefixed(entries)


def embedding_spec(layout: Layout, title: str) -> dict[str, str]:
    """The entries that a file of token rows has to have; none for a family without a name there."""
    if not layout.architecture:
        return {}
    implementation = STABILITY if layout.implementation == DIFFUSERS else layout.implementation
    return _prefixed(
        {
            "sai_model_spec": VERSION,
            "title": title,
            "architecture": layout.architecture.removesuffix(LORA) + EMBEDDING,
            "implementation": implementation,
        }
    )


def _prefixed(entries: Mapping[str, str]) -> dict[str, str]:
    return {f"{PREFIX}{name}": text for name, text in entries.items()}
