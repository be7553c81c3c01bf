"""Everything the training loop holds: the model with its adapters and tokens, the data, the optimiser, the run folder. Built once, checked first."""

from __future__ import annotations

import hashlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checks
from lora_core import adapters, data, generation, losses, optim, reports, sampling, tokens, validation
from lora_core.adapters import AdapterSpec
from lora_core.algebra import AdapterState
from lora_core.cache import Cache
from lora_core.config import GROUPS, Config, Stage, to_table, to_toml
from lora_core.data import Batch, Folder, ImageSettings
from lora_core.errors import UserError
from lora_core.formats import embeddings, save_run
from lora_core.generation import Recipe
from lora_core.images import list_images
from lora_core.losses import StepOutput
from lora_core.noise import Keys, NoiseLevel, NoiseSettings
from lora_core.pictures import save_png, to_images
from lora_core.run import Run, flatten, unflatten
from lora_core.targets import matches, require_match
from models import DTYPES, Conditioning, choose_device, load_family

DECAYS = {"denoiser": 0.01, "text_encoder": 0.01, "tokens": 0.0}


class Session:
    """Opened by `train`; `training_step` asks it for latents and conditioning, the loop for everything else."""

    def __init__(self, config: Config, loss: Callable[[StepOutput], Tensor] | None = None) -> None:
        self.config = config
        self.began = time.perf_counter()
        checks.config(config)
        Run.check(config.out, resume=config.resume, overwrite=config.overwrite)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = choose_device(config.device)
        self.loss_name = config.loss if loss is None else getattr(loss, "__name__", "loss")
        self.loss: Callable[[StepOutput], Tensor] = loss or losses.resolve(config.loss, losses.LOSSES, config.loss_arg)
        self.noise = NoiseSettings(config.noise.offset, config.noise.multires_levels, config.noise.multires_discount, config.noise.perturbation)
        self.instances = config.batch_size * config.accumulation
        side, look = config.data.resolution, config.samples
        self.recipe = Recipe(look.sampler, look.steps, look.guidance, look.negative, side, side)
        self._open_data()
        self._open_model()
        self._open_optimizer()
        self.run = Run.open(config.out, resume=config.resume, overwrite=config.overwrite, keep=config.keep)  # first here may the disk change
        self.log_book = reports.LogBook(self.run, config.report, to_table(config))
        self.prior = self._open_prior()
        self.records = {r.key: r for folder in (self.folder, self.prior) if folder for r in folder.records}
        self.scores: dict[int, list[validation.Score]] = {}  # steps done -> validation
        self.latent_cache = Cache(_fingerprint(self.family.modules["vae"]) if config.data.cache else {}, config.data.cache or None)
        self.text_cache: dict[str, Conditioning] = {}
        self.saved: int | None = None  # the step of the newest checkpoint
        self.start = self._restore()
        self.run.write("config.toml", to_toml(replace(config, resume=False, overwrite=False)))  # so that `config.toml --resume` goes on

    # ------------------------------------------------------------ opening

    def _open_data(self) -> None:
        d = self.config.data
        self.abstractions = (
            tokens.make_abstractions(checks.initializers(self.config), self.config.tokens.vectors) if self.config.trains("tokens") else ()
        )
        records = data.scan(d.images, captions=d.captions, caption=d.caption or None, repeats=d.repeats, masks=d.masks)
        self.folder = Folder(records, ImageSettings(d.resolution, d.crop, d.zoom, d.flip, d.jitter, d.variants, self.config.seed))
        for a in self.abstractions:
            checks.placeholder(records, a.word)
        held_out = self.config.validation.images or d.images
        val = data.scan(held_out, captions=d.captions, caption=d.caption or None, masks="none")
        self.val_folder = Folder(val, ImageSettings(d.resolution))

    def _open_model(self) -> None:
        c = self.config
        changes: dict[str, Any] = {} if c.noise.prediction == "model" else {"prediction_type": c.noise.prediction}
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if c.noise.zero_terminal_snr else {}
        self.family = load_family(c.model, dtype=DTYPES[c.precision], device=self.device, vae=c.vae, scheduler=changes)
        if c.data.resolution % self.family.factor:
            raise UserError(f"--data.resolution {c.data.resolution} is no multiple of {self.family.factor}, the pixels of one latent of this model")
        if c.noise.zero_terminal_snr and self.family.prediction == "epsilon":
            raise UserError("--noise.zero-terminal-snr: at pure noise an epsilon says nothing about the image; add --noise.prediction v_prediction")
        sampling.levels(self.recipe.sampler, self.family.schedule, self.recipe.steps, spacing=self.family.spacing, offset=self.family.offset)
        self.encoders = {name: self.family.modules[name] for name in self.family.tokenizers}
        self.denoiser = self.family.modules[self.family.denoiser]
        wanted = {self.family.denoiser: c.adapter.targets} if c.trains("denoiser") else {}
        wanted |= dict.fromkeys(self.encoders, c.adapter.text_targets) if c.trains("text_encoder") else {}
        self._inject(wanted)
        self.trained = {name: self.family.modules[name] for name in wanted}  # the networks with adapters
        self.embeddings = {
            name: tokens.install(encoder, self.family.tokenizers[name], self.abstractions, seed=c.seed)
            for name, encoder in (self.encoders.items() if self.abstractions else ())
        }
        self.norm_targets = {name: _norm_target(e, c.tokens.norm_target) for name, e in self.embeddings.items()}
        self.table_stds = {name: tokens.table_std(e) for name, e in self.embeddings.items()}
        if c.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            for encoder in self.encoders.values():
                encoder.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        text = [p for name in self.encoders if name in self.trained for p in adapters.parameters(self.encoders[name])]
        unet = adapters.parameters(self.denoiser) if self.family.denoiser in self.trained else []
        every = {"denoiser": unet, "text_encoder": text, "tokens": [e.rows for e in self.embeddings.values()]}
        self.groups: dict[str, list[nn.Parameter]] = {name: params for name, params in every.items() if params}

    def _inject(self, wanted: dict[str, tuple[str, ...]]) -> None:
        """Adapters on the targets of each component. A pattern of [adapter] has to match in one of them, not in all."""
        a, modules = self.config.adapter, self.family.modules
        chosen = {}
        for component, names in wanted.items():
            presets = self.family.layout.presets.get(component, {})
            globs = tuple(glob for name in names for glob in presets.get(name, (name,)))
            chosen[component] = (globs, adapters.targets(modules[component], globs))
        everywhere = [path for _, paths in chosen.values() for path in paths]
        for option, patterns in {"exclude": a.exclude, "rank-pattern": a.rank_pattern, "alpha-pattern": a.alpha_pattern}.items():
            for pattern in patterns:
                require_match(pattern, everywhere, f"--adapter.{option}")
        for component, (globs, paths) in chosen.items():
            here = [p for p in (*a.exclude, *a.rank_pattern, *a.alpha_pattern) if any(matches(path, p) for path in paths)]
            exclude = tuple(p for p in a.exclude if p in here)
            ranks = {p: int(rank) for p, rank in a.rank_pattern.items() if p in here}
            alphas = {p: alpha for p, alpha in a.alpha_pattern.items() if p in here}
            spec = AdapterSpec(globs, exclude, a.kind, a.rank, a.alpha or None, ranks, alphas, a.dropout, a.rslora, a.init)
            adapted = adapters.inject(modules[component], spec, seed=self.config.seed)
            count = sum(p.numel() for p in adapters.parameters(modules[component]))
            print(f"{component}: {len(adapted)} layers with {a.kind}, rank {a.rank}, {count:,} parameters")

    def _open_optimizer(self) -> None:
        o = self.config.optimizer
        self.rates = {name: rate for name, rate in (optim.default_rates(o.name, GROUPS) | o.lr).items() if name in self.groups}
        self.decays = {name: o.weight_decay.get(name, DECAYS[name]) for name in self.groups}
        decays = bool(o.weight_decay) or "weight_decay" in optim.arguments(o.name)  # ours are no reason to refuse a class without decay
        self.settings: dict[str, dict[str, Any]] = {}  # of each group, beside its parameters
        for name in self.groups:
            extra: dict[str, Any] = {"weight_decay": self.decays[name]} if decays else {}
            extra |= {"betas": tuple(o.betas[name])} if name in o.betas else {}
            self.settings[name] = {"name": name, "lr": self.rates[name], **extra}
        self.optimizer = optim.build(o.name, [{"params": params, **self.settings[name]} for name, params in self.groups.items()], o.args)
        self.scaler = optim.LossScaler(device=self.device) if self.config.precision == "fp16" else None
        names = {stage.schedule or o.schedule for stage in self.config.stages}
        self.schedules = {name: optim.resolve_schedule(name, **(o.schedule_args if name == o.schedule else {})) for name in names}

    def _open_prior(self) -> Folder | None:
        """The class images (arXiv 2208.12242); missing ones are drawn by the base model, one seed each."""
        p = self.config.prior
        if not p.prompt:
            return None
        folder = Path(p.images) if p.images else self.run.folder / "class_images"
        folder.mkdir(parents=True, exist_ok=True)
        free = [(seed, file) for seed in range(p.count) if not (file := folder / f"{seed:05d}.png").exists()]
        with self.evaluating():
            for seed, file in tqdm(free[: max(0, p.count - len(list_images(folder)))], desc="class images", disable=not sys.stderr.isatty()):
                save_png(to_images(generation.generate(self.family, [p.prompt], [seed], self.recipe, **self.hole(seed)))[0], file)
        records = data.scan(folder, captions="one", caption=p.prompt, masks="none", is_prior=True)
        return Folder(records, self.folder.settings)

    # ------------------------------------------------------------ what training_step asks for

    def low(self, stage: Stage) -> float:
        return self.config.noise.low if stage.low is None else stage.low

    def high(self, stage: Stage) -> float:
        return self.config.noise.high if stage.high is None else stage.high

    def latents(self, batch: Batch, keys: Keys, stage: Stage) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x0 [b, c, h, w] sampled from the VAE's posterior; the loss mask [b, 1, h, w] or None; the inpainting input [b, 1 + c, h, w] or None."""
        mean, std = (rows.to(self.device) for rows in self._posterior(batch))
        x0 = mean + std * keys.normal("posterior", tuple(mean.shape[1:])).to(mean)
        mask = None if batch.mask is None else F.interpolate(batch.mask, x0.shape[-2:], mode="area").to(x0) ** stage.mask_temperature
        inpaint = None
        if self.family.inpainting:
            holes = generation.random_holes(keys, batch.pixels.shape[-2], batch.pixels.shape[-1])
            with torch.no_grad():
                inpaint = generation.masked_latents(self.family, batch.pixels.to(self.device), holes.to(self.device))
        return x0, mask, inpaint

    @torch.no_grad()
    def _posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and std of the latents; from the cache where an image's pixels come again."""
        if not self.folder.settings.is_random or self.folder.settings.variants:
            names = [self.folder.cache_key(self.records[key], visit) for key, visit in zip(batch.keys, batch.visits)]
            rows = self.latent_cache.get(
                names, lambda i: dict(zip(("mean", "std"), (r[0] for r in self.family.encode_images(batch.pixels[i : i + 1]))))
            )
            return rows["mean"], rows["std"]
        return self.family.encode_images(batch.pixels)

    def conditioning(self, captions: Sequence[str]) -> Conditioning:
        """The prompts, placeholders bound; from the cache while nothing in the text encoders trains."""
        prompts = [tokens.bind(caption, self.abstractions) for caption in captions]
        if self.text_trains:
            return self.family.encode_prompts(prompts)
        with self.evaluating():
            for prompt in prompts:
                if prompt not in self.text_cache:
                    self.text_cache[prompt] = self.family.encode_prompts([prompt])
        return Conditioning.cat([self.text_cache[prompt] for prompt in prompts])

    def key_dropout(self, keys: Keys, step: int) -> None:
        if self.config.adapter.dropout:
            rows = keys.hashes("dropout").to(self.device)
            for module in self.trained.values():
                adapters.set_dropout(module, rows, step)

    def lazy(self, x_t: Tensor, level: NoiseLevel, cond: Conditioning, inpaint: Tensor | None) -> dict[str, Callable[..., Any]]:
        """Members of StepOutput that cost a forward pass, for losses that touch them."""

        @torch.no_grad()
        def base_out() -> Tensor:
            with adapters.disabled(self.denoiser):
                return self.family.denoise(x_t, level, cond, inpaint)

        return {"base_out": base_out, "attention": lambda: self.family.attention_maps(x_t, level, cond, inpaint), "decode": self.family.decode}

    # ------------------------------------------------------------ what the loop asks for

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        return data.batches(
            self.folder, self.prior, batch=self.instances, seed=self.config.seed, start=start, stop=stop, workers=self.config.data.workers
        )

    def enter(self, stage: Stage) -> None:
        """Lets the stage's groups step and freezes the others: no gradient, no update, optimiser state as it is."""
        self.active = [p for name in stage.groups for p in self.groups[name]]
        for name, params in self.groups.items():
            for p in params:
                p.requires_grad_(name in stage.groups)
                p.grad = None
        for group in self.optimizer.param_groups:
            if "weight_decay" in group:
                group["weight_decay"] = stage.weight_decay.get(group["name"], self.decays[group["name"]])
        self.text_trains = bool({"text_encoder", "tokens"} & set(stage.groups))
        self.text_cache.clear()
        training = bool(self.config.adapter.dropout or self.config.gradient_checkpointing)
        for module in (self.denoiser, *self.encoders.values()):
            module.train(training)
        self.checked = False

    def set_rates(self, stage: Stage, step: int) -> None:
        """Learning rates of step number `step` of the stage; 0 for the groups that pause."""
        o = self.config.optimizer
        factor = self.schedules[stage.schedule or o.schedule](step, stage.steps, o.warmup)
        for group in self.optimizer.param_groups:
            name = group["name"]
            group["lr"] = stage.lr.get(name, self.rates[name]) * factor if name in stage.groups else 0.0

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def check_rows(self, rows: Tensor, name: str, b: int) -> None:
        """Refuses what is not one finite number per example, in the first step of a stage: to look means to wait for the device."""
        if not self.checked:
            losses.check_rows(rows, name, b)

    def update(self) -> Tensor:
        """One optimiser step; the gradient's norm before clipping."""
        if not self.checked:
            for name, params in self.groups.items():
                if params[0].requires_grad and all(p.grad is None for p in params):
                    raise UserError(f"the group {name} gets no gradient from this loss; take it out of the stage")
            self.checked = True
        if self.scaler is not None:
            self.scaler.unscale_(self.active)
        norm = optim.clip_(self.active, self.config.optimizer.clip or math.inf)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return norm

    def control_norms(self, stage: Stage) -> None:
        """The norm prior of the token rows, after each step that moved them."""
        how = stage.norm or self.config.tokens.norm
        if "tokens" not in stage.groups or how == "none":
            return
        group = next(g for g in self.optimizer.param_groups if g["name"] == "tokens")
        rate = torch.as_tensor(100 * group["lr"] * group.get("d", 1.0), dtype=torch.float64).clamp(max=1.0)
        for name, embedding in self.embeddings.items():
            if how == "pull":
                tokens.pull_norms_(embedding.rows, self.norm_targets[name], rate=rate)
            else:
                tokens.rescale_std_(embedding.rows, self.table_stds[name])

    @contextmanager
    def progress(self, start: int) -> Iterator[tqdm]:
        with tqdm(total=self.config.steps, initial=start, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
            yield bar
        self.flush()

    def log(self, done: int, stage: Stage, loss: Tensor, norm: Tensor, bar: tqdm) -> None:
        """A row for each step; values are read from the device every --log-every steps."""
        rates = {f"lr_{g['name']}": g["lr"] for g in self.optimizer.param_groups if g["name"] in stage.groups}
        distances = {f"d_{g['name']}": g["d"] for g in self.optimizer.param_groups if "d" in g and g["name"] in stage.groups}
        self.log_book.add(done, loss=loss, grad_norm=norm, **rates, **distances)
        bar.update()
        if done % self.config.log_every == 0:
            rows = self.flush()
            shown = {name: f"{value:.2e}" for name, value in rows[-1].items() if name.startswith("d_")}
            bar.set_postfix(loss=f"{sum(row['loss'] for row in rows) / len(rows):.4f}", **shown)

    def flush(self) -> list[dict[str, Any]]:
        """Writes and returns the waiting rows. Raises UserError when a loss is no number any more, before a checkpoint could hold the damage."""
        rows = self.log_book.flush()
        bad = next((row for row in rows if not math.isfinite(row["loss"])), None)
        if bad and self.scaler is None:
            last = "there is no checkpoint" if self.saved is None else f"the last checkpoint, of step {self.saved}, is from before"
            raise UserError(f"the loss is {bad['loss']} since step {bad['step']}; lower the learning rate (--optimizer.lr); {last}")
        return rows

    # ------------------------------------------------------------ checkpoints

    def save_checkpoint(self, done: int) -> None:
        self.flush()
        tree = {
            "groups": self.groups,
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": self.config.optimizer.name,
            "scaler": self.scaler and self.scaler.state_dict(),
            "seconds": time.perf_counter() - self.began,
        }
        folder = self.run.save_checkpoint(done, *flatten(tree))
        self.saved = done
        save_run(self.adapter_state(done), folder, layout=self.family.layout)

    def _restore(self) -> int:
        """The number of steps done; 0 for a new run. Raises UserError when the checkpoint is of other groups, shapes or another optimiser."""
        found = self.run.load_checkpoint() if self.config.resume else None
        if found is None:
            return 0
        tree, name = unflatten(found.tensors, found.meta), self.config.optimizer.name
        if {n: [p.shape for p in ps] for n, ps in tree["groups"].items()} != {n: [p.shape for p in ps] for n, ps in self.groups.items()}:
            raise UserError(f"the checkpoint in {self.run.folder} has other adapters or tokens than this config; resume with the config of the run")
        if tree["optimizer_name"] != name:
            raise UserError(f"the checkpoint in {self.run.folder} is of {tree['optimizer_name']}, not of {name}; resume with that optimizer")
        if found.step > self.config.steps:
            raise UserError(f"{self.run.folder} has done {found.step} steps, more than the {self.config.steps} of this config; give its stages more")
        with torch.no_grad():
            for group, params in self.groups.items():
                for p, saved in zip(params, tree["groups"][group]):
                    p.copy_(saved)
        self.optimizer.load_state_dict(tree["optimizer"])
        for state in self.optimizer.param_groups:  # as this config says, not as the saved state does
            state.update(self.settings[state["name"]] | {k: v for k, v in self.config.optimizer.args.items() if k in state})
        if self.scaler is not None and tree["scaler"] is not None:
            self.scaler.load_state_dict(tree["scaler"])
        self.began -= tree["seconds"]
        if (self.run.folder / "val.jsonl").is_file():
            self.scores = validation.read(self.run.folder)
        self.saved = found.step
        print(f"resumed after step {found.step}")
        return found.step

    def way_back(self) -> str:
        """How to go on with this run after an interruption."""
        if self.saved is None:
            return f"no step is saved; start again with --overwrite, which moves {self.run.folder.name} to {self.run.folder.name}.bak"
        command = shlex.join(["python", "train.py", str(Path(self.config.out) / "config.toml"), "--resume"])
        return f"the run is saved after step {self.saved}, go on with: {command}"

    def adapter_state(self, done: int) -> AdapterState:
        """What the run has learned so far, under published names."""
        layout = self.family.layout
        components = {
            name: {layout.published(name, path): factors for path, factors in adapters.state(module).items()} for name, module in self.trained.items()
        }
        rows = {layout.encoders[name]: tokens.state(embedding) for name, embedding in self.embeddings.items()}
        names = next((e.names for e in self.embeddings.values()), ())
        words = embeddings.header({a.word: a.names for a in self.abstractions})
        return AdapterState(components, rows, names, {"lora_core.config": to_toml(self.config), "lora_core.steps": str(done), **words})

    # ------------------------------------------------------------ looking at it

    def hole(self, i: int) -> dict[str, Tensor]:
        """What an inpainting model is sampled with: a training image [1, 3, h, w] and a mask [1, 1, h, w] of its middle; nothing for other models."""
        if not self.family.inpainting:
            return {}
        pixels = self.val_folder.example(i % len(self.val_folder), 0).pixels[None].to(self.device)
        mask, side = torch.zeros_like(pixels[:, :1]), self.recipe.width
        mask[..., side // 4 : side - side // 4, side // 4 : side - side // 4] = 1
        return {"init": pixels, "mask": mask}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no dropout; the training mode comes back afterwards."""
        networks = [self.denoiser, *self.encoders.values()]
        before = [module.training for module in networks]
        try:
            with torch.no_grad():
                for module in networks:
                    module.eval()
                yield
        finally:
            for module, training in zip(networks, before):
                module.train(training)


def _norm_target(embedding: tokens.LearnedEmbedding, wanted: float) -> Tensor:
    """[n, 1] the norms that the prior pulls to: those the rows started with, unless one is given (0.4 in lora_pti: SD 1.5's usual norm).

    Rows that start at zero take the vocabulary's mean norm.
    """
    start = embedding.initial.norm(dim=-1, keepdim=True)
    usual = embedding.weight.detach().to(start).norm(dim=-1).mean()
    return torch.full_like(start, wanted) if wanted else torch.where(start > 0, start, usual)


def _fingerprint(vae: nn.Module) -> dict[str, str]:
    """What a cache on disk is keyed by: the very weights that encode, so that a retrained VAE at the same path does not get old latents."""
    content = hashlib.blake2b(digest_size=16)
    for name, tensor in vae.state_dict().items():
        content.update(name.encode() + str(tensor.dtype).encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"vae": content.hexdigest()}
