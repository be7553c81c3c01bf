"""Parquet and Arrow files of the datasets library as shards: the place of each row's image.

An image in an Arrow file is a piece of that file and is read by its offset. Parquet compresses
groups of rows, and an image costs its group; datasets writes groups of 100 rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_core.data.shards.stored_files import StoredCell, StoredFile, binary_column
from lora_core.errors import UserError, first_line


class TableRow(NamedTuple):
    """A row of a table with images."""

    where: str  # for messages
    image: StoredFile | StoredCell | None  # None for an empty cell
    texts: Any  # of the caption column; None without one


def table_columns(file: Path) -> list[str]:
    """The names of a table's columns. Raises UserError for a file that is no table."""
    try:
        if file.suffix == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_schema(file).names)
        return list(_read_arrow(file)[0].schema.names)
    except Exception as error:  # pyarrow's own, by kind of file
        raise UserError(
            f"cannot read the shard {file} ({first_line(error)}); write it again"
        ) from error


def list_table_rows(files: Sequence[Path], image: str, caption: str) -> Iterator[TableRow]:
    """The rows of parquet or Arrow files, in their order; `caption` is a column, or empty.

    The images are named by their numbers over all files, as an exported dataset's files are.
    """
    number = 0
    for file in files:
        read = _parquet_rows if file.suffix == ".parquet" else _arrow_rows
        try:
            for row in read(file, image, caption, number):
                yield row
                number += 1
        except UserError:
            raise
        except Exception as error:  # pyarrow's own, by kind of damage
            raise UserError(
                f"cannot read the shard {file} ({first_line(error)}); write it again"
            ) from error


def _name(file: Path, number: int) -> Path:
    return file.parent / f"{number:06d}"


def _parquet_rows(file: Path, image: str, caption: str, number: int) -> Iterator[TableRow]:
    """The rows of a parquet file, one group in memory."""
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        leaf = _binary_leaf(table.schema_arrow, file, image)
        for group in range(table.num_row_groups):
            columns = [leaf, caption] if caption else [leaf]
            rows = table.read_row_group(group, columns=columns)
            filled = binary_column(rows[image].combine_chunks()).is_valid().to_pylist()
            texts = rows[caption].to_pylist() if caption else [None] * len(filled)
            for i, is_filled in enumerate(filled):
                cell = StoredCell(_name(file, number), file, image, group, i)
                where = f"row {number} of the dataset"
                yield TableRow(where, cell if is_filled else None, texts[i])
                number += 1


def _binary_leaf(schema: Any, file: Path, image: str) -> str:
    """The column with the bytes. Raises UserError for a column without any."""
    import pyarrow

    kind = schema.field(image).type
    is_struct = pyarrow.types.is_struct(kind)
    inner = kind.field("bytes").type if is_struct and kind.get_field_index("bytes") >= 0 else kind
    if not (pyarrow.types.is_binary(inner) or pyarrow.types.is_large_binary(inner)):
        raise UserError(
            f"the column {image!r} of {file} holds {kind} and no encoded images; name another one "
            "with --data.image-column, or leave --data.streaming out"
        )
    return f"{image}.bytes" if is_struct else image


def _read_arrow(file: Path) -> tuple[Any, int]:
    """(table, address of the file's first byte): the file is mapped into memory, not read."""
    import pyarrow

    source = pyarrow.memory_map(str(file))
    base = source.read_buffer().address
    source.seek(0)
    try:
        table = pyarrow.ipc.open_stream(source).read_all()  # what datasets writes
    except pyarrow.ArrowInvalid:
        source.seek(0)
        table = pyarrow.ipc.open_file(source).read_all()
    return table, base


def _arrow_rows(file: Path, image: str, caption: str, number: int) -> Iterator[TableRow]:
    """The rows of an Arrow file, whose images are pieces of it."""
    table, base = _read_arrow(file)
    _binary_leaf(table.schema, file, image)
    size = file.stat().st_size
    for batch in table.to_batches():
        cells = binary_column(batch.column(image))
        texts = batch.column(caption).to_pylist() if caption else [None] * len(cells)
        filled = cells.is_valid().to_pylist()
        for i, (start, length) in enumerate(_cell_places(cells, base)):
            if filled[i] and not 0 <= start <= size - length:
                raise UserError(
                    f"{file} is compressed, so that no image can be read by its place; write "
                    "it as parquet, or leave --data.streaming out"
                )
            place = StoredFile(_name(file, number), file, start, length) if filled[i] else None
            yield TableRow(f"row {number} of the dataset", place, texts[i])
            number += 1


def _cell_places(cells: Any, base: int) -> Iterator[tuple[int, int]]:
    """(offset in the file, length) of each cell of a binary column, whose file is at `base`."""
    import pyarrow

    wide = pyarrow.types.is_large_binary(cells.type)
    _, ends, values = cells.buffers()
    start = 0 if values is None else values.address - base
    numbers = memoryview(ends).cast("q" if wide else "i")
    for i in range(cells.offset, cells.offset + len(cells)):
        yield start + numbers[i], numbers[i + 1] - numbers[i]
