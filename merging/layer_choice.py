"""The layers of a file that are used in a sum, and their factors: the part of a sum after an @.

@attn   @text   @conv,ff=0.5   @~conv      groups, components, globs, blocks; a ~ takes away
@down_blocks.*.attn2.*                     a glob over "component.path" or its end from a dot on
@IN04,MID,OUT03=0.5   @D07,S12             blocks of the UNet, or of Flux; BASE are the encoders
@1,0,0,0.5,...   @[1, 0, ...]   @OUTD      block weights as a list, or A1111's name of one
@te=0.5:unet=0.7                           both weights of a tag <lora:NAME:0.5:0.7>
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
from merging.block_weights import (
    BLOCK_PRESETS,
    BLOCKS,
    OTHER_NAMES,
    STREAM_BLOCKS,
    BlockTable,
    factor_by_block,
    find_block_table,
    parse_block_weights,
)
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
# both weights of a tag in a prompt
TAG_WEIGHTS = re.compile(r"te=(?P<encoders>[^:,]+):unet=(?P<denoiser>[^:,]+)")
ALL_BLOCKS = {*BLOCKS, *OTHER_NAMES, *STREAM_BLOCKS}


def choose_layers(file: WeightedFile, state: AdapterState, layout: Layout | None) -> LayerFactor:
    """The factor of each layer of a file, from all choices after its name in a sum."""
    keys = list(layers_by_key(state))
    for component, changes in state.parameters.items():
        keys += [(component, path) for path in changed_modules(changes)]
    if not keys:
        raise UserError(
            f"{file.path} holds token rows only, of which @{file.choices[0]} can choose nothing; "
            "drop it"
        )
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
    if numbers or text in BLOCK_PRESETS:
        return _parse_block_list(text, layout)
    if both := TAG_WEIGHTS.fullmatch(text):
        return _factor_by_network(both["encoders"], both["denoiser"], text)
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


def _factor_by_network(encoders: str, denoiser: str, text: str) -> LayerFactor:
    """One weight for the text encoders and one for the denoiser; a file may lack either."""
    try:
        weights = float(encoders), float(denoiser)
    except ValueError:
        raise UserError(f"{text!r} after the @ has no two numbers; write te=0.5:unet=0.7") from None
    return lambda component, path: weights[component not in ENCODERS]


def _parse_block_list(text: str, layout: Layout | None) -> LayerFactor:
    table = _require_blocks(text, layout)
    return factor_by_block(parse_block_weights(text, table.lengths), table.block_of)


def _require_blocks(text: str, layout: Layout | None) -> BlockTable:
    """The blocks of the layout. Raises UserError where there is none, or it has no such blocks."""
    if layout is None:
        raise UserError(f"the block weights {text} need to know the model; name it with --model")
    table = find_block_table(layout)
    if table is None:
        raise UserError(
            f"this model ({layout.family}) has no blocks for {text}; choose layers by "
            "groups or globs"
        )
    return table


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
    if name in LAYER_GROUPS or name in ALL_BLOCKS:
        return f"it has {', '.join(nearest_paths(name, names))} ..."
    return ", ".join(nearest_paths(name, [*LAYER_GROUPS, *names]))


def _layer_test(name: str, layout: Layout | None) -> LayerTest:
    if name in ALL_BLOCKS:
        table = _require_blocks(name, layout)
        if (index := table.find_block(name)) is not None:
            return lambda component, path: table.block_of(component, path) == index
    if layout is not None and name not in LAYER_GROUPS:
        presets = {owner: own[name] for owner, own in layout.presets.items() if name in own}
        if presets:
            return lambda component, path: _matches_any(path, presets.get(component, ()))
    # the second glob: a component or a block by its own name
    globs = LAYER_GROUPS.get(name, (name, f"{name}.*"))
    return lambda component, path: _matches_any(f"{component}.{path}", globs)


def _matches_any(path: str, globs: Collection[str]) -> bool:
    return any(matches_pattern(path, glob) for glob in globs)
