"""Start image and mask: a mask with nothing to paint is refused."""

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
