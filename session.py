"""Everything the training loop holds: the model with its adapters and tokens, the data, the optimiser, the run folder. Built once, checked first."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoints
import checks
from lora_core import adapters, buckets, data, generation, hub, losses, noise, optim, prediction, reports, sampling, targets, tokens, validation
from lora_core.cache import Cache
from lora_core.config import GROUPS, Config, Stage
from lora_core.data import Batch, Folder, ImageSettings
from lora_core.ema import Average
from lora_core.errors import UserError
from lora_core.generation import Recipe, Sizes
from lora_core.images import list_images
from lora_core.losses import StepOutput
from lora_core.noise import Keys, NoiseLevel, NoiseSettings, Schedule
from lora_core.pictures import save_png, to_images
from lora_core.run import Run
from lora_core.toml import to_table, to_toml
from models import DTYPES, Conditioning, Loading, choose_device, load_family, outline

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
        if config.prior.swap:
            self.loss = losses.preserving(self.loss, config.prior.swap_weight)
        self.density = noise.density(config.noise.density, **config.noise.density_args)
        self.noise = NoiseSettings(config.noise.offset, config.noise.multires_levels, config.noise.multires_discount, config.noise.perturbation)
        self.instances = config.batch_size * config.accumulation
        self.drops = bool(config.adapter.dropout or config.adapter.rank_dropout or config.adapter.module_dropout)
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
        self.base_text_cache: dict[str, Conditioning] = {}  # without adapters
        self.saved: int | None = None  # the step of the newest checkpoint
        self.start = checkpoints.restore(self)
        self.run.write("config.toml", to_toml(replace(config, resume=False, overwrite=False)))  # so that `config.toml --resume` goes on

    # ------------------------------------------------------------ opening

    def _open_data(self) -> None:
        d, images = self.config.data, self.config.data.images
        if d.dataset:
            images = str(hub.export(d.dataset, split=d.split, image_column=d.image_column, caption_column=d.caption_column, caption=d.caption))
        column = None if d.dataset else d.caption_column or None
        how: dict[str, Any] = {"captions": d.captions, "caption": d.caption or None, "caption_column": column}
        records = data.scan(images, repeats=d.repeats, masks=d.masks, **how)
        settings = ImageSettings(d.resolution, d.crop, d.zoom, d.flip, d.jitter, d.variants, self.config.seed)
        settings = replace(settings, buckets=d.buckets, bucket_step=d.bucket_step, interpolation=d.interpolation)
        self.folder = Folder(records, settings, caption_dropout=d.caption_dropout)
        if d.buckets:
            print(buckets.report(self.folder.sizes, self.instances))
        if sentence := data.scaled_up(self.folder):
            print(f"warning: {sentence}", file=sys.stderr)
        for word in checks.initializers(self.config) if self.config.trains("tokens") else self.config.prior.swap:
            checks.placeholder(records, word)
        val = data.scan(self.config.validation.images or images, masks="none", **how)
        self.val_folder = Folder(val, ImageSettings(d.resolution, interpolation=d.interpolation))

    def _open_model(self) -> None:
        c = self.config
        plan = checks.plan(c, outline(c.model, c.model_config))
        vae_dtype = None if c.vae_precision == "fp32" else DTYPES[c.vae_precision]
        how = Loading(
            DTYPES[c.precision], self.device, c.vae, vae_dtype, checks.scheduler_changes(c), c.clip_skip, c.max_sequence_length, c.model_config
        )
        self.family = load_family(c.model, how)
        checks.model(c, self.family)
        sampling.levels(self.recipe.sampler, self.family.schedule, self.recipe.steps, spacing=self.family.spacing, offset=self.family.offset)
        print(losses.meaning(c.weighting, self.family.prediction, c.noise.space, loss=self.loss_name, **c.weighting_arg))
        self.encoders = {name: self.family.modules[name] for name in self.family.tokenizers}
        self.denoiser = self.family.modules[self.family.denoiser]
        for name, spec in plan.items():
            module = self.family.modules[name]
            paths = adapters.inject(module, spec, seed=c.seed)
            count = sum(p.numel() for p in adapters.parameters(module))
            print(f"{name}: {spec.kind}, rank {spec.rank}, {count:,} parameters on {targets.table(paths)}")
        self.trained = {name: self.family.modules[name] for name in plan}  # the networks with adapters
        self._install_tokens()
        if c.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            for encoder in self.encoders.values():  # transformers 6 keeps the first name only
                enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
                enable({"use_reentrant": False})  # type: ignore[operator]
        text = [p for name in self.encoders if name in self.trained for p in adapters.parameters(self.encoders[name])]
        unet = adapters.parameters(self.denoiser) if self.family.denoiser in self.trained else []
        every = {"denoiser": unet, "text_encoder": text, "tokens": [e.rows for e in self.embeddings.values()]}
        self.groups: dict[str, list[nn.Parameter]] = {name: params for name, params in every.items() if params}
        self.average = Average([p for params in self.groups.values() for p in params], c.ema) if c.ema else None

    def _install_tokens(self) -> None:
        """The learned rows of the chosen text encoders; what each abstraction starts from needs the tokenizers."""
        c, keys, self.embeddings = self.config, self.family.layout.encoders, {}
        self.abstractions: tuple[tokens.Abstraction, ...] = ()
        if not c.trains("tokens"):
            return
        chosen = [name for name in self.encoders if keys[name] in (c.tokens.encoders or ("clip_l", "clip_g"))]
        if missing := set(c.tokens.encoders) - {keys[name] for name in chosen}:
            raise UserError(f"--tokens.encoders has {', '.join(sorted(missing))}; the text encoders of this model are {', '.join(keys.values())}")
        inits = checks.initializers(c)
        vectors = [c.tokens.vectors or tokens.count(init, [self.family.tokenizers[name] for name in chosen]) for init in inits.values()]
        self.abstractions = tokens.make_abstractions(inits, vectors)
        for name in chosen:
            stream = "" if name == "text_encoder" else keys[name]
            self.embeddings[name] = tokens.install(self.encoders[name], self.family.tokenizers[name], self.abstractions, seed=c.seed, stream=stream)
        self.norm_targets = {name: _norm_target(e, c.tokens.norm_target) for name, e in self.embeddings.items()}
        self.table_stds = {name: tokens.table_std(e) for name, e in self.embeddings.items()}

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
        groups = [{"params": params, **self.settings[name]} for name, params in self.groups.items()]
        ups: dict[str, list[Tensor]] = {}  # of each group, where they have a learning rate of their own
        for name, module in self.trained.items() if o.lora_plus != 1 else ():
            ups.setdefault("text_encoder" if name in self.encoders else "denoiser", []).extend(adapters.up_parameters(module))
        self.optimizer = optim.build(o.name, optim.split(groups, ups, o.lora_plus), o.args)
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

    def schedule(self, x0: Tensor) -> Schedule:
        """The noise schedule that latents x0 are trained on."""
        return self.family.schedule_at(*x0.shape[-2:]) if self.config.noise.dynamic_shift else self.family.schedule

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
            size = (batch.pixels.shape[-2], batch.pixels.shape[-1])
            names = [self.folder.cache_key(self.records[key], visit, size) for key, visit in zip(batch.keys, batch.visits)]
            rows = self.latent_cache.get(names, lambda i: dict(zip(("mean", "std"), (r[0] for r in self._encode(batch.pixels[i : i + 1])))))
            return rows["mean"], rows["std"]
        return self._encode(batch.pixels)

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.family.encode_images(pixels)
        if self.config.vae_precision == "fp16" and not bool(mean.isfinite().all() & std.isfinite().all()):
            raise UserError("the VAE overflows in fp16 on these images; leave --vae-precision at fp32, or give a VAE made for fp16 with --vae")
        return mean, std

    def conditioning(self, batch: Batch) -> Conditioning:
        """The prompts, placeholders bound, from the cache while nothing in the text encoders trains; the images' sizes; the guidance."""
        prompts = [tokens.bind(caption, self.abstractions) for caption in batch.captions]
        if self.text_trains:
            return self.informed(self.family.encode_prompts(prompts), batch)
        return self.informed(self._cached(prompts, self.text_cache), batch)

    def base_conditioning(self, batch: Batch) -> Conditioning:
        """The same without adapters."""
        with ExitStack() as stack:
            for encoder in self.encoders.values():
                stack.enter_context(adapters.disabled(encoder))
            return self.informed(self._cached(batch.captions, self.base_text_cache), batch)

    def _cached(self, prompts: Sequence[str], cache: dict[str, Conditioning]) -> Conditioning:
        for prompt in dict.fromkeys(prompts):
            if prompt not in cache:
                with self.evaluating():
                    cache[prompt] = self.family.encode_prompts([prompt])
        return Conditioning.cat([cache[prompt] for prompt in prompts])

    def informed(self, cond: Conditioning, batch: Batch) -> Conditioning:
        """With what the denoiser is told of the batch's images."""
        height, width = batch.pixels.shape[-2:]
        return self.family.inform(cond, Sizes(batch.original_sizes, batch.crops, (height, width)), self.config.noise.guidance)

    def denoise(self, x_t: Tensor, level: NoiseLevel, cond: Conditioning, inpaint: Tensor | None) -> Tensor:
        """The network's raw output [b, c, h, w] for x_t."""
        return self.family.denoise(prediction.scale_input(self.family.prediction, x_t, level), level, cond, inpaint)

    def key_dropout(self, keys: Keys, step: int) -> None:
        if self.drops:
            rows = keys.hashes("dropout").to(self.device)
            for module in self.trained.values():
                adapters.set_dropout(module, rows, step)

    def lazy(self, batch: Batch, x_t: Tensor, level: NoiseLevel, cond: Conditioning, inpaint: Tensor | None) -> dict[str, Callable[..., Any]]:
        """Members of StepOutput that cost a forward pass, for losses that touch them."""

        @torch.no_grad()
        def base_out(told: Conditioning = cond) -> Tensor:
            with adapters.disabled(self.denoiser):
                return self.denoise(x_t, level, told, inpaint)

        def preserved() -> tuple[Tensor, Tensor]:
            swapped = replace(batch, captions=[checks.swapped(caption, self.config.prior.swap) for caption in batch.captions])
            return self.denoise(x_t, level, self.conditioning(swapped), inpaint), base_out(self.base_conditioning(swapped))

        def attention() -> list[Tensor]:
            return self.family.attention_maps(prediction.scale_input(self.family.prediction, x_t, level), level, cond, inpaint)

        return {"base_out": base_out, "attention": attention, "decode": self.family.decode, "preserved": preserved}

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
        training = self.drops or self.config.gradient_checkpointing
        for module in (self.denoiser, *self.encoders.values()):
            module.train(training)
        self.checked = False

    def set_rates(self, stage: Stage, step: int) -> None:
        """Learning rates of step number `step` of the stage; 0 for the groups that pause."""
        o = self.config.optimizer
        factor = self.schedules[stage.schedule or o.schedule](step, stage.steps, o.warmup)
        for group in self.optimizer.param_groups:
            name = group["name"]
            group["lr"] = stage.lr.get(name, self.rates[name]) * factor * group["ratio"] if name in stage.groups else 0.0

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

    def after_update(self, stage: Stage) -> None:
        """What follows each step of the optimiser: the norm prior of the token rows, the moving average."""
        self._control_norms(stage)
        if self.average is not None:
            self.average.update_()

    def _control_norms(self, stage: Stage) -> None:
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
        rates = {f"lr_{g['name']}": g["lr"] for g in reversed(self.optimizer.param_groups) if g["name"] in stage.groups}  # LoRA+: that of down
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
    def averaged(self) -> Iterator[None]:
        """The moving average in the parameters' place, where there is one."""
        with ExitStack() as stack:
            if self.average is not None:
                stack.enter_context(self.average.swapped())
            yield

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
