"""The options of a training run: one frozen dataclass a section, with defaults, help and ranges.

Values come from here, then from the TOML file, then from the flags. The sections `adapter`, `data`,
`noise` and `samples` are the core's own settings (settings.py) with a run's options added. Only the
scripts and training/ read a Config; the core takes plain values and settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NewType

import tyro

from lora_core.file_settings import FileSettings
from lora_core.model_settings import ModelConfig
from lora_core.option_types import DENSITY_NAMES, SCHEDULE_NAMES, WEIGHTING_NAMES, name_or_file
from lora_core.settings import (
    Above,
    AdapterSpec,
    AtLeast,
    CaptionSettings,
    ImageSettings,
    NoiseSettings,
    SamplingMethod,
    Share,
)
from lora_core.stage_settings import OptimizerConfig, ScheduleName, Stage
from lora_core.subset_options import CaptionSource, Subset

# Options that are one of these names or file.py:fn.
WeightingName = NewType("WeightingName", str)
DensityName = NewType("DensityName", str)
PLUGIN_NAMES: dict[Any, tuple[str, ...]] = {
    WeightingName: WEIGHTING_NAMES,
    DensityName: DENSITY_NAMES,
    ScheduleName: SCHEDULE_NAMES,
}
_WEIGHTING = name_or_file("weighting", PLUGIN_NAMES[WeightingName])
_DENSITY = name_or_file("density", PLUGIN_NAMES[DensityName])
SegmenterWords = NewType("SegmenterWords", str)  # clipseg:WORDS or clipseg@MODEL:WORDS
FoundMasks = Literal["none", "file", "alpha", "auto", "any"]
MaskSource = FoundMasks | SegmenterWords
Checkpointing = Literal["none", "blocks", "all"]


@dataclass(frozen=True)
class DataConfig(CaptionSettings, ImageSettings):
    """Training images and their captions."""

    images: str = ""
    """Folder with the training images (jpg, png, webp, tiff, avif ..., heic with the package
    pillow-heif); or with kohya's folders N_name, each for N repeats, or with a folder train; or
    with Mix-of-Show's folders image, caption and mask, in itself or in sub-folders, or its JSON
    file of such concepts. Several folders: [[data.subsets]] tables in a TOML file. Empty: with
    --data.dataset."""
    subsets: tuple[Subset, ...] = ()
    """Several folders instead of one, each with its own repeats and captions: [[data.subsets]]."""
    dataset: str = ""
    """Instead of a folder: a dataset of the hub, or anything else that datasets.load_dataset takes
    (extra: datasets). Empty: the folder."""
    streaming: bool = False
    """Read the images of the dataset where they are, in its shards, and export nothing: a folder of
    tar files (WebDataset), parquet, Arrow or images, or files such as shards/{000..009}.tar. The
    order is that of a folder."""
    split: str = "train"
    """Split of the dataset."""
    image_column: str = "image"
    """Column of the dataset with the images; of tar files the ending of their names, image: any."""
    caption_column: str = ""
    """Column of the dataset or of metadata.jsonl with the captions; empty: text, caption or
    prompt."""
    captions: CaptionSource = "auto"
    """Where captions come from: NAME.txt, metadata.jsonl, file names, --data.caption for all, or
    sentence templates; auto: metadata, else NAME.txt, .caption or .json, else --data.caption, else
    the name of a folder N_name, else file names where they are words."""
    caption: str = ""
    """The one caption of all images, e.g. "a photo of TOK", or of those without a text in their
    file or table. Of a dataset: of all images, or, with --data.caption-column, of those without a
    text. Empty: only where each image has a text."""
    caption_dropout: Annotated[float, Share()] = 0.0
    """Probability that a visit has no caption, [0, 1). 0: never."""
    dropped: Literal["model", "zeros", "empty"] = "model"
    """Conditioning of a dropped caption: zeros, the encoding of the empty prompt, or whichever of
    the two the model samples an empty prompt with (SDXL: zeros; A1111 and ComfyUI sample it with
    the encoding)."""
    pairs: str = ""
    """Pairs for losses that compare a preferred image with another: the folder of the losers, which
    have the names of the winners in --data.images; or two columns of its metadata.jsonl with file
    names, WINNER,LOSER. Empty: no pairs."""
    repeats: Annotated[int, AtLeast(1)] = 1
    """Visits of each image in an epoch."""
    masks: Annotated[MaskSource, tyro.conf.arg(aliases=("--data.mask",))] = "none"
    """Masks of the images: NAME.mask.png, NAME-masklabel.png or masks/NAME.png (file) or the alpha
    channel (alpha), which every image must have. auto: mask files where there are some, other
    images count whole; any: a mask file, else the alpha channel, else the whole image. "clipseg:a
    face": mask files, of which missing ones are written as NAME.mask.png by a segmenter that looks
    for these words, to be corrected by hand (clipseg@MODEL:WORDS takes the weights in that folder
    or hub repository)."""
    mask_use: Literal["loss", "hole", "both"] = "loss"
    """What the masks are for: loss weights it; hole trains an inpainting model to paint what is
    white (at least half) instead of random rectangles, and the whole image counts; both: the hole
    is painted and counts alone."""
    skip_bad: bool = False
    """Leave out images that cannot be read, or whose mask or caption cannot, and print them;
    otherwise the first one is an error."""
    cache: str = ""
    """Folder that keeps encoded latents, captions where no text trains, and which image files were
    checked; many runs and processes may share it. Empty: memory only."""
    workers: Annotated[int, AtLeast(0)] = 0
    """Threads that load images ahead of the loop; any number gives the same bits. 0: the loop loads
    them itself."""

    def __post_init__(self) -> None:
        """Nothing here: config_checks looks at all sections once the flags have been read."""


@dataclass(frozen=True)
class PriorConfig:
    """Prior preservation (DreamBooth, arXiv 2208.12242)."""

    prompt: str = ""
    """Class prompt, e.g. "a photo of a dog". Empty: no prior preservation."""
    images: str = ""
    """Folder with class images; missing ones are drawn by the base model. Empty:
    OUT/class_images."""
    count: Annotated[int, AtLeast(1)] = 100
    """Smallest number of class images; all that the folder has are used."""
    weight: Annotated[float, AtLeast(0)] = 1.0
    """Weight of the class images' loss."""
    swap: dict[str, str] = field(default_factory=dict)
    """Differential output preservation: with each WORD of the captions replaced by its CLASS
    (TOK=dog), the output is held to that of the model without adapters; costs two more forward
    passes. Instead of class images, or in addition to them. Empty: none."""
    swap_weight: Annotated[float, AtLeast(0)] = 1.0
    """Weight of the loss of --prior.swap."""
    outside_mask: Annotated[float, AtLeast(0)] = 0.0
    """Weight of a loss that keeps the base model's output outside the mask; the base model reads
    the caption with the classes of --prior.swap, or else the initializer's words, in place of the
    placeholder words. 0: none. Costs one more forward pass."""


@dataclass(frozen=True)
class AdapterConfig(AdapterSpec):
    """The low-rank adapters of the denoiser and of the text encoder."""

    targets: tuple[str, ...] = ("attention",)
    """Presets of the family (attention, kohya, all-linear ...) or globs on module paths
    ("*.attn2.to_k", "mid_block.*"); the error for an unknown one lists them."""
    text_targets: tuple[str, ...] = ("attention",)
    """The same for the text encoder; used when a stage trains text_encoder."""

    def __post_init__(self) -> None:
        """Nothing here: config_checks looks at all sections once the flags have been read."""


@dataclass(frozen=True)
class TokensConfig:
    """Learned tokens (textual inversion, arXiv 2208.01618)."""

    words: tuple[str, ...] = ("TOK",)
    """Placeholder words in captions and prompts, one for each thing to learn."""
    encoders: tuple[Literal["clip_l", "clip_g", "t5"], ...] = ()
    """Text encoders that learn token rows; empty: every CLIP encoder of the model. The others read
    the tokens' names as plain text."""
    vectors: Annotated[int, AtLeast(0)] = 2
    """Learned vectors for each word; 0: as many as its initializer has tokens."""
    names: tuple[str, ...] = ()
    """Names of the learned tokens in files and prompts, one for each vector of all words, such as
    "<s1>" "<s2>"; empty: <s0> <s1> ..."""
    per_layer: bool = False
    """Learn the vectors once for each cross-attention layer of the denoiser, which then reads its
    own text (P+, arXiv 2303.09522; with a LoRA it is Mix-of-Show's ED-LoRA)."""
    init: tuple[str, ...] = ("random",)
    """For each word: random (the table's std), random:SIGMA, zero, or ordinary words, whose tokens
    the vectors start from in order; parts joined by + for vectors of one word, such as
    "<rand-0.013>+woman"."""
    norm: Literal["none", "pull", "rescale", "stop"] = "pull"
    """After each step: pull every row's norm to the target (cloneofsimo), rescale all rows to the
    table's std (diffusers), stop training the rows for good once their mean norm reaches the target
    (Mix-of-Show), or leave them alone."""
    norm_target: Annotated[float, AtLeast(0)] = 0.0
    """Norm that pull aims at and stop waits for; 0: for pull the norm that each row started with,
    for stop 0.55."""


@dataclass(frozen=True)
class NoiseConfig(NoiseSettings):
    """Timesteps and noise that training images get, and the parameterization of the loss."""

    low: float = 0.0
    """Lowest timestep trained on, as a fraction of the schedule. 0: from the clean image on."""
    high: float = 1.0
    """Highest timestep trained on, as a fraction of the schedule. 1: to pure noise."""
    density: Annotated[DensityName, _DENSITY] = DensityName("uniform")
    """Distribution of timesteps: uniform, logit_normal, mode, cosmap (arXiv 2403.03206), or
    my_density.py:fn, with fn(u) the quantile function; towards 1 is towards noise, also for
    logit_normal's mean."""
    density_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the density, e.g. mean=0.5 std=1. Empty: the density's own defaults."""
    shift: Annotated[float, Above(0)] = 1.0
    """Flow models: sigma -> shift sigma / (1 + (shift - 1) sigma); above 1 is more noise."""
    dynamic_shift: bool = False
    """Flow models: the shift that the model's scheduler takes for this resolution, instead of
    --noise.shift."""
    space: Literal["model", "edm"] = "model"
    """Where the loss is taken: on the network's own output, or as in EDM on the x0 that follows
    from it (weighted by 1 / sigma^2 if --weighting is none)."""
    guidance: float = 3.5
    """Guidance scale that a guidance-distilled model gets as an input in training."""
    prediction: Literal["model", "epsilon", "v_prediction", "sample"] = "model"
    """The quantity that the network predicts; model: as in its scheduler_config.json."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last step is pure noise (arXiv 2305.08891)."""

    def __post_init__(self) -> None:
        """Nothing here: config_checks looks at all sections once the flags have been read."""


NEW_PROMPTS = ("{} in the snow", "{} on a beach", "{} in a city at night", "{} in a meadow")


@dataclass(frozen=True)
class SamplesConfig(SamplingMethod):
    """Images that are drawn during training and at its end."""

    prompts: tuple[str, ...] = ()
    """Prompts with the placeholder word; empty: the training captions."""
    every: Annotated[int, AtLeast(0)] = 0
    """Steps between sample grids; 0: only before and after training."""
    strengths: tuple[float, ...] = (1.0,)
    """Strengths of the adapters, a row of each sample grid for each; 0: the learned tokens
    alone."""
    base_word: str = ""
    """Takes the place of the placeholder when the base model draws the "before" images; empty: the
    words of the initializer, or nothing."""
    seeds: Annotated[int, AtLeast(0)] = 0
    """Images of each prompt, of different seeds; 0: 4 of a single prompt, 2 of two prompts, else
    1."""
    new_prompts: tuple[str, ...] = NEW_PROMPTS
    """Prompts in new places, the last row of before_after.png. {} is the only prompt, else "a photo
    of" the first placeholder word; without either those with {} are left out. For a style, things
    instead of places: "a house, {}"."""
    show_data: bool = False
    """Show training images in before_after.png, and their captions there, in samples/ and in
    README.md. People publish these files, which otherwise hold neither."""


@dataclass(frozen=True)
class ValidationConfig:
    """Loss at fixed timesteps and fixed noise."""

    images: str = ""
    """Folder with held-out images; empty: the training images, center-cropped."""
    count: Annotated[int, AtLeast(0)] = 16
    """Images that are scored, evenly chosen over the folder; 0: all."""
    every: Annotated[int, AtLeast(-1)] = 0
    """Steps between validations; 0: only before the first and after the last step; -1: none at
    all."""
    bins: Annotated[int, AtLeast(1)] = 8
    """Timesteps, the midpoints of as many equal bins."""
    draws: Annotated[int, AtLeast(1)] = 1
    """Noise draws for each image and timestep."""
    seed: int = 0
    """Seed of the validation noise; separate, so that runs with different seeds can be compared."""


@dataclass(frozen=True)
class Config(ModelConfig):
    """Fine-tune a text-to-image model with LoRA, DoRA, learned tokens, or all of them in stages."""

    vae_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the VAE; in fp16 SDXL's own overflows."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Precision of the frozen base; adapters and tokens always train in fp32 or better."""
    out: str = "runs/out"
    """Folder for everything the run writes; its last part names the files."""
    seed: int = 0
    """Seed of everything random: adapters, tokens, noise, order, augmentation."""
    batch_size: Annotated[int, AtLeast(1)] = 1
    """Images in one forward pass; with --data.pairs, pairs."""
    accumulation: Annotated[int, AtLeast(1)] = 1
    """Forward passes for one step; batch 2 x 2 gives the numbers of batch 4."""
    processes: Annotated[int, AtLeast(0)] = 0
    """Processes that a step has images for, batch_size x accumulation each, however many compute
    them; 0: as many as torchrun started, or as the resumed run began with."""
    shard: bool = False
    """Divide the frozen denoiser among the processes (FSDP2), for a base too large for one GPU:
    slower."""
    autocast: bool = False
    """Matrix products in bf16 while the weights keep their precision (torch.autocast)."""
    compile: bool = False
    """torch.compile the blocks that the denoiser repeats: faster steps, after a first one in which
    each kind of block is compiled."""
    cuda_graph: bool = False
    """On an NVIDIA GPU replay forward, backward, clipping and optimizer as one CUDA graph, captured
    once for each stage and image size: no launch costs. With adamw or prodigy, and losses that do
    the same in each step."""
    gradient_checkpointing: Checkpointing = "none"
    """Recompute activations in the backward pass, for about a third more time: those of the
    denoiser's blocks, or all, where a text encoder or tokens train."""
    from_lora: str = ""
    """LoRA file or run folder that training starts from, in any format that is read here: its
    update, its ranks and alphas, and the learned tokens of words that both have. Empty: none."""
    from_lora_rank: Literal["file", "adapter"] = "file"
    """Ranks of the layers that --from-lora has: those in the file, or --adapter.rank and alpha, for
    which they are cut by SVD or padded."""
    loss: str = "mse"
    """mse, l1, huber, smooth_l1, attention (mse, and learned tokens are to act inside the mask),
    edlora (Mix-of-Show's form of that), or my_loss.py:my_loss."""
    loss_arg: dict[str, Any] = field(default_factory=dict)
    """Arguments of the loss, e.g. delta=0.1, or attention_weight=0.01 full_identity=true. Empty:
    the loss's own defaults."""
    mask_scale: Literal["mean", "mixofshow", "cloneofsimo", "unnormalized"] = "mean"
    """How a mask m weights the loss e of a latent with c channels. mean: sum(m e) / (c sum(m));
    mixofshow: sum(m e) / sum(m), c times as much; unnormalized: the mean of m e (kohya);
    cloneofsimo: the mean of w e, w = ((m + 0.01) / max)^2 with the maximum of the batch."""
    step: str = ""
    """my_step.py:my_step, a training step in place of train.training_step; empty: that one."""
    weighting: Annotated[WeightingName, _WEIGHTING] = WeightingName("none")
    """Weight over noise levels: none, min_snr, soft_min_snr, debiased, p2, snr, sigma_sqrt, cosmap,
    or my_weighting.py:fn, with fn(snr) the weight of the squared error of x0."""
    weighting_arg: dict[str, Any] = field(default_factory=dict)
    """Arguments of the weighting, e.g. gamma=5. Empty: the weighting's own defaults."""
    ema: Annotated[float, Share()] = 0.0
    """Decay of a moving average of the trained parameters, [0, 1); samples, validation and files
    then have the average. 0: none."""
    save_every: Annotated[int, AtLeast(0)] = 0
    """Steps between checkpoints; 0: none until the end."""
    keep: Annotated[int, AtLeast(1)] = 2
    """Checkpoints that are kept."""
    log_every: Annotated[int, AtLeast(1)] = 10
    """Steps between writes to metrics.jsonl and updates of the progress bar."""
    list_targets: bool = False
    """Print the paths of the layers that get adapters, not only how many there are of a kind."""
    report: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log there (install the extra of that name): metrics, sample images, and the config as
    text and hyper-parameters. W&B is a server; images of an inpainting model need
    --samples.show-data."""
    push_to_hub: str = ""
    """Hub repository USER/NAME that the finished run is uploaded to; a private one, without
    --files.public. Empty: none."""
    resume: bool = False
    """Go on from the newest checkpoint in OUT."""
    resume_anyway: bool = False
    """With --resume: go on although the data, the model or options are others than those of the
    checkpoint; README.md and summary.json list the changes."""
    overwrite: bool = False
    """Move a run that is already in OUT to OUT.bak."""
    data: DataConfig = DataConfig()
    prior: PriorConfig = PriorConfig()
    adapter: AdapterConfig = AdapterConfig()
    tokens: TokensConfig = TokensConfig()
    noise: NoiseConfig = NoiseConfig()
    optimizer: OptimizerConfig = OptimizerConfig()  # noqa: RUF009 - frozen
    stages: tuple[Stage, ...] = (Stage(),)
    samples: SamplesConfig = SamplesConfig()
    validation: ValidationConfig = ValidationConfig()
    files: FileSettings = FileSettings()  # noqa: RUF009 - frozen, like the sections above

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def passes_per_step(self) -> int:
        """Forward passes of a step, those of all processes together."""
        return self.accumulation * max(1, self.processes)

    @property
    def images_per_step(self) -> int:
        """Images (with --data.pairs, pairs) of a step, class images not counted."""
        return self.batch_size * self.passes_per_step

    @property
    def recorded(self) -> Config:
        """The config as files and headers store it, without the options that start a process.

        So a resumed run writes the same as one that was never interrupted.
        """
        return replace(self, resume=False, resume_anyway=False, overwrite=False)

    @property
    def masks_loss(self) -> bool:
        """Whether masks weight the loss."""
        return self.data.masks != "none" and self.data.mask_use != "hole"

    def trains(self, *groups: str) -> bool:
        """Whether some stage trains one of these groups."""
        return any(not set(groups).isdisjoint(stage.groups) for stage in self.stages)
