"""Settings of adapters, images, noise and sampling: frozen dataclasses that need no torch.

The sections of a config inherit from these classes, so an option's name, default, help text and
range are written once. A range is part of the annotation, `Annotated[int, AtLeast(1)]`, which
`check_options` enforces: immediately when Python code makes one of the core's classes, and for all
sections of a config together once its flags have been read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from lora_core.errors import UserError

# ---------------------------------------------------------------- ranges of numbers


class AtLeast(NamedTuple):
    """The numbers from `low` on; infinity only with `infinite`."""

    low: float
    infinite: bool = False

    def accepts(self, number: float) -> bool:
        return number >= self.low

    def __str__(self) -> str:
        return f"at least {self.low:g}"


class WholeAtLeast(NamedTuple):
    """The whole numbers from `low` on, in tables whose values are read as floats."""

    low: int
    infinite: bool = False

    def accepts(self, number: float) -> bool:
        return number >= self.low and number % 1 == 0

    def __str__(self) -> str:
        return f"a whole number of at least {self.low}"


class Above(NamedTuple):
    """The numbers above `low`."""

    low: float
    infinite: bool = False

    def accepts(self, number: float) -> bool:
        return number > self.low

    def __str__(self) -> str:
        return f"a number above {self.low:g}"


class Share(NamedTuple):
    """The numbers between 0 and 1, with or without each of the two ends."""

    zero: bool = True
    one: bool = False
    infinite: bool = False

    def accepts(self, number: float) -> bool:
        return (0 < number < 1) or (number == 0 and self.zero) or (number == 1 and self.one)

    def __str__(self) -> str:
        return f"a number in {'[' if self.zero else '('}0, 1{']' if self.one else ')'}"


Range = AtLeast | WholeAtLeast | Above | Share


class _Option(NamedTuple):
    """The parts of an option's annotation."""

    choices: tuple[Any, ...]  # of a Literal; () for other types
    range: Range | None  # None: any finite number
    whole: bool  # an int, which Python code may nevertheless give as a float
    checked: bool  # False: arguments of a function, which may be anything


def check_options(settings: Any, flags: str) -> None:
    """Raises UserError for the first option that is not finite, out of range, or not a choice.

    `flags` is the prefix of these options on the command line, e.g. "--adapter.".
    """
    for name, option in _options(settings.__class__).items():
        value = getattr(settings, name)
        flag = flags + name.replace("_", "-")
        if option.choices and value is not None and value not in option.choices:
            choices = ", ".join(map(str, option.choices))
            raise UserError(f"{flag} is {value!r}; expected one of {choices}")
        if option.checked:
            for label, number in _numbers(value, flag):
                _check_number(number, label, option)


def _check_number(number: float, label: str, option: _Option) -> None:
    allowed = option.range
    infinite = allowed is not None and allowed.infinite
    if math.isnan(number) or (math.isinf(number) and not infinite):
        raise UserError(f"{label}{number}; expected a finite number")
    if option.whole and number % 1:
        raise UserError(f"{label}{number:g}; expected a whole number")
    if allowed is not None and not allowed.accepts(number):
        raise UserError(f"{label}{number:g}; expected {allowed}")


def _numbers(value: Any, flag: str) -> Iterator[tuple[str, float]]:
    """(how an error begins, number) of an option that is a number, or a table or list of them."""
    if isinstance(value, tuple):
        for number in value:
            if isinstance(number, int | float):
                yield f"{flag} has ", number
    elif isinstance(value, dict):
        for key, number in value.items():
            if isinstance(number, int | float):
                yield f"{flag} {key}=", number
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield f"{flag} is ", value


@lru_cache(maxsize=32)
def _options(cls: type) -> dict[str, _Option]:
    """Name -> annotation, of every option of a settings class."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: _take_apart(hints[f.name]) for f in fields(cls)}


def _take_apart(hint: Any) -> _Option:
    allowed = None
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        allowed = next((extra for extra in extras if isinstance(extra, Range)), None)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return _Option(choices, allowed, whole=hint is int, checked=hint != dict[str, Any])


# ---------------------------------------------------------------- settings

SCALED = ("rank", "alpha", "rank_pattern", "alpha_pattern", "rslora", "dropout", "module_dropout")
KIND_OPTIONS: dict[str, tuple[str, ...]] = {  # kind of adapter -> the options that it reads
    "lora": (*SCALED, "rank_dropout", "init"),
    "dora": (*SCALED, "rank_dropout", "init", "norm_grad"),
    "full": (),
    "lokr": (*SCALED, "factor"),
    "loha": SCALED,
}


@dataclass(frozen=True)
class AdapterSpec:
    """Adapters of one network: their kind, rank, scale and target layers.

    Patterns are globs as in targets.matches_pattern; in the two tables a later match overrides an
    earlier one.
    """

    targets: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    """Globs of layers that get no adapter although --adapter.targets matches them. Empty: none."""
    kind: str = "lora"
    """lora, dora, lokr, loha, full (trains the weights themselves, without rank and alpha), or
    my_adapter.py:Class."""
    rank: Annotated[int, AtLeast(1)] = 16
    """Rank of every adapter that --adapter.rank-pattern does not name."""
    alpha: Annotated[float, AtLeast(0)] = 0.0
    """Update is alpha / rank * up @ down; 0: alpha = rank."""
    rank_pattern: Annotated[dict[str, float], WholeAtLeast(1)] = field(default_factory=dict)
    """Rank per glob, e.g. "*.attn2.*=4"; others: --adapter.rank."""
    alpha_pattern: Annotated[dict[str, float], Above(0)] = field(default_factory=dict)
    """Alpha per glob; others: --adapter.alpha."""
    dropout: Annotated[float, Share()] = 0.0
    """Probability that an input element of an adapter is dropped, [0, 1); the frozen layer sees all
    of them. 0: none."""
    rank_dropout: Annotated[float, Share()] = 0.0
    """Probability that a rank of an adapter is dropped for an image, [0, 1). 0: none."""
    module_dropout: Annotated[float, Share()] = 0.0
    """Probability that a whole adapter is dropped for an image, [0, 1). 0: none."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732)."""
    norm_grad: Literal["detach", "full"] = "detach"
    """Gradient of a DoRA's row norms: detach treats them as constants (the paper's section 4.3,
    and peft), full differentiates them (LyCORIS)."""
    factor: Annotated[int, AtLeast(-1)] = -1
    """Most rows and columns of the smaller matrix of a LoKr (LyCORIS' factor); -1: as many as make
    both matrices as square as possible."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """down ~ N(0, 1 / rank^2) as cloneofsimo and diffusers, or U(+-1 / sqrt(fan_in)) as kohya and
    peft."""

    def __post_init__(self) -> None:
        for name in ("targets", "exclude"):
            if isinstance(getattr(self, name), str):  # would be read letter by letter
                raise UserError(
                    f"{name} is the text {getattr(self, name)!r}; expected a tuple of patterns, "
                    f"({getattr(self, name)!r},)"
                )
        check_options(self, "--adapter.")
        self.check_combination()

    def check_combination(self) -> None:
        """Raises UserError for options that have no effect on this kind of adapter."""
        if self.kind in KIND_OPTIONS:
            self.refuse_unread(KIND_OPTIONS[self.kind])
        if self.factor == 0:
            raise UserError(
                "--adapter.factor is 0; expected the size of a LoKr's smaller matrix, or -1 for as "
                "square as possible"
            )

    def refuse_unread(self, read: tuple[str, ...]) -> None:
        """Raises UserError for a changed option that the kind does not read.

        `read` are the options that it reads besides targets, exclude and kind.
        """
        for option in fields(AdapterSpec):
            default = {} if option.default is MISSING else option.default
            value = getattr(self, option.name)
            is_read = option.name in ("targets", "exclude", "kind", *read)
            if is_read or value == default:
                continue
            readers = [kind for kind, names in KIND_OPTIONS.items() if option.name in names]
            other = f", or use --adapter.kind {readers[0]}" if len(readers) == 1 else ""
            raise UserError(
                f"--adapter.{option.name.replace('_', '-')} is {value}, which has no effect on "
                f"--adapter.kind {self.kind}; leave it out{other}"
            )


@dataclass(frozen=True)
class ImageSettings:
    """Resizing, cropping and augmentation of training images.

    Images become squares of `resolution` pixels, or with `buckets` rectangles of about that area.
    """

    resolution: Annotated[int, AtLeast(1)] = 512
    """Side of the training square, pixels; with buckets the side of a square of the same area."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut out of the image."""
    zoom: Annotated[float, AtLeast(1)] = 1.0
    """A random crop is taken after the image is scaled to cover resolution x u, with u uniform in
    [1, zoom]."""
    flip: bool = False
    """Mirror half of the visits. Leave off for anything with a left and a right: faces, letters,
    logos."""
    jitter: bool = False
    """Change brightness and contrast by up to 10 %."""
    variants: Annotated[int, AtLeast(0)] = 0
    """Augmentation repeats after this many visits, so that latents can be cached; 0: always fresh
    (cached anyway when nothing is random)."""
    buckets: bool = False
    """Keep aspect ratios: each image is cut to the nearest of many sizes of about resolution^2
    pixels, and a batch has one size."""
    bucket_step: Annotated[int, AtLeast(1)] = 64
    """Sides of buckets are multiples of this, pixels."""
    bucket_min: Annotated[int, AtLeast(0)] = 0
    """Shortest side of a bucket, pixels, rounded down to a multiple of the step; 0: half of
    --data.resolution."""
    bucket_max: Annotated[int, AtLeast(0)] = 0
    """Longest side of a bucket, pixels, rounded up to a multiple of the step; 0: twice
    --data.resolution."""
    bucket_upscale: bool = True
    """Scale small images up to a bucket. Off: each image keeps its size, or is scaled down to
    resolution^2 pixels, and is cut to multiples of the step, which are its bucket (kohya's
    bucket_no_upscale)."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    """How images are resized."""

    def __post_init__(self) -> None:
        check_options(self, "--data.")
        self.check_combination()

    def check_combination(self) -> None:
        """Raises UserError for buckets that no size fits."""
        if self.buckets and self.bucket_step > self.resolution:
            raise UserError(
                f"--data.bucket-step is {self.bucket_step}; "
                f"expected at most --data.resolution, {self.resolution}"
            )
        if self.bucket_min > self.resolution or 0 < self.bucket_max < self.resolution:
            raise UserError(
                f"the sides of buckets are {self.bucket_min or 'half of the resolution'} to "
                f"{self.bucket_max or 'twice the resolution'}, without --data.resolution "
                f"{self.resolution}; lower --data.bucket-min or raise --data.bucket-max"
            )
        if not self.bucket_upscale and self.zoom > 1:
            raise UserError(
                f"--data.zoom {self.zoom:g} enlarges images, and --data.no-bucket-upscale keeps "
                "them as they are; leave out one of the two"
            )

    @property
    def is_random(self) -> bool:
        """Whether two visits to one image can have different pixels."""
        return self.crop == "random" or self.zoom > 1 or self.flip or self.jitter


@dataclass(frozen=True)
class CaptionSettings:
    """Where captions are, and what a visit to an image makes of its caption: a list of tags that
    are shuffled or dropped, wildcards. The laws are those of kohya's sd-scripts.
    """

    caption_extension: str = ""
    """Ending of caption files, such as .caption or .tags; empty: .txt, and with --data.captions
    auto also .caption and .json."""
    caption_lines: Literal["any", "first"] = "any"
    """Which line of a caption file with several is the caption: any, drawn at each visit, or the
    first."""
    caption_prefix: str = ""
    """Text before every caption, with a space between them. Empty: none."""
    caption_suffix: str = ""
    """Text after every caption, with a space between them. Empty: none."""
    wildcards: bool = False
    """Replace {red|blue} in a caption by one of its words, drawn at each visit; {{ and }} are
    braces."""
    shuffle_caption: bool = False
    """Put the tags of a caption in another order at each visit."""
    keep_tokens: Annotated[int, AtLeast(0)] = 0
    """Tags at the beginning of a caption that are neither shuffled nor dropped. 0: none."""
    keep_tokens_separator: str = ""
    """Text such as ||| in a caption: the tags before the first one, and those after a second one,
    are neither shuffled nor dropped. In captions without it --data.keep-tokens counts. Empty:
    none."""
    tag_dropout: Annotated[float, Share()] = 0.0
    """Probability that a tag is left out of a visit's caption, [0, 1). 0: never."""
    tag_separator: str = ","
    """Text between the tags of a caption."""
    secondary_separator: str = ""
    """Text between tags that stay together when tags are shuffled or dropped; it becomes
    --data.tag-separator. Empty: none."""

    @property
    def varies(self) -> bool:
        """Whether two visits to an image can have different tags of one caption."""
        return self.wildcards or self.orders_tags

    @property
    def orders_tags(self) -> bool:
        """Whether captions are taken apart into tags."""
        return self.shuffle_caption or self.tag_dropout > 0


@dataclass(frozen=True)
class NoiseSettings:
    """Departures from white noise; zero is off."""

    offset: Annotated[float, AtLeast(0)] = 0.0
    """Noise offset: strength of one extra random constant per image and channel, in the target too
    (crosslabs.org, "Diffusion with offset noise"). 0: none."""
    adaptive_offset: float = 0.0
    """Added to the strength of the noise offset for each |mean| of 1 of a latent channel of the
    image, where the sum is not negative (kohya; images much brighter or darker than usual); 0:
    nothing."""
    multires_levels: Annotated[int, AtLeast(0)] = 0
    """Coarser octaves of noise that are added ("multi-resolution noise", wandb, and kohya); 0:
    off."""
    multires_discount: Annotated[float, Share(zero=False, one=True)] = 0.3
    """Strength of an octave relative to the next finer one, (0, 1]."""
    perturbation: Annotated[float, AtLeast(0)] = 0.0
    """Extra noise on the network's input that the target does not include (gamma of arXiv
    2301.11706, algorithm 1). 0: none. 1 is the scale of the noise itself."""

    def __post_init__(self) -> None:
        check_options(self, "--noise.")


@dataclass(frozen=True)
class SamplingMethod:
    """Sampler, number of steps and guidance."""

    sampler: str = "ddim"
    """ddim, euler, euler_ancestral, dpmpp_2m, flow_euler (for flow models the same as ddim), or
    my_sampler.py:fn, with fn(denoise, x, levels)."""
    steps: Annotated[int, AtLeast(1)] = 25
    """Sampling steps."""
    guidance: float = 5.0
    """Classifier-free guidance scale, 1 turns it off; for a guidance-distilled model the scale that
    it takes as an input, usually 3.5."""
    negative: str = ""
    """Negative prompt, from which guidance steers away. Empty: the empty prompt."""
    sampler_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the sampler, e.g. eta=1 of ddim. Empty: its own defaults."""


@dataclass(frozen=True)
class SamplerSettings(SamplingMethod):
    """Sampling of images: method, size, strength of image to image, start of the refiner."""

    width: Annotated[int, AtLeast(0)] = 0
    """Pixels; 0: the model's own resolution."""
    height: Annotated[int, AtLeast(0)] = 0
    """Pixels; 0: the model's own resolution."""
    strength: float = 1.0
    """Image to image: the share of the sampling steps that is run, (0, 1]; 1 keeps nothing of the
    first image."""
    refiner_start: Annotated[float, Share(zero=False)] = 0.8
    """Share of the steps after which the refiner takes over, (0, 1)."""
    adapter_guidance: float = 1.0
    """Guidance away from the base model: base + W (adapted - base), each with its own
    classifier-free guidance. 1: the LoRAs as they are; 0: the base model; above 1: further from
    it. Other values than 0 and 1 double the time of a step."""
    emphasis: Literal["none", "a1111"] = "none"
    """Weights in prompts, for CLIP. a1111: (word) has 1.1, [word] 1 / 1.1, (word:1.2) its own, and
    a backslash makes a bracket text; none: brackets are text."""


def scheduler_changes(prediction: str, *, zero_terminal_snr: bool) -> dict[str, Any]:
    """Keys of a model's scheduler_config.json that the noise options of a run replace.

    `prediction` "model" keeps the model's own.
    """
    changes: dict[str, Any] = {}
    if prediction != "model":
        changes["prediction_type"] = prediction
    if zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes
