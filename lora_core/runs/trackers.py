"""TensorBoard and W&B: the scalars and images of a run, its config as text and as hyper-parameters.

Both get the shared form of the config, without folders of images and home folders. W&B is a server.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lora_core.errors import UserError, first_line
from lora_core.toml import flatten_table, to_toml


class Sink(Protocol):
    """A logger in addition to metrics.jsonl."""

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics after a step."""

    def add_images(
        self, step: int, name: str, captions: Sequence[str], images: Sequence[Image.Image]
    ) -> None:
        """Images after a step under a name, each with a caption, which may be ""."""

    def finish(self, results: Mapping[str, float]) -> None:
        """The results of the run, which are the metrics of its hyper-parameters, and the end."""


class TensorBoard:
    """Event files in OUT/tensorboard."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "--report tensorboard needs the package tensorboard: pip install tensorboard"
            ) from None
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.options = plain_options(config)
        text = "\n".join(f"    {line}" for line in to_toml(config).splitlines())
        self.writer.add_text("config", text)  # Markdown: four spaces are code
        self.writer.flush()

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def add_images(
        self, step: int, name: str, captions: Sequence[str], images: Sequence[Image.Image]
    ) -> None:
        for caption, image in zip(captions, images, strict=True):
            pixels = np.asarray(image.convert("RGB"))
            tag = f"{name}/{caption}" if caption else name
            self.writer.add_image(tag, pixels, step, dataformats="HWC")
        self.writer.flush()

    def finish(self, results: Mapping[str, float]) -> None:
        # run_name: in the same folder, and not in one that is named after the time
        self.writer.add_hparams(self.options, dict(results), run_name=".")
        self.writer.close()


class WandB:
    """A run of the project lora_core, with files in OUT/wandb."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("--report wandb needs the package wandb: pip install wandb") from None
        self.wandb = wandb
        wandb.init(project="lora_core", name=folder.name, dir=str(folder), config=dict(config))
        self.text = f"<pre>{html.escape(to_toml(config))}</pre>"

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.text:  # with the first metrics, as it needs a step that no later one precedes
            self.wandb.log({"config": self.wandb.Html(self.text, inject=False)}, step=step)
            self.text = ""
        self.wandb.log(dict(values), step=step)

    def add_images(
        self, step: int, name: str, captions: Sequence[str], images: Sequence[Image.Image]
    ) -> None:
        pairs = zip(images, captions, strict=True)
        found = [self.wandb.Image(image, caption=caption or None) for image, caption in pairs]
        self.wandb.log({name: found}, step=step)

    def finish(self, results: Mapping[str, float]) -> None:
        self.wandb.summary.update(dict(results))
        self.wandb.finish()


SINKS: dict[str, Any] = {  # --report -> fn(folder, config) -> Sink, or None
    "none": lambda folder, config: None,
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def plain_options(config: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Options by their dotted names, as TensorBoard takes hyper-parameters: truth values, numbers
    and texts; others are their text.
    """
    options = {}
    for name, value in flatten_table(dict(config)).items():
        options[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return options


def check_login(report: str) -> None:
    """Imports the package that --report needs and, for W&B, logs in.

    Raises UserError in one sentence where that fails.
    """
    if report == "tensorboard":
        try:
            import torch.utils.tensorboard  # noqa: F401
        except Exception as error:  # a broken installation raises anything
            raise UserError(
                f"--report tensorboard cannot be imported ({error}): pip install tensorboard"
            ) from None
    if report == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
        try:
            import wandb

            if not wandb.login():
                raise RuntimeError("there is no login")
        except Exception as error:  # UsageError, AuthenticationError, CommError ... by version
            raise UserError(
                f"--report wandb: {first_line(error)}; run `wandb login`, or set WANDB_MODE=offline"
            ) from None
