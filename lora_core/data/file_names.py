"""File names as captions: those that somebody wrote, not those of cameras and programs."""

import re
import unicodedata

from lora_core.text import normalize_unicode

# Prefixes of cameras and phones, before a number.
CAMERAS = (
    "img", "img_e", "imag", "mvimg", "fb_img", "dsc", "dscn", "dscf", "sdc", "pxl", "pict", "cimg",
    "kimg", "hpim", "sam", "sany", "gopr", "dji", "vid", "mov", "pano", "wp", "wa", "signal",
    "telegram", "snapchat", "received", "mmexport",
)  # fmt: skip
# Prefixes of programs, before a date with words of theirs between.
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
# From here on scripts of China, Japan and Korea, where one letter can be a word.
EAST_ASIAN = 0x2E80


def looks_like_caption(name: str) -> bool:
    """Whether a file's name, without its suffix, can be a caption that somebody wrote.

    It cannot if it begins like file names of a camera or a program (IMG_4711, P1010023, Screenshot
    2024-05-01). Without numbers, dates, hashes, strings that mix letters and digits, and words such
    as "photo" or "copy", a word of at least two letters must be left, or a letter that can be a
    word.
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
