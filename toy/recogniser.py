"""Classifier of the toy world's images: the attributes of a scene, and whether a concept is in it.

It is never used in training the model.

    reader = load_recogniser()
    reader.scene(images)["background"]       # list of names, one per image
    reader.concept(images, "zib")            # probabilities [b]

`python -m toy.recogniser --seed 0` trains both networks on drawings, half of them blurred, noisy,
recolored or passed through the autoencoder (so that generated images are inside the domain), and
writes toy/recogniser.safetensors in fp16.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from time import monotonic

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.errors import quiet_status
from toy.autoencoder import images_to_tensor
from toy.concepts.draw_concepts import CONCEPTS
from toy.distractors import concept_example
from toy.draw import (
    BACKGROUNDS,
    COLORS,
    OBJECTS,
    POSITIONS,
    SIZES,
    STYLES,
    TEXTURES,
    render_scene,
    scene,
)
from toy.muon import Optimizers, trapezoid
from toy.sample import load_networks

WEIGHTS = Path(__file__).parent / "recogniser.safetensors"
HELD_OUT = 850_000_000
HEADS: dict[str, dict[str, tuple[str, ...]]] = {
    "scene": {
        "object": OBJECTS,
        "color": tuple(COLORS),
        "texture": TEXTURES,
        "size": tuple(SIZES),
        "position": tuple(POSITIONS),
        "background": BACKGROUNDS,
        "style": (*STYLES, "place"),
    },
    "concept": {"concept": ("none", *CONCEPTS)},
}
LabeledImage = tuple[Image.Image, dict[str, str]]


class Reader(nn.Module):
    """A small residual CNN with one linear head per attribute, 0.3 M parameters."""

    def __init__(self, heads: dict[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.heads = heads
        widths = (3, 24, 48, 80, 64)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.norm = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.keep = nn.ModuleList(nn.Conv2d(b, b, 3, 1, 1) for b in (48, 80))
        self.hidden = nn.Linear(widths[-1] * 16, 128)
        self.out = nn.Linear(128, sum(map(len, heads.values())))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits [b, n] of every head for images [b, 3, 64, 64] in [-1, 1]."""
        for i, (down, norm) in enumerate(zip(self.down, self.norm)):
            x = F.silu(norm(down(x)))
            if i in (1, 2):
                x = x + F.silu(self.keep[i - 1](x))
        out = self.out(F.silu(self.hidden(x.flatten(1))))
        return dict(zip(self.heads, out.split([len(v) for v in self.heads.values()], 1)))


class Recogniser:
    """The two trained networks as one; images are [b, 3, 64, 64] in [-1, 1]."""

    def __init__(self, readers: dict[str, Reader]) -> None:
        self.readers = readers

    @torch.no_grad()
    def scene(self, images: Tensor) -> dict[str, list[str]]:
        """The most likely name of every attribute, for each image."""
        logits = self.readers["scene"](images.float())
        names = {}
        for head, values in logits.items():
            names[head] = [HEADS["scene"][head][i] for i in values.argmax(1)]
        return names

    @torch.no_grad()
    def concept(self, images: Tensor, name: str) -> Tensor:
        """[b] the probability that each image shows the concept; above 0.5 counts as shown."""
        if name not in CONCEPTS:
            raise ValueError(f"unknown concept {name!r}; known are {', '.join(CONCEPTS)}")
        logits = self.readers["concept"](images.float())["concept"]
        return logits.softmax(1)[:, 1 + CONCEPTS.index(name)]


def load_recogniser(path: Path = WEIGHTS) -> Recogniser:
    """The committed recogniser, in fp32."""
    state = load_file(path)
    readers = {}
    for part, heads in HEADS.items():
        prefix = f"{part}."
        own = {key: values.float() for key, values in state.items() if key.startswith(prefix)}
        readers[part] = Reader(heads).eval()
        readers[part].load_state_dict({key.removeprefix(prefix): v for key, v in own.items()})
    return Recogniser(readers)


def scene_example(seed: int) -> LabeledImage:
    """A scene with all its labels.

    One time in five it is a concept or near miss, labeled with its background only.
    """
    if seed % 5 == 4:
        image, labels = concept_example(seed)
        return image, {k: v for k, v in labels.items() if k != "concept"}
    s = scene(seed)
    return render_scene(s), s.attributes()


EXAMPLES: dict[str, Callable[[int], LabeledImage]] = {
    "scene": scene_example,
    "concept": concept_example,
}


def to_labels(labels: list[dict[str, str]], heads: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Class indices [b] of every head, -100 where an example has no such label."""
    indices = {}
    for head, names in heads.items():
        own = [names.index(row[head]) if head in row else -100 for row in labels]
        indices[head] = torch.tensor(own)
    return indices


def labeled_images(part: str, seeds: range) -> tuple[Tensor, dict[str, Tensor]]:
    """Images [b, 3, 64, 64] and labels."""
    images, labels = [], []
    for seed in seeds:
        image, own = EXAMPLES[part](seed)
        images.append(image)
        labels.append(own)
    return images_to_tensor(images), to_labels(labels, HEADS[part])


@torch.no_grad()
def round_trips(part: str, n: int, first: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Examples passed through the committed autoencoder with up to 30 % noise in the latents."""
    _, vae, _ = load_networks()
    x, labels = labeled_images(part, range(first, first + n))
    g = torch.Generator().manual_seed(first)
    out = []
    for chunk in x.split(50):
        z = vae.encode(chunk).latent_dist.mode()
        level = 0.3 * torch.rand(len(z), 1, 1, 1, generator=g) / vae.config.scaling_factor
        out.append(vae.decode(z + level * torch.randn(z.shape, generator=g)).sample.clamp(-1, 1))
    return torch.cat(out), labels


def degrade(x: Tensor, g: torch.Generator) -> Tensor:
    """The images with random blur, noise, gain and tint; a third of them unchanged."""
    b = len(x)
    sigma = (torch.rand(b, 1, generator=g) * 1.3).clamp(min=0.05)
    kernel = torch.exp(-0.5 * (torch.arange(-3, 4.0) / sigma) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    # channels become the batch, images the groups
    flat = F.pad(x, (3, 3, 3, 3), mode="replicate").transpose(0, 1)
    columns = F.conv2d(flat, kernel.view(b, 1, 7, 1), groups=b)
    blurred = F.conv2d(columns, kernel.view(b, 1, 1, 7), groups=b).transpose(0, 1)
    gain = 1 + 0.1 * torch.randn(b, 1, 1, 1, generator=g)
    tint = 0.06 * torch.randn(b, 3, 1, 1, generator=g)
    worn = blurred * gain + tint
    worn = worn + 0.1 * torch.rand(b, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)
    return torch.where(torch.rand(b, 1, 1, 1, generator=g) < 1 / 3, x, worn.clamp(-1, 1))


def train_reader(part: str, seed: int, steps: int, size: int, trips: int) -> Reader:
    """A reader trained on fresh drawings.

    A quarter of each batch is sampled from `trips` autoencoder round trips.
    """
    torch.manual_seed(seed)
    reader = Reader(HEADS[part])
    began = monotonic()
    optimizers = Optimizers(reader.named_parameters(), 3e-3)
    pool, pool_labels = round_trips(part, trips, 600_000_000 + seed * 1_000_000)
    test, test_labels = labeled_images(part, range(HELD_OUT, HELD_OUT + 1000))
    for step in range(steps):
        rng = Random(f"{part} {seed} {step}")
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        fresh = size - size // 4
        first = (seed * 1_000_000 + step) * fresh
        x, labels = labeled_images(part, range(first, first + fresh))
        rows = [rng.randrange(trips) for _ in range(size // 4)]
        x = torch.cat([degrade(x, g), pool[rows]])
        labels = {k: torch.cat([v, pool_labels[k][rows]]) for k, v in labels.items()}
        logits = reader(x.to(memory_format=torch.channels_last))
        losses = [F.cross_entropy(logits[k], labels[k], label_smoothing=0.02) for k in logits]
        loss = torch.stack(losses).sum()
        loss.backward()
        optimizers.step(trapezoid(step, steps, tail=0.5, warmup=100))
        if (step + 1) % 500 == 0 or step + 1 == steps:
            print(
                f"{part} {step + 1} loss {loss.item():.3f} {accuracy(reader, test, test_labels)} "
                f"{monotonic() - began:.0f} s",
                flush=True,
            )
    return reader


@torch.no_grad()
def accuracy(reader: Reader, x: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    """Head -> fraction of labeled images that it classifies correctly."""
    logits = reader(x)
    shares = {}
    for name, indices in labels.items():
        right = (logits[name].argmax(1) == indices)[indices >= 0]
        shares[name] = round(right.float().mean().item(), 4)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    state: dict[str, Tensor] = {}
    for part in HEADS:
        reader = train_reader(part, args.seed, args.steps, 32, 6000)
        state |= {f"{part}.{k}": v.half().contiguous() for k, v in reader.state_dict().items()}
    save_file(state, WEIGHTS)


if __name__ == "__main__":
    sys.exit(quiet_status(main))
