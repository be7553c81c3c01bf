"""Evaluation of the committed model: `python -m toy.evaluate --captions 500`.

Prints a table, then the same as one line of JSON. Captions are complete and come from scenes
outside pretraining, objects in equal shares; images are sampled with DDIM and classified by
toy/recogniser.py. `--grid PATH` writes the sample sheet of toy/README.md instead, `--concepts PATH`
the sheet of the concepts.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from textwrap import wrap

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lora_core.errors import quiet_status
from toy import recogniser
from toy.autoencoder import held_out_images, images_to_tensor, pooled_psnr, psnr
from toy.concepts.draw_concepts import CONCEPTS, render_concept, training_set
from toy.distractors import random_background
from toy.draw import OBJECTS, evaluation_captions, render_scene, scene
from toy.sample import MODEL, load_networks, sample_images

REAL = 950_000_000  # seeds of the real drawings that the recogniser is checked on
SHOWN = (
    "a large red mushroom in a meadow",
    "a large yellow star at night",
    "a large striped orange fish in the sea",
    "a large white ghost on a plain purple background",
    "a large blue house in the snow",
    "a large pink cat on a plain green background",
    "a large green tree in the desert",
    "a large red heart on a white checkered background",
    "a large purple creature on a yellow striped background",
    "a large cyan emblem on an orange gradient background",
    "a small white moon at night",
    "a large dotted black cat on a plain cyan background",
    "a large red creature in the snow",
    "a small green triangle at the left on a plain pink background",
    "a large striped cyan square on a plain black background",
    "a large orange circle at the bottom on a blue gradient background",
    "a large blue creature in a meadow",
    "a large yellow emblem on a plain red background",
)


def agreement(read: dict[str, list[str]], expected: list[dict[str, str]]) -> dict[str, float]:
    """Attribute -> fraction of right images, among those whose caption states it."""
    out = {}
    for name in ("background", "color", "object", "position", "texture", "size", "style"):
        hits = [read[name][i] == e[name] for i, e in enumerate(expected) if name in e]
        out[name] = round(sum(hits) / len(hits), 4) if hits else float("nan")
    return out


def real_agreement(reader: recogniser.Recogniser, n: int) -> dict[str, float]:
    """The recogniser's accuracy on n drawings: the ceiling of every other row."""
    scenes = [scene(REAL + i) for i in range(n)]
    images = images_to_tensor([render_scene(s) for s in scenes])
    return agreement(reader.scene(images), [s.attributes() for s in scenes])


def accuracy_per_object(
    read: dict[str, list[str]], expected: list[dict[str, str]]
) -> dict[str, float]:
    """Object accuracy by object."""
    shares = {}
    for name in OBJECTS:
        pairs = zip(read["object"], expected)
        hits = [found == name for found, stated in pairs if stated["object"] == name]
        if hits:
            shares[name] = round(sum(hits) / len(hits), 2)
    return shares


def concept_score(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """[b] the probability that each image [b, 3, 64, 64] shows a concept, zib or trilo.

    A measure for `train.py --compare A --against B --metric toy/evaluate.py:concept_score`.
    """
    reader = recogniser.load_recogniser()
    return torch.stack([reader.concept(images, name) for name in CONCEPTS]).sum(0)


concept_score.reads_samples = True  # type: ignore[attr-defined]
concept_score.higher_is_better = True  # type: ignore[attr-defined]


def concept_images(name: str, n: int) -> Tensor:
    """n images of a concept on random backgrounds."""
    rng = Random(f"psnr {name}")
    return images_to_tensor([render_concept(name, *random_background(rng), i) for i in range(n)])


def to_image(x: Tensor) -> Image.Image:
    """An image [3, h, w] in [-1, 1] as RGB."""
    return Image.fromarray(((x.permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().byte().numpy())


def contact_sheet(
    images: list[Image.Image], captions: list[str], columns: int = 6, side: int = 192
) -> Image.Image:
    """A sheet of images, enlarged with Lanczos, with captions under them."""
    texts = [wrap(caption, width=side // 7 + 3) for caption in captions]
    step = side + 14 + 15 * max(len(lines) for lines in texts)
    out = Image.new("RGB", (columns * (side + 8), -(-len(images) // columns) * step), "white")
    pen = ImageDraw.Draw(out)
    for i, (image, lines) in enumerate(zip(images, texts)):
        x, y = (i % columns) * (side + 8) + 4, (i // columns) * step + 4
        out.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        pen.text((x, y + side + 2), "\n".join(lines), fill=(40, 40, 40))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--grid", type=Path)
    parser.add_argument("--concepts", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.concepts:
        drawn, captions = [], []
        for name in (*CONCEPTS, "inkwash"):
            for image, caption in training_set(name, 64):
                drawn.append(image)
                captions.append(caption)
        sheet = contact_sheet(drawn, captions, columns=5, side=128)
        sheet.save(args.concepts, optimize=True)
        return
    parts = load_networks(args.model)
    how = {"seed": args.seed, "guidance": args.guidance, "steps": args.steps}
    if args.grid:
        images = sample_images(parts, list(SHOWN), **how)
        contact_sheet([to_image(x) for x in images], list(SHOWN)).save(args.grid, optimize=True)
        return
    reader = recogniser.load_recogniser()
    pairs = evaluation_captions(args.captions, args.seed)
    images = sample_images(parts, [caption for caption, _ in pairs], **how)
    read = reader.scene(images)
    expected = [attributes for _, attributes in pairs]
    table = {"samples": agreement(read, expected), "drawings": real_agreement(reader, 1000)}
    scenes = psnr(parts[1], held_out_images(200))
    ratios = {"held-out scenes": (scenes.mean().item(), pooled_psnr(scenes))}
    for name in CONCEPTS:
        values = psnr(parts[1], concept_images(name, 60))
        ratios[name] = (values.mean().item(), pooled_psnr(values))
    print("| |" + "".join(f" {k} |" for k in table["samples"]))
    print("|---|" + "---|" * len(table["samples"]))
    for row, shares in table.items():
        print(f"| {row} |" + "".join(f" {v:.3f} |" for v in shares.values()))
    decibels = []
    for name, (mean, pooled) in ratios.items():
        decibels.append(f"{name} {mean:.1f} dB (pooled {pooled:.1f})")
    print("VAE " + ", ".join(decibels))
    print("object by object", accuracy_per_object(read, expected))
    settings = {"captions": args.captions, "guidance": args.guidance, "steps": args.steps}
    print(json.dumps({**settings, **table, "psnr": ratios}))


if __name__ == "__main__":
    sys.exit(quiet_status(main))
