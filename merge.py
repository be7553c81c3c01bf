"""Merging, folding, distilling, resizing, converting and inspecting adapter files; sums of whole models.

python merge.py mix "0.7*a.safetensors + 0.3*b.safetensors@attn" --out c.safetensors --rank 16
python merge.py fold toy/model "0.8*runs/demo" merged.safetensors
python merge.py COMMAND --help                                              # every command has an example
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, NoReturn

from lora_core.errors import UserError
from lora_core.formats.layout import nearest_name
from lora_core.text import check_unicode
from merging import add, flags, inspection, mix, model_sums, redo
from merging.add import LoraAddition
from merging.expression import WeightedFile, parse_sum, render_sum
from merging.mix import KeepOptions, MergeMethod
from merging.opening import OpenOptions, is_whole_model, sha256_digest
from merging.output import Output, check_output
from merging.ties_dare import MERGES

HIDDEN = {
    "command",
    "out",
    "overwrite",
    "dry_run",
    "residual",
    "words",
}  # arguments that a recipe does not keep


class Command(NamedTuple):
    usage: str
    summary: str
    example: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """One sentence for a mistake, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = (
            nearest_name(
                found[1], [flag for action in self._actions for flag in action.option_strings]
            )
            if found
            else ""
        )
        raise UserError(
            f"{message}{f'; the nearest flag is {near}' if near else ''}; see {self.prog} --help"
        )


# ---------------------------------------------------------------- what the commands do


def run_mix(args: argparse.Namespace) -> None:
    entries = _entries(args.sum)
    amount, method = _amount(args), MergeMethod(args.method, args.density, args.seed, args.svd)
    if not args.out:
        raise UserError("no output; name a file with --out")
    output = _output(args, [entry.path for entry in entries])
    whole = any(is_whole_model(entry.path) for entry in entries)
    idle = {
        "--residual": bool(args.residual) and not whole,
        "--format": bool(args.format) and whole,
        "--density": args.density != MergeMethod().density and args.method not in MERGES,
    }
    if found := [flag for flag, is_idle in idle.items() if is_idle]:
        raise UserError(
            f"{found[0]} has no effect on {'a sum of models' if whole else f'{args.method} of adapters'}; leave it out"
        )
    if not whole:
        mix.mix_adapters(entries, output, _reading(args), amount=amount, method=method)
        return
    if amount or args.method != "sum":
        raise UserError(
            f"{render_sum(entries)} has a whole model in it, which has no rank to choose and no --method but sum; drop these options"
        )
    model_sums.write_model_sum(
        entries, output, _reading(args), model_sums.FoldOptions(args.residual)
    )


def run_fold(args: argparse.Namespace) -> None:
    entries = _entries(args.sum)
    if not is_whole_model(args.base):
        raise UserError(
            f"{args.base} is no whole model; give a folder in the diffusers layout, a single-file checkpoint or a hub id first"
        )
    if wrong := [entry.path for entry in entries if is_whole_model(entry.path)]:
        raise UserError(
            f'{wrong[0]} is a whole model, fold adds adapters to {args.base}; mix adds models: mix "0.6*A + 0.4*B" --out C'
        )
    entries = [WeightedFile(1.0, args.base), *entries]
    output = _output(args, [entry.path for entry in entries])
    model_sums.write_model_sum(
        entries, output, _reading(args), model_sums.FoldOptions(args.residual, args.residual_rank)
    )


def run_distill(args: argparse.Namespace) -> None:
    output = _output(args, [args.base, args.tuned])
    method = MergeMethod(seed=args.seed, svd=args.svd)
    model_sums.distill_difference(
        model_sums.ModelDifference(args.base, args.tuned, args.layers),
        output,
        _reading(args),
        amount=_amount(args),
        method=method,
    )


def run_resize(args: argparse.Namespace) -> None:
    mix.resize_adapter(
        args.file,
        _output(args, [args.file]),
        _reading(args),
        amount=_amount(args),
        method=MergeMethod(seed=args.seed, svd=args.svd),
    )


def run_convert(args: argparse.Namespace) -> None:
    output = _output(args, [args.file])
    if not is_whole_model(args.file):
        mix.convert_adapter(
            args.file, replace(output, format=args.to or "diffusers"), _reading(args)
        )
        return
    if args.to:
        raise UserError(
            f"{args.file} is a whole model, whose form the output's ending says; drop --to {args.to}"
        )
    model_sums.write_model_sum([WeightedFile(1.0, args.file)], output, _reading(args))


def run_info(args: argparse.Namespace) -> None:
    inspection.print_info(
        args.file, _reading(args), top=args.top, plot=args.plot, overwrite=args.overwrite
    )


def run_diff(args: argparse.Namespace) -> None:
    inspection.print_diff(args.first, args.second, _reading(args), top=args.top)


def run_explain(args: argparse.Namespace) -> None:
    inspection.print_explanation(args.checkpoint, args.base, args.loras, _reading(args))


def run_redo(args: argparse.Namespace) -> None:
    redo.redo_merge(args.file, args.out, overwrite=args.overwrite, dry_run=args.dry_run, run=_again)


def run_add(args: argparse.Namespace) -> None:
    names = ("path_1", "path_2", "out", "alpha_1", "alpha_2")
    words = iter(args.words)
    for name in names:  # as python-fire does: words go to what no flag has given, in order
        if getattr(args, name) is None and (word := next(words, None)) is not None:
            setattr(args, name, word)
    if (rest := list(words)) or any(getattr(args, name) is None for name in names[:3]):
        got = f"got {rest[0]!r} besides" if rest else "one of these is missing"
        raise UserError(f"add takes PATH_1 PATH_2 OUTPUT [ALPHA_1 [ALPHA_2]], {got}")
    alphas = [None if alpha is None else _number(alpha) for alpha in (args.alpha_1, args.alpha_2)]
    job = LoraAddition(
        args.path_1,
        args.path_2,
        alphas[0],
        alphas[1],
        args.mode,
        args.with_text_lora,
        args.residual,
    )
    add.add_files(job, _output(args, [args.path_1, args.path_2]), _reading(args))


# ---------------------------------------------------------------- helpers


def _entries(text: str) -> list[WeightedFile]:
    """The files of a sum; ~ at the start of a path is the home folder, which no shell expands inside quotes."""
    return [replace(entry, path=os.path.expanduser(entry.path)) for entry in parse_sum(text)]


def _reading(args: argparse.Namespace) -> OpenOptions:
    return OpenOptions(
        getattr(args, "model", ""), args.model_config, args.allow_extra, args.dora_axis
    )


def _amount(args: argparse.Namespace) -> KeepOptions:
    return KeepOptions(args.rank, args.max_error, args.energy, getattr(args, "budget", ""))


def _output(args: argparse.Namespace, inputs: Sequence[str]) -> Output:
    """Where to, with the recipe of the command."""
    output = Output(
        args.out,
        args.overwrite,
        args.dry_run,
        flags.DTYPES.get(args.dtype),
        getattr(args, "format", ""),
    )
    for path in inputs:
        is_whole_model(path)  # refuses a path that is not there
    if args.dry_run:
        return output
    if os.path.isfile(args.out):
        check_output(output)  # before gigabytes are hashed
    default = vars(_parser(args.command).parse_intermixed_args(_least(args.command)))
    options = {
        name: value
        for name, value in vars(args).items()
        if name not in HIDDEN and value != default.get(name)
    }
    return replace(
        output,
        recipe={
            "command": args.command,
            "options": options,
            "inputs": {path: sha256_digest(path) for path in inputs},
        },
    )


def _least(command: str) -> list[str]:
    """Words with which a command's parser gives its defaults."""
    return [""] * {"mix": 1, "fold": 3, "distill": 3, "resize": 2, "convert": 2}.get(command, 0)


def _again(recipe: dict[str, object], out: str) -> None:
    """Carries out a recipe anew."""
    command, options = recipe["command"], recipe["options"]
    if command not in ("mix", "fold", "distill", "resize", "convert", "add") or not isinstance(
        options, dict
    ):
        raise UserError(f"the recipe has the command {command!r}, which cannot be repeated")
    args = _parser(str(command)).parse_intermixed_args(_least(str(command)))
    if unknown := [name for name in options if not hasattr(args, name) or name in HIDDEN]:
        raise UserError(
            f"the recipe has the option {unknown[0]}, which {command} does not know; was it made by another version?"
        )
    vars(args).update(options, out=out, overwrite=False, dry_run=False, command=command)
    try:
        COMMANDS[str(command)].run(args)
    except (TypeError, AttributeError) as error:  # values that no command line gives
        raise UserError(f"the recipe is broken ({error}); make the file anew by hand") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"the alpha {text!r} is no number; add takes PATH_1 PATH_2 OUTPUT [ALPHA_1 [ALPHA_2]]"
        ) from None


def _words(argv: Sequence[str]) -> list[str]:
    """Flags with hyphens for underscores; a bare --with-text-lora takes True or False only."""
    words = []
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        word = name.replace("_", "-") + equals + value if word.startswith("--") else word
        following = argv[i + 1].lower() if i + 1 < len(argv) else ""
        words.append(
            "--with-text-lora=True"
            if word == "--with-text-lora" and following not in ("true", "false")
            else word
        )
    return words


SUM = '"0.7*a.safetensors + 0.3*b.safetensors@attn"'
COMMANDS = {  # name -> its words, what it is, its example, its flags, what it does
    "mix": Command("SUM --out FILE", "the exact sum of LoRA files, or of models", f"{SUM} --out c.safetensors --rank 16", flags.mix, run_mix),
    "fold": Command("MODEL SUM OUT", "adapters into a model, rounded once", 'toy/model "0.8*runs/demo" merged.safetensors', flags.fold, run_fold),
    "add": Command(
        "PATH_1 PATH_2 OUTPUT [ALPHA_1 [ALPHA_2]]", "cloneofsimo's lora_add: its modes, argument order and defaults",
        "toy/model a.safetensors merged 0.8 --mode upl", flags.add, run_add,
    ),
    "distill": Command("BASE TUNED OUT", "the difference of two models as a LoRA", "base tuned a.safetensors --rank 16", flags.distill, run_distill),
    "resize": Command("FILE OUT", "the nearest LoRA of smaller rank", "big.safetensors small.safetensors --energy 0.99", flags.resize, run_resize),
    "convert": Command("FILE OUT", "an adapter or a model in another format", "a.safetensors b.safetensors --to kohya", flags.convert, run_convert),
    "info": Command("FILE", "what a file holds", "a.safetensors --plot spectrum.png", flags.info, run_info),
    "diff": Command("FILE FILE", "how two LoRA files differ, layer by layer", "a.safetensors b.safetensors --top 20", flags.diff, run_diff),
    "explain": Command("TUNED BASE LORA...", "which mixture of LoRAs a checkpoint is", "tuned base a.safetensors", flags.explain, run_explain),
    "redo": Command("FILE", "the same merge again, by the recipe in its result", "c.safetensors", flags.redo, run_redo),
}  # fmt: skip
WIDTH = 120  # columns of help texts


def _parser(command: str, prog: str = "") -> argparse.ArgumentParser:
    row = COMMANDS[command]
    prog = prog or f"merge.py {command}"
    texts = {
        "usage": f"{prog} {row.usage} [flags]",
        "description": row.summary,
        "epilog": f"example: {prog} {row.example}",
    }
    layout = partial(argparse.HelpFormatter, width=WIDTH, max_help_position=22)
    parser = Parser(prog=prog, **texts, allow_abbrev=False, add_help=False, formatter_class=layout)  # type: ignore[arg-type]
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    row.declare(parser)
    return parser


def _overview() -> str:
    lines = [f"  {name:9}{row.summary}" for name, row in COMMANDS.items()]
    example = f"example: merge.py mix {COMMANDS['mix'].example}"
    return "\n".join(
        ["usage: merge.py COMMAND ...", "", *lines, "", example, "more:    merge.py COMMAND --help"]
    )


def run(command: str, words: Sequence[str], prog: str = "") -> int:
    """The exit status of a command line: 0 done, 2 a mistake that the printed sentence explains, 130 interrupted."""
    try:
        check_unicode(words, "the argument")
        args = _parser(command, prog).parse_intermixed_args(_words(words))
        args.command = command
        COMMANDS[command].run(args)
    except SystemExit:  # argparse has printed the help
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of merge.py; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(
            f"error: there is no command {words[0]}; choose {', '.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    return run(words[0], words[1:])


def lora_add(argv: Sequence[str] | None = None) -> int:
    """The command line of the installed lora_add; returns its exit status."""
    return run("add", list(sys.argv[1:] if argv is None else argv), "lora_add")


if __name__ == "__main__":
    sys.exit(main())
