"""Checks of a config against its data and its model: targets, captions, tokens, sizes."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lora_core import formats
from lora_core.adapters import custom_files, injection, kind_laws, targets
from lora_core.adapters.adapted_layer import Adapted, adapted_layers
from lora_core.adapters.kinds import KINDS, kind_class, kind_options
from lora_core.adapters.kronecker import LoKr
from lora_core.adapters.targets import matches_pattern, require_match
from lora_core.adapters.weight_updates import DenseUpdate
from lora_core.config import AdapterConfig, Config, SamplesConfig
from lora_core.data import dataset
from lora_core.errors import UserError
from lora_core.placeholders import Placeholder, bind_placeholders, has_placeholder, truncated_tokens
from lora_core.settings import AdapterSpec
from models import Family, Layout
from models.flow import check_guidance
from training.checks.family_checks import check_family

MOST_ZOOM = 2.5  # between the images of a run and those that the model was made for

# ---------------------------------------------------------------- adapters


def plan_adapters(c: Config, layout: Layout) -> dict[str, AdapterSpec]:
    """Component -> spec of its adapters, from the names of the model's layers; needs no weights.

    A pattern of [adapter] has to match in one of the components, not in all. Raises UserError for a
    target that matches nothing, and for options of models of another family.
    """
    check_family(c, layout)
    check_learners(c, layout)
    chosen = _choose_targets(c, layout)
    everywhere = list(chain.from_iterable(paths for _, paths in chosen.values()))
    a = c.adapter
    patterns = {
        "adapter.exclude": a.exclude,
        "adapter.rank-pattern": a.rank_pattern,
        "adapter.alpha-pattern": a.alpha_pattern,
        "optimizer.lr-pattern": c.optimizer.lr_pattern,
    }
    for option, globs in patterns.items():
        for glob in globs:
            require_match(glob, everywhere, f"--{option}")
    specs = {name: _component_spec(a, *found) for name, found in chosen.items()}
    kind = kind_class(a.kind)
    a.refuse_unread(kind_options(kind))
    if getattr(kind, "reads_level", False) and any(name in layout.encoders for name in specs):
        raise UserError(
            f"--adapter.kind {a.kind} reads the noise level, which a text encoder has not; train "
            "no text_encoder in a stage"
        )
    return specs


def check_learners(c: Config, layout: Layout) -> None:
    """Raises UserError for a stage that trains tokens of a model whose text encoders learn none."""
    if c.trains("tokens") and not layout.encoders:
        raise UserError(
            f"no text encoder of the family {layout.family} learns tokens; leave the group tokens "
            "out of the stages"
        )


def check_attention(layout: Layout, name: str) -> None:
    """Raises UserError for a loss or measure `name` that reads attention maps, where the model has
    none: its denoiser reads a text encoder's states that no word can be followed to.
    """
    if not layout.encoders:
        raise UserError(
            f"{name} reads the attention on words of a caption, which a model of the family "
            f"{layout.family} does not record; choose another loss"
        )


def _choose_targets(c: Config, layout: Layout) -> dict[str, tuple[tuple[str, ...], list[str]]]:
    """Component that trains -> (globs, paths of the layers that they match).

    Raises UserError for a group that has no component with presets.
    """
    texts = [name for name in layout.presets if name in layout.encoders]
    denoisers = [name for name in layout.presets if name not in layout.encoders]
    wanted: dict[str, tuple[str, ...]] = {}
    if c.trains("denoiser"):
        wanted |= dict.fromkeys(denoisers, c.adapter.targets)
    if c.trains("text_encoder"):
        if not texts:
            raise UserError(
                f"no text encoder of the family {layout.family} takes adapters; leave the group "
                "text_encoder out of the stages"
            )
        wanted |= dict.fromkeys(texts, c.adapter.text_targets)
    return {name: _match_targets(layout, name, names) for name, names in wanted.items()}


def _match_targets(
    layout: Layout, component: str, names: Sequence[str]
) -> tuple[tuple[str, ...], list[str]]:
    """(globs, layers) that the targets match in a component."""
    presets = layout.presets[component]
    part = layout.component(component)
    paths = [path.removeprefix(part.module_prefix) for path in part.shapes]
    globs: list[str] = []
    for name in names:
        is_word = name not in presets and re.fullmatch(r"[\w-]+", name)
        if is_word and not any(matches_pattern(path, name) for path in paths):
            raise UserError(
                f"{name!r} is no layer of {component} and none of its presets, "
                f"which are {', '.join(presets)}"
            )
        globs += presets.get(name, (name,))
    return tuple(globs), targets.select_paths(paths, globs)


def _component_spec(a: AdapterConfig, globs: tuple[str, ...], paths: Sequence[str]) -> AdapterSpec:
    """The adapters of one component: its globs, and those patterns that match one of its paths."""

    def is_here(pattern: str) -> bool:
        return any(matches_pattern(path, pattern) for path in paths)

    values = {f.name: getattr(a, f.name) for f in fields(AdapterSpec)}
    values["targets"] = globs
    values["exclude"] = tuple(filter(is_here, a.exclude))
    for table in ("rank_pattern", "alpha_pattern"):
        values[table] = {glob: x for glob, x in getattr(a, table).items() if is_here(glob)}
    return AdapterSpec(**values)


def report_adapters(
    c: Config, trained: Mapping[str, torch.nn.Module], paths: Mapping[str, Sequence[str]]
) -> bool:
    """Print the adapters' layers and numbers of parameters; returns whether adapter files can hold
    them. Where diffusers' or no file can, prints which files are written instead.

    Raises UserError for adapters that could not be written in any form, and for a scale that no
    LoKr has.
    """
    if c.adapter.kind not in KINDS:
        kind_laws.check_kind_laws(trained, c.adapter.kind)
    has_factors = all(custom_files.has_factors(module) for module in trained.values())
    rank = f", rank {c.adapter.rank}" if has_factors else ""
    for name, module in trained.items():
        count = sum(p.numel() for p in injection.adapter_parameters(module))
        table = targets.target_table if c.list_targets else targets.target_summary
        layers = table(paths[name])
        print(f"{name}: {c.adapter.kind}{rank}, {count:,} parameters on {layers}")
    run = Path(c.out).resolve().name
    if not has_factors:
        custom_files.check_custom_kind(trained, c.adapter.kind, run)
    found = _adapted_layers(trained)
    adapters = [layer.adapter("default") for layer in found]
    if has_factors and found:
        first = injection.stored_update(adapters[0], found[0].base)
        if isinstance(first, DenseUpdate):
            _report_products(c.adapter, adapters, run)
    return has_factors


def _adapted_layers(trained: Mapping[str, torch.nn.Module]) -> list[Adapted]:
    return list(chain.from_iterable(map(adapted_layers, trained.values())))


def _report_products(a: AdapterConfig, adapters: Sequence[Any], run: str) -> None:
    """Print the file of a run whose updates diffusers' format cannot hold, and the LoKr without a
    rank. Raises UserError for a scale where none has one.
    """
    whole = [adapter for adapter in adapters if isinstance(adapter, LoKr) and adapter.is_whole]
    if whole:
        print(
            f"{len(whole)} of {len(adapters)} layers have a whole w2 and scale 1: the rank is half "
            "of its larger side or more"
        )
    for option in ("alpha", "alpha_pattern", "rslora"):
        if len(whole) == len(adapters) and getattr(a, option):
            raise UserError(
                f"--adapter.{option.replace('_', '-')} has no effect: every LoKr has a whole w2, "
                "whose scale is 1; leave it out or lower --adapter.rank"
            )
    print(
        f"the run writes {run}.safetensors, under LyCORIS' names; diffusers' file "
        f"{formats.NATIVE} cannot hold a {a.kind}"
    )


# ---------------------------------------------------------------- the model


def check_model(c: Config, family: Family) -> None:
    """Raises UserError for options that this model does not support or that have no effect on it.

    Prints how dropped captions are encoded.
    """
    _check_sizes(c, family)
    if c.noise.zero_terminal_snr and family.prediction == "epsilon":
        raise UserError(
            "--noise.zero-terminal-snr: at pure noise epsilon carries no information on the image; "
            "add --noise.prediction v_prediction"
        )
    if family.schedule.kind != "flow" and (c.noise.dynamic_shift or c.noise.shift != 1):
        raise UserError(
            "--noise.shift and --noise.dynamic-shift have no effect on this model, "
            "which is no flow model; leave them out"
        )
    if c.noise.dynamic_shift and not getattr(family, "has_dynamic_shift", True):
        raise UserError(
            "--noise.dynamic-shift has no effect on this model, whose shift is the same at every "
            "resolution; leave it out, or give --noise.shift"
        )
    reads_guidance = getattr(family, "reads_guidance", family.distilled_guidance)
    if c.noise.guidance != Config().noise.guidance and not reads_guidance:
        raise UserError(
            "--noise.guidance has no effect on this model, which takes no guidance scale as an "
            "input; leave it out"
        )
    if c.data.dropped != "model" and not family.zeros:
        raise UserError(
            f"--data.dropped {c.data.dropped} has no effect on this model, "
            "which samples an empty prompt with its encoding; leave it out"
        )
    if c.data.mask_use != "loss" and not family.inpainting:
        raise UserError(
            f"--data.mask-use {c.data.mask_use} has no effect on this model, which paints no "
            "holes; take an inpainting model (9 input channels) or leave it out"
        )
    if c.data.pairs and family.inpainting:
        raise UserError(
            "--data.pairs compares two images under one condition, and an inpainting model would "
            "see the surroundings of each; take another model or leave it out"
        )
    check_guidance(family, "--samples.guidance", c.samples.guidance, SamplesConfig().guidance)
    if c.samples.negative and family.distilled_guidance:
        raise UserError(
            "--samples.negative has no effect on a guidance-distilled model; leave it out"
        )
    if c.data.caption_dropout:
        encoding = "zeros" if drops_to_zeros(c, family) else "the encoding of the empty prompt"
        print(f"dropped captions: {encoding}")


def _check_sizes(c: Config, family: Family) -> None:
    """Raises UserError for image sides that are no multiple of the model's, and for more validation
    bins than it has timesteps.
    """
    sides = {"resolution": c.data.resolution}
    if c.data.buckets:
        sides["bucket-step"] = c.data.bucket_step
    for option, side in sides.items():
        if side % family.multiple:
            raise UserError(
                f"--data.{option} {side} is not a multiple of {family.multiple}, "
                "which the sides of this model's images must be"
            )
    largest = getattr(family, "largest", c.data.resolution)
    if c.data.resolution > largest:
        raise UserError(
            f"--data.resolution {c.data.resolution} is more than {largest}, the largest side of "
            "this model's images; lower it"
        )
    timesteps = len(family.schedule)
    if c.validation.every >= 0 and c.validation.bins > timesteps:
        raise UserError(
            f"--validation.bins is {c.validation.bins}, more than the {timesteps} timesteps of "
            "this model, each of which is a bin of its own then; lower it"
        )


def drops_to_zeros(c: Config, family: Family) -> bool:
    """Whether dropped captions are encoded as zeros."""
    return c.data.caption_dropout > 0 and bool(family.zeros) and c.data.dropped != "empty"


# ---------------------------------------------------------------- captions and tokens


def check_masks(c: Config, images: dataset.ImageDataset) -> None:
    """Raises UserError where --data.masks finds no mask for any image."""
    if c.data.masks in ("auto", "any") and not images.has_masks:
        raise UserError(
            f"--data.masks {c.data.masks} finds no mask for any image; "
            "add NAME.mask.png next to NAME or leave --data.masks out"
        )


def swap_words(caption: str, swap: Mapping[str, str]) -> str:
    """The caption with each placeholder word replaced by its class."""
    classes = [Placeholder(word, (name,)) for word, name in swap.items()]
    return bind_placeholders(caption, classes)


def token_initializers(c: Config) -> dict[str, str]:
    """Placeholder word -> its initializer.

    Raises UserError for a repeated word, and unless there is one initializer for all or one each.
    """
    words, inits = c.tokens.words, c.tokens.init
    if len(set(words)) != len(words):
        raise UserError(f"--tokens.words has a word twice: {' '.join(words)}")
    if len(inits) not in (1, len(words)):
        raise UserError(
            f"--tokens.init has {len(inits)} entries for {len(words)} words; "
            "give one for all or one each"
        )
    return dict(zip(words, inits if len(inits) == len(words) else inits * len(words)))


def check_placeholder(records: Sequence[dataset.Record], word: str) -> None:
    """Raises UserError when no caption has the placeholder word; prints a warning with the number
    of images when some lack it.
    """
    captions = chain.from_iterable(record.captions for record in records)
    if not any(has_placeholder(caption, word) for caption in captions):
        raise UserError(
            f"no caption has the placeholder word {word}, so its tokens would learn nothing; "
            "write it into the captions or set --tokens.words"
        )
    if lacking := dataset.images_missing_word(records, word):
        total = len({record.path for record in records})
        print(
            f"warning: {len(lacking)} of {total} images have captions without the placeholder word "
            f"{word}, first {lacking[0].name}",
            file=sys.stderr,
        )


def check_token_limit(
    family: Family,
    embeddings: Mapping[str, Any],
    placeholders: Sequence[Placeholder],
    records: Sequence[dataset.Record],
) -> None:
    """Raises UserError for a learned token that is truncated in every caption, beyond the text
    encoder's token limit; prints a warning where it is truncated in some.

    `embeddings`: the text encoders that learn token rows, by name.
    """
    if not embeddings:
        return
    image_of: dict[str, str] = {}  # caption -> name of the first image that has it
    for record in records:
        for caption in record.captions:
            image_of.setdefault(caption, record.path.name)
    limits = token_limits(family)
    for name in embeddings:
        tokenizer, limit = family.tokenizers[name], limits[name]
        # caption -> token -> whether it is cut off
        found = {
            caption: truncated_tokens(caption, placeholders, tokenizer, limit)
            for caption in image_of
        }
        reader = f"the {limit} tokens that {name} reads"
        cut = [caption for caption, is_cut in found.items() if any(is_cut.values())]
        for placeholder in placeholders:
            for token in placeholder.names:
                lost = [is_cut[token] for is_cut in found.values() if token in is_cut]
                if lost and all(lost):
                    raise UserError(
                        f"the token {token} of {placeholder.word} lies beyond {reader} in every "
                        f"caption, first of {image_of[cut[0]]}, so it would learn nothing; write "
                        f"{placeholder.word} nearer the beginning or shorten the captions"
                    )
        if cut:
            print(
                f"warning: {len(cut)} of {len(image_of)} captions lose learned tokens beyond "
                f"{reader}, first of {image_of[cut[0]]}; "
                "write the placeholder word nearer the beginning",
                file=sys.stderr,
            )


def describe_far_resolution(c: Config, side: int) -> str:
    """The sentence about images that are far from the `side` of the model's own; "" if near."""
    own = c.data.resolution
    if max(own, side) <= MOST_ZOOM * min(own, side):
        return ""
    return f"--data.resolution {own}, and {c.model} was made for {side} pixels"


def token_limits(family: Family) -> dict[str, int]:
    """Text encoder -> the number of tokens that it reads."""
    wide = [rows for rows in family.tokenize([""]).values() if rows.ndim == 2]
    ids = wide[: len(family.tokenizers)]  # in the tokenizers' order; masks are behind them
    return {name: rows.shape[1] for name, rows in zip(family.tokenizers, ids, strict=True)}
