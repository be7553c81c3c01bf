"""Files inside larger ones: members of a tar file, cells of an Arrow or parquet table.

They are read where they are: nothing is extracted.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

# Row groups whose images are kept decompressed. Threads read rows next to one another.
KEPT_GROUPS = 2


class StoredFile(NamedTuple):
    """A file that is a piece of a larger file, as it is: a tar member, a cell of an Arrow table."""

    path: Path  # its name
    file: Path  # the larger file
    offset: int  # bytes
    length: int  # bytes

    @property
    def suffix(self) -> str:
        """The ending of its name."""
        return self.path.suffix

    def read_bytes(self) -> bytes:
        """Its content. Raises OSError where the larger file is gone or ends before it."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.length)
        if len(content) < self.length:
            raise OSError(f"{self.file} ends at byte {self.offset + len(content)}, inside it")
        return content

    def open(self, mode: str, /) -> BinaryIO:
        """Its content as a file; `mode` is "rb"."""
        return io.BytesIO(self.read_bytes())

    def __str__(self) -> str:
        return str(self.path)


class StoredCell(NamedTuple):
    """A file that is a cell of a parquet table, which is compressed by groups of rows."""

    path: Path  # its name
    file: Path  # the table
    column: str  # that holds bytes, or a struct with the field `bytes`
    group: int  # of rows
    row: int  # in the group

    @property
    def suffix(self) -> str:
        """The ending of its name."""
        return self.path.suffix

    def read_bytes(self) -> bytes:
        """Its content; its group of rows is read and kept for its neighbors."""
        stamp = self.file.stat().st_mtime_ns
        return _read_group(self.file, self.column, self.group, stamp)[self.row].as_py()

    def __str__(self) -> str:
        return str(self.path)


# A file on the disk, or one inside a larger file.
FileSource = Path | StoredFile | StoredCell


def path_of(source: FileSource) -> Path:
    """The name of a file, by which messages and the identity of a run call it."""
    return source if isinstance(source, Path) else source.path


def binary_column(column: Any) -> Any:
    """The bytes in an Arrow column of images: itself, or the field `bytes` of its structs."""
    import pyarrow

    if not pyarrow.types.is_struct(column.type):
        return column
    # unlike field(), flatten() knows of rows that are empty as a whole
    return column.flatten()[column.type.get_field_index("bytes")]


@lru_cache(maxsize=KEPT_GROUPS)
def _read_group(file: Path, column: str, group: int, stamp: int) -> Any:
    """The images of a group of rows. `stamp` tells a file that was written anew."""
    from pyarrow import parquet

    table = parquet.ParquetFile(file).read_row_group(group, columns=[column])
    return binary_column(table[column].combine_chunks())
