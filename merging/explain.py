"""merge.py explain: the mixture of adapters that a checkpoint is most likely made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats.model_folders import parameter_key
from merging.adapter_sums import LayerKey, has_magnitude
from merging.base_models import BaseModel, base_weight_reader, layer_keys, open_base_model
from merging.byte_progress import count_items
from merging.commands import Explain
from merging.compare import GramSums, LeastSquaresFit, fit_coefficients, gram_sums, vector_sums
from merging.factor_sums import one_thread
from merging.opening import open_adapter
from merging.output import align_columns
from merging.parameter_sums import parameters_by_key


def run_explain(options: Explain) -> None:
    """Prints the sum of adapters nearest to checkpoint - base, and the unexplained share."""
    tuned = open_base_model(options.checkpoint, options.files)
    base = open_base_model(options.base, options.files)
    states = [open_adapter(path, base.layout, options.files) for path in options.loras]
    for state, path in zip(states, options.loras):
        if has_magnitude(state):
            raise UserError(
                f"{path} is a DoRA, whose update is not linear in its weight; "
                "explain takes plain LoRAs"
            )
    sums = _sums_by_component(base, tuned, states)
    layers = list(itertools.chain.from_iterable(sums.values()))
    sums["total"] = layers
    fits = {name: fit_coefficients(own) for name, own in sums.items()}
    squares = {name: sum(layer.square for layer in own) for name, own in sums.items()}
    if not squares["total"]:
        raise UserError(
            f"{tuned.path} and {base.path} do not differ in any of {len(layers)} layers; there is "
            "nothing to explain"
        )
    numbers = [f"L{i}" for i in range(1, len(states) + 1)]
    for number, path in zip(numbers, options.loras):
        print(f"{number} = {path}")
    table: list[tuple[str, ...]] = [("", "|difference|", "unexplained", *numbers)]
    for name, fit in fits.items():
        if squares[name]:
            table.append((name, *_fit_cells(fit, squares[name])))
    print("\n".join(align_columns(table)))
    _print_equation(tuned, base, options.loras, fits["total"])


def _sums_by_component(
    base: BaseModel, tuned: BaseModel, states: Sequence[AdapterState]
) -> dict[str, list[GramSums]]:
    """The inner products of the difference and the adapters, layer by layer.

    Of norms and biases those that an adapter changes are compared.
    """
    before, after = base_weight_reader(base), base_weight_reader(tuned)
    sums: dict[str, list[GramSums]] = {}
    with one_thread():
        keys = layer_keys(base)
        sized = [(key, base.layer_bytes(key) + tuned.layer_bytes(key)) for key in keys]
        for component, path in count_items(sized, sum(size for _, size in sized), "explain"):
            old, new = before(component, path), after(component, path)
            _check_shapes((component, path), old, new, base, tuned)
            adapters = [state.components.get(component, {}).get(path) for state in states]
            layer = gram_sums(new.double() - old.double(), adapters)
            sums.setdefault(component, []).append(layer)
    vectors = [parameters_by_key(state) for state in states]
    for key in dict.fromkeys(itertools.chain.from_iterable(vectors)):
        old, new = [_read_parameter(model, key) for model in (base, tuned)]
        _check_shapes(key, old, new, base, tuned)
        given = [own.get(key) for own in vectors]
        sums.setdefault(key[0], []).append(vector_sums(new.double() - old.double(), given))
    return sums


def _read_parameter(model: BaseModel, key: LayerKey) -> Tensor:
    weights = model.model[key[0]]
    return weights.read(parameter_key(weights, model.layout, *key))


def _check_shapes(
    key: LayerKey, old: Tensor, new: Tensor, base: BaseModel, tuned: BaseModel
) -> None:
    if old.shape != new.shape:
        raise UserError(
            f"{'.'.join(key)} is {list(new.shape)} in {tuned.path} and {list(old.shape)} in "
            f"{base.path}; are they of one kind?"
        )


def _fit_cells(fit: LeastSquaresFit, square: float) -> list[str]:
    cells = [f"{math.sqrt(square):.4g}", f"{100 * fit.unexplained:.3f} %"]
    return cells + [f"{c:.4f}" for c in fit.coefficients.tolist()]


def _print_equation(
    tuned: BaseModel, base: BaseModel, paths: Sequence[str], fit: LeastSquaresFit
) -> None:
    terms = []
    for c, path in zip(fit.coefficients.tolist(), paths):
        terms.append(f"{'-' if c < 0 else '+'} {abs(c):.4g}*{path}")
    print(
        f"{tuned.path} = {base.path} {' '.join(terms)}, and {100 * fit.unexplained:.3g} % of the "
        "difference's norm in addition"
    )
