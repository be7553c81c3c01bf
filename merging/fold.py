"""merge.py fold: adapters added to the weights of a whole model, each rounded once."""

from __future__ import annotations

from lora_core.errors import UserError
from merging.commands import Fold
from merging.expression import WeightedFile, parse_files
from merging.model_sums import FoldOptions, write_model_sum
from merging.opening import describe_path, is_whole_model
from merging.output import make_output, print_file_count


def run_fold(options: Fold) -> None:
    """Writes a model with adapters folded in. Raises UserError for swapped arguments."""
    files = parse_files(options.sum, options.out)
    if not is_whole_model(options.base):
        raise UserError(
            f"{options.base} is not a whole model, it is {describe_path(options.base)}; give a "
            "folder in the diffusers layout, a single-file checkpoint or a hub id first"
        )
    if wrong := [file.path for file in files if is_whole_model(file.path)]:
        raise UserError(
            f"{wrong[0]} is a whole model, fold adds adapters to {options.base}; mix adds models: "
            'mix "0.6*A + 0.4*B" --out C'
        )
    files = [WeightedFile(1.0, options.base), *files]
    output = make_output("fold", options, [file.path for file in files])
    print_file_count(files[1:])
    fold = FoldOptions(options.residual, options.residual_rank, kind=options.adapter_kind)
    write_model_sum(files, output, options.files, fold)
