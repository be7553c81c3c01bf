"""merge.py info: a file's family, layers, ranks, spectra, tokens and header."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState
from lora_core.byte_sizes import format_bytes
from lora_core.errors import UserError
from lora_core.escaped_output import one_line
from lora_core.formats import embeddings
from lora_core.formats.adapter_files import find_adapter_files
from lora_core.formats.layout import Layout
from lora_core.formats.training_metadata import HINT, MERGED_FROM, TRIGGER
from lora_core.placeholders import Placeholder, describe_tokens
from merging.commands import FileReadOptions, Info
from merging.layer_spectra import LayerSpectrum, layer_spectra
from merging.opening import find_layout, is_whole_model, open_adapter, widest_dtype
from merging.output import DTYPES, Output, align_columns, check_output
from merging.overlap import print_overlaps
from merging.recipe import RECIPE, describe_recipe, parse_recipe
from merging.stored_layers import layers_in_file

LISTED_ENTRIES = 100  # of a header; sd-scripts writes 70
LONGEST_ENTRY = 66  # characters of a header entry that is printed in full, such as a hash
PLOTTED_LAYERS = 5
SMALLEST_PLOTTED = 1e-12  # singular value on a logarithmic axis


def run_info(options: Info) -> None:
    """Prints the contents of a file, and --plot draws the spectra as PNG; of several files how much
    they overlap.

    Raises UserError for a file that cannot be read.
    """
    path, plot = options.file, options.plot
    if options.others:
        if plot or options.overwrite:
            flag = "--plot" if plot else "--overwrite"
            raise UserError(f"{flag} is for the spectra of one file, got {1 + len(options.others)}")
        print_overlaps((path, *options.others), options.files, options.top)
        return
    if is_whole_model(path):
        if plot:
            raise UserError(
                f"--plot draws the spectra of an adapter, and {path} is a whole model; leave it out"
            )
        _print_model_info(path, options.files)
        return
    if plot:
        check_output(Output(plot, options.overwrite))
    layout = find_layout([path], options.files, needed=True)
    state = open_adapter(path, layout, options.files, merging=True)
    print(f"{path}: {_describe_file(path, state, layout)}")
    joined = layers_in_file(path, layout).join_layers(state)
    spectra = list(layer_spectra(joined, path))
    if spectra:
        listed = min(options.top, len(spectra))
        print("\n".join(align_columns(_component_table(spectra))))
        print(
            f"\nranks that hold so much of the energy, and the {listed} largest of "
            f"{len(spectra)} layers"
        )
        print("\n".join(align_columns(_layer_table(spectra, options.top))))
    lines = [*_parameter_lines(state), *_token_lines(state, path), *_use_lines(state)]
    lines += _header_lines(state)
    for line in lines:
        print(one_line(line))
    if plot:
        if not spectra:
            raise UserError(f"{path} adapts no layer, there is no spectrum to plot")
        _plot_spectra(spectra, Path(plot), Path(path).name)
        print(f"plot: {plot}")


def _describe_file(path: str, state: AdapterState, layout: Layout | None) -> str:
    """A file's format, family, dtype and size as text."""
    dtype = widest_dtype([state])
    family = "family unknown"
    if layout:
        version = layout.base_model_version
        family = f"{layout.family} ({version})" if version else layout.family
    kind = _dtype_name(dtype) if dtype else "dense"
    return f"{formats.detect_format(path)}, {family}, {kind}, {_file_size(path)}"


def _dtype_name(dtype: torch.dtype) -> str:
    names = {known: name for name, known in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def _file_size(path: str) -> str:
    """The size of a file, or of those of a folder that are read."""
    files = find_adapter_files(Path(path), custom=False)
    return format_bytes(sum(file.stat().st_size for file in files))


def _component_table(spectra: Sequence[LayerSpectrum]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [
        ("", "layers", "conv", "DoRA", "rank", "alpha", "|delta W|", "effective rank")
    ]
    groups: dict[str, list[LayerSpectrum]] = {}
    for layer in spectra:
        groups.setdefault(layer.key[0], []).append(layer)
    for name, own in [*groups.items(), ("total", list(spectra))]:
        counts = len(own), sum(layer.is_conv for layer in own), sum(map(_is_dora, own))
        ranges = [_value_range([layer.rank for layer in own])]
        ranges.append(_value_range([layer.alpha for layer in own]))
        norm = math.sqrt(sum(layer.norm**2 for layer in own))
        mean = sum(layer.effective_rank for layer in own) / len(own)
        table.append((name, *map(str, counts), *ranges, f"{norm:.4g}", f"{mean:.2f}"))
    return table


def _is_dora(layer: LayerSpectrum) -> bool:
    return layer.adapter.magnitude is not None


def _value_range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.6g}" if low == high else f"{low:.4g}..{high:.4g}"


def _layer_table(spectra: Sequence[LayerSpectrum], top: int) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("", "rank", "|delta W|", "sigma 1", "90 %", "99 %", "99.9 %")]
    for layer in sorted(spectra, key=lambda layer: -layer.norm)[:top]:
        needed = map(str, layer.ranks_of_energy(0.9, 0.99, 0.999))
        sizes = f"{layer.norm:.4g}", f"{layer.sigma[0]:.4g}"
        table.append((".".join(layer.key), str(layer.rank), *sizes, *needed))
    return table


def _parameter_lines(state: AdapterState) -> list[str]:
    """The number and the norm of the vectors that are added to norms and biases."""
    lines = []
    for name, changes in state.parameters.items():
        norm = math.sqrt(sum(float(change.double().square().sum()) for change in changes.values()))
        lines.append(
            f"norms and biases of {name}: {len(changes)} are changed, such as "
            f"{next(iter(changes))}; |change| {norm:.4g}"
        )
    return lines


def _token_lines(state: AdapterState, path: str) -> list[str]:
    lines = []
    for key, rows in state.tokens.items():
        norms = rows.float().norm(dim=1).tolist()
        named = [f"{name} {norm:.4f}" for name, norm in zip(state.token_names, norms)]
        lines.append(
            f"tokens of {key} [{rows.shape[0]}, {rows.shape[1]}], with their norms: "
            f"{', '.join(named)}"
        )
    words = embeddings.placeholder_words(state, path) if state.tokens else {}
    layers = embeddings.word_layers(state, path) if state.tokens else {}
    for word, names in words.items():
        count = layers.get(word, 0)
        line = f"word {word} stands for {describe_tokens(Placeholder(word, names, layers=count))}"
        if count:
            line += f", {len(names) // count} for each of {count} cross-attention layers (P+)"
        lines.append(line)
    return lines


def _use_lines(state: AdapterState) -> list[str]:
    """The trigger words, what else a user has to know, and what it was made of."""
    words = {
        TRIGGER: "trigger words",
        HINT: "hint",
        MERGED_FROM: "merged from",
        "modelspec.license": "license",
    }
    header = state.metadata
    return [f"{label}: {header[key]}" for key, label in words.items() if header.get(key)]


def _header_lines(state: AdapterState) -> list[str]:
    lines = []
    if RECIPE in state.metadata:
        with contextlib.suppress(UserError):  # a recipe of something else
            lines.append(describe_recipe(parse_recipe(state.metadata[RECIPE], "the file")))
    described = (RECIPE, embeddings.TOKEN_NAMES, embeddings.PLACEHOLDERS, embeddings.LAYERS)
    every = [(key, state.metadata[key]) for key in sorted(state.metadata) if key not in described]
    entries = [(key, value) for key, value in every if value != "None"]  # as sd-scripts writes it
    listed = entries[:LISTED_ENTRIES]
    if every:
        lines.append("header:")
    width = max((len(key) for key, _ in listed), default=0)
    for key, value in listed:
        lines.append(f"  {key.ljust(width)}  {_shorten_entry(value)}".rstrip())
    counts = []
    if more := len(entries) - len(listed):
        counts.append(f"{more:,} more")
    if empty := len(every) - len(entries):
        counts.append(f"{empty:,} that {'are' if empty > 1 else 'is'} None")
    return [*lines, f"  and {' and '.join(counts)}"] if counts else lines


def _shorten_entry(value: str) -> str:
    """The value of a header entry, of a long one its size."""
    if len(value) > LONGEST_ENTRY or "\n" in value:
        return f"({len(value):,} characters)"
    return value


def _plot_spectra(spectra: Sequence[LayerSpectrum], path: Path, title: str) -> None:
    """Draws the singular values of the largest layers, and the median over each component's."""
    from lora_core.runs import pictures  # imports matplotlib

    series = {}
    for name in dict.fromkeys(layer.key[0] for layer in spectra):
        own = [layer for layer in spectra if layer.key[0] == name and layer.norm]
        if not own:
            continue
        medians = _median_values(own)
        label = f"{name}, median of {len(own)} layers"
        series[label] = (list(range(1, len(medians) + 1)), medians)
    for layer in sorted(spectra, key=lambda layer: -layer.norm)[:PLOTTED_LAYERS]:
        values = [max(value, SMALLEST_PLOTTED) for value in layer.sigma.tolist()]
        series[".".join(layer.key)] = (list(range(1, len(values) + 1)), values)
    pictures.plot_spectra(series, path, title=title)


def _median_values(spectra: Sequence[LayerSpectrum]) -> list[float]:
    """The i-th entry is the median of the i-th singular values of the layers that have one."""
    medians = []
    for i in range(max(len(layer.sigma) for layer in spectra)):
        values = sorted(float(layer.sigma[i]) for layer in spectra if len(layer.sigma) > i)
        medians.append(values[len(values) // 2])
    return medians


def _print_model_info(path: str, reading: FileReadOptions) -> None:
    # imports the networks' libraries
    from lora_core.formats.model_files import describe_single_file
    from lora_core.formats.weights import open_weights
    from merging.base_models import open_base_model

    if Path(path).is_file():
        facts = describe_single_file(open_weights(path).shapes)
        print(f"{path}: a single-file checkpoint with {facts}, {_file_size(path)}")
    base = open_base_model(path, reading)
    table = [("", "tensors", "parameters", "dtype", "layers for adapters")]
    for name, weights in base.model.items():
        dtypes = Counter(_dtype_name(info.dtype) for info in weights.infos.values())
        count = sum(math.prod(info.shape) for info in weights.infos.values())
        part = base.layout.components.get(name)
        layers = len(part.shapes) if part else 0
        table.append((name, str(len(weights.infos)), f"{count:,}", ", ".join(dtypes), str(layers)))
    print(f"{path}: {base.layout.family} {base.layout.base_model_version}".rstrip())
    print("\n".join(align_columns(table)))
