"""kohya's data sets: the dataset file ([general], [[datasets]], [[datasets.subsets]]), or the
folders 10_name of train_data_dir and reg_data_dir, and the values that each subset inherits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.data.captions import read_caption_file
from lora_core.data.listing import list_one_folder
from lora_core.errors import UserError
from lora_core.text import nearest_hint, shorten_value
from training.translation.kohya_options import (
    KOHYA_DEFAULTS,
    TOOL,
    kind_of,
    read_foreign_toml,
    without_empty,
)
from training.translation.kohya_values import check_tables, check_value
from training.translation.translated_options import TranslatedOptions

# Options of a subset, which may also stand in [[datasets]] and [general].
INHERITED = (
    "num_repeats", "shuffle_caption", "caption_separator", "keep_tokens", "keep_tokens_separator",
    "secondary_separator", "enable_wildcard", "color_aug", "flip_aug", "face_crop_aug_range",
    "random_crop", "caption_prefix", "caption_suffix", "caption_dropout_rate",
    "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "token_warmup_min",
    "token_warmup_step", "custom_attributes", "resize_interpolation", "caption_extension",
    "class_tokens", "cache_info", "validation_seed", "validation_split",
)  # fmt: skip
OF_A_SUBSET = ("image_dir", "is_reg", "alpha_mask", "metadata_file", "conditioning_data_dir")
OF_A_DATASET = (
    "batch_size", "bucket_no_upscale", "bucket_reso_steps", "enable_bucket", "max_bucket_reso",
    "min_bucket_reso", "resolution", "network_multiplier", "validation_seed", "validation_split",
)  # fmt: skip
# Names of the dataset file -> those of the command line.
RENAMED = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
FOLDERS = "folders."  # the place of values that are in a folder's name
DEFAULTS = {"network_multiplier": 1.0, "custom_attributes": None, "is_reg": False}


@dataclass(frozen=True)
class Given:
    """A value of a subset and where it stands."""

    value: Any
    place: str = ""  # in the dataset file: "datasets.0."; "": an option of the command line


@dataclass(frozen=True)
class ForeignSubset:
    """A subset with the values that it inherits."""

    values: dict[str, Given]
    dataset: int  # the number of its data set
    place: str  # "datasets.0.subsets.1.", or FOLDERS

    def __getitem__(self, name: str) -> Any:
        """The value of an option of the subset or its data set."""
        return self.values[name].value


@dataclass
class ForeignData:
    """The subsets of a run, and the record of the dataset file; None without a file."""

    subsets: list[ForeignSubset]
    record: TranslatedOptions | None = None
    skipped: list[str] = field(default_factory=list)  # places of subsets that stand twice


def read_datasets(options: TranslatedOptions, file: Path | None) -> ForeignData:
    """The subsets of a dataset file, else of the folders that the options name.

    `options`: those of the command line, whose values hold where the file has none. Raises
    UserError for unknown keys, and where there are no images.
    """
    if file is not None:
        return _read_file(file, options)
    if options["in_json"]:
        raise options.refuse(
            "in_json",
            "its JSON of captions is not read; write each caption next to its image, NAME.txt, or "
            "in a metadata.jsonl, and give --data.images FOLDER",
        )
    subsets = _folders(options, "train_data_dir", is_reg=False)
    if not subsets:
        raise UserError(
            f"train_data_dir of {TOOL} is {shorten_value(options['train_data_dir'])}, which has no "
            "folders N_name of images; give it, or a dataset file with dataset_config or --dataset"
        )
    return ForeignData([*subsets, *_folders(options, "reg_data_dir", is_reg=True)])


def read_subset_captions(subset: ForeignSubset) -> list[str]:
    """The captions of a subset's images: a line of each file, all lines with wildcards, and the
    class tokens of images without one. None where the folder does not exist.
    """
    folder, extension = Path(subset["image_dir"]), str(subset["caption_extension"]).lower()
    if not folder.is_dir():
        return []
    contents = list_one_folder(folder, extension)
    texts: list[str] = []
    for image in contents.images:
        files = [path for path in contents.texts.get(image, ()) if path.suffix.lower() == extension]
        lines = read_caption_file(files[0]) if files else ()
        texts += lines if subset["enable_wildcard"] else lines[:1]
        if not lines and subset["class_tokens"]:
            texts.append(subset["class_tokens"])
    return texts


def _folders(options: TranslatedOptions, name: str, *, is_reg: bool) -> list[ForeignSubset]:
    """A subset for each folder N_name in a folder of kohya's."""
    root = Path(options[name] or "")
    if not options[name] or not root.is_dir():
        return []
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        number, _, words = folder.name.partition("_")
        if number.isdigit() and int(number) > 0:
            own = {"image_dir": str(folder), "num_repeats": int(number), "is_reg": is_reg}
            levels = [(FOLDERS, own | {"class_tokens": words or None})]
            found.append(_resolve(levels, options, 0, FOLDERS))
    return found


def _read_file(file: Path, options: TranslatedOptions) -> ForeignData:
    table = _read_tables(file)
    record = TranslatedOptions(f"{TOOL}'s dataset", *_flatten(table, str(file)))
    data = ForeignData([], record)
    general = table.get("general", {})
    for i, dataset in enumerate(table.get("datasets", [])):
        own = {name: value for name, value in dataset.items() if name != "subsets"}
        place, folders = f"datasets.{i}.", set()
        for j, subset in enumerate(dataset.get("subsets", [])):
            inner = f"{place}subsets.{j}."
            if subset.get("image_dir") in folders:
                data.skipped.append(inner)
                continue
            folders.add(subset.get("image_dir"))
            levels = [(inner, subset), (place, own), ("general.", general)]
            data.subsets.append(_resolve(levels, options, i, inner))
    if not data.subsets:
        raise UserError(f"{file} has no [[datasets.subsets]] with an image_dir")
    return data


def _read_tables(file: Path) -> dict[str, Any]:
    """The sections of the dataset file, with values that are checked and without empty ones."""
    table = read_foreign_toml(file)
    check_tables(table, str(file))

    def read(section: Mapping[str, Any], place: str) -> dict[str, Any]:
        found = without_empty(section)
        names = [name for name in found if name in (*INHERITED, *OF_A_SUBSET, *OF_A_DATASET)]
        return found | {
            name: check_value(place + name, found[name], kind_of(name), f"{file}: ")
            for name in names
        }

    read_tables = dict(table)
    if "general" in table:
        read_tables["general"] = read(table["general"], "general.")
    read_tables["datasets"] = []
    for i, dataset in enumerate(table.get("datasets", [])):
        own = read(dataset, f"datasets.{i}.")
        rows = enumerate(dataset.get("subsets", []))
        own["subsets"] = [read(subset, f"datasets.{i}.subsets.{j}.") for j, subset in rows]
        read_tables["datasets"].append(own)
    return read_tables


def _unknown(place: str, name: str, names: Sequence[str], file: str) -> UserError:
    """The error for a key that a section of the dataset file does not have."""
    elsewhere = (*INHERITED, *OF_A_SUBSET, *OF_A_DATASET, *RENAMED.values())
    if name in KOHYA_DEFAULTS and name not in elsewhere:
        return UserError(
            f"{file}: {place}{name} belongs in the training file, which --from-kohya takes; move "
            "it there"
        )
    near = nearest_hint(name, names, f"; the nearest is {place}{{}}")
    return UserError(f"{file}: {place}{name} is no option there{near}")


def _flatten(table: Mapping[str, Any], file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(every known name -> default, given name -> value), with the places of the file.

    Raises UserError for a key that its section does not have.
    """
    sections: list[tuple[str, Mapping[str, Any], Sequence[str]]] = []
    sections.append(("general.", table.get("general", {}), (*INHERITED, *OF_A_DATASET)))
    for i, dataset in enumerate(table.get("datasets", [])):
        sections.append((f"datasets.{i}.", dataset, (*INHERITED, *OF_A_DATASET, "subsets")))
        for j, subset in enumerate(dataset.get("subsets", [])):
            place = f"datasets.{i}.subsets.{j}."
            sections.append((place, subset, (*INHERITED, *OF_A_SUBSET)))
    for name in table:
        if name not in ("general", "datasets"):
            raise UserError(f"{file} has {name}; expected [general] and [[datasets]]")
    known: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for place, section, names in sections:
        known |= {place + name: DEFAULTS.get(name) for name in names}
        for name, value in without_empty(section).items():
            if name not in names:
                raise _unknown(place, name, names, file)
            if name != "subsets":
                given[place + name] = value
    return known, given


def _resolve(
    levels: Sequence[tuple[str, Mapping[str, Any]]],
    options: TranslatedOptions,
    dataset: int,
    place: str,
) -> ForeignSubset:
    """A subset with the value of each option from the first level that has one."""
    values = {}
    for name in dict.fromkeys((*INHERITED, *OF_A_SUBSET, *OF_A_DATASET)):
        usual = RENAMED.get(name, name)
        found = Given(options[usual] if usual in options.defaults else DEFAULTS.get(name))
        for where, level in levels:
            if level.get(name) is not None:
                found = Given(level[name], where)
                break
        values[name] = found
    if values["caption_extension"].place == "" and options["caption_extention"]:
        values["caption_extension"] = Given(options["caption_extention"])
    return ForeignSubset(values, dataset, place)
