"""Which layers of a file count in a sum, and how much: what stands after the @ of a recipe.

@attn   @text   @conv,ff=0.5   @~conv            groups, components, globs, blocks, with commas between them; a ~ takes away
@down_blocks.*.attn2.*                           a glob over "component.path" or its end from a dot on
@IN04,MID,OUT03=0.5                              blocks of the UNet; BASE are the text encoders
@1,0,0,0.5,...   @[1, 0, ...]   @OUTD            block weights as lists of 12, 17, 20 or 26 numbers, or A1111's name of such a list
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import cache

from lora_core.adapters.targets import matches_pattern, nearest_paths
from lora_core.errors import UserError
from lora_core.formats.layout import ENCODERS, Layout
from merging.block_weights import BLOCKS, LayerFactor, factor_by_block, parse_block_weights

LayerKeys = Collection[tuple[str, str]]  # (component, published path)

LAYER_GROUPS: dict[str, tuple[str, ...]] = {  # name -> globs
    "attn": ("*.attn.*", "*.attn?.*", "*.self_attn.*", "*.SelfAttention.*"),
    "self": ("*.attn1.*", "*.self_attn.*", "*.SelfAttention.*"),
    "cross": ("*.attn2.*",),
    "ff": ("*.ff.*", "*.ff_context.*", "*.mlp.*", "*.proj_mlp", "*.DenseReluDense.*"),
    "conv": ("*.conv1", "*.conv2", "*.conv_shortcut", "*samplers.*.conv", "conv_in", "conv_out"),
    "unet": ("unet.*", "transformer.*"),
    "text": tuple(f"{name}.*" for name in ENCODERS),
}
PRESET_LENGTH = 17  # length of the lists below
BLOCK_PRESETS = {  # A1111's extension of LoRA block weights: name -> the ones of its list of 17, beside the first, BASE
    "INS": range(1, 4), "IND": range(4, 7), "INALL": range(1, 7),
    "MIDD": range(4, 12), "OUTD": range(8, 12), "OUTS": range(12, 17), "OUTALL": range(8, 17),
}  # fmt: skip


def parse_layer_choice(text: str, keys: LayerKeys, layout: Layout | None = None) -> LayerFactor:
    """The factor of each layer's weight that a choice says. `keys` are the layers of the file it stands behind, `layout` those of its model.

    Raises UserError for a part that matches no layer (with the nearest), a list of another length than the model's, and blocks without a layout.
    """
    numbers = re.fullmatch(r"\[.*\]|[-+\d.eE\s]+(,[-+\d.eE\s]+)+", text)
    if numbers or (text in BLOCK_PRESETS and text not in BLOCKS):
        return _parse_block_list(text, layout)
    parts = [part.strip() for part in text.split(",")]
    tables = [_parse_part(part, keys, layout) for part in parts]
    default = 1.0 if all(part.startswith("~") for part in parts) else 0.0

    @cache
    def weight(component: str, path: str) -> float:
        found = [value for holds, value in tables if holds(component, path)]
        return found[-1] if found else default

    return weight


def multiply_factors(shares: Collection[LayerFactor]) -> LayerFactor:
    """All of them together."""

    def weight(component: str, path: str) -> float:
        result = 1.0
        for one in shares:
            result *= one(component, path)
        return result

    return weight


def _parse_block_list(text: str, layout: Layout | None) -> LayerFactor:
    layout = _require_blocks(text, layout)
    if text in BLOCK_PRESETS:
        if PRESET_LENGTH not in layout.block_lists:
            raise UserError(
                f"{text} is a list of {PRESET_LENGTH} block weights; this model takes {' or '.join(map(str, layout.block_lists))} numbers"
            )
        text = ",".join(str(int(i in BLOCK_PRESETS[text] or i == 0)) for i in range(PRESET_LENGTH))
    return factor_by_block(parse_block_weights(text, layout.block_lists), layout.block_of)


def _require_blocks(text: str, layout: Layout | None) -> Layout:
    """The layout. Raises UserError where there is none, or where its network has no blocks that lists could weigh."""
    if layout is None:
        raise UserError(f"the block weights {text} need to know the model; name it with --model")
    if not layout.block_lists:
        raise UserError(
            f"this model ({layout.family}) has no blocks that {text} could weigh; choose layers by groups or globs"
        )
    return layout


def _parse_part(
    part: str, keys: LayerKeys, layout: Layout | None
) -> tuple[Callable[[str, str], bool], float]:
    """(whether a layer is meant, its weight) of one part of a choice."""
    name, equals, number = part.removeprefix("~").partition("=")
    try:
        value = 0.0 if part.startswith("~") else float(number) if equals else 1.0
    except ValueError:
        raise UserError(
            f"the weight {number!r} of {name} after the @ is no number; write {name}=0.5"
        ) from None
    if part.startswith("~") and equals:
        raise UserError(
            f"{part!r} after the @ takes layers away and gives them a weight; drop the ~ or the ="
        )
    holds = _layer_predicate(name, layout)
    if not any(holds(component, path) for component, path in keys):
        names = [f"{component}.{path}" for component, path in keys]
        near = (
            ", ".join(nearest_paths(name, [*LAYER_GROUPS, *names]))
            if name not in LAYER_GROUPS and name not in BLOCKS
            else f"it has {', '.join(nearest_paths(name, names))} ..."
        )
        raise UserError(
            f"@{part} means none of the {len(names)} layers of this file; nearest: {near}"
        )
    return holds, value


def _layer_predicate(name: str, layout: Layout | None) -> Callable[[str, str], bool]:
    if name in BLOCKS:
        known, index = _require_blocks(name, layout), BLOCKS.index(name)
        return lambda component, path: known.block_of(component, path) == index
    presets = (
        {}
        if layout is None or name in LAYER_GROUPS
        else {owner: own[name] for owner, own in layout.presets.items() if name in own}
    )
    if presets:
        return lambda component, path: any(
            matches_pattern(path, glob) for glob in presets.get(component, ())
        )
    globs = LAYER_GROUPS.get(
        name, (name, f"{name}.*")
    )  # the second: a component or a block by its own name
    return lambda component, path: any(
        matches_pattern(f"{component}.{path}", glob) for glob in globs
    )
