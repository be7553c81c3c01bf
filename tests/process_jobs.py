"""Functions that tests call in every process of a group."""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

import train
from lora_core import distributed
from lora_core.config import Config
from lora_core.data import image_checks
from lora_core.data.image_checks import ImageChecks
from lora_core.data.records import scan_folder
from lora_core.errors import UserError
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


def check_images_together(folder: str) -> None:
    """In each of two processes: every file is decoded by one of them, and all have the results."""
    decoded: list[str] = []
    check = image_checks.check_image

    def counted(file: image_checks.ImageFile, masks: str) -> image_checks.CheckedImage:
        decoded.append(str(file.image))
        return check(file, masks)

    with distributed.join_processes():
        plain = scan_folder(folder, masks="auto")
        image_checks.check_image = counted
        cache = Path(folder).parent / "cache"
        assert scan_folder(folder, masks="auto", checks=ImageChecks(cache, shares=True)) == plain
        every = distributed.gather_values(decoded)
        assert sorted([*every[0], *every[1]]) == sorted(str(record.path) for record in plain)
        own = Path(folder).parent / str(distributed.process_rank())  # files of this process alone
        shutil.copytree(folder, own)
        (own / "0.png").write_bytes((own / "1.png").read_bytes() + bytes([own.name == "1"]))
        first = scan_folder(own, masks="none", checks=ImageChecks(shares=True))[0].key
        assert len(set(distributed.gather_values(first))) == 2
        (own / "2.png").write_bytes(b"")
        Path(folder, "2.png").write_bytes(b"")
        with pytest.raises(UserError, match=r"cannot read the image .*2.png"):
            scan_folder(folder, masks="none", checks=ImageChecks(shares=True))
        checks = ImageChecks(shares=True, skips=True)
        scan_folder(folder, masks="none", checks=checks)
        assert checks.left_out == {Path(folder, "2.png"): "it is empty"}
