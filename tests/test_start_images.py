"""Start image and mask: they are cut alike; a mask with nothing to paint is refused."""

from pathlib import Path

import pytest
from PIL import Image

from lora_core.diffusion.start_images import read_start_images
from lora_core.errors import UserError


@pytest.mark.parametrize("white", [None, (0, 0, 8, 16)], ids=["black", "white outside the crop"])
def test_a_mask_that_paints_nothing_is_refused(
    tmp_path: Path, white: tuple[int, int, int, int] | None
) -> None:
    mask = Image.new("L", (48, 16))
    if white:
        mask.paste(255, white)
    mask.save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="no white pixel inside the image"):
        read_start_images("", str(tmp_path / "mask.png"), 16, 16)


@pytest.mark.parametrize(
    "size", [(48, 16), (96, 32), (97, 32), (16, 16)], ids=["same", "scaled", "a pixel more", "cut"]
)
def test_a_mask_is_cut_as_its_image_is(tmp_path: Path, size: tuple[int, int]) -> None:
    """Its right half is white; one of the size of the result is not cut."""
    Image.new("RGB", (48, 16)).save(tmp_path / "image.png")
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2, 0, *size))
    mask.save(tmp_path / "mask.png")
    found = read_start_images(str(tmp_path / "image.png"), str(tmp_path / "mask.png"), 16, 16).mask
    assert found is not None
    assert found[..., 9:].all() and not found[..., :7].any()


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (48, 16)).save(tmp_path / "image.png")
    Image.new("L", (32, 16), 255).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"32 x 16 pixels and its image 48 x 16: .* or 16 x 16"):
        read_start_images(str(tmp_path / "image.png"), str(tmp_path / "mask.png"), 16, 16)
