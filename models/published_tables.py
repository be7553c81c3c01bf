"""Writes the table of published layouts: `python -m models.published_tables`.

The layouts come from the networks themselves, built on the meta device from published configs. Run
it after a change to a family's layout; a test compares the table with the networks.
"""

from __future__ import annotations

import gzip
import json
import sys

from lora_core.errors import quiet_status
from lora_core.formats.layout import Layout
from models import read_layout
from models.published import PUBLISHED_MODELS
from models.published_configs import published_configs
from models.published_layouts import TABLE, encode_layouts


def build_layout(kind: str) -> Layout:
    """The layout of one of PUBLISHED_MODELS, from its networks without weights (0.1 s)."""
    return read_layout(str(published_configs(kind)))


def main() -> None:
    table = encode_layouts({kind: build_layout(kind) for kind in PUBLISHED_MODELS})
    text = json.dumps(table, separators=(",", ":"))
    TABLE.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"written: {TABLE} ({TABLE.stat().st_size} bytes)")


if __name__ == "__main__":
    sys.exit(quiet_status(main))
