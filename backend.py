"""The build behind `pip install -e .`, which is setuptools' own; there is no other.

A wheel would install train, models and other modules of common names next to those of others.
It is refused at pip's first question, before any dependency is fetched.
"""

from typing import Any, NoReturn

from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    prepare_metadata_for_build_editable,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
]


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise SystemExit(
        "error: got a build of lora_core as a wheel or archive, whose modules (train, models ...) "
        "would collide with others; clone the repository and run pip install -e . in it, or make"
    )


build_wheel = build_sdist = get_requires_for_build_wheel = get_requires_for_build_sdist = _refuse
