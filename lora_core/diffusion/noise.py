"""Noise: how much of it (schedules), where on the schedule (draw), which numbers (keyed randomness), and how it is added.

Everything downstream speaks one law, x_t = alpha x0 + sigma eps, with one row (t, alpha, sigma) per example. Three schedules:
vp (alpha^2 + sigma^2 = 1, arXiv 2006.11239), flow (alpha = 1 - sigma, arXiv 2210.02747), edm (alpha = 1, arXiv 2206.00364).
"""

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.errors import UserError
from lora_core.settings import NoiseSettings


class NoiseLevel(NamedTuple):
    """Noise levels of a batch, one row per example: x_t = alpha x0 + sigma eps. fp32; float64 passes through."""

    t: Tensor  # [b] what the network is told: vp 0..T-1, flow sigma in [0, 1], edm 0.25 ln sigma
    alpha: Tensor  # [b]
    sigma: Tensor  # [b]

    @property
    def snr(self) -> Tensor:
        """[b] signal to noise ratio alpha^2 / sigma^2 (0 at zero terminal SNR)."""
        return (self.alpha / self.sigma) ** 2

    def like(self, x: Tensor) -> "NoiseLevel":
        """The same levels shaped [b, 1, ...] so that they broadcast over x [b, ...], on its device."""
        return NoiseLevel(*(row.to(x.device).reshape(-1, *[1] * (x.ndim - 1)) for row in self))

    def to(self, device: torch.device | str) -> "NoiseLevel":
        """The same levels on `device`."""
        return NoiseLevel(*(row.to(device) for row in self))

    def rows(self, index: slice) -> "NoiseLevel":
        """The levels of some examples: rows(slice(0, 2)) are the first two."""
        return NoiseLevel(*(row[index] for row in self))


# ---------------------------------------------------------------- schedules


@dataclass(frozen=True)
class Schedule:
    """A table of T noise levels, cleanest first, in float64; what lies between the rows is given by `level`."""

    kind: Literal["vp", "flow", "edm"]
    ts: Tensor  # [T] what the network is told
    alphas: Tensor  # [T]
    sigmas: Tensor  # [T]
    shift: float = (
        1.0  # flow only: the shift already applied to the table (arXiv 2403.03206 eq. 23)
    )
    rho: float = 7.0  # edm only: the exponent of the table (arXiv 2206.00364 eq. 5)

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    def t_max(self) -> float | None:
        """The t of pure noise where t counts noise up from 0: the number of rows for vp, 1 for flow; None for edm."""
        return {"vp": float(len(self)), "flow": 1.0, "edm": None}[self.kind]

    def level(self, t: Tensor) -> NoiseLevel:
        """Levels at times t [b]; fp32, or float64 where t is float64.

        flow and edm are closed forms. vp is its table at whole t; between rows sigma / alpha is linear in t, as in k-diffusion
        (`DiscreteSchedule`) and diffusers' Euler. A t outside of the table is refused (on the CPU, where looking costs nothing).
        """
        dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
        if self.kind == "vp":
            alpha, sigma = self._between(t)
        else:
            sigma = t.double() if self.kind == "flow" else torch.exp(4 * t.double())
            alpha = 1 - sigma if self.kind == "flow" else torch.ones_like(sigma)
        return NoiseLevel(t.to(dtype), alpha.to(dtype), sigma.to(dtype))

    def _between(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if t.device.type == "cpu" and t.numel() and not (t.min() >= 0 and t.max() <= len(self) - 1):
            raise UserError(
                f"timesteps {t.min():g}..{t.max():g} leave the schedule, which has 0..{len(self) - 1}"
            )
        low = t.double().floor()
        part, row = t.double() - low, low.long()
        after = (row + 1).clamp(max=len(self) - 1)
        ratios = (
            self.sigmas / self.alphas
        )  # the last is infinite at zero terminal SNR: torch.lerp would make it NaN
        ratio = ratios[row] + part * (ratios[after] - ratios[row])
        alpha, whole = (1 + ratio**2) ** -0.5, part == 0
        return torch.where(whole, self.alphas[row], alpha), torch.where(
            whole, self.sigmas[row], (1 - alpha**2).sqrt()
        )

    def to(self, device: torch.device | str) -> "Schedule":
        """The same schedule with its tables on `device`."""
        return replace(
            self,
            ts=self.ts.to(device),
            alphas=self.alphas.to(device),
            sigmas=self.sigmas.to(device),
        )


def vp_schedule(betas: Tensor, *, zero_terminal_snr: bool = False) -> Schedule:
    """Variance preserving schedule of DDPM: alpha_t^2 = prod_{s<=t} (1 - beta_s) (arXiv 2006.11239 eq. 4).

    zero_terminal_snr shifts and rescales alpha (not alpha^2) so that the last row is pure noise and the first is unchanged
    (arXiv 2305.08891 algorithm 1). The last alpha is exactly 0; diffusers' Euler and DPM put 2^-12 there.
    """
    alphas = torch.cumprod(1 - betas.double(), 0).sqrt()
    if zero_terminal_snr:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    return Schedule("vp", torch.arange(len(alphas)).double(), alphas, (1 - alphas**2).sqrt())


def cosine_betas(steps: int, beta_max: float = 0.999) -> Tensor:
    """Betas of the squared-cosine schedule, float64 (arXiv 2102.09672 eq. 17, s = 0.008, betas capped at 0.999)."""
    alpha_bar = (
        torch.cos(
            (torch.linspace(0, 1, steps + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2
        )
        ** 2
    )
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max)


BETAS: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": lambda start, end, steps: torch.linspace(start, end, steps, dtype=torch.float64),
    "scaled_linear": lambda start, end, steps: (
        torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    ),
    "squaredcos_cap_v2": lambda start, end, steps: cosine_betas(steps),
}


def vp_schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """The vp schedule that a model's `scheduler_config.json` describes; keys and their defaults are diffusers' own.

    Reads trained_betas, beta_schedule, beta_start, beta_end, num_train_timesteps and rescale_betas_zero_snr.
    Raises UserError for a beta_schedule that is not in BETAS.
    """
    name = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif name in BETAS:
        steps = config.get("num_train_timesteps", 1000)
        betas = BETAS[name](config.get("beta_start", 0.0001), config.get("beta_end", 0.02), steps)
    else:
        raise UserError(
            f"scheduler_config.json has beta_schedule {name!r}; this program knows {', '.join(BETAS)}"
        )
    return vp_schedule(betas, zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)))


def shift_sigmas(sigma: Tensor, shift: float) -> Tensor:
    """Flow sigmas moved towards the noise: shift sigma / (1 + (shift - 1) sigma) (arXiv 2403.03206 eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_schedule(*, shift: float = 1.0, steps: int = 1000) -> Schedule:
    """Rectified flow: alpha = 1 - sigma and t = sigma (arXiv 2210.02747, 2209.03003); rows 1/steps ... 1, then shifted."""
    sigmas = shift_sigmas(torch.arange(1, steps + 1).double() / steps, shift)
    return Schedule("flow", sigmas, 1 - sigmas, sigmas, shift=shift)


def karras_sigmas(fraction: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Sigmas from sigma_min (fraction 0) to sigma_max (fraction 1), even in sigma^(1/rho) (arXiv 2206.00364 eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + fraction * (high - low)) ** rho


def edm_schedule(
    *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, steps: int = 1000
) -> Schedule:
    """Variance exploding schedule of EDM: alpha = 1 and t = c_noise = ln(sigma) / 4 (arXiv 2206.00364 table 1)."""
    sigmas = karras_sigmas(
        torch.linspace(0, 1, steps, dtype=torch.float64), sigma_min, sigma_max, rho
    )
    return Schedule("edm", sigmas.log() / 4, torch.ones_like(sigmas), sigmas, rho=rho)


# ---------------------------------------------------------------- keyed randomness


def _hash(seed: int, name: str, visit: int, purpose: str) -> int:
    words = json.dumps(
        [seed, name, visit, purpose]
    ).encode()  # json, because "a" + "bc" must not meet "ab" + "c"
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little", signed=True)


def keyed_generator(seed: int, name: str, visit: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on nothing but its four arguments (blake2b of them is its seed).

    torch's Mersenne twister takes 32 of those 64 bits: among 100,000 draws expect one pair to be equal, which harms nothing.
    """
    return torch.Generator().manual_seed(_hash(seed, name, visit, purpose))


@dataclass(frozen=True)
class RandomKeys:
    """Keyed randomness of a batch: row i of a draw depends on (seed, names[i], visits[i], purpose) alone.

    So an example gets the same numbers in any batch, order, accumulation, world size or resumed run.
    """

    seed: int
    names: tuple[str, ...]  # Example.key, one per row
    visits: tuple[int, ...]  # how often this example was seen before

    def __post_init__(self) -> None:
        if len(self.names) != len(self.visits):
            raise ValueError(
                f"Keys need one visit per name, got {len(self.names)} names and {len(self.visits)} visits"
            )

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """[b, *shape] standard normal numbers, fp32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators(purpose)])

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """[b, *shape] uniform numbers in [0, 1), fp32 on the CPU."""
        return torch.stack([torch.rand(shape, generator=g) for g in self._generators(purpose)])

    def hashes(self, purpose: str) -> Tensor:
        """[b] int64, the row keys of a counter hash (adapter dropout)."""
        return torch.tensor(
            [_hash(self.seed, n, v, purpose) for n, v in zip(self.names, self.visits, strict=True)],
            dtype=torch.int64,
        )

    def rows(self, index: slice) -> "RandomKeys":
        """The keys of some examples: rows(slice(0, 2)) are the first two."""
        return RandomKeys(self.seed, self.names[index], self.visits[index])

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [
            keyed_generator(self.seed, n, v, purpose)
            for n, v in zip(self.names, self.visits, strict=True)
        ]


# ---------------------------------------------------------------- where on the schedule


DENSITIES: dict[
    str, Callable[..., Tensor]
] = {  # u in [0, 1) -> fraction of the schedule, 0 clean, 1 noise (arXiv 2403.03206 section 3.1)
    "uniform": lambda u: u,
    "logit_normal": lambda u, mean=0.0, std=1.0: torch.sigmoid(mean + std * torch.special.ndtri(u)),
    "mode": lambda u, scale=1.29: 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u),
    "cosmap": lambda u: (
        1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
    ),  # of density 2 / (pi - 2 pi f + 2 pi f^2)
}


def bind_density(name: str, **args: float) -> Callable[[Tensor], Tensor]:
    """A row of DENSITIES with its arguments bound: u [b] in [0, 1) -> fraction of the schedule [b], 0 clean, 1 pure noise.

    logit_normal's mean above 0 is more noise, as in arXiv 2403.03206. The logit_mean of diffusers' and kohya's flow scripts has the
    opposite sign, because they look the fraction up in a table that descends; their +1 is our -1. The other densities are symmetric.
    Raises UserError for an unknown name or argument, and for values that lead out of 0..1 (mode: scale below -1).
    """
    if name not in DENSITIES:
        near = get_close_matches(name, DENSITIES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"unknown density {name!r}, the nearest is {near!r}; choose {', '.join(DENSITIES)}"
        )
    known = list(inspect.signature(DENSITIES[name]).parameters)[1:]
    for arg, value in args.items():
        if arg not in known:
            raise UserError(
                f"density {name} takes no argument {arg!r}; it takes {', '.join(known) or 'none'}"
            )
        if not isinstance(value, int | float):
            raise UserError(f"argument {arg} of density {name} is {value!r}, expected a number")
    bound = functools.partial(DENSITIES[name], **args)
    fractions = bound(torch.linspace(0, 1, 1025, dtype=torch.float64)[:-1])
    if not (fractions.min() >= 0 and fractions.max() <= 1):  # also where they are NaN
        raise UserError(
            f"density {name} with {args} leaves the fractions 0..1 of the schedule; give values nearer to the default"
        )
    return bound


def sample_levels(
    schedule: Schedule,
    keys: RandomKeys,
    *,
    low: float = 0.0,
    high: float = 1.0,
    density: Callable[[Tensor], Tensor] | None = None,
    shift: float = 1.0,
) -> NoiseLevel:
    """One level per example by `place` of keyed uniform numbers: by default every row of the schedule in [low T, high T) is equally likely."""
    return levels_at_quantiles(
        schedule, keys.uniform("timestep"), low=low, high=high, density=density, shift=shift
    )


def levels_at_quantiles(
    schedule: Schedule,
    u: Tensor,
    *,
    low: float = 0.0,
    high: float = 1.0,
    density: Callable[[Tensor], Tensor] | None = None,
    shift: float = 1.0,
) -> NoiseLevel:
    """The levels that u [b] in [0, 1) stands for, on the schedule's device: row floor(f T) of its table, f = low + (high - low) density(u).

    The fractions count rows, so for a shifted flow they are taken before the shift. `density` is what the function of that name returns, or
    any quantile function; towards 1 is towards noise. `shift` (flow only) moves the sigma so found by `shifted`, on top of the table's own
    shift: the two multiply.
    Raises UserError for an empty or impossible range, and for a shift of a schedule that is no flow.
    """
    # 1e-6 of a row: 0.29 * 1000 is not quite 290
    first, stop = math.floor(low * len(schedule) + 1e-6), math.ceil(high * len(schedule) - 1e-6)
    if not (0 <= low < high <= 1 and first < stop):
        raise UserError(
            f"timestep range {low:g}..{high:g} is empty or outside of 0..1; give fractions with low < high"
        )
    check_shift(schedule, shift)
    u = u.double()
    row = (
        (first + (u if density is None else density(u)) * (stop - first))
        .floor()
        .long()
        .clamp(first, stop - 1)
    )
    t = schedule.ts[row.to(schedule.ts.device)]
    return schedule.level((t if shift == 1 else shift_sigmas(t, shift)).float())


def check_shift(schedule: Schedule, shift: float) -> None:
    """Raises UserError for a shift that is not above 0, and for one other than 1 where the schedule is no flow."""
    if not (shift > 0 and math.isfinite(shift)):
        raise UserError(
            f"a shift of {shift:g} is none; expected a number above 0, where 1 changes nothing"
        )
    if shift != 1 and schedule.kind != "flow":
        raise UserError(
            f"a shift of {shift:g} needs a flow model, this one has a {schedule.kind} schedule; leave it at 1"
        )


def resolution_shift(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base: float = 0.5,
    max: float = 1.15,
) -> float:
    """The shift e^mu for images of `tokens` patches, mu on the line through (base_tokens, base) and (max_tokens, max), not cut off beyond.

    What BFL's Flux and diffusers' `calculate_shift` with use_dynamic_shifting do: their time shift e^mu / (e^mu + 1 / sigma - 1) is
    `shifted(sigma, e^mu)` (arXiv 2403.03206 eq. 23, where the shift is sqrt(tokens / base tokens)).
    """
    return math.exp(base + (max - base) * (tokens - base_tokens) / (max_tokens - base_tokens))


# ---------------------------------------------------------------- the noise itself


def sample_noise(
    keys: RandomKeys, shape: tuple[int, ...], settings: NoiseSettings = NoiseSettings()
) -> tuple[Tensor, Tensor]:
    """(eps that the target is made of, eps that x_t is made with), both [b, *shape], shape = (c, h, w), fp32 on the CPU.

    They differ only under input perturbation: x_t gets eps + gamma n', the target keeps eps (arXiv 2301.11706 algorithm 1).
    """
    eps = keys.normal("noise", shape)
    if settings.multires_levels:
        eps = torch.stack(
            [_multires(row, keys.rows(slice(i, i + 1)), settings) for i, row in enumerate(eps)]
        )
    if settings.offset:
        eps = eps + settings.offset * keys.normal("offset", (shape[0], 1, 1))
    if settings.perturbation:
        return eps, eps + settings.perturbation * keys.normal("perturbation", shape)
    return eps, eps


def _multires(eps: Tensor, key: RandomKeys, settings: NoiseSettings) -> Tensor:
    """Noise [c, h, w] plus discount^i times noise drawn 1/r^i as large (r uniform in [2, 4) per level) and scaled up, i = 1, 2, ...

    The sum is divided by its own standard deviation. kohya divides by that of the whole batch, which would make an example's noise
    depend on its neighbours, also adds a full-size copy at i = 0 (white noise again), and divides after the offset is added.
    """
    c, h, w = eps.shape
    ratios = 2 + 2 * key.uniform("multires", (settings.multires_levels,))[0]
    for i, ratio in enumerate(ratios.tolist(), start=1):
        size = (max(1, int(h / ratio**i)), max(1, int(w / ratio**i)))
        coarse = key.normal(f"multires {i}", (c, *size))
        eps = (
            eps
            + settings.multires_discount**i * F.interpolate(coarse, size=(h, w), mode="bilinear")[0]
        )
        if size == (1, 1):
            break
    return eps / eps.std()


def add_noise(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """x_t = alpha x0 + sigma eps, computed in fp32 or better, returned in x0's dtype."""
    wide = level.like(x0)
    return (wide.alpha * x0 + wide.sigma * eps.to(x0.device)).to(x0.dtype)
