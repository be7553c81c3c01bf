"""Everything the training loop holds: the model with its adapters and tokens, the data, the optimiser, the run folder. Built once, checked first."""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lora_core import tokens
from lora_core.adapters import injection
from lora_core.config import Config, Stage
from lora_core.data import buckets, dataset, hub
from lora_core.data.cache import TensorCache
from lora_core.data.dataset import Batch, ImageDataset, micro_batches
from lora_core.diffusion import losses, noise, prediction, sampling, validation
from lora_core.diffusion.losses import StepOutput
from lora_core.diffusion.noise import NoiseLevel
from lora_core.errors import UserError
from lora_core.family import Sizes
from lora_core.optim import schedules
from lora_core.optim.ema import ParameterAverage
from lora_core.runs import reports
from lora_core.runs.run_folder import Run, lock_folder
from lora_core.settings import ImageSettings, SamplerSettings, scheduler_changes
from lora_core.text import print_escaped
from lora_core.toml import to_table, to_toml
from models import DTYPES, Conditioning, LoadOptions, choose_device, load_family, read_layout
from training import (
    checkpoints,
    class_images,
    config_checks,
    cuda_graph,
    model_checks,
    nonfinite,
    step_inputs,
)
from training.run_identity import model_identity
from training.run_summary import RunLength, describe_run
from training.step_inputs import StepInputs, TextInput


class Session:
    """Opened by `train`; `training_step` asks it for latents and conditioning, the loop for everything else."""

    def __init__(
        self,
        config: Config,
        loss: Callable[[StepOutput], Tensor] | None = None,
        step: Callable[..., Tensor] | None = None,
    ) -> None:
        self.config = config
        self.began = time.perf_counter()
        config_checks.check_startup(config)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = choose_device(config.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # Triton launches on the current device
        config_checks.check_device(config, self.device)
        config_checks.check_optimizer(config, self.device)
        self.loss_name = config.loss if loss is None else getattr(loss, "__name__", "loss")
        self.loss: Callable[[StepOutput], Tensor] = loss or losses.find_function(
            config.loss, losses.LOSSES, config.loss_arg
        )
        if config.prior.swap:
            self.loss = losses.add_preservation(self.loss, config.prior.swap_weight)
        self.replayed = cuda_graph.GraphReplay() if config.cuda_graph else None
        if config.cuda_graph:
            config_checks.check_capturable(self.loss, self.loss_name, step)
        self.density = noise.bind_density(config.noise.density, **config.noise.density_args)
        self.noise = config.noise
        self.instances = config.batch_size * config.accumulation
        self.drops = bool(
            config.adapter.dropout or config.adapter.rank_dropout or config.adapter.module_dropout
        )
        side, look = config.data.resolution, config.samples
        self.recipe = SamplerSettings(
            look.sampler, look.steps, look.guidance, look.negative, width=side, height=side
        )
        self._open_data()
        self._open_model()
        self._open_optimizer()
        self.lock = lock_folder(Path(os.path.abspath(config.out)))  # first here may the disk change
        try:
            self._open_run()
        except BaseException:
            self.lock.release()
            raise

    # ------------------------------------------------------------ opening

    def _open_run(self) -> None:
        """The folder, which may hold a run to go on with, and what is read and written there."""
        config = self.config
        self.run = Run.open(
            config.out, resume=config.resume, overwrite=config.overwrite, keep=config.keep
        )
        self.lock = self.lock.follow(self.run.folder)
        self.log_book = reports.LogBook(self.run, config.report, to_table(config))
        self.prior = class_images.open_class_images(self)
        self.records = {
            r.key: r for folder in (self.folder, self.prior) if folder for r in folder.records
        }
        self.scores: dict[int, list[validation.Score]] = {}  # steps done -> validation
        self.val_latents: dict[
            int, dataset.Example
        ] = {}  # of val_folder, with latents on the CPU in place of pixels
        self.latent_cache = TensorCache(
            step_inputs.vae_fingerprint(self.family.modules["vae"]) if config.data.cache else {},
            config.data.cache or None,
        )
        self.text_cache: dict[str, Conditioning] = {}
        self.base_text_cache: dict[str, Conditioning] = {}  # without adapters
        self.drawn: dict[Hashable, StepInputs] = {}  # what `prepare` drew
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.saved: int | None = None  # the step of the newest checkpoint
        self.checked = False  # whether a step of this stage was looked at
        self.changes: list[str] = []  # what the run was resumed with that it did not begin with
        self.skips = (
            0,
            0,
        )  # steps that overflowed in fp16, and those of them in a row up to the last row of the log
        self.start = checkpoints.restore_checkpoint(self)
        nonfinite.check_finite_state(self, self.start)
        for group in self.optimizer.param_groups if config.cuda_graph else ():
            group["lr"] = torch.full((), group["lr"], dtype=torch.float64, device=self.device)
        length = RunLength(config.steps, config.batch_size, config.accumulation)
        print_escaped(describe_run(self.folder, self.prior, self.abstractions, length, self.unused))
        self.run.write(
            "config.toml", to_toml(config.recorded)
        )  # so that `config.toml --resume` goes on

    def _open_data(self) -> None:
        d, images = self.config.data, self.config.data.images
        if d.dataset:
            images = str(
                hub.export_dataset(
                    d.dataset,
                    split=d.split,
                    image_column=d.image_column,
                    caption_column=d.caption_column,
                    caption=d.caption,
                )
            )
        column = None if d.dataset else d.caption_column or None
        how: dict[str, Any] = {
            "captions": d.captions,
            "caption": d.caption or None,
            "caption_column": column,
        }
        records = dataset.scan_folder(images, repeats=d.repeats, masks=d.masks, **how)
        self.folder = ImageDataset(
            records, d, seed=self.config.seed, caption_dropout=d.caption_dropout
        )
        if d.buckets:
            print(buckets.describe_buckets(self.folder.sizes, self.instances))
        doubts = (
            dataset.describe_upscaled(self.folder),
            dataset.describe_moved_crops(self.folder),
            dataset.describe_unread_folder_names(images, records),
        )
        for sentence in filter(None, doubts):
            print(f"warning: {sentence}", file=sys.stderr)
        for word in (
            model_checks.token_initializers(self.config)
            if self.config.trains("tokens")
            else self.config.prior.swap
        ):
            model_checks.check_placeholder(records, word)
        model_checks.check_masks(self.config, self.folder)
        class_images.check_class_folder(self.config.prior.images, images)
        self.unused = dataset.find_unused_files(images, records)
        v = self.config.validation
        held_out = (
            dataset.scan_folder(v.images, masks="none", held_out=True, **how) if v.images else None
        )
        self.scored = validation.choose_images(records, held_out, v.count)
        if v.every >= 0:
            print(self.scored.sentence)
        self.val_folder = ImageDataset(
            self.scored.records,
            ImageSettings(d.resolution, interpolation=d.interpolation),
            keep_bytes=0,
        )

    def _open_model(self) -> None:
        c = self.config
        plan = model_checks.plan_adapters(c, read_layout(c.model, c.model_config))
        vae_dtype = None if c.vae_precision == "fp32" else DTYPES[c.vae_precision]
        how = LoadOptions(
            DTYPES[c.precision],
            self.device,
            c.vae,
            vae_dtype,
            scheduler_changes(c.noise.prediction, zero_terminal_snr=c.noise.zero_terminal_snr),
            c.clip_skip,
            c.max_sequence_length,
            c.model_config,
        )
        self.family = load_family(c.model, how)
        model_checks.check_model(c, self.family)
        self.model_identity = model_identity(
            self.family.modules, self.family.schedule, self.family.prediction
        )
        sampling.sampler_levels(
            self.recipe.sampler,
            self.family.schedule,
            self.recipe.steps,
            spacing=self.family.spacing,
            offset=self.family.offset,
        )
        print(
            losses.describe_loss(
                c.weighting, self.family.prediction, c.noise.space, loss=c.loss, **c.weighting_arg
            )
        )
        self.encoders = {name: self.family.modules[name] for name in self.family.tokenizers}
        self.denoiser = self.family.modules[self.family.denoiser]
        paths = {
            name: injection.inject(self.family.modules[name], spec, seed=c.seed)
            for name, spec in plan.items()
        }
        self.trained = {
            name: self.family.modules[name] for name in plan
        }  # the networks with adapters
        self.has_factors = model_checks.report_adapters(
            c, self.trained, paths
        )  # else the run writes a whole model
        self._install_tokens()
        model_checks.check_token_limit(
            self.family, self.embeddings, self.abstractions, self.folder.records
        )
        if c.gradient_checkpointing:
            # No layer here draws from the device's generator, whose state a CUDA graph cannot read.
            again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            self.denoiser.enable_gradient_checkpointing(again)  # type: ignore[operator]
            for encoder in self.encoders.values():  # transformers 6 keeps the first name only
                enable = (
                    getattr(encoder, "activation_checkpointing_enable", None)
                    or encoder.gradient_checkpointing_enable
                )
                enable(again.keywords)  # type: ignore[operator]
        if self.device.type == "cuda":
            self.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 4-d weights: cuDNN's half-precision kernels are NHWC
        if c.compile:
            cuda_graph.compile_blocks(self.denoiser)
        text = [
            p
            for name in self.encoders
            if name in self.trained
            for p in injection.adapter_parameters(self.encoders[name])
        ]
        unet = (
            injection.adapter_parameters(self.denoiser)
            if self.family.denoiser in self.trained
            else []
        )
        every = {
            "denoiser": unet,
            "text_encoder": text,
            "tokens": [e.rows for e in self.embeddings.values()],
        }
        self.groups: dict[str, list[nn.Parameter]] = {
            name: params for name, params in every.items() if params
        }
        self.average = (
            ParameterAverage([p for params in self.groups.values() for p in params], c.ema)
            if c.ema
            else None
        )

    def _install_tokens(self) -> None:
        """The learned rows of the chosen text encoders; what each abstraction starts from needs the tokenizers."""
        c, keys, self.embeddings = self.config, self.family.layout.encoders, {}
        self.abstractions: tuple[tokens.Placeholder, ...] = ()
        if not c.trains("tokens"):
            return
        chosen = [
            name
            for name in self.encoders
            if keys[name] in (c.tokens.encoders or ("clip_l", "clip_g"))
        ]
        if missing := set(c.tokens.encoders) - {keys[name] for name in chosen}:
            raise UserError(
                f"--tokens.encoders has {', '.join(sorted(missing))}; the text encoders of this model are {', '.join(keys.values())}"
            )
        inits = model_checks.token_initializers(c)
        vectors = [
            c.tokens.vectors
            or tokens.count_initializer_tokens(
                init, [self.family.tokenizers[name] for name in chosen]
            )
            for init in inits.values()
        ]
        self.abstractions = tokens.make_placeholders(inits, vectors)
        for name in chosen:
            stream = "" if name == "text_encoder" else keys[name]
            self.embeddings[name] = tokens.install_tokens(
                self.encoders[name],
                self.family.tokenizers[name],
                self.abstractions,
                seed=c.seed,
                stream=stream,
            )
        self.norm_targets = {
            name: _norm_target(e, c.tokens.norm_target) for name, e in self.embeddings.items()
        }
        self.table_stds = {name: tokens.table_std(e) for name, e in self.embeddings.items()}

    def _open_optimizer(self) -> None:
        o = self.config.optimizer
        self.settings = schedules.group_settings(
            o.name, self.groups, lr=o.lr, decay=o.weight_decay, betas=o.betas
        )  # beside its parameters
        self.rates = {name: settings["lr"] for name, settings in self.settings.items()}
        self.decays = {
            name: o.weight_decay.get(name, schedules.DEFAULT_WEIGHT_DECAYS[name])
            for name in self.groups
        }
        groups = [{"params": params, **self.settings[name]} for name, params in self.groups.items()]
        ups: dict[
            str, list[Tensor]
        ] = {}  # of each group, where they have a learning rate of their own
        for name, module in self.trained.items() if o.lora_plus != 1 else ():
            ups.setdefault("text_encoder" if name in self.encoders else "denoiser", []).extend(
                injection.up_parameters(module)
            )
        self.optimizer = schedules.build_optimizer(
            o.name, schedules.split_lora_plus(groups, ups, o.lora_plus), o.args
        )
        if schedules.is_schedule_free(self.optimizer):
            self.optimizer.train()  # type: ignore[attr-defined]
        self.scaler = (
            schedules.LossScaler(device=self.device) if self.config.precision == "fp16" else None
        )
        names = {stage.schedule or o.schedule for stage in self.config.stages}
        self.schedules = {
            name: schedules.resolve_schedule(
                name, **(o.schedule_args if name == o.schedule else {})
            )
            for name in names
        }

    # ------------------------------------------------------------ what training_step asks for

    def prepare(self, batch: Batch, stage: Stage, step: int) -> None:
        """Draws the inputs of a batch's micro-batches; on a GPU on a stream of its own, beside the steps that were asked for and are not done."""
        with self.beside():
            self.drawn = {
                self._name(micro, step): step_inputs.make_step_inputs(self, micro, stage, step)
                for micro in micro_batches(batch, self.config.accumulation)
            }

    def inputs(self, batch: Batch, stage: Stage, step: int) -> StepInputs:
        """What `prepare` drew for this batch, else drawn now."""
        name = self._name(batch, step)
        if name not in self.drawn:
            self.drawn[name] = step_inputs.make_step_inputs(self, batch, stage, step)
        return self.drawn[name]

    def _name(self, batch: Batch, step: int) -> Hashable:
        return batch.keys, batch.visits, step

    @contextmanager
    def beside(self) -> Iterator[None]:
        """A GPU's side stream; the main one waits for what was asked for in it. Nothing on a CPU."""
        if self.side is None:
            yield
            return
        main = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.side):
            yield
        main.wait_stream(self.side)
        for tensor in cuda_graph.tree_tensors(self.drawn):
            tensor.record_stream(main)

    def conditioning(self, text: TextInput, sizes: Sizes) -> Conditioning:
        """The prompts encoded, where they are not yet, and what the denoiser is told of the images."""
        with self.autocast():
            cond = (
                text
                if isinstance(text, Conditioning)
                else step_inputs.encode_text(self.family, text)
            )
        return self.family.add_size_embeddings(cond, sizes, self.config.noise.guidance)

    def denoise(
        self, x_t: Tensor, level: NoiseLevel, cond: Conditioning, inpaint: Tensor | None
    ) -> Tensor:
        """The network's raw output [b, c, h, w] for x_t."""
        with self.autocast():
            return self.family.denoise(
                prediction.scale_input(self.family.prediction, x_t, level), level, cond, inpaint
            )

    def autocast(self) -> torch.autocast:
        # a graph replays addresses: no copies of weights may be kept from one step to the next
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.config.autocast,
            cache_enabled=not self.config.cuda_graph,
        )

    def key_dropout(self, x: StepInputs) -> None:
        for module in self.trained.values() if x.rows is not None else ():
            injection.set_dropout_keys(module, x.rows, x.step)  # type: ignore[arg-type]

    def lazy(self, x: StepInputs, x_t: Tensor, cond: Conditioning) -> dict[str, Callable[..., Any]]:
        """Members of StepOutput that cost a forward pass, for losses that touch them."""

        @torch.no_grad()
        def base_out(told: Conditioning = cond) -> Tensor:
            with injection.disable_adapters(self.denoiser):
                return self.denoise(x_t, x.level, told, x.inpaint)

        def preserved() -> tuple[Tensor, Tensor]:
            assert x.swapped is not None
            now, before = (self.conditioning(text, x.sizes) for text in x.swapped)
            return self.denoise(x_t, x.level, now, x.inpaint), base_out(before)

        def attention() -> list[Tensor]:
            with torch.compiler.set_stance(
                "force_eager"
            ):  # a compiled block does not see the hooks that look at its layers
                return self.family.attention_maps(
                    prediction.scale_input(self.family.prediction, x_t, x.level),
                    x.level,
                    cond,
                    x.inpaint,
                )

        return {
            "base_out": base_out,
            "attention": attention,
            "decode": self.family.decode,
            "preserved": preserved,
        }

    # ------------------------------------------------------------ what the loop asks for

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        return dataset.iterate_batches(
            self.folder,
            self.prior,
            batch=self.instances,
            seed=self.config.seed,
            start=start,
            stop=stop,
            workers=self.config.data.workers,
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
                group["weight_decay"] = stage.weight_decay.get(
                    group["name"], self.decays[group["name"]]
                )
        self.text_trains = bool({"text_encoder", "tokens"} & set(stage.groups))
        self.text_cache.clear()
        training = self.drops or self.config.gradient_checkpointing
        for module in (self.denoiser, *self.encoders.values()):
            module.train(training)
        if self.side is not None:
            self.side.wait_stream(
                torch.cuda.current_stream(self.device)
            )  # what trained so far encodes the texts of this stage
        self.checked = False

    def set_rates(self, stage: Stage, step: int) -> None:
        """Learning rates of step number `step` of the stage; 0 for the groups that pause."""
        o = self.config.optimizer
        factor = self.schedules[stage.schedule or o.schedule](step, stage.steps, o.warmup)
        for group in self.optimizer.param_groups:
            name = group["name"]
            group["rate"] = (
                stage.lr.get(name, self.rates[name]) * factor * group["ratio"]
                if name in stage.groups
                else 0.0
            )
            if isinstance(group["lr"], Tensor):  # a CUDA graph reads it there
                group["lr"].fill_(group["rate"])
            else:
                group["lr"] = group["rate"]

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def check_rows(self, rows: Tensor, name: str, b: int) -> None:
        """Refuses what is not one finite number per example, in the first step of a stage: to look means to wait for the device."""
        if not self.checked:
            nonfinite.check_loss_values(self, rows, name, b)

    def replay(self, advance: Callable[[], tuple[Tensor, ...]], stage: Stage) -> tuple[Tensor, ...]:
        """advance(), or with --cuda-graph its replay on the inputs that were drawn."""
        if self.replayed is None:
            return advance()

        def on(given: list[StepInputs]) -> tuple[Tensor, ...]:
            self.drawn = dict(zip(self.drawn, given, strict=True))
            return advance()

        return self.replayed(on, list(self.drawn.values()), key=self.config.stages.index(stage))

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Within it no adapter changes, so that what depends on factors alone is computed once."""
        with ExitStack() as stack:
            for module in self.trained.values():
                stack.enter_context(injection.cache_dora_norms(module))
            yield

    def update(self) -> Tensor:
        """One optimiser step; the gradient's norm before clipping."""
        if not self.checked:
            for name, params in self.groups.items():
                if params[0].requires_grad and all(p.grad is None for p in params):
                    raise UserError(
                        f"the group {name} gets no gradient from this loss; take it out of the stage"
                    )
            self.checked = True
        if self.scaler is not None:
            self.scaler.unscale_(self.active)
        norm = schedules.clip_gradients_(self.active, self.config.optimizer.clip or math.inf)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return norm

    def average_(self) -> None:
        """Brings the moving average up to date, where there is one."""
        if self.average is not None:
            self.average.update_()

    def control_norms(self, stage: Stage) -> None:
        """The norm prior of the token rows, after each step of the optimiser."""
        how = stage.norm or self.config.tokens.norm
        if "tokens" not in stage.groups or how == "none":
            return
        group = next(g for g in self.optimizer.param_groups if g["name"] == "tokens")
        d = schedules.read_distance(self.optimizer, group)
        rate = torch.as_tensor(
            100 * group["lr"] * (1.0 if d is None else d), dtype=torch.float64
        ).clamp(max=1.0)
        for name, embedding in self.embeddings.items():
            if how == "pull":
                tokens.pull_norms_(embedding.rows, self.norm_targets[name], rate=rate)
            else:
                tokens.rescale_std_(embedding.rows, self.table_stds[name])

    @contextmanager
    def progress(self, start: int) -> Iterator[tqdm]:
        with tqdm(
            total=self.config.steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        ) as bar:
            yield bar
        self.flush()

    def log(self, done: int, stage: Stage, loss: Tensor, norm: Tensor, bar: tqdm) -> None:
        """A row for each step; values are read from the device every --log-every steps."""
        rates = {
            f"lr_{g['name']}": g["rate"]
            for g in reversed(self.optimizer.param_groups)
            if g["name"] in stage.groups
        }  # LoRA+: that of down
        found = {
            f"d_{g['name']}": schedules.read_distance(self.optimizer, g)
            for g in self.optimizer.param_groups
            if g["name"] in stage.groups
        }
        distances = {name: d for name, d in found.items() if d is not None}
        skipped = {} if self.scaler is None else {"skipped": self.scaler.skipped.clone()}
        self.log_book.add(done, loss=loss, grad_norm=norm, **rates, **distances, **skipped)
        bar.update()
        if done % self.config.log_every == 0:
            rows = self.flush()
            shown = {
                name: f"{value:.2e}" for name, value in rows[-1].items() if name.startswith("d_")
            }
            bar.set_postfix(loss=f"{sum(row['loss'] for row in rows) / len(rows):.4f}", **shown)

    def flush(self) -> list[dict[str, Any]]:
        """Writes and returns the waiting rows. Raises UserError when one of them is no number, before a checkpoint could hold the damage."""
        rows = self.log_book.flush()
        nonfinite.check_logged_values(self, rows)
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
        """The moving average in the parameters' place, where there is one: --ema's, or a schedule-free optimiser's own."""
        with ExitStack() as stack:
            stack.enter_context(schedules.use_evaluation_parameters(self.optimizer))
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
