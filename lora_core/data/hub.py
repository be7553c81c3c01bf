"""Export a hub dataset to a folder of images that `scan_folder` reads.

Anything that `datasets.load_dataset` takes can be exported.
"""

import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import UnidentifiedImageError

from lora_core.data.images import READ_ERRORS, decode_image, to_srgb
from lora_core.data.listing import METADATA_TABLES
from lora_core.data.metadata_tables import CAPTION_COLUMNS
from lora_core.errors import UserError, first_line
from lora_core.json_files import read_object
from lora_core.shared_paths import lies_within

MARK = "dataset.json"  # the source of a complete export
# Formats of encoded images that are copied as they are.
KEPT = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp"}
# Modes whose values and profile a PNG keeps.
PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")


def export_dataset(
    name: str,
    folder: Path | str | None = None,
    *,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "",
    caption: str = "",
) -> Path:
    """The folder with the images of one split of a dataset, exported unless it exists already.

    It has a metadata.jsonl if there are captions. `name` is a dataset of the hub or a folder
    (ImageFolder, parquet ...); without `folder` it gets one of its own in the hub's cache of
    assets. An image that is stored as a file keeps its bytes, and so its EXIF data and quality;
    others are written as PNG.

    Captions are of `caption_column`, whose rows may be empty if there is a `caption` for those (as
    in diffusers' scripts); else that one for all; else of the first of text, caption and prompt. In
    metadata.jsonl their key is always text.

    The folder appears complete or not at all, and a dataset that has changed since is exported
    anew. Raises UserError for a missing package, dataset, split or column, a row without an image,
    and a folder of something else.
    """
    has_caption = bool(caption)
    data, caption_column = _load_split(
        name, split, image_column, caption_column, one_for_all=has_caption
    )
    columns = {"image_column": image_column, "caption_column": caption_column}
    mark: dict[str, Any] = {"dataset": name, "split": split, **columns}
    target = Path(folder) if folder is not None else _cached_folder(mark)
    mark |= {"fingerprint": data._fingerprint, "images": len(data)}
    if _is_complete(target, mark):
        return target
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.mkdir(parents=True)
        rows = []
        sources = image_sources(name)
        written = _write_images(
            data,
            partial,
            image_column=image_column,
            caption_column=caption_column,
            sources=sources,
            may_be_empty=has_caption,
        )
        for row in written:
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        if caption_column:
            (partial / METADATA_TABLES[0]).write_text("".join(rows), encoding="utf-8")
        (partial / MARK).write_text(json.dumps(mark, indent=1), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)  # empty, or an older export of the same
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{len(data)} images of {name} ({split}) written to {target}")
    return target


def import_datasets(name: str) -> Any:
    """The package datasets. Raises UserError, which names the dataset, if it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"the dataset {name} needs the package datasets: pip install datasets"
        ) from None
    return datasets


def _load_split(
    name: str, split: str, image_column: str, caption_column: str, *, one_for_all: bool
) -> tuple[Any, str]:
    """(split with its images undecoded and only the columns that are read, caption column).

    The caption column is "" when there is one caption for all.
    """
    datasets = import_datasets(name)
    try:
        data = datasets.load_dataset(name, split=split, trust_remote_code=False)
    except Exception as error:
        # DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError ... by version
        raise UserError(
            f"cannot load split {split!r} of the dataset {name}: {_reason(error)}; "
            "check its name, its split and the connection"
        ) from None
    caption_column = choose_caption_column(
        name, data.column_names, image_column, caption_column, one_for_all=one_for_all
    )
    wanted = {"image": image_column}
    if caption_column:
        wanted["caption"] = caption_column
    if not len(data):
        raise UserError(f"split {split!r} of the dataset {name} is empty; choose another")
    try:
        data = data.select_columns(list(wanted.values()))
        return data.cast_column(image_column, datasets.Image(decode=False)), caption_column
    except Exception as error:  # pyarrow's and datasets' own, by type of column
        raise UserError(
            f"the column {image_column!r} of the dataset {name} holds no images: {_reason(error)}; "
            "name another image column"
        ) from None


def choose_caption_column(
    name: str, columns: Sequence[str], image_column: str, caption_column: str, *, one_for_all: bool
) -> str:
    """The caption column of a dataset with these columns: the given one, else the first of text,
    caption and prompt; "" where there is `one_for_all`. Raises UserError for a missing column.
    """
    listed = ", ".join(columns)
    usual = next((column for column in CAPTION_COLUMNS if column in columns), "")
    if not caption_column and one_for_all and usual:
        print(
            f"the column {usual!r} of {name} is not read, because one caption is given for all; "
            f"--data.caption-column {usual} reads it"
        )
    if not caption_column and not one_for_all:
        caption_column = usual
        if not usual:
            known = ", ".join(CAPTION_COLUMNS)
            raise UserError(
                f"the dataset {name} has the columns {listed}, none of {known}; "
                "name the caption column with --data.caption-column, "
                "or give one caption for all with --data.caption"
            )
    wanted = {"image": image_column, "caption": caption_column or image_column}
    for kind, column in wanted.items():
        if column not in columns:
            raise UserError(
                f"the dataset {name} has no {kind} column {column!r}; "
                f"its columns are {listed}; name one with --data.{kind}-column"
            )
    return caption_column


def _cached_folder(mark: Mapping[str, Any]) -> Path:
    """A folder for this export in the hub's cache of assets."""
    name = hashlib.blake2b(json.dumps(mark, sort_keys=True).encode(), digest_size=8).hexdigest()
    return Path(cached_assets_path("lora_core", "datasets", Path(mark["dataset"]).name)) / name


def _is_complete(folder: Path, mark: Mapping[str, Any]) -> bool:
    """Whether the folder has exactly this export.

    Raises UserError for a folder with anything else than an export of the same dataset.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = read_object(folder / MARK, "remove it")
    except UserError:
        raise UserError(
            f"{folder} holds something else than an exported dataset; choose another folder"
        ) from None
    changes = [key for key in mark if found.get(key) != mark[key]]
    if other := [key for key in changes if key not in ("fingerprint", "images")]:
        was = ", ".join(f"{key} {found.get(key)!r}" for key in other)
        wanted = ", ".join(f"{key} {mark.get(key)!r}" for key in other)
        raise UserError(
            f"{folder} holds another export ({was}; wanted {wanted}); "
            "choose another folder or remove it"
        )
    return not changes


def _write_images(
    data: Any,
    folder: Path,
    *,
    image_column: str,
    caption_column: str,
    sources: Sequence[Path],
    may_be_empty: bool,
) -> Iterator[dict[str, Any]]:
    """Writes each row's image and yields its row of metadata.jsonl.

    `sources`: the folders that may hold images which rows name.
    """
    advice = "choose another column"
    if not may_be_empty:
        both = f"--data.caption in addition to --data.caption-column {caption_column}"
        advice = f"add it, give {both}, or {advice}"
    for number, row in enumerate(data):
        where = f"row {number} of the dataset"
        cell = row[image_column] or {"path": None}
        try:
            if not cell.get("bytes") and not cell["path"]:
                raise ValueError("it is empty")
            content = cell.get("bytes") or _read_image_file(cell["path"], sources)
            image = decode_image(io.BytesIO(content))
            file = folder / f"{number:06d}{KEPT.get(image.format or '', '.png')}"
            if image.format in KEPT:
                file.write_bytes(content)
            else:
                writable = image if image.mode in PNG_MODES else to_srgb(image, where)[0]
                writable.save(file)
        except (KeyError, TypeError, *READ_ERRORS) as error:
            raise UserError(
                f"{where} has no readable image in {image_column!r} ({_reason(error)}); "
                "remove it or choose another column"
            ) from error
        texts = row.get(caption_column)
        if caption_column and not are_captions(texts, may_be_empty=may_be_empty):
            raise UserError(
                f"{where} has {texts!r} in {caption_column!r}, expected a caption; {advice}"
            )
        yield {"file_name": file.name, "text": texts}


def _read_image_file(path: str, sources: Sequence[Path]) -> bytes:
    """The file that a row of a table names: it is of the dataset, and not of this computer."""
    if not any(lies_within(path, source) for source in sources):
        raise ValueError(f"it names {path}, which is no file of the dataset")
    return Path(path).read_bytes()


def image_sources(name: str) -> list[Path]:
    """The folders with the files of a dataset: its own, or the caches of the hub."""
    import datasets

    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    return [Path(name)] if Path(name).exists() else [Path(cache) for cache in caches]


def are_captions(texts: Any, *, may_be_empty: bool) -> bool:
    """Whether a cell is a caption or a list of captions that `read_metadata` accepts."""
    every = texts if isinstance(texts, list) else [texts]
    if may_be_empty:
        return texts is None or all(isinstance(text, str) for text in every)
    return bool(every) and all(isinstance(text, str) and text.strip() for text in every)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow names the buffer that it read
        return "no image format that is known"
    return first_line(error)
