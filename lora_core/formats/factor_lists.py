"""cloneofsimo's older `.pt` files: lists [up 0, down 0, up 1, ...], one file a network.

They are x.pt for the UNet, x.text_encoder.pt, and x.ti.pt with {token: row}. Layers have numbers
(see layer_numbering.py); which classes of modules are adapted follows from the length of the list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats.cloneofsimo import require_layout, token_tensors, with_tokens
from lora_core.formats.container import check_finite
from lora_core.formats.embeddings import check_token_rows
from lora_core.formats.layer_numbering import list_pairs, numbered_components, place_pairs
from lora_core.formats.layout import Layout
from lora_core.formats.parameter_changes import refuse_parameters
from lora_core.formats.pickles import own_storage, read_pickle, write_pickle
from lora_core.text import shorten_value

FIRST = "unet"  # the network of x.pt


def is_factor_list(data: Any) -> bool:
    """Whether the result of `read_pickle` is a list of factors."""
    return isinstance(data, list)


def read_factor_lists(path: str | Path, layout: Layout | None = None) -> AdapterState:
    """The state of a list file; for x.pt also of x.text_encoder.pt and x.ti.pt where they exist.

    Nothing in the files is executed. Raises UserError as `read_cloneofsimo` does, and for anything
    but lists of tensors.
    """
    path = Path(path)
    layout = require_layout(layout, str(path))
    own = next((name for name in layout.components if path.name.endswith(f".{name}.pt")), FIRST)
    files = {own: path}
    if own == FIRST:
        for name in layout.components:
            file = path.with_suffix(f".{name}.pt")
            if name != FIRST and file.is_file():
                files[name] = file
    components = {}
    for component, file in files.items():
        factors = _read_list(file)
        pairs = list(zip(factors[::2], factors[1::2]))
        components[component] = place_pairs(pairs, None, layout, component, str(file))
    rows = path.with_suffix(".ti.pt")
    state = AdapterState(components)
    if own != FIRST or not rows.is_file():
        return state
    tokens = check_token_rows(read_pickle(rows), str(rows))
    return with_tokens(state, tokens, layout, str(rows))


def read_list_shapes(path: Path, data: list[Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a list's factors under the keys of cloneofsimo's other format."""
    name = "text_encoder" if path.name.endswith(".text_encoder.pt") else FIRST
    shapes = {}
    for i, factor in enumerate(data):
        role = ("up", "down")[i % 2]
        if not isinstance(factor, Tensor):
            raise UserError(
                f"{path} is a pickle of a list with {shorten_value(factor)}, expected factors"
            )
        shapes[f"{name}:{i // 2}:{role}"] = tuple(factor.shape)
    return shapes


def write_factor_lists(
    state: AdapterState, path: str | Path, layout: Layout | None = None
) -> list[Path]:
    """Writes the list files that the state has content for, each atomically; returns their paths.

    Raises UserError as `write_cloneofsimo` does, before any file is written, for changes of norms
    and biases, and for a name that does not end in .pt.
    """
    path = Path(path)
    if path.suffix != ".pt":
        raise UserError(
            f"{path} should be a list of factors, whose name ends in .pt; "
            "give x.pt, or write a .safetensors"
        )
    refuse_parameters(state, f"{path}, a list of factors,")
    layout = require_layout(layout, str(path))
    contents: dict[Path, Any] = {}
    for component, modules in numbered_components(state):
        factors: list[Tensor] = []
        for up, down in list_pairs(modules, layout, component)[1]:
            factors += [own_storage(up), own_storage(down)]
        file = path if component == FIRST else path.with_suffix(f".{component}.pt")
        contents[file] = factors
    if rows := token_tensors(state, layout):
        own = {token: own_storage(row) for token, row in rows.items()}
        contents[path.with_suffix(".ti.pt")] = own
    for file, content in contents.items():
        named = content
        if isinstance(content, list):
            named = {str(i): tensor for i, tensor in enumerate(content)}
        check_finite(named, f"what should become {file}")
    for file, content in contents.items():
        write_pickle(file, content)
    return list(contents)


def _read_list(file: Path) -> list[Tensor]:
    data = read_pickle(file)
    is_pairs = isinstance(data, list) and data and not len(data) % 2
    if not is_pairs or not all(isinstance(t, Tensor) and t.is_floating_point() for t in data):
        raise UserError(
            f"{file} holds something else than a list of up and down factors, two for each layer; "
            "is it another format?"
        )
    check_finite({f"factor {i}": tensor for i, tensor in enumerate(data)}, str(file))
    return data
