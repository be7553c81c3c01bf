"""One training step of each contender, on the very same weights: the frozen network, ours, and peft in the loop of diffusers' scripts.

    problem = make("sd15", batch=1, side=256)
    step = Ours(problem, "lora");  loss = step()
A step draws noise and a level, calls the network, goes backward, clips, and steps AdamW. Latents and text come from a cache, as in every script that
is told --cache_latents and trains no text encoder. Left out on both sides: reading pictures, logs, and accelerate, with its autocast.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks import published_networks
from lora_core.adapters import injection
from lora_core.adapters.injection import AdapterSpec
from lora_core.diffusion import losses, noise, prediction
from lora_core.diffusion.losses import StepOutput
from lora_core.diffusion.noise import NoiseLevel, RandomKeys, Schedule
from lora_core.kernels import use_kernels
from lora_core.optim import schedules
from models import flux, load_family, sd
from models.components import read_json
from models.published import PUBLISHED_MODELS
from training import cuda_graph

TOY = Path(__file__).parent.parent / "toy" / "model"
RANK = 16
RATE, DECAY, CLIP = 1e-4, 1e-2, 1.0  # defaults of the scripts; clipping and decay are ours too
POSTERIOR_STD = 0.1  # std of the cached posteriors beside latents of std 1


class Problem(NamedTuple):
    """What every contender is given."""

    name: str
    network: nn.Module  # frozen; its parameters are shared, never copied
    told: dict[str, Any]  # its keyword arguments but for latents and level: the cached text
    mean: Tensor  # [b, c, h, w] fp32, of the cached latents
    scheduler: dict[str, Any]  # scheduler_config.json
    targets: tuple[str, ...]  # patterns of the adapted layers
    rank: int

    @property
    def is_flow(self) -> bool:
        return isinstance(self.network, published_networks.FluxTransformer2DModel)

    @property
    def paths(self) -> list[str]:
        return injection.target_paths(self.network, self.targets)

    @property
    def schedule(self) -> Schedule:
        return (
            flux.flux_schedule(self.scheduler)
            if self.is_flow
            else noise.vp_schedule_from_config(self.scheduler)
        )

    def out(self, network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output [b, c, h, w] at t [b]: rows 0 to 999 for a UNet, sigma for Flux."""
        x_t = x_t.to(self.told["encoder_hidden_states"].dtype)
        if not self.is_flow:
            return network(sample=x_t, timestep=t, **self.told)[0]
        return flux.unpack_latents(
            network(hidden_states=flux.pack_latents(x_t), timestep=t, **self.told)[0],
            *x_t.shape[-2:],
        )


def open_problem(
    name: str, *, batch: int, side: int = 0, device: str = "cpu", rank: int = RANK
) -> Problem:
    """The embedded model in fp32 at its own size ("toy"), or a random network of benchmarks.published_networks in bf16 for side x side pixels (0: its own)."""
    if name == "toy":
        family = load_family(str(TOY))
        network, side = family.modules["unet"].to(device), family.resolution
        text = family.encode_prompts(["a photo of a cat"] * batch).prompt_embeds.detach().to(device)
        mean = torch.randn(
            batch,
            family.latent_channels,
            side // family.factor,
            side // family.factor,
            generator=torch.Generator().manual_seed(0),
        )
        scheduler = read_json(str(TOY), "scheduler/scheduler_config.json")
        return build_problem(
            name,
            network,
            {"encoder_hidden_states": text},
            mean.to(device),
            scheduler,
            sd.ATTENTION,
            rank,
        )
    told = published_networks.network_inputs(name, batch, side, device)
    pixels, latents = (
        side or published_networks.SIDES[name],
        told.pop("hidden_states" if name == "flux" else "sample").float(),
    )
    mean = flux.unpack_latents(latents, pixels // 8, pixels // 8) if name == "flux" else latents
    scheduler = PUBLISHED_MODELS[published_networks.CLASSES[name][1]].files[
        "scheduler/scheduler_config.json"
    ]
    return build_problem(
        name,
        published_networks.build_network(name, device),
        told,
        mean,
        scheduler,
        published_networks.TARGETS[name],
        rank,
    )


def build_problem(
    name: str,
    network: nn.Module,
    told: dict[str, Any],
    mean: Tensor,
    scheduler: dict[str, Any],
    targets: tuple[str, ...],
    rank: int = RANK,
) -> Problem:
    """A problem on any UNet2DConditionModel or FluxTransformer2DModel, which is frozen by it; `told` may hold a timestep, which is dropped."""
    kept = {key: value for key, value in told.items() if key != "timestep"} | {"return_dict": False}
    return Problem(
        name, network.requires_grad_(False).train(), kept, mean, dict(scheduler), targets, rank
    )


def clone_network(network: nn.Module, *, channels_last: bool = False) -> nn.Module:
    """The same network on the same parameters with modules of its own; with channels_last, convolution weights of its own in that layout."""
    shared = {id(p): p for p in network.parameters() if not (channels_last and p.ndim == 4)}
    made = copy.deepcopy(network, shared)
    return made.to(memory_format=torch.channels_last) if channels_last else made  # type: ignore[call-overload]


# ---------------------------------------------------------------- ours


class StepNoise(NamedTuple):
    """What a step is given, keyed by image and visit."""

    posterior: Tensor  # [b, c, h, w] of N(0, 1), as eps
    eps: Tensor
    level: NoiseLevel


class OurLoop:
    """What train.py does in a step, with `update` its device part: fixed shapes, nothing read back. `graph` replays that (CUDA)."""

    def __init__(self, problem: Problem, network: nn.Module, *, graph: bool = False) -> None:
        self.problem, self.network, self.device, self.visit = (
            problem,
            network,
            problem.mean.device,
            0,
        )
        self.schedule, self.row = problem.schedule, "flow" if problem.is_flow else "epsilon"
        self.std, self.prior = (
            torch.full_like(problem.mean, POSTERIOR_STD),
            torch.zeros(len(problem.mean), dtype=torch.bool, device=self.device),
        )
        self.replayed = cuda_graph.GraphReplay() if graph else None

    def __call__(self) -> Tensor:
        """The loss of one step, for which nothing waits."""
        drawn = cuda_graph.map_tensors(self.draw(), self._put)
        return (self.update(drawn) if self.replayed is None else self.replayed(self.update, drawn))[
            0
        ]

    def draw(self) -> StepNoise:
        """The host's part, on the CPU."""
        self.visit += 1
        names = tuple(map(str, range(len(self.problem.mean))))
        keys, shape = (
            RandomKeys(0, names, (self.visit,) * len(names)),
            tuple(self.problem.mean.shape[1:]),
        )
        level = noise.sample_levels(self.schedule, keys)
        return StepNoise(keys.normal("posterior", shape), noise.sample_noise(keys, shape)[0], level)

    def _put(self, x: Tensor) -> Tensor:
        return (
            x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x
        )

    def update(self, drawn: StepNoise) -> tuple[Tensor]:
        raise NotImplementedError

    def loss(self, drawn: StepNoise) -> Tensor:
        """0-dim: train.training_step's rows, weighed and averaged."""
        x0 = self.problem.mean + self.std * drawn.posterior
        x_t = noise.add_noise(x0, drawn.eps, drawn.level)
        out = self.problem.out(self.network, x_t, drawn.level.t).float()
        out, target, row = prediction.to_loss_space(
            self.row, "model", out, x0, drawn.eps, drawn.level
        )
        rows = losses.mse(
            StepOutput(out, target, x0, drawn.eps, x_t, drawn.level, row, None, self.prior, 0)
        )
        rows = rows * losses.loss_weights("none", drawn.level, self.row)
        return losses.sum_losses(rows, self.prior, prior_weight=1.0, instances=len(rows))


class OurStep(OurLoop):
    """Adapters of lora_core on every target, clipping and AdamW as the training loop has them; `mode` of the kernels."""

    def __init__(
        self,
        problem: Problem,
        kind: str,
        network: nn.Module,
        *,
        mode: str = "auto",
        graph: bool = False,
    ) -> None:
        super().__init__(problem, network, graph=graph)
        injection.inject(network, AdapterSpec(problem.targets, kind=kind, rank=problem.rank))
        self.parameters, self.mode = injection.adapter_parameters(network), mode
        group = {"name": "denoiser", "params": self.parameters, "lr": RATE, "weight_decay": DECAY}
        self.optimizer = schedules.build_optimizer("adamw", [group], {})
        for held in self.optimizer.param_groups if graph else ():
            held["lr"] = torch.full(
                (), held["lr"], dtype=torch.float64, device=self.device
            )  # as training/setup.py has it: a graph reads it there

    def update(self, drawn: StepNoise) -> tuple[Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        with use_kernels(self.mode), injection.cache_dora_norms(self.network):
            loss = self.loss(drawn)
            loss.backward()
        schedules.clip_gradients_(self.parameters, CLIP)
        self.optimizer.step()
        return (loss.detach(),)


class FrozenStep(OurLoop):
    """No adapters, no optimiser: forward, and backward to the outputs of the first layers that an adapter would sit on."""

    def __init__(self, problem: Problem, network: nn.Module, *, graph: bool = False) -> None:
        super().__init__(problem, network, graph=graph)
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        for path in problem.paths:
            network.get_submodule(path).register_forward_hook(
                lambda _m, _x, y: y if y.requires_grad else GradientRoot.apply(y, anchor)
            )

    def update(self, drawn: StepNoise) -> tuple[Tensor]:
        loss = self.loss(drawn)
        loss.backward()
        return (loss.detach(),)


class GradientRoot(torch.autograd.Function):
    """y itself, from which on a gradient is asked for, as if a parameter had made it. No work either way."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


# ---------------------------------------------------------------- diffusers' scripts with peft


class PeftStep:
    """The loop body of train_dreambooth_lora_sdxl.py (UNets) and train_dreambooth_lora_flux.py (diffusers 0.4x), written anew from its behaviour.

    Its adapters are fp32 like ours, which the scripts see to for fp16 (cast_training_params); with bf16=True they are what add_adapter makes beside a
    bf16 base, and what the scripts then train. AdamW is torch's as the scripts call it, or fused.
    """

    def __init__(
        self,
        problem: Problem,
        kind: str,
        network: nn.Module,
        *,
        bf16: bool = False,
        fused: bool = False,
    ) -> None:
        self.problem, self.network, device = problem, network, problem.mean.device
        config = LoraConfig(
            r=problem.rank,
            lora_alpha=problem.rank,
            init_lora_weights="gaussian",
            target_modules=problem.paths,
            use_dora=kind == "dora",
        )
        network.add_adapter(config)  # type: ignore[operator]
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        for p in self.parameters:
            p.data = p.data.to(torch.bfloat16 if bf16 else torch.float32)
        settings: dict[str, Any] = {"fused": True} if fused else {}
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=RATE, betas=(0.9, 0.999), weight_decay=DECAY, eps=1e-8, **settings
        )
        self.rates = get_scheduler("constant", optimizer=self.optimizer)
        schedulers: Any = FlowMatchEulerDiscreteScheduler if problem.is_flow else DDPMScheduler
        self.scheduler = schedulers.from_config(
            {key: value for key, value in problem.scheduler.items() if not key.startswith("_")}
        )
        self.mean, self.std = problem.mean, torch.full_like(problem.mean, POSTERIOR_STD)
        self.dtype, self.device = problem.told["encoder_hidden_states"].dtype, device

    def __call__(self) -> float:
        """The loss of one step, read back for the progress bar as the scripts do."""
        x0 = (self.mean + self.std * torch.randn_like(self.mean)).to(self.dtype)
        loss = self.flow(x0) if self.problem.is_flow else self.diffusion(x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        return loss.detach().item()

    def diffusion(self, x0: Tensor) -> Tensor:
        eps = torch.randn_like(x0)
        t = torch.randint(
            0, self.scheduler.config.num_train_timesteps, (len(x0),), device=self.device
        ).long()
        x_t = self.scheduler.add_noise(x0, eps, t)
        return F.mse_loss(
            self.problem.out(self.network, x_t, t).float(), eps.float(), reduction="mean"
        )

    def flow(self, x0: Tensor) -> Tensor:
        eps = torch.randn_like(x0)
        u = compute_density_for_timestep_sampling("none", len(x0), 0.0, 1.0, 1.29)
        places = (u * self.scheduler.config.num_train_timesteps).long()
        t = self.scheduler.timesteps[places].to(self.device)
        sigma = self.sigmas(t, x0)
        out = self.problem.out(self.network, (1 - sigma) * x0 + sigma * eps, t / 1000)
        weight = compute_loss_weighting_for_sd3("none", sigmas=sigma)
        return torch.mean(
            (weight.float() * (out.float() - (eps - x0).float()) ** 2).reshape(len(x0), -1), 1
        ).mean()

    def sigmas(self, t: Tensor, like: Tensor) -> Tensor:
        """[b, 1, 1, 1], looked up row by row, which waits for the device."""
        table, times = (
            self.scheduler.sigmas.to(self.device, like.dtype),
            self.scheduler.timesteps.to(self.device),
        )
        rows = [(times == one).nonzero().item() for one in t.to(self.device)]
        return table[rows].flatten().reshape(-1, 1, 1, 1)
