"""List the contents of a folder: images, masks, captions, tables, and files that nothing reads.

A folder has images itself, or kohya's N_name folders, or ImageFolder's folder train.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from lora_core.data.images import IMAGE_SUFFIXES, MASK_SUFFIX, RAW_SUFFIXES, format_problem
from lora_core.errors import UserError
from lora_core.shared_paths import lies_within
from lora_core.text import normalize_unicode

METADATA_TABLES = ("metadata.jsonl", "metadata.csv")  # the datasets library's names for ImageFolder
# Suffixes of a caption file next to an image; the first one with a text is used.
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
MASK_ENDS = (".mask", "-masklabel")  # always a mask: our own end, OneTrainer's
PAIRED_MASK_ENDS = (  # a mask if the image without this end exists
    "_masklabel", "_mask", "-mask", " mask", " (mask)", "(mask)", "_matte", "-matte", "_seg",
    "-seg", "_segmentation", "-segmentation",
)  # fmt: skip
PAIRED_MASK_STARTS = ("mask_", "mask-")
CONDITION_END = "-condlabel"  # OneTrainer's conditioning images
MASK_FOLDERS = ("mask", "masks")  # a mask in them has its image's name
NO_IMAGE = "texts of no image"  # why a caption file is left out
SOURCE_END = ".src"  # cloneofsimo's 0.src.jpg has the mask 0.mask.png
INDEXED_CAPTIONS = "caption.txt"  # of lora_ppim: its line N is the caption of N.src.jpg
OTHER_IMAGES = (".jxl", ".ico", ".svg", ".exr", ".hdr", ".xcf", ".ai", ".eps", ".pdf")
# Files of the system, and the source of an exported dataset.
JUNK = ("thumbs.db", "desktop.ini", "dataset.json")
HIDDEN_JUNK = (".ds_store", ".directory", ".gitignore", ".gitattributes", ".gitkeep")
JUNK_FOLDERS = ("__macosx", "@eadir")
# kohya's folders: repeats, and the caption of images that have none.
NUMBERED = re.compile(r"(\d+)_(.*)", re.DOTALL)
YEARS = range(1900, 2100)  # 2024_summer is no folder of 2,024 repeats
MOST_REPEATS = 9_999  # nor are 240501_summer and 20240501_summer
MOST_COUNTED = 10_000  # images in sub-folders


@dataclass(frozen=True)
class FolderContents:
    """One folder of images."""

    folder: Path
    images: tuple[Path, ...]
    masks: dict[Path, Path]  # image -> its mask
    # image -> the caption files next to it, in the order of CAPTION_SUFFIXES
    texts: dict[Path, tuple[Path, ...]]
    table: Path | None
    unclaimed: tuple[Path, ...]  # masks that belong to no image
    others: dict[Path, str]  # file or sub-folder -> why nothing reads it
    repeats: int = 1
    words: str = ""  # caption from the folder's name for images without one
    # image -> captions in the table, where that was read
    rows: Mapping[Path, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Listing:
    """The folders that images are read from."""

    root: Path
    parts: tuple[FolderContents, ...]
    # of the root, where that is not one of the parts
    others: dict[Path, str] = field(default_factory=dict)


def list_folder(
    root: Path, own: FolderContents | None = None, *, tabled: bool = True, extension: str = ""
) -> Listing:
    """The contents of a folder of images.

    `own`: what `list_one_folder` gave. `tabled`: a metadata table may name images below it.
    `extension`: see `list_one_folder`. In a folder without images of its own, the N_name folders
    are read (kohya: N repeats; the name is the caption of images that have none), or the folder
    `train` (ImageFolder of the datasets library). Raises UserError, with the folder's contents,
    when there are no images.
    """
    own = own or list_one_folder(root, extension)
    if own.images or (tabled and own.table):
        return Listing(root, (own,))
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    numbered = (_numbered_part(path, extension) for path in folders)
    parts = [part for part in numbered if part is not None]
    if not parts:
        trains = [path for path in folders if path.name.lower() == "train"]
        trained = [list_one_folder(path, extension) for path in trains]
        parts = [part for part in trained if part.images or (tabled and part.table)]
    if not parts:
        raise UserError(_no_images(own))
    used = {part.folder for part in parts}
    others = {path: why for path, why in own.others.items() if path not in used}
    return Listing(root, tuple(parts), others)


def list_one_folder(folder: Path, extension: str = "") -> FolderContents:
    """The contents of one folder, without those of the folders below it.

    `extension`: a further ending of caption files, such as .tags.
    """
    entries = [path for path in sorted(folder.iterdir()) if not is_junk(path)]
    files = [path for path in entries if path.is_file()]
    visible = [path for path in files if not path.name.startswith(".")]
    readable = [path for path in visible if _is_readable_image(path)]
    names = _all_names(readable)
    bases = {path: _masked_name(path, names) for path in readable}
    mask_bases = {path: base for path, base in bases.items() if base is not None}
    conditions = [path for path in readable if path.stem.lower().endswith(CONDITION_END)]
    images = [path for path in readable if path not in mask_bases and path not in conditions]
    masks, unclaimed, spare = _pair_masks(images, mask_bases, entries)
    if not masks and (indexed := _masks_by_index(images, unclaimed)):
        masks, unclaimed = indexed, []
    table = _find_table(folder) or _find_indexed_captions(folder, images)
    suffixes = dict.fromkeys((*CAPTION_SUFFIXES, *filter(None, [extension.lower()])))
    text_files = [path for path in visible if path.suffix.lower() in suffixes]
    texts, strays = pair_texts(images, [path for path in text_files if path != table])
    others = {path: "links to nothing" for path in entries if not path.exists()}
    others |= dict.fromkeys(spare, "second masks of an image")
    others |= dict.fromkeys(conditions, "conditioning images")
    others |= dict.fromkeys(strays, NO_IMAGE)
    known = {*readable, *strays, *itertools.chain.from_iterable(texts.values()), table}
    others |= _unread_reasons(path for path in files if path not in known)
    mask_folders = {mask.parent for mask in (*masks.values(), *unclaimed, *spare)}
    for path in entries:
        if path.is_dir() and path not in mask_folders:
            others[path] = "sub-folders"
    return FolderContents(folder, tuple(images), masks, texts, table, tuple(unclaimed), others)


def why_unreadable(path: Path) -> str | None:
    """Why an image file cannot be read, by its name and first bytes.

    None for one that can be read, "" for files that are no images.
    """
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in RAW_SUFFIXES:
        return format_problem(path)
    if suffix in OTHER_IMAGES:
        return "images in formats that are not read (save them as JPEG or PNG)"
    return ""


def files_left_out(listing: Listing, used: Iterable[Path]) -> dict[str, list[Path]]:
    """Reason -> the files, and sub-folders with images, that nothing reads.

    `used` are the images, masks, caption files and tables that are read.
    """
    taken = set(used)
    found: dict[str, list[Path]] = {}

    def add(path: Path, why: str) -> None:
        is_empty = path.is_dir() and not any(_images_below(path, taken))
        if path not in taken and not is_empty:
            found.setdefault(why, []).append(path)

    for path, why in listing.others.items():
        add(path, why)
    for part in listing.parts:
        for path, why in part.others.items():
            add(path, why)
        for path in (*part.masks.values(), *part.unclaimed):
            add(path, "masks that are not asked for (--data.masks file)")
        for path in itertools.chain.from_iterable(part.texts.values()):
            if path in taken:  # nearly all of them, which need not be read again
                continue
            blank = not path.read_bytes().strip()
            add(path, "empty texts" if blank else "texts of images that have another caption")
        if part.table is not None:
            add(part.table, "tables that the chosen captions do not read")
        for path in part.images:
            add(path, "images")
    return {why: list(dict.fromkeys(paths)) for why, paths in found.items()}


def count_images(folder: Path, taken: Iterable[Path] = ()) -> int:
    """The number of images in a folder and below it, at most MOST_COUNTED, without `taken`."""
    return sum(1 for _ in itertools.islice(_images_below(folder, set(taken)), MOST_COUNTED))


def folder_for_new_images(root: Path) -> tuple[Path, int]:
    """(folder for new images, number of existing images).

    The folder is the first of N_name folders, else the folder itself. Raises UserError for a folder
    without images of its own that has sub-folders of images which are not read.
    """
    if not count_images(root):
        return root, 0
    parts = list_folder(root, tabled=False).parts
    return parts[0].folder, sum(len(part.images) for part in parts)


def is_junk(path: Path) -> bool:
    """Whether a path is a file of the operating system (.DS_Store) or a hidden folder."""
    name = path.name.lower()
    if path.is_dir():
        return name in JUNK_FOLDERS or name.startswith(".")
    return name in JUNK or name in HIDDEN_JUNK or name.startswith("._")


def find_file(folder: Path, name: str) -> Path | None:
    """The file in the folder that a table calls `name`, in any normal form of Unicode.

    None without one, and for a name that leads out of the folder, by .., an absolute path or a
    linked folder: a table that somebody else made would train on private images.
    """
    path = _find_any_form(folder, name) if name else None
    return path if path is not None and lies_within(path, folder) else None


def _find_any_form(folder: Path, name: str) -> Path | None:
    """The file that a table calls `name`, wherever it lies."""
    path = _path_below(folder, name)
    if os.path.isfile(path):
        return path
    for part in Path(os.path.relpath(path, folder)).parts:
        if not os.path.isdir(folder):
            return None
        exact = folder / part
        if not os.path.exists(exact):
            entries = _entries_by_name(folder, folder.stat().st_mtime_ns)
            if normalize_unicode(part) not in entries:
                return None
            exact = folder / entries[normalize_unicode(part)]
        folder = exact
    return folder if folder.is_file() else None


@lru_cache(maxsize=8)
def _entries_by_name(folder: Path, stamp: int) -> dict[str, str]:
    """Name in normal form C -> the first entry of that name, of a folder last changed at `stamp`.

    Kept, because a table of 100,000 rows may differ from the disk in all of them.
    """
    found: dict[str, str] = {}
    for entry in os.listdir(folder):
        found.setdefault(normalize_unicode(entry), entry)
    return found


def _path_below(folder: Path, name: str) -> Path:
    """folder / name without `..`, written as a listing of the folder writes it."""
    root, path = os.path.abspath(folder), os.path.abspath(folder / name)
    if Path(path).is_relative_to(root):
        return folder / os.path.relpath(path, root)
    return folder / name


def _is_readable_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and format_problem(path) is None


def _numbered_part(folder: Path, extension: str = "") -> FolderContents | None:
    """One of kohya's folders, 20_name with images in it; None for another."""
    found = NUMBERED.fullmatch(folder.name)
    if found is None or not 1 <= int(found[1]) <= MOST_REPEATS or int(found[1]) in YEARS:
        return None
    part = list_one_folder(folder, extension)
    if not part.images and not part.table:
        return None
    words = found[2].strip()
    has_letter = any(character.isalpha() for character in words)
    return replace(part, repeats=int(found[1]), words=words if has_letter else "")


def _no_images(own: FolderContents) -> str:
    """The error for a folder without images, with the files that it has."""
    formats = ", ".join(IMAGE_SUFFIXES)
    folders = [path for path in own.others if path.is_dir() and count_images(path)]
    if folders:
        where = _folder_of_images(folders[0])
        further = len(folders) - 1
        more = f" (and {further} more such folder{'s' * (further > 1)})" if further else ""
        below = f"{count_images(folders[0])} below {folders[0]}{more}"
        return f"no images in {own.folder} itself, but {below}; give the folder {where} itself"
    if own.unclaimed:
        count = len(own.unclaimed)
        first = own.unclaimed[0].name
        return (
            f"no images in {own.folder}, but {count} mask{'s' * (count > 1)}, first {first}; "
            "put the images that they belong to there, or rename them"
        )
    unread = [path for path in own.others if why_unreadable(path)]
    if unread:
        files = f"{len(unread)} file{'s' * (len(unread) > 1)} left out, first {unread[0].name}"
        return f"no images in {own.folder} that can be read; {files}: {why_unreadable(unread[0])}"
    return f"no images in {own.folder}; put {formats} files there"


def _folder_of_images(folder: Path) -> Path:
    """The first folder, this one or one below it, with images or N_name folders of images."""
    below = [path for path in folder.rglob("*") if path.is_dir()]
    for candidate in sorted([folder, *below]):
        folders = filter(Path.is_dir, candidate.iterdir())
        if list_one_folder(candidate).images or any(map(_numbered_part, folders)):
            return candidate
    return folder


def _find_table(folder: Path) -> Path | None:
    """The folder's metadata.jsonl or metadata.csv; raises UserError when there are both."""
    found = [folder / name for name in METADATA_TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has both {' and '.join(METADATA_TABLES)}; keep one of them")
    return found[0] if found else None


def _find_indexed_captions(folder: Path, images: Iterable[Path]) -> Path | None:
    """The caption.txt of a folder whose images are all called N.src.jpg."""
    path, indices = folder / INDEXED_CAPTIONS, [image_index(image) for image in images]
    return path if indices and None not in indices and path.is_file() else None


def image_index(image: Path) -> int | None:
    """N of N.src.jpg; None for another name."""
    stem = file_stem(image)
    number = stem.removesuffix(SOURCE_END)
    return int(number) if number != stem and number.isdecimal() and len(number) < 10 else None


def file_stem(path: Path) -> str:
    """A file's name without its ending, in Unicode's normal form C."""
    return normalize_unicode(path.stem)


def _mask_names(image: Path) -> tuple[str, ...]:
    """Names of an image that its mask's name may contain, nearest first.

    0.src, 0.src.jpg and 0 for 0.src.jpg.
    """
    return (
        file_stem(image),
        normalize_unicode(image.name),
        file_stem(image).removesuffix(SOURCE_END),
    )


def _all_names(images: Iterable[Path]) -> set[str]:
    return set(itertools.chain.from_iterable(map(_mask_names, images)))


def _masked_name(path: Path, names: set[str]) -> str | None:
    """The name of the image that this file is a mask of; None for a file that is no mask."""
    stem = file_stem(path)
    for end in MASK_ENDS:
        if stem.lower().endswith(end):
            return stem[: -len(end)]
    for end in PAIRED_MASK_ENDS:
        base = stem[: -len(end)]
        if stem.lower().endswith(end) and base in names:
            return base
    for start in PAIRED_MASK_STARTS:
        if stem.lower().startswith(start) and stem[len(start) :] in names:
            return stem[len(start) :]
    return None


def _pair_masks(
    images: Iterable[Path], bases: dict[Path, str], entries: Iterable[Path]
) -> tuple[dict[Path, Path], list[Path], list[Path]]:
    """(image -> mask, masks of no image, further masks of an image).

    A mask next to the image comes before one in a folder of masks.
    """
    named: dict[str, list[Path]] = {}
    for path in sorted(bases, key=lambda path: (not path.name.endswith(".mask.png"), path)):
        named.setdefault(bases[path], []).append(path)
    names = _all_names(images)
    for path in _masks_in_folders(entries, names):
        named.setdefault(_masked_name(path, names) or file_stem(path), []).append(path)
    masks: dict[Path, Path] = {}
    for image in images:
        choice: list[Path] = []
        for name in _mask_names(image):
            choice += named.get(name, [])
        # the first of those next to the image, else the first
        own = [path for path in choice if path.parent == image.parent]
        if choice:
            masks[image] = (own or choice)[0]
    used = set(masks.values())
    unclaimed, spare = [], []
    for name, paths in named.items():
        if name not in names:
            unclaimed += paths
        else:
            spare += [path for path in paths if path not in used]
    return masks, unclaimed, spare


def _masks_by_index(images: list[Path], masks: list[Path]) -> dict[Path, Path]:
    """Image -> mask where the masks are 0.mask.png, 1.mask.png ..., one for each image in the order
    of their names (lora_pti --use_face_segmentation_condition); {} for other masks.
    """
    numbered = {path.name: path for path in masks}
    wanted = [f"{number}{MASK_SUFFIX}" for number in range(len(images))]
    if not images or set(numbered) != set(wanted) or len(masks) != len(images):
        return {}
    return {image: numbered[name] for image, name in zip(images, wanted)}


def _masks_in_folders(entries: Iterable[Path], names: set[str]) -> list[Path]:
    """The masks in sub-folders called mask or masks, if one of them has an image's name."""
    found: list[Path] = []
    for folder in entries:
        if folder.is_dir() and folder.name.lower() in MASK_FOLDERS:
            files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
            own = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
            if any((_masked_name(path, names) or file_stem(path)) in names for path in own):
                found += own
    return found


def pair_texts(
    images: Iterable[Path], texts: Iterable[Path]
) -> tuple[dict[Path, tuple[Path, ...]], list[Path]]:
    """(image -> its caption files, those of no image).

    NAME.txt and NAME.png.txt both belong to NAME.png.
    """
    named: dict[str, list[Path]] = {}
    order = {suffix: place for place, suffix in enumerate(CAPTION_SUFFIXES)}
    for path in sorted(texts, key=lambda path: (order.get(path.suffix.lower(), len(order)), path)):
        named.setdefault(file_stem(path), []).append(path)
    found: dict[Path, tuple[Path, ...]] = {}
    claimed: set[Path] = set()
    for image in images:
        own = (*named.get(file_stem(image), ()), *named.get(normalize_unicode(image.name), ()))
        if own:
            found[image] = own
            claimed.update(own)
    every = itertools.chain.from_iterable(named.values())
    return found, [path for path in every if path not in claimed]


def _unread_reasons(files: Iterable[Path]) -> dict[Path, str]:
    """File -> why nothing reads it."""
    found = {}
    for path in files:
        is_hidden = path.name.startswith(".")
        found[path] = "hidden files" if is_hidden else why_unreadable(path) or "other files"
    return found


def _images_below(folder: Path, taken: set[Path]) -> Iterator[Path]:
    """Images, no masks, in the folder and below it that are not taken."""
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(parent, name)
            is_mask = path.stem.lower().endswith(MASK_ENDS)
            is_image = path.suffix.lower() in IMAGE_SUFFIXES and not is_mask
            if is_image and not name.startswith(".") and path not in taken:
                yield path
