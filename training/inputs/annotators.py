"""Models that write captions and masks of images, by the words of --data.prepare.

blip, florence            captions by the published weights; blip@MODEL and florence@MODEL by
                          those in a folder or hub repository
clipseg, clipseg:WORDS    masks of what the words name; without words, of what the image's
                          caption names (cloneofsimo's lora_ppim)
face                      masks of faces: boxes by OWL-ViT, told to look for "a photo of a face"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_core.errors import UserError
from lora_core.text import shorten_value
from training.inputs.mask_files import PUBLISHED_WEIGHTS

if TYPE_CHECKING:
    from models.captioner import Captioner
    from models.face_detector import FaceDetector
    from models.segmenter import ClipSegmenter

WEIGHTS = {  # kind -> the weights that are published for it
    "blip": "Salesforce/blip-image-captioning-large",  # those of lora_ppim
    "florence": "florence-community/Florence-2-base",
    "clipseg": PUBLISHED_WEIGHTS,
    "face": "google/owlvit-base-patch32",
}
CAPTIONERS, MASKERS = ("blip", "florence"), ("clipseg", "face")
DEFAULT_SOURCES = ("blip", "clipseg")  # what lora_ppim does


class Annotator(NamedTuple):
    """A model that writes captions or masks."""

    kind: str  # of WEIGHTS
    weights: str  # folder or hub id
    words: str = ""  # what a segmenter looks for; "": what the caption says


class Annotators(NamedTuple):
    """What writes captions and what writes masks; None: nothing."""

    captions: Annotator | None
    masks: Annotator | None


def parse_annotators(words: list[str]) -> Annotators:
    """The annotators that the words of --data.prepare name. Raises UserError for others."""
    found: dict[bool, Annotator] = {}
    for word in words or DEFAULT_SOURCES:
        annotator = _parse_annotator(word)
        writes_captions = annotator.kind in CAPTIONERS
        if writes_captions in found:
            what = "captions" if writes_captions else "masks"
            raise UserError(f"--data.prepare names two models for {what}; leave {word} out")
        found[writes_captions] = annotator
    return Annotators(found.get(True), found.get(False))


def _parse_annotator(word: str) -> Annotator:
    name, colon, words = word.partition(":")
    kind, at, weights = name.partition("@")
    is_wrong = kind not in WEIGHTS or (at and not weights) or (colon and kind != "clipseg")
    if is_wrong or (colon and not words.strip()):
        raise UserError(
            f"--data.prepare is {shorten_value(word)}, expected blip or florence for captions, "
            'face or clipseg or "clipseg:a red hat" for masks; KIND@MODEL takes other weights'
        )
    return Annotator(kind, weights or WEIGHTS[kind], words.strip())


def open_captioner(wanted: Annotator, device: torch.device) -> Captioner:
    """The captioning model. Raises UserError where its weights cannot be had."""
    from models.captioner import Captioner  # its library takes seconds to import

    return Captioner(wanted.weights, device)


def open_masker(wanted: Annotator, device: torch.device) -> ClipSegmenter | FaceDetector:
    """The model that finds masks. Raises UserError where its weights cannot be had."""
    from models.face_detector import FaceDetector
    from models.segmenter import ClipSegmenter

    if wanted.kind == "face":
        return FaceDetector(wanted.weights, device)
    return ClipSegmenter(wanted.weights, device)
