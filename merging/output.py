"""The output of a command: checks before any work, files with their recipe, and what is printed."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank, factor_blocks
from lora_core.errors import UserError
from lora_core.escaped_output import one_line, print_note
from lora_core.formats.container import is_finite, read_header
from lora_core.formats.grammar import share_of_down
from lora_core.formats.known_formats import (
    FORMATS,
    LORA_FORMATS,
    PICKLED,
    TOKEN_FORMATS,
    import_function,
)
from lora_core.formats.layout import Layout
from lora_core.formats.training_metadata import rename_token_file
from lora_core.text import hide_home
from merging.adapter_sums import layers_by_key
from merging.commands import WriteOptions
from merging.factor_sums import concat_factors, frobenius_norm
from merging.opening import is_whole_model
from merging.recipe import make_recipe, recipe_header
from merging.stored_layers import LayerKey, stored_layers
from merging.truncation import ApproximationReport, total_report

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
# formats that hold token rows in the file of the factors
FORMATS_WITH_TOKENS = ("cloneofsimo", "mixofshow")
# ending of a file of token rows -> its format where none is chosen
ROW_FORMATS = {".safetensors": "embeddings", ".pt": "a1111", ".bin": "textual_inversion"}
SINGLE_BYTES = 4  # of a number in fp32, whose rounding no table shows
MIXOFSHOW = ".pth"  # ending of the only format of that kind
MOST_NOTES = 10  # of one kind; a sum may have a thousand files
ADAPTER_ENDINGS = (*ROW_FORMATS, MIXOFSHOW)


@dataclass(frozen=True)
class Output:
    """A result to write: its path, dtype and format, and the recipe for its header."""

    path: str
    overwrite: bool = False
    dry_run: bool = False
    dtype: torch.dtype | None = None
    format: str = ""  # of an adapter; empty: the first input's
    recipe: Mapping[str, Any] = field(default_factory=dict)
    sidecar: bool = False  # whether A1111's NAME.json is written beside an adapter

    @property
    def header(self) -> dict[str, str]:
        return recipe_header(self.recipe)

    def with_model(self, model: str) -> Output:
        """The output with the model in its recipe, where there is one that lacks it."""
        if not model or not self.recipe or "model" in self.recipe["options"]:
            return self
        options = {**self.recipe["options"], "model": hide_home(model)}
        return replace(self, recipe={**self.recipe, "options": options})


def make_output(command: str, options: Any, inputs: Sequence[str]) -> Output:
    """The output that a command's options describe, with the command's recipe.

    Raises UserError for an input that does not exist and, before gigabytes are hashed, for an
    output that cannot be written.
    """
    files: WriteOptions = options.files
    output = Output(
        options.out,
        files.overwrite,
        files.dry_run,
        DTYPES.get(files.dtype),
        getattr(files, "format", ""),
        sidecar=getattr(options, "sidecar", False),
    )
    for path in inputs:
        if is_whole_model(path) and output.sidecar:  # raises for a path that does not exist
            raise UserError(
                f"--sidecar is for LoRA files, and {path} is a whole model; leave it out"
            )
    if output.dry_run:
        return output
    _refuse_replaced_inputs(output, inputs)
    if os.path.isfile(output.path):
        check_output(output)
    return replace(output, recipe=make_recipe(command, options, inputs))


def _refuse_replaced_inputs(output: Output, inputs: Sequence[str]) -> None:
    """Raises UserError for an input in the folder that the output would replace, and for a whole
    model in its place: what was made of it could not be made again.
    """
    folder = Path(output.path).resolve()
    for path in inputs:
        if Path(path).resolve() == folder and is_whole_model(path):
            raise UserError(
                f"the output {output.path} is the input {path}, a whole model that would be "
                "replaced; name another output"
            )
        if folder in Path(path).resolve().parents:
            raise UserError(
                f"the input {path} lies in the output {output.path}, which would be replaced with "
                "it; name another output"
            )


def check_output(output: Output, *, folder: bool = False) -> None:
    """Raises UserError for an output that cannot be written, before any work.

    That is one that exists (without --overwrite), a folder of other things than a model, a file
    where a folder is needed or the converse, or a path that is not writable.
    """
    path = Path(output.path)
    if path.is_dir() and not folder:
        raise UserError(f"the output {path} is a folder; name a file in it")
    if path.exists() and not output.overwrite and not output.dry_run:
        raise UserError(
            f"{path} is there already; pass --overwrite to replace it, or name another output"
        )
    if path.is_dir() and not output.dry_run:
        import_function("model_folders", "check_replaced_folder")(path)
    if path.is_file() and folder:
        raise UserError(
            f"the output {path} is a file; name a folder, or one that ends in .safetensors or "
            ".ckpt for a single file"
        )
    parent = next(place for place in path.absolute().parents if place.exists())
    if not parent.is_dir():
        raise UserError(
            f"the output {path} lies below {parent}, which is not a folder; choose another place"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"the output {path} cannot be written, {parent} is not writable; choose another place"
        )


def check_adapter_output(output: Output) -> None:
    """`check_output` of an adapter file; its name has to end as the chosen format requires."""
    if not output.path:
        raise UserError("no output; name a file")
    path = Path(output.path)
    check_output(output)
    if not output.format and path.suffix not in ADAPTER_ENDINGS:
        raise UserError(
            f"the output {path} should end in .safetensors, in .pt for cloneofsimo's lists or "
            "A1111's embeddings, in .pth for Mix-of-Show, or in .bin for learned embeddings"
        )
    if output.format and path.suffix not in FORMATS[output.format].endings:
        endings = " or ".join(FORMATS[output.format].endings)
        raise UserError(
            f"a file of the format {output.format} ends in {endings}, the output is {path}; "
            "choose another name or format"
        )


def settle_format(
    output: Output, *, layers: bool, tokens: bool, default: str = "diffusers"
) -> Output:
    """The output with the format for its content: layers, token rows or both.

    Without a chosen format, layers are written as `default`, or as cloneofsimo's lists where the
    name ends in .pt; rows alone as `embeddings`, as A1111's dictionary in a .pt, as learned_embeds
    in a .bin. Both are written to a .pth as Mix-of-Show has them, in fp32. Raises UserError for a
    chosen format that cannot hold the content, and as `check_output` for files that are written
    next to the output.
    """
    path = Path(output.path)
    if not layers and not tokens:
        raise UserError(f"nothing is left to write to {path}: no layer and no token")
    if path.suffix == MIXOFSHOW:
        _check_sidecar(output)
        return replace(output, format="mixofshow", dtype=output.dtype or torch.float32)
    if not layers:
        return _settle_token_format(output)
    if output.format in TOKEN_FORMATS:
        if not tokens:
            raise UserError(
                f"{output.format} is a format of token rows, and there are none for {path}, only "
                f"layers; choose one of {', '.join(LORA_FORMATS)}"
            )
        print_note(f"{path} gets the token rows alone, {output.format} has no place for layers")
        return output
    if path.suffix == ".bin":
        raise UserError(
            f"the output {path} should end in .safetensors, in .pt for cloneofsimo's lists, or in "
            ".pth for Mix-of-Show"
        )
    _check_sidecar(output, output.format or default)
    if path.suffix == ".pt":
        for end in (".text_encoder.pt", ".ti.pt"):
            check_output(replace(output, path=str(path.with_suffix(end))))
        return replace(output, format="cloneofsimo")
    output = replace(output, format=output.format or default)
    if tokens and output.format not in FORMATS_WITH_TOKENS:
        check_output(replace(output, path=str(token_file_path(path))))
    return output


def _settle_token_format(output: Output) -> Output:
    """`settle_format` for token rows without layers."""
    _check_sidecar(output)
    if output.format in LORA_FORMATS:
        raise UserError(
            f"{output.format} is a format of LoRA layers, and there are none for {output.path}, "
            f"only token rows; choose one of {', '.join(TOKEN_FORMATS)}"
        )
    return replace(output, format=output.format or ROW_FORMATS[Path(output.path).suffix])


def _check_sidecar(output: Output, format: str = "") -> None:
    """Raises UserError for --sidecar with a file that A1111 does not read, or one that is there."""
    path = Path(output.path)
    if not output.sidecar:
        return
    if format != "kohya" or path.suffix != ".safetensors":
        raise UserError(
            f"--sidecar writes A1111's table beside a LoRA under kohya's names, and {path} is "
            "none; choose that format (convert --to kohya, mix --format kohya) or leave it out"
        )
    beside = import_function("sidecars", "user_metadata_path")(path)
    check_output(replace(output, path=str(beside)))


def token_file_path(path: str | Path) -> Path:
    """The file for an adapter's token rows where its format cannot hold them."""
    path = Path(path)
    return path.with_name(path.stem + formats.EMBEDDINGS)


def write_adapter(state: AdapterState, output: Output, layout: Layout | None) -> list[Path]:
    """Writes an adapter in a settled format and returns the files written; none on a dry run.

    Token rows get a file next to that of the factors if the format cannot hold both. Raises
    UserError as `formats.save` does.
    """
    path = Path(output.path)
    if output.dry_run:
        return []
    if output.dtype:
        state = replace(state, tokens=_cast_rows(state.tokens, output.dtype))
    if output.format in TOKEN_FORMATS:
        _write_tokens(state, output, layout)
        return [path]
    if output.format == "kohya" and layout and any(state.parameters.values()):
        losses = import_function("parameter_changes", "describe_losses")(state, layout)
        if losses:
            print_warning(f"{losses}; merge.py fold puts all of it into a model")
    if output.format == "mixofshow":
        for word, concepts in import_function("mixofshow", "concept_names")(state).items():
            if concepts != (word,):
                print_note(f"{word} is {' '.join(concepts)} in Mix-of-Show's prompts")
    if path.suffix == ".pt":
        return import_function("factor_lists", "write_factor_lists")(state, path, layout)
    if output.format in FORMATS_WITH_TOKENS or not state.tokens:
        _save_factors(state, output, layout)
        return [path, *_write_sidecar(output)]
    rows = replace(output, path=str(token_file_path(path)), format="embeddings")
    state = replace(state, metadata=rename_token_file(state.metadata, Path(rows.path).stem))
    _save_factors(replace(state, tokens={}), output, layout)
    _write_tokens(state, rows, layout)
    return [path, Path(rows.path), *_write_sidecar(output)]


def _write_sidecar(output: Output) -> list[Path]:
    """Writes A1111's table beside a LoRA file, with --sidecar."""
    path = Path(output.path)
    if not output.sidecar:
        return []
    return [import_function("sidecars", "write_user_metadata")(path, read_header(path))]


def round_adapter(
    adapter: LowRank, report: ApproximationReport, dtype: torch.dtype | None
) -> tuple[LowRank, ApproximationReport]:
    """The factors in the dtype of the file, and the report with the rounding loss added.

    Magnitudes are never cast, so that the loss of a DoRA is that of the product of its factors, as
    its norm is. Raises UserError for factors that overflow it.
    """
    if dtype is None or (adapter.down.dtype == dtype and adapter.up.dtype == dtype):
        return adapter, report
    cast = adapter._replace(down=adapter.down.to(dtype), up=adapter.up.to(dtype))
    if not (is_finite(cast.down) and is_finite(cast.up)):
        raise UserError(f"the factors overflow {dtype}; choose --dtype bf16 or fp32")
    pair = adapter._replace(magnitude=None), cast._replace(magnitude=None)
    lost = frobenius_norm(concat_factors([(1.0, pair[0]), (-1.0, pair[1])]))
    return cast, report._replace(lost=(report.lost**2 + lost**2) ** 0.5)


def store_scales(
    state: AdapterState,
    reports: Mapping[LayerKey, ApproximationReport],
    output: Output,
    layout: Layout | None,
) -> tuple[AdapterState, dict[LayerKey, ApproximationReport]]:
    """The state with the factors that its format stores, and the reports with that rounding.

    A format without scales, or with one alpha, multiplies them into the factors, which rounds those
    of half precision once more. The reports are those of our layers or of stored ones.
    """
    found = dict(reports)
    if output.format in TOKEN_FORMATS:
        return state, found
    settled = formats.settle_scales(state, output.format, layout)
    if settled is state:
        return state, found
    groups = stored_layers(output.format, layout).group_parts(layers_by_key(state))
    for stored, parts in groups.items():
        for component, path in parts:
            before, after = (own.components[component][path] for own in (state, settled))
            if lost := _scaling_loss(before, after):
                key = stored if stored in found else (component, path)
                found[key] = found[key]._replace(lost=math.hypot(found[key].lost, lost))
    return settled, found


def _scaling_loss(before: LowRank, after: LowRank) -> float:
    """The norm of the difference of an adapter and its `scale_factors`, or one with a rescaled up.

    For a DoRA it is that of the product of its factors.
    """
    if after is before or not before.scale or after.up.element_size() >= SINGLE_BYTES:
        return 0.0
    factor = before.scale / after.scale
    is_same = after.down is before.down
    share = 1.0 if is_same else share_of_down(after.up.dtype, factor)
    lost = []
    up_error = before.up.float() * (factor / share) - after.up.float()
    if up_error.any():
        lost.append(_rough_norm(LowRank(before.down, up_error, after.scale * share)))
    if not is_same and not torch.equal(after.down / share, before.down):
        down_error = before.down.float() * share - after.down.float()
        lost.append(_rough_norm(LowRank(down_error, after.up, after.scale)))
    return math.hypot(*lost)


def _rough_norm(lr: LowRank) -> float:
    """`frobenius_norm` in fp32, which is enough for an error and four times as fast."""
    up, down = factor_blocks(lr)
    square = ((up.mT @ up) * (down @ down.mT)).sum(dtype=torch.float64)
    return abs(lr.scale) * math.sqrt(max(0.0, float(square)))


def _cast_rows(tokens: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Token rows in the dtype of the file. Raises UserError for rows that overflow it."""
    cast = {key: rows.to(dtype) for key, rows in tokens.items()}
    if not all(map(is_finite, cast.values())):
        raise UserError(f"the token rows overflow {dtype}; choose --dtype bf16 or fp32")
    return cast


def _write_tokens(state: AdapterState, output: Output, layout: Layout | None) -> None:
    """Writes token rows in one of TOKEN_FORMATS."""
    if Path(output.path).suffix in PICKLED:
        writer = {"a1111": "write_pickled_embedding", "textual_inversion": "write_learned_embeds"}
        import_function("embedding_pickles", writer[output.format])(state, output.path)
        return
    header = output.header
    if layout:
        header |= import_function("model_spec", "embedding_spec")(layout, Path(output.path).stem)
    formats.save(state, output.path, format=output.format, layout=layout, metadata=header)


def _save_factors(state: AdapterState, output: Output, layout: Layout | None) -> None:
    formats.save(
        state,
        output.path,
        format=output.format,
        layout=layout,
        metadata=output.header,
        dtype=output.dtype,
    )


# ---------------------------------------------------------------- on the screen


def print_written(paths: Iterable[str | Path], output: Output) -> None:
    """Prints the paths that were written, or that it was a dry run."""
    if output.dry_run:
        print(f"dry run: {output.path} was not written")
    for path in paths:
        print(f"written: {path}")


def report_table(reports: Mapping[tuple[str, str], ApproximationReport], *, extra: str = "") -> str:
    """Layers, rank kept, energy kept and relative error, by component and in total.

    The keys are (component, path); `extra` is a last line.
    """
    groups: dict[str, list[ApproximationReport]] = {}
    for (component, _), report in reports.items():
        groups.setdefault(component, []).append(report)
    groups["total"] = list(reports.values())
    rows = [("", "layers", "rank", "of", "energy kept", "relative error")]
    for name, found in groups.items():
        whole = total_report(found)
        kept = f"{100 * max(0.0, whole.energy):.4f} %"
        ranks = str(whole.rank), str(whole.full)
        rows.append((name, str(len(found)), *ranks, kept, f"{whole.error:.2e}"))
    lines = align_columns(rows)
    if excess := total_report(reports.values()).excess:
        lines.append(
            f"randomized SVD: at most about {100 * excess:.2g} % above the smallest possible "
            "error (--svd exact for that)"
        )
    return "\n".join([*lines, *([extra] if extra else [])])


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return lines


def print_notes(notes: Sequence[str], files: Sequence[object]) -> None:
    """Notes on a sum of files as `print_note` prints them; of many files' notes the first."""
    is_long = len(files) > MOST_NOTES and len(notes) > MOST_NOTES
    for note in notes[:MOST_NOTES] if is_long else notes:
        print_note(note)
    if is_long:
        print_note(f"... and {len(notes) - MOST_NOTES:,} more of such notes")


def print_file_count(files: Sequence[object]) -> None:
    """A line about the number of files in a sum, where nobody would count them."""
    if len(files) > MOST_NOTES:
        print_note(f"the sum has {len(files):,} files")


def print_warning(text: str) -> None:
    """One line on stderr about something that is probably wrong."""
    print(f"warning: {one_line(text)}", file=sys.stderr)
