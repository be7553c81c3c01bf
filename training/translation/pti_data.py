"""The images, captions, tokens and masks of a command line of lora_pti."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_core.data.concept_folders import list_images
from lora_core.data.listing import INDEXED_CAPTIONS
from lora_core.errors import UserError
from training.translation.translated_options import TranslatedOptions

TEMPLATES = ("object", "style", "null")
DUMMY = "DUMMY"  # the word that lora_pti replaces where --placeholder_token_at_data is not given
ENCODER = "clip_l"


def translate_pti_data(record: TranslatedOptions) -> bool:
    """Record the options of images, captions, tokens and masks.

    Returns whether masks of faces are to be painted first. Raises UserError for a folder or a
    combination that cannot be carried out.
    """
    folder = Path(str(record["instance_data_dir"]))
    if not folder.is_dir():
        raise record.refuse("instance_data_dir", "there is no such folder")
    record.take("instance_data_dir", {"data.images": str(folder), "data.flip": True})
    record.take("resolution", {"data.resolution": record["resolution"]})
    record.take("color_jitter", {"data.jitter": record["color_jitter"]})
    word = _translate_tokens(record, folder)
    _translate_captions(record, folder, word)
    needs_faces = _translate_masks(record, folder)
    _translate_variants(record)
    return needs_faces


def _translate_variants(record: TranslatedOptions) -> None:
    """--cached_latents and --train_inpainting."""
    is_inpainting, is_cached = record["train_inpainting"], record["cached_latents"]
    if is_inpainting and is_cached:
        why = "jitter and mirroring are new at every visit: latents with holes are not cached"
        record.change("cached_latents", {"data.variants": 0}, why)
    elif is_cached:
        why = "jitter and mirroring are chosen once; a template is drawn at every visit"
        record.take("cached_latents", {"data.variants": 1}, why)
    else:
        record.take("cached_latents", {"data.variants": 0})
    if is_inpainting:
        record.take("train_inpainting", {}, "the model is one for inpainting by its 9 channels")


def _translate_tokens(record: TranslatedOptions, folder: Path) -> str:
    """Record the learned tokens; returns the word of the captions, "" where there are none."""
    tokens = [name for name in str(record["placeholder_tokens"]).split("|") if name]
    if tokens != sorted(set(tokens)):
        wanted = "|".join(sorted(set(tokens)))
        raise record.refuse("placeholder_tokens", f'they should be sorted, as there: "{wanted}"')
    joined = "".join(tokens)
    word = _placeholder_word(record, folder, joined)
    starts = record["initializer_tokens"]
    initial = str(starts).split("|") if starts is not None else ["<rand-0.017>"] * len(tokens)
    if len(initial) != len(tokens):
        raise record.refuse(
            "initializer_tokens", f"it has {len(initial)} entries for {len(tokens)} tokens"
        )
    if not tokens:
        record.take("placeholder_tokens", {}, "no token is learned")
        return ""
    if not (record["perform_inversion"] or record["continue_inversion"]):
        raise record.refuse(
            "perform_inversion",
            "without it and without --continue_inversion they would stay random; add one of the "
            "two or leave out --placeholder_tokens",
        )
    ours = {
        "tokens.words": [word],
        "tokens.names": tokens,
        "tokens.vectors": len(tokens),
        "tokens.encoders": [ENCODER],
    }
    record.take("placeholder_tokens", ours, f"prompts and captions say {word}")
    record.take("initializer_tokens", {"tokens.init": ["+".join(initial)]})
    if record["clip_ti_decay"]:
        pull = {"tokens.norm": "pull", "tokens.norm_target": 0.4}
        record.take("clip_ti_decay", pull, "in the inversion only, as there")
    else:
        record.take("clip_ti_decay", {"tokens.norm": "none"})
    return word


def _placeholder_word(record: TranslatedOptions, folder: Path, joined: str) -> str:
    """The word of the captions that stands for all tokens together."""
    given = record["placeholder_token_at_data"]
    if given is None:
        is_dummy = record["use_template"] is None and _captions_have(folder, DUMMY)
        return DUMMY if is_dummy else joined
    word, bar, pattern = str(given).partition("|")
    if not (word and bar) or "|" in pattern:
        raise record.refuse("placeholder_token_at_data", 'expected "word|tokens"')
    if pattern != joined:
        raise record.refuse(
            "placeholder_token_at_data",
            f"here a word stands for all placeholder tokens without spaces: {word}|{joined}",
        )
    if record["use_template"] is not None:
        record.take("placeholder_token_at_data", {}, "the sentences have the tokens themselves")
        return joined
    record.take("placeholder_token_at_data", {}, f"{word} is replaced by {joined}")
    return word


def _captions_have(folder: Path, word: str) -> bool:
    """Whether a caption of the folder, in caption.txt or the images' names, has the word."""
    texts = [path.name for path in folder.iterdir()]
    file = folder / INDEXED_CAPTIONS
    if file.is_file():
        texts.append(file.read_text(encoding="utf-8", errors="replace"))
    return any(word in text for text in texts)


def _translate_captions(record: TranslatedOptions, folder: Path, word: str) -> None:
    """--use_template, --use_mask_captioned_data, or the names of the files."""
    template = record["use_template"]
    if template is not None and template not in TEMPLATES:
        raise record.refuse("use_template", f"expected one of {', '.join(TEMPLATES)}, or none")
    if record["use_mask_captioned_data"]:
        if template is not None:
            raise record.refuse("use_template", "leave it out with --use_mask_captioned_data")
        if not (folder / INDEXED_CAPTIONS).is_file():
            raise record.refuse(
                "use_mask_captioned_data",
                f"{folder} has no {INDEXED_CAPTIONS}; lora_ppim writes such a folder",
            )
        why = f"line N of {INDEXED_CAPTIONS} is the caption of N.src.jpg; there, from the eleventh "
        why += "image on, of another image"
        record.take("use_mask_captioned_data", {"data.captions": "metadata"}, why)
        return
    if template is None:
        record.take("use_template", {"data.captions": "filename"}, "captions are the files' names")
        return
    if not word:
        raise record.refuse("use_template", "its sentences need a word; give --placeholder_tokens")
    mode = "one" if template == "null" else template
    count = {"object": "27 sentences", "style": "19 sentences", "null": "the tokens alone"}
    ours = {"data.captions": mode, "data.caption": word}
    record.take("use_template", ours, count[template])


def _translate_masks(record: TranslatedOptions, folder: Path) -> bool:
    """The masks; returns whether a detector of faces has to paint them first."""
    by_index, by_face = record["use_mask_captioned_data"], record["use_face_segmentation_condition"]
    masks: dict[str, Any] = {"data.masks": "file", "mask_scale": "cloneofsimo"}
    why = "masks are 0 to 1; there 0.5 to 1.5, so that the background counts more"
    if by_index:
        record.change("use_mask_captioned_data", masks | {"data.captions": "metadata"}, why)
    if not by_face:
        return False
    try:
        (part,) = list_images(folder, tabled=False).parts
    except ValueError as error:
        raise UserError(f"--instance_data_dir: {error}") from None
    lacking = [image for image in part.images if image not in part.masks]
    painted = f"; OWL-ViT paints {len(lacking)} missing ones, there MediaPipe" if lacking else ""
    record.change("use_face_segmentation_condition", masks, why + painted)
    return bool(lacking)
