"""Adapted layers that share one input, computed together by one lora_grouped when the first of them is called.

A group is found by the names in SHARED when adapters are put on or taken off. It acts only inside a forward of the module that holds its layers, and
only where lora_grouped runs as Triton kernels: torch's own products gain nothing from it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_core.adapters.adapted_layer import Adapted
from lora_core.adapters.kinds import DoRA, LoRA
from lora_core.kernels import OPS, call, current_mode, winners
from lora_core.kernels.reference import Member

# Paths below one module that are called with one and the same tensor; a row speaks of modules that have its first path.
SHARED_INPUTS = (
    (
        "proj_mlp",
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
    ),  # a block of one stream, attention beside the MLP
    (
        "to_q",
        "to_k",
        "to_v",
    ),  # without the first where the module's is_cross_attention is true: the text goes to the other two
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
)
CROSS_ATTENTION_QUERY = "to_q"


class WaitingOutputs(NamedTuple):
    """What the first call computed: outputs by seat, and of what."""

    outputs: dict[int, Tensor]
    x: Tensor
    version: int
    grad: bool


class LayerGroup:
    """Layers of one module that see the same x. Their outputs wait here from the first call to the others', at most to the module's return."""

    def __init__(self, parent: nn.Module, members: list[Adapted]) -> None:
        self.members = members
        self.open = False  # inside the parent's forward
        self.waiting: WaitingOutputs | None = None
        for seat, layer in enumerate(members):
            layer.group, layer.seat = self, seat
        self.handles = [
            parent.register_forward_pre_hook(self.enter),
            parent.register_forward_hook(self.leave, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what waits stays here."""
        return vars(self) | {"open": False, "waiting": None}

    def enter(self, *_: Any) -> None:
        self.open, self.waiting = True, None

    def leave(self, *_: Any) -> None:
        self.open, self.waiting = False, None

    def stay_open(self) -> None:
        """Without hooks, whose numbers differ from one module to the next: torch.compile would compile every module apart."""
        self.open = True
        for handle in self.handles:
            handle.remove()

    def dissolve(self) -> None:
        for handle in self.handles:
            handle.remove()
        for layer in self.members:
            layer.group = None

    def take(self, seat: int, x: Tensor) -> Tensor | None:
        """The layer's output for this very tensor, computed with the others' now or before; None where it has to be computed alone.

        A change of the tensor in place between two of the calls is noticed, save under torch.compile, which cannot count them.
        """
        if not can_pay(x):
            return None
        tracing, waiting, grad = (
            torch.compiler.is_compiling(),
            self.waiting,
            torch.is_grad_enabled(),
        )
        if not self.open or (
            not tracing and x.is_inference()
        ):  # an inference tensor does not count its changes
            return None
        version = 0 if tracing else x._version
        if (
            waiting is not None
            and waiting.x is x
            and (waiting.version, waiting.grad) == (version, grad)
            and seat in waiting.outputs
        ):
            y = waiting.outputs.pop(seat)
            if not waiting.outputs:
                self.waiting = None
            return y
        self.waiting = None
        members = self.shared(x)
        if members is None:
            return None
        outputs = dict(enumerate(call("lora_grouped", x, members)))
        y = outputs.pop(seat)
        self.waiting = WaitingOutputs(outputs, x, version, grad)
        return y

    def shared(self, x: Tensor) -> tuple[Member, ...] | None:
        """The arguments of lora_grouped; None where it does not pay, or a layer is more than one plain adapter of the group's kind."""
        found = [(layer, layer.active()) for layer in self.members]
        if any(len(active) != 1 for _, active in found):
            return None
        one = [(layer.base, *active[0]) for layer, active in found]
        kind = type(one[0][1])
        if kind not in (LoRA, DoRA) or not all(
            type(adapter) is kind and adapter.is_one_linear(base, strength)
            for base, adapter, strength in one
        ):
            return None
        members = tuple([adapter.member(base, x, strength) for base, adapter, strength in one])
        if not pays(x, members):
            return None
        if kind is LoRA:
            return members
        return tuple(
            [
                member._replace(norm=adapter.norm(base))
                for member, (base, adapter, _) in zip(members, one)
            ]
        )


def can_pay(x: Tensor) -> bool:
    """Whether it is worth asking; on a CPU the question would be a tenth of a small model's step."""
    return current_mode() == "triton" or (current_mode() == "auto" and x.device.type != "cpu")


def pays(x: Tensor, members: tuple[Member, ...]) -> bool:
    """Whether lora_grouped runs as Triton kernels on these arguments."""
    return current_mode() == "triton" or (
        current_mode() == "auto"
        and winners.choose_winner("lora_grouped", OPS["lora_grouped"], (x, members)) == "triton"
    )


def build_groups(model: nn.Module) -> None:
    """Groups the model's adapted layers anew."""
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, Adapted):
            dissolve_group(module)
    for parent in modules:
        for names in SHARED_INPUTS:
            members = _find_members(parent, names)
            if len(members) > 1:
                LayerGroup(parent, members)


def remove_group_hooks(model: nn.Module) -> None:
    """For compiled modules: their groups act without hooks. A traced forward calls all members of a group, so that nothing keeps waiting."""
    for module in model.modules():
        if isinstance(module, Adapted) and module.group is not None:
            module.group.stay_open()


def dissolve_group(layer: Adapted) -> None:
    """Dissolves the layer's group."""
    if layer.group is not None:
        layer.group.dissolve()


def _find_members(parent: nn.Module, names: tuple[str, ...]) -> list[Adapted]:
    """The adapted Linear layers at those paths that no group has yet and that take inputs of one width."""
    if _module_at(parent, names[0]) is None:
        return []
    if getattr(parent, "is_cross_attention", False) is True:
        names = tuple(name for name in names if name != CROSS_ATTENTION_QUERY)
    found = [
        layer
        for name in names
        if isinstance(layer := _module_at(parent, name), Adapted)
        and isinstance(layer.base, nn.Linear)
    ]
    return [
        layer
        for layer in dict.fromkeys(found)
        if layer.group is None and layer.base.in_features == found[0].base.in_features
    ]


def _module_at(parent: nn.Module, path: str) -> nn.Module | None:
    module: Any = parent
    for name in path.split("."):
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return module
