"""merge.py convert: the same adapter in another format, or a model as a folder or a single file."""

from __future__ import annotations

from dataclasses import replace

from lora_core.errors import UserError
from lora_core.formats.known_formats import TOKEN_FORMATS
from merging.commands import Convert, OpenOptions
from merging.expression import WeightedFile
from merging.factor_sums import frobenius_norm
from merging.opening import find_layout, is_whole_model, open_adapter
from merging.output import (
    Output,
    check_adapter_output,
    make_output,
    print_written,
    report_table,
    round_adapter,
    settle_format,
    write_adapter,
)
from merging.truncation import ApproximationReport


def run_convert(options: Convert) -> None:
    """Writes an adapter in the format --to, or a model in the form of the output's name."""
    output = make_output("convert", options, [options.file])
    if not is_whole_model(options.file):
        convert_adapter(options.file, replace(output, format=options.to), options.files)
        return
    if options.to:
        raise UserError(
            f"{options.file} is a whole model, whose format follows from the output's ending; "
            f"drop --to {options.to}"
        )
    from merging.model_sums import write_model_sum  # imports the networks' libraries

    write_model_sum([WeightedFile(1.0, options.file)], output, options.files)


def convert_adapter(path: str, output: Output, reading: OpenOptions) -> None:
    """Writes the same adapter in another format; only the dtype of factors may change."""
    check_adapter_output(output)
    layout = find_layout([path], reading)
    state = open_adapter(path, layout, reading)
    has_layers = any(state.components.values())
    output = settle_format(output, layers=has_layers, tokens=bool(state.tokens))
    reports = {}
    for component, adapters in state.components.items():
        for name, lr in adapters.items():
            size = frobenius_norm(lr._replace(magnitude=None))
            report = ApproximationReport(lr.rank, lr.rank, size, 0.0)
            adapters[name], reports[component, name] = round_adapter(lr, report, output.dtype)
    if reports and output.format not in TOKEN_FORMATS:
        print(report_table(reports))
    print_written(write_adapter(state, output, layout), output)
