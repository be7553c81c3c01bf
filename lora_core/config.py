"""The one place where a default is written. Values come from here, then the TOML file, then the flags.

Only the scripts read this module; everything below them takes plain values.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NewType, get_args

from tyro.constructors import PrimitiveConstructorSpec

ScheduleName = NewType("ScheduleName", str)  # a row of optim.SCHEDULES or file.py:fn
Group = Literal["denoiser", "text_encoder", "tokens"]
GROUPS: tuple[str, ...] = get_args(Group)


def _pairs(parse: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec:
    def read(words: list[str]) -> dict[str, Any]:
        if bad := [w for w in words if "=" not in w]:
            raise ValueError(f"expected KEY=VALUE, got {bad[0]}")
        pairs = [word.split("=", 1) for word in words]
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]} is given {keys.count(twice[0])} times, expected once")
        return {key: parse(value) for key, value in pairs}

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda x: isinstance(x, dict),
        str_from_instance=lambda x: [f"{k}={v}" for k, v in x.items()],
    )


def _value(text: str) -> Any:
    """A number, a boolean or a list where TOML or Python reads one (False, .5), else the text itself."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        pass
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text


def _two_numbers(text: str) -> tuple[float, ...]:
    numbers = tuple(map(float, text.split(",")))
    if len(numbers) != 2:
        raise ValueError(f"expected two numbers B1,B2, got {text}")
    return numbers


Numbers = Annotated[dict[str, float], _pairs(float, "KEY=NUMBER ...")]
Arguments = Annotated[dict[str, Any], _pairs(_value, "KEY=VALUE ...")]


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    images: str = ""
    """Folder with the training images (jpg, png, webp, tiff, avif ..., heic with the package
    pillow-heif); or with kohya's folders N_name, each for N repeats, or with a folder train."""
    dataset: str = ""
    """Instead of a folder: a dataset of the hub, or anything else that datasets.load_dataset takes (extra: datasets)."""
    split: str = "train"
    """Split of the dataset."""
    image_column: str = "image"
    """Column of the dataset with the images."""
    caption_column: str = ""
    """Column of the dataset or of metadata.jsonl with the captions; empty: text, caption or prompt."""
    captions: Literal["auto", "txt", "metadata", "filename", "one", "object", "style"] = "auto"
    """Where captions come from: NAME.txt, metadata.jsonl, file names, --data.caption for all, or sentence templates; auto: metadata,
    else NAME.txt, .caption or .json, else --data.caption, else the name of a folder N_name, else file names where they are words."""
    caption: str = ""
    """The one caption of all images, e.g. "a photo of TOK", or of those without a text in their file
    or table. Of a dataset: of all images, or, with --data.caption-column, of those without a text."""
    caption_dropout: float = 0.0
    """Probability that a visit has no caption, [0, 1)."""
    dropped: Literal["model", "zeros", "empty"] = "model"
    """What stands for a caption that was dropped: zeros, the encoding of the empty prompt, or what the model samples an empty prompt with (SDXL:
    zeros; A1111 and ComfyUI sample it with the encoding)."""
    resolution: int = 512
    """Side of the training square, pixels; with buckets the side of a square of the same area."""
    buckets: bool = False
    """Keep aspect ratios: each image is cut to the nearest of many sizes of about resolution^2 pixels, and a batch has one size."""
    bucket_step: int = 64
    """Sides of buckets are multiples of this, pixels."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    """How images are resized."""
    crop: Literal["center", "random"] = "center"
    zoom: float = 1.0
    """A random crop is taken after scaling the short side to resolution x [1, zoom]."""
    flip: bool = False
    """Mirror half of the visits. Leave off for anything with a left and a right: faces, letters, logos."""
    jitter: bool = False
    """Brightness and contrast +-10 %."""
    variants: int = 0
    """Augmentation repeats after this many visits, so that latents can be cached; 0: always fresh (cached anyway when nothing is random)."""
    repeats: int = 1
    """Visits of each image in an epoch."""
    masks: Literal["none", "file", "alpha", "auto", "any"] = "none"
    """Weight the loss by NAME.mask.png, NAME-masklabel.png or masks/NAME.png (file) or by the alpha channel
    (alpha), which every image must have. auto: by mask files where there are some, other images
    count whole; any: by a mask file, else the alpha channel, else the whole image."""
    cache: str = ""
    """Folder that keeps encoded latents between runs; empty: memory only."""
    workers: int = 0
    """Threads that load images ahead of the loop; any number gives the same bits."""


@dataclass(frozen=True)
class PriorConfig:
    """Prior preservation (DreamBooth, arXiv 2208.12242)."""

    prompt: str = ""
    """Class prompt, e.g. "a photo of a dog". Empty: no prior preservation."""
    images: str = ""
    """Folder with class images; missing ones are drawn by the base model. Empty: OUT/class_images."""
    count: int = 100
    """How many class images there are to be at least; all that the folder has are used."""
    weight: float = 1.0
    """Weight of the class images' loss."""
    swap: Annotated[dict[str, str], _pairs(str, "WORD=CLASS ...")] = field(default_factory=dict)
    """Differential output preservation: with each WORD of the captions replaced by its CLASS (TOK=dog), the model is held to what it says without
    adapters; costs two more forward passes. Instead of class images, or next to them."""
    swap_weight: float = 1.0
    """Weight of that loss."""


@dataclass(frozen=True)
class AdapterConfig:
    """The low-rank adapters of the denoiser and of the text encoder."""

    kind: str = "lora"
    """lora, dora, full (the weights themselves: rank and alpha have no part in it), or my_adapter.py:Class."""
    rank: int = 16
    alpha: float = 0.0
    """Update is alpha / rank * up @ down; 0: alpha = rank."""
    targets: tuple[str, ...] = ("attention",)
    """Presets of the family (attention, kohya, all-linear ...) or globs on module paths ("*.attn2.to_k", "mid_block.*"); a wrong one lists them."""
    text_targets: tuple[str, ...] = ("attention",)
    """The same for the text encoder; used when a stage trains text_encoder."""
    exclude: tuple[str, ...] = ()
    """Globs that are left out again."""
    rank_pattern: Numbers = field(default_factory=dict)
    """Rank per glob, e.g. "*.attn2.*=4"."""
    alpha_pattern: Numbers = field(default_factory=dict)
    """Alpha per glob."""
    dropout: float = 0.0
    """Probability that an input element of an adapter is dropped, [0, 1)."""
    rank_dropout: float = 0.0
    """Probability that a rank of an adapter is dropped for an image, [0, 1)."""
    module_dropout: float = 0.0
    """Probability that a whole adapter is dropped for an image, [0, 1)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    norm_grad: Literal["detach", "full"] = "detach"
    """Of dora: whether the norm counts as a constant in the backward pass (the paper's section 4.3) or is differentiated through."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """down ~ N(0, 1 / rank^2) as cloneofsimo and diffusers, or U(+-1 / sqrt(fan_in)) as kohya and peft."""


@dataclass(frozen=True)
class TokensConfig:
    """Learned tokens (textual inversion, arXiv 2208.01618)."""

    words: tuple[str, ...] = ("TOK",)
    """Placeholder words in captions and prompts, one for each thing to learn."""
    encoders: tuple[Literal["clip_l", "clip_g", "t5"], ...] = ()
    """Text encoders that learn rows; empty: every CLIP encoder of the model. The others read the tokens' names as plain text."""
    vectors: int = 2
    """Learned vectors for each word; 0: as many as its initializer has tokens."""
    init: tuple[str, ...] = ("random",)
    """For each word: random (the table's std), random:SIGMA, zero, or ordinary words, whose tokens the vectors start from in order."""
    norm: Literal["none", "pull", "rescale"] = "pull"
    """After each step: pull every row's norm to the target (cloneofsimo), rescale all rows to the table's std (diffusers), or leave them alone."""
    norm_target: float = 0.0
    """Norm that pull aims at; 0: the norm that each row started with."""


@dataclass(frozen=True)
class NoiseConfig:
    """How training images are noised."""

    low: float = 0.0
    """Lowest timestep trained on, as a fraction of the schedule."""
    high: float = 1.0
    """Highest timestep trained on, as a fraction of the schedule."""
    density: Literal["uniform", "logit_normal", "mode", "cosmap"] = "uniform"
    """How timesteps are drawn; towards 1 is towards noise, also for logit_normal's mean (arXiv 2403.03206)."""
    density_args: Arguments = field(default_factory=dict)
    """Arguments of the density, e.g. mean=0.5 std=1."""
    shift: float = 1.0
    """Flow models: sigma -> shift sigma / (1 + (shift - 1) sigma); above 1 is more noise."""
    dynamic_shift: bool = False
    """Flow models: the shift that the model's scheduler takes for this resolution, instead of --noise.shift."""
    space: Literal["model", "edm"] = "model"
    """Where the loss is taken: on the network's own output, or as in EDM on the x0 it stands for (weighed by 1 / sigma^2 if --weighting is none)."""
    guidance: float = 3.5
    """Guidance scale that a guidance-distilled model is told in training."""
    offset: float = 0.0
    """Noise offset: strength of one extra random constant per channel."""
    multires_levels: int = 0
    """Coarser octaves of noise that are added; 0: off."""
    multires_discount: float = 0.3
    """Strength of an octave relative to the finer one."""
    perturbation: float = 0.0
    """Extra noise on the network's input that the target does not know (arXiv 2301.11706)."""
    prediction: Literal["model", "epsilon", "v_prediction", "sample"] = "model"
    """What the network predicts; model: as its scheduler_config.json says."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last step is pure noise (arXiv 2305.08891)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """One optimiser; a group each for denoiser, text_encoder and tokens."""

    name: str = "adamw"
    """adamw, prodigy, the dotted path of any torch optimiser, or my_optimizer.py:Class."""
    lr: Numbers = field(default_factory=dict)
    """Learning rate per group; others: denoiser=1e-4 text_encoder=1e-5 tokens=5e-4, with prodigy 1 each, with other classes their own default."""
    weight_decay: Numbers = field(default_factory=dict)
    """Weight decay per group; others: 0.01 for adapters, 0 for tokens."""
    betas: Annotated[dict[str, tuple[float, float]], _pairs(_two_numbers, "GROUP=B1,B2 ...")] = (
        field(default_factory=dict)
    )
    """Betas per group, e.g. "tokens=0.9,0.99"."""
    args: Arguments = field(default_factory=dict)
    """Further arguments of the optimiser's class, e.g. safeguard_warmup=true d_coef=2."""
    schedule: ScheduleName = ScheduleName("constant")
    """Learning rate over a stage: constant, linear, cosine, cosine_restarts, polynomial, or my_schedule.py:fn, with fn(step, total, warmup)."""
    schedule_args: Arguments = field(default_factory=dict)
    """Arguments of the schedule, e.g. cycles=3 or power=2."""
    warmup: int = 0
    """Steps of linear warm-up at the beginning of each stage."""
    lora_plus: float = 1.0
    """Learning rate of up relative to that of down (LoRA+, arXiv 2402.12354)."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training: which groups step, for how long. What it leaves unset is as in [optimizer], [noise], [tokens]."""

    steps: int = 1000
    groups: tuple[Group, ...] = ("denoiser",)
    """Groups that step; the others are frozen and keep their optimiser state."""
    lr: Numbers = field(default_factory=dict)
    """Learning rate per group in this stage."""
    weight_decay: Numbers = field(default_factory=dict)
    """Weight decay per group in this stage."""
    schedule: ScheduleName | None = None
    low: float | None = None
    high: float | None = None
    norm: Literal["none", "pull", "rescale"] | None = None
    mask_temperature: float = 1.0
    """The mask is raised to this power: above 1 the background counts less."""


@dataclass(frozen=True)
class SamplesConfig:
    """Pictures on the way and at the end."""

    prompts: tuple[str, ...] = ()
    """Prompts with the placeholder word; empty: the training captions."""
    every: int = 0
    """Steps between sample grids; 0: only before/after."""
    steps: int = 25
    """Sampling steps."""
    guidance: float = 5.0
    """Classifier-free guidance scale."""
    sampler: str = "ddim"
    """ddim, euler, euler_ancestral or dpmpp_2m."""
    negative: str = ""
    """Negative prompt."""
    base_word: str = ""
    """Stands for the placeholder when the base model draws the "before" pictures; empty: the initialising words, or nothing."""
    new_prompts: tuple[str, ...] = ()
    """Prompts in new places, the last row of before_after.png."""


@dataclass(frozen=True)
class ValidationConfig:
    """Loss at fixed timesteps and fixed noise."""

    images: str = ""
    """Folder with held-out images; empty: the training images, centre-cropped."""
    count: int = 16
    """Images that are scored, evenly chosen over the folder; 0: all."""
    every: int = 0
    """Steps between validations; 0: only before the first and after the last step; -1: none at all."""
    bins: int = 8
    """Timesteps, the midpoints of as many equal bins."""
    draws: int = 1
    """Noise draws for each image and timestep."""
    seed: int = 0
    """Its own seed, so that runs with different training seeds can be compared."""


@dataclass(frozen=True)
class Config:
    """Fine-tune a text-to-image model with LoRA, DoRA, learned tokens, or all of them in stages."""

    model: str = ""
    """The base model: a folder or hub id in the diffusers layout, or a single file (.safetensors, .ckpt) of SD 1.x, 2.x or SDXL."""
    model_config: str = ""
    """Folder or hub id with the configs and tokenizers of a single-file model; empty: those it was published with."""
    vae: str = ""
    """Folder or hub id of another VAE."""
    vae_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the VAE; in fp16 SDXL's own overflows."""
    clip_skip: int = 0
    """Last layers of the CLIP text encoders that are left out."""
    max_sequence_length: int = 0
    """Tokens of a T5 prompt; 0: 512, or 256 for a model without guidance embedding."""
    out: str = "runs/out"
    """Folder for everything the run writes; its last part names the files."""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: cuda where there is one."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Precision of the frozen base; adapters and tokens always train in fp32 or better."""
    threads: int = 0
    """CPU threads; 0: torch's choice."""
    batch_size: int = 1
    """Images in one forward pass."""
    accumulation: int = 1
    """Forward passes for one step; batch 2 x 2 gives the numbers of batch 4."""
    autocast: bool = False
    """Matrix products in bf16 while the weights keep their precision (torch.autocast)."""
    compile: bool = False
    """torch.compile the blocks that the denoiser repeats: faster steps, after a first one in which each kind of block is compiled."""
    cuda_graph: bool = False
    """On an NVIDIA GPU replay forward, backward, clipping and optimiser as one CUDA graph, captured once for each stage and image size: no launch
    costs. With adamw or prodigy, and losses that do the same in each step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    loss: str = "mse"
    """mse, l1, huber, smooth_l1, or my_loss.py:my_loss."""
    loss_arg: Arguments = field(default_factory=dict)
    """Arguments of the loss, e.g. delta=0.1."""
    step: str = ""
    """my_step.py:my_step, a training step in place of train.training_step; empty: that one."""
    weighting: Literal[
        "none", "min_snr", "soft_min_snr", "debiased", "p2", "snr", "sigma_sqrt", "cosmap"
    ] = "none"
    """Weight over noise levels."""
    weighting_arg: Arguments = field(default_factory=dict)
    """Arguments of the weighting, e.g. gamma=5."""
    ema: float = 0.0
    """Decay of a moving average of what trains, [0, 1); samples, validation and files then have the average. 0: none."""
    save_every: int = 0
    """Steps between checkpoints; 0: none until the end."""
    keep: int = 2
    """Checkpoints that are kept."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl and updates of the progress bar."""
    report: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log there (install the extra of that name)."""
    push_to_hub: str = ""
    """Hub repository USER/NAME that the finished run is uploaded to."""
    resume: bool = False
    """Go on from the newest checkpoint in OUT."""
    resume_anyway: bool = False
    """With --resume: go on although the data, the model or options are others than those of the checkpoint; README.md and summary.json say so."""
    overwrite: bool = False
    """Move a run that is already in OUT to OUT.bak."""
    data: DataConfig = DataConfig()
    prior: PriorConfig = PriorConfig()
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    tokens: TokensConfig = TokensConfig()
    noise: NoiseConfig = NoiseConfig()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stages: tuple[Stage, ...] = field(default_factory=lambda: (Stage(),))
    samples: SamplesConfig = SamplesConfig()
    validation: ValidationConfig = ValidationConfig()

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def recorded(self) -> Config:
        """As files and headers keep it: without how this process was started, so that a resumed run writes what the run left alone writes."""
        return replace(self, resume=False, resume_anyway=False, overwrite=False)

    def trains(self, group: str) -> bool:
        return any(group in stage.groups for stage in self.stages)
