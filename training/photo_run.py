"""Runs on photos that a program receives from its user, as examples/web_demo.py does."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_core.config import Config, Stage
from lora_core.errors import UserError
from lora_core.toml import read_toml
from models import read_layout
from training.run_presets import PRESETS, preset_file
from training.run_process import RunProcess

CAPTION = "a photo of TOK"  # of photos without another one
NAME = re.compile(r"[A-Za-z0-9][\w-]*", re.ASCII)
LOG_EVERY = 5  # steps between losses, for someone who watches
Photos = Sequence[tuple[str, str | None]]  # (image file, its caption or None)


@dataclass(frozen=True)
class PhotoRun:
    """What a user gives for a run on photos, in the order of a form."""

    photos: Photos | None
    captions: Sequence[Sequence[str]]  # rows of `caption_table`
    name: str  # of its folder in the folder of the runs
    preset: str
    steps: int  # of all stages together, which are as long in proportion as the preset's
    every: int  # steps between sheets of sample images
    resolution: int  # pixels
    prompts: str  # of the sample images, one a line; empty: the captions
    overwrite: bool = False  # move a run of this name to NAME.bak


class PhotoRuns:
    """The runs of a model in a folder, of which one is trained at a time.

    Their presets are those of --preset and `more`, name -> config file, which come first. Raises
    UserError for a model that cannot be read, and one of a family without presets.
    """

    def __init__(self, model: str, folder: Path, more: Mapping[str, Path]) -> None:
        self.model, self.folder = model, folder
        self.newest: RunProcess | None = None
        family = read_layout(model).family
        self.presets = dict(more)
        for name in PRESETS:
            self.presets[name] = preset_file(name, family)

    def check_idle(self) -> None:
        """Raises UserError while a run is being trained."""
        if self.newest is not None and self.newest.is_running:
            raise UserError(f"{self.newest.folder} is training; stop it, or wait until it ends")

    def read_preset(self, name: str) -> Config:
        """The config of a preset. Raises UserError for a name that is none of them."""
        if name not in self.presets:
            raise UserError(f"there is no preset {name!r}; choose {', '.join(self.presets)}")
        return replace(read_toml(self.presets[name]), model=self.model)

    def start(self, choices: PhotoRun) -> None:
        """Train a new run on copies of the photos.

        Raises UserError, before anything is written, for a name that is taken, without photos, and
        while another run is being trained.
        """
        self.check_idle()
        out, place = self.folder / choices.name, self.place_of(choices.name)
        if out.exists() and not choices.overwrite:
            raise UserError(f"{out} is there already; choose another name, or replace it")
        if not choices.photos:
            raise UserError("there are no photos; add at least one")
        config = make_config(self.read_preset(choices.preset), choices, out, place / "photos")
        if place.exists():
            shutil.rmtree(place)
        copy_photos(choices, place / "photos")
        self.newest = RunProcess.start(config, place)

    def resume(self, name: str) -> None:
        """Go on with a run that was stopped. Raises UserError where none of this name was begun."""
        self.check_idle()
        place = self.place_of(name)
        if not place.is_dir():
            raise UserError(f"no run {name} was begun here")
        config: Config = read_toml(self.folder / name / "config.toml")
        self.newest = RunProcess.resume(config, place)

    def stop(self) -> None:
        """End the run that is being trained after its current step, with a checkpoint."""
        if self.newest is not None:
            self.newest.stop()

    def place_of(self, name: str) -> Path:
        """The folder NAME.web next to a run's own, which has to be new: for its photos, its config
        and what it prints.
        """
        return self.folder / f"{check_name(name)}.web"


def check_name(name: str) -> str:
    """The name of a folder. Raises UserError for one that is no single word: it could lead out of
    the folder of the runs.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a folder; use letters, digits, - and _")
    return name


def caption_table(photos: Photos | None, edited: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows (name of its file, caption) of the photos, in their order: the caption in `edited`, an
    earlier table, else the one that comes with the photo, else CAPTION.
    """
    known = {row[0]: row[1] for row in edited}
    table = []
    for file, caption in photos or ():
        name = Path(file).name
        table.append([name, known.get(name) or caption or CAPTION])
    return table


def copy_photos(choices: PhotoRun, folder: Path) -> None:
    """Copies photos as 001.jpg, 002.png ..., each with its caption in a file 001.txt."""
    folder.mkdir(parents=True)
    table = caption_table(choices.photos, choices.captions)
    for number, ((file, _), (_, caption)) in enumerate(zip(choices.photos or (), table), start=1):
        copy = folder / f"{number:03d}{Path(file).suffix.lower()}"
        shutil.copyfile(file, copy)
        copy.with_suffix(".txt").write_text(caption, encoding="utf-8")


def make_config(preset: Config, choices: PhotoRun, out: Path, images: Path) -> Config:
    """The config of a run: a preset with what a user chose. Photos and captions stay private."""
    lines = [line.strip() for line in choices.prompts.splitlines()]
    samples = replace(
        preset.samples, prompts=tuple(filter(None, lines)), every=choices.every, show_data=False
    )
    return replace(
        preset,
        out=str(out),
        overwrite=choices.overwrite,
        log_every=LOG_EVERY,
        stages=stretch_stages(preset.stages, choices.steps),
        data=replace(preset.data, images=str(images), resolution=choices.resolution),
        samples=samples,
    )


def stretch_stages(stages: Sequence[Stage], steps: int) -> tuple[Stage, ...]:
    """The stages with `steps` steps together, in their proportions. Raises UserError where that
    leaves none for a stage.
    """
    total = sum(stage.steps for stage in stages)
    scaled = []
    before = 0
    for stage in stages:
        after = before + stage.steps
        count = round(steps * after / total) - round(steps * before / total)
        if count < 1:
            raise UserError(f"{steps} steps leave none for one of {len(stages)} stages; take more")
        scaled.append(replace(stage, steps=count))
        before = after
    return tuple(scaled)
