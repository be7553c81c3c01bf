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

__all__ = ["DTYPES", "FAMILIES", "Conditioning", "Family", "Layout", "choose_device", "load_family"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}  # --precision
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


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is CUDA where there is one. Raises UserError when it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such device, or a torch that was built without it
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); leave --device out to take what there is") from None
