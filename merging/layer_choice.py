"""The layers of a file that are used in a sum, and their factors: the part of a sum after an @.

@attn   @text   @conv,ff=0.5   @~conv      groups, components, globs, blocks; a ~ takes away
@down_blocks.*.attn2.*                     a glob over "component.path" or its end from a dot on
@IN04,MID,OUT03=0.5                        blocks of the UNet; BASE are the text encoders
@1,0,0,0.5,...   @[1, 0, ...]   @OUTD      block weights as a list of 12, 17, 20 or 26 numbers, or
                                           A1111's name of such a list
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import cache

from lora_core.adapters.targets import matches_pattern, nearest_paths
from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats.layout import ENCODERS, Layout
from lora_core.formats.parameter_changes import changed_modules
from merging.adapter_sums import LayerFactor, layers_by_key
from merging.block_weights import BLOCKS, factor_by_block, parse_block_weights
from merging.expression import WeightedFile

LayerKeys = Collection[tuple[str, str]]  # (component, published path)
LayerTest = Callable[[str, str], bool]  # (component, published path) -> whether it is chosen

LAYER_GROUPS: dict[str, tuple[str, ...]] = {  # name -> globs
    "attn": ("*.attn.*", "*.attn?.*", "*.self_attn.*", "*.SelfAttention.*"),
    "self": ("*.attn1.*", "*.self_attn.*", "*.SelfAttention.*"),
    "cross": ("*.attn2.*",),
    "ff": ("*.ff.*", "*.ff_context.*", "*.mlp.*", "*.proj_mlp", "*.DenseReluDense.*"),
    "conv": ("*.conv1", "*.conv2", "*.conv_shortcut", "*samplers.*.conv", "conv_in", "conv_out"),
    "unet": ("unet.*", "transformer.*"),
    "text": tuple(f"{name}.*" for name in ENCODERS),
}
PRESET_LENGTH = 17  # of the lists below
# A1111's extension of LoRA block weights: name -> the ones of its list, in addition to BASE's
BLOCK_PRESETS = {
    "INS": range(1, 4),
    "IND": range(4, 7),
    "INALL": range(1, 7),
    "MIDD": range(4, 12),
    "OUTD": range(8, 12),
    "OUTS": range(12, 17),
    "OUTALL": range(8, 17),
}


def choose_layers(file: WeightedFile, state: AdapterState, layout: Layout | None) -> LayerFactor:
    """The factor of each layer of a file, from all choices after its name in a sum."""
    keys = list(layers_by_key(state))
    for component, changes in state.parameters.items():
        keys += [(component, path) for path in changed_modules(changes)]
    try:
        factors = [parse_layer_choice(text, keys, layout) for text in file.choices]
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    return multiply_factors(factors)


def parse_layer_choice(text: str, keys: LayerKeys, layout: Layout | None = None) -> LayerFactor:
    """The factor of each layer's weight by one choice.

    `keys` are the layers of the file that the choice belongs to, `layout` that of its model. Raises
    UserError for a part that matches no layer (with the nearest), a list of another length than the
    model's, and blocks without a layout.
    """
    numbers = re.fullmatch(r"\[.*\]|[-+\d.eE\s]+(,[-+\d.eE\s]+)+", text)
    if numbers or (text in BLOCK_PRESETS and text not in BLOCKS):
        return _parse_block_list(text, layout)
    parts = [part.strip() for part in text.split(",")]
    tests = [_parse_part(part, keys, layout) for part in parts]
    default = 1.0 if all(part.startswith("~") for part in parts) else 0.0

    @cache
    def factor(component: str, path: str) -> float:
        found = [value for is_meant, value in tests if is_meant(component, path)]
        return found[-1] if found else default

    return factor


def multiply_factors(factors: Collection[LayerFactor]) -> LayerFactor:
    """The product of all of them, layer by layer."""

    def product(component: str, path: str) -> float:
        result = 1.0
        for factor in factors:
            result *= factor(component, path)
        return result

    return product


def _parse_block_list(text: str, layout: Layout | None) -> LayerFactor:
    layout = _require_blocks(text, layout)
    if text in BLOCK_PRESETS:
        if PRESET_LENGTH not in layout.block_lists:
            raise UserError(
                f"{text} is a list of {PRESET_LENGTH} block weights; this model takes "
                f"{' or '.join(map(str, layout.block_lists))} numbers"
            )
        ones = {0, *BLOCK_PRESETS[text]}
        text = ",".join(str(int(i in ones)) for i in range(PRESET_LENGTH))
    return factor_by_block(parse_block_weights(text, layout.block_lists), layout.block_of)


def _require_blocks(text: str, layout: Layout | None) -> Layout:
    """The layout. Raises UserError where there is none, or where its network has no such blocks."""
    if layout is None:
        raise UserError(f"the block weights {text} need to know the model; name it with --model")
    if not layout.block_lists:
        raise UserError(
            f"this model ({layout.family}) has no blocks for {text}; choose layers by "
            "groups or globs"
        )
    return layout


def _parse_part(part: str, keys: LayerKeys, layout: Layout | None) -> tuple[LayerTest, float]:
    """(test whether a layer is chosen, factor) of one part of a choice."""
    name, equals, number = part.removeprefix("~").partition("=")
    if part.startswith("~") and equals:
        raise UserError(
            f"{part!r} after the @ takes layers away and gives them a weight; drop the ~ or the ="
        )
    try:
        value = float(number) if equals else 1.0
    except ValueError:
        raise UserError(
            f"the weight {number!r} of {name} after the @ is not a number; write {name}=0.5"
        ) from None
    is_meant = _layer_test(name, layout)
    if not any(is_meant(component, path) for component, path in keys):
        raise UserError(
            f"@{part} matches none of the {len(keys)} layers of this file; nearest: "
            f"{_nearest_names(name, keys)}"
        )
    return is_meant, 0.0 if part.startswith("~") else value


def _nearest_names(name: str, keys: LayerKeys) -> str:
    names = [f"{component}.{path}" for component, path in keys]
    if name in LAYER_GROUPS or name in BLOCKS:
        return f"it has {', '.join(nearest_paths(name, names))} ..."
    return ", ".join(nearest_paths(name, [*LAYER_GROUPS, *names]))


def _layer_test(name: str, layout: Layout | None) -> LayerTest:
    if name in BLOCKS:
        known, index = _require_blocks(name, layout), BLOCKS.index(name)
        return lambda component, path: known.block_of(component, path) == index
    if layout is not None and name not in LAYER_GROUPS:
        presets = {owner: own[name] for owner, own in layout.presets.items() if name in own}
        if presets:
            return lambda component, path: _matches_any(path, presets.get(component, ()))
    # the second glob: a component or a block by its own name
    globs = LAYER_GROUPS.get(name, (name, f"{name}.*"))
    return lambda component, path: _matches_any(f"{component}.{path}", globs)


def _matches_any(path: str, globs: Collection[str]) -> bool:
    return any(matches_pattern(path, glob) for glob in globs)
