"""Header entries about a training under the names, and with the values, of kohya's sd-scripts.

Source: train_network.py and flux_train_network.py of kohya-ss/sd-scripts. An entry that has no
meaning here (its commit, its --lowram) is left out; None and truth values are written as Python
writes them, "None" and "True".
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from lora_core.config import Config, Stage
from lora_core.formats.model_hashes import hash_model
from training.headers.dataset_entries import steps_per_epoch
from training.inputs.latent_cache import pixels_repeat_after
from training.setup import Data, Model, Optimization

SCHEDULES = {"cosine_restarts": "cosine_with_restarts"}  # ours -> diffusers', which kohya has
LOSSES = {"mse": "l2"}
PRECISIONS = {"fp32": "no", "fp64": "no"}  # of --mixed_precision


def training_entries(
    config: Config, data: Data, model: Model, optimization: Optimization, name: str
) -> dict[str, Any]:
    """The entries that stay the same for all files of the run `name`, without those about its
    images.
    """
    c = config
    epochs = math.ceil(c.steps / steps_per_epoch(c, data.training))
    entries: dict[str, Any] = {
        "ss_output_name": name,
        "ss_max_train_steps": c.steps,
        "ss_num_epochs": epochs,
        "ss_num_validation_images": len(data.validation) if c.validation.images else 0,
        "ss_gradient_checkpointing": c.gradient_checkpointing != "none",
        "ss_gradient_accumulation_steps": c.accumulation,
        "ss_mixed_precision": "bf16" if c.autocast else PRECISIONS.get(c.precision, c.precision),
        "ss_full_fp16": False,
        "ss_fp8_base": c.quantize == "fp8",
        "ss_cache_latents": bool(pixels_repeat_after(data)),
        "ss_seed": c.seed,
        "ss_clip_skip": c.clip_skip + 1 if c.clip_skip else None,  # 1: the last layer
        "ss_caption_dropout_rate": c.data.caption_dropout,
        "ss_prior_loss_weight": c.prior.weight,
        "ss_max_token_length": c.max_token_length if c.max_token_length > 75 else None,
        "ss_training_comment": None,
    }
    return (
        entries
        | _model_entries(c)
        | _optimizer_entries(c, optimization)
        | _adapter_entries(c)
        | _objective_entries(c)
        | (_flow_entries(c) if model.family.schedule.kind == "flow" else {})
    )


def progress_entries(
    config: Config, data: Data, done: int, *, started: float, saved: float
) -> dict[str, Any]:
    """The entries of the file after `done` steps; times in seconds since 1970."""
    epoch = done / steps_per_epoch(config, data.training)
    digest = hashlib.blake2b(f"{config.seed} {started}".encode(), digest_size=4).digest()
    return {
        "ss_session_id": int.from_bytes(digest, "big"),  # the same for all files of a run
        "ss_training_started_at": started,
        "ss_training_finished_at": saved,
        "ss_steps": done,
        "ss_epoch": math.ceil(epoch) if done == config.steps else math.floor(epoch),
    }


def encode_entries(entries: dict[str, Any]) -> dict[str, str]:
    """The entries as texts."""
    return {key: str(value) for key, value in entries.items()}


def _model_entries(c: Config) -> dict[str, Any]:
    """The base model and the VAE by their names, and, where they are one file, its hashes."""
    entries = {}
    for path, short in ((c.model, "sd_model"), (c.vae, "vae")):
        if not path:
            continue
        entries[f"ss_{short}_name"] = Path(path).resolve().name if Path(path).exists() else path
        if hashes := hash_model(path):
            entries[f"ss_{short}_hash"] = hashes.legacy
            entries[f"ss_new_{short}_hash"] = hashes.sha256
    return entries


def _optimizer_entries(c: Config, optimization: Optimization) -> dict[str, Any]:
    """Learning rates as the first stage of a group has them, the optimizer, its schedule."""
    o = c.optimizer
    rates: dict[str, float | None] = dict.fromkeys(("denoiser", "text_encoder", "tokens"))
    for stage in reversed(c.stages):
        for group in stage.groups:
            rates[group] = stage.lr.get(group, optimization.settings[group]["lr"])
    kind = type(optimization.optimizer)
    arguments = ",".join(f"{name}={value}" for name, value in o.args.items())
    first = next(rate for rate in rates.values() if rate is not None)
    schedule = _schedule_name(c, c.stages[-1])
    return {
        "ss_learning_rate": first,
        "ss_unet_lr": rates["denoiser"],
        "ss_text_encoder_lr": rates["text_encoder"],
        "ss_optimizer": f"{kind.__module__}.{kind.__name__}" + f"({arguments})" * bool(arguments),
        "ss_lr_scheduler": schedule,
        "ss_lr_warmup_steps": o.warmup,
        "ss_max_grad_norm": o.clip,
        "ss_scale_weight_norms": o.max_update_norm or None,
    }


def _schedule_name(c: Config, stage: Stage) -> str:
    """kohya's word for the schedule of a stage's first group; of a function its name."""
    schedule = stage.schedule_of(stage.groups[0], c.optimizer)
    if schedule == "constant" and c.optimizer.warmup:
        return "constant_with_warmup"
    return SCHEDULES.get(schedule, schedule.split(":")[-1])


def _adapter_entries(c: Config) -> dict[str, Any]:
    """Dropouts and LoRA+, which leave no trace in the tensors; the writer adds ranks and alphas."""
    a = c.adapter
    given = {
        "rank_dropout": a.rank_dropout or None,
        "module_dropout": a.module_dropout or None,
        "loraplus_lr_ratio": c.optimizer.lora_plus if c.optimizer.lora_plus != 1 else None,
    }
    arguments = {name: str(value) for name, value in given.items() if value is not None}
    return {"ss_network_dropout": a.dropout or None, "ss_network_args": json.dumps(arguments)}


def _objective_entries(c: Config) -> dict[str, Any]:
    """Loss, its weighting, and departures from white noise; None and False where they are off."""
    n, loss = c.noise, c.loss.split(":")[-1]
    entries = {
        "ss_noise_offset": n.offset or None,
        "ss_adaptive_noise_scale": n.adaptive_offset or None,
        "ss_multires_noise_iterations": n.multires_levels or None,
        "ss_multires_noise_discount": n.multires_discount if n.multires_levels else None,
        "ss_ip_noise_gamma": n.perturbation or None,
        "ss_zero_terminal_snr": n.zero_terminal_snr,
        "ss_min_snr_gamma": None,
        "ss_debiased_estimation": c.weighting == "debiased",
        "ss_loss_type": LOSSES.get(loss, loss),
    }
    if c.weighting == "min_snr":
        entries["ss_min_snr_gamma"] = c.weighting_arg.get("gamma", 5.0)
    if c.loss in ("huber", "smooth_l1"):
        entries["ss_huber_c"] = c.loss_arg.get("delta", 0.1)
        entries["ss_huber_schedule"] = c.loss_arg.get("schedule", "constant")
    return entries


def _flow_entries(c: Config) -> dict[str, Any]:
    """Densities of noise levels as flux_train_network.py names them.

    Its timesteps sigmoid, shift and flux_shift are a logistic-normal density; all others it draws
    as sigma.
    """
    n = c.noise
    mean, std = n.density_args.get("mean", 0.0), n.density_args.get("std", 1.0)
    sampling, scheme = "sigma", n.density.split(":")[-1]
    if n.density == "logit_normal" and mean == 0:
        plain = "sigmoid" if n.shift == 1 else "shift"
        sampling, scheme = "flux_shift" if n.dynamic_shift else plain, "none"
    return {
        "ss_timestep_sampling": sampling,
        "ss_sigmoid_scale": std,
        "ss_weighting_scheme": scheme,
        "ss_logit_mean": -mean,  # its table of noise levels descends
        "ss_mode_scale": n.density_args.get("scale", 1.29),
        "ss_logit_std": std,
        "ss_discrete_flow_shift": n.shift,
        "ss_guidance_scale": n.guidance,
        "ss_model_prediction_type": "raw",
    }
