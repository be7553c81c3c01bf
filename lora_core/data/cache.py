"""Computed rows (latent mean and std, text embeddings) kept by key and settings."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_core.errors import UserError
from lora_core.runs.run_folder import atomic_write, nonfinite_names


class TensorCache:
    """Rows of named tensors on the CPU, in memory and, given a folder, on disk as one safetensors
    file a row.

    A row's name is a hash of `settings` (whatever made it: model, dtype, length ...) and its key
    (an image's content and cut, a prompt), never a position: a cache read in another order than it
    was filled in pairs captions with the wrong images (a public defect, diffusers #14430).
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path | str | None = None) -> None:
        self.settings = json.dumps(settings, sort_keys=True, default=str)
        self.folder = None if folder is None else Path(folder)
        self._rows: dict[str, dict[str, Tensor]] = {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def get(
        self,
        keys: Sequence[str],
        compute_one: Callable[[int], Mapping[str, Tensor]],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> dict[str, Tensor]:
        """Name -> [b, ...], row i belonging to keys[i]; `compute_one(i)` gives one row without its
        batch axis and is asked only for missing ones.

        Rows are computed one at a time, so their bits do not depend on the batch. `shapes` are
        those of a row. Raises UserError naming the file of a row on the disk that is damaged, not
        finite or of other names or shapes, ValueError when rows differ in names or shapes.
        """
        rows = [
            self._row(self._name(key), functools.partial(compute_one, i), shapes)
            for i, key in enumerate(keys)
        ]
        kinds = [{name: tuple(t.shape) for name, t in row.items()} for row in rows]
        for i, shape in enumerate(kinds):
            if shape != kinds[0]:
                raise ValueError(
                    f"cached rows of one batch must agree: {keys[0]!r} has {kinds[0]}, {keys[i]!r} "
                    f"has {shape}"
                )
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}

    def __len__(self) -> int:
        """How many rows are in memory."""
        return len(self._rows)

    def _name(self, key: str) -> str:
        return hashlib.blake2b(
            json.dumps([self.settings, key]).encode(), digest_size=20
        ).hexdigest()

    def _row(
        self,
        name: str,
        compute: Callable[[], Mapping[str, Tensor]],
        shapes: Mapping[str, tuple[int, ...]] | None,
    ) -> dict[str, Tensor]:
        if name not in self._rows:
            path = None if self.folder is None else self.folder / f"{name}.safetensors"
            if path is not None and path.is_file():
                self._rows[name] = _load(path, shapes)
            else:
                self._rows[name] = {
                    n: t.detach().to("cpu", copy=True).contiguous() for n, t in compute().items()
                }
                if path is not None:
                    with atomic_write(path) as partial:
                        save_file(self._rows[name], partial)
        return self._rows[name]


def _load(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> dict[str, Tensor]:
    try:
        row = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the cache file {path} is damaged ({error}); delete it and run again"
        ) from error
    found = {name: tuple(tensor.shape) for name, tensor in row.items()}
    if shapes is not None and found != dict(shapes):
        raise UserError(
            f"the cache file {path} holds {_shown(found)}, expected {_shown(shapes)}; "
            "delete it and run again"
        )
    if bad := nonfinite_names(row):
        raise UserError(
            f"the cache file {path} holds NaN or infinity in {bad[0]}; delete it and run again"
        )
    return row


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
