"""kohya's config files as runs: key sets of public files, and the bits of a run by our flags."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import train
from lora_core.config import Config, ValidationConfig
from lora_core.data.step_visits import StepOrder
from lora_core.errors import UserError
from lora_core.toml import from_table, read_toml, to_toml
from models import read_layout
from tests import tiny_flux, tiny_sdxl
from tests.conftest import final, same, save_photos
from training import setup
from training.checks.config_checks import check_config
from training.checks.model_checks import plan_adapters
from training.translation.kohya_objective import translate_objective
from training.translation.kohya_options import KOHYA_DEFAULTS, read_config_file, read_flags
from training.translation.kohya_runs import translate_run
from training.translation.translated_options import TranslatedOptions


@pytest.fixture
def data(tmp_path: Path) -> Path:
    save_photos(tmp_path / "data" / "3_TOK", "TOK, a, b, c", side=16)
    save_photos(tmp_path / "reg" / "1_thing", "thing", side=16, count=2)
    return tmp_path


# Keys of seven public files, with values for a tiny model: flat, and with sections of every kind.
PUBLIC: dict[str, dict[str, Any]] = {
    "flat": {
        "caption_extension": ".txt", "resolution": "16,16", "cache_latents": True,
        "enable_bucket": True, "bucket_no_upscale": True, "bucket_reso_steps": 8,
        "network_module": "networks.lora", "network_dim": 8, "text_encoder_lr": 5e-5,
        "unet_lr": 1e-4, "optimizer_type": "AdamW8bit", "lr_scheduler": "cosine",
        "save_precision": "fp16", "max_train_epochs": 1, "xformers": True,
        "shuffle_caption": True, "keep_tokens": 1,
    },
    "colab": {
        "dataset_arguments": {
            "resolution": 16, "enable_bucket": True, "min_bucket_reso": 8, "max_bucket_reso": 32,
            "bucket_reso_steps": 8, "bucket_no_upscale": False, "caption_extension": ".txt",
            "shuffle_caption": True, "keep_tokens": 1,
        },
        "training_arguments": {
            "output_name": "x", "save_model_as": "safetensors", "save_precision": "fp16",
            "save_every_n_epochs": 1, "max_train_epochs": 2, "train_batch_size": 1,
            "gradient_checkpointing": True, "gradient_accumulation_steps": 2,
            "learning_rate": 1e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 0,
            "optimizer_type": "AdamW8bit", "mixed_precision": "fp16", "seed": 42,
            "max_data_loader_n_workers": 2, "persistent_data_loader_workers": True,
            "max_token_length": 75, "xformers": True, "cache_latents": True,
            "cache_latents_to_disk": True,
        },
        "network_arguments": {
            "network_module": "networks.lora", "network_dim": 16, "network_alpha": 8,
            "network_train_unet_only": True, "network_train_text_encoder": False,
        },
        "sample_prompt_arguments": {"sample_every_n_epochs": 0},
        "logging_arguments": {"log_with": "tensorboard", "logging_dir": "logs"},
    },
    "character": {
        "model": {
            "v2": False, "v_parameterization": False, "sdxl": True,
            "network_module": "networks.lora", "network_dim": 64, "network_alpha": 32,
            "network_dropout": 0.0, "network_args": [],
        },
        "paths": {"output_name": "x", "logging_dir": "logs", "log_prefix": "p"},
        "training": {
            "optimizer_type": "AdamW8bit", "mixed_precision": "bf16", "full_bf16": True,
            "gradient_checkpointing": True, "train_batch_size": 1,
            "gradient_accumulation_steps": 2, "learning_rate": 1e-4, "text_encoder_lr": 6e-5,
            "unet_lr": 1e-4, "lr_scheduler": "cosine_with_restarts",
            "lr_scheduler_num_cycles": 1, "lr_warmup_steps": 1, "max_train_epochs": 1,
            "resolution": "16", "caption_extension": ".txt",
        },
    },
    "generated": {
        "dataset": {"color_aug": False, "flip_aug": False, "random_crop": False,
                    "caption_dropout_rate": 0.05, "resolution": "16,16",
                    "caption_extension": ".txt"},
        "training": {"save_every_n_steps": 2, "max_train_steps": 4, "train_batch_size": 1,
                     "gradient_accumulation_steps": 1, "mixed_precision": "bf16", "seed": 42,
                     "clip_skip": 1, "cache_latents_to_disk": True},
        "optimizer": {"optimizer_type": "AdamW8bit", "learning_rate": 1e-4,
                      "lr_scheduler": "cosine", "lr_warmup_steps": 2},
        "network": {"network_module": "networks.lora", "network_dim": 4, "network_alpha": 4,
                    "network_train_unet_only": True},
    },
    "trial": {
        "network": {"network_module": "networks.lora", "network_dim": 64, "network_alpha": 32,
                    "network_dropout": 0.1},
        "training": {
            "resolution": "16,16", "learning_rate": 8e-5, "text_encoder_lr": 5e-5,
            "unet_lr": 8e-5, "lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 1,
            "optimizer_type": "AdamW", "max_train_epochs": 2, "train_batch_size": 2,
            "gradient_accumulation_steps": 2, "min_snr_gamma": 5.0, "noise_offset": 0.05,
            "random_crop": False, "color_aug": False, "flip_aug": False,
            "save_every_n_epochs": 1, "save_precision": "fp16", "mixed_precision": "fp16",
            "logging_dir": "logs", "max_data_loader_n_workers": 4, "seed": 42,
            "caption_extension": ".txt",
        },
    },
    "illustrious": {
        "network": {"network_dim": 8, "network_alpha": 4, "network_module": "lycoris.kohya",
                    "network_args": ["algo=lora", "dora_wd=True", "conv_dim=4", "conv_alpha=2"]},
        "training": {
            "mixed_precision": "bf16", "full_bf16": True, "train_batch_size": 1,
            "max_train_epochs": 1, "xformers": True, "cache_text_encoder_outputs": True,
            "clip_skip": 1, "noise_offset": 0.0, "min_snr_gamma": 5.0, "resolution": 16,
            "v_parameterization": False, "zero_terminal_snr": False, "learning_rate": 1e-4,
            "lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3,
            "caption_extension": ".txt",
        },
        "saving": {"save_every_n_epochs": 1, "save_model_as": "safetensors",
                   "save_precision": "bf16", "output_name": "x"},
    },
    "prodigy": {
        "network_arguments": {"network_module": "networks.lora", "network_dim": 32,
                              "network_alpha": 32},
        "optimizer_arguments": {
            "optimizer_type": "Prodigy", "learning_rate": 1.0, "resolution": 16,
            "optimizer_args": ["d_coef=2", "use_bias_correction=True", "safeguard_warmup=True"],
        },
        "training_arguments": {"max_train_steps": 4, "noise_offset": 0.0357, "min_snr_gamma": 5.0,
                               "caption_extension": ".txt"},
        "sample_prompts": {"sample_every_n_steps": 2, "sample_sampler": "euler_a",
                           "sample_prompts": ["a TOK on a hill", "a TOK --w 16 --s 4"]},
    },
}  # fmt: skip


def write_file(folder: Path, table: dict[str, Any], model: str, **more: Any) -> Path:
    own = {"pretrained_model_name_or_path": model, "train_data_dir": str(folder / "data")}
    path = folder / "train_network_config.toml"
    path.write_text(tomli_w.dumps(own | {"output_dir": str(folder / "out")} | more | table))
    return path


@pytest.mark.parametrize("name", PUBLIC)
def test_public_files_become_configs_that_pass_every_check(
    name: str, data: Path, model: Path
) -> None:
    given = read_config_file(write_file(data, PUBLIC[name], str(model)))
    run = translate_run(given)
    check_config(run.config)
    table = run.format_tables()
    assert max(map(len, table.splitlines())) <= 100
    told = {entry.name for entry in run.records[0].entries}
    assert told >= given.keys()
    assert from_table(tomllib.loads(to_toml(run.config))) == run.config


def test_a_file_trains_the_bits_of_the_same_run_by_our_flags(
    data: Path, model: Path, quick: None
) -> None:
    table = PUBLIC["flat"] | {"train_batch_size": 2, "lr_warmup_steps": 0.1, "seed": 3}
    table |= {"network_args": ["conv_dim=2", "conv_alpha=1"], "noise_offset": 0.05}
    table |= {"reg_data_dir": str(data / "reg"), "prior_loss_weight": 0.5, "min_snr_gamma": 5}
    table |= {"output_name": "theirs"}
    run = translate_run(read_config_file(write_file(data, table, str(model))))
    by_hand = f"""
model = "{model}"
out = "{data}/out/ours"
seed = 3
batch_size = 2
weighting = "min_snr"
weighting_arg = {{ gamma = 5.0 }}
[data]
captions = "txt"
caption_extension = ".txt"
caption_lines = "first"
shuffle_caption = true
keep_tokens = 1
resolution = 16
buckets = true
bucket_step = 8
bucket_upscale = false
[[data.subsets]]
images = "{data}/data/3_TOK"
repeats = 3
caption = "TOK"
[[data.subsets]]
images = "{data}/reg/1_thing"
repeats = 1
caption = "thing"
prior = true
[prior]
weight = 0.5
[noise]
offset = 0.05
[adapter]
rank = 8
alpha = 1.0
init = "kaiming"
targets = ["all", "*.downsamplers.*.conv", "*.upsamplers.*.conv"]
text_targets = ["kohya"]
rank_pattern = {{ "*.conv1" = 2, "*.conv2" = 2, "*.conv" = 2 }}
alpha_pattern = {{ "*.conv1" = 1, "*.conv2" = 1, "*.conv" = 1 }}
[optimizer]
lr = {{ denoiser = 1e-4, text_encoder = 5e-5 }}
schedule = "cosine"
warmup = {int(0.1 * run.config.steps)}
[[stages]]
steps = {run.config.steps}
groups = ["denoiser", "text_encoder"]
"""
    (data / "ours.toml").write_text(by_hand)
    ours: Config = read_toml(data / "ours.toml")
    plain = ValidationConfig(every=-1)
    folders = []
    for config in (run.config, ours):
        samples = replace(config.samples, steps=1, prompts=("a TOK",))
        folders.append(train.train(replace(config, validation=plain, samples=samples)))
    assert same(*map(final, folders))
    assert (folders[0] / "theirs.safetensors").is_file()


def test_an_epoch_visits_what_kohyas_does(data: Path, model: Path) -> None:
    """Each image N times and as many class images, in the number of batches of its sampler."""
    table = PUBLIC["trial"]["training"] | PUBLIC["trial"]["network"]
    table |= {"reg_data_dir": str(data / "reg"), "gradient_accumulation_steps": 1}
    run = translate_run(read_config_file(write_file(data, table, str(model))))
    assert run.config.steps == 2 * 15  # epochs x 30 images / 2
    found = setup.open_data(replace(run.config, validation=ValidationConfig(every=-1)))
    order = StepOrder(found.training, None, batch=2, seed=42)
    names: list[str] = []
    for step in range(15):
        names += [found.training.records[v.record].path.parent.name for v in order.visits(step)]
    assert names.count("3_TOK") == 15 and names.count("1_thing") == 15


def test_flags_win_over_the_file(data: Path, model: Path) -> None:
    given = read_config_file(write_file(data, PUBLIC["flat"], str(model)))
    flags = read_flags(["--network_dim=4", "--unet_lr", "1e-3", "--network_args", "conv_dim=2",
                        "conv_alpha=1", "--flip_aug"])  # fmt: skip
    config = translate_run(given | flags).config
    assert config.adapter.rank == 4 and config.optimizer.lr["denoiser"] == 1e-3
    assert config.adapter.rank_pattern["*.conv1"] == 2 and config.data.flip
    for words, message in (
        (["--network_dims=4"], "nearest is --network_dim"),
        (["--network_dim"], "has no value"),
        (["x"], "is no flag"),
    ):
        with pytest.raises(UserError, match=message):
            read_flags(words)


def test_mistakes_in_files_are_one_sentence(data: Path, model: Path) -> None:
    path = write_file(data, {"a": {"seed": 1}, "b": {"seed": 2}}, str(model))
    with pytest.raises(UserError, match="has seed twice, 1 and 2"):
        read_config_file(path)
    path = write_file(data, {"vae": ""}, str(model))
    assert "vae" not in read_config_file(path.with_suffix(""))
    with pytest.raises(UserError, match=r"network_dims is no option.*network_dim:"):
        translate_run({"network_dims": 4})
    with pytest.raises(UserError, match="no config file"):
        read_config_file(data / "none.toml")
    with pytest.raises(UserError, match="give the base model"):
        translate_run({"network_module": "networks.lora"})


OBJECTIVES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"min_timestep": 100, "max_timestep": 900}, "", {"noise.low": 0.1, "noise.high": 0.9}),
    ({"max_timestep": 1000}, "", {}),
    ({"loss_type": "huber"}, "", {"loss": "huber", "loss_arg.delta": 0.1,
                                  "loss_arg.schedule": "snr"}),
    ({"noise_offset": 0.1, "adaptive_noise_scale": 0.02}, "",
     {"noise.offset": 0.1, "noise.adaptive_offset": 0.02}),
    ({"multires_noise_iterations": 6}, "",
     {"noise.multires_levels": 6, "noise.multires_discount": 0.3}),
    ({"debiased_estimation_loss": True}, "", {"weighting": "debiased"}),
    ({"masked_loss": True, "alpha_mask": True}, "",
     {"data.masks": "any", "mask_scale": "unnormalized"}),
    ({"model_prediction_type": "raw"}, "flux1", {"noise.guidance": 3.5, "noise.shift": 3.0}),
    ({"timestep_sampling": "shift", "discrete_flow_shift": 1.15}, "flux1",
     {"noise.guidance": 3.5, "noise.shift": 1.15, "noise.density": "logit_normal",
      "noise.density_args.std": 1.0}),
    ({"timestep_sampling": "flux_shift"}, "flux1",
     {"noise.guidance": 3.5, "noise.dynamic_shift": True, "noise.density": "logit_normal",
      "noise.density_args.std": 1.0}),
    # a descending table of timesteps: kohya's mean has the other sign
    ({"weighting_scheme": "logit_normal", "logit_mean": 1.0, "discrete_flow_shift": 1.0}, "flux1",
     {"noise.guidance": 3.5, "noise.shift": 1.0, "noise.density": "logit_normal",
      "noise.density_args.mean": -1.0, "noise.density_args.std": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "version", "ours"), OBJECTIVES)
def test_noise_levels_and_losses(given: dict[str, Any], version: str, ours: dict[str, Any]) -> None:
    options = TranslatedOptions("kohya", KOHYA_DEFAULTS, given)
    translate_objective(options, version)
    assert options.options == ours


def test_the_scripts_of_sdxl_and_flux(data: Path) -> None:
    tiny_sdxl.save(data / "sdxl")
    tiny_flux.save(data / "flux")
    common = {"learning_rate": 1e-3, "resolution": 16, "caption_extension": ".txt"}
    common |= {"max_train_steps": 2}
    weights = "down_lr_weight=0,0.5,0,1"
    given = common | {"network_module": "networks.lora", "clip_skip": 2, "no_half_vae": True}
    given |= {"network_args": ["conv_dim=2", "conv_alpha=1", weights]}
    path = write_file(data, given, str(data / "sdxl"))
    config = translate_run(read_config_file(path), script="sdxl").config
    check_config(config)
    assert config.clip_skip == 0 and "down_blocks.0.resnets.1.*" in config.adapter.exclude
    assert set(config.optimizer.lr_pattern.values()) == {0.5}
    plan_adapters(config, read_layout(config.model))
    given = common | {"network_module": "networks.lora_flux", "network_train_unet_only": True}
    given |= {"timestep_sampling": "shift", "discrete_flow_shift": 3.1, "guidance_scale": 1.0}
    given |= {"network_args": ["train_blocks=single"], "clip_l": "l.safetensors"}
    path = write_file(data, given, str(data / "flux"))
    config = translate_run(read_config_file(path)).config
    check_config(config)
    assert config.noise.shift == 3.1 and config.noise.guidance == 1.0
    assert config.noise.density == "logit_normal"
    (spec,) = plan_adapters(config, read_layout(config.model)).values()
    assert spec.targets and config.stages[0].groups == ("denoiser",)
