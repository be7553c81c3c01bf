"""The commands of merge.py: a dataclass of flags for each, and the table of them all.

A field is a flag, its docstring the help text. Nothing here imports torch, so that
`merge.py COMMAND --help` answers at once; the file of a command is imported when it runs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, NamedTuple

from tyro.conf import FlagConversionOff, Positional, arg

from lora_core.errors import UserError
from lora_core.formats.known_formats import WRITABLE
from lora_core.option_types import COUNT, TRUTH, choice, number
from merging.truncation import Keep

MERGE_METHODS = ("sum", "slerp", "ties", "dare", "dare_ties", "magnitude")
DENSITY_METHODS = MERGE_METHODS[2:]  # those that --density has an effect on
FUSION_METHODS = ("gradient", "corrected", "sum")
ADD_MODES = ("lpl", "ljl", "upl", "upl-ckpt-v2")
DTYPE_NAMES = ("fp32", "fp16", "bf16", "fp64")
SVD_METHODS = ("randomized", "exact")
ADD_USAGE = "PATH_1 PATH_2 OUTPUT [ALPHA_1 [ALPHA_2]]"
DEFAULT_ALPHA = 0.5  # both weights of lora_add, as in cloneofsimo's tool
LISTED_LAYERS = 10
BUDGET = re.compile(r"(\d+(?:\.\d+)?)(|kb|mb|gb)", re.IGNORECASE)
UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9}

# ---------------------------------------------------------------- types of flags

PLAIN = arg(help_behavior_hint="")  # the help text itself names the default


def group(title: str) -> Any:
    """A group of flags under a title in the help, which adds the word "options" to it.

    The docstring of the group's class is for readers of the code.
    """
    return arg(name=title, help="")


KEEP = group("how much to keep: at most one of these")
SVD = group("SVD")
FILES = group("file")


def text(metavar: str, **more: Any) -> Any:
    """A flag with any text as its value."""
    return arg(metavar=metavar, help_behavior_hint="", **more)


# ---------------------------------------------------------------- groups of flags


@dataclass(frozen=True)
class KeepShare:
    """How much of each layer's update is kept: one of these, or all of it."""

    rank: Annotated[int | None, number("R", int), PLAIN] = None
    """the same rank in every layer"""
    max_error: Annotated[float | None, number("E", float), PLAIN] = None
    """the smallest rank of each layer with at most this relative error, such as 0.1"""
    energy: Annotated[float | None, number("E", float), PLAIN] = None
    """the smallest rank of each layer with this share of its squared norm, such as 0.95"""

    def __post_init__(self) -> None:
        given = self.given_flags()
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other; choose one")
        try:
            self.per_layer()
        except ValueError as error:
            raise UserError(f"{given[0]}: {error}") from None

    def __bool__(self) -> bool:
        return bool(self.given_flags())

    def given_flags(self) -> list[str]:
        """The given flags among those that set how much to keep."""
        values = {"--rank": self.rank, "--max-error": self.max_error, "--energy": self.energy}
        return [flag for flag, value in values.items() if value is not None]

    def per_layer(self) -> Keep | None:
        """The criterion for every layer; None for all of the update, and for a budget."""
        if self.rank is None and self.max_error is None and self.energy is None:
            return None
        return Keep(self.rank, self.max_error, self.energy)


@dataclass(frozen=True)
class KeepOptions(KeepShare):
    """How much of an update is kept: one of these, or all of it."""

    budget: Annotated[str, text("N")] = ""
    """a total rank, such as 1024, or a size, such as 20MB, spent on the largest singular values"""

    def __post_init__(self) -> None:
        super().__post_init__()
        found = BUDGET.fullmatch(self.budget)
        if self.budget and not (found and float(found[1])):
            raise UserError(
                f"--budget {self.budget} is not a number of ranks or a size above 0; "
                "write 1024, or 20MB"
            )

    def given_flags(self) -> list[str]:
        return super().given_flags() + (["--budget"] if self.budget else [])


@dataclass(frozen=True)
class SvdOptions:
    """How dense updates are decomposed."""

    svd: Annotated[str, choice("S", SVD_METHODS), PLAIN] = "randomized"
    """SVD of dense updates: randomized, or exact, a second for 1280 x 1280 (randomized)"""
    seed: Annotated[int, number("N", int), PLAIN] = 0
    """seed of all random numbers (0)"""


@dataclass(frozen=True)
class MergeMethod(SvdOptions):
    """How the updates of several files are merged."""

    method: Annotated[str, choice("M", MERGE_METHODS), PLAIN] = "sum"
    """how files are merged: sum, slerp, ties, dare, dare_ties or magnitude (sum)"""
    density: Annotated[float, number("D", float), PLAIN] = 0.5
    """share of each update that ties, dare, dare_ties and magnitude keep (0.5)"""


@dataclass(frozen=True)
class AdapterModel:
    """The model that adapters were made for."""

    model: Annotated[str, text("M")] = ""
    """base model of the LoRA files: path, hub id, sd1, sd2, sdxl, flux-dev (found by their keys)"""


@dataclass(frozen=True)
class FileReadOptions:
    """How files are read."""

    model_config: Annotated[str, text("DIR")] = ""
    """folder or hub id with the configs of a single-file model"""
    dora_axis: Annotated[str, choice("A", ("rows", "columns")), PLAIN] = ""
    """rows or columns: axis of a kohya file's DoRA magnitudes where it does not tell"""
    allow_extra: Annotated[bool, PLAIN] = False
    """ignore unknown keys; one line names them"""


@dataclass(frozen=True)
class OpenOptions(FileReadOptions, AdapterModel):
    """How adapter files are read, and the model that they belong to."""


@dataclass(frozen=True)
class WriteOptions:
    """How a result is written."""

    dtype: Annotated[str, choice("D", DTYPE_NAMES), PLAIN] = ""
    """fp32, fp16, bf16, fp64 (sums of LoRA files: fp32; models and cut ranks: the input's)"""
    overwrite: Annotated[bool, PLAIN] = False
    """replace an output that exists"""
    dry_run: Annotated[bool, PLAIN] = False
    """compute and report, write nothing"""


@dataclass(frozen=True)
class AdapterFormat:
    """The format of an adapter file."""

    format: Annotated[str, choice("F", WRITABLE), PLAIN] = ""
    """diffusers, kohya, cloneofsimo, mixofshow, embeddings, a1111, textual_inversion (as the
    input)"""


@dataclass(frozen=True)
class FileOptions(WriteOptions, OpenOptions):
    """How files are read and written."""


@dataclass(frozen=True)
class AdapterFileOptions(WriteOptions, AdapterFormat, OpenOptions):
    """How adapter files are read and written."""


@dataclass(frozen=True)
class DistillFileOptions(WriteOptions, AdapterFormat, FileReadOptions):
    """How models are read and an adapter is written."""


@dataclass(frozen=True)
class ModelFileOptions(WriteOptions, FileReadOptions):
    """How adapter files of a given model are read, and a model is written."""


# ---------------------------------------------------------------- the commands


@dataclass(frozen=True)
class Mix:
    """Add up LoRA files, or whole models, with weights."""

    sum: Positional[Annotated[str, text("SUM")]] = ""
    """weighted files, layers after @: "0.7*a + 0.3*(b@attn - 'my c'@MID=0.5) <lora:d:1>\""""
    out: Annotated[str, text("OUT")] = ""
    """the result, of whole models a folder or a single file; OUT may also be the last word"""
    residual: Annotated[str, text("FILE")] = ""
    """for whole models: also write the rounding loss, as a LoRA"""
    sidecar: Annotated[bool, PLAIN] = False
    """with kohya's names: also write NAME.json, the trigger words as A1111 reads them"""
    merge: Annotated[MergeMethod, arg(name="", help="")] = MergeMethod()  # among the others
    keep: Annotated[KeepOptions, KEEP] = KeepOptions()
    files: Annotated[AdapterFileOptions, FILES] = AdapterFileOptions()


@dataclass(frozen=True)
class Fold:
    """Add LoRA files to a model's weights, each weight rounded once."""

    base: Positional[Annotated[str, text("BASE")]] = ""
    """the model: folder in the diffusers layout, single file, or hub id"""
    sum: Positional[Annotated[str, text("SUM")]] = ""
    """LoRA files: "0.7*a.safetensors + 0.3*b.safetensors@attn\""""
    out: Annotated[str, text("OUT")] = ""
    """the result: a folder, or a file in .safetensors or .ckpt; OUT may also be the last word"""
    residual: Annotated[str, text("FILE")] = ""
    """also write the rounding loss, as a LoRA"""
    residual_rank: Annotated[int, number("N", int), PLAIN] = 0
    """rank of the --residual file (that of the folded updates)"""
    adapter_kind: Annotated[str, text("KIND")] = ""
    """FILE.py:CLASS of NAME_adapter.safetensors files, whose code is run"""
    files: Annotated[FileOptions, FILES] = FileOptions()


@dataclass(frozen=True)
class DrawingOptions:
    """The images of each concept at whose drawing its layers are recorded."""

    steps: Annotated[int, COUNT, PLAIN] = 20
    """sampling steps of an image (20)"""
    images: Annotated[int, COUNT, PLAIN] = 1
    """images of each prompt (1)"""
    seed: Annotated[int, number("N", int), PLAIN] = 0
    """seed of the first image; each further one adds 1 (0)"""
    resolution: Annotated[int, number("N", int), PLAIN] = 0
    """pixels of a side (the model's own)"""
    memory: Annotated[float, number("GB", float), PLAIN] = 8.0
    """gigabytes for sums over inputs; with less the images are drawn several times (8)"""
    device: Annotated[str, text("D")] = "auto"
    """auto, cpu, cuda, cuda:1 ... (auto)"""


@dataclass(frozen=True)
class Fuse:
    """Fuse LoRA files of several concepts into one model that draws each as its own file does."""

    concepts: Positional[Annotated[tuple[str, ...], text("CONCEPTS")]] = ()
    """two or more LoRA files or run folders with their strengths: A B:0.8 C:unet=0.6,text=0.9"""
    base: Annotated[str, text("M")] = ""
    """the model that they are for: folder in the diffusers layout, single file, or hub id"""
    prompts: Annotated[tuple[str, ...], text("P")] = ()
    """a text or a file of prompts for each concept, or texts with {} for its words ("a {}" "{}")"""
    out: Annotated[str, text("OUT")] = ""
    """the result: a folder, or a file in .safetensors or .ckpt; OUT may also be the last word"""
    how: Annotated[str, choice("H", FUSION_METHODS), PLAIN] = "gradient"
    """gradient: least squares on each layer's inputs; corrected: so, but near the sum; sum
    (gradient)"""
    ridge: Annotated[float, number("R", float), PLAIN] = 0.001
    """how much the layers that draw are kept from fitting every detail of these inputs: a share of
    their mean square; 0 is the least error on them (0.001)"""
    pull: Annotated[float, number("R", float), PLAIN] = 0.3
    """how strongly corrected layers are pulled to the sum: a share of inputs' mean square (0.3)"""
    drawing: Annotated[DrawingOptions, group("drawing")] = DrawingOptions()
    files: Annotated[ModelFileOptions, FILES] = ModelFileOptions()


@dataclass(frozen=True)
class Add:
    """Merge as cloneofsimo's lora_add does: its modes, argument order and defaults."""

    words: Positional[Annotated[tuple[str, ...], text(ADD_USAGE)]] = ()
    """PATH_1 may be a model, as a folder or hub id"""
    mode: Annotated[str, choice("M", ADD_MODES), PLAIN] = "lpl"
    """LoRA + LoRA: lpl, ljl; model + LoRA: upl, upl-ckpt-v2 (lpl)"""
    alpha_1: Annotated[str, text("A", aliases=("--alpha",))] = ""
    """weight of the first LoRA, or of the only one (0.5)"""
    alpha_2: Annotated[str, text("A")] = ""
    """weight of the second (0.5)"""
    path_1: Annotated[str, text("PATH")] = ""
    """PATH_1 as a flag"""
    path_2: Annotated[str, text("PATH")] = ""
    """PATH_2 as a flag"""
    out: Annotated[str, text("PATH", aliases=("--output-path",))] = ""
    """OUTPUT as a flag; --output-path, as in cloneofsimo's tool, is the same"""
    with_text_lora: Annotated[FlagConversionOff[bool], TRUTH, PLAIN] = False
    """for .pt lists: also merge x.text_encoder.pt next to x.pt"""
    residual: Annotated[str, text("FILE")] = ""
    """for upl: also write the rounding loss, as a LoRA"""
    files: Annotated[AdapterFileOptions, FILES] = AdapterFileOptions()


@dataclass(frozen=True)
class Distill:
    """Make a LoRA of the difference of two models."""

    base: Positional[Annotated[str, text("BASE")]] = ""
    """model before training: folder, single file or hub id"""
    tuned: Positional[Annotated[str, text("TUNED")]] = ""
    """model after training"""
    out: Annotated[str, text("OUT")] = ""
    """the LoRA file to write; OUT may also be the last word"""
    layers: Annotated[str, text("CHOICE")] = ""
    """which layers, as after @ in mix: attn, unet, ~conv, a glob (all)"""
    svd: Annotated[SvdOptions, SVD] = SvdOptions()
    keep: Annotated[KeepShare, KEEP] = KeepShare()
    files: Annotated[DistillFileOptions, FILES] = DistillFileOptions()


@dataclass(frozen=True)
class Resize:
    """Write the nearest LoRA of smaller rank."""

    file: Positional[Annotated[str, text("FILE")]] = ""
    """a LoRA file or run folder"""
    out: Annotated[str, text("OUT")] = ""
    """the smaller file to write; OUT may also be the last word"""
    svd: Annotated[SvdOptions, SVD] = SvdOptions()
    keep: Annotated[KeepOptions, KEEP] = KeepOptions()
    files: Annotated[AdapterFileOptions, FILES] = AdapterFileOptions()


@dataclass(frozen=True)
class Convert:
    """Write a LoRA file, or a whole model, in another format."""

    file: Positional[Annotated[str, text("FILE")]] = ""
    """a LoRA file or run folder, or a whole model"""
    others: Positional[Annotated[tuple[str, ...], text("FILE")]] = ()
    """further ones, with --out FOLDER"""
    out: Annotated[str, text("OUT")] = ""
    """the result; of several files a folder, of a model one or a .ckpt; may be the last word"""
    to: Annotated[str, choice("FORMAT", WRITABLE), PLAIN] = ""
    """diffusers, kohya, cloneofsimo, mixofshow, embeddings, a1111, textual_inversion (diffusers)"""
    as_: Annotated[str, choice("KIND", ("lora",)), arg(name="as", help_behavior_hint="")] = ""
    """lora: the update of a DoRA as a plain LoRA, nearest to it at the DoRA's rank"""
    adapter_kind: Annotated[str, text("KIND")] = ""
    """FILE.py:CLASS of a NAME_adapter.safetensors; its code is run on the weights of --model"""
    sidecar: Annotated[bool, PLAIN] = False
    """with --to kohya: also write NAME.json, the trigger words as A1111 reads them"""
    svd: Annotated[SvdOptions, SVD] = SvdOptions()
    keep: Annotated[KeepShare, KEEP] = KeepShare()
    files: Annotated[FileOptions, FILES] = FileOptions()


@dataclass(frozen=True)
class Info:
    """Show a file's ranks, norms, spectra, tokens and header; of several how much they overlap."""

    file: Positional[Annotated[str, text("FILE")]] = ""
    """a LoRA file or run folder, or a whole model"""
    others: Positional[Annotated[tuple[str, ...], text("FILE")]] = ()
    """further ones: the norms of all, and how much of their spaces each pair of them shares"""
    top: Annotated[int, COUNT, PLAIN] = LISTED_LAYERS
    """layers to list (10)"""
    plot: Annotated[str, text("PNG")] = ""
    """draw the singular values into this file"""
    overwrite: Annotated[bool, PLAIN] = False
    """replace a plot that exists"""
    files: Annotated[OpenOptions, FILES] = OpenOptions()


@dataclass(frozen=True)
class Diff:
    """Compare two LoRA files, layer by layer."""

    first: Positional[Annotated[str, text("FIRST")]] = ""
    """a LoRA file or run folder"""
    second: Positional[Annotated[str, text("SECOND")]] = ""
    """another one for the same model"""
    top: Annotated[int, COUNT, PLAIN] = LISTED_LAYERS
    """layers to list (10)"""
    files: Annotated[OpenOptions, FILES] = OpenOptions()


@dataclass(frozen=True)
class Explain:
    """Find the mixture of LoRA files that a tuned model is nearest to."""

    checkpoint: Positional[Annotated[str, text("CHECKPOINT")]] = ""
    """the tuned model: folder in the diffusers layout, single file, or hub id"""
    base: Positional[Annotated[str, text("BASE")]] = ""
    """the model that it was made from"""
    loras: Positional[Annotated[tuple[str, ...], text("LORAS")]] = ()
    """one or more LoRA files that may be in it"""
    files: Annotated[FileReadOptions, FILES] = FileReadOptions()


@dataclass(frozen=True)
class Redo:
    """Repeat a merge from the recipe in its result."""

    file: Positional[Annotated[str, text("FILE")]] = ""
    """a file or model folder that merge.py made"""
    out: Annotated[str, text("OUT")] = ""
    """the output, or the last word (FILE, which is written only if it comes out differently)"""
    overwrite: Annotated[bool, PLAIN] = False
    """replace an output that differs"""
    dry_run: Annotated[bool, PLAIN] = False
    """only compare"""


# ---------------------------------------------------------------- the table of commands


class Command(NamedTuple):
    """A command of merge.py. The file merging/NAME.py carries it out, by its function run_NAME."""

    options: type  # the dataclass of its flags
    required: tuple[str, ...]  # fields that a command line has to give, in the order of its words
    example: str  # words after its name
    words: str = ""  # the field that takes any number of words
    takes_others: bool = False  # whether the field `others` takes further inputs


EXAMPLE_SUM = '"0.7*a.safetensors + 0.3*b.safetensors@attn"'
COMMANDS = {
    "mix": Command(Mix, ("sum", "out"), f"{EXAMPLE_SUM} --out c.safetensors --rank 16"),
    "fold": Command(
        Fold, ("base", "sum", "out"), 'toy/model "0.8*runs/demo" --out merged.safetensors'
    ),
    "fuse": Command(
        Fuse,
        ("concepts", "out"),
        "runs/zib runs/lum:0.8 --base toy/model --out fused",
        words="concepts",
    ),
    "add": Command(
        Add, (), "toy/model a.safetensors --out merged --alpha 0.8 --mode upl", words="words"
    ),
    "distill": Command(
        Distill, ("base", "tuned", "out"), "base tuned --out a.safetensors --rank 16"
    ),
    "resize": Command(
        Resize, ("file", "out"), "big.safetensors --out small.safetensors --energy 0.99"
    ),
    "convert": Command(
        Convert, ("file", "out"), "a.safetensors --out b.safetensors --to kohya", takes_others=True
    ),
    "info": Command(Info, ("file",), "a.safetensors --plot spectrum.png", takes_others=True),
    "diff": Command(Diff, ("first", "second"), "a.safetensors b.safetensors --top 20"),
    "explain": Command(
        Explain, ("checkpoint", "base", "loras"), "tuned base a.safetensors", words="loras"
    ),
    "redo": Command(Redo, ("file",), "c.safetensors --out again.safetensors"),
}


def run_merge_command(name: str, options: Any) -> None:
    """Carries out a command with its options. Raises UserError."""
    module = importlib.import_module(f"merging.{name}")
    getattr(module, f"run_{name}")(options)


# ---------------------------------------------------------------- as a flat table


def flatten(options: Any) -> dict[str, Any]:
    """Name of a flag -> its value, without the groups."""
    flat: dict[str, Any] = {}
    for name, value in vars(options).items():
        flat |= flatten(value) if is_dataclass(value) else {name: value}
    return flat


def unflatten(options: type, flat: Mapping[str, Any]) -> Any:
    """The options with the values of a flat table, and defaults for missing ones."""
    values: dict[str, Any] = {}
    for name, default in vars(options()).items():
        if is_dataclass(default):
            values[name] = unflatten(type(default), flat)
        elif name in flat:
            values[name] = flat[name]
    return options(**values)
