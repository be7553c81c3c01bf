"""Entries ss_* of a training: the names, words and values of kohya's sd-scripts."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

import train
from lora_core.config import Config, Stage
from tests.manager_readers import raw_header
from tests.test_configs import put
from tests.test_single_file import save_single_file
from training.headers.kohya_entries import _flow_entries

# metadata of train_network.py, sd-scripts 48d368fa (2026-02-16), lines 1003 to 1221
NAMES = """
ss_session_id ss_training_started_at ss_output_name ss_learning_rate ss_text_encoder_lr
ss_unet_lr ss_num_train_images ss_num_validation_images ss_num_reg_images
ss_num_batches_per_epoch ss_num_epochs ss_gradient_checkpointing ss_gradient_accumulation_steps
ss_max_train_steps ss_lr_warmup_steps ss_lr_scheduler ss_network_module ss_network_dim
ss_network_alpha ss_network_dropout ss_mixed_precision ss_full_fp16 ss_v2 ss_base_model_version
ss_clip_skip ss_max_token_length ss_cache_latents ss_seed ss_lowram ss_noise_offset
ss_multires_noise_iterations ss_multires_noise_discount ss_adaptive_noise_scale
ss_zero_terminal_snr ss_training_comment ss_sd_scripts_commit_hash ss_optimizer ss_max_grad_norm
ss_caption_dropout_rate ss_caption_dropout_every_n_epochs ss_caption_tag_dropout_rate
ss_face_crop_aug_range ss_prior_loss_weight ss_min_snr_gamma ss_scale_weight_norms
ss_ip_noise_gamma ss_debiased_estimation ss_noise_offset_random_strength
ss_ip_noise_gamma_random_strength ss_loss_type ss_huber_schedule ss_huber_scale ss_huber_c
ss_fp8_base ss_fp8_base_unet ss_validation_seed ss_validation_split ss_max_validation_steps
ss_validate_every_n_epochs ss_validate_every_n_steps ss_resize_interpolation ss_datasets
ss_tag_frequency ss_dataset_dirs ss_batch_size_per_device ss_total_batch_size ss_resolution
ss_color_aug ss_flip_aug ss_random_crop ss_shuffle_caption ss_enable_bucket ss_bucket_no_upscale
ss_min_bucket_reso ss_max_bucket_reso ss_keep_tokens ss_reg_dataset_dirs ss_bucket_info
ss_network_args ss_sd_model_name ss_sd_model_hash ss_new_sd_model_hash ss_vae_name ss_vae_hash
ss_new_vae_hash ss_training_finished_at ss_steps ss_epoch
"""
SD_SCRIPTS = set(NAMES.split())
# update_metadata of flux_train_network.py
FLUX_NAMES = """
ss_model_type ss_apply_t5_attn_mask ss_weighting_scheme ss_logit_mean ss_logit_std ss_mode_scale
ss_guidance_scale ss_timestep_sampling ss_sigmoid_scale ss_model_prediction_type
ss_discrete_flow_shift
"""
OF_FLUX = set(FLUX_NAMES.split())


def header_of(config: Config, values: dict[str, Any]) -> dict[str, str]:
    stages = {"stages": (Stage(3, groups=("denoiser",)),)}
    return raw_header(train.train(put(config, stages | values)) / "run.safetensors")


def test_every_name_is_one_of_sd_scripts(config: Config, quick: None) -> None:
    found = {key for key in header_of(config, {}) if key.startswith("ss_")}
    assert found <= SD_SCRIPTS and len(found) > 55
    assert set(_flow_entries(config)) <= OF_FLUX


def test_values_are_those_of_the_run(config: Config, quick: None) -> None:
    values = {
        "batch_size": 2,
        "accumulation": 2,
        "seed": 7,
        "optimizer.lr": {"denoiser": 0.25},
        "optimizer.name": "adamw",
        "optimizer.args": {"eps": 1e-06},
        "optimizer.schedule": "cosine_restarts",
        "optimizer.warmup": 1,
        "optimizer.lora_plus": 16.0,
        "adapter.rank_dropout": 0.25,
        "adapter.dropout": 0.125,
        "noise.offset": 0.05,
        "noise.perturbation": 0.1,
        "loss": "huber",
        "loss_arg": {"delta": 0.3},
        "weighting": "min_snr",
        "data.caption_dropout": 0.5,
        "optimizer.max_update_norm": 4.0,
        "noise.adaptive_offset": 0.5,
    }
    found = header_of(config, values)
    expected = {
        "ss_batch_size_per_device": "2",
        "ss_total_batch_size": "4",
        "ss_gradient_accumulation_steps": "2",
        "ss_num_batches_per_epoch": "3",  # 5 images
        "ss_steps": "3",
        "ss_max_train_steps": "3",
        "ss_num_epochs": "3",  # 12 visits of 5 images: 2.4
        "ss_epoch": "3",
        "ss_seed": "7",
        "ss_unet_lr": "0.25",
        "ss_learning_rate": "0.25",
        "ss_text_encoder_lr": "None",
        "ss_lr_scheduler": "cosine_with_restarts",
        "ss_lr_warmup_steps": "1",
        "ss_network_dropout": "0.125",
        "ss_network_args": '{"rank_dropout": "0.25", "loraplus_lr_ratio": "16.0"}',
        "ss_noise_offset": "0.05",
        "ss_ip_noise_gamma": "0.1",
        "ss_multires_noise_iterations": "None",
        "ss_loss_type": "huber",
        "ss_huber_c": "0.3",
        "ss_min_snr_gamma": "5.0",
        "ss_debiased_estimation": "False",
        "ss_caption_dropout_rate": "0.5",
        "ss_scale_weight_norms": "4.0",
        "ss_adaptive_noise_scale": "0.5",
        "ss_max_token_length": "None",
        "ss_resolution": f"({config.data.resolution}, {config.data.resolution})",
        "ss_mixed_precision": "no",
        "ss_training_started_at": "1700000000.0",
        "ss_sd_model_name": Path(config.model).name,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["ss_optimizer"].endswith(".AdamW(eps=1e-06)")
    assert "ss_sd_model_hash" not in found  # a folder has none


def test_rates_are_those_of_the_first_stage_of_a_group(config: Config, quick: None) -> None:
    stages = (
        Stage(1, groups=("tokens",), lr={"tokens": 0.5}),
        Stage(1, groups=("denoiser",), lr={"denoiser": 0.25}),
        Stage(1, groups=("denoiser", "text_encoder"), lr={"denoiser": 0.1, "text_encoder": 0.2}),
    )
    found = header_of(config, {"stages": stages})
    rates = [found[f"ss_{name}"] for name in ("learning_rate", "unet_lr", "text_encoder_lr")]
    assert rates == ["0.25", "0.25", "0.2"]


def test_a_model_of_one_file_has_its_hashes(config: Config, plain: None, tmp_path: Path) -> None:
    file = tmp_path / "base.safetensors"
    save_single_file(config.model, file)
    found = header_of(config, {"model": str(file), "model_config": config.model})
    data = file.read_bytes()
    assert found["ss_sd_model_name"] == file.name
    assert found["ss_new_sd_model_hash"] == hashlib.sha256(data).hexdigest()
    old = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert found["ss_sd_model_hash"] == old


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, ("sigma", "uniform", 1.0)),
        ({"noise.density": "logit_normal"}, ("sigmoid", "none", 1.0)),
        ({"noise.density": "logit_normal", "noise.shift": 3.0}, ("shift", "none", 3.0)),
        (
            {"noise.density": "logit_normal", "noise.dynamic_shift": True},
            ("flux_shift", "none", 1.0),
        ),
        ({"noise.density": "cosmap"}, ("sigma", "cosmap", 1.0)),
    ],
)
def test_densities_of_flow_models_have_sd_scripts_names(
    values: dict[str, Any], expected: tuple[str, str, float]
) -> None:
    found = _flow_entries(put(Config(), values))
    names = ("ss_timestep_sampling", "ss_weighting_scheme", "ss_discrete_flow_shift")
    assert tuple(found[name] for name in names) == expected
    shifted = put(Config(), {"noise.density": "logit_normal", "noise.density_args": {"mean": 1.0}})
    assert _flow_entries(shifted)["ss_logit_mean"] == -1.0  # its sign is the opposite one
