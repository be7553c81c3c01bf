"""names: the rule that tells file names that somebody wrote from those of cameras and programs, as
a table.
"""

import pytest

from lora_core.data.file_names import looks_like_caption

UNWRITTEN = [
    "IMG_4711", "IMG_E4711", "img_4711 (2)", "IMG-20240501-WA0001", "IMG_20240501_123456_HDR",
    "DSC0001", "DSC_0001", "DSCF1234", "_MG_1234",
    "P1010023", "100_0001", "SANY0007", "GOPR0001", "DJI_0001", "PXL_20240501_123456789",
    "MVIMG_20181212", "20240501_123456", "2024-05-01",
    "5 May 2024", "WhatsApp Image 2024-05-01 at 12", "FB_IMG_1589", "signal-2024-05-01-123456_002",
    "received_1234", "Snapchat-123456",
    "Screenshot 2024-05-01", "Screenshot_20240501_Chrome", "Screen Shot 2024-05-01 at 3",
    "Bildschirmfoto 2024-05-01 um 12",
    "Capture d’écran 2024-05-01", "微信图片_20240501", "photo (3)", "image0", "image (1) copy",
    "Photo on 5-6-24 at 3", "download (2)", "unnamed",
    "untitled", "00001-1234567", "ComfyUI_00001_", "tumblr_n4kd92jd1o1",
    "550e8400-e29b-41d4-a716-446655440000",
    "d41d8cd98f00b204e9800998ecf8427e", "a8f3kd92", "000123", "x", "", "写真 3",
]  # fmt: skip
WRITTEN = [
    "a photo of TOK", "TOK", "dog", "dog_01", "dog 001", "sks dog", "a dog (2)",
    "cat-sitting-on-mat", "image of Paris", "photo of a cat",
    "Sam in the garden", "signal tower", "screenshot of a game", "screen door", "R2D2 robot",
    "René", "Rene\u0301", "кошка", "犬", "मेरा कुत्ता",
]  # fmt: skip


@pytest.mark.parametrize("name", UNWRITTEN)
def test_names_of_cameras_and_programs_are_no_captions(name: str) -> None:
    assert not looks_like_caption(name)


@pytest.mark.parametrize("name", WRITTEN)
def test_words_are_captions(name: str) -> None:
    assert looks_like_caption(name)
