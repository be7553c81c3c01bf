"""Cache of computed tensors (latent mean and std, text embeddings) by key and settings."""

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_core.atomic_files import atomic_write
from lora_core.errors import UserError
from lora_core.runs.run_folder import nonfinite_names


class TensorCache:
    """Rows of named tensors on the CPU, in memory and, with a folder, on disk.

    A row is computed by itself, so its bits do not depend on the batch that it is first read in.
    On disk a row is one safetensors file. Its name is a hash of `settings` (everything that the
    tensors depend on: model, dtype, length ...) and its key (an image's content and crop, a
    prompt), never a position: a cache that is read in another order than it was filled pairs
    captions with the wrong images (a public defect, diffusers #14430).
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path | str | None = None) -> None:
        self.settings = json.dumps(settings, sort_keys=True, default=str)
        self.folder = None if folder is None else Path(folder)
        self.rows: dict[Hashable, dict[str, Tensor]] = {}  # in memory
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def row(
        self,
        key: Hashable,
        compute: Callable[[], Mapping[str, Tensor]],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        disk_key: str | None = None,
    ) -> dict[str, Tensor]:
        """The row of one key; from now on it is in `rows`.

        `compute()` makes a row that is neither in memory nor on disk. `shapes` are those of its
        tensors. `disk_key` is the row's key on disk, where `key` has a meaning in this process
        only. Raises UserError naming the file of a row on disk that is damaged, not finite or of
        other names or shapes.
        """
        if key not in self.rows:
            name = str(key) if disk_key is None else disk_key
            self.rows[key] = self._read_or_compute(name, compute, shapes)
        return self.rows[key]

    def _read_or_compute(
        self,
        key: str,
        compute: Callable[[], Mapping[str, Tensor]],
        shapes: Mapping[str, tuple[int, ...]] | None,
    ) -> dict[str, Tensor]:
        """A row from the disk, else computed and, with a folder, written."""
        if self.folder is None:
            return _on_cpu(compute())
        content = json.dumps([self.settings, key]).encode()
        path = self.folder / f"{hashlib.blake2b(content, digest_size=20).hexdigest()}.safetensors"
        if path.is_file():
            return _load_row(path, shapes)
        row = _on_cpu(compute())
        with atomic_write(path) as partial:
            save_file(row, partial)
        return row


def _on_cpu(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in row.items()}


def _shapes(row: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in row.items()}


def _load_row(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> dict[str, Tensor]:
    try:
        row = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the cache file {path} is damaged ({error}); delete it and run again"
        ) from error
    found = _shapes(row)
    if shapes is not None and found != dict(shapes):
        raise UserError(
            f"the cache file {path} holds {_format_shapes(found)}, expected "
            f"{_format_shapes(shapes)}; "
            "delete it and run again"
        )
    if bad := nonfinite_names(row):
        raise UserError(
            f"the cache file {path} holds NaN or infinity in {bad[0]}; delete it and run again"
        )
    return row


def _format_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
