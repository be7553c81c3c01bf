"""What models of rectified flow have in common: schedule, steps of samplers, packed latents.

The three families are `models.flux`, `models.sd3` and `models.flux2`. A transformer predicts the
velocity eps - x0 (arXiv 2210.02747, 2403.03206); its scheduler_config.json is that of diffusers'
FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from lora_core.diffusion import noise
from lora_core.diffusion.noise import Schedule, shift_sigmas
from lora_core.diffusion.sampling import Spacing
from lora_core.errors import UserError
from lora_core.family import Conditioning, Family, LoadOptions, Sizes
from models.components import (
    check_tokenizers,
    decode_latents,
    encode_pixels,
    freeze_network,
    load_network,
    make_meta_network,
    open_tokenizer,
    read_json,
    read_resolution,
)

PATCH = 2  # latent pixels per token, in height and in width
TIMESTEPS = 1000  # of the schedule; networks that read a timestep get sigma times this
SHIFTS = {  # keys of scheduler_config.json that are read -> diffusers' defaults
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
OTHER_STEPS = (  # keys that are refused
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
LONGEST = 512  # tokens of a prompt: the limit of all pipelines
TRANSFORMER_CONFIG = "transformer/config.json"


class FlowFamily:
    """The members of a `Family` that are the same for every model of rectified flow.

    A family derives from it and adds `name`, `tokenize`, `encode`, `denoise` and its layout. The
    VAE stays in fp32 or better; transformer and text encoders are in the base precision.
    """

    denoiser = "transformer"
    first_layer = "context_embedder"  # of the transformer, whose device and dtype are the network's
    prediction = "flow"
    attended: tuple[str, ...] = ()
    inpainting = False
    embeds_sizes = False
    distilled_guidance = False
    zeros: tuple[str, ...] = ()
    spacing: Spacing = "trailing"  # unused: a flow has one layout of its timesteps
    offset = 0  # unused
    pipeline_loads_tokens = True  # diffusers' class has load_textual_inversion
    own_steps = 0  # of a sampler, for a model that was distilled to few; 0: as many as you like
    working_device: torch.device | None = None  # of networks that come there to work

    def __init__(
        self, modules: dict[str, Any], tokenizers: dict[str, Any], scheduler: dict[str, Any]
    ):
        self.modules: dict[str, nn.Module] = modules
        self.tokenizers = tokenizers
        self.scheduler = scheduler
        self.has_dynamic_shift = bool(scheduler.get("use_dynamic_shifting"))
        self.transformer: Any = modules["transformer"]
        self.vae: Any = modules["vae"]
        self.checked_prompts = {name: set[str]() for name in tokenizers}
        self.schedule = self.schedule_at(0, 0)
        self.latent_channels = self.vae.config.latent_channels
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.multiple = PATCH * self.factor
        self.resolution = read_resolution(self.vae.config.sample_size)
        check_tokenizers(tokenizers, modules)
        for module in modules.values():
            freeze_network(module)

    @property
    def device(self) -> torch.device:
        # diffusers' own property looks at every module
        return self.working_device or self.transformer.get_submodule(self.first_layer).weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The base precision, which the transformer's inputs have."""
        return self.transformer.get_submodule(self.first_layer).weight.dtype

    def schedule_at(self, height: int, width: int) -> Schedule:
        return flow_schedule_from_config(self.scheduler, (height // PATCH) * (width // PATCH))

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return encode_pixels(self.vae, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_latents(self.vae, latents)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    def encode(self, tokens: Mapping[str, Tensor]) -> Conditioning:
        raise NotImplementedError

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode(self.tokenize(prompts))

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode_prompts(prompts)

    def add_size_embeddings(
        self, cond: Conditioning, sizes: Sizes, guidance: float
    ) -> Conditioning:
        """The conditioning with the guidance scale [b] fp32, if the transformer takes one."""
        if not getattr(self.transformer.config, "guidance_embeds", False):
            return cond
        embeds = cond.prompt_embeds
        scales = torch.full((len(embeds),), guidance, dtype=torch.float32, device=embeds.device)
        return cond.with_extra(guidance=scales)


def refuse_masks(inpaint: Tensor | None) -> None:
    """Raises UserError for a mask, which no model here takes as an input."""
    if inpaint is not None:
        raise UserError(
            "this model takes no mask and no masked image; "
            "leave them out or choose an inpainting model"
        )


def check_guidance(family: Family, option: str, guidance: float, default: float) -> None:
    """Raises UserError for a guidance scale that a distilled model neither reads nor needs.

    Its default, which is always there, and 1, no guidance, are fine.
    """
    if guidance in (1, default):
        return
    if family.distilled_guidance and not getattr(family, "reads_guidance", True):
        raise UserError(
            f"{option} {guidance:g} has no effect on this model, which was distilled to draw "
            "without guidance; leave it out"
        )


# ---------------------------------------------------------------- schedule and steps


def flow_schedule_from_config(scheduler: Mapping[str, Any], tokens: int = 0) -> Schedule:
    """The rectified-flow schedule of a scheduler_config.json.

    With use_dynamic_shifting its shift grows with the number of image tokens (0: no shift), else it
    is constant.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return noise.flow_schedule(shift=scheduler.get("shift", SHIFTS["shift"]))
    if not tokens:
        return noise.flow_schedule()
    keys = {  # argument of resolution_shift -> diffusers' key
        "base_tokens": "base_image_seq_len",
        "max_tokens": "max_image_seq_len",
        "base": "base_shift",
        "max": "max_shift",
    }
    given = {name: scheduler[key] for name, key in keys.items() if key in scheduler}
    return noise.flow_schedule(shift=noise.resolution_shift(tokens, **given))


def scheduler_steps(steps: int, shift: float, *, dynamic: bool) -> list[float]:
    """The sigmas of `steps` steps that diffusers' scheduler lays out by itself, as for SD3.

    They are even from 1 to the sigma of timestep 1, and then shifted. With a constant shift that
    last sigma was shifted before, so that it is shifted twice: four steps at shift 3 are at 1,
    0.858, 0.602 and 0.009. Flux' pipeline gives its own sigmas, the default of `Schedule`.
    """
    last = 1 / TIMESTEPS
    if not dynamic:
        last = float(shift_sigmas(torch.tensor(last, dtype=torch.float64), shift))
    even = torch.linspace(1, last, steps, dtype=torch.float64)
    return shift_sigmas(even, shift).tolist()


def empirical_steps(tokens: int, steps: int) -> list[float]:
    """The sigmas of a sampler's steps for latents of so many image tokens: 1 ... 1/steps, shifted.

    The log of the shift is linear in the tokens, at 10 and at 200 steps, and in the steps between;
    above 4300 tokens it is that of 200 steps (compute_empirical_mu of the original code).
    """
    mu = 0.00016927 * tokens + 0.45666666
    if tokens <= 4300:
        mu_10 = 8.73809524e-05 * tokens + 1.89833333
        mu += (mu_10 - mu) * (200 - steps) / 190
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    return shift_sigmas(even, math.exp(mu)).tolist()


def with_scheduler_steps(schedule: Schedule, *, dynamic: bool = False) -> Schedule:
    """A flow schedule whose samplers take the steps of `scheduler_steps`.

    For pipelines that give their scheduler nothing but a number of steps.
    """
    lay_out = functools.partial(scheduler_steps, shift=schedule.shift, dynamic=dynamic)
    return replace(schedule, step_sigmas=lay_out)


def read_flow_scheduler(path: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler_config.json of the model at `path`, with changes.

    Raises UserError for a change without effect on a flow, and for a spacing of sigmas that is not
    supported.
    """
    for key in changes:
        if key not in SHIFTS:
            raise UserError(
                f"{key} has no effect on {path}, which is a flow; it can change {', '.join(SHIFTS)}"
            )
    scheduler = {**read_json(path, "scheduler/scheduler_config.json"), **changes}
    for key in OTHER_STEPS:
        if scheduler.get(key):
            raise UserError(
                f"the scheduler_config.json of {path} has {key} = {scheduler[key]}, which is not "
                "supported; expected a shifted flow"
            )
    if scheduler.get("time_shift_type", "exponential") != "exponential":
        raise UserError(
            f"the scheduler_config.json of {path} has time_shift_type "
            f"{scheduler['time_shift_type']}; expected exponential"
        )
    return scheduler


def read_flow_schedule(
    path: str, changes: Mapping[str, Any], resolution: int
) -> tuple[Schedule, str]:
    """(noise schedule, prediction type) of the model at `path`, from its configs.

    With a `resolution` (pixels), the schedule has the shift for it.
    """
    levels = len(read_json(path, "vae/config.json")["block_out_channels"])
    side = resolution // (PATCH * 2 ** (levels - 1))
    return flow_schedule_from_config(read_flow_scheduler(path, changes), side * side), "flow"


# ---------------------------------------------------------------- packed latents


def pack_latents(latents: Tensor, patch: int = PATCH) -> Tensor:
    """Image tokens [b, (h / patch) (w / patch), patch^2 c] of latents [b, c, h, w].

    One token for each patch x patch square, channels outermost.
    """
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=patch, pw=patch)


def unpack_latents(tokens: Tensor, height: int, width: int, patch: int = PATCH) -> Tensor:
    """Latents [b, c, height, width]; the inverse of `pack_latents`."""
    return rearrange(
        tokens,
        "b (h w) (c ph pw) -> b c (h ph) (w pw)",
        h=height // patch,
        w=width // patch,
        ph=patch,
        pw=patch,
    )


# ---------------------------------------------------------------- loading


def open_tokenizers(path: str, how: LoadOptions, classes: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizers of a model's text encoders: name of the encoder -> class of transformers."""
    tokenizers = {}
    for name, kind in classes.items():
        folder = name.replace("text_encoder", "tokenizer")
        tokenizers[name] = open_tokenizer(kind, path, folder, how.device)
    return tokenizers


def load_parts(path: str, how: LoadOptions, classes: Mapping[str, Any], vae: Any) -> dict[str, Any]:
    """The networks of a model: those of `classes` (name of the component -> class) in the base
    precision, and the VAE, of the class `vae`, in its own. Raises UserError for a VAE of another
    class before any weight is read.
    """
    check_vae_class(path, how.vae, vae)
    modules = {}
    for name, kind in classes.items():
        modules[name] = load_network(kind, path, name, how.dtype, how.device)
    vae_folder = "" if how.vae else "vae"
    modules["vae"] = load_network(vae, how.vae or path, vae_folder, how.vae_precision, how.device)
    return modules


def check_vae_class(path: str, other: str, kind: Any) -> None:
    """Raises UserError for a VAE of another class, by its config.json. `other`: folder or hub id of
    a VAE that replaces the model's own, or "".
    """
    config = read_json(other or path, "config.json" if other else "vae/config.json")
    found = config.get("_class_name", kind.__name__)
    if found != kind.__name__:
        raise UserError(
            f"the VAE of {other or path} is of the class {found}, expected {kind.__name__}; take "
            "the VAE of this model"
        )


def read_networks(path: str, classes: Mapping[str, Any]) -> dict[str, Any]:
    """The networks of `classes` on the meta device, from their configs alone: no weight is read."""
    modules = {}
    for name, kind in classes.items():
        table = read_json(path, f"{name}/config.json")
        modules[name] = make_meta_network(kind, table, torch.float32, path)
    return modules


def prompt_length(length: int, own: int) -> int:
    """The number of tokens of a prompt: --max-sequence-length, or the model's `own` where it is 0.

    Raises UserError for more than LONGEST.
    """
    if not 0 <= length <= LONGEST:
        raise UserError(
            f"--max-sequence-length is {length}; expected 1 to {LONGEST} tokens, or 0 for the "
            f"model's own {own}"
        )
    return length or own


def check_channels(takes: int, expected: int) -> None:
    """Raises UserError for a transformer with more input channels than the latents have.

    Those of Flux Fill, Depth and Canny have more, and those with a control image.
    """
    if takes != expected:
        raise UserError(
            f"the transformer takes {takes} channels, expected {expected}; "
            "models that read a mask or a control image are not supported"
        )


def check_fit(path: str, config: Mapping[str, Any], sizes: Mapping[str, int], givers: str) -> None:
    """Raises UserError for a transformer's config.json that expects other sizes than it gets.

    `sizes`: key of the config -> the size that the components `givers` give. A key that is left out
    has the default of the network's class, which is not checked.
    """
    for key, size in sizes.items():
        if config.get(key, size) != size:
            raise UserError(
                f"the transformer of {path} has {key} {config[key]}, expected {size}, as {givers} "
                "has it; take all parts from one model"
            )
