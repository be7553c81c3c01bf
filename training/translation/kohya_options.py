"""The options of kohya's train_network.py and of its siblings for SDXL and Flux (sd-scripts), with
their defaults; and how its config file and its command line are read.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_core.errors import UserError
from lora_core.text import nearest_hint, read_text, shorten_value
from lora_core.toml import LONGEST_TOML, missing_config, parse_toml
from training.translation.kohya_values import PROMPTS, SIDES, TEXT, check_value, expected_kind

TOOL = "kohya"
SDPA = "attention always uses torch's SDPA"
MEMORY = "memory and speed of another program"
WRITTEN = "checkpoints always have it"
ALWAYS_READ = "read from the model"
LOGS = "how its program logs"
UPLOADS = "--push-to-hub USER/NAME uploads the run when it is done"
CACHED = "latents and captions are kept whenever nothing changes them (on disk: --data.cache)"
IN_THE_MODEL = "part of the model's folder here"
HEADER = "not written into the file's header"
UNREAD = "kohya's script reads no such key either"
DEEPSPEED = "processes are torchrun's"

# Options that do not change what is learned: option -> (its default, why).
IGNORED: dict[str, tuple[Any, str]] = {
    "xformers": (False, SDPA),
    "sdpa": (False, SDPA),
    "mem_eff_attn": (False, SDPA),
    "split_attn": (False, SDPA),
    "v2": (False, ALWAYS_READ),
    "tokenizer_cache_dir": (None, "the hub's cache"),
    "lowram": (False, MEMORY),
    "highvram": (False, MEMORY),
    "cache_latents": (False, CACHED),
    "cache_latents_to_disk": (False, CACHED),
    "cache_text_encoder_outputs": (False, CACHED),
    "cache_text_encoder_outputs_to_disk": (False, CACHED),
    "cache_info": (False, MEMORY),
    "skip_cache_check": (False, MEMORY),
    "vae_batch_size": (1, MEMORY),
    "text_encoder_batch_size": (None, MEMORY),
    "disable_mmap_load_safetensors": (False, MEMORY),
    "persistent_data_loader_workers": (False, MEMORY),
    "max_data_loader_n_workers": (8, "--data.workers N loads images ahead, with the same bits"),
    "ddp_timeout": (None, DEEPSPEED),
    "ddp_gradient_as_bucket_view": (False, DEEPSPEED),
    "ddp_static_graph": (False, DEEPSPEED),
    "deepspeed": (False, DEEPSPEED),
    "zero_stage": (2, DEEPSPEED),
    "offload_optimizer_device": (None, DEEPSPEED),
    "offload_optimizer_nvme_path": (None, DEEPSPEED),
    "offload_param_device": (None, DEEPSPEED),
    "offload_param_nvme_path": (None, DEEPSPEED),
    "zero3_init_flag": (False, DEEPSPEED),
    "zero3_save_16bit_model": (False, DEEPSPEED),
    "fp16_master_weights_and_gradients": (False, DEEPSPEED),
    "dynamo_backend": ("inductor", MEMORY),
    "cpu_offload_checkpointing": (False, MEMORY),
    "fused_backward_pass": (False, MEMORY),
    "blocks_to_swap": (None, "--stream keeps all blocks in host memory, of which two come at once"),
    "split_mode": (False, MEMORY),
    "lowvram": (False, MEMORY),
    "debug_dataset": (False, "train.py prints what it reads"),
    "logging_dir": (None, "metrics.jsonl is in OUT; --report tensorboard logs there as well"),
    "log_prefix": (None, LOGS),
    "log_tracker_name": (None, LOGS),
    "log_tracker_config": (None, LOGS),
    "wandb_run_name": (None, "the run's name"),
    "wandb_api_key": (None, "wandb login"),
    "log_config": (False, "OUT/config.toml has it"),
    "console_log_level": (None, LOGS),
    "console_log_file": (None, LOGS),
    "console_log_simple": (False, LOGS),
    "save_state": (False, WRITTEN),
    "save_state_on_train_end": (False, WRITTEN),
    "save_last_n_epochs_state": (None, WRITTEN),
    "save_last_n_steps_state": (None, WRITTEN),
    "sample_at_first": (False, "the base model's images are always drawn"),
    "training_comment": (None, HEADER),
    "metadata_usage_hint": (None, "written by the run where it learns tokens"),
    "metadata_thumbnail": (None, "a sample of the end is the thumbnail (--files.thumbnail)"),
    "metadata_merged_from": (None, HEADER),
    "metadata_preprocessor": (None, HEADER),
    "metadata_is_negative_embedding": (None, HEADER),
    "huggingface_repo_type": (None, UPLOADS),
    "huggingface_path_in_repo": (None, UPLOADS),
    "huggingface_token": (None, "hf auth login"),
    "save_state_to_huggingface": (False, UPLOADS),
    "async_upload": (False, UPLOADS),
    "output_config": (False, "--write-config FILE writes the config of this run"),
    "clip_l": (None, IN_THE_MODEL),
    "t5xxl": (None, IN_THE_MODEL),
    "ae": (None, IN_THE_MODEL),
    # keys of public files that no script of kohya's reads
    "sdxl": (None, UNREAD),
    "network_train_text_encoder": (None, UNREAD),
    "train_unet": (None, UNREAD),
    "train_text_encoder": (None, UNREAD),
    "noise_offset_type": (None, UNREAD),
    "no_token_padding": (None, UNREAD),
    "epoch": (None, UNREAD),
    "max_train_epoch": (None, UNREAD),
    "stop_text_encoder_training": (None, UNREAD),
    "v_pred": (None, UNREAD),
}
# Options that would change what is learned and have no counterpart: option -> (default, why and
# what to do). The run goes on without.
LEFT_OUT: dict[str, tuple[Any, str]] = {
    "face_crop_aug_range": (None, "crops are not around faces; crop the images beforehand"),
    "noise_offset_random_strength": (False, "the noise offset has one strength"),
    "ip_noise_gamma_random_strength": (False, "the perturbation has one strength"),
    "scale_v_pred_loss_like_noise_pred": (False, "write a --weighting my_weighting.py:fn"),
    "v_pred_like_loss": (None, "write a --weighting my_weighting.py:fn"),
    "weighted_captions": (False, "captions are read as they are; take the brackets out of them"),
    "caption_dropout_every_n_epochs": (0, "captions are dropped at random: caption_dropout_rate"),
    "token_warmup_step": (0, "all tags from the first step"),
    "token_warmup_min": (1, "all tags from the first step"),
    "conditioning_data_dir": (None, "put each mask next to its image, as NAME.mask.png"),
    "huber_scale": (1.0, "multiply the learning rate instead"),
    "base_weights": (None, "merge them into the base first: python merge.py mix"),
    "base_weights_multiplier": (None, "merge them into the base first: python merge.py mix"),
    "resume": (None, "without a path, --resume goes on from the newest checkpoint in OUT"),
    "resume_from_huggingface": (False, "--resume without a path goes on from a checkpoint in OUT"),
    "skip_until_initial_step": (False, "--resume without a path goes on from a checkpoint in OUT"),
    "initial_epoch": (None, "--resume without a path goes on from a checkpoint in OUT"),
    "initial_step": (None, "--resume without a path goes on from a checkpoint in OUT"),
    "validation_split": (0.0, "give a folder: --validation.images"),
    "validation_seed": (None, "--validation.seed of the noise; images are in a folder"),
    "validate_every_n_steps": (None, "--validation.every N"),
    "validate_every_n_epochs": (None, "--validation.every N, in steps"),
    "max_validation_steps": (None, "--validation.count N, in images"),
    "apply_t5_attn_mask": (False, "padding of T5 is read, as the published model does"),
    "lr_scheduler_args": (None, "give arguments of the schedule: --optimizer.schedule-args"),
    "network_multiplier": (1.0, "the strength of a LoRA is chosen at inference"),
    "custom_attributes": (None, "nothing here reads them"),
}
# Options that are translated: option -> its default.
TRANSLATED: dict[str, Any] = {
    "metadata_title": None,
    "metadata_author": None,
    "metadata_description": None,
    "metadata_license": None,
    "metadata_tags": None,
    "metadata_trigger_phrase": None,
    "no_metadata": False,
    "huggingface_repo_visibility": None,
    "config_file": None,
    "pretrained_model_name_or_path": None,
    "vae": None,
    "no_half_vae": False,
    "v_parameterization": False,
    "mixed_precision": "no",
    "full_fp16": False,
    "full_bf16": False,
    "fp8_base": False,
    "fp8_base_unet": False,
    "gradient_checkpointing": False,
    "torch_compile": False,
    "clip_skip": None,
    "max_token_length": None,
    "output_dir": None,
    "output_name": None,
    "huggingface_repo_id": None,
    "save_precision": None,
    "save_model_as": "safetensors",
    "save_every_n_epochs": None,
    "save_every_n_steps": None,
    "save_n_epoch_ratio": None,
    "save_last_n_epochs": None,
    "save_last_n_steps": None,
    "log_with": None,
    "sample_every_n_steps": None,
    "sample_every_n_epochs": None,
    "sample_prompts": None,
    "sample_sampler": "ddim",
    "seed": None,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_train_steps": 1600,
    "max_train_epochs": None,
    # data
    "dataset_config": None,
    "dataset_class": None,
    "train_data_dir": None,
    "reg_data_dir": None,
    "in_json": None,
    "dataset_repeats": 1,
    "shuffle_caption": False,
    "caption_separator": ",",
    "caption_extension": ".caption",
    "caption_extention": None,
    "keep_tokens": 0,
    "keep_tokens_separator": "",
    "secondary_separator": None,
    "enable_wildcard": False,
    "caption_prefix": None,
    "caption_suffix": None,
    "caption_dropout_rate": 0.0,
    "caption_tag_dropout_rate": 0.0,
    "color_aug": False,
    "flip_aug": False,
    "random_crop": False,
    "resolution": None,
    "resize_interpolation": None,
    "enable_bucket": False,
    "min_bucket_reso": 256,
    "max_bucket_reso": 1024,
    "bucket_reso_steps": 64,
    "bucket_no_upscale": False,
    "alpha_mask": False,
    "masked_loss": False,
    "prior_loss_weight": 1.0,
    # network
    "network_module": None,
    "network_dim": None,
    "network_alpha": 1.0,
    "network_dropout": None,
    "network_args": None,
    "network_weights": None,
    "dim_from_weights": False,
    "network_train_unet_only": False,
    "network_train_text_encoder_only": False,
    "scale_weight_norms": None,
    # optimizer
    "learning_rate": 2e-6,
    "unet_lr": None,
    "text_encoder_lr": None,
    "optimizer_type": "",
    "optimizer_args": None,
    "use_8bit_adam": False,
    "use_lion_optimizer": False,
    "max_grad_norm": 1.0,
    "lr_scheduler": "constant",
    "lr_scheduler_type": "",
    "lr_warmup_steps": 0,
    "lr_decay_steps": 0,
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1.0,
    "lr_scheduler_timescale": None,
    "lr_scheduler_min_lr_ratio": None,
    # objective
    "loss_type": "l2",
    "huber_schedule": "snr",
    "huber_c": 0.1,
    "min_snr_gamma": None,
    "debiased_estimation_loss": False,
    "noise_offset": None,
    "adaptive_noise_scale": None,
    "multires_noise_iterations": None,
    "multires_noise_discount": 0.3,
    "ip_noise_gamma": None,
    "zero_terminal_snr": False,
    "min_timestep": None,
    "max_timestep": None,
    # Flux
    "t5xxl_max_token_length": None,
    "guidance_scale": 3.5,
    "timestep_sampling": "sigma",
    "sigmoid_scale": 1.0,
    "model_prediction_type": "sigma_scaled",
    "discrete_flow_shift": 3.0,
    "weighting_scheme": "uniform",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "model_type": "flux",
    "controlnet_model_name_or_path": None,
}
LISTS = (
    "optimizer_args", "network_args", "lr_scheduler_args", "text_encoder_lr", "base_weights",
    "base_weights_multiplier",
)  # fmt: skip
KOHYA_DEFAULTS: dict[str, Any] = {
    **TRANSLATED,
    **{name: default for name, (default, _) in (IGNORED | LEFT_OUT).items()},
}


def read_config_file(path: Path) -> dict[str, Any]:
    """Option -> value, of the file that --config_file takes: a TOML file whose sections are only
    for the eye. A name without .toml gets it. Empty texts are options that are not set.

    Raises UserError for no file, no TOML, one option in two sections with other values, and a value
    of the wrong kind.
    """
    if path.suffix != ".toml":
        path = path.with_name(f"{path.name}.toml")
    given: dict[str, Any] = {}
    for name, value in read_foreign_toml(path).items():
        inner = value if isinstance(value, dict) else {name: value}
        for key, own in inner.items():
            if key in given and given[key] != own:
                raise UserError(
                    f"{path} has {key} twice, {shorten_value(given[key])} and "
                    f"{shorten_value(own)}; leave one of them out"
                )
            given[key] = own
    return check_given(without_empty(given), f"{path}: ")


def check_given(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The known options with values of the kind that kohya reads, and the unknown ones as they are.

    Raises UserError, which begins with `where`, for a value of another kind or out of range.
    """
    return {
        name: check_value(name, value, kind_of(name), where) if name in KOHYA_DEFAULTS else value
        for name, value in given.items()
    }


def kind_of(name: str) -> str:
    """What the value of an option of the training file or the dataset file is to be."""
    return expected_kind(name, KOHYA_DEFAULTS.get(name), is_read=name not in IGNORED)


def without_empty(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options without empty texts, which programs with a window write for those not set."""
    return {name: value for name, value in given.items() if value != ""}


def read_foreign_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file that is no config of ours. Raises UserError for another file."""
    try:
        return parse_toml(read_text(path, LONGEST_TOML), str(path))
    except FileNotFoundError:
        raise missing_config(path) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a TOML file") from None


def read_flags(words: Sequence[str]) -> dict[str, Any]:
    """Option -> value, of a command line of kohya's scripts: --network_dim=8 or --network_dim 8,
    several values for the options that take a list, none for switches.

    Raises UserError for a word that is no flag, an unknown flag, and a flag without its value or
    with one of the wrong kind.
    """
    given: dict[str, Any] = {}
    rest = list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--"):
            raise UserError(f"{flag} is no flag of {TOOL}'s script; write --OPTION=VALUE")
        if name not in KOHYA_DEFAULTS:
            hint = "; the nearest is --{}"
            near = nearest_hint(name, KOHYA_DEFAULTS, hint) or "; leave it out"
            raise UserError(f"{flag} is no flag of {TOOL}'s script{near}")
        if name in LISTS:
            values = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            given[name] = values
        elif isinstance(KOHYA_DEFAULTS[name], bool) and not equals:
            given[name] = True
        else:
            if not equals and (not rest or rest[0].startswith("--")):
                raise UserError(f"{flag} has no value; write {flag}=VALUE")
            given[name] = read_value(value if equals else rest.pop(0), kind_of(name))
    return check_given(given, "")


def read_value(text: str, kind: str) -> Any:
    """A value of the command line: a number or a truth value where it is written as one."""
    if kind in (TEXT, SIDES, PROMPTS):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_pairs(values: Any, option: str) -> dict[str, str]:
    """The KEY=VALUE texts of network_args and optimizer_args. Raises UserError for others."""
    texts = [values] if isinstance(values, str) else list(values or [])
    pairs = {}
    for text in texts:
        key, equals, value = str(text).partition("=")
        if not equals:
            raise UserError(f"{option} of {TOOL} has {text!r}; expected KEY=VALUE")
        pairs[key.strip()] = value.strip()
    return pairs
