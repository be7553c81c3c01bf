"""The autoencoder's two stages: encoder and decoder together, then the decoder alone on noisy
latents.

The first stage sees scenes and, one time in five, collages of arbitrary shapes in arbitrary
colours, so that edges and palettes outside the grammar survive the latent space as well.
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
OPPONENT = torch.tensor(
    [[1 / 3, 1 / 3, 1 / 3], [0.5, -0.5, 0.0], [-0.25, -0.25, 0.5]]
)  # lightness, red-green, blue-yellow


def images_to_tensor(images: list[Image.Image]) -> Tensor:
    """[b, 3, h, w] in [-1, 1]."""
    return (
        torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )


def collage(seed: int, size: int = 64) -> Image.Image:
    """Two to eight arbitrary shapes in arbitrary colours; one in five is blurred a little."""
    rng, side = Random(f"collage {seed}"), size * OVERSAMPLE

    def colour() -> tuple[int, int, int]:
        return tuple(
            rng.choice((rng.randrange(256), rng.randrange(0, 60), rng.randrange(196, 256)))
            for _ in range(3)
        )  # type: ignore

    image = Image.new("RGB", (side, side), colour())
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 8)):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), side * rng.uniform(0.05, 0.4)
        kind, ratio = (
            rng.choice(("oval", "polygon", "stroke", "ring", "arc", "box")),
            rng.uniform(0.4, 1),
        )
        width = round(OVERSAMPLE * rng.uniform(2, 6))
        if kind == "polygon":
            pen.polygon(
                [
                    (x + r * cos(a), y + r * sin(a))
                    for a in sorted(rng.uniform(0, 2 * pi) for _ in range(rng.randint(3, 7)))
                ],
                fill=colour(),
            )
        elif kind == "stroke":
            pen.line(
                [
                    (x, y),
                    *(
                        (rng.uniform(0, side), rng.uniform(0, side))
                        for _ in range(rng.randint(1, 2))
                    ),
                ],
                colour(),
                width,
                "curve",
            )
        elif kind == "arc":
            pen.arc(
                [x - r, y - r, x + r, y + r],
                rng.uniform(0, 360),
                rng.uniform(0, 360),
                colour(),
                width,
            )
        elif kind == "box":
            pen.rounded_rectangle(
                [x - r, y - r * ratio, x + r, y + r * ratio],
                r * ratio * rng.choice((0, 0.3, 0.9)),
                fill=colour(),
            )
        else:
            pen.ellipse(
                [x - r, y - r * ratio, x + r, y + r * ratio],
                fill=colour() if kind == "oval" else None,
                outline=colour(),
                width=width,
            )
    image = image.resize((size, size), Image.Resampling.HAMMING)
    return (
        image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.2)))
        if rng.random() < 0.2
        else image
    )


def training_batch(first: int, size: int) -> Tensor:
    """The training pictures with indices first ... first + size - 1; every fifth is a collage."""
    return images_to_tensor(
        [collage(i) if i % 5 == 4 else render_scene(scene(i)) for i in range(first, first + size)]
    )


def held_out_images(n: int) -> Tensor:
    """n pictures of scenes that no stage trains on."""
    return images_to_tensor([render_scene(scene(HELD_OUT + i)) for i in range(n)])


def reconstruction_loss(out: Tensor, target: Tensor) -> Tensor:
    """Absolute and squared error, and the absolute error of 8 x 8 averages in opponent colours,
    which a small latent loses first; [b].
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
    """Peak signal-to-noise ratio of each round trip through the posterior mean, in dB; [b]."""
    values = []
    for x in images.split(chunk):
        out = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * ((out - x).square().mean((1, 2, 3)) / 4).log10())
    return torch.cat(values)


def pooled_psnr(values: Tensor) -> float:
    """The ratio of the mean squared error over all pictures, in dB: stricter than the mean ratio."""
    return -10 * log10((10 ** (-values / 10)).mean().item())


def train_autoencoder(
    vae: AutoencoderKL, folder: Path, stage: str, *, steps: int, size: int, seed: int, lr: float
) -> None:
    """Trains `vae` in place: stage "vae" trains it whole, stage "decoder" only what follows the
    latents. Resumes from `folder`/<stage>.pt.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    alone = stage == "decoder"
    for name, p in vae.named_parameters():
        p.requires_grad_(not alone or name.startswith(("decoder", "post_quant")))
    optimisers, checkpoint, start = (
        Optimizers(vae.named_parameters(), lr),
        folder / f"{stage}.pt",
        0,
    )
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        start = state["step"]
    test, began = held_out_images(64), monotonic()
    for step in range(start, steps):
        torch.manual_seed((seed * 1_000_003 + step) * 64 + rank)
        x = training_batch(
            (seed * 200_000 + step) * size * world + rank * size + (400_000_000 if alone else 0),
            size,
        )
        x = x.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = (
                posterior.mean
                + 0.2
                * torch.rand(len(x), 1, 1, 1)
                * torch.randn_like(posterior.mean)
                * latent_std(vae)
                if alone
                else posterior.sample()
            )
            out = vae.decode(z).sample
        loss = reconstruction_loss(out.float(), x).mean() + (
            0 if alone else 1e-6 * posterior.kl().mean()
        )
        loss.backward()
        optimisers.step(trapezoid(step, steps, tail=0.3))
        if (step + 1) % 500 == 0 and rank == 0:
            values, rate = (
                psnr(vae, test),
                (step + 1 - start) * size * world / (monotonic() - began),
            )
            print(
                f"{stage} {step + 1} loss {loss.item():.4f} psnr {values.mean():.2f} "
                f"{pooled_psnr(values):.2f} {rate:.0f} images/s",
                flush=True,
            )
        if ((step + 1) % 2000 == 0 or step + 1 == steps) and rank == 0:
            partial = checkpoint.with_suffix(".part")
            torch.save(
                {
                    "model": vae.state_dict(),
                    "optimisers": optimisers.state_dict(),
                    "step": step + 1,
                },
                partial,
            )
            partial.rename(checkpoint)


def latent_std(vae: AutoencoderKL) -> float:
    """The standard deviation of the raw latents, from the configured scaling factor."""
    return 1 / vae.config.scaling_factor
