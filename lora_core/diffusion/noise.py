"""Noise of diffusion training: schedules, timestep densities, keyed random numbers, noised latents.

Every schedule is a table of levels (t, alpha, sigma) with x_t = alpha x0 + sigma eps:
vp (alpha^2 + sigma^2 = 1, arXiv 2006.11239), flow (alpha = 1 - sigma, arXiv 2210.02747) and
edm (alpha = 1, arXiv 2206.00364).
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.diffusion.densities import Density
from lora_core.errors import UserError, first_line
from lora_core.settings import NoiseSettings


class NoiseLevel(NamedTuple):
    """Noise levels of a batch, one per example: x_t = alpha x0 + sigma eps.

    fp32; float64 passes through.
    """

    t: Tensor  # [b] timestep for the network: vp 0..T-1, flow sigma in [0, 1], edm 0.25 ln sigma
    alpha: Tensor  # [b]
    sigma: Tensor  # [b]

    @property
    def snr(self) -> Tensor:
        """[b] signal to noise ratio alpha^2 / sigma^2 (0 at zero terminal SNR)."""
        return (self.alpha / self.sigma) ** 2

    @property
    def share(self) -> Tensor:
        """[b] sigma / (alpha + sigma) in [0, 1]: the sigma of a flow model, or s / (1 + s) of s =
        sigma / alpha, the sigma of EDM and k-diffusion.
        """
        return self.sigma / (self.alpha + self.sigma)

    def like(self, x: Tensor) -> "NoiseLevel":
        """The same levels shaped [b, 1, ...], which broadcast over x [b, ...], on its device."""
        t, alpha, sigma = self
        shape = (-1,) + (1,) * (x.ndim - 1)
        return NoiseLevel(
            t.to(x.device).reshape(shape),
            alpha.to(x.device).reshape(shape),
            sigma.to(x.device).reshape(shape),
        )

    def to(self, device: torch.device | str) -> "NoiseLevel":
        """The same levels on `device`."""
        return NoiseLevel(*(values.to(device) for values in self))

    def rows(self, index: slice) -> "NoiseLevel":
        """The levels of some examples: rows(slice(0, 2)) are those of the first two."""
        return NoiseLevel(*(values[index] for values in self))


# ---------------------------------------------------------------- schedules


@dataclass(frozen=True)
class Schedule:
    """A table of T noise levels, cleanest first, in float64; `level` interpolates between them."""

    kind: Literal["vp", "flow", "edm"]
    ts: Tensor  # [T] timesteps as the network reads them
    alphas: Tensor  # [T]
    sigmas: Tensor  # [T]
    shift: float = 1.0  # flow: the shift that the table has already (arXiv 2403.03206 eq. 23)
    rho: float = 7.0  # edm: the exponent of the table (arXiv 2206.00364 eq. 5)
    # flow: the sigmas of a sampler's n steps; None: 1 ... 1/n, shifted
    step_sigmas: Callable[[int], list[float]] | None = None

    def __len__(self) -> int:
        return len(self.sigmas)

    @functools.cached_property
    def t_max(self) -> float | None:
        """The t of pure noise if t counts noise up from 0: T for vp, 1 for flow; else None."""
        return {"vp": float(len(self.ts)), "flow": 1.0, "edm": None}[self.kind]

    def level(self, t: Tensor) -> NoiseLevel:
        """Noise levels at times t [b]; fp32, or float64 where t is float64.

        flow and edm are closed forms. vp is its table at whole t; between its entries sigma / alpha
        is linear in t, as in k-diffusion (`DiscreteSchedule`) and diffusers' Euler. Raises
        UserError for a t outside of the table (on the CPU, where the check waits for no device).
        """
        dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
        if self.kind == "flow":
            sigma = t.double()
            alpha = 1 - sigma
        elif self.kind == "edm":
            sigma = torch.exp(4 * t.double())
            alpha = torch.ones_like(sigma)
        else:
            last = len(self.sigmas) - 1
            if t.device.type == "cpu" and t.numel() and not (t.min() >= 0 and t.max() <= last):
                span = f"{t.min():g}..{t.max():g}"
                raise UserError(f"timesteps {span} leave the schedule, which has 0..{last}")
            alpha, sigma = self._interpolate(t.double())
        return NoiseLevel(t.to(dtype), alpha.to(dtype), sigma.to(dtype))

    def _interpolate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) [b] of a vp table at times t [b], sigma / alpha being linear between."""
        low = t.floor()
        fraction = t - low
        row = low.long()
        next_row = (row + 1).clamp(max=len(self.sigmas) - 1)
        # The last ratio is infinite at zero terminal SNR: torch.lerp would make it NaN.
        ratios = self.sigmas / self.alphas
        ratio = ratios[row] + fraction * (ratios[next_row] - ratios[row])
        alpha = (1 + ratio**2) ** -0.5
        sigma = (1 - alpha**2).sqrt()
        is_whole = fraction == 0
        return (
            torch.where(is_whole, self.alphas[row], alpha),
            torch.where(is_whole, self.sigmas[row], sigma),
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
    """DDPM's variance preserving schedule: alpha_t^2 = prod_{s<=t} (1 - beta_s).

    arXiv 2006.11239 eq. 4. zero_terminal_snr shifts and rescales alpha (not alpha^2) so that the
    last level is pure noise and the first is unchanged (arXiv 2305.08891 algorithm 1). The last
    alpha is exactly 0; diffusers' Euler and DPM put 2^-12 there.
    """
    alphas = torch.cumprod(1 - betas.double(), 0).sqrt()
    if zero_terminal_snr:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    return Schedule("vp", torch.arange(len(alphas)).double(), alphas, (1 - alphas**2).sqrt())


def cosine_betas(steps: int, beta_max: float = 0.999) -> Tensor:
    """[steps] betas of the squared-cosine schedule, float64.

    arXiv 2102.09672 eq. 17, s = 0.008.
    """
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max)


def _linear_betas(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


MOST_TIMESTEPS = 100_000  # of a schedule; models have 1,000
BETAS: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": _linear_betas,
    "scaled_linear": lambda start, end, steps: _linear_betas(start**0.5, end**0.5, steps) ** 2,
    "squaredcos_cap_v2": lambda start, end, steps: cosine_betas(steps),
}


def vp_schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """The vp schedule that a model's `scheduler_config.json` describes.

    Keys and their defaults are diffusers' own: trained_betas, beta_schedule, beta_start, beta_end,
    num_train_timesteps, rescale_betas_zero_snr. Raises UserError for a beta_schedule that is not in
    BETAS.
    """
    try:
        betas = _betas_from_config(config)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"scheduler_config.json describes no noise schedule: {first_line(error)}; "
            "fetch the model again"
        ) from None
    if betas.ndim != 1 or not len(betas) or not ((betas >= 0) & (betas <= 1)).all():
        raise UserError(
            "scheduler_config.json has betas that are no shares between 0 and 1; "
            "fetch the model again"
        )
    return vp_schedule(betas, zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)))


def _betas_from_config(config: Mapping[str, Any]) -> Tensor:
    name, steps = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    if name not in BETAS:
        known = ", ".join(BETAS)
        raise UserError(
            f"scheduler_config.json has beta_schedule {name!r}; this program knows {known}"
        )
    if type(steps) is not int or not 1 <= steps <= MOST_TIMESTEPS:
        raise UserError(
            f"scheduler_config.json has num_train_timesteps {steps!r:.20}, expected 1 to "
            f"{MOST_TIMESTEPS:,}"
        )
    return BETAS[name](config.get("beta_start", 0.0001), config.get("beta_end", 0.02), steps)


def shift_sigmas(sigma: Tensor, shift: float) -> Tensor:
    """Flow sigmas moved towards the noise: shift sigma / (1 + (shift - 1) sigma).

    arXiv 2403.03206 eq. 23.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_schedule(*, shift: float = 1.0, steps: int = 1000) -> Schedule:
    """Rectified flow: alpha = 1 - sigma, t = sigma, levels 1/steps ... 1, then shifted.

    arXiv 2210.02747, 2209.03003.
    """
    sigmas = shift_sigmas(torch.arange(1, steps + 1).double() / steps, shift)
    return Schedule("flow", sigmas, 1 - sigmas, sigmas, shift=shift)


def karras_sigmas(fraction: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Sigmas from sigma_min (fraction 0) to sigma_max (fraction 1), even in sigma^(1/rho).

    arXiv 2206.00364 eq. 5.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + fraction * (high - low)) ** rho


def edm_schedule(
    *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, steps: int = 1000
) -> Schedule:
    """EDM's variance exploding schedule: alpha = 1 and t = c_noise = ln(sigma) / 4.

    arXiv 2206.00364 table 1.
    """
    fractions = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = karras_sigmas(fractions, sigma_min, sigma_max, rho)
    return Schedule("edm", sigmas.log() / 4, torch.ones_like(sigmas), sigmas, rho=rho)


# ---------------------------------------------------------------- keyed randomness


def keyed_hash(seed: int, name: str, visit: int, purpose: str) -> int:
    """A signed 64-bit hash of the four arguments (blake2b)."""
    words = json.dumps([seed, name, visit, purpose])  # json: "a" + "bc" must not equal "ab" + "c"
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def keyed_generator(seed: int, name: str, visit: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded with `keyed_hash` of the same arguments.

    torch's Mersenne twister uses 32 of those 64 bits: among 100,000 generators one pair is expected
    to be equal, which is harmless.
    """
    return torch.Generator().manual_seed(keyed_hash(seed, name, visit, purpose))


@dataclass(frozen=True)
class RandomKeys:
    """Keyed random numbers of a batch.

    Row i of every tensor depends on (seed, names[i], visits[i], purpose) alone, so an example gets
    the same numbers in any batch, order, accumulation, world size or resumed run.
    """

    seed: int
    names: tuple[str, ...]  # Example.key, one per example
    visits: tuple[int, ...]  # how often each example was seen before

    def __post_init__(self) -> None:
        names, visits = len(self.names), len(self.visits)
        if names != visits:
            raise ValueError(
                f"RandomKeys need one visit per name, got {names} names and {visits} visits"
            )

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """[b, *shape] standard normal numbers, fp32 on the CPU."""
        rows = []
        for name, visit in zip(self.names, self.visits, strict=True):
            generator = keyed_generator(self.seed, name, visit, purpose)
            rows.append(torch.randn(shape, generator=generator))
        return torch.stack(rows)

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """[b, *shape] uniform numbers in [0, 1), fp32 on the CPU."""
        rows = []
        for name, visit in zip(self.names, self.visits, strict=True):
            generator = keyed_generator(self.seed, name, visit, purpose)
            rows.append(torch.rand(shape, generator=generator))
        return torch.stack(rows)

    def hashes(self, purpose: str) -> Tensor:
        """[b] int64 `keyed_hash` of each example: the row keys of adapter dropout."""
        pairs = zip(self.names, self.visits, strict=True)
        hashes = [keyed_hash(self.seed, name, visit, purpose) for name, visit in pairs]
        return torch.tensor(hashes, dtype=torch.int64)

    def rows(self, index: slice) -> "RandomKeys":
        """The keys of some examples: rows(slice(0, 2)) are those of the first two."""
        return RandomKeys(self.seed, self.names[index], self.visits[index])


# ---------------------------------------------------------------- timesteps of a training batch


def sample_levels(
    schedule: Schedule,
    keys: RandomKeys,
    *,
    low: float = 0.0,
    high: float = 1.0,
    density: Density | None = None,
    shift: float = 1.0,
) -> NoiseLevel:
    """One random noise level per example, keyed; see `levels_at_quantiles`.

    By default every level of the table in [low T, high T) is equally likely.
    """
    quantiles = keys.uniform("timestep")
    return levels_at_quantiles(
        schedule, quantiles, low=low, high=high, density=density, shift=shift
    )


def levels_at_quantiles(
    schedule: Schedule,
    u: Tensor,
    *,
    low: float = 0.0,
    high: float = 1.0,
    density: Density | None = None,
    shift: float = 1.0,
) -> NoiseLevel:
    """The levels at quantiles u [b] in [0, 1) of the timestep distribution.

    They are on the schedule's device. The level of u is entry floor(f T) of the table with
    f = low + (high - low) density(u). Fractions count entries, so for a shifted flow they are taken
    before the shift. `density` is a result of `densities.bind_density` or any quantile function;
    towards 1 is towards noise. `shift` (flow only) moves the sigma that was found by
    `shift_sigmas`, on top of the table's own shift: the two multiply.
    Raises UserError for an empty or impossible range, and for a shift of another kind of schedule.
    """
    count = len(schedule.ts)
    # 1e-6 of an entry: 0.29 * 1000 is not quite 290
    first = math.floor(low * count + 1e-6)
    stop = math.ceil(high * count - 1e-6)
    if not (0 <= low < high <= 1 and first < stop):
        raise UserError(
            f"timestep range {low:g}..{high:g} is empty or outside of 0..1; "
            "give fractions with low < high"
        )
    if shift != 1:
        check_shift(schedule, shift)
    fraction = u.double() if density is None else density(u.double())
    row = (first + fraction * (stop - first)).floor().long().clamp(first, stop - 1)
    t = schedule.ts[row.to(schedule.ts.device)]
    if shift != 1:
        t = shift_sigmas(t, shift)
    return schedule.level(t.float())


def check_shift(schedule: Schedule, shift: float) -> None:
    """Raises UserError for a shift that is not above 0, and for one other than 1 without a flow."""
    if not (shift > 0 and math.isfinite(shift)):
        raise UserError(
            f"a shift of {shift:g} is impossible; expected a number above 0 (1: no change)"
        )
    if shift != 1 and schedule.kind != "flow":
        raise UserError(
            f"a shift of {shift:g} needs a flow model, this one has a {schedule.kind} schedule; "
            "leave it at 1"
        )


def resolution_shift(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base: float = 0.5,
    max: float = 1.15,
) -> float:
    """The shift e^mu of a flow model for images of `tokens` patches.

    mu is on the line through (base_tokens, base) and (max_tokens, max), not cut off beyond. This is
    the shift of BFL's Flux and of diffusers' `calculate_shift` with use_dynamic_shifting: their
    e^mu / (e^mu + 1 / sigma - 1) is `shift_sigmas(sigma, e^mu)` (arXiv 2403.03206 eq. 23, where the
    shift is sqrt(tokens / base tokens)).
    """
    return math.exp(base + (max - base) * (tokens - base_tokens) / (max_tokens - base_tokens))


# ---------------------------------------------------------------- the noise of a training batch

WHITE_NOISE = NoiseSettings()


def sample_noise(
    keys: RandomKeys,
    shape: tuple[int, ...],
    settings: NoiseSettings = WHITE_NOISE,
    x0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(eps of the target, eps of x_t), both [b, *shape] fp32 on the CPU, shape = (c, h, w).

    They differ only under input perturbation: x_t gets eps + gamma n', the target keeps eps
    (arXiv 2301.11706 algorithm 1). An adaptive offset needs the latents `x0` [b, *shape], and waits
    for their device.
    """
    eps = keys.normal("noise", shape)
    if settings.multires_levels:
        rows = []
        for i, row in enumerate(eps):
            rows.append(_add_coarse_noise(row, keys.rows(slice(i, i + 1)), settings))
        eps = torch.stack(rows)
    if settings.offset:
        strength = offset_strength(settings, x0)
        eps = eps + strength * keys.normal("offset", (shape[0], 1, 1))
    if settings.perturbation:
        return eps, eps + settings.perturbation * keys.normal("perturbation", shape)
    return eps, eps


def offset_strength(settings: NoiseSettings, x0: Tensor | None) -> float | Tensor:
    """The strength o of the noise offset: settings.offset, or with k = settings.adaptive_offset
    max(0, o + k |mean_hw(x0)|), [b, c, 1, 1] fp32 on the CPU (kohya's sd-scripts).
    """
    if not settings.adaptive_offset:
        return settings.offset
    if x0 is None:
        raise ValueError("an adaptive offset is a function of the latents; give sample_noise x0")
    means = x0.float().mean(dim=(2, 3), keepdim=True).abs().cpu()
    return (settings.offset + settings.adaptive_offset * means).clamp(min=0)


def _add_coarse_noise(eps: Tensor, key: RandomKeys, settings: NoiseSettings) -> Tensor:
    """Multi-resolution noise [c, h, w]: white noise plus discount^i times coarser noise scaled up.

    Level i = 1, 2, ... is 1/r^i as large, r uniform in [2, 4) per level. The sum is divided by its
    own standard deviation. kohya divides by that of the whole batch, which would make an example's
    noise depend on its neighbors, also adds a full-size copy at i = 0 (white noise again), and
    divides after the offset is added.
    """
    c, h, w = eps.shape
    ratios = 2 + 2 * key.uniform("multires", (settings.multires_levels,))[0]
    for i, ratio in enumerate(ratios.tolist(), start=1):
        size = (max(1, int(h / ratio**i)), max(1, int(w / ratio**i)))
        coarse = key.normal(f"multires {i}", (c, *size))
        upscaled = F.interpolate(coarse, size=(h, w), mode="bilinear")[0]
        eps = eps + settings.multires_discount**i * upscaled
        if size == (1, 1):
            break
    return eps / eps.std()


def add_noise(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """x_t = alpha x0 + sigma eps, computed in fp32 or better, returned in x0's dtype."""
    _, alpha, sigma = level.like(x0)
    return (alpha * x0 + sigma * eps.to(x0.device)).to(x0.dtype)
