"""`make demo-fusion`: two concepts that were learned apart, in one model and in one image.

Each concept is learned by train.py as an ED-LoRA (tokens for each cross-attention layer and a
LoRA), `merge.py fuse` puts both into one model, once as the plain sum of their updates and once by
gradient fusion (Mix-of-Show, arXiv 2305.18292), and regions draw both in one image. A recogniser,
trained separately, judges every image.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor

import merge
import train
from lora_core import patch
from lora_core.config import Config
from lora_core.diffusion.generation import generate_images
from lora_core.diffusion.regions import PromptRegion, parse_region
from lora_core.errors import UserError, quiet_status
from lora_core.formats.model_words import model_placeholders
from lora_core.placeholders import Placeholder
from lora_core.runs.pictures import ImageRow, draw_grid, save_png, to_images
from lora_core.settings import SamplerSettings
from lora_core.toml import read_toml
from models import Family, load_family
from toy import recogniser
from toy.concepts.draw_concepts import demo_prompts

INITIALIZERS = {"zib": "creature", "trilo": "emblem"}  # concept -> word that its tokens start from
# Prompts in which a concept is to stay what it is, {} for its word.
PROMPTS = (
    "photo of a {}", "{}", "a picture of {} in the sea", "a drawing of {} on a red background",
    "{} on a plain white background", "an image of {} in the snow",
)  # fmt: skip
SIDE = 64  # pixels of the model's images
WIDE = 3 * SIDE  # of an image of both concepts, which stand at its ends
SHIFTS = range(-24, 25, 8)  # pixels by which the part of such an image that is judged is moved
SHOWN = 3  # images of a concept in a row of the sheet
EACH = 4  # images of both concepts in one place
BATCH = 16


@dataclass(frozen=True)
class FusionOptions:
    """Two concepts of the embedded model, learned apart, in one model and in one image."""

    samples: int = 24
    """Images of each concept that are sampled and judged, by each model."""
    short: bool = False
    """A few steps and few samples, which show that everything runs and learn nothing."""
    config: str = "configs/toy_pti.toml"
    """The configuration of both runs."""
    out: str = "runs/fusion"
    """Folder of the runs, the models, the sheet and summary.json."""


class JudgedImages(NamedTuple):
    """Images of one model, and what the recogniser says of them."""

    images: list[Image.Image]
    notes: list[str]  # for each image, e.g. "zib 0.98"
    scores: dict[str, float]  # concept -> share of the images that show it


def fuse_demo(options: FusionOptions) -> dict[str, dict[str, float]]:
    """Train, fuse, draw and judge; returns model -> concept -> score, also in OUT/summary.json."""
    began = time.perf_counter()
    out = Path(options.out)
    runs = {name: learn_concept(name, options) for name in INITIALIZERS}
    corrected = ["--how", "corrected", "--prompts", *PROMPTS[: 2 if options.short else None]]
    if options.short:
        corrected += ["--steps", "2"]
    models = {
        "summed": fuse_runs(list(runs.values()), out / "summed", ["--how", "sum"]),
        "fused": fuse_runs(list(runs.values()), out / "fused", corrected),
    }
    reader = recogniser.load_recogniser()
    count = 2 if options.short else options.samples
    rows: list[ImageRow] = []
    scores: dict[str, dict[str, float]] = {}
    for label, drawn in judge_models(options, runs, models, reader, count):
        scores[label] = drawn.scores
        words = [f"{name} {share:.0%}" for name, share in drawn.scores.items()]
        rows.append(ImageRow("\n".join([label, *words]), drawn.images, drawn.notes))
    title = "two concepts, learned apart; the share of images that show them, and single scores"
    save_png(draw_grid(rows, title=title), out / "fusion.png")
    summary = {"scores": scores, "samples": count, "seconds": time.perf_counter() - began}
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    print_scores(scores, out, summary["seconds"])
    return scores


def learn_concept(name: str, options: FusionOptions) -> Path:
    """The folder of a finished run on one concept."""
    base: Config = read_toml(Path(options.config))
    config = replace(
        base,
        out=f"{options.out}/{name}",
        overwrite=True,
        data=replace(base.data, images=f"toy/concepts/{name}"),
        tokens=replace(base.tokens, init=(INITIALIZERS[name],), per_layer=True),
        validation=replace(base.validation, every=-1),
    )
    if options.short:
        config = replace(
            config,
            data=replace(config.data, variants=2),
            stages=tuple(replace(stage, steps=2) for stage in base.stages),
            samples=replace(base.samples, steps=1, guidance=1.0),
        )
    return train.train(config)


def fuse_runs(runs: Sequence[Path], folder: Path, options: Sequence[str]) -> Path:
    """The folder of the model with all concepts. Raises UserError where merge.py fails."""
    words = ["fuse", *map(str, runs), "--base", "toy/model", "--out", str(folder), *options]
    if merge.main([*words, "--overwrite"]):
        raise UserError(f"merge.py {' '.join(words)} failed, see above")
    return folder


# ---------------------------------------------------------------- drawing and judging


def judge_models(
    options: FusionOptions,
    runs: dict[str, Path],
    models: dict[str, Path],
    reader: recogniser.Recogniser,
    count: int,
) -> list[tuple[str, JudgedImages]]:
    """(row of the sheet, its images) of each concept alone, both models, and both with regions."""
    look = read_toml(Path(options.config)).samples
    recipe = SamplerSettings(look.sampler, 1 if options.short else look.steps, look.guidance)
    base = load_family("toy/model")
    modules = {**base.modules, "tokenizer": base.tokenizers["text_encoder"]}
    alone = []
    for name, run in runs.items():
        with patch(modules, run) as patched:
            words = {name: patched.placeholders[0]}
            alone.append(draw_concepts(base, words, recipe, reader, count))
    found = [("each alone", join_images(alone))]
    in_regions = []
    for label, model in models.items():
        family = load_family(str(model))
        words = dict(zip(runs, model_placeholders(model), strict=True))
        found.append((label, draw_concepts(family, words, recipe, reader, count)))
        both = draw_both(family, words, recipe, reader, count)
        in_regions.append((f"{label}, in regions", both))
    return found + in_regions


def draw_concepts(
    family: Family,
    words: dict[str, Placeholder],
    recipe: SamplerSettings,
    reader: recogniser.Recogniser,
    count: int,
) -> JudgedImages:
    """Images of each concept by itself, on backgrounds that are new for it."""
    parts = []
    for name, word in words.items():
        prompts = demo_prompts(count, seed=3, name=name)
        texts = [text.replace("TOK", word.word) for text, _ in prompts]
        pixels = draw_batches(family, texts, recipe, [word])
        sure = reader.concept(pixels, name)
        found = reader.scene(pixels)["background"]
        is_right = []
        for i, (_, background) in enumerate(prompts):
            is_right.append(bool(sure[i] > 0.5) and found[i] == background)
        notes = [f"{name} {value:.2f}" for value in sure[:SHOWN].tolist()]
        scores = {name: sum(is_right) / count}
        parts.append(JudgedImages(to_images(pixels[:SHOWN]), notes, scores))
    return join_images(parts)


def draw_both(
    family: Family,
    words: dict[str, Placeholder],
    recipe: SamplerSettings,
    reader: recogniser.Recogniser,
    count: int,
) -> JudgedImages:
    """Wide images with a region for each concept, each of which is judged by itself."""
    wide = replace(recipe, width=WIDE, height=SIDE)
    pixels = []
    for i, (text, _) in enumerate(demo_prompts(math.ceil(count / EACH), seed=4, name="zib")):
        place = text[text.index("TOK") + len("TOK ") :]
        regions = side_by_side(words, place)
        seeds = range(2000 + EACH * i, 2000 + EACH * i + min(EACH, count - EACH * i))
        drawn = generate_images(
            family, [place] * len(seeds), seeds, wide, regions=regions,
            placeholders=list(words.values()),
        )  # fmt: skip
        pixels.append(drawn)
    together = torch.cat(pixels)
    sure = {}
    for left, name in zip((0, WIDE - SIDE), words):
        sure[name] = find_concept(reader, together, name, left)
    scores = {name: float((values > 0.5).float().mean()) for name, values in sure.items()}
    scores["both"] = float((torch.stack(list(sure.values())) > 0.5).all(0).float().mean())
    shown = range(0, count, EACH)[: 2 * SHOWN]  # one of each place
    notes = []
    for i in shown:
        notes.append(", ".join(f"{name} {values[i]:.2f}" for name, values in sure.items()))
    return JudgedImages(to_images(together[list(shown)]), notes, scores)


def find_concept(reader: recogniser.Recogniser, pixels: Tensor, name: str, left: int) -> Tensor:
    """[n] how sure the recogniser is of the concept in the square at `left`, or a little beside it.

    It knows concepts near the middle of an image, and the model puts them anywhere in a region.
    """
    margin = max(SHIFTS)
    padded = F.pad(pixels, (margin, margin, 0, 0), mode="replicate")
    found = []
    for shift in SHIFTS:
        start = margin + left + shift
        found.append(reader.concept(padded[..., start : start + SIDE], name))
    return torch.stack(found).amax(0)


def side_by_side(words: dict[str, Placeholder], place: str) -> list[PromptRegion]:
    """A region for each concept, at the left and at the right end."""
    regions = []
    ends = ((0, "left"), (WIDE - SIDE, "right"))
    for (left, side), word in zip(ends, words.values(), strict=True):
        text = f"{left},0,{left + SIDE},{SIDE}: {word.word} at the {side} {place}"
        regions.append(parse_region(text, WIDE, SIDE))
    return regions


def draw_batches(
    family: Family, prompts: Sequence[str], recipe: SamplerSettings, words: Sequence[Placeholder]
) -> Tensor:
    """[n, 3, 64, 64] one image for each prompt, seeds counting up from 1000."""
    images = []
    for first in range(0, len(prompts), BATCH):
        part = prompts[first : first + BATCH]
        seeds = range(1000 + first, 1000 + first + len(part))
        images.append(generate_images(family, part, seeds, recipe, placeholders=words))
    return torch.cat(images)


def join_images(parts: Sequence[JudgedImages]) -> JudgedImages:
    """The images of all parts in one row."""
    joined = JudgedImages([], [], {})
    for part in parts:
        joined.images.extend(part.images)
        joined.notes.extend(part.notes)
        joined.scores.update(part.scores)
    return joined


def print_scores(scores: dict[str, dict[str, float]], out: Path, seconds: float) -> None:
    """Print the table of scores, and the commands that draw with the fused model."""
    names = list(INITIALIZERS)
    print("\n" + f"{'':22}" + "".join(f"{name:>8}" for name in [*names, "both"]))
    for label, own in scores.items():
        cells = [f"{own[name]:8.0%}" if name in own else " " * 8 for name in [*names, "both"]]
        print(f"{label:22}" + "".join(cells))
    alone, fused = scores["each alone"], scores["fused"]
    for name in names:
        if alone[name]:
            print(f"fusion keeps {fused[name] / alone[name]:.0%} of the score of {name} alone")
    first, second = (word.word for word in model_placeholders(out / "fused"))
    print(f"""{seconds:.0f} s in all; see {out / "fusion.png"}; draw more of it:
  python infer.py --model {out / "fused"} --width {WIDE} --height {SIDE} --out two.png \\
    --prompt "in the desert" --region "0,0,{SIDE},{SIDE}: {first} at the left in the desert" \\
    --region "{WIDE - SIDE},0,{WIDE},{SIDE}: {second} at the right in the desert" """)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    text = FusionOptions.__doc__
    options = tyro.cli(FusionOptions, args=argv, prog="python -m toy.fusion", description=text)
    try:
        fuse_demo(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(quiet_status(main))
