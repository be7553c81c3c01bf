"""How managers of LoRA files read a header: A1111's metadata page, and ComfyUI-Lora-Manager.

Written from their rules (stable-diffusion-webui 1.10.1: modules/sd_models.py and
extensions-builtin/Lora; ComfyUI-Lora-Manager, September 2026: py/utils), without their code.
"""

import hashlib
import json
import re
import struct
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

LONG_TAGS = 16  # mean length from which A1111 takes captions for sentences and counts their words
PREVIEWS = (".preview.png", ".png", ".preview.jpg", ".jpg", ".webp")
BASE_MODELS = {"sdxl": "SDXL 1.0", "flux1": "Flux.1 D", "sd-v1-5": "SD 1.5", "sd-v2": "SD 2.0"}


def raw_header(file: Path) -> dict[str, str]:
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        return json.loads(opened.read(size))["__metadata__"]


def tensor_hash(file: Path) -> str:
    """SHA-256 of a file without its header, by which managers and Civitai know it."""
    data = file.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


class WebUiPage(NamedTuple):
    """What A1111's page of a LoRA shows."""

    alias: str
    version: str
    hash: str
    rows: dict[str, str]  # label -> text
    tags: list[tuple[str, int]]
    user: dict[str, Any]  # NAME.json
    preview: str

    @property
    def prompt(self) -> str:
        """What a click on the card puts into the prompt."""
        weight = float(self.user.get("preferred weight", 0.0)) or 1.0
        words = self.user.get("activation text", "")
        return f"<lora:{self.alias}:{weight:g}> {words}".strip()


def read_as_webui(file: Path) -> WebUiPage:
    header: dict[str, Any] = dict(raw_header(file))
    for key, value in header.items():
        if value[:1] == "{":  # its reader parses objects, and no lists
            header[key] = json.loads(value)
    beside = file.with_suffix(".json")
    user = json.loads(beside.read_text()) if beside.is_file() else {}
    version = "SD1"
    if header.get("ss_base_model_version", "").startswith("sdxl_"):
        version = "SDXL"
    elif header.get("ss_v2") == "True":
        version = "SD2"
    preview = file.with_name(f"{file.stem}.preview.png")
    return WebUiPage(
        header.get("ss_output_name", file.stem),
        user.get("sd version", version),
        header.get("sshs_model_hash", ""),
        _webui_rows(header),
        _webui_tags(header),
        user,
        str(preview) if preview.is_file() else "",
    )


def _webui_rows(header: dict[str, Any]) -> dict[str, str]:
    names = {
        "ss_output_name": "Output name",
        "ss_sd_model_name": "Model",
        "ss_clip_skip": "Clip skip",
        "ss_network_module": "Kohya module",
    }
    rows = {label: header[key] for key, label in names.items() if header.get(key, "None") != "None"}
    if started := header.get("ss_training_started_at"):
        day = datetime.fromtimestamp(float(started), UTC)
        rows["Date trained"] = day.strftime("%Y-%m-%d %H:%M")
    counts: Counter[str] = Counter()
    buckets = header.get("ss_bucket_info")
    for bucket in buckets["buckets"].values() if isinstance(buckets, dict) else ():
        one, other = bucket["resolution"]
        counts[f"{other}x{one}"] += int(bucket["count"])
    if counts:
        rows["Resolutions"] = ", ".join(name for name, _ in counts.most_common(4))
    sizes = [int(own["img_count"]) for own in header.get("ss_dataset_dirs", {}).values()]
    if sum(sizes):
        rows["Dataset size"] = str(sum(sizes))
    return rows


def _webui_tags(header: dict[str, Any]) -> list[tuple[str, int]]:
    tags: Counter[str] = Counter()
    for own in header.get("ss_tag_frequency", {}).values():
        for tag, count in own.items():
            tags[tag.strip()] += int(count)
    if tags and sum(map(len, tags)) / len(tags) >= LONG_TAGS:
        words: Counter[str] = Counter()
        for text, count in tags.items():
            for word in re.findall(r"[-_\w']+", text):
                words[word] += count if len(word) > 2 else 0
        tags = +words
    return tags.most_common()


class ManagerCard(NamedTuple):
    """What ComfyUI-Lora-Manager shows of a LoRA."""

    base_model: str
    words: list[tuple[str, int]]  # most frequent first
    class_tokens: str | None
    autov3: str | None  # Civitai's hash
    preview: str


def read_as_lora_manager(file: Path) -> ManagerCard:
    header = raw_header(file)
    version = header.get("ss_base_model_version", "").lower()
    base = next((name for key, name in BASE_MODELS.items() if key in version), version)
    class_tokens = None
    if "ss_datasets" in header:
        class_tokens = json.loads(header["ss_datasets"])[0]["subsets"][0].get("class_tokens")
    words: list[tuple[str, int]] = []
    if frequency := json.loads(header.get("ss_tag_frequency", "{}")):
        first = next(iter(frequency.values()))
        words = sorted(first.items(), key=lambda pair: pair[1], reverse=True)
    digest = header.get("sshs_model_hash") or header.get("modelspec.hash_sha256", "")
    digest = digest.removeprefix("0x")
    found = [file.with_name(file.stem + end) for end in PREVIEWS]
    preview = next((str(path) for path in found if path.is_file()), "")
    return ManagerCard(base, words, class_tokens, digest[:12].lower() or None, preview)
