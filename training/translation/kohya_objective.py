"""kohya's model, precision, noise and loss as options of ours."""

from __future__ import annotations

from typing import Any

from training.translation.translated_options import TranslatedOptions

PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
FILE_PRECISIONS = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}
LOSSES = {"l2": "mse", "l1": "l1", "huber": "huber", "smooth_l1": "smooth_l1"}
LENGTHS = (150, 225)  # tokens of a caption; its usual 75 are ours
TIMESTEPS = 1000  # of the schedule that min_timestep and max_timestep count


def translate_model(options: TranslatedOptions, version: str) -> None:
    """Record the model and its precision. `version`: "sdxl...", "flux..." or another."""
    options.take(
        "pretrained_model_name_or_path", {"model": options["pretrained_model_name_or_path"]}
    )
    if options["vae"]:
        options.take("vae", {"vae": options["vae"]})
    if options["v_parameterization"]:
        options.take("v_parameterization", {"noise.prediction": "v_prediction"})
    precision = PRECISIONS.get(str(options["mixed_precision"]))
    if precision is None:
        raise options.refuse("mixed_precision", f"choose {', '.join(PRECISIONS)}")
    ours = {"precision": precision}
    if not options["no_half_vae"] and not version.startswith("flux"):
        ours["vae_precision"] = precision
    options.take("mixed_precision", ours)
    if options["no_half_vae"]:
        options.take("no_half_vae", {"vae_precision": "fp32"})
    for name in ("full_fp16", "full_bf16"):
        if options[name]:
            options.change(name, {}, "adapters train in fp32")
    for name in ("fp8_base", "fp8_base_unet"):
        if options[name]:
            options.take(name, {"quantize": "fp8"})
    if options["gradient_checkpointing"]:
        options.take("gradient_checkpointing", {"gradient_checkpointing": "all"})
    if options["torch_compile"]:
        options.take("torch_compile", {"compile": True})
    _record_clip_skip(options, version)
    if options["max_token_length"] in LENGTHS:
        options.take("max_token_length", {"max_token_length": options["max_token_length"]})


def _record_clip_skip(options: TranslatedOptions, version: str) -> None:
    if not options["clip_skip"]:
        return
    if version.startswith(("sdxl", "flux")):
        options.ignore("clip_skip", "kohya's script does not read it for this model")
    else:
        skipped = int(options["clip_skip"]) - 1
        options.take("clip_skip", {"clip_skip": skipped} if skipped else {}, "counted from 1 there")


def translate_objective(options: TranslatedOptions, version: str) -> None:
    """Record noise, noise levels, loss and masks."""
    if version.startswith("flux"):
        _translate_flow(options)
    else:
        _translate_levels(options)
    _translate_noise(options)
    loss = LOSSES.get(str(options["loss_type"]))
    if loss is None:
        raise options.refuse("loss_type", f"choose {', '.join(LOSSES)}")
    if options.is_given("loss_type"):
        options.take("loss_type", {"loss": loss})
    for name, argument in (("huber_c", "delta"), ("huber_schedule", "schedule")):
        if loss in ("huber", "smooth_l1"):
            options.take(name, {f"loss_arg.{argument}": options[name]})
        elif options.is_given(name):
            options.ignore(name, f"not read by {options['loss_type']}")
    gamma = options["min_snr_gamma"]
    if gamma and options["debiased_estimation_loss"]:
        raise options.refuse("min_snr_gamma", "debiased_estimation_loss is another; choose one")
    if gamma:
        ours = {"weighting": "min_snr", "weighting_arg.gamma": float(gamma)}
        options.take("min_snr_gamma", ours)
    if options["debiased_estimation_loss"]:
        options.take("debiased_estimation_loss", {"weighting": "debiased"})
    if options["masked_loss"] or options["alpha_mask"]:
        name = "masked_loss" if options["masked_loss"] else "alpha_mask"
        masks = "any" if options["alpha_mask"] else "auto"
        options.take(name, {"data.masks": masks, "mask_scale": "unnormalized"})


def _translate_noise(options: TranslatedOptions) -> None:
    simple = {
        "noise_offset": "noise.offset",
        "adaptive_noise_scale": "noise.adaptive_offset",
        "ip_noise_gamma": "noise.perturbation",
    }
    for name, option in simple.items():
        if options[name]:
            options.take(name, {option: float(options[name])})
    if options["multires_noise_iterations"]:
        levels = int(options["multires_noise_iterations"])
        options.take("multires_noise_iterations", {"noise.multires_levels": levels})
        discount = float(options["multires_noise_discount"])
        options.take("multires_noise_discount", {"noise.multires_discount": discount})
    elif options.is_given("multires_noise_discount"):
        options.ignore("multires_noise_discount", "not read without multires_noise_iterations")
    if options["zero_terminal_snr"]:
        options.take("zero_terminal_snr", {"noise.zero_terminal_snr": True})
    for name, option in (("min_timestep", "noise.low"), ("max_timestep", "noise.high")):
        if options[name] is not None:
            share = float(options[name]) / TIMESTEPS
            options.take(name, {option: share} if share not in (0, 1) else {})


def _translate_levels(options: TranslatedOptions) -> None:
    """Options of Flux, which the scripts of other models do not have."""
    for name in FLOW_OPTIONS:
        if options.is_given(name):
            options.ignore(name, "of Flux only")


FLOW_OPTIONS = (
    "guidance_scale", "timestep_sampling", "sigmoid_scale", "model_prediction_type",
    "discrete_flow_shift", "weighting_scheme", "logit_mean", "logit_std", "mode_scale",
    "t5xxl_max_token_length",
)  # fmt: skip


def _translate_flow(options: TranslatedOptions) -> None:
    """Record the noise levels of Flux."""
    options.take("guidance_scale", {"noise.guidance": float(options["guidance_scale"])})
    sampling = options["timestep_sampling"]
    shift, scale = float(options["discrete_flow_shift"]), float(options["sigmoid_scale"])
    normal: dict[str, Any] = {"noise.density": "logit_normal", "noise.density_args.std": scale}
    read = {"timestep_sampling"}
    if sampling == "sigma":
        options.take("timestep_sampling", _scheme(options))
        options.take("discrete_flow_shift", {"noise.shift": shift})
        read |= {"discrete_flow_shift", "weighting_scheme", "logit_mean", "logit_std", "mode_scale"}
    elif sampling == "uniform":
        options.take("timestep_sampling", {})
    elif sampling in ("sigmoid", "shift", "flux_shift"):
        own = dict(normal)
        if sampling == "flux_shift":
            own["noise.dynamic_shift"] = True
        options.take("timestep_sampling", own)
        read.add("sigmoid_scale")
        if sampling == "shift":
            options.take("discrete_flow_shift", {"noise.shift": shift})
            read.add("discrete_flow_shift")
    else:
        raise options.refuse(
            "timestep_sampling", "choose sigma, uniform, sigmoid, shift or flux_shift"
        )
    told = {entry.name for entry in options.entries}
    for name in FLOW_OPTIONS[1:]:
        if options.is_given(name) and name not in told and name != "t5xxl_max_token_length":
            if name in read:
                options.take(name, {})
            elif name != "model_prediction_type":
                options.ignore(name, f"not read with timestep_sampling = {sampling}")
    if options["model_prediction_type"] == "raw":
        options.take("model_prediction_type", {})
    else:
        options.change(
            "model_prediction_type",
            {},
            "raw: the loss is on the network's own output, the velocity",
        )
    if options["t5xxl_max_token_length"]:
        length = int(options["t5xxl_max_token_length"])
        options.take("t5xxl_max_token_length", {"max_sequence_length": length})


def _scheme(options: TranslatedOptions) -> dict[str, Any]:
    """The density of noise levels of a weighting_scheme, or its weight."""
    scheme = options["weighting_scheme"]
    if scheme == "logit_normal":
        mean, std = -float(options["logit_mean"]), float(options["logit_std"])  # towards noise here
        return {
            "noise.density": "logit_normal",
            "noise.density_args.mean": mean,
            "noise.density_args.std": std,
        }
    if scheme == "mode":
        return {"noise.density": "mode", "noise.density_args.scale": float(options["mode_scale"])}
    if scheme in ("sigma_sqrt", "cosmap"):
        return {"weighting": scheme}
    return {}
