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
