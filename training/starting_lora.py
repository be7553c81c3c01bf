"""Runs that start from an existing LoRA (--from-lora): its layers, ranks, alphas and token rows.

`resolve_start` reads the file before any weight and puts its ranks into the config, so that the
run's config.toml says them and a resumed run does not need the file; `load_start` puts its numbers
into the adapters and token rows.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import formats, tokens
from lora_core.adapters import injection, targets
from lora_core.adapters.kinds import DoRA, LoRA, kind_class
from lora_core.adapters.targets import matches_pattern
from lora_core.adapters.weight_updates import AdapterState, LowRank, factor_blocks, from_blocks
from lora_core.config import AdapterConfig, Config
from lora_core.errors import UserError
from lora_core.family import Family
from lora_core.formats import embeddings
from lora_core.formats.layout import Layout
from lora_core.placeholders import Placeholder
from lora_core.runs.destination import check_apart_from_inputs
from lora_core.settings import AdapterSpec
from lora_core.toml import read_toml
from models import read_layout
from training.checks import model_checks

HASHED = re.compile(r"(.+)#([0-9a-f]{16})")  # as a config records the file
LayerKey = tuple[str, str]  # component, path in its network


@dataclass(frozen=True)
class StartingFile:
    """The content of the file that a run starts from."""

    source: str  # its path
    digest: str
    layers: dict[LayerKey, LowRank]
    state: AdapterState


def split_digest(name: str) -> tuple[str, str]:
    """(path, digest) of --from-lora; the digest is "" where none is recorded."""
    found = HASHED.fullmatch(name)
    return (found[1], found[2]) if found else (name, "")


# ---------------------------------------------------------------- before the model is read


def resolve_start(config: Config) -> Config:
    """The config with the kind, ranks and alphas of the file that the run starts from.

    A run that is resumed takes them from its config.toml. Raises UserError for a file that does not
    fit the config: its kind, its layers, or its content where one is recorded.
    """
    if not config.from_lora:
        return config
    if is_resumed(config):
        return _resume_start(config)
    path = split_digest(config.from_lora)[0]
    check_apart_from_inputs(config.out, {"--from-lora": path}, overwrite=config.overwrite)
    layout = read_layout(config.model, config.model_config, config.family)
    file = read_start(config, layout)
    adapter = _fit_kind(config.adapter, file)
    config = replace(config, adapter=adapter, from_lora=f"{path}#{file.digest}")
    plan = model_checks.plan_adapters(config, layout)
    wanted = _planned_layers(plan, layout)
    _check_layers(config, file, wanted)
    if config.from_lora_rank == "file" and file.layers:
        own = _file_ranks(config.adapter, file, layout, missing=wanted - file.layers.keys())
        config = replace(config, adapter=own)
    return config


def is_resumed(config: Config) -> bool:
    """Whether the run goes on from a checkpoint, which has all that it started from."""
    folder = Path(config.out) / "checkpoints"
    if not config.resume or not folder.is_dir():
        return False
    return any(checkpoint.name.isdigit() for checkpoint in folder.iterdir())


def _resume_start(config: Config) -> Config:
    """The config with what its first start recorded, if that was from this file."""
    recorded: Config = read_toml(Path(config.out) / "config.toml")
    if split_digest(recorded.from_lora)[0] != split_digest(config.from_lora)[0]:
        return config  # the checkpoint tells the difference
    was, adapter = recorded.adapter, replace(config.adapter, kind=recorded.adapter.kind)
    if config.from_lora_rank == recorded.from_lora_rank == "file":
        adapter = replace(adapter, rank=was.rank, alpha=was.alpha)
        adapter = replace(adapter, rank_pattern=was.rank_pattern, alpha_pattern=was.alpha_pattern)
    return replace(config, adapter=adapter, from_lora=recorded.from_lora)


def read_start(config: Config, layout: Layout) -> StartingFile:
    """The file of --from-lora. Raises UserError for one that is not a LoRA or DoRA, or not the
    recorded one.
    """
    source, digest = split_digest(config.from_lora)
    state = formats.load(source, layout)
    found = _hash_state(state)
    if digest and digest != found:
        raise UserError(
            f"{source} is not the file that the config was written for: its tensors have the hash "
            f"{found}, not {digest}; give that file, or leave #{digest} out of --from-lora"
        )
    if any(state.dense.values()) or any(state.parameters.values()):
        raise UserError(
            f"{source} changes more than a LoRA or DoRA does (LyCORIS' products, norms or biases), "
            "and a run starts from those two only; merge.py convert --as lora makes a LoRA of it"
        )
    layers: dict[LayerKey, LowRank] = {}
    for component, own in state.components.items():
        for path, lr in own.items():
            layers[component, layout.module_path(component, path)] = _positive_scale(lr)
    return StartingFile(source, found, layers, state)


def _hash_state(state: AdapterState) -> str:
    """16 hexadecimal digits of the tensors of a file, whatever its format."""
    content = hashlib.blake2b(digest_size=8)
    named: dict[str, Any] = {f"token {name}": rows for name, rows in state.tokens.items()}
    for component, own in state.updates().items():
        for path, update in own.items():
            parts = update._asdict() if isinstance(update, LowRank) else dict(update.tensors)
            named |= {f"{component}.{path}.{role}": part for role, part in parts.items()}
    for name, part in sorted(named.items()):
        content.update(name.encode())
        numbers = (
            part.double().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode()
        )
        content.update(numbers)
    return content.hexdigest()


def _positive_scale(lr: LowRank) -> LowRank:
    """The same update with a scale above 0, as alphas have."""
    if lr.scale > 0:
        return lr
    sign = -1.0 if lr.scale < 0 else 0.0
    return lr._replace(up=sign * lr.up, scale=abs(lr.scale) or 1.0)


def _fit_kind(adapter: AdapterConfig, file: StartingFile) -> AdapterConfig:
    """The settings with the kind of the file's layers; a DoRA makes a DoRA of a LoRA."""
    with_magnitude = {lr.magnitude is not None for lr in file.layers.values()}
    if len(with_magnitude) == 2:
        raise UserError(
            f"{file.source} has LoRAs on some layers and DoRAs on others, and a run has one kind; "
            "merge.py convert --as lora makes a LoRA of it"
        )
    if with_magnitude == {True}:
        if adapter.kind == "lora":
            print(f"{file.source} is a DoRA, so --adapter.kind is dora")
            return replace(adapter, kind="dora")
        if adapter.kind != "dora":
            _refuse_kind(adapter, file, "a DoRA")
    elif with_magnitude == {False}:
        kind: Any = kind_class(adapter.kind)
        own = [getattr(kind, name, None) for name in ("factors", "load")]
        if issubclass(kind, DoRA) or own != [LoRA.factors, LoRA.load]:
            _refuse_kind(adapter, file, "a LoRA")
    return adapter


def _refuse_kind(adapter: AdapterConfig, file: StartingFile, what: str) -> None:
    raise UserError(
        f"{file.source} is {what}, whose factors --adapter.kind {adapter.kind} cannot start from; "
        "leave --adapter.kind out"
    )


def _planned_layers(plan: Mapping[str, AdapterSpec], layout: Layout) -> set[LayerKey]:
    """The layers that get adapters."""
    found: set[LayerKey] = set()
    for component, spec in plan.items():
        part = layout.component(component)
        paths = [path.removeprefix(part.module_prefix) for path in part.shapes]
        for path in targets.select_paths(paths, spec.targets, spec.exclude):
            found.add((component, path))
    return found


def _check_layers(config: Config, file: StartingFile, wanted: set[LayerKey]) -> None:
    """Print which layers the file and the targets do not share. Raises UserError for layers of the
    file that get no adapter, unless --adapter.exclude names them.
    """
    lost: list[LayerKey] = []
    excluded: list[LayerKey] = []
    for key in file.layers.keys() - wanted:
        is_excluded = any(matches_pattern(key[1], glob) for glob in config.adapter.exclude)
        (excluded if is_excluded else lost).append(key)
    if lost:
        component, path = min(lost)
        is_text = component.startswith("text_encoder")
        option, other = ("text-targets", "unet") if is_text else ("targets", "attn")
        raise UserError(
            f"{file.source} adapts {_count_layers(len(lost))} that get no adapter here, such as "
            f"{component}.{path}, and would be lost: widen --adapter.{option} (and train their "
            "network in a stage), leave them out with --adapter.exclude, or take a part of the "
            f'file: merge.py mix "{file.source}@{other}"'
        )
    if excluded:
        print(f"{_count_layers(len(excluded))} of {file.source} left out, by --adapter.exclude")
    missing = wanted - file.layers.keys()
    if missing and file.layers:
        component, path = min(missing)
        print(
            f"{_count_layers(len(missing))} of {len(wanted)} not in {file.source}, such as "
            f"{component}.{path}: new adapters of rank {config.adapter.rank}"
        )


def _count_layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _file_ranks(
    adapter: AdapterConfig, file: StartingFile, layout: Layout, *, missing: set[LayerKey]
) -> AdapterConfig:
    """The settings with the file's rank and alpha of each layer: the most frequent ones as rank and
    alpha, where all layers are in the file, and patterns for the others.
    """
    found: dict[LayerKey, tuple[int, float]] = {}
    for (component, path), lr in file.layers.items():
        _check_full_rank(file, component, path, lr, layout)
        found[component, path] = lr.rank, lr.scale * _alpha_divisor(adapter, lr.rank)
    rank, alpha = adapter.rank, adapter.alpha
    ranks: dict[str, float] = dict(adapter.rank_pattern) if missing else {}
    alphas: dict[str, float] = dict(adapter.alpha_pattern) if missing else {}
    if not missing:
        (rank, alpha), _ = Counter(found.values()).most_common(1)[0]
    for (_, path), own in found.items():
        if missing or own != (rank, alpha):
            ranks[path], alphas[path] = float(own[0]), own[1]
    own_settings = replace(
        adapter, rank=rank, alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas
    )
    for (component, path), lr in file.layers.items():
        spec = injection.layer_spec(own_settings, path)
        if spec.rank != lr.rank or not math.isclose(spec.scale, lr.scale, rel_tol=1e-9):
            raise UserError(
                f"{file.source} has other ranks or alphas for {component}.{path} than for a layer "
                "of the same name in another network, which one config cannot say; give "
                "--from-lora-rank adapter"
            )
    usual, count = Counter(found.values()).most_common(1)[0]
    words = f"rank {usual[0]}, alpha {usual[1]:g}"
    words += f", others on {len(found) - count}" if count < len(found) else ""
    print(f"{file.source}: {_count_layers(len(found))} keep their ranks and alphas ({words})")
    return own_settings


def _alpha_divisor(adapter: AdapterConfig, rank: int) -> float:
    return math.sqrt(rank) if adapter.rslora else rank


def _check_full_rank(
    file: StartingFile, component: str, path: str, lr: LowRank, layout: Layout
) -> None:
    """Raises UserError for a rank above that of a layer's weight, as sums of files have."""
    part = layout.component(component)
    out, *inner = part.shapes[part.module_prefix + path]
    if lr.rank > min(out, math.prod(inner)):
        raise UserError(
            f"{file.source} has rank {lr.rank} at {component}.{path}, more than its weight "
            f"{[out, *inner]} has; give --from-lora-rank adapter, or merge.py resize it"
        )


# ---------------------------------------------------------------- with the model


def load_start(
    config: Config,
    family: Family,
    adapted: Mapping[str, nn.Module],
    placeholders: Sequence[Placeholder],
    learned: Mapping[str, tokens.LearnedEmbedding],
) -> None:
    """Put the file's factors and token rows into a run that begins."""
    if not config.from_lora or is_resumed(config):
        return
    file = read_start(config, family.layout)
    lost, whole = 0.0, 0.0
    for component, module in adapted.items():
        current = injection.adapter_factors(module)
        for (name, path), lr in file.layers.items():
            if name == component and path in current:
                current[path], missed, size = fit_rank(lr, current[path], file.source)
                lost, whole = lost + missed, whole + size
        injection.load_factors(module, current)
    if lost:
        error = math.sqrt(lost / whole)
        print(f"{file.source} is cut to --adapter.rank: relative error {error:.2e} of its update")
    if file.state.tokens:
        print(_load_rows(file, family, placeholders, learned))


def fit_rank(lr: LowRank, own: LowRank, source: str) -> tuple[LowRank, float, float]:
    """(the factors at the rank and scale of `own`, squared norm of what is lost, of the update).

    A larger rank keeps the update exactly: the further rows of down are those of `own`, and their
    columns of up zero. A smaller one is the nearest update of that rank (Eckart-Young). Raises
    UserError for a DoRA, whose update is not low rank, at a smaller rank.
    """
    lr = lr._replace(down=lr.down.reshape(len(lr.down), *own.down.shape[1:]))
    if lr.rank == own.rank and math.isclose(lr.scale, own.scale, rel_tol=1e-9):
        up = lr.up.reshape(own.up.shape)
        return lr._replace(up=up, scale=own.scale), 0.0, 1.0
    ups, downs = (block.double() for block in factor_blocks(lr))
    ups = ups * (lr.scale / own.scale)
    own_ups, own_downs = (block.double() for block in factor_blocks(own))
    count = own_downs.shape[1]
    lost, size = 0.0, 1.0
    if downs.shape[1] > count:
        if lr.magnitude is not None:
            raise UserError(
                f"{source} is a DoRA of rank {lr.rank}, which cannot be cut to {own.rank}: what it "
                "does depends on the weight; leave --from-lora-rank out, or raise --adapter.rank"
            )
        ups, downs, values = _truncate(ups, downs, count)
        lost, size = float(values[:, count:].square().sum()), float(values.square().sum())
    own_ups = torch.zeros_like(own_ups)
    own_ups[:, :, : ups.shape[2]], own_downs[:, : downs.shape[1]] = ups, downs
    kernel = tuple(own.down.shape[2:])
    fitted = from_blocks(own_ups, own_downs, kernel, scale=own.scale)
    return fitted._replace(magnitude=lr.magnitude), lost, size


def _truncate(ups: Tensor, downs: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factors [g, out, k], [g, k, in] nearest to ups @ downs, and all its singular values."""
    left, upper = torch.linalg.qr(ups)
    right, lower = torch.linalg.qr(downs.mT)
    u, values, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    root = values[:, :count].sqrt()
    cut_ups = left @ u[:, :, :count] * root[:, None]
    return cut_ups, root[:, :, None] * (v[:, :count] @ right.mT), values


def _load_rows(
    file: StartingFile,
    family: Family,
    placeholders: Sequence[Placeholder],
    learned: Mapping[str, tokens.LearnedEmbedding],
) -> str:
    """Put the file's token rows of the words that it shares with the run in place; says which."""
    words = embeddings.placeholder_words(file.state, file.source)
    layers = embeddings.word_layers(file.state, file.source)
    places = {name: i for i, name in enumerate(file.state.token_names)}
    taken: dict[str, None] = {}
    for component, embedding in learned.items():
        rows = file.state.tokens.get(family.layout.encoders[component])
        if rows is None or rows.shape[1] != embedding.rows.shape[1]:
            continue
        for own in placeholders:
            names = words.get(own.word, ())
            if len(names) == len(own.names) and layers.get(own.word, 0) == own.layers:
                for name, there in zip(own.names, names):
                    row = rows[places[there]].to(embedding.rows)
                    embedding.rows.data[embedding.names.index(name)] = row
                    embedding.initial[embedding.names.index(name)] = row
                taken[own.word] = None
    known = ", ".join(words) or ", ".join(file.state.token_names)
    if not taken:
        return (
            f"the learned tokens of {file.source} ({known}) are not read: no stage trains tokens "
            "of such a word, in that number"
        )
    return f"{', '.join(taken)} starts from the learned tokens of {file.source} ({known})"
