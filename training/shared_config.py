"""The config of a run as its published files hold it: LoRA headers, and config.toml on the hub."""

from __future__ import annotations

from pathlib import Path

from lora_core.config import Config
from lora_core.runs.shared_options import share_options
from lora_core.toml import from_table, to_table


def shared_config(config: Config, folder: Path | str) -> Config:
    """The config of a run in `folder` without what only its owner has: see `share_options`."""
    return from_table(share_options(to_table(config.recorded), folder))
