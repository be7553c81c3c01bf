"""Families of text-to-image models: one file each, and the table that finds the right one for a checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import UserError
from models import sd
from models.family import Conditioning, Family, Layout, read_json

__all__ = ["FAMILIES", "Conditioning", "Family", "Layout", "load_family"]

FAMILIES: dict[str, Callable[..., Any]] = {pipeline: sd.load for pipeline in sd.PIPELINES}  # `_class_name` of model_index.json -> loader


def load_family(
    path: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", vae: str = "", scheduler: dict[str, Any] | None = None
) -> Family:
    """The model at `path`, a folder in the diffusers layout or a hub id, frozen and in eval mode.

    `vae` names another VAE; `scheduler` replaces keys of the model's scheduler_config.json (prediction_type, rescale_betas_zero_snr ...).

    Raises UserError for a path that is not there, a single-file checkpoint, another family, a missing or broken part.
    """
    if not path:
        raise UserError("no base model; name a folder or a hub id with --model")
    if Path(path).is_file() or Path(path).suffix in (".safetensors", ".ckpt", ".pt"):
        raise UserError(f"--model {path} is a single file; give a folder in the diffusers layout or a hub id")
    name = read_json(path, "model_index.json").get("_class_name", "")
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, 1, 0.0)
        raise UserError(f"{path} is a {name or 'model without _class_name'}, which is not supported; the nearest supported is {near[0]}")
    return FAMILIES[name](path, dtype=dtype, device=device, vae=vae, scheduler=scheduler or {})
