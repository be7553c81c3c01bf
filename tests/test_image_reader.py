"""Models that read images and words: which are taken, and what they are given."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_core.errors import UserError
from models.captioner import Captioner
from models.face_detector import FaceDetector
from models.image_reader import ImageReader
from models.image_similarity import ImageSimilarity
from models.segmenter import ClipSegmenter
from tests.test_segmenter import save_clipseg

READERS = [Captioner, ClipSegmenter, FaceDetector, ImageSimilarity]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["t5", "", 7, None, [1], {"a": "clip"}])
def test_another_model_is_a_sentence_with_the_one_to_give(
    tmp_path: Path, reader: type[ImageReader], kind: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError) as error:
        reader(str(tmp_path), "cpu")
    sentence = str(error.value)
    assert f"is of the type {kind!r}, expected {' or '.join(reader.parts)}; give " in sentence
    assert sentence.endswith(f"the folder or hub id of {reader.wanted}")


def test_images_are_normalized_and_texts_padded_and_cut_off(tmp_path: Path) -> None:
    reader = ClipSegmenter(str(save_clipseg(tmp_path / "clipseg")), "cpu")
    table = json.loads((tmp_path / "clipseg/preprocessor_config.json").read_text())
    color = (10, 200, 90)
    pixels = reader.squeeze(Image.new("RGB", (40, 24), color))
    assert pixels.shape == (1, 3, reader.side, reader.side)
    for channel, value in enumerate(color):
        mean, deviation = table["image_mean"][channel], table["image_std"][channel]
        expected = torch.full((reader.side, reader.side), (value / 255 - mean) / deviation)
        torch.testing.assert_close(pixels[0, channel], expected, rtol=1e-6, atol=1e-6)
    assert reader.normalize(Image.new("RGB", (40, 24))).shape == (3, 24, 40)
    read = reader.tokenize(["a", "a b c d e f g h"], 5)
    assert read.keys() == {"input_ids", "attention_mask"}
    assert read["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert not any(weight.requires_grad for weight in reader.network.parameters())
