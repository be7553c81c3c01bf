"""Changes of norms and biases, which files hold as whole vectors that are added to the parameter.

LyCORIS writes `w_norm` and `b_norm` of norms (train_norm), and `diff_b`, the change of a layer's
bias, next to each `diff` of its `full`; ComfyUI adds them alike, and reads `diff` of norms too.
They have no scale but the strength of the file. Only kohya's names hold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats.known_formats import PARAMETER_ROLES
from lora_core.formats.layout import Component, Layout

Changes = Mapping[str, Tensor]  # path of a parameter -> what is added to it


def take_parameters(
    parts: dict[str, Tensor], component: Component | None, path: str, where: str
) -> dict[str, Tensor]:
    """Path of a parameter -> its change, taken out of the tensors of one module.

    Raises UserError for a parameter that the module lacks, and for another length. Without a
    component lengths are not checked.
    """
    is_layer = component is None or path in component.shapes
    found: dict[str, Tensor] = {}
    for role, parameter in PARAMETER_ROLES.items():
        if role not in parts or (is_layer and role == "diff"):
            continue
        name, change = f"{path}.{parameter}", parts.pop(role)
        if name in found:
            raise UserError(f"{where} has two changes of its {parameter}; expected one")
        found[name] = change if component is None else _fit_change(change, component, name, where)
    if not is_layer and (odd := parts.keys() - {"alpha"}):
        raise UserError(
            f"{where} is a norm with {', '.join(sorted(odd))}; "
            "expected w_norm and b_norm, or diff and diff_b"
        )
    return found


def encode_parameters(
    changes: Changes, component: Component, starts: Mapping[str, str], leaves: Mapping[str, str]
) -> dict[str, Tensor]:
    """Key -> tensor of the changes of one component; `starts` are the modules' keys up to the leaf.

    A norm always gets its w_norm, zeros where its weight does not change: LyCORIS and ComfyUI know
    a norm by it. Raises UserError for a parameter that the component lacks.
    """
    tensors = {}
    for name, change in changes.items():
        if name not in component.parameters:
            raise UserError(f"there is no {name} in this model, which the changes of norms name")
        path, _, parameter = name.rpartition(".")
        if path in component.shapes:
            tensors[starts[path] + leaves["diff_b"]] = change
            continue
        role = "w_norm" if parameter == "weight" else "b_norm"
        tensors[starts[path] + leaves[role]] = change
        if f"{path}.weight" not in changes:
            tensors[starts[path] + leaves["w_norm"]] = torch.zeros_like(change)
    return tensors


def changed_modules(changes: Iterable[str]) -> list[str]:
    """The modules that parameters belong to, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in changes))


def refuse_parameters(state: AdapterState, place: str) -> None:
    """Raises UserError for a state with changes of norms or biases, which `place` cannot hold."""
    for name, changes in state.parameters.items():
        if changes:
            raise UserError(
                f"{place} cannot hold the changes of norms and biases ({len(changes)} in {name}, "
                f"such as {next(iter(changes))}); the format kohya does, and merge.py fold puts "
                "them into a model"
            )


def describe_losses(state: AdapterState, layout: Layout) -> str:
    """What other tools leave out of a file under kohya's names, as a clause; "" for nothing.

    Counted with their own code for Stable Diffusion 1.5: see docs/formats.md. A1111 and InvokeAI
    read a layer's diff_b only next to a `diff`, which is never written here.
    """
    biases, alone, text_norms = 0, [], 0
    for name, changes in state.parameters.items():
        component, factors = layout.component(name), state.components.get(name, {})
        for path in changed_modules(changes):
            if path not in component.shapes:
                text_norms += name in layout.encoders
                continue
            biases += 1
            if path not in factors:
                alone.append(f"{name}.{path}")
    losses = []
    if biases:
        losses.append(f"A1111, InvokeAI and kohya's scripts leave out changes of biases ({biases})")
    if text_norms:
        losses.append(f"ComfyUI leaves out those of the text encoders' norms ({text_norms})")
    if alone:
        losses.append(
            "A1111 refuses the file, because nothing but the bias changes in some layers "
            f"({len(alone)}, such as {alone[0]})"
        )
    return "; ".join(losses)


# ---------------------------------------------------------------- joined layers


def join_biases(
    changes: Changes, component: Component, swapped: Mapping[str, str]
) -> dict[str, Tensor]:
    """The changes with the biases of joined layers stacked, zeros for parts that do not change."""
    stored = dict(changes)
    for path, name in swapped.items():
        if (bias := f"{path}.bias") in stored:
            change = stored.pop(bias)
            stored[f"{name}.bias"] = change.roll(len(change) // 2)
    for joined, paths in component.fused.items():
        given = [stored.pop(f"{path}.bias", None) for path in paths]
        like = next((change for change in given if change is not None), None)
        if like is not None:
            outs = [component.shapes[path][0] for path in paths]
            stored[f"{joined}.bias"] = _stack_changes(given, outs, like)
    return stored


def separate_biases(
    changes: Changes, component: Component, swapped: Mapping[str, str]
) -> dict[str, Tensor]:
    """Undoes `join_biases`."""
    found = dict(changes)
    for joined, paths in component.fused.items():
        if (bias := f"{joined}.bias") in found:
            outs = [component.shapes[path][0] for path in paths]
            for path, piece in zip(paths, found.pop(bias).split(outs), strict=True):
                found[f"{path}.bias"] = piece
    for path, name in swapped.items():
        if (bias := f"{name}.bias") in found:
            change = found.pop(bias)
            found[f"{path}.bias"] = change.roll(len(change) // 2)
    return found


def _stack_changes(given: Sequence[Tensor | None], outs: Sequence[int], like: Tensor) -> Tensor:
    parts = []
    for change, out in zip(given, outs, strict=True):
        parts.append(like.new_zeros(out) if change is None else change)
    return torch.cat(parts)


def _fit_change(change: Tensor, component: Component, name: str, where: str) -> Tensor:
    shape = component.parameters.get(name)
    if shape is None:
        raise UserError(
            f"{where} has a change of its {name.rpartition('.')[2]}, which this model's lacks; "
            "is it for another model?"
        )
    if change.numel() != shape[0]:
        raise UserError(
            f"{where} has a change {list(change.shape)} of {name}, expected {list(shape)}; "
            "is it for another model?"
        )
    return change.reshape(shape)
