"""Training sets that stay in their shards: tar files (WebDataset), parquet, Arrow.

One pass over the shards finds the place of every image: file, offset, length. From then on images
are read by their places in the keyed order of a folder, so that a run is the same as one on the
extracted or exported images: a shuffle buffer would make the order depend on the number of readers
and on where a run was resumed.
"""

from __future__ import annotations

import glob
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lora_core.data import hub
from lora_core.data.captions import (
    FALLBACK,
    ONE,
    ONE_FOR_ALL,
    TYPED,
    Captions,
    common_captions,
    normalize_captions,
    read_caption_file,
)
from lora_core.data.image_checks import ImageChecks, ImageFile
from lora_core.data.records import Record, build_record, describe_all_bad
from lora_core.data.shards.stored_files import path_of
from lora_core.data.shards.table_shards import list_table_rows, table_columns
from lora_core.data.shards.tar_shards import TAR, TarExample, expand_ranges, list_tar_examples
from lora_core.errors import UserError, first_line
from lora_core.shared_paths import lies_within

TABLES = (".parquet", ".arrow")
KINDS = ".tar, .parquet or .arrow"
DEFAULT_SPLIT, DEFAULT_IMAGE = "train", "image"


class StreamOptions(NamedTuple):
    """What of a dataset is read."""

    split: str = DEFAULT_SPLIT
    image_column: str = DEFAULT_IMAGE  # in tar shards the ending of the images; image: any
    caption_column: str = ""  # in tar shards the ending of the captions
    captions: str = "auto"
    caption: str | None = None
    masks: Literal["auto", "file", "alpha", "any", "none"] = "none"


class Shards(NamedTuple):
    """The files of a split."""

    kind: Literal["tar", "table", "images"]
    files: list[Path]


class _Found(NamedTuple):
    """An image with its captions; () where it has none of its own."""

    file: ImageFile
    texts: tuple[str, ...]
    source: str  # of the captions


def scan_stream(
    name: str, options: StreamOptions, checks: ImageChecks, *, repeats: int = 1
) -> list[Record]:
    """The images of a dataset in its shards, in their order, each `repeats` times.

    `name`: a folder, or files by a pattern such as shards/{000..009}.tar or shards/*.tar. Captions
    are those of `hub.export_dataset`; in tar shards of NAME.txt (a caption in each line), .caption
    or .json. Masks are members NAME.mask.png of tar shards, or alpha channels. Raises UserError for
    what is no dataset on this computer, a row without image or caption, and damaged images, unless
    `checks` leaves them out.
    """
    shards = find_shards(name, options.split)
    _check_stream_options(shards, options)
    read = {"tar": _tar_images, "table": _table_images, "images": _folder_images}[shards.kind]
    found = list(read(name, shards, options, checks))
    if not found and not checks.left_out:
        raise UserError(f"no images in {name}, {len(shards.files)} files; check --data.dataset")
    found = [_complete_captions(own, name, options) for own in found]
    _check_caption_use(found, name, options)
    results = checks.check_all([own.file for own in found], options.masks, name)
    records = []
    for own, checked in zip(found, results, strict=True):
        if checked is not None:
            path = path_of(own.file.image)
            texts = normalize_captions(path, Captions(own.texts, own.source))
            records.append(build_record(own.file, texts, checked))
    if not records:
        raise UserError(describe_all_bad(name, checks))
    return records * repeats


def find_shards(name: str, split: str) -> Shards:
    """The files of a split of a dataset on this computer. Raises UserError where there are none."""
    if Path(name).is_dir():
        tars = sorted(path for path in Path(name).rglob(f"*{TAR}") if path.is_file())
        return _tar_or_table(tars, name, split) if tars else _find_split(name, split)
    files: list[Path] = []
    for pattern in expand_ranges(name):
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        files += [Path(match) for match in matches]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        first = missing[0] if missing else f"file {name}"
        raise UserError(
            f"--data.streaming reads shards on this computer, and there is no {first}; of a "
            "dataset of the hub, download the files first (hf download), or leave it out"
        )
    return _tar_or_table(files, name, split)


def _tar_or_table(files: list[Path], name: str, split: str) -> Shards:
    """Files that were given by name. Raises UserError where they are of several kinds."""
    if split != DEFAULT_SPLIT:
        raise UserError(
            f"--data.split {split} has no effect on {name}, files without splits; name the files "
            "of the split, such as FOLDER/test-*.tar"
        )
    endings = {file.suffix.lower() for file in files}
    if endings == {TAR}:
        return Shards("tar", files)
    if len(endings) == 1 and endings <= set(TABLES):
        return Shards("table", files)
    raise UserError(
        f"{name} is {', '.join(sorted(endings))}; --data.streaming reads files that are all {KINDS}"
    )


def _find_split(name: str, split: str) -> Shards:
    """The files that the datasets library takes for a split of a folder."""
    datasets = hub.import_datasets(name)
    try:
        builder = datasets.load_dataset_builder(name, **_without_code(datasets))
        by_split = builder.config.data_files or {}
        files = [Path(str(file)) for file in by_split[split]]
    except Exception as error:
        # DatasetNotFoundError, FileNotFoundError, KeyError ... by version
        reason = first_line(error)
        raise UserError(
            f"cannot find split {split!r} of the dataset {name} ({reason}); "
            "check its name and its split"
        ) from None
    endings = {file.suffix.lower() for file in files}
    if len(endings) == 1 and endings <= set(TABLES):
        return Shards("table", files)
    if type(builder).__module__.endswith(".imagefolder"):
        return Shards("images", files)
    raise UserError(
        f"{name} is a dataset of {', '.join(sorted(endings))}; --data.streaming reads {KINDS} "
        "shards, and image files; leave it out"
    )


def _without_code(datasets: Any) -> dict[str, bool]:
    """The argument that keeps a folder's Python files from running, where datasets knows it: since
    4.0 it runs none.
    """
    known = inspect.signature(datasets.load_dataset_builder).parameters
    return {"trust_remote_code": False} if "trust_remote_code" in known else {}


def _check_stream_options(shards: Shards, options: StreamOptions) -> None:
    """Raises UserError for captions and masks that shards cannot have."""
    allowed = (*ONE_FOR_ALL, "auto", "txt" if shards.kind == "tar" else "metadata")
    if options.captions not in allowed:
        raise UserError(
            f"--data.captions {options.captions} reads a folder of images; with --data.streaming "
            f"it is one of {', '.join(allowed)}"
        )
    if options.captions in ONE_FOR_ALL and not options.caption:
        raise UserError(
            f"captions {options.captions!r} need the caption (for templates, the word to put in "
            "them); add --data.caption"
        )
    if options.captions in ONE_FOR_ALL and options.caption_column:
        raise UserError(
            f"--data.caption-column {options.caption_column} has no effect with --data.captions "
            f"{options.captions}; leave out one of the two"
        )
    if options.masks == "file" and shards.kind != "tar":
        raise UserError(
            "--data.masks file looks for NAME.mask.png, which only tar shards hold; take "
            "--data.masks alpha, or leave --data.streaming out"
        )


def _reads_one_caption(options: StreamOptions) -> bool:
    """Whether the images' own captions are not read."""
    return options.captions in ONE_FOR_ALL or bool(options.caption and not options.caption_column)


# ---------------------------------------------------------------- captions


def _complete_captions(found: _Found, name: str, options: StreamOptions) -> _Found:
    """The image with its own captions, or the common one. Raises UserError where it has none."""
    if options.captions in ONE_FOR_ALL:
        shared = common_captions(options.captions, str(options.caption))
        return _Found(found.file, shared.texts, str(shared.source))
    if found.texts:
        return found
    if options.caption:
        source = FALLBACK if options.caption_column else ONE
        return _Found(found.file, (options.caption,), source)
    raise UserError(
        f"{path_of(found.file.image)} of {name} has no caption; give --data.caption in addition "
        "to --data.caption-column for those without, or --data.caption alone for all"
    )


def _check_caption_use(found: Sequence[_Found], name: str, options: StreamOptions) -> None:
    """Raises UserError for a common caption that no image takes."""
    if options.caption and found and not any(own.source in TYPED for own in found):
        raise UserError(
            f"the caption {options.caption!r} has no use, because every image of {name} has one; "
            "leave --data.caption out"
        )


# ---------------------------------------------------------------- kinds of shards


def _tar_images(
    name: str, shards: Shards, options: StreamOptions, checks: ImageChecks
) -> Iterator[_Found]:
    """The images in tar shards."""
    ending = "" if options.image_column == DEFAULT_IMAGE else options.image_column
    has_texts = False
    for file in shards.files:
        for example in list_tar_examples(file, ending):
            image, mask = example.image, example.mask
            if options.masks == "file" and mask is None:
                raise UserError(
                    f"{image} has no mask; add NAME.mask.png to the shard or take --data.masks auto"
                )
            if options.masks in ("none", "alpha"):
                mask = None
            has_texts = has_texts or bool(example.texts)
            texts: tuple[str, ...] = ()
            source = ""
            if not _reads_one_caption(options):
                try:
                    texts, source = _tar_captions(example, options)
                    normalize_captions(image.path, Captions(texts, source))
                except (UserError, OSError) as error:
                    checks.leave_out(image.path, error)
                    continue
            yield _Found(ImageFile(image, mask), texts, source)
    if has_texts and options.captions == "auto" and _reads_one_caption(options):
        print(
            f"the captions in {name} are not read, because one caption is given for all; "
            "--data.caption-column txt reads them"
        )


def _tar_captions(example: TarExample, options: StreamOptions) -> tuple[tuple[str, ...], str]:
    """(captions, their source) of the first member with any."""
    ending = "txt" if options.captions == "txt" else options.caption_column
    for member in example.texts:
        if ending and not member.path.name.endswith(f".{ending}"):
            continue
        if texts := read_caption_file(member):
            return texts, f"{member.suffix.lower()} members of the shards"
    return (), ""


def _table_images(
    name: str, shards: Shards, options: StreamOptions, checks: ImageChecks
) -> Iterator[_Found]:
    """The images in parquet or Arrow shards."""
    columns = table_columns(shards.files[0])
    column = _caption_column(name, columns, options)
    for row in list_table_rows(shards.files, options.image_column, column):
        if row.image is None:
            error = UserError(f"{row.where} has no image in {options.image_column!r}; remove it")
            checks.leave_out(Path(name) / row.where, error)
            continue
        texts = _cell_captions(row.texts, column, row.where, options)
        yield _Found(ImageFile(row.image, None), texts, f"the column {column!r} of the dataset")


def _caption_column(name: str, columns: Sequence[str], options: StreamOptions) -> str:
    """The column with the captions; "" where there is one caption for all."""
    return hub.choose_caption_column(
        name,
        columns,
        options.image_column,
        options.caption_column,
        one_for_all=_reads_one_caption(options),
    )


def _cell_captions(cell: Any, column: str, where: str, options: StreamOptions) -> tuple[str, ...]:
    """The captions in a cell. Raises UserError for what is no caption."""
    if not column:
        return ()
    may_be_empty = bool(options.caption)
    if not hub.are_captions(cell, may_be_empty=may_be_empty):
        raise UserError(
            f"{where} has {cell!r} in {column!r}, expected a caption; add it, give --data.caption "
            f"in addition to --data.caption-column {column}, or choose another column"
        )
    texts = [text.strip() for text in (cell if isinstance(cell, list) else [cell or ""])]
    return tuple(filter(None, texts))


def _folder_images(
    name: str, shards: Shards, options: StreamOptions, checks: ImageChecks
) -> Iterator[_Found]:
    """The images of an ImageFolder, files with a table of captions."""
    columns, rows = _read_rows(name, options)
    column = _caption_column(name, columns, options)
    for number, row in enumerate(rows):
        where = f"row {number} of the dataset"
        path = Path((row[options.image_column] or {}).get("path") or "")
        if not any(lies_within(path, source) for source in hub.image_sources(name)):
            raise UserError(f"{where} names {path}, which is no file of the dataset; remove it")
        texts = _cell_captions(row.get(column), column, where, options)
        yield _Found(ImageFile(path, None), texts, f"the column {column!r} of the dataset")


def _read_rows(name: str, options: StreamOptions) -> tuple[list[str], list[Any]]:
    """(columns, rows) of a folder of images, with the images as paths."""
    datasets = hub.import_datasets(name)
    try:
        data = datasets.load_dataset(
            name, split=options.split, streaming=True, trust_remote_code=False
        )
        columns = list(data.column_names)
        if options.image_column in columns:  # else `choose_caption_column` names it
            data = data.cast_column(options.image_column, datasets.Image(decode=False))
        return columns, list(data)
    except Exception as error:  # of the kinds that `_find_split` names
        raise UserError(
            f"cannot read the dataset {name} ({first_line(error)}); correct it, or give the folder "
            "with --data.images"
        ) from None
