"""merge.py resize: the nearest adapter of smaller rank, with the same tokens and header."""

from __future__ import annotations

from lora_core.errors import UserError
from merging.commands import MergeMethod, Resize
from merging.expression import WeightedFile
from merging.mix import mix_adapters
from merging.output import make_output


def run_resize(options: Resize) -> None:
    """Writes the nearest adapter of the rank, error, energy or budget of the options."""
    output = make_output("resize", options, [options.file])
    if not options.keep:
        raise UserError(
            "choose how much to keep: --rank 16, --max-error 0.05, --energy 0.99 or --budget 20MB"
        )
    method = MergeMethod(svd=options.svd.svd, seed=options.svd.seed)
    files = [WeightedFile(1.0, options.file)]
    mix_adapters(files, output, options.files, keep=options.keep, method=method)
