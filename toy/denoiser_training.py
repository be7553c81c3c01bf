"""Training of denoiser and text encoder together, on cached latents.

The objective is epsilon prediction with the min-SNR weight, gamma 5 (Hang et al., arXiv
2303.09556), timesteps stratified over the batch, and captions emptied in one case of ten for
classifier-free guidance (Ho and Salimans, arXiv 2207.12598).
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import monotonic

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from toy.autoencoder import HELD_OUT, images_to_tensor
from toy.draw import render_scene, scene
from toy.muon import Optimizers, trapezoid
from toy.networks import MAX_TOKENS

EMPTY_SHARE = 0.1
GAMMA = 5.0
EMA_DECAY = 0.998


def alphas_cumprod() -> Tensor:
    """The cumulative signal power of Stable Diffusion's scaled linear schedule; [1000], fp32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, seeds: range, chunk: int = 50) -> Tensor:
    """Unscaled posterior means of the scenes' images; [n, 8, 16, 16] in fp16."""
    out = []
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(seeds), chunk):
            x = images_to_tensor([render_scene(scene(s)) for s in seeds[i : i + chunk]])
            x = x.to(memory_format=torch.channels_last)
            out.append(vae.encode(x).latent_dist.mode().half())
    return torch.cat(out)


def cache_latents(vae: AutoencoderKL, path: Path, n: int) -> None:
    """Writes the latents of scenes 0 ... n - 1 and of 512 held-out ones, and their scale.

    The scale gives them unit standard deviation.
    """
    began = monotonic()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = encode_scenes(vae, range(rank * n // world, (rank + 1) * n // world))
    parts = [torch.empty_like(share) for _ in range(world)] if world > 1 else [share]
    if world > 1:
        dist.all_gather(parts, share)
    if rank == 0:
        latents = torch.cat(parts)
        std = latents.float().std()
        held_out = encode_scenes(vae, range(HELD_OUT, HELD_OUT + 512))
        torch.save({"train": latents, "held_out": held_out, "scale": 1 / std.item()}, path)
        seconds = monotonic() - began
        print(f"latents {len(latents)} std {std:.3f} in {seconds:.0f} s", flush=True)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """[b, MAX_TOKENS] int64, padded and cut."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


@dataclass
class Pair:
    """Denoiser and text encoder, which are trained together."""

    unet: UNet2DConditionModel
    text: CLIPTextModel

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"unet": self.unet, "text": self.text})

    def epsilon(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Predicted noise [b, 8, 16, 16] of noisy latents x, timesteps t [b], token ids [b, s]."""
        context = self.text(input_ids=ids).last_hidden_state
        return self.unet(x, t, encoder_hidden_states=context).sample.float()


def denoising_loss(
    pair: Pair, x0: Tensor, ids: Tensor, t: Tensor, noise: Tensor, alphas: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared error of the predicted noise, min-SNR weighted and plain; [b] each."""
    a = alphas[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    error = (pair.epsilon(x_t, t, ids) - noise).square().mean((1, 2, 3))
    snr = alphas[t] / (1 - alphas[t])
    return error * snr.clamp(max=GAMMA) / snr, error.detach()


@torch.no_grad()
def validation_loss(pair: Pair, latents: Tensor, ids: Tensor, alphas: Tensor) -> float:
    """Plain squared error over held-out scenes at evenly spread timesteps with fixed noise."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
    t = (torch.arange(len(latents)) * 997) % 1000
    parts = []
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(latents), 64):
            part = slice(i, i + 64)
            _, error = denoising_loss(pair, latents[part], ids[part], t[part], noise[part], alphas)
            parts.append(error)
    return torch.cat(parts).mean().item()


def train_denoiser(
    pair: Pair,
    tokenizer: CLIPTokenizer,
    latents_path: Path,
    folder: Path,
    *,
    steps: int,
    size: int,
    seed: int,
    lr: float,
) -> None:
    """Train `pair`, which has the averaged weights afterwards; resumes from `folder`/unet.pt.

    That file has model, average, optimizers and step.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cache = torch.load(latents_path, weights_only=True, mmap=True)
    latents, scale = cache["train"], cache["scale"]
    alphas = alphas_cumprod()
    held = cache["held_out"].float() * scale
    held_ids = token_ids(tokenizer, [scene(HELD_OUT + i).caption() for i in range(512)])
    both = pair.modules()
    average = {k: v.clone() for k, v in both.state_dict().items()}
    # plain matmuls: torch 2.13's fused CPU attention made a bf16 step 1.75 times as long
    pair.unet.set_attn_processor(AttnProcessor())
    optimizers = Optimizers(both.named_parameters(), lr)
    checkpoint = folder / "unet.pt"
    start = 0
    began = monotonic()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        both.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        average, start = state["average"], state["step"]
    for step in range(start, steps):
        rng = Random(f"unet {seed} {step} {rank}")
        g = torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + rank)
        rows = [rng.randrange(len(latents)) for _ in range(size)]
        captions = []
        for i in rows:
            is_empty = rng.random() < EMPTY_SHARE
            captions.append("" if is_empty else scene(i).caption(rng.randrange(1 << 30)))
        ids = token_ids(tokenizer, captions)
        x0 = latents[rows].float() * scale
        strata = torch.randperm(size, generator=g) + torch.rand(size, generator=g)
        t = (strata * 1000 / size).long()
        noise = torch.randn(x0.shape, generator=g)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            losses, _ = denoising_loss(pair, x0, ids, t, noise, alphas)
            loss = losses.mean()
        loss.backward()
        optimizers.step(trapezoid(step, steps, tail=0.35))
        keep = min(EMA_DECAY, (step + 1) / (step + 10))
        for k, v in both.state_dict().items():
            if v.is_floating_point():
                average[k].lerp_(v, 1 - keep)
            else:
                average[k].copy_(v)
        if ((step + 1) % 250 == 0 or step + 1 == steps) and rank == 0:
            rate = (step + 1 - start) * size * world / (monotonic() - began)
            head = f"unet {step + 1} loss {loss.item():.4f} {rate:.0f} samples/s"
            print_validation(pair, average, (held, held_ids, alphas), head)
            partial = checkpoint.with_suffix(".part")
            state = {"model": both.state_dict(), "average": average, "step": step + 1}
            torch.save({**state, "optimizers": optimizers.state_dict()}, partial)
            partial.rename(checkpoint)
    both.load_state_dict(average)


def print_validation(
    pair: Pair, average: dict[str, Tensor], held: tuple[Tensor, Tensor, Tensor], head: str
) -> None:
    """Prints the validation error of the averaged weights after `head`."""
    both = pair.modules()
    now = {k: v.clone() for k, v in both.state_dict().items()}
    both.load_state_dict(average)
    print(f"{head} held-out {validation_loss(pair, *held):.4f}", flush=True)
    both.load_state_dict(now)
