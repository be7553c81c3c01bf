"""The layers of an adapter as the output's format stores them.

Some formats store several of our layers as one (lora_core.formats.joined_layers). A rank, an error
or a budget is then one of the stored layer, so that sums are joined before they are truncated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.formats import joined_layers
from lora_core.formats.adapter_files import detect_format
from lora_core.formats.known_formats import FORMATS
from lora_core.formats.layout import Layout
from lora_core.formats.recognition import read_key_shapes
from merging.truncation import ApproximationReport, total_report

LayerKey = tuple[str, str]  # component, published path or name of a stored layer


@dataclass(frozen=True)
class StoredLayers:
    """Which of our layers are one in files; without a layout every layer is its own."""

    layout: Layout | None = None
    holds_lycoris: bool = False  # whether the files hold updates that are no product of two factors

    def group_parts(self, keys: Iterable[LayerKey]) -> dict[LayerKey, list[LayerKey]]:
        """Stored layer -> our layers that it holds, in the order of first appearance."""
        if self.layout is None:
            return {key: [key] for key in keys}
        names: dict[str, dict[str, str]] = {}
        groups: dict[LayerKey, list[LayerKey]] = {}
        for component, path in keys:
            if component not in names:
                names[component] = self._stored_names(component)
            key = (component, names[component].get(path, path))
            groups.setdefault(key, []).append((component, path))
        return groups

    def holds(self, key: LayerKey, parts: Iterable[LayerKey]) -> bool:
        """Whether a stored layer is another than its parts: joined, or with swapped halves."""
        return list(parts) != [key] or self._stored_names(key[0]).get(key[1]) == key[1]

    def stack_dense(self, key: LayerKey, updates: Mapping[LayerKey, Tensor]) -> Tensor:
        """The update of a stored layer, from those of its parts."""
        if not self.holds(key, updates):
            return updates[key]
        assert self.layout is not None
        parts = {path: update for (_, path), update in updates.items()}
        return joined_layers.stack_dense(parts, key[1], self.layout.component(key[0]))

    def stack_weighted(
        self, key: LayerKey, parts: Mapping[LayerKey, tuple[float, LowRank]]
    ) -> tuple[float, LowRank]:
        """(weight, factors) of a stored layer, from those of its parts, which are no DoRAs.

        Weights and scales that differ are multiplied into `up`, in fp32 or better.
        """
        if not self.holds(key, parts):
            return parts[key]
        assert self.layout is not None
        weights = {weight for weight, _ in parts.values()}
        scales = {lr.scale for _, lr in parts.values()}
        is_plain = len(weights) == 1 and len(scales) == 1
        own = {}
        for (_, path), (weight, lr) in parts.items():
            own[path] = lr if is_plain else _multiply_into_up(lr, weight * lr.scale)
        joined = joined_layers.stack_factors(own, key[1], self.layout.component(key[0]))
        return (weights.pop() if is_plain else 1.0), joined

    def join_reports(
        self, reports: Mapping[LayerKey, ApproximationReport], state: AdapterState
    ) -> dict[LayerKey, ApproximationReport]:
        """The reports of a state's layers by stored layer, with the ranks that are stored."""
        joined = {}
        for key, parts in self.group_parts(reports).items():
            total = total_report(reports[part] for part in parts)
            if len(parts) > 1:
                factors = [state.components[component][path] for component, path in parts]
                rank = joined_layers.stored_rank(factors)
                total = total._replace(rank=rank, full=total.full * rank // total.rank)
            joined[key] = total
        return joined

    def join_layers(self, state: AdapterState) -> AdapterState:
        """The state in stored layers. Raises UserError for DoRAs that cannot be joined."""
        if self.layout is None:
            return state
        return joined_layers.join_layers(state, self.layout)

    def separate_layers(self, state: AdapterState) -> AdapterState:
        """The state in our layers."""
        if self.layout is None:
            return state
        components = joined_layers.separate_layers(state.components, self.layout, "the result")
        return replace(state, components=components)  # type: ignore[arg-type]

    def _stored_names(self, component: str) -> dict[str, str]:
        if self.layout is None or component not in self.layout.components:
            return {}
        return joined_layers.stored_names(self.layout.component(component))


OWN_LAYERS = StoredLayers()


def stored_layers(format: str, layout: Layout | None) -> StoredLayers:
    """The stored layers of a format of adapter files and a model."""
    own = StoredLayers(None, FORMATS[format].holds_lycoris)
    if layout is None or not FORMATS[format].joins_layers:
        return own
    is_joined = any(part.fused or part.swapped for part in layout.components.values())
    return replace(own, layout=layout) if is_joined else own


def layers_in_file(path: str, layout: Layout | None) -> StoredLayers:
    """The joined layers that the keys of an adapter file name, or the modules of XLabs' trainer."""
    if layout is None or not Path(path).is_file():
        return OWN_LAYERS
    shapes, _ = read_key_shapes(Path(path))
    keys = [key.replace(".", "_") for key in shapes]
    is_every = detect_format(path) == "xlabs"
    components = {}
    for name, part in layout.components.items():
        fused = {}
        for joined, parts in part.fused.items():
            words = joined.replace(".", "_")
            if is_every or any(words in key for key in keys):
                fused[joined] = parts
        components[name] = replace(part, fused=fused, swapped=frozenset())
    return StoredLayers(replace(layout, components=components))


def _multiply_into_up(lr: LowRank, factor: float) -> LowRank:
    wide = lr.up.to(torch.promote_types(lr.up.dtype, torch.float32))
    return LowRank(lr.down, wide * factor, 1.0)
