"""Benchmark of the whole training loop: steps per second of ours and of diffusers' SDXL-advanced
script, on the same tiny model.

    python -m benchmarks.sdxl_loop [--steps 100] [--rounds 5] [--threads 1] [--json FILE]
                                   [--profile]

Images, batch and threads are the same. Each step of `AdvancedScript` does the same as
train_dreambooth_lora_sdxl_advanced.py (diffusers 0.4x), reimplemented from its behavior: peft's
LoRA, prodigyopt, DDPMScheduler.add_noise, both token tables trained whole and restored after each
step, latents cached, text encoded in each step. accelerate's wrappers, which only add time, are
left out. Ours is `train.train` on configs/sdxl_pivotal_prodigy.toml. Rounds alternate; figures are
medians.
Three phases: up to the pivot; after it, where the script continues to encode text and restore
tables; after it with a peer that caches text, which the script does not. Two vocabularies: the tiny
model's 57 words, and CLIP's 49408 (at the tiny widths).
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import itertools
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import prodigyopt
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

import train
from benchmarks import timing
from lora_core.config import Config
from lora_core.errors import quiet_status
from lora_core.toml import read_toml
from tests import tiny_sdxl

CONFIG = Path(__file__).parent.parent / "configs" / "sdxl_pivotal_prodigy.toml"
# As in the guide's command, except for the side; its data set has two dozen images.
RANK, BATCH, SIDE, GAMMA = 8, 3, 16, 5.0
IMAGES = 24
WARM = 10  # untimed steps of each phase: an epoch and a bit, so that all caches are full
PHASES = ("to the pivot", "after it", "after it, cached text", "whole run: half and half")
TOKENS = ["<s0>", "<s1>"]
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


class Clock:
    """Records (wall, CPU) seconds at the beginning of each step of one phase.

    The first WARM steps are left out.
    """

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def tick(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    @property
    def rates(self) -> tuple[float, float]:
        """Steps per second of wall-clock time and of CPU time.

        CPU time does not include other programs on a shared machine.
        """
        begin, end = self.marks[WARM], self.marks[-1]
        steps = len(self.marks) - 1 - WARM
        return steps / (end[0] - begin[0]), steps / (end[1] - begin[1])


# ---------------------------------------------------------------- model and images


def make_model(folder: Path, vocabulary: int) -> Path:
    """A tiny SDXL, with token tables of `vocabulary` rows (0: its own)."""
    tiny_sdxl.save(folder, scheduler="ddim")
    if not vocabulary:
        return folder
    for name in ("text_encoder", "text_encoder_2"):
        file, config = folder / name / "model.safetensors", folder / name / "config.json"
        tensors = load_file(file)
        (key,) = [key for key in tensors if key.endswith("token_embedding.weight")]
        table = tensors[key]
        generator = torch.Generator().manual_seed(0)
        more = torch.randn(vocabulary - len(table), table.shape[1], generator=generator)
        more *= table.std()
        save_file(tensors | {key: torch.cat([table, more])}, file, {"format": "pt"})
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": vocabulary}))
    return folder


def make_images(folder: Path) -> Path:
    """A folder of images with their prompts."""
    folder.mkdir()
    lines = []
    for i in range(IMAGES):
        name = f"{i:02d}.png"
        image = Image.new("RGB", (SIDE + 8, SIDE + 4), (10 * i, 255 - 10 * i, 7 * i))
        image.save(folder / name)
        lines.append(json.dumps({"file_name": name, "prompt": f"icon of TOK {'abcdef'[i % 6]}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


# ---------------------------------------------------------------- the script's loop


class AdvancedScript:
    """The peer: state of the script's main() when its loop begins, and the loop."""

    def __init__(self, model: Path, images: Path) -> None:
        torch.manual_seed(0)
        pipe = StableDiffusionXLPipeline.from_pretrained(model)
        self.unet, self.vae = pipe.unet, pipe.vae
        self.encoders = [pipe.text_encoder, pipe.text_encoder_2]
        self.tokenizers = [pipe.tokenizer, pipe.tokenizer_2]
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        for module in (self.unet, self.vae, *self.encoders):
            module.requires_grad_(False)
        adapter = LoraConfig(
            r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS
        )
        self.unet.add_adapter(adapter)
        self.tables = [encoder.get_input_embeddings() for encoder in self.encoders]
        self._insert_tokens()
        self.lora = [p for p in self.unet.parameters() if p.requires_grad]
        weights = [table.weight.requires_grad_(True) for table in self.tables]
        groups = [
            {"params": self.lora, "lr": 1.0},
            *({"params": [w], "lr": 1.0, "weight_decay": 1e-4} for w in weights),
        ]
        settings = dict(
            betas=(0.9, 0.999),
            weight_decay=1e-4,
            eps=1e-8,
            decouple=True,
            use_bias_correction=True,
            safeguard_warmup=True,
        )
        self.optimizer = prodigyopt.Prodigy(groups, **settings)
        self.rates = get_scheduler("constant", optimizer=self.optimizer)
        examples: Any = list(self._examples(images))
        self.loader = DataLoader(examples, batch_size=BATCH, shuffle=True, collate_fn=self._collate)
        with torch.no_grad():
            # one a batch, in the order of one pass
            self.latents = [self.vae.encode(batch["pixels"]).latent_dist for batch in self.loader]

    def _insert_tokens(self) -> None:
        """Add two tokens to each tokenizer, with random rows at the table's std.

        Copies all the other rows, which are restored after each step.
        """
        self.others, self.originals, self.stds = [], [], []
        for i, (encoder, tokenizer) in enumerate(zip(self.encoders, self.tokenizers)):
            tokenizer.add_tokens(TOKENS)
            if len(tokenizer) > self.tables[i].num_embeddings:
                encoder.resize_token_embeddings(len(tokenizer))
                self.tables[i] = encoder.get_input_embeddings()
            weight = self.tables[i].weight.data
            ids = tokenizer.convert_tokens_to_ids(TOKENS)
            self.stds.append(weight.std())
            weight[ids] = torch.randn(len(ids), weight.shape[1]) * self.stds[-1]
            self.originals.append(weight.clone())
            others = torch.ones(len(weight), dtype=torch.bool)
            self.others.append(others.index_fill_(0, torch.tensor(ids), False))

    @staticmethod
    def _examples(folder: Path) -> Iterator[dict[str, Any]]:
        """Images cropped once, as tensors in memory, with prompt and sizes."""
        for row in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()):
            image = Image.open(folder / row["file_name"]).convert("RGB")
            flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            pixels = flat.reshape(image.height, image.width, 3)[:SIDE, :SIDE]
            prompt = row["prompt"].replace("TOK", "".join(TOKENS))
            yield {
                "pixels": pixels.permute(2, 0, 1) / 127.5 - 1,
                "prompt": prompt,
                "original": (image.height, image.width),
                "crop": (0, 0),
            }

    @staticmethod
    def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: [example[key] for example in examples] for key in examples[0]}
        return batch | {"pixels": torch.stack(batch["pixels"]).contiguous().float()}

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings [b, s, d1 + d2] and the second encoder's pooled ones."""
        embeds = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            ids = tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            out = encoder(ids, output_hidden_states=True, return_dict=False)
            embeds.append(out[-1][-2])
        return torch.concat(embeds, dim=-1), out[0]

    def step(
        self, position: int, batch: dict[str, Any], text: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Run backward, clipping and the optimizer's step; returns the loss."""
        x0 = self.latents[position].sample() * self.vae.config.scaling_factor
        noise = torch.randn_like(x0)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(x0),)).long()
        x_t = self.scheduler.add_noise(x0, noise, t)
        sizes = []
        for size, corner in zip(batch["original"], batch["crop"]):
            sizes.append(torch.tensor([[*size, *corner, SIDE, SIDE]]))
        added = {"time_ids": torch.cat(sizes).to(x_t), "text_embeds": text[1]}
        out = self.unet(x_t, t, text[0], added_cond_kwargs=added, return_dict=False)[0]
        snr = compute_snr(self.scheduler, t)
        weights = torch.stack([snr, GAMMA * torch.ones_like(t)], dim=1).min(dim=1)[0] / snr
        loss = F.mse_loss(out.float(), noise.float(), reduction="none")
        loss = (loss.mean(dim=list(range(1, loss.ndim))) * weights).mean()
        loss.backward()
        tokens = (table.weight for table in self.tables)
        torch.nn.utils.clip_grad_norm_(itertools.chain(self.lora, tokens), 1.0)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        return loss

    def restore_tables(self) -> None:
        """Restore all old rows and rescale the new ones to the table's std."""
        for table, others, original, std in zip(
            self.tables, self.others, self.originals, self.stds
        ):
            table.weight.data[others] = original[others]
            new = table.weight.data[~others]
            table.weight.data[~others] = new * (std / new.std()) ** 0.1

    def run(self, steps: int) -> list[Clock]:
        """Clocks of the first three PHASES, `steps` timed steps each."""
        clocks = [Clock() for _ in PHASES[:3]]
        cached: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.unet.train()
        for phase, clock in enumerate(clocks):
            for encoder in self.encoders:
                encoder.train(phase == 0)
            if phase == 2:
                for table in self.tables:
                    table.weight.requires_grad_(False)
            bar = tqdm(total=steps + WARM, file=StringIO())
            while len(clock.marks) <= steps + WARM:
                for position, batch in enumerate(self.loader):
                    clock.tick()
                    if len(clock.marks) > steps + WARM:
                        break
                    if phase:
                        for group in self.optimizer.param_groups[1:]:
                            group["lr"] = 0.0
                    prompts = batch["prompt"]
                    text = self._cached(prompts, cached) if phase == 2 else self.encode(prompts)
                    loss = self.step(position, batch, text)
                    if phase < 2:
                        self.restore_tables()
                    bar.update(1)
                    bar.set_postfix(loss=loss.detach().item(), lr=self.rates.get_last_lr()[0])
        return clocks

    def _cached(
        self, prompts: list[str], cache: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for prompt in prompts:
            if prompt not in cache:
                with torch.no_grad():
                    cache[prompt] = self.encode([prompt])
        embeds, pooled = zip(*(cache[prompt] for prompt in prompts))
        return torch.cat(embeds), torch.cat(pooled)


# ---------------------------------------------------------------- ours


def run_ours(
    model: Path, images: Path, out: Path, steps: int, profile: cProfile.Profile | None = None
) -> list[Clock]:
    """Clocks of the two stages of our config."""
    c: Config = read_toml(CONFIG)
    stages = tuple(replace(stage, steps=steps + WARM + 1) for stage in c.stages)
    c = replace(
        c,
        model=str(model),
        vae="",
        out=str(out),
        device="cpu",
        precision="fp32",
        gradient_checkpointing="none",
        stages=stages,
        data=replace(c.data, images=str(images), resolution=SIDE),
        samples=replace(c.samples, prompts=("TOK",), every=0, steps=1),
        validation=replace(c.validation, bins=1),
    )
    clocks = [Clock() for _ in stages]

    def timed(model: Any, x: Any, config: Config, loss: Any) -> torch.Tensor:
        phase, within = divmod(x.number, steps + WARM + 1)
        clocks[phase].tick()
        if profile is not None and within in (WARM, steps + WARM):
            (profile.enable if within == WARM else profile.disable)()
        return train.training_step(model, x, config, loss)

    train.train(c, step=timed)
    return clocks


# ---------------------------------------------------------------- the table


def run_quietly(work: Callable[[], list[Clock]]) -> list[tuple[float, float]]:
    """The rates of each phase; suppresses what `work` prints."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return [clock.rates for clock in work()]


def measure_loops(vocabulary: int, steps: int, rounds: int) -> dict[str, Any]:
    """{"wall": ..., "cpu": ...}: steps per second and ours / peer, medians of alternating rounds.

    "rounds" has them all.
    """
    mine, theirs = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, images = make_model(folder / "model", vocabulary), make_images(folder / "images")
        for i in range(rounds):
            ours = functools.partial(run_ours, model, images, folder / f"run{i}", steps)
            mine.append(run_quietly(ours))
            theirs.append(run_quietly(lambda: AdvancedScript(model, images).run(steps)))
    found: dict[str, Any] = {"rounds": {"ours": mine, "peer": theirs}}
    for k, clock in enumerate(("wall", "cpu")):
        our, peer = _median_rates(mine, k), _median_rates(theirs, k)
        whole = 2 / (1 / our[0] + 1 / our[1]), 2 / (1 / peer[0] + 1 / peer[1])
        pairs = [(our[0], peer[0]), (our[1], peer[1]), (our[1], peer[2]), whole]
        found[clock] = {}
        for phase, (a, b) in zip(PHASES, pairs):
            found[clock][phase] = {"ours": a, "peer": b, "ratio": a / b}
    return found


def _median_rates(rounds: list[list[tuple[float, float]]], clock: int) -> list[float]:
    """The median over the rounds of each phase's rate by one clock."""
    medians = []
    for phase in zip(*rounds):
        medians.append(statistics.median(rates[clock] for rates in phase))
    return medians


def profile_ours(vocabulary: int, steps: int, rows: int = 25) -> str:
    """cProfile's table of our loop, both stages, sorted by own time."""
    profile, text = cProfile.Profile(), StringIO()
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name) / "model", vocabulary)
        images = make_images(Path(name) / "images")
        run_quietly(lambda: run_ours(model, images, Path(name) / "run", steps, profile))
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(rows)
    return text.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each phase")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--vocabulary",
        type=int,
        nargs="*",
        default=[0, 49408],
        help="rows of the token tables; 0: the tiny model's own",
    )
    parser.add_argument("--json", type=Path, help="file for all the numbers")
    parser.add_argument("--profile", action="store_true", help="print where our time goes, instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(timing.describe_machine())
    if args.profile:
        print(profile_ours(args.vocabulary[0], args.steps))
        return
    found = {}
    for vocabulary in args.vocabulary:
        name = str(vocabulary or "own")
        found[name] = measure_loops(vocabulary, args.steps, args.rounds)
        print(f"\nvocabulary: {name}; medians of {args.rounds} rounds of {args.steps} steps")
        heads = f"{'steps per second':<26} {'ours':>8} {'peer':>8} {'ratio':>7}"
        print(f"{heads}   {'of CPU time':>11}")
        for phase, row in found[name]["wall"].items():
            line = f"{phase:<26} {row['ours']:8.1f} {row['peer']:8.1f} {row['ratio']:6.2f}x"
            print(f"{line}   {found[name]['cpu'][phase]['ratio']:10.2f}x")
    if args.json:
        report = {"machine": timing.describe_machine(), "steps": args.steps, "results": found}
        timing.write_json(args.json, report)


if __name__ == "__main__":
    sys.exit(quiet_status(main))
