"""Looking at files: what is in an adapter, how two differ, which mixture of adapters a checkpoint is."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.formats.weights import open_weights
from lora_core.formats.whole_models import describe_single_file
from lora_core.runs import pictures
from merging.adapter_sums import LayerKey
from merging.compare import (
    GramSums,
    cosine_similarity,
    fit_coefficients,
    gram_sums,
    principal_angles,
)
from merging.opening import (
    OpenOptions,
    base_weight_reader,
    find_layout,
    is_whole_model,
    open_adapter,
    open_base_model,
    widest_dtype,
)
from merging.output import RECIPE, Output, align_columns, check_output, print_note
from merging.redo import describe_recipe, parse_recipe
from merging.svd import one_thread, singular_values

LISTED_LAYERS = 10  # layers that are listed
DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}


class LayerSpectrum(NamedTuple):
    """One layer of an adapter."""

    key: LayerKey
    adapter: LowRank | DenseUpdate
    sigma: torch.Tensor  # singular values of all groups, descending

    @property
    def rank(self) -> int:
        return len(self.sigma) if isinstance(self.adapter, DenseUpdate) else self.adapter.rank

    @property
    def alpha(self) -> float:
        return self.rank * (1.0 if isinstance(self.adapter, DenseUpdate) else self.adapter.scale)

    @property
    def is_conv(self) -> bool:
        return (
            len(
                self.adapter.shape
                if isinstance(self.adapter, DenseUpdate)
                else self.adapter.down.shape
            )
            == 4
        )

    @property
    def norm(self) -> float:
        return float(self.sigma.square().sum().sqrt())

    @property
    def effective(self) -> float:
        """The effective rank: e to the entropy of the energies (Roy and Vetterli 2007)."""
        share = self.sigma.square() / self.sigma.square().sum().clamp_min(1e-300)
        return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


def print_info(
    path: str,
    reading: OpenOptions,
    *,
    top: int = LISTED_LAYERS,
    plot: str = "",
    overwrite: bool = False,
) -> None:
    """Prints what a file holds. `plot` draws the spectra as PNG. Raises UserError for a file that cannot be read."""
    if is_whole_model(path):
        if plot:
            raise UserError(
                f"--plot draws the spectra of an adapter, and {path} is a whole model; leave it out"
            )
        _print_model_info(path, reading)
        return
    if plot:
        check_output(Output(plot, overwrite))
    layout = find_layout([path], reading)
    state = open_adapter(path, layout, reading, merging=True)
    dtype = widest_dtype([state])
    kind = DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch.")) if dtype else "dense"
    family = (
        f"{layout.family} ({layout.base_model_version})"
        if layout and layout.base_model_version
        else layout.family
        if layout
        else "family unknown"
    )
    print(f"{path}: {formats.detect_format(path)}, {family}, {kind}, {_file_size(path)}")
    rows = list(_layer_spectra(state, path))
    if rows:
        print("\n".join(align_columns(_component_table(rows))))
        print(
            f"\nranks that hold so much of the energy, and the {min(top, len(rows))} largest of {len(rows)} layers"
        )
        print("\n".join(align_columns(_layer_table(rows, top))))
    for line in (*_token_lines(state, path), *_header_lines(state)):
        print(line)
    if plot:
        if not rows:
            raise UserError(f"{path} holds tokens only, there is no spectrum to plot")
        _plot_spectra(rows, Path(plot), Path(path).name)
        print(f"plot: {plot}")


def print_diff(path_1: str, path_2: str, reading: OpenOptions, *, top: int = LISTED_LAYERS) -> None:
    """Prints how two adapters differ: by component and by layer, cosines, relative differences and principal angles."""
    for path in (path_1, path_2):
        if is_whole_model(path):
            raise UserError(
                f"{path} is a whole model, diff compares adapters; for models see distill and explain"
            )
    layout = find_layout([path_1, path_2], reading)
    first, second = (
        {row.key: row for row in _layer_spectra(open_adapter(path, layout, reading), path)}
        for path in (path_1, path_2)
    )
    _refuse_dense([*first.values(), *second.values()])
    if any(row.adapter.magnitude is not None for row in [*first.values(), *second.values()]):
        print_note(
            "of a DoRA only the low-rank part is compared; the magnitudes act through the base model's weights"
        )
    both = [key for key in first if key in second]
    for key in both:
        shapes = [
            (lr.up.shape[0], *lr.down.shape[1:])
            for lr in (_low_rank(first[key]), _low_rank(second[key]))
        ]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{'.'.join(key)} is {list(shapes[0])} in {path_1} and {list(shapes[1])} in {path_2}; they are for different models"
            )
    products = {
        key: cosine_similarity(_low_rank(first[key]), _low_rank(second[key]))
        * first[key].norm
        * second[key].norm
        for key in both
    }
    table: list[tuple[str, ...]] = [
        ("", "layers", "only A", "only B", "|A|", "|B|", "cosine", "|A - B| / |A|")
    ]
    for name in [*dict.fromkeys(key[0] for key in (*first, *second)), ""]:
        table.append(_comparison_row(name, first, second, products))
    print(f"A = {path_1}\nB = {path_2}")
    print("\n".join(align_columns(table)))
    if both:
        print(
            f"\nthe {min(top, len(both))} layers where they are largest; principal angles in degrees, smallest and median (90: nothing in common)"
        )
        print("\n".join(align_columns(_angle_table(first, second, products, top))))


def print_explanation(
    checkpoint: str, base_path: str, paths: Sequence[str], reading: OpenOptions
) -> None:
    """Prints the sum of adapters that is nearest to checkpoint - base, and how much of the difference none of them explains."""
    tuned, base = open_base_model(checkpoint, reading), open_base_model(base_path, reading)
    states = [open_adapter(path, base.layout, reading) for path in paths]
    for state, path in zip(states, paths):
        if any(
            lr.magnitude is not None for rows in state.components.values() for lr in rows.values()
        ):
            raise UserError(
                f"{path} is a DoRA, whose update grows with no factor; explain takes plain LoRAs"
            )
    before, after = base_weight_reader(base), base_weight_reader(tuned)
    keys = [
        (component, path)
        for component, part in base.layout.components.items()
        for path in part.shapes
    ]
    found: dict[str, list[GramSums]] = {}
    with one_thread():
        for key in tqdm(keys, desc="explain", unit="layer", disable=None, leave=False):
            exact, old = after(*key), before(*key)
            if exact.shape != old.shape:
                raise UserError(
                    f"{'.'.join(key)} is {list(exact.shape)} in {checkpoint} and {list(old.shape)} in {base_path}; are they of one kind?"
                )
            delta = exact.double() - old.double()
            found.setdefault(key[0], []).append(
                gram_sums(delta, [state.components.get(key[0], {}).get(key[1]) for state in states])
            )
    parts = {name: fit_coefficients(rows) for name, rows in found.items()} | {
        "total": fit_coefficients([row for rows in found.values() for row in rows])
    }
    squares = {name: sum(row.square for row in rows) for name, rows in found.items()}
    squares["total"] = sum(squares.values())
    if not squares["total"]:
        raise UserError(
            f"{checkpoint} and {base_path} do not differ in any of {len(keys)} layers; there is nothing to explain"
        )
    table: list[tuple[str, ...]] = [
        ("", "|difference|", "unexplained", *(f"L{i + 1}" for i in range(len(paths))))
    ]
    for name, part in parts.items():
        if squares[name]:
            table.append(
                (
                    name,
                    f"{math.sqrt(squares[name]):.4g}",
                    f"{100 * part.unexplained:.3f} %",
                    *(f"{c:.4f}" for c in part.coefficients.tolist()),
                )
            )
    print(
        "\n".join([*(f"L{i + 1} = {path}" for i, path in enumerate(paths)), *align_columns(table)])
    )
    weights = " ".join(
        f"{'-' if c < 0 else '+'} {abs(c):.4g}*{path}"
        for c, path in zip(parts["total"].coefficients.tolist(), paths)
    )
    print(
        f"{checkpoint} = {base_path} {weights}, and {100 * parts['total'].unexplained:.3g} % of the difference's norm besides"
    )


# ---------------------------------------------------------------- info, line by line


def _layer_spectra(state: AdapterState, path: str) -> Iterator[LayerSpectrum]:
    layers = [
        ((component, name), lr)
        for component, rows in state.components.items()
        for name, lr in rows.items()
    ]
    with one_thread():
        for key, lr in tqdm(layers, desc=Path(path).name, unit="layer", disable=None, leave=False):
            try:
                sigma = (
                    torch.linalg.svdvals(lr.build().flatten(1).double())
                    if isinstance(lr, DenseUpdate)
                    else singular_values(lr._replace(magnitude=None))
                )
                yield LayerSpectrum(key, lr, sigma.flatten().sort(descending=True).values)
            except ValueError as error:
                raise UserError(f"{'.'.join(key)} of {path}: {error}") from None


def _low_rank(row: LayerSpectrum) -> LowRank:
    assert isinstance(row.adapter, LowRank)
    return row.adapter._replace(magnitude=None)


def _component_table(rows: Sequence[LayerSpectrum]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [
        ("", "layers", "conv", "DoRA", "rank", "alpha", "|delta W|", "effective rank")
    ]
    for name in [*dict.fromkeys(row.key[0] for row in rows), "total"]:
        own = [row for row in rows if name in (row.key[0], "total")]
        ranks, alphas = [row.rank for row in own], [row.alpha for row in own]
        conv, dora = (
            sum(row.is_conv for row in own),
            sum(row.adapter.magnitude is not None for row in own),
        )
        size = math.sqrt(sum(row.norm**2 for row in own))
        mean = sum(row.effective for row in own) / len(own)
        table.append(
            (
                name,
                str(len(own)),
                str(conv),
                str(dora),
                _value_range(ranks),
                _value_range(alphas),
                f"{size:.4g}",
                f"{mean:.2f}",
            )
        )
    return table


def _layer_table(rows: Sequence[LayerSpectrum], top: int) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("", "rank", "|delta W|", "sigma 1", "90 %", "99 %", "99.9 %")]
    for row in sorted(rows, key=lambda row: -row.norm)[:top]:
        energy = row.sigma.square().cumsum(0) / row.sigma.square().sum().clamp_min(1e-300)
        needed = [
            str(int((energy < share - 1e-12).sum()) + 1) if row.norm else "0"
            for share in (0.9, 0.99, 0.999)
        ]
        table.append(
            (".".join(row.key), str(row.rank), f"{row.norm:.4g}", f"{row.sigma[0]:.4g}", *needed)
        )
    return table


def _value_range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.6g}" if low == high else f"{low:.4g}..{high:.4g}"


def _token_lines(state: AdapterState, path: str) -> list[str]:
    lines = []
    for key, rows in state.tokens.items():
        norms = ", ".join(
            f"{name} {rows[i].float().norm():.4f}" for i, name in enumerate(state.token_names)
        )
        lines.append(
            f"tokens of {key} [{rows.shape[0]}, {rows.shape[1]}], with their norms: {norms}"
        )
    return lines + [
        f"word {word} stands for {''.join(names)}"
        for word, names in (
            embeddings.placeholder_words(state, path) if state.tokens else {}
        ).items()
    ]


def _header_lines(state: AdapterState) -> list[str]:
    lines = []
    with contextlib.suppress(UserError):  # a recipe of something else
        lines += (
            [describe_recipe(parse_recipe(state.metadata[RECIPE], "the file"))]
            if RECIPE in state.metadata
            else []
        )
    shown = {
        key: value
        for key, value in state.metadata.items()
        if key not in (RECIPE, embeddings.TOKEN_NAMES, embeddings.PLACEHOLDERS)
    }
    short = [
        f"{key}={value}" for key, value in shown.items() if len(value) <= 60 and "\n" not in value
    ]
    long = [
        f"{key} ({len(value)} characters)"
        for key, value in shown.items()
        if len(value) > 60 or "\n" in value
    ]
    return lines + ([f"header: {', '.join(short + long)}"] if shown else [])


def _file_size(path: str) -> str:
    files = [Path(path)] if Path(path).is_file() else list(Path(path).glob("*.safetensors"))
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def _plot_spectra(rows: Sequence[LayerSpectrum], path: Path, title: str) -> None:
    """Singular values of the largest layers, and the median over all layers of a component."""
    series = {}
    for name in dict.fromkeys(row.key[0] for row in rows):
        sigmas = [row.sigma for row in rows if row.key[0] == name and row.norm]
        length = max(len(sigma) for sigma in sigmas)
        columns = [sorted(float(s[i]) for s in sigmas if len(s) > i) for i in range(length)]
        series[f"{name}, median of {len(sigmas)} layers"] = (
            list(range(1, length + 1)),
            [column[len(column) // 2] for column in columns],
        )
    for row in sorted(rows, key=lambda row: -row.norm)[:5]:
        series[".".join(row.key)[-60:]] = (
            list(range(1, len(row.sigma) + 1)),
            [max(float(s), 1e-12) for s in row.sigma],
        )
    pictures.plot_lines(
        series, path, axes=("index", "singular value of delta W"), title=title, log=True
    )


def _print_model_info(path: str, reading: OpenOptions) -> None:
    if Path(path).is_file():
        print(
            f"{path}: a single-file checkpoint with {describe_single_file(open_weights(path).shapes)}, {_file_size(path)}"
        )
    base = open_base_model(path, reading)
    table: list[tuple[str, ...]] = [("", "tensors", "parameters", "dtype", "layers for adapters")]
    for name, weights in base.model.items():
        dtypes = Counter(
            DTYPE_NAMES.get(i.dtype, str(i.dtype).removeprefix("torch."))
            for i in weights.infos.values()
        )
        count = sum(torch.Size(i.shape).numel() for i in weights.infos.values())
        layers = len(base.layout.components[name].shapes) if name in base.layout.components else 0
        table.append((name, str(len(weights.infos)), f"{count:,}", ", ".join(dtypes), str(layers)))
    print(f"{path}: {base.layout.family} {base.layout.base_model_version}".rstrip())
    print("\n".join(align_columns(table)))


# ---------------------------------------------------------------- diff, line by line


def _refuse_dense(rows: Sequence[LayerSpectrum]) -> None:
    for row in rows:
        if isinstance(row.adapter, DenseUpdate):
            raise UserError(
                f"{'.'.join(row.key)} is a {row.adapter.kind} update, no product of two factors; resize makes a LoRA of it"
            )


def _comparison_row(
    name: str,
    first: Mapping[LayerKey, LayerSpectrum],
    second: Mapping[LayerKey, LayerSpectrum],
    products: Mapping[LayerKey, float],
) -> tuple[str, ...]:
    a, b = ([key for key in rows if name in (key[0], "")] for rows in (first, second))
    size_a, size_b = (
        math.sqrt(sum(rows[key].norm ** 2 for key in keys))
        for rows, keys in ((first, a), (second, b))
    )
    inner = sum(value for key, value in products.items() if name in (key[0], ""))
    distance = math.sqrt(max(0.0, size_a**2 + size_b**2 - 2 * inner))
    shared = len(set(a) & set(b))
    return (
        name or "total", str(shared), str(len(a) - shared), str(len(b) - shared), f"{size_a:.4g}", f"{size_b:.4g}",
        f"{inner / (size_a * size_b):.4f}" if size_a * size_b else "-", f"{distance / size_a:.4g}" if size_a else "-",
    )  # fmt: skip


def _angle_table(
    first: Mapping[LayerKey, LayerSpectrum],
    second: Mapping[LayerKey, LayerSpectrum],
    products: Mapping[LayerKey, float],
    top: int,
) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("", "cosine", "|B| / |A|", "outputs", "inputs")]
    for key in sorted(products, key=lambda key: -first[key].norm * second[key].norm)[:top]:
        a, b = first[key], second[key]
        size = a.norm * b.norm
        if not size:
            continue
        angles = principal_angles(_low_rank(a), _low_rank(b))
        shown = [
            f"{math.degrees(part[0]):.1f} {math.degrees(part[len(part) // 2]):.1f}"
            for part in (angles.outputs, angles.inputs)
        ]
        table.append(
            (".".join(key), f"{products[key] / size:.4f}", f"{b.norm / a.norm:.3f}", *shown)
        )
    return table
