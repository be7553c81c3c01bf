"""NAME.json, as A1111's page of a LoRA reads and writes it."""

import json
from pathlib import Path

from lora_core.formats.sidecars import preview_path, user_metadata, write_user_metadata

# save_lora_user_metadata of A1111's extensions-builtin/Lora/ui_edit_user_metadata.py writes these.
KEYS = {
    "description",
    "sd version",
    "activation text",
    "preferred weight",
    "negative text",
    "notes",
}


def test_the_table_has_the_keys_of_a1111() -> None:
    """Without a version A1111 takes that of the header; a weight of 0 is the user's default."""
    found = user_metadata({})
    assert set(found) == KEYS - {"sd version"}
    assert found.pop("preferred weight") == 0.0 and not any(found.values())


def test_it_is_written_beside_the_file(tmp_path: Path) -> None:
    file = tmp_path / "my cat.v2.safetensors"
    spec = {"trigger_phrase": "zib é", "description": "A cat.", "usage_hint": "x", "license": "mit"}
    header = {f"modelspec.{name}": text for name, text in spec.items()}
    path = write_user_metadata(file, header)
    assert path == tmp_path / "my cat.v2.json"  # A1111 takes the last ending away
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["activation text"], found["description"]) == ("zib é", "A cat.")
    assert found["notes"] == "x\nmit"
    assert preview_path(file) == tmp_path / "my cat.v2.preview.png"
