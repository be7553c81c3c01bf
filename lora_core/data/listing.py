"""What is in a folder of images: which file is an image, a mask, a caption or a table, and why
another one is left out.

Folders are read as they are, as the parent of kohya's N_name folders, or as ImageFolder's train
folder.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from lora_core.data.images import IMAGE_SUFFIXES, RAW_SUFFIXES, format_problem
from lora_core.errors import UserError
from lora_core.text import normalize_unicode

METADATA_TABLES = (
    "metadata.jsonl",
    "metadata.csv",
)  # as ImageFolder of the datasets library has them
CAPTION_SUFFIXES = (
    ".txt",
    ".caption",
    ".json",
)  # of a file beside an image, the first that is there and has a text counts
MASK_ENDS = (".mask", "-masklabel")  # a mask whatever stands beside it: ours, OneTrainer's
MASK_ENDS_BESIDE = (  # a mask if the image without this end is there
    "_masklabel", "_mask", "-mask", " mask", " (mask)", "(mask)", "_matte", "-matte", "_seg", "-seg", "_segmentation", "-segmentation",
)  # fmt: skip
MASK_STARTS_BESIDE = ("mask_", "mask-")
CONDITION_END = "-condlabel"  # OneTrainer's conditioning images
MASK_FOLDERS = ("mask", "masks")  # a mask is called there as its image is
NO_IMAGE = "texts of no image"  # why a caption file is left out
SOURCE_END = ".src"  # cloneofsimo's 0.src.jpg has the mask 0.mask.png
OTHER_IMAGES = (".jxl", ".ico", ".svg", ".exr", ".hdr", ".xcf", ".ai", ".eps", ".pdf")
JUNK = (
    "thumbs.db",
    "desktop.ini",
    "dataset.json",
)  # of the system, and what an exported dataset was made from
JUNK_FOLDERS = ("__macosx", "@eadir")
NUMBERED = re.compile(
    r"(\d+)_(.*)", re.DOTALL
)  # kohya's folders: repeats, and the caption of images that have none
YEARS = range(1900, 2100)  # 2024_summer is no folder of 2,024 repeats
MOST_REPEATS = 9_999  # nor 240501_summer or 20240501_summer
MANY = 10_000  # images in sub-folders are counted so far


@dataclass(frozen=True)
class FolderContents:
    """One folder of images."""

    folder: Path
    images: tuple[Path, ...]
    masks: dict[Path, Path]  # image -> its mask
    texts: dict[
        Path, tuple[Path, ...]
    ]  # image -> the caption files beside it, in the order of CAPTION_SUFFIXES
    table: Path | None
    unclaimed: tuple[Path, ...]  # masks that belong to no image
    others: dict[Path, str]  # file or sub-folder -> why nothing reads it
    repeats: int = 1
    words: str = ""  # the caption that a folder's name gives to images without one


@dataclass(frozen=True)
class Listing:
    """The folders that images are read from."""

    root: Path
    parts: tuple[FolderContents, ...]
    others: dict[Path, str] = field(
        default_factory=dict
    )  # of the root, where that is not one of the parts


def list_folder(root: Path, *, tabled: bool = True) -> Listing:
    """What is in the folder. `tabled`: a metadata table may name images below it.

    A folder without images of its own stands for its N_name folders (kohya: N repeats, the name is
    the caption of images that have none), or for its folder `train` (ImageFolder of the datasets
    library). Raises UserError, naming what is there, when there are no images.
    """
    own = list_one_folder(root)
    if own.images or (tabled and own.table):
        return Listing(root, (own,))
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    parts = tuple(part for path in folders if (part := _numbered_part(path)) is not None)
    if not parts:
        trained = [list_one_folder(path) for path in folders if path.name.lower() == "train"]
        parts = tuple(part for part in trained if part.images or (tabled and part.table))
    if not parts:
        raise UserError(_no_images(own))
    used = {part.folder for part in parts}
    return Listing(root, parts, {path: why for path, why in own.others.items() if path not in used})


def list_one_folder(folder: Path) -> FolderContents:
    """What is in one folder, whatever lies below it."""
    entries = [path for path in sorted(folder.iterdir()) if not is_junk(path)]
    files = [path for path in entries if path.is_file()]
    shown = [path for path in files if not path.name.startswith(".")]
    pictures = [
        path
        for path in shown
        if path.suffix.lower() in IMAGE_SUFFIXES and why_unreadable(path) is None
    ]
    names = {name for path in pictures for name in _names(path)}
    bases = {path: base for path in pictures if (base := _masked_name(path, names)) is not None}
    conditions = [path for path in pictures if path.stem.lower().endswith(CONDITION_END)]
    images = tuple(path for path in pictures if path not in bases and path not in conditions)
    masks, unclaimed, spare = _pair_masks(images, bases, entries)
    texts, strays = _pair_texts(
        images, [path for path in shown if path.suffix.lower() in CAPTION_SUFFIXES]
    )
    table = _table(folder)
    others = {path: "links to nothing" for path in entries if not path.exists()}
    others |= dict.fromkeys(spare, "second masks of an image")
    others |= dict.fromkeys(conditions, "conditioning images")
    others |= dict.fromkeys(strays, NO_IMAGE)
    others |= _reasons(
        files,
        {
            *pictures,
            *strays,
            *(path for own in texts.values() for path in own),
            *([table] if table else []),
        },
    )
    mask_folders = {mask.parent for mask in (*masks.values(), *unclaimed, *spare)}
    others |= {
        path: "sub-folders" for path in entries if path.is_dir() and path not in mask_folders
    }
    return FolderContents(folder, images, masks, texts, table, tuple(unclaimed), others)


def why_unreadable(path: Path) -> str | None:
    """None for a file that can be read as an image, as far as its name and first bytes tell, else
    the reason; "" for other files.
    """
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in RAW_SUFFIXES:
        return format_problem(path)
    return (
        "images in formats that are not read (save them as JPEG or PNG)"
        if suffix in OTHER_IMAGES
        else ""
    )


def files_left_out(listing: Listing, used: Iterable[Path]) -> dict[str, list[Path]]:
    """Reason -> the files, and sub-folders with images, that nothing reads. `used`: images, masks,
    caption files and tables that are read.
    """
    taken, found = set(used), dict[str, list[Path]]()

    def add(path: Path, why: str) -> None:
        if path not in taken and not (path.is_dir() and not any(_images_below(path, taken))):
            found.setdefault(why, []).append(path)

    for path, why in listing.others.items():
        add(path, why)
    for part in listing.parts:
        for path, why in part.others.items():
            add(path, why)
        for path in (*part.masks.values(), *part.unclaimed):
            add(path, "masks that are not asked for (--data.masks file)")
        for path in (path for own in part.texts.values() for path in own):
            blank = not path.read_bytes().strip()
            add(path, "empty texts" if blank else "texts beside images that have another caption")
        if part.table is not None:
            add(part.table, "tables that the chosen captions do not read")
        for path in part.images:
            add(path, "images")
    return {why: list(dict.fromkeys(paths)) for why, paths in found.items()}


def count_images(folder: Path, taken: Iterable[Path] = ()) -> int:
    """How many images are in a folder and below it, without those that are taken."""
    return sum(1 for _ in islice(_images_below(folder, set(taken)), MANY))


def folder_for_new_images(root: Path) -> tuple[Path, int]:
    """(the folder that further images belong in, how many images there are): of N_name folders the
    first, else the folder itself.

    Raises UserError for a folder without images of its own that has sub-folders of images which are
    not read.
    """
    if not count_images(root):
        return root, 0
    parts = list_folder(root, tabled=False).parts
    return parts[0].folder, sum(len(part.images) for part in parts)


def is_junk(path: Path) -> bool:
    """Whether a file or folder is what operating systems leave everywhere (.DS_Store, ._001.jpg,
    Thumbs.db), or a hidden folder.
    """
    name = path.name.lower()
    if path.is_dir():
        return name in JUNK_FOLDERS or name.startswith(".")
    return (
        name in JUNK
        or name.startswith("._")
        or name in (".ds_store", ".directory", ".gitignore", ".gitattributes", ".gitkeep")
    )


def find_file(folder: Path, name: str) -> Path | None:
    """The file that a table calls `name`, in whichever normal form of Unicode the disk has it; None
    when it is not there.
    """
    path = _below(folder, name)
    if not name or os.path.isfile(path):
        return path if name else None
    for part in Path(name).parts:
        if not os.path.isdir(folder):
            return None
        exact = folder / part
        same = [
            entry
            for entry in folder.iterdir()
            if normalize_unicode(entry.name) == normalize_unicode(part)
        ]
        if not os.path.exists(exact) and not same:
            return None
        folder = exact if os.path.exists(exact) else same[0]
    return folder if folder.is_file() else None


def _below(folder: Path, name: str) -> Path:
    """folder / name without `..`; a whole path of a file below the folder as a listing of the
    folder writes it.
    """
    place, path = os.path.abspath(folder), os.path.abspath(folder / name)
    return (
        folder / os.path.relpath(path, place) if Path(path).is_relative_to(place) else folder / name
    )


def _numbered_part(folder: Path) -> FolderContents | None:
    """One of kohya's folders, 20_name with images in it; None for another."""
    found = NUMBERED.fullmatch(folder.name)
    if found is None or not 1 <= int(found[1]) <= MOST_REPEATS or int(found[1]) in YEARS:
        return None
    part = list_one_folder(folder)
    words = found[2].strip()
    has_letter = any(character.isalpha() for character in words)
    return (
        replace(part, repeats=int(found[1]), words=words if has_letter else "")
        if part.images or part.table
        else None
    )


def _no_images(own: FolderContents) -> str:
    """The sentence for a folder without images: what it has instead."""
    formats = ", ".join(IMAGE_SUFFIXES)
    folders = [path for path in own.others if path.is_dir() and count_images(path)]
    if folders:
        where = _folder_of_images(folders[0])
        more = (
            f" (and {len(folders) - 1} more such folder{'s' * (len(folders) > 2)})"
            if len(folders) > 1
            else ""
        )
        return (
            f"no images in {own.folder} itself, but {count_images(folders[0])} below "
            f"{folders[0]}{more}; give the folder {where} itself"
        )
    if own.unclaimed:
        masks = (
            f"{len(own.unclaimed)} mask{'s' * (len(own.unclaimed) > 1)}, first "
            f"{own.unclaimed[0].name}"
        )
        return (
            f"no images in {own.folder}, but {masks}; put the images that they belong to there, or "
            "rename them"
        )
    unread = [path for path in own.others if why_unreadable(path)]
    if unread:
        files = f"{len(unread)} file{'s' * (len(unread) > 1)} left out, first {unread[0].name}"
        return f"no images in {own.folder} that can be read; {files}: {why_unreadable(unread[0])}"
    return f"no images in {own.folder}; put {formats} files there"


def _folder_of_images(folder: Path) -> Path:
    """The first folder, this one or one below it, that would be read: it has images, or N_name
    folders with images.
    """
    for place in sorted([folder, *(path for path in folder.rglob("*") if path.is_dir())]):
        if list_one_folder(place).images or any(
            map(_numbered_part, filter(Path.is_dir, place.iterdir()))
        ):
            return place
    return folder


def _table(folder: Path) -> Path | None:
    """The folder's metadata.jsonl or metadata.csv; UserError when there are both."""
    found = [folder / name for name in METADATA_TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has both {' and '.join(METADATA_TABLES)}; keep one of them")
    return found[0] if found else None


def _stem(path: Path) -> str:
    return normalize_unicode(path.stem)


def _names(image: Path) -> tuple[str, ...]:
    """What the mask of an image may be called after, nearest first: 0.src, 0.src.jpg and 0 for
    0.src.jpg.
    """
    return _stem(image), normalize_unicode(image.name), _stem(image).removesuffix(SOURCE_END)


def _masked_name(path: Path, names: set[str]) -> str | None:
    """The name of the image that this file is the mask of, None for an image."""
    stem = _stem(path)
    for end in MASK_ENDS:
        if stem.lower().endswith(end):
            return stem[: -len(end)]
    for end in MASK_ENDS_BESIDE:
        base = stem[: -len(end)]
        if stem.lower().endswith(end) and base in names:
            return base
    for start in MASK_STARTS_BESIDE:
        if stem.lower().startswith(start) and stem[len(start) :] in names:
            return stem[len(start) :]
    return None


def _pair_masks(
    images: Iterable[Path], bases: dict[Path, str], entries: Iterable[Path]
) -> tuple[dict[Path, Path], list[Path], list[Path]]:
    """(image -> mask, masks of no image, further masks of an image). A mask beside the image comes
    before one in a folder of masks.
    """
    named: dict[str, list[Path]] = {}
    for path in sorted(bases, key=lambda path: (not path.name.endswith(".mask.png"), path)):
        named.setdefault(bases[path], []).append(path)
    names = {name for image in images for name in _names(image)}
    for path in _index_masks(entries, names):
        named.setdefault(_masked_name(path, names) or _stem(path), []).append(path)
    masks: dict[Path, Path] = {}
    for image in images:
        choice = [path for name in _names(image) for path in named.get(name, ())]
        if choice:
            masks[image] = min(
                choice, key=lambda path: path.parent != image.parent
            )  # the first of those that are nearest
    unclaimed = [path for name, paths in named.items() for path in paths if name not in names]
    spare = [
        path
        for name, paths in named.items()
        for path in paths
        if name in names and path not in masks.values()
    ]
    return masks, unclaimed, spare


def _index_masks(entries: Iterable[Path], names: set[str]) -> list[Path]:
    """The masks in sub-folders called mask or masks, if one there is called as an image is."""
    found: list[Path] = []
    for folder in entries:
        if folder.is_dir() and folder.name.lower() in MASK_FOLDERS:
            own = [
                path
                for path in sorted(folder.iterdir())
                if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
            ]
            if any((_masked_name(path, names) or _stem(path)) in names for path in own):
                found += own
    return found


def _pair_texts(
    images: Iterable[Path], texts: Iterable[Path]
) -> tuple[dict[Path, tuple[Path, ...]], list[Path]]:
    """(image -> its caption files, those of no image). NAME.txt and NAME.png.txt both belong to
    NAME.png.
    """
    named: dict[str, list[Path]] = {}
    for path in sorted(texts, key=lambda path: (CAPTION_SUFFIXES.index(path.suffix.lower()), path)):
        named.setdefault(_stem(path), []).append(path)
    found = {
        image: (*named.get(_stem(image), ()), *named.get(normalize_unicode(image.name), ()))
        for image in images
    }
    claimed = {path for own in found.values() for path in own}
    return {image: own for image, own in found.items() if own}, [
        path for own in named.values() for path in own if path not in claimed
    ]


def _reasons(files: Iterable[Path], known: set[Path]) -> dict[Path, str]:
    """Why the files that are not known have no part."""
    found = {}
    for path in files:
        if path not in known:
            hidden = path.name.startswith(".")
            found[path] = "hidden files" if hidden else why_unreadable(path) or "other files"
    return found


def _images_below(folder: Path, taken: set[Path]) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(place, name)
            is_image = path.suffix.lower() in IMAGE_SUFFIXES and not path.stem.lower().endswith(
                MASK_ENDS
            )
            if is_image and not name.startswith(".") and path not in taken:
                yield path
