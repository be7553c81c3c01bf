"""Captions of a folder of images.

They come from text files, a metadata table, file names, one caption for all, or templates.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lora_core.data.listing import CAPTION_SUFFIXES, METADATA_TABLES, NO_IMAGE, FolderContents
from lora_core.data.metadata_tables import CAPTION_COLUMNS, read_metadata
from lora_core.data.shards.stored_files import StoredFile
from lora_core.errors import UserError, printable
from lora_core.text import check_prompt_length, normalize_unicode, parse_json, read_lines, read_text

CaptionMode = Literal["auto", "txt", "metadata", "filename", "one", "object", "style"]
CAPTION_MODES = ("auto", "txt", "metadata", "filename", "one", "object", "style")
OTHER_TABLES = (".jsonl", ".csv", ".tsv", ".parquet")  # may hold captions, but are not read
ONE_FOR_ALL = ("one", "object", "style")  # modes that need --data.caption
# Sources of captions, as messages name them.
ONE = "the one caption of --data.caption"
FALLBACK = "--data.caption, where an image has no text of its own"
TEMPLATE = "sentence templates with --data.caption"
FILE_NAME = "file names"
FOLDER_NAME = "the folder's name"
TYPED = (ONE, FALLBACK, TEMPLATE)  # sources that are options, and not files of training images

# The prompt templates of textual inversion (arXiv 2208.01618), 27 and 19 as in lora_pti. Two of the
# 19 stand twice, and so are drawn twice as often.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": (
        "a photo of a {}",
        "a photo of one {}",
        "a photo of my {}",
        "a photo of the {}",
        "a photo of a clean {}",
        "a photo of the clean {}",
        "a photo of a dirty {}",
        "a photo of a cool {}",
        "a photo of the cool {}",
        "a photo of a nice {}",
        "a photo of the nice {}",
        "a photo of a small {}",
        "a photo of the small {}",
        "a photo of the large {}",
        "a photo of the weird {}",
        "the photo of a {}",
        "a bright photo of the {}",
        "a dark photo of the {}",
        "a good photo of a {}",
        "a good photo of the {}",
        "a close-up photo of a {}",
        "a close-up photo of the {}",
        "a cropped photo of a {}",
        "a cropped photo of the {}",
        "a rendering of a {}",
        "a rendition of a {}",
        "a rendition of the {}",
    ),
    "style": (
        "a painting in the style of {}",
        "the painting in the style of {}",
        "a bright painting in the style of {}",
        "a clean painting in the style of {}",
        "a close-up painting in the style of {}",
        "a close-up painting in the style of {}",
        "a cool painting in the style of {}",
        "a cropped painting in the style of {}",
        "a cropped painting in the style of {}",
        "a dark painting in the style of {}",
        "a dirty painting in the style of {}",
        "a good painting in the style of {}",
        "a large painting in the style of {}",
        "a nice painting in the style of {}",
        "a small painting in the style of {}",
        "a weird painting in the style of {}",
        "a picture in the style of {}",
        "a rendering in the style of {}",
        "a rendition in the style of {}",
    ),
}


class Captions(NamedTuple):
    """The captions of one image."""

    texts: tuple[str, ...]
    source: Path | str  # the file that they are from, or one of the sources above


def read_captions(
    parts: Sequence[FolderContents],
    mode: str,
    caption: str | None,
    column: str | None = None,
    *,
    must_use: bool = True,
    missing: dict[Path, str] | None = None,
    extension: str = "",
) -> dict[Path, Captions]:
    """The captions of each image, one or more, in the images' order.

    `mode` is one of CAPTION_MODES:

    txt        every line of 001.txt, next to 001.png, that is not empty
    metadata   rows {"file_name": ..., "text": ...} of metadata.jsonl, or metadata.csv with such a
               head; `column` names another column than text, caption or prompt; in JSON a text may
               be a list; a file may have several rows
    filename   the file's name up to its first dot (cloneofsimo)
    one        `caption`
    object, style    TEMPLATES with `caption` in place of {}
    auto       the metadata table if there is one, else files next to the images if one of them has
               a text (.txt, else .caption, else a .json with text, caption or prompt), else
               `caption`, else the words of a folder called N_words (kohya), else file names that
               somebody wrote (`looks_like_caption`)

    An image without a text in its file or table takes `caption` where that is given, else the words
    of such a folder. All texts are in Unicode's normal form C. Raises UserError for an image
    without a caption, an unknown mode, a `caption` or `column` that is missing, and, with
    `must_use`, for one that no image takes. `missing`: see `read_image_table`. `extension` is the
    ending of caption files, in place of .txt (`caption_suffixes`).
    """
    if mode not in CAPTION_MODES:
        raise UserError(
            f"unknown caption mode {mode!r}, expected one of {', '.join(CAPTION_MODES)}"
        )
    modes = [_detect_mode(part, caption) if mode == "auto" else mode for part in parts]
    if modes[0] in ONE_FOR_ALL and not (caption and caption.strip()):
        raise UserError(
            f"captions {modes[0]!r} need the caption (for templates, the word to put in them), "
            f"got {caption!r}; add --data.caption"
        )
    suffixes = caption_suffixes(mode, extension)
    found: dict[Path, Captions] = {}
    for part, own_mode in zip(parts, modes, strict=True):
        if own_mode == "metadata":
            own = _read_table(part, caption, column, missing)
        else:
            own = _read_one_folder(part, own_mode, caption, suffixes=suffixes)
        needed = {
            "txt": f"a {suffixes[0]} file with a caption",
            "metadata": f"a row in {_table(part).name}",
        }
        found |= _complete(own, part, needed.get(own_mode, "a caption in its name"), caption)
    if must_use:
        sources = {captions.source for captions in found.values()}
        _check_use(sources, _describe_sources(parts[0].folder, sources), caption, column)
    return {image: normalize_captions(image, own) for image, own in found.items()}


def caption_suffixes(mode: str, extension: str = "") -> tuple[str, ...]:
    """Endings of the caption files that a mode reads, the first one with a text before others."""
    if extension:
        return (extension.lower(),)
    return CAPTION_SUFFIXES if mode == "auto" else (".txt",)


def normalize_captions(image: Path, captions: Captions) -> Captions:
    """An image's captions in Unicode's normal form C. Raises UserError as `check_texts`."""
    check_texts(captions.texts, f"the caption of {image.name} from {captions.source}")
    return captions._replace(texts=tuple(map(normalize_unicode, captions.texts)))


def check_texts(texts: Sequence[str], name: str) -> None:
    """Raises UserError for a zero byte or half a character (\\ud83d) or megabytes.

    JSON can write both, and no tokenizer reads them.
    """
    for text in texts:
        check_prompt_length(text, name)
        if "\0" in text or printable(text) != text:
            raise UserError(f"{name} has a zero byte or half a character: {text!a}; correct it")


def _check_use(sources: set[Path | str], how: str, caption: str | None, column: str | None) -> None:
    """Raises UserError for a `caption` or a `column` of tables that no image takes."""
    if caption is not None and not sources & {ONE, FALLBACK, TEMPLATE}:
        raise UserError(
            f"{how}, so --data.caption is not used; leave it out, or add --data.captions one to "
            "ignore them"
        )
    names = {source.name for source in sources if isinstance(source, Path)}
    if column and not names & set(METADATA_TABLES):
        raise UserError(
            f"{how}, so --data.caption-column is not used; leave it out, or add metadata.jsonl"
        )


def _describe_sources(folder: Path, sources: set[Path | str]) -> str:
    """The captions that a folder's images have, in words."""
    paths = sorted(source for source in sources if isinstance(source, Path))
    if not paths:
        return f"the captions of {folder} are {min(map(str, sources), default='missing')}"
    path = paths[0]
    is_table = path.name in METADATA_TABLES
    return f"{folder} has {f'captions in {path.name}' if is_table else f'{path.suffix} captions'}"


def _detect_mode(part: FolderContents, caption: str | None) -> str:
    """The mode that auto means for a folder: one of CAPTION_MODES, or "folder"."""
    if part.table is not None:
        return "metadata"
    if any(read_caption_file(path) for path in _text_files(part)):
        return "txt"
    if caption is not None:
        return "one"
    if part.words:
        return "folder"
    unwritten = [image for image in part.images if not looks_like_caption(_name_of(image))]
    if unwritten:
        first = unwritten[0]
        unread = _unread_texts(part)
        count = f"{len(unwritten)} of {len(part.images)} images in {part.folder}"
        raise UserError(
            f"{count} have no caption, first "
            f'{first.name}{unread}; give --data.caption "a photo of TOK", or write {first.stem}.txt'
        )
    return "filename"


def _text_files(part: FolderContents) -> Iterator[Path]:
    """All caption files next to the folder's images."""
    return itertools.chain.from_iterable(part.texts.values())


def _unread_texts(part: FolderContents) -> str:
    """The folder's unread files that look like captions, as text in brackets."""
    found = []
    jsons = [path for path in _text_files(part) if path.suffix.lower() == ".json"]
    without = [path.name for path in jsons if path.read_bytes().strip()]
    if without:
        found.append(f"{', '.join(without[:3])} has no {', '.join(CAPTION_COLUMNS)}")
    strays = []
    for path, why in part.others.items():
        if why == NO_IMAGE or path.suffix.lower() in OTHER_TABLES:
            strays.append(path.name)
    if strays:
        found.append(f"{', '.join(strays[:3])} there belongs to no image")
    return f" ({'; '.join(found)})" if found else ""


def common_captions(mode: str, caption: str) -> Captions:
    """The captions that all images have in common, by a mode of ONE_FOR_ALL."""
    if mode == "one":
        return Captions((caption,), ONE)
    return Captions(tuple(template.format(caption) for template in TEMPLATES[mode]), TEMPLATE)


def _read_table(
    part: FolderContents, caption: str | None, column: str | None, missing: dict[Path, str] | None
) -> dict[Path, Captions]:
    """The captions in the folder's metadata table."""
    table, read = _table(part), part.rows
    if read is None:
        read = read_metadata(table, column, may_be_empty=caption is not None, missing=missing)
    return {image: Captions(texts, table) for image, texts in read.items()}


def _read_one_folder(
    part: FolderContents, mode: str, caption: str | None, *, suffixes: Sequence[str]
) -> dict[Path, Captions]:
    """The captions in one folder, of those images that have one; not those of a table."""
    if mode in ONE_FOR_ALL:
        return dict.fromkeys(part.images, common_captions(mode, str(caption)))
    if mode == "folder":
        words = _check_words(part.words, part.folder)
        return dict.fromkeys(part.images, Captions((words,), FOLDER_NAME))
    found = {}
    if mode == "filename":
        for image in part.images:
            found[image] = Captions((_check_words(_name_of(image), image),), FILE_NAME)
        return found
    for image, own in part.texts.items():
        for path in own:
            texts = read_caption_file(path) if path.suffix.lower() in suffixes else ()
            if texts and image not in found:
                found[image] = Captions(texts, path)
    return found


def _complete(
    own: Mapping[Path, Captions], part: FolderContents, needed: str, caption: str | None
) -> dict[Path, Captions]:
    """The captions of a folder in the images' order; images without one get the common caption.

    Raises UserError with a count and the first name when some image has none at all.
    """
    missing = [image for image in part.images if image not in own or not any(own[image].texts)]
    fallback = Captions((part.words,), FOLDER_NAME)
    if caption and caption.strip():
        fallback = Captions((caption,), FALLBACK)
    if missing and not fallback.texts[0]:
        nearby = ", ".join(path.name for path in part.texts.get(missing[0], ()))
        first = f"{missing[0]}, next to which is {nearby}" if nearby else str(missing[0])
        raise UserError(
            f"{len(missing)} of {len(part.images)} images lack {needed}, first {first}; add it, "
            "give --data.caption for those without, or choose other --data.captions"
        )
    lacking = set(missing)
    return {image: fallback if image in lacking else own[image] for image in part.images}


def _table(part: FolderContents) -> Path:
    return part.table or part.folder / METADATA_TABLES[0]


def _name_of(image: Path) -> str:
    return image.name.split(".")[0].strip()


def _check_words(words: str, path: Path) -> str:
    """The words of a file's or folder's name; raises UserError where they are no Unicode."""
    if printable(words) != words:
        raise UserError(
            f"the name of {path} has bytes that are not UTF-8 and cannot be a caption; "
            "rename it, or choose other --data.captions"
        )
    return words


def read_caption_file(path: Path | StoredFile) -> tuple[str, ...]:
    """The captions in a file next to an image, on the disk or in a tar file.

    There are none in an empty file and in JSON without text, caption or prompt. A .json of one line
    that is no JSON is read as its text.
    """
    lines = read_lines(path)
    if path.suffix.lower() != ".json" or (len(lines) == 1 and lines[0][0] not in '{["'):
        return tuple(lines)
    value = parse_json(read_text(path), str(path), "correct it or remove it") if lines else None
    if isinstance(value, dict):
        value = next((value[name] for name in CAPTION_COLUMNS if value.get(name)), None)
    texts: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        return ()
    return tuple(text.strip() for text in texts if text.strip())


# ------------------------------------------- file names: written by somebody, or by a camera

# Prefixes of cameras and phones, before a number.
CAMERAS = (
    "img", "img_e", "imag", "mvimg", "fb_img", "dsc", "dscn", "dscf", "sdc", "pxl", "pict", "cimg",
    "kimg", "hpim", "sam", "sany", "gopr", "dji", "vid", "mov", "pano", "wp", "wa", "signal",
    "telegram", "snapchat", "received", "mmexport",
)  # fmt: skip
# Prefixes of programs, before a date, with other words of the program between them.
PROGRAMS = (
    "screenshot", "screen shot", "screen_shot", "bildschirmfoto", "capture d", "captura de",
    "schermafbeelding", "schermata", "zrzut ekranu", "skjermbilde", "снимок экрана",
    "スクリーンショット", "截屏", "截图", "屏幕截图", "微信图片", "스크린샷", "whatsapp image",
    "photo on", "telegram-cloud-photo", "line_album", "kakaotalk_photo", "adobestock",
    "istockphoto", "shutterstock", "pexels", "unsplash", "comfyui", "tumblr",
)  # fmt: skip
# Words that describe no image unless other words are next to them.
EMPTY_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        image images img pic pics picture pictures photo photos foto fotos bild bilder imagen imagem
        immagine afbeelding kuva obraz download downloads downloaded untitled unnamed unbenannt copy
        kopie copia copie of the an and at am pm um on in my new neu file output out result results
        sample frame scan scanned page crop cropped edit edited resized upscaled final version index
        train test jpg jpeg png webp bmp grid dsc pxl wa mid src original clipboard default no nr
        hdr burst cover january february march april may june july august september october
        november december jan feb mar apr jun jul aug sep oct nov dec
        写真 画像 图片 圖片 照片 사진 фото изображение
        """,
    )
)
CAMERA = re.compile(rf"_*(?:{'|'.join(map(re.escape, CAMERAS))})[\W_]*(?:\d|$)", re.IGNORECASE)
PROGRAM = re.compile(
    rf"(?:{'|'.join(map(re.escape, PROGRAMS))})(?:$|.*\d)", re.IGNORECASE | re.DOTALL
)
# The Design rule for Camera File system: four free characters and a number.
CAMERA_FILE = re.compile(r"[A-Z0-9_]{4}[0-9]{4}")
# UUID, hash
CODE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{16,}", re.IGNORECASE)
WORD = re.compile(r"([^\W\d_]+)\d{0,3}")
# First code point of the scripts of China, Japan and Korea, where one letter can be a word.
EAST_ASIAN = 0x2E80


def looks_like_caption(name: str) -> bool:
    """Whether a file's name, without its suffix, can be a caption that somebody wrote.

    False for names that begin like those of a camera or a program (IMG_4711, P1010023, Screenshot
    2024-05-01). After numbers, dates, hashes, strings that mix letters and digits, and words such
    as "photo" or "copy" are left out, there must be a word of at least two letters, or a letter
    that can be a word.
    """
    name = normalize_unicode(name).strip()
    if CAMERA.match(name) or PROGRAM.match(name) or CAMERA_FILE.fullmatch(name):
        return False
    uncoded = CODE.sub(" ", name)
    letters = "".join(c for c in uncoded if not unicodedata.category(c).startswith("M"))
    return any(_is_word(part) for part in re.split(r"[\W_]+", letters))


def _is_word(part: str) -> bool:
    found = WORD.fullmatch(part)
    if found is None or found[1].lower() in EMPTY_WORDS:
        return False
    return len(found[1]) > 1 or ord(found[1]) >= EAST_ASIAN
