"""--region: its text, and images with regions."""

import pytest

from lora_core.cross_attention import Box
from lora_core.diffusion.regions import parse_region
from lora_core.errors import UserError


def test_a_region_is_parsed_never_evaluated() -> None:
    region = parse_region("0, 128,256 ,512: a TOK: in the snow; negative: blurry", 512, 512)
    assert region.box == Box(0, 0.25, 0.5, 1)
    assert (region.prompt, region.negative) == ("a TOK: in the snow", "blurry")
    assert parse_region("0,0,9,9: a;negative:b; negative: c", 9, 9).negative == "b; negative: c"
    assert parse_region("0,0,10.5,20:x", 21, 20).box.right == 0.5
    with pytest.raises(UserError, match="is not x0,y0,x1,y1: prompt"):
        parse_region("0,0,__import__('os'),1: x", 512, 512)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0,0,513,512: a", "not inside the image, 512 x 512 pixels"),
        ("-1,0,5,5: a", "not inside the image"),
        ("5,0,5,5: a", "left < right"),
        ("0,0,5,5:", "has no prompt after its box"),
        ("0,0,5,5: ; negative: x", "has no prompt after its box"),
        ("0,0,5,5: a; negative: ", "has no text after negative:"),
        ("0,0,5: a", "is not x0,y0,x1,y1: prompt"),
        ("a photo", "is not x0,y0,x1,y1: prompt"),
    ],
)
def test_wrong_regions_are_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_region(text, 512, 512)
