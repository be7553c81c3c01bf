"""OWL-ViT's boxes, against the library's own processor, and the masks that are painted of them."""

from pathlib import Path

import pytest
import torch
from transformers import OwlViTImageProcessorPil

from lora_core.errors import UserError
from models.face_detector import FaceDetector
from tests.test_captioner import an_image
from tests.tiny_annotators import PREPARATION, save_owlvit


@pytest.fixture(scope="module")
def owlvit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_owlvit(tmp_path_factory.mktemp("detector") / "owlvit")


def test_boxes_are_those_of_the_librarys_processor(owlvit: Path) -> None:
    detector, image = FaceDetector(str(owlvit), "cpu"), an_image()
    boxes = detector.find_boxes(image, "a face")
    processor = OwlViTImageProcessorPil(**PREPARATION)
    pixels = processor(image, return_tensors="pt").pixel_values
    words = detector.tokenizer(
        ["a face"], padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = detector.network(**words, pixel_values=pixels)
    (theirs,) = processor.post_process_object_detection(
        found, threshold=0.1, target_sizes=[(image.height, image.width)]
    )
    assert len(boxes) > 0 and torch.allclose(boxes, theirs["boxes"], atol=1e-3)


def test_a_mask_is_white_in_the_boxes_and_one_elsewhere(owlvit: Path) -> None:
    detector, image = FaceDetector(str(owlvit), "cpu"), an_image()
    mask = detector.find(image, "a face")
    assert mask is not None and mask.size == image.size
    expected = torch.ones(image.height, image.width, dtype=torch.uint8)
    for left, top, right, bottom in detector.find_boxes(image, "a face").round().int().tolist():
        left, top = max(left, 0), max(top, 0)
        right, bottom = max(right, left + 1), max(bottom, top + 1)
        if left < image.width and top < image.height:
            expected[top:bottom, left:right] = 255
    assert mask.crop((0, 0, 36, 24)).tobytes() == expected[:, :36].contiguous().numpy().tobytes()


def test_nothing_found_and_other_models(tmp_path: Path, model: Path, owlvit: Path) -> None:
    blind = FaceDetector(str(save_owlvit(tmp_path / "blind", bias=-100.0)), "cpu")
    assert blind.find(an_image()) is None
    with pytest.raises(UserError, match="'clip_text_model', expected owlvit"):
        FaceDetector(str(model / "text_encoder"), "cpu")
    broken = FaceDetector(str(owlvit), "cpu")
    broken.network.class_head.logit_shift.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="gives NaN or infinity"):
        broken.find(an_image())
