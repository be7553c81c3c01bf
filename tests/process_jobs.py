"""Functions that tests call in every process of a group."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import train
from lora_core.toml import read_toml


def train_on_own_images(folder: str, toml: str) -> int:
    """Train on a copy of the images that differs in each process."""
    rank = int(os.environ["RANK"])
    own = Path(folder) / str(rank)
    own.mkdir()
    file = own / "config.toml"
    file.write_text(toml)
    config = read_toml(file)
    shutil.copytree(config.data.images, own / "images")
    if rank:
        (own / "images" / "0.txt").write_text("another photo of TOK")
    data = replace(config.data, images=str(own / "images"))
    file.write_text("")
    changed = replace(config, data=data, out=str(Path(folder) / "run"))
    return train.exit_status(lambda: train.train(changed) and None)
