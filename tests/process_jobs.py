"""Functions that tests call in every process of a group."""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import train
from lora_core.config import Config
from lora_core.toml import read_toml


def parse_toml(toml: str) -> Config:
    """The config of a TOML text."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(toml)
        file.flush()
        return read_toml(Path(file.name))


def fail_in_process_one(toml: str) -> int:
    """Train with a step that process 1 cannot take."""
    if os.environ["RANK"] == "1":

        def fail(*_: object, check: bool) -> None:
            raise ZeroDivisionError("of our own making")

        train.make_step_inputs = fail
    return train.exit_status(lambda: train.train(parse_toml(toml)) and None)


def train_on_own_images(folder: str, toml: str) -> int:
    """Train on a copy of the images that differs in each process."""
    rank = int(os.environ["RANK"])
    own = Path(folder) / str(rank)
    own.mkdir()
    config = parse_toml(toml)
    shutil.copytree(config.data.images, own / "images")
    if rank:
        (own / "images" / "0.txt").write_text("another photo of TOK")
    data = replace(config.data, images=str(own / "images"))
    changed = replace(config, data=data, out=str(Path(folder) / "run"))
    return train.exit_status(lambda: train.train(changed) and None)
