"""Samplers of diffusion and flow models: from noise to latents in n steps.

Each is a free function named after its paper's algorithm, with one convention for all: x is
x_t = alpha x0 + sigma eps at the first of `levels` [n + 1], and is returned at the last.
`denoise(x_t, level)` returns the network's estimate of x0. Papers that work with x / alpha (Karras,
k-diffusion) are written back into x_t, with s = sigma / alpha; so alpha = 0 is allowed (zero
terminal SNR) and start noise is the same for every sampler.

    levels = sampler_levels("dpmpp_2m", family.schedule, 25)
    denoise = guided_denoiser(family.denoise, family.prediction, cond, uncond, 7.5)
    latents = SAMPLERS["dpmpp_2m"].run(denoise, start_latents(eps, levels), levels)
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lora_core.diffusion.noise import NoiseLevel, Schedule, add_noise, karras_sigmas, shift_sigmas
from lora_core.diffusion.prediction import PREDICTIONS, eps_from_x0, scale_input
from lora_core.errors import UserError, is_out_of_memory
from lora_core.plugins import describe_error, find_plugin

Denoise = Callable[[Tensor, NoiseLevel], Tensor]  # (x_t [b, c, h, w], level [b]) -> x0 [b, c, h, w]
StepNoise = Callable[[int], Tensor]  # step index -> unit noise [b, c, h, w], from a keyed source


# ---------------------------------------------------------------- the network as a denoiser


def guided_denoiser(
    network: Callable[[Tensor, NoiseLevel, Any], Tensor],
    prediction: str,
    cond: Any,
    uncond: Any = None,
    scale: float = 1.0,
) -> Denoise:
    """A denoiser with classifier-free guidance: out = uncond + scale (cond - uncond).

    The sum is of raw outputs (arXiv 2207.12598 eq. 6). `network(c_in x_t, level, conditioning)` is
    called once, with the unconditional half (the negative prompts) first. At scale 1 the sum is
    cond alone, and so is the call. The conditioning is any class with a static `cat`. Raises
    UserError for a scale without uncond.
    """
    if scale != 1 and uncond is None:
        raise UserError(
            f"guidance scale {scale:g} needs an unconditional or negative prompt; "
            "give one, or scale 1"
        )
    row = PREDICTIONS[prediction]
    both = type(cond).cat([uncond, cond]) if scale != 1 else cond

    def denoise(x_t: Tensor, level: NoiseLevel) -> Tensor:
        x_in = scale_input(prediction, x_t, level)
        if scale == 1:
            return row.x0(x_t, network(x_in, level, both), level)
        twice = NoiseLevel(*(torch.cat([values, values]) for values in level))
        out_uncond, out_cond = network(torch.cat([x_in, x_in]), twice, both).chunk(2)
        return row.x0(x_t, out_uncond + scale * (out_cond - out_uncond), level)

    return denoise


class KeptLatents(NamedTuple):
    """The part of an image that sampling leaves as it is."""

    x0: Tensor  # [b, c, h, w] clean latents of the image
    eps: Tensor  # [b, c, h, w] their noise, that of the start latents
    hole: Tensor  # [b, 1, h, w] bool, true where the image is painted anew


def keep_latents(denoise: Denoise, kept: KeptLatents, *, start: float) -> Denoise:
    """The denoiser of an image that is painted in the hole only.

    Outside the hole, x_t is replaced by the kept latents with their noise at this level, in every
    call but those at t = `start`, the first. It equals diffusers' blending after each step of an
    inpainting pipeline with a 4-channel UNet, with any sampler here: none mixes pixels, so nothing
    outside the hole reaches it but through the network. At the end the caller replaces what is
    outside the hole by the kept x0.
    """

    def denoise_hole(x_t: Tensor, level: NoiseLevel) -> Tensor:
        is_free = kept.hole | (level.t >= start).reshape(-1, 1, 1, 1)
        known = add_noise(kept.x0.to(x_t), kept.eps.to(x_t), level)
        return denoise(torch.where(is_free, x_t, known), level)

    return denoise_hole


# ---------------------------------------------------------------- samplers


def ddim(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevel,
    *,
    eta: float = 0.0,
    noise: StepNoise | None = None,
) -> Tensor:
    """x at the last level, by DDIM (arXiv 2010.02502 eq. 12).

    `eta` is that of eq. 16, where 1 is DDPM's ancestral sampling. Raises UserError if eta is above
    0 and there is no noise.
    """
    if eta > 0 and noise is None:
        raise UserError(
            f"ddim with eta = {eta:g} adds noise at every step; give a noise source, or eta 0"
        )
    for i, (alpha, sigma, alpha_next, sigma_next) in enumerate(step_ends(levels)):
        level = step_level(levels, i, x)
        x0 = denoise(x, level)
        eps = eps_from_x0(x, x0, level)
        sigma_eta = eta * sigma_next / sigma * (1 - (alpha / alpha_next) ** 2).clamp(min=0).sqrt()
        x = alpha_next * x0 + (sigma_next**2 - sigma_eta**2).clamp(min=0).sqrt() * eps
        if noise is not None and eta > 0:
            x = x + sigma_eta * noise(i)
    return x


def euler(denoise: Denoise, x: Tensor, levels: NoiseLevel) -> Tensor:
    """x at the last level, by Euler's method on dy/ds = (y - x0) / s for y = x / alpha.

    arXiv 2206.00364 eq. 4 and algorithm 1, no churn. Here (y - x0) / s is eps, and y - s eps is x0,
    so a step reads y' = y + (s' - s) eps = x0 + s' eps: Euler is DDIM with eta = 0.
    """
    for i, (_, _, alpha_next, sigma_next) in enumerate(step_ends(levels)):
        level = step_level(levels, i, x)
        x0 = denoise(x, level)
        eps = eps_from_x0(x, x0, level)
        x = alpha_next * (x0 + sigma_next / alpha_next * eps)
    return x


def euler_ancestral(denoise: Denoise, x: Tensor, levels: NoiseLevel, *, noise: StepNoise) -> Tensor:
    """x at the last level, by Euler steps down to s_down and noise back up to s'.

    k-diffusion's `sample_euler_ancestral`. s_up^2 = s'^2 (s^2 - s'^2) / s^2 and s_down^2 = s'^2 -
    s_up^2 keep the variance of y = x / alpha at s'^2; so s_down = s'^2 / s.
    """
    for i, (alpha, sigma, alpha_next, sigma_next) in enumerate(step_ends(levels)):
        level = step_level(levels, i, x)
        x0 = denoise(x, level)
        eps = eps_from_x0(x, x0, level)
        s, s_next = sigma / alpha, sigma_next / alpha_next
        s_down = s_next**2 / s
        s_up = (s_next**2 - s_down**2).clamp(min=0).sqrt()
        x = alpha_next * (x0 + s_down * eps)
        if s_up > 0:
            x = x + alpha_next * s_up * noise(i)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: NoiseLevel) -> Tensor:
    """x at the last level, by DPM-Solver++(2M) (arXiv 2211.01095 algorithm 2; midpoint).

    With lambda = ln(alpha / sigma) and h the step in it, x' = sigma'/sigma x - alpha' (e^-h - 1) D,
    where D extrapolates x0 from the last two steps. The first step has no history; one that ends
    clean is of first order (its lambda' is infinite).
    """
    x0_before = None
    lambda_before = None
    for i, (alpha, sigma, alpha_next, sigma_next) in enumerate(step_ends(levels)):
        x0 = denoise(x, step_level(levels, i, x))
        lambda_, lambda_next = (alpha / sigma).log(), (alpha_next / sigma_next).log()
        d = x0
        if x0_before is not None and lambda_before is not None and sigma_next > 0:
            # infinite after a step from alpha = 0: no extrapolation
            r = (lambda_ - lambda_before) / (lambda_next - lambda_)
            d = x0 + (x0 - x0_before) / (2 * r)
        x = sigma_next / sigma * x - alpha_next * torch.expm1(lambda_ - lambda_next) * d
        x0_before = x0
        lambda_before = lambda_
    return x


def flow_euler(denoise: Denoise, x: Tensor, levels: NoiseLevel) -> Tensor:
    """x at the last level, by Euler's method on dx/dsigma = v = (x - x0) / sigma.

    v is the velocity of rectified flow (arXiv 2209.03003). Raises UserError for levels that are not
    a flow's.
    """
    if (levels.alpha + levels.sigma - 1).abs().max() > 1e-5:
        raise UserError(
            "flow_euler needs a flow schedule (alpha + sigma = 1); "
            "choose euler, ddim or dpmpp_2m for this model"
        )
    for i, (_, sigma, _, sigma_next) in enumerate(step_ends(levels)):
        velocity = (x - denoise(x, step_level(levels, i, x))) / sigma
        x = x + (sigma_next - sigma) * velocity
    return x


def step_ends(levels: NoiseLevel) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(alpha, sigma, alpha', sigma') of every step, 0-dim float64 on the CPU.

    0-dim tensors mix with tensors of any device and dtype.
    """
    alpha, sigma = levels.alpha.double().cpu(), levels.sigma.double().cpu()
    return list(zip(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], strict=True))


def step_level(levels: NoiseLevel, i: int, x: Tensor) -> NoiseLevel:
    """Level i for each example of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return NoiseLevel(*(values[i].to(x.device, dtype).expand(len(x)) for values in levels))


class Sampler(NamedTuple):
    """A sampler, and the rules by which its diffusers counterpart chooses timesteps."""

    run: Callable[..., Tensor]
    stochastic: bool = False  # needs `noise=`
    rounds_timesteps: bool = False  # linspace rounds to whole timesteps
    drops_last: bool = False  # takes n + 1 timesteps and drops the last (not for trailing)
    # False: at the schedule's first level (set_alpha_to_one = false of SD's DDIM config)
    ends_at_zero: bool = True


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, rounds_timesteps=True, ends_at_zero=False),
    "euler": Sampler(euler),
    "euler_ancestral": Sampler(euler_ancestral, stochastic=True),
    "dpmpp_2m": Sampler(dpmpp_2m, rounds_timesteps=True, drops_last=True),
    "flow_euler": Sampler(flow_euler),
}


def find_sampler(name: str, args: Mapping[str, Any] | None = None) -> Sampler:
    """The sampler of a name, with arguments bound; it is stochastic where it takes `noise`.

    `name` is a key of SAMPLERS or "path/to/file.py:fn", with `fn(denoise, x, levels)` or
    `fn(denoise, x, levels, *, noise)`, whose attributes are the other fields of a Sampler. Raises
    UserError where `find_plugin` does.
    """
    table = {key: row.run for key, row in SAMPLERS.items()}
    if args and "noise" in args:
        raise UserError(f"sampler {name} takes no argument 'noise' here: the program gives it")
    run = find_plugin(name, table, "sampler", args, given=3)
    rules = {}
    for field in Sampler._fields[2:]:
        if hasattr(run, field):
            rules[field] = bool(getattr(run, field))
    row = SAMPLERS.get(name) or Sampler(run, **rules)
    return row._replace(run=run, stochastic="noise" in inspect.signature(run).parameters)


def run_sampler(
    name: str,
    args: Mapping[str, Any],
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevel,
    noise: StepNoise,
) -> Tensor:
    """The latents of `find_sampler(name, args)` at the last level; `noise` if it takes any.

    Raises UserError where a sampler from a file fails (with the line), or returns another shape.
    """
    sampler = find_sampler(name, args)
    given = {"noise": noise} if sampler.stochastic else {}
    try:
        found = sampler.run(denoise, x, levels, **given)
    except UserError:
        raise
    except Exception as error:
        if name in SAMPLERS or is_out_of_memory(error):
            raise
        form = f"fn(denoise, x, levels{', *, noise' if given else ''})"
        raise UserError(
            f"sampler {name} is called as {form} and returns latents: "
            f"{describe_error(error, sampler.run)}"
        ) from error
    if not isinstance(found, Tensor) or found.shape != x.shape:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(
            f"sampler {name} returned {got}; expected the latents {list(x.shape)} at the last of "
            "its levels"
        )
    return found


def try_sampler(name: str, args: Mapping[str, Any], levels: NoiseLevel) -> None:
    """Run a sampler from a file on small latents, where a run would otherwise learn at its first
    image that it fails. Raises UserError where `run_sampler` does.
    """
    x = torch.ones(2, 1, 2, 2)

    def halve(x_t: Tensor, level: NoiseLevel) -> Tensor:
        if not isinstance(level, NoiseLevel) or level.sigma.shape != (len(x),):
            raise UserError(
                f"sampler {name} calls denoise(x, level) with another level than one for each "
                "image; sampling.step_level(levels, i, x) is that of step i"
            )
        return x_t / 2

    if name not in SAMPLERS:
        with torch.random.fork_rng(devices=[]):
            run_sampler(name, args, halve, x, levels, lambda i: torch.ones_like(x))


# ---------------------------------------------------------------- timesteps of a sampler

Spacing = Literal["leading", "trailing", "linspace"]


def sampler_timesteps(
    schedule: Schedule, steps: int, *, spacing: Spacing = "leading", offset: int = 1
) -> list[float]:
    """The n timesteps of a sampler from noisy to clean.

    For vp the spacings of arXiv 2305.08891 table 2; `offset` (steps_offset) applies to leading
    only. flow and edm have a fixed spacing: sigma 1 ... 1/n, shifted (arXiv 2403.03206), or the
    schedule's own `step_sigmas`, and Karras' steps (arXiv 2206.00364 eq. 5).
    """
    count = len(schedule)
    if steps < 1:
        raise UserError(f"a sampler needs at least 1 step, got {steps}")
    if schedule.step_sigmas is not None:
        return schedule.step_sigmas(steps)
    if schedule.kind == "flow":
        return shift_sigmas(torch.arange(steps, 0, -1).double() / steps, schedule.shift).tolist()
    if schedule.kind == "edm":
        low, high = schedule.sigmas[0].item(), schedule.sigmas[-1].item()
        fractions = torch.linspace(1, 0, steps, dtype=torch.float64)
        return (karras_sigmas(fractions, low, high, schedule.rho).log() / 4).tolist()
    if spacing == "leading":
        times: list[float] = [i * (count // steps) + offset for i in reversed(range(steps))]
    elif spacing == "trailing":
        times = [round(count - i * count / steps) - 1 for i in range(steps)]
    elif spacing == "linspace":
        times = [i * (count - 1) / max(steps - 1, 1) for i in reversed(range(steps))]
    else:
        raise UserError(f"unknown spacing {spacing!r}; choose leading, trailing or linspace")
    if steps > count or times[0] > count - 1 or (spacing == "linspace" and steps == 1):
        what = f"{steps} steps with {spacing} spacing and offset {offset}"
        raise UserError(
            f"{what} do not fit timesteps 0..{count - 1}; choose another number of sampling steps"
        )
    return times


def sampler_levels(
    sampler: str,
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = "leading",
    offset: int = 1,
    strength: float = 1.0,
) -> NoiseLevel:
    """The n + 1 levels of a sampler's steps from noisy to clean, [n + 1] float64 on the CPU.

    The last is the level at which it ends. strength below 1 keeps the last int(strength * steps)
    steps, for image to image: x starts as an image with that much noise. Raises UserError for an
    unknown sampler or spacing, a number of steps that does not fit, and a strength that leaves no
    step.
    """
    row = find_sampler(sampler)
    is_vp = schedule.kind == "vp"
    count = steps + (row.drops_last and is_vp and spacing != "trailing")
    times = sampler_timesteps(schedule, count, spacing=spacing, offset=offset)[:steps]
    kept = int(strength * steps)
    if not (0 < strength <= 1 and kept > 0):
        raise UserError(
            f"strength {strength:g} of {steps} steps leaves none; "
            f"it must be at most 1 and at least {1 / steps:g}"
        )
    times = times[steps - kept :]
    if row.rounds_timesteps and is_vp:
        times = [round(t) for t in times]
    schedule = schedule.to("cpu")
    levels = schedule.level(torch.tensor(times, dtype=torch.float64))
    end = NoiseLevel(schedule.ts[:1], schedule.alphas[:1], schedule.sigmas[:1])
    if row.ends_at_zero or not is_vp:
        end = end._replace(alpha=torch.ones_like(end.alpha), sigma=torch.zeros_like(end.sigma))
    return NoiseLevel(*(torch.cat(pair) for pair in zip(levels, end, strict=True)))


def split_for_refiner(
    levels: NoiseLevel, schedule: Schedule, start: float
) -> tuple[NoiseLevel, NoiseLevel]:
    """The levels of a base model's steps and of its refiner's.

    The refiner takes over where the base model ends, after the fraction `start` of the schedule.
    The base model takes the steps whose t is at least round(T - start T) (flow: sigma that / T):
    diffusers' denoising_end and denoising_start. Raises UserError for a fraction that leaves one
    of them no step, and for edm, whose t counts neither steps nor sigma.
    """
    if schedule.kind == "edm":
        raise UserError(
            "a refiner takes over at a share of the timesteps, which a model with an edm schedule "
            "does not count; leave it out"
        )
    count = len(schedule)
    cutoff = round(count - start * count) / (count if schedule.kind == "flow" else 1)
    steps = len(levels.t) - 1
    own = int((levels.t[:-1] >= cutoff - 1e-9).sum())
    if not (0 < start < 1 and 0 < own < steps):
        raise UserError(
            f"a refiner start of {start:g} leaves the base model {own} of {steps} steps; "
            "choose one in (0, 1) that leaves both at least 1"
        )
    return levels.rows(slice(0, own + 1)), levels.rows(slice(own, None))


def start_latents(eps: Tensor, levels: NoiseLevel, x0: Tensor | None = None) -> Tensor:
    """x_t [b, c, h, w] at the first of `levels`, from unit noise eps; fp32 or better.

    For image to image also from clean latents x0. Without x0 it is sqrt(alpha^2 + sigma^2) eps, the
    variance of noised unit-variance latents: eps itself for vp and for flow from sigma 1.
    """
    eps = eps.to(torch.promote_types(eps.dtype, torch.float32))
    first = levels.rows(slice(0, 1)).like(eps)
    if x0 is not None:
        return add_noise(x0.to(eps), eps, first)
    return ((first.alpha**2 + first.sigma**2).sqrt() * eps).to(eps.dtype)
