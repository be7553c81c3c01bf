"""`make demo`: pivotal tuning of the embedded model on five images of a new concept.

The training is train.py's with configs/toy_pti.toml, which a user edits. This file adds
measurements that need drawings: whether a recogniser, trained separately, finds the concept and the
background that the prompt names, and whether unrelated captions still give what they state.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import train
from lora_core import patch
from lora_core.config import Config
from lora_core.diffusion.generation import SamplerSettings, generate_images
from lora_core.errors import UserError, quiet_status
from lora_core.toml import read_toml
from models import Family, load_family
from toy import recogniser
from toy.concepts.draw_concepts import CONCEPTS, demo_prompts, render_concept
from toy.draw import PLACES, article, background_phrase, evaluation_captions

# Plain prompts for the model without fine-tuning, which has to be better than the best of them.
TEXT_ONLY = {
    "zib": ("a creature", "a green creature", "a cyan creature", "an orange creature"),
    "trilo": ("an emblem", "a purple emblem", "a pink emblem", "a blue emblem"),
}
HELD_OUT_DRAWINGS = 16  # drawings of the concept that are not among the training images
BATCH = 16


@dataclass(frozen=True)
class DemoOptions:
    """Pivotal tuning of the embedded model, with measurements before and after."""

    concept: str = "zib"
    """zib, a small character, or trilo, a logo."""
    photos: str = ""
    """Folder of your own images instead, to show the path on real files; the embedded model knows
    only drawings, so expect little likeness."""
    seeds: tuple[int, ...] = (0,)
    """One run for each training seed; several print their mean as well."""
    samples: int = 24
    """Images that are sampled and judged, each with a prompt that is not among the captions."""
    short: bool = False
    """A few steps and few samples, which show that everything runs and learn nothing."""
    config: str = "configs/toy_pti.toml"
    """The run's configuration."""
    out: str = "runs/demo"
    """Folder of the run."""


def demo(options: DemoOptions, seed: int) -> dict[str, float]:
    """Train, measure and print the table; returns the figures.

    They are also added to OUT/summary.json.
    """
    began = time.perf_counter()
    out = options.out if len(options.seeds) == 1 else f"{options.out}_{seed}"
    config = configure(options, seed, out)
    run = train.train(config)
    summary = json.loads((run / "summary.json").read_text())
    figures = {key: summary[key] for key in ("steps", "val_loss_before", "val_loss_after")}
    figures |= measure_run(config, run, options)
    figures["seconds"] = time.perf_counter() - began
    (run / "summary.json").write_text(json.dumps(summary | figures, indent=1))
    print_report(run, figures, summary["files"], photos=bool(options.photos))
    return figures


def configure(options: DemoOptions, seed: int, out: str) -> Config:
    """The TOML file's config with the images, held-out drawings and prompts of this demo."""
    base = replace(read_toml(Path(options.config)), seed=seed, out=out, overwrite=True)
    if options.short:
        base = replace(base, stages=tuple(replace(stage, steps=4) for stage in base.stages))
    if options.photos:
        folder = Path(options.photos)
        captioned = any(folder.glob("*.txt")) or (folder / "metadata.jsonl").is_file()
        captions = {} if captioned else {"captions": "one", "caption": "a photo of TOK"}
        return replace(
            base,
            data=replace(base.data, images=options.photos, **captions),
            samples=replace(base.samples, base_word="creature"),
        )
    prompts = demo_prompts(5, seed=1, name=options.concept)
    if options.concept != "zib":
        base = replace(
            base,
            data=replace(base.data, images=f"toy/concepts/{options.concept}"),
            tokens=replace(base.tokens, init=("emblem",)),
        )
    held_out = Path(options.out).parent / "held_out" / options.concept
    draw_held_out(options.concept, held_out)
    samples = replace(
        base.samples,
        base_word=article(base.tokens.init[0]),
        new_prompts=tuple(text for text, _ in prompts),
    )
    return replace(base, samples=samples, validation=replace(base.validation, images=str(held_out)))


def draw_held_out(name: str, folder: Path) -> None:
    """Write drawings of the concept on other backgrounds, with captions: the validation set."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (caption, background) in enumerate(demo_prompts(HELD_OUT_DRAWINGS, seed=2, name=name)):
        style = next((s for s in ("striped", "gradient") if s in caption), "plain")
        if background in PLACES:
            style = "place"
        assert background_phrase(background, style) in caption
        render_concept(name, background, style, 1000 + i, 128).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(caption)


def measure_run(config: Config, run: Path, options: DemoOptions) -> dict[str, float]:
    """Fractions of right images before and after training, by concept and unrelated captions."""
    count = 8 if options.short else options.samples
    family = load_family(config.model)
    reader = recogniser.load_recogniser()
    recipe = SamplerSettings(config.samples.sampler, config.samples.steps, config.samples.guidance)
    modules = {**family.modules, "tokenizer": family.tokenizers["text_encoder"]}
    captions: list[str] = []
    expected: list[dict[str, str]] = []
    for caption, attributes in evaluation_captions(2 * count, seed=5):
        if attributes["object"] not in ("creature", "emblem") and len(captions) < count:
            captions.append(caption)
            expected.append(attributes)
    figures: dict[str, float] = {}
    for when in ("before", "after"):
        with patch(modules, run) if when == "after" else nullcontext() as patched:
            bind: Callable[[str], str] = patched.bind if patched else str
            images = draw_images(family, [bind(caption) for caption in captions], recipe)
            figures[f"unrelated_{when}"] = captions_right(reader, images, expected)
            if options.photos:
                continue
            prompts = demo_prompts(count, seed=3, name=options.concept)
            backgrounds = [background for _, background in prompts]
            words = ["TOK"] if when == "after" else TEXT_ONLY[options.concept]
            scores = {}
            for word in words:
                worded = [text.replace("TOK", word) for text, _ in prompts]
                texts = [bind(text.replace("of a a", "of a")) for text in worded]
                images = draw_images(family, texts, recipe)
                scores[word] = concept_right(reader, images, options.concept, backgrounds)
            figures |= {f"concept_{when}": max(score["concept"] for score in scores.values())}
            if when == "after":
                figures["background_kept"] = scores["TOK"]["background"]
    return figures


def draw_images(family: Family, prompts: Sequence[str], recipe: SamplerSettings) -> Tensor:
    """[n, 3, 64, 64] one image for each prompt, seeds counting up from 1000."""
    images = []
    for first in range(0, len(prompts), BATCH):
        part = prompts[first : first + BATCH]
        seeds = range(1000 + first, 1000 + first + len(part))
        images.append(generate_images(family, part, seeds, recipe))
    return torch.cat(images)


def concept_right(
    reader: recogniser.Recogniser, images: Tensor, name: str, backgrounds: Sequence[str]
) -> dict[str, float]:
    """Fractions of images with concept and right background, and with the right background."""
    has_concept = (reader.concept(images, name) > 0.5).tolist()
    found = reader.scene(images)["background"]
    is_right = [own == wanted for own, wanted in zip(found, backgrounds)]
    both = sum(concept and right for concept, right in zip(has_concept, is_right))
    return {"concept": both / len(is_right), "background": sum(is_right) / len(is_right)}


def captions_right(
    reader: recogniser.Recogniser, images: Tensor, expected: Sequence[dict[str, str]]
) -> float:
    """The fraction of stated objects, colors and backgrounds that are found in the images."""
    found = reader.scene(images)
    hits = []
    for i, stated in enumerate(expected):
        names = [name for name in ("object", "color", "background") if name in stated]
        hits += [found[name][i] == stated[name] for name in names]
    return sum(hits) / len(hits)


def print_report(run: Path, f: dict[str, Any], files: dict[str, int], *, photos: bool) -> None:
    """Print the table of results, and how to load the files."""
    rows = []
    if f["val_loss_before"] is not None:
        words = "held-out loss" if not photos else "training images' loss, fixed noise"
        change = f["val_loss_after"] / f["val_loss_before"] - 1
        before, after = f"{f['val_loss_before']:.5f}", f"{f['val_loss_after']:.5f}"
        rows.append((words, before, after, f"{change:+.1%}"))
    if not photos:
        before, after = f"{f['concept_before']:.0%}", f"{f['concept_after']:.0%}"
        note = "before: the best prompt without TOK"
        rows.append(("concept and background right", before, after, note))
        rows.append(("background right", "-", f"{f['background_kept']:.0%}", ""))
    before, after = f"{f['unrelated_before']:.0%}", f"{f['unrelated_after']:.0%}"
    rows.append(("unrelated captions right", before, after, "object, color, background"))
    print("\n" + f"{'':36}{'before':>9}{'after':>9}")
    for name, before, after, note in rows:
        print(f"{name:36}{before:>9}{after:>9}   {note}")
    sizes = ", ".join(f"{name} {size / 1024:.0f} KiB" for name, size in files.items())
    print(f"{f['steps']} steps, {f['seconds']:.0f} s in all; {sizes}")
    print(snippets(run))


def snippets(run: Path) -> str:
    """Instructions for loading the run's files in other programs and here."""
    run = Path(os.path.relpath(run))
    emb = f"{run.name}_emb.safetensors"
    return f"""
see {run / "before_after.png"}; load the files with
  diffusers  from diffusers import StableDiffusionPipeline
             from safetensors.torch import load_file
             pipe = StableDiffusionPipeline.from_pretrained("toy/model")
             pipe.load_lora_weights("{run}")
             pipe.load_textual_inversion(load_file("{run / emb}")["clip_l"], token=["<s0>", "<s1>"])
             pipe("a photo of <s0><s1> in the desert")
  A1111      {run.name}.safetensors to models/Lora, {emb} to embeddings;
             prompt: a photo of {run.name}_emb <lora:{run.name}:1>
  ComfyUI    {run.name}.safetensors to models/loras (LoraLoader), {emb} to models/embeddings;
             prompt: a photo of embedding:{run.name}_emb
  here       python infer.py --model toy/model --lora {run} \\
               --prompt "a photo of TOK in the desert" --out desert.png"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    text = DemoOptions.__doc__
    options = tyro.cli(DemoOptions, args=argv, prog="python -m toy.demo", description=text)
    try:
        if options.concept not in CONCEPTS:
            raise UserError(
                f"--concept {options.concept} is unknown; choose {' or '.join(CONCEPTS)}"
            )
        every = [demo(options, seed) for seed in options.seeds]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(every) > 1:
        print("\nmean over training seeds " + " ".join(map(str, options.seeds)))
        for key in every[0]:
            mean = sum(figures[key] for figures in every) / len(every)
            print(f"  {key:18} {mean:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(quiet_status(main))
