"""The flags of each command of merge.py. Every help text fits on a screen."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from lora_core.formats import FORMATS
from merging.add import ADD_MODES, DEFAULT_ALPHA
from merging.inspection import LISTED_LAYERS
from merging.mix import MERGE_METHODS

WRITTEN = [name for name, row in FORMATS.items() if row.write]
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}


def mix(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sum", help="weighted files, layers after @: \"0.7*a + 0.3*(b@attn - 'my c'@IN04,MID=0.5)\""
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="",
        help="the result; a folder or a single file for whole models",
    )
    _declare_amount(parser)
    parser.add_argument(
        "--method",
        metavar="M",
        choices=MERGE_METHODS,
        default="sum",
        help=f"{', '.join(MERGE_METHODS)} (%(default)s)",
    )
    parser.add_argument(
        "--density",
        metavar="D",
        type=float,
        default=0.5,
        help="share of entries that ties, dare, magnitude keep (%(default)s)",
    )
    _declare_svd(parser)
    parser.add_argument(
        "--residual",
        metavar="FILE",
        default="",
        help="for whole models: what rounding lost, as a LoRA",
    )
    _declare_files(parser, "fp32, the inputs' where ranks are cut", format=True)


def fold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base", help="model: folder in the diffusers layout, single file, or hub id"
    )
    parser.add_argument("sum", help='adapters: "0.7*a.safetensors + 0.3*b.safetensors@attn"')
    parser.add_argument(
        "out", help="a folder, or a single file by its ending .safetensors or .ckpt"
    )
    parser.add_argument(
        "--residual", metavar="FILE", default="", help="what rounding lost, as a LoRA"
    )
    parser.add_argument(
        "--residual-rank",
        metavar="N",
        type=int,
        default=0,
        help="its rank (that of the folded updates)",
    )
    _declare_files(parser, "the model's")


def distill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="model before training: folder, single file or hub id")
    parser.add_argument("tuned", help="model after training")
    parser.add_argument("out", help="the adapter")
    _declare_amount(parser, budget=False)
    parser.add_argument(
        "--layers",
        metavar="CHOICE",
        default="",
        help="which layers, as after @ in mix: attn, unet, ~conv, a glob (all)",
    )
    _declare_svd(parser)
    _declare_files(parser, "fp32", format=True, model=False)


def resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a LoRA file or run folder")
    parser.add_argument("out", help="the smaller one")
    _declare_amount(parser)
    _declare_svd(parser)
    _declare_files(parser, "the input's", format=True)


def convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="an adapter file or run folder, or a whole model")
    parser.add_argument(
        "out", help="for a whole model: a folder, or a file that ends in .safetensors or .ckpt"
    )
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        choices=WRITTEN,
        default="",
        help=f"of an adapter: {', '.join(WRITTEN)}",
    )
    _declare_files(parser, "the input's")


def info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="an adapter file or run folder, or a whole model")
    parser.add_argument(
        "--top", metavar="N", type=int, default=LISTED_LAYERS, help="layers to list (%(default)s)"
    )
    parser.add_argument(
        "--plot", metavar="PNG", default="", help="draw the spectra of singular values"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a plot that exists")
    _declare_reading(parser)


def diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help="a LoRA file or run folder")
    parser.add_argument("second", help="another one of the same model")
    parser.add_argument(
        "--top", metavar="N", type=int, default=LISTED_LAYERS, help="layers to list (%(default)s)"
    )
    _declare_reading(parser)


def explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="model: folder in the diffusers layout, single file, or hub id"
    )
    parser.add_argument("base", help="the model that it was made from")
    parser.add_argument("loras", nargs="+", help="LoRA files that may be in it")
    _declare_reading(parser, model=False)


def redo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a file or model folder that merge.py made")
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="",
        help="where to (FILE itself: left alone if it comes out the same)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that differs")
    parser.add_argument("--dry-run", action="store_true", help="only compare")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="PATH_1 PATH_2 OUTPUT [ALPHA_1 [ALPHA_2]]",
        help="PATH_1 may be a model, as a folder or hub id",
    )
    parser.add_argument(
        "--mode",
        metavar="M",
        choices=ADD_MODES,
        default="lpl",
        help="LoRA + LoRA: lpl, ljl; model + LoRA: upl, upl-ckpt-v2",
    )
    parser.add_argument(
        "--alpha-1",
        "--alpha",
        metavar="A",
        help=f"weight of the first LoRA, or of the only one ({DEFAULT_ALPHA})",
    )
    parser.add_argument("--alpha-2", metavar="A", help=f"weight of the second ({DEFAULT_ALPHA})")
    for name, dest in (("--path-1", "path_1"), ("--path-2", "path_2"), ("--output-path", "out")):
        parser.add_argument(name, dest=dest, help=argparse.SUPPRESS)
    truth: dict[str, Any] = {
        "type": _truth,
        "nargs": "?",
        "const": True,
        "default": False,
        "metavar": "BOOL",
    }
    parser.add_argument(
        "--with-text-lora", help="merge x.text_encoder.pt too (.pt lists only)", **truth
    )
    parser.add_argument(
        "--residual", metavar="FILE", default="", help="of upl: what rounding lost, as a LoRA"
    )
    _declare_files(parser, "fp32, or the model's", format=True)


def _declare_amount(parser: argparse.ArgumentParser, *, budget: bool = True) -> None:
    group = parser.add_argument_group("how much to keep")
    group.add_argument("--rank", metavar="R", type=int, help="rank of every layer")
    group.add_argument(
        "--max-error",
        metavar="E",
        type=float,
        help="smallest rank of each layer with this relative error",
    )
    group.add_argument(
        "--energy",
        metavar="E",
        type=float,
        help="smallest rank of each layer with this share of the squared norm",
    )
    if budget:
        group.add_argument(
            "--budget",
            metavar="N",
            default="",
            help="ranks of all layers together (1024), or size (20MB), spent where it counts",
        )


def _declare_svd(parser: argparse.ArgumentParser) -> None:
    kinds = ("randomized", "exact")
    parser.add_argument(
        "--svd",
        metavar="S",
        choices=kinds,
        default=kinds[0],
        help="randomized or exact, of dense updates (%(default)s)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of what is drawn at random"
    )


def _declare_files(
    parser: argparse.ArgumentParser, dtype: str, *, format: bool = False, model: bool = True
) -> None:
    group = _declare_reading(parser, model=model)
    if format:
        group.add_argument(
            "--format",
            metavar="F",
            choices=WRITTEN,
            default="",
            help=f"of the result: {', '.join(WRITTEN)} (the first input's)",
        )
    group.add_argument(
        "--dtype",
        metavar="D",
        choices=list(DTYPES),
        help=f"of the result: {', '.join(DTYPES)} ({dtype})",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    group.add_argument("--dry-run", action="store_true", help="compute and report, write nothing")


def _declare_reading(
    parser: argparse.ArgumentParser, *, model: bool = True
) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("files")
    if model:
        group.add_argument(
            "--model",
            metavar="M",
            default="",
            help="whose adapters they are: a model, or sd1, sd2, sdxl, flux-dev (told by their keys)",
        )
    group.add_argument(
        "--model-config",
        metavar="DIR",
        default="",
        help="folder or hub id with the configs of a single-file model",
    )
    group.add_argument(
        "--dora-axis",
        metavar="A",
        choices=("rows", "columns"),
        default="",
        help="rows or columns, for kohya DoRAs that do not tell",
    )
    group.add_argument(
        "--allow-extra", action="store_true", help="pass over keys that mean nothing, in one line"
    )
    return group


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1")
