"""Training of the autoencoder, in two stages: all of it, then the decoder on noisy latents.

In the first stage one image in five is a collage of arbitrary shapes in arbitrary colors and the
others are scenes, so that edges and palettes outside the grammar are reconstructed too.
"""

from math import cos, log10, pi, sin
from pathlib import Path
from random import Random
from time import monotonic

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from toy.draw import OVERSAMPLE, render_scene, scene
from toy.muon import Optimizers, trapezoid

HELD_OUT = 800_000_000  # scene seeds from here on are never trained on
# lightness, red-green, blue-yellow
OPPONENT = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.5, -0.5, 0.0], [-0.25, -0.25, 0.5]])


def images_to_tensor(images: list[Image.Image]) -> Tensor:
    """[b, 3, h, w] in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def collage(seed: int, size: int = 64) -> Image.Image:
    """A collage of two to eight arbitrary shapes in arbitrary colors; one in five is blurred."""
    rng = Random(f"collage {seed}")
    side = size * OVERSAMPLE

    def level() -> int:
        return rng.choice((rng.randrange(256), rng.randrange(0, 60), rng.randrange(196, 256)))

    def color() -> tuple[int, int, int]:
        return level(), level(), level()

    image = Image.new("RGB", (side, side), color())
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 8)):
        # the order of these random calls determines the training data
        x = rng.uniform(0, side)
        y = rng.uniform(0, side)
        r = side * rng.uniform(0.05, 0.4)
        kind = rng.choice(("oval", "polygon", "stroke", "ring", "arc", "box"))
        ratio = rng.uniform(0.4, 1)
        width = round(OVERSAMPLE * rng.uniform(2, 6))
        box = [x - r, y - r * ratio, x + r, y + r * ratio]
        if kind == "polygon":
            angles = sorted(rng.uniform(0, 2 * pi) for _ in range(rng.randint(3, 7)))
            pen.polygon([(x + r * cos(a), y + r * sin(a)) for a in angles], fill=color())
        elif kind == "stroke":
            points = [(x, y)]
            for _ in range(rng.randint(1, 2)):
                points.append((rng.uniform(0, side), rng.uniform(0, side)))
            pen.line(points, color(), width, "curve")
        elif kind == "arc":
            start, end = rng.uniform(0, 360), rng.uniform(0, 360)
            pen.arc([x - r, y - r, x + r, y + r], start, end, color(), width)
        elif kind == "box":
            pen.rounded_rectangle(box, r * ratio * rng.choice((0, 0.3, 0.9)), fill=color())
        else:
            fill = color() if kind == "oval" else None
            pen.ellipse(box, fill=fill, outline=color(), width=width)
    image = image.resize((size, size), Image.Resampling.HAMMING)
    if rng.random() < 0.2:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.2)))
    return image


def training_batch(first: int, size: int) -> Tensor:
    """The training images with indices first ... first + size - 1; every fifth is a collage."""
    indices = range(first, first + size)
    return images_to_tensor([collage(i) if i % 5 == 4 else render_scene(scene(i)) for i in indices])


def held_out_images(n: int) -> Tensor:
    """n images of scenes that no stage trains on."""
    return images_to_tensor([render_scene(scene(HELD_OUT + i)) for i in range(n)])


def reconstruction_loss(out: Tensor, target: Tensor) -> Tensor:
    """[b] absolute plus squared error, plus absolute error of 8 x 8 averages in opponent colors.

    With a small latent those averages are the first to be lost.
    """
    error = out - target
    pooled = F.avg_pool2d(torch.einsum("oc,bchw->bohw", OPPONENT, error), 8)
    return (
        error.abs().mean((1, 2, 3))
        + 3 * error.square().mean((1, 2, 3))
        + 0.5 * pooled.abs().mean((1, 2, 3))
    )


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor, chunk: int = 50) -> Tensor:
    """[b] peak signal-to-noise ratio of a round trip through the posterior mean, in dB."""
    values = []
    for x in images.split(chunk):
        out = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * ((out - x).square().mean((1, 2, 3)) / 4).log10())
    return torch.cat(values)


def pooled_psnr(values: Tensor) -> float:
    """PSNR of the mean squared error over all images, in dB: at most the mean of their PSNRs."""
    return -10 * log10((10 ** (-values / 10)).mean().item())


def train_autoencoder(
    vae: AutoencoderKL, folder: Path, stage: str, *, steps: int, size: int, seed: int, lr: float
) -> None:
    """Train `vae` in place; resumes from `folder`/<stage>.pt.

    Stage "vae" trains it whole, stage "decoder" only the layers after the latents.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    decoder_only = stage == "decoder"
    for name, p in vae.named_parameters():
        p.requires_grad_(not decoder_only or name.startswith(("decoder", "post_quant")))
    optimizers = Optimizers(vae.named_parameters(), lr)
    checkpoint = folder / f"{stage}.pt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        start = state["step"]
    test = held_out_images(64)
    began = monotonic()
    first_seed = 400_000_000 if decoder_only else 0
    for step in range(start, steps):
        torch.manual_seed((seed * 1_000_003 + step) * 64 + rank)
        first = (seed * 200_000 + step) * size * world + rank * size + first_seed
        x = training_batch(first, size).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            if decoder_only:
                level = 0.2 * torch.rand(len(x), 1, 1, 1)
                noise = torch.randn_like(posterior.mean)
                z = posterior.mean + level * noise * latent_std(vae)
            else:
                z = posterior.sample()
            out = vae.decode(z).sample
        loss = reconstruction_loss(out.float(), x).mean()
        if not decoder_only:
            loss = loss + 1e-6 * posterior.kl().mean()
        loss.backward()
        optimizers.step(trapezoid(step, steps, tail=0.3))
        if (step + 1) % 500 == 0 and rank == 0:
            values = psnr(vae, test)
            rate = (step + 1 - start) * size * world / (monotonic() - began)
            print(
                f"{stage} {step + 1} loss {loss.item():.4f} psnr {values.mean():.2f} "
                f"{pooled_psnr(values):.2f} {rate:.0f} images/s",
                flush=True,
            )
        if ((step + 1) % 2000 == 0 or step + 1 == steps) and rank == 0:
            partial = checkpoint.with_suffix(".part")
            state = {"model": vae.state_dict(), "optimizers": optimizers.state_dict()}
            torch.save({**state, "step": step + 1}, partial)
            partial.rename(checkpoint)


def latent_std(vae: AutoencoderKL) -> float:
    """The standard deviation of the raw latents, from the configured scaling factor."""
    return 1 / vae.config.scaling_factor
