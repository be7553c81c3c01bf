"""The table of published layouts: reading undoes writing, shared networks are stored once."""

import json

from models.published import PUBLISHED_MODELS
from models.published_layouts import decode_layout, encode_layouts, published_layout


def test_reading_the_table_undoes_writing_it() -> None:
    layouts = {kind: published_layout(kind) for kind in PUBLISHED_MODELS}
    table = json.loads(json.dumps(encode_layouts(layouts)))
    for kind, layout in layouts.items():
        assert decode_layout(table["layouts"][kind], table["components"]) == layout
        assert published_layout(kind) is layout
    assert len(table["components"]) < sum(len(layout.components) for layout in layouts.values())


def test_layers_that_read_the_text_are_counted_down_middle_up() -> None:
    """Mix-of-Show's sixteen of SD 1.x, in its order: 6 down, 1 in the middle, 9 up; SDXL has 24, 10
    and 36.
    """
    for kind, numbers in {"sd1": (6, 1, 9), "sd2": (6, 1, 9), "sdxl": (24, 10, 36)}.items():
        paths = published_layout(kind).cross_attention
        starts = [path.split("_")[0] for path in paths]
        assert starts == ["down"] * numbers[0] + ["mid"] * numbers[1] + ["up"] * numbers[2]
        modules = published_layout(kind).components["unet"].modules
        in_block = [path for path in paths if path.startswith("up_blocks")]
        assert in_block == [m[:-5] for m in modules if m.startswith("up") and m.endswith("2.to_k")]
    assert published_layout("flux-dev").cross_attention == ()
