"""Training steps of the contenders on the same weights: the frozen network, ours, and peft in the
loop of diffusers' scripts.

    problem = open_problem("sd15", batch=1, side=256)
    step = OurStep(problem, "lora", clone_network(problem.network))
    loss = step()

A step samples noise and a level, calls the network, goes backward, clips, and steps AdamW. Latents
and text come from a cache, as in every script that caches latents and trains no text encoder. Left
out on both sides: reading images, logs, and accelerate, with its autocast.
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
from lora_core.optim import building, gradients
from lora_core.tensor_trees import map_tensors
from models import flow, load_family, sd
from models.components import read_json
from models.published_configs import MODEL_FILES
from training import cuda_graph

TOY = Path(__file__).parent.parent / "toy" / "model"
RANK = 16
RATE, DECAY, CLIP = 1e-4, 1e-2, 1.0  # defaults of the scripts; clipping and decay are ours too
POSTERIOR_STD = 0.1  # of the cached posteriors; the latents have std 1


class Problem(NamedTuple):
    """A frozen network and its inputs, the same for every contender."""

    name: str
    network: nn.Module  # frozen; its parameters are shared, never copied
    conditioning: dict[str, Any]  # keyword arguments of the network for the text
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
        if self.is_flow:
            return flow.flow_schedule_from_config(self.scheduler)
        return noise.vp_schedule_from_config(self.scheduler)

    def out(self, network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output [b, c, h, w] at t [b]: steps 0 to 999 for a UNet, sigma for Flux."""
        x_t = x_t.to(self.conditioning["encoder_hidden_states"].dtype)
        if not self.is_flow:
            return network(sample=x_t, timestep=t, **self.conditioning)[0]
        packed = flow.pack_latents(x_t)
        out = network(hidden_states=packed, timestep=t, **self.conditioning)[0]
        return flow.unpack_latents(out, *x_t.shape[-2:])


def open_problem(
    name: str, *, batch: int, side: int = 0, device: str = "cpu", rank: int = RANK
) -> Problem:
    """The problem of a named model, for images of side x side pixels (0: the native side).

    "toy" is the embedded model in fp32 at its own size, the others are random networks of
    benchmarks.published_networks in bf16.
    """
    if name == "toy":
        return _open_toy(batch, device, rank)
    inputs = published_networks.network_inputs(name, batch, side, device)
    latents = inputs.pop("hidden_states" if name == "flux" else "sample").float()
    if name == "flux":
        height = (side or published_networks.SIDES[name]) // 8
        latents = flow.unpack_latents(latents, height, height)
    kind = published_networks.CLASSES[name][1]
    scheduler = MODEL_FILES[kind]["scheduler/scheduler_config.json"]
    network = published_networks.build_network(name, device)
    targets = published_networks.TARGETS[name]
    return build_problem(name, network, inputs, latents, scheduler, targets, rank)


def _open_toy(batch: int, device: str, rank: int) -> Problem:
    family = load_family(str(TOY))
    network, side = family.modules["unet"].to(device), family.resolution // family.factor
    text = family.encode_prompts(["a photo of a cat"] * batch).prompt_embeds.detach().to(device)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(batch, family.latent_channels, side, side, generator=generator)
    scheduler = read_json(str(TOY), "scheduler/scheduler_config.json")
    inputs = {"encoder_hidden_states": text}
    return build_problem("toy", network, inputs, mean.to(device), scheduler, sd.ATTENTION, rank)


def build_problem(
    name: str,
    network: nn.Module,
    inputs: dict[str, Any],
    mean: Tensor,
    scheduler: dict[str, Any],
    targets: tuple[str, ...],
    rank: int = RANK,
) -> Problem:
    """A problem on any UNet2DConditionModel or FluxTransformer2DModel, which it freezes.

    `inputs` may hold a timestep, which is dropped.
    """
    kept = {key: value for key, value in inputs.items() if key != "timestep"}
    kept["return_dict"] = False
    network.requires_grad_(False).train()
    return Problem(name, network, kept, mean, dict(scheduler), targets, rank)


def clone_network(network: nn.Module, *, channels_last: bool = False) -> nn.Module:
    """A copy of the network's modules that shares its parameters.

    With channels_last it has its own convolution weights, in that layout.
    """
    shared = {id(p): p for p in network.parameters() if not (channels_last and p.ndim == 4)}
    made = copy.deepcopy(network, shared)
    if channels_last:
        made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return made


# ---------------------------------------------------------------- ours


class StepNoise(NamedTuple):
    """The random numbers of one step, keyed by image and visit."""

    posterior: Tensor  # [b, c, h, w] of N(0, 1), as eps
    eps: Tensor
    level: NoiseLevel


class OurLoop:
    """The training step of train.py.

    `update` is its part on the device: fixed shapes, nothing read back. `graph` replays that in a
    CUDA graph.
    """

    def __init__(self, problem: Problem, network: nn.Module, *, graph: bool = False) -> None:
        self.problem, self.network, self.device = problem, network, problem.mean.device
        self.visit = 0
        self.schedule = problem.schedule
        self.row = "flow" if problem.is_flow else "epsilon"  # key of PREDICTIONS
        self.std = torch.full_like(problem.mean, POSTERIOR_STD)
        self.prior = torch.zeros(len(problem.mean), dtype=torch.bool, device=self.device)
        self.replayed = cuda_graph.GraphReplay() if graph else None

    def __call__(self) -> Tensor:
        """The loss of one step, as a tensor: nothing waits for the device."""
        sampled = map_tensors(self.sample_step(), self._to_device)
        if self.replayed is None:
            return self.update(sampled)[0]
        return self.replayed(self.update, sampled)[0]

    def sample_step(self) -> StepNoise:
        """The random numbers of a step, sampled on the CPU."""
        self.visit += 1
        names = tuple(map(str, range(len(self.problem.mean))))
        keys = RandomKeys(0, names, (self.visit,) * len(names))
        shape = tuple(self.problem.mean.shape[1:])
        level = noise.sample_levels(self.schedule, keys)
        return StepNoise(keys.normal("posterior", shape), noise.sample_noise(keys, shape)[0], level)

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return x
        return x.pin_memory().to(self.device, non_blocking=True)

    def update(self, sampled: StepNoise) -> tuple[Tensor]:
        """Compute the step on the device; returns its loss."""
        raise NotImplementedError

    def loss(self, sampled: StepNoise) -> Tensor:
        """The mean of train.training_step's weighted losses [b], 0-dim."""
        eps, level = sampled.eps, sampled.level
        x0 = self.problem.mean + self.std * sampled.posterior
        x_t = noise.add_noise(x0, eps, level)
        out = self.problem.out(self.network, x_t, level.t).float()
        out, target, row = prediction.to_loss_space(self.row, "model", out, x0, eps, level)
        rows = losses.mse(StepOutput(out, target, x0, eps, x_t, level, row, None, self.prior, 0))
        rows = rows * losses.loss_weights("none", level, self.row)
        return losses.sum_losses(rows, self.prior, prior_weight=1.0, instances=len(rows))


class OurStep(OurLoop):
    """Our step: adapters of lora_core on every target, clipping and AdamW as in the training loop.

    `mode`: the kernel mode.
    """

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
        self.optimizer = building.build_optimizer("adamw", [group], {})
        if graph:  # a graph reads the learning rates on the device, as in training/setup.py
            for built in self.optimizer.param_groups:
                rate = torch.full((), built["lr"], dtype=torch.float64, device=self.device)
                built["lr"] = rate

    def update(self, sampled: StepNoise) -> tuple[Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        with use_kernels(self.mode), injection.cache_dora_norms(self.network):
            loss = self.loss(sampled)
            loss.backward()
        gradients.clip_gradients_(self.parameters, CLIP)
        self.optimizer.step()
        return (loss.detach(),)


class FrozenStep(OurLoop):
    """The frozen network's step, without adapters and optimizer: forward, and backward to the
    outputs of the first layers that get an adapter.
    """

    def __init__(self, problem: Problem, network: nn.Module, *, graph: bool = False) -> None:
        super().__init__(problem, network, graph=graph)
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        for path in problem.paths:
            network.get_submodule(path).register_forward_hook(
                lambda _m, _x, y: y if y.requires_grad else GradientRoot.apply(y, anchor)
            )

    def update(self, sampled: StepNoise) -> tuple[Tensor]:
        loss = self.loss(sampled)
        loss.backward()
        return (loss.detach(),)


class GradientRoot(torch.autograd.Function):
    """The identity on y, which makes it require a gradient; no work forward or backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


# ---------------------------------------------------------------- diffusers' scripts with peft


class PeftStep:
    """The loop body of diffusers' scripts (0.4x) with peft, reimplemented from its behavior.

    train_dreambooth_lora_sdxl.py for UNets and train_dreambooth_lora_flux.py. Its adapters are fp32
    like ours, as in the scripts for fp16 (cast_training_params); with bf16=True they have the dtype
    that add_adapter chooses for a bf16 base, in which the scripts then train. AdamW is torch's as
    the scripts call it, or fused.
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
        adapter = LoraConfig(
            r=problem.rank,
            lora_alpha=problem.rank,
            init_lora_weights="gaussian",
            target_modules=problem.paths,
            use_dora=kind == "dora",
        )
        network.add_adapter(adapter)  # type: ignore[operator]
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        for p in self.parameters:
            p.data = p.data.to(torch.bfloat16 if bf16 else torch.float32)
        settings: dict[str, Any] = {"fused": True} if fused else {}
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=RATE, betas=(0.9, 0.999), weight_decay=DECAY, eps=1e-8, **settings
        )
        self.rates = get_scheduler("constant", optimizer=self.optimizer)
        schedulers: Any = FlowMatchEulerDiscreteScheduler if problem.is_flow else DDPMScheduler
        config = {key: x for key, x in problem.scheduler.items() if not key.startswith("_")}
        self.scheduler = schedulers.from_config(config)
        self.mean, self.std = problem.mean, torch.full_like(problem.mean, POSTERIOR_STD)
        self.dtype, self.device = problem.conditioning["encoder_hidden_states"].dtype, device

    def __call__(self) -> float:
        """The loss of one step, read back for the progress bar as the scripts do."""
        x0 = (self.mean + self.std * torch.randn_like(self.mean)).to(self.dtype)
        loss = self.flow_loss(x0) if self.problem.is_flow else self.diffusion_loss(x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        return loss.detach().item()

    def diffusion_loss(self, x0: Tensor) -> Tensor:
        """The loss of epsilon prediction."""
        eps = torch.randn_like(x0)
        steps = self.scheduler.config.num_train_timesteps
        t = torch.randint(0, steps, (len(x0),), device=self.device).long()
        x_t = self.scheduler.add_noise(x0, eps, t)
        out = self.problem.out(self.network, x_t, t)
        return F.mse_loss(out.float(), eps.float(), reduction="mean")

    def flow_loss(self, x0: Tensor) -> Tensor:
        """The loss of flow matching."""
        eps = torch.randn_like(x0)
        u = compute_density_for_timestep_sampling("none", len(x0), 0.0, 1.0, 1.29)
        places = (u * self.scheduler.config.num_train_timesteps).long()
        t = self.scheduler.timesteps[places].to(self.device)
        sigma = self.look_up_sigmas(t, x0)
        out = self.problem.out(self.network, (1 - sigma) * x0 + sigma * eps, t / 1000)
        weight = compute_loss_weighting_for_sd3("none", sigmas=sigma)
        errors = weight.float() * (out.float() - (eps - x0).float()) ** 2
        return torch.mean(errors.reshape(len(x0), -1), 1).mean()

    def look_up_sigmas(self, t: Tensor, like: Tensor) -> Tensor:
        """[b, 1, 1, 1] sigmas, looked up one by one as in the scripts; waits for the device."""
        table = self.scheduler.sigmas.to(self.device, like.dtype)
        times = self.scheduler.timesteps.to(self.device)
        rows = [(times == one).nonzero().item() for one in t.to(self.device)]
        return table[rows].flatten().reshape(-1, 1, 1, 1)
