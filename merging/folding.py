"""Sums of whole models with adapters folded in, streamed: a tensor is made when it is read, in fp32 or better, and rounded once.

A model is component -> `Weights` with the keys of the diffusers layout. What rounding did to the update is counted while the tensors pass by.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.diffusion.noise import keyed_generator
from lora_core.errors import UserError
from lora_core.formats.compvis import TEXT_MODEL_LEVEL
from lora_core.formats.layout import ENCODERS, Layout, nearest_name
from lora_core.formats.weights import TensorInfo, Weights, open_network_weights, write_weights
from merging.adapter_sums import LayerKey, Rounding, Term, round_weight, weighted_layers
from merging.adapter_sums import add_updates as add
from merging.factor_sums import WeightedAdapters
from merging.svd import ApproximationReport, Keep, distill_update, total_report

ModelWeights = Mapping[str, Weights]
WEIGHT_PATTERNS = (
    "*.safetensors",
    "*.bin",
    "*.ckpt",
    "*.pt",
    "*.pth",
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.index.json",
)  # files that a rewritten network leaves behind
ONE_TOLERANCE = 1e-6  # a coefficient this near to 1 is 1


@dataclass
class FoldStatistics:
    """What a fold came to; filled while its tensors are read."""

    residual_rank: int = 0  # of the adapter of what rounding lost; 0 makes none
    roundings: dict[LayerKey, Rounding] = field(default_factory=dict)
    ranks: dict[LayerKey, int] = field(default_factory=dict)  # of the folded update
    residual: AdapterState = field(default_factory=AdapterState)
    residual_reports: dict[LayerKey, ApproximationReport] = field(default_factory=dict)

    def add(
        self,
        key: LayerKey,
        exact: Tensor,
        result: Tensor,
        rounding: Rounding,
        weighted: WeightedAdapters,
    ) -> None:
        """Of one layer, however often it is read."""
        if key in self.roundings:
            return
        self.roundings[key], self.ranks[key] = rounding, rank_of_sum(weighted)
        if self.residual_rank:
            groups = max(conv_groups(lr) for _, lr in weighted)
            keep = Keep(rank=math.ceil(self.residual_rank / groups) * groups)
            lost = exact - result.to(exact.dtype)
            adapter, report = distill_update(
                lost, keep, groups=groups, generator=keyed_generator(0, ".".join(key), 0, "sketch")
            )
            self.residual.components.setdefault(key[0], {})[key[1]] = adapter
            self.residual_reports[key] = report

    def reports(self) -> dict[LayerKey, ApproximationReport]:
        """By layer: the update's norm and what the rounded weights miss of it."""
        found = {}
        for key, row in self.roundings.items():
            lost = math.sqrt(max(0.0, row.square - 2 * row.product + row.effective))
            found[key] = ApproximationReport(
                self.ranks[key], self.ranks[key], math.sqrt(row.square), lost
            )
        return found

    @property
    def survived(self) -> float:
        """The share of the update's energy that the rounded weights hold, of all layers together: 1 less the squared relative error, at least 0.

        0 when nothing of it is left, and when rounding did as much as the update.
        """
        return max(0.0, total_report(self.reports().values()).energy)


def open_model_folder(folder: str | Path) -> dict[str, Weights]:
    """The networks of a folder in the diffusers layout that have weights, opened but not read: denoiser, text encoders, VAE.

    Raises UserError for a folder without model_index.json or a network without weights.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} has no model_index.json; give a model in the diffusers layout")
    names = [
        name
        for name in ("unet", "transformer", *ENCODERS, "vae")
        if (folder / name / "config.json").is_file()
    ]
    return {name: open_network_weights(folder / name, network_stem(name)) for name in names}


def rank_of_sum(weighted: WeightedAdapters) -> int:
    """The rank of a sum, as far as it is known without computing it."""
    return sum(
        min(lr.shape[0], torch.Size(lr.shape[1:]).numel())
        if isinstance(lr, DenseUpdate)
        else lr.rank
        for _, lr in weighted
    )


def conv_groups(lr: LowRank | DenseUpdate) -> int:
    return 1 if isinstance(lr, DenseUpdate) else lr.rank // lr.up.shape[1]


def network_stem(component: str) -> str:
    """The name of a network's file of weights in its folder, without its ending."""
    return "model" if component in ENCODERS else "diffusion_pytorch_model"


def weight_key(weights: Weights, layout: Layout, component: str, path: str) -> str:
    """The key of a layer's weight, with or without a level that one library version publishes and another drops. Raises UserError for none."""
    for name in (path, layout.module_path(component, path)):
        if f"{name}.weight" in weights.infos:
            return f"{name}.weight"
    raise UserError(
        f"{weights.source} has no {component} layer {path}; nearest: {nearest_name(f'{path}.weight', weights.infos)}"
    )


def fold_adapters(
    models: Sequence[tuple[float, ModelWeights]],
    terms: Sequence[Term],
    layout: Layout,
    ledger: FoldStatistics,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Weights]:
    """The weighted sum of models with the weighted updates of adapters added to it, as tensors that are made when they are read.

    Each is rounded to `dtype`, or to the first model's, once. A DoRA counts as the update it makes to the sum of the models. What is not floating
    point is the first model's. Raises UserError for models that differ in keys or shapes, and for a layer or component that they do not have;
    reading raises it for numbers that overflow the dtype.
    """
    first = models[0][1]
    parts = {name: [(models[0][0], weights)] for name, weights in first.items()}
    for coefficient, model in models[1:]:
        if set(first) != set(model):
            raise UserError(
                f"one model has {', '.join(first)}, another {', '.join(model)}; only models of one kind can be added"
            )
        for name, weights in first.items():
            parts[name].append((coefficient, _align_keys(name, weights, model[name])))
    places: dict[str, dict[str, tuple[LayerKey, WeightedAdapters]]] = {}
    for key, weighted in weighted_layers(terms):
        component, path = key
        if component not in first:
            raise UserError(
                f"the adapters change {component}, which the model does not have; it has {', '.join(first)}"
            )
        places.setdefault(component, {})[weight_key(first[component], layout, component, path)] = (
            key,
            weighted,
        )
    return {name: _fold_network(parts[name], places.get(name, {}), ledger, dtype) for name in first}


def with_embedding_rows(weights: Weights, key: str, rows: Mapping[int, Tensor]) -> Weights:
    """The same with rows of an embedding table set, which grows where an index lies behind its end (by zeros where indices leave gaps)."""
    shape, dtype = weights.infos[key]
    count = max(shape[0], *(index + 1 for index in rows))

    def read(wanted: str) -> Tensor:
        table = weights.read(wanted)
        if wanted != key:
            return table
        grown = torch.cat([table, table.new_zeros(count - shape[0], *shape[1:])])
        for index, row in rows.items():
            grown[index] = row.to(dtype)
        return grown

    return Weights(
        weights.source, {**weights.infos, key: TensorInfo((count, *shape[1:]), dtype)}, read
    )


def write_model_folder(
    model: ModelWeights,
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model in the diffusers layout, whole or not at all: networks from `model`, everything else copied from the folder `source`.

    `finish` may change the new folder before it gets its name. Raises UserError for an output that exists (unless `overwrite`) and a full disk.
    """
    source, out = Path(source), Path(os.path.abspath(out))
    if out.exists() and not overwrite:
        raise UserError(
            f"{out} is there already; pass --overwrite to replace it, or name another output"
        )
    temporary, old = (
        out.with_name(f".{out.name}.{secrets.token_hex(4)}.{end}") for end in ("tmp", "old")
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(
            source,
            temporary,
            ignore=lambda place, names: _ignored_files(Path(place), names, source, model),
        )
        for name, weights in model.items():
            write_weights(
                temporary / name / f"{network_stem(name)}.safetensors", weights, {"format": "pt"}
            )
        if finish:
            finish(temporary)
        if out.exists():
            out.rename(old)
        temporary.rename(out)
    except (OSError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise UserError(
            f"{out} cannot be written ({reason}); what was there is untouched, free some space or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
    shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)


def edit_json(path: Path, **changes: object) -> None:
    """Changes entries of a JSON file."""
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes, indent=2) + "\n",
        encoding="utf-8",
    )


def _fold_network(
    parts: Sequence[tuple[float, Weights]],
    places: Mapping[str, tuple[LayerKey, WeightedAdapters]],
    ledger: FoldStatistics,
    dtype: torch.dtype | None,
) -> Weights:
    """One network."""
    source, infos = parts[0][1].source, parts[0][1].infos
    to = {
        key: dtype if dtype and info.dtype.is_floating_point else info.dtype
        for key, info in infos.items()
    }
    alone = len(parts) == 1 and abs(parts[0][0] - 1) < ONE_TOLERANCE

    def read(key: str) -> Tensor:
        if not infos[key].dtype.is_floating_point:
            return parts[0][1].read(key)
        base = (
            parts[0][1].read(key)
            if alone
            else _weighted_sum([(c, weights.read(key)) for c, weights in parts])
        )
        if key not in places:
            result = base.to(to[key])
        else:
            layer, weighted = places[key]
            try:
                exact = add(base, weighted)
            except ValueError as error:
                raise UserError(f"{'.'.join(layer)}: {error}") from None
            result, rounding = round_weight(base, exact, to[key])
            ledger.add(layer, exact, result, rounding, weighted)
        if not torch.isfinite(result).all():
            raise UserError(
                f"{key} of {source} holds NaN or Inf as {to[key]}; choose a wider --dtype, or mend the input"
            )
        return result

    return Weights(
        source, {key: TensorInfo(info.shape, to[key]) for key, info in infos.items()}, read
    )


def _weighted_sum(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    exact = [
        (c, tensor.to(torch.promote_types(tensor.dtype, torch.float32))) for c, tensor in parts
    ]
    return torch.stack([c * tensor for c, tensor in exact]).sum(0)


def _align_keys(name: str, first: Weights, other: Weights) -> Weights:
    """`other` under the keys of `first`, which may have a level that the other lacks. Raises UserError naming the first difference in keys or shapes.

    Position numbers, which only older files hold, are no difference.
    """
    plain = {key.removeprefix(TEXT_MODEL_LEVEL): key for key in other.infos}
    names = {
        key: key if key in other.infos else plain.get(key.removeprefix(TEXT_MODEL_LEVEL), "")
        for key in first.infos
    }
    only = [key for key, there in names.items() if not there] + sorted(
        set(other.infos) - set(names.values())
    )
    if only := [key for key in only if not key.endswith("position_ids")]:
        raise UserError(
            f"{first.source} and {other.source} differ in {len(only)} tensors of {name}, such as {only[0]}; are they of one kind?"
        )
    for key, there in names.items():
        a, b = first.infos[key].shape, other.infos[there].shape if there else None
        if b and a != b:
            raise UserError(
                f"{name}.{key} is {list(a)} in {first.source} and {list(b)} in {other.source}; are they of one kind?"
            )
    return Weights(
        other.source,
        {key: other.infos[there] for key, there in names.items() if there},
        lambda key: other.read(names[key]),
    )


def _ignored_files(
    place: Path, names: Sequence[str], source: Path, model: ModelWeights
) -> set[str]:
    """What of a folder is not copied: hidden files, weights of networks that are written anew, single files beside the networks' folders."""
    hidden = {name for name in names if name.startswith(".")}
    if place == source or place.relative_to(source).parts[0] in model:
        hidden |= {
            name for name in names if any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS)
        }
    return hidden
