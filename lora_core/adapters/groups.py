"""Groups of adapted layers that share one input, computed by one call of the op lora_grouped.

Groups are found by the paths in SHARED_INPUTS when adapters are injected or removed. A group acts
inside a forward of the module that holds its layers, and only where lora_grouped runs as Triton
kernels: in plain torch it is not faster. On a CPU no group acts, so no module has hooks and every
layer computes its own output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_core.adapters.adapted_layer import Adapted
from lora_core.adapters.kinds import DoRA, LoRA
from lora_core.kernels import OPS, call, choice, current_mode
from lora_core.kernels.reference import Member

# Paths below one module whose layers are called with the same tensor. An entry is for modules that
# have its first path.
SHARED_INPUTS = (
    ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"),  # one stream: attention next to the MLP
    ("to_q", "to_k", "to_v"),  # in cross-attention the text goes to the last two only
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
)
CROSS_ATTENTION_QUERY = "to_q"


class WaitingOutputs(NamedTuple):
    """Outputs that the first member's call computed for the others, and their input x."""

    outputs: dict[int, Tensor]  # index of the member -> its output
    x: Tensor
    version: int
    grad: bool


class LayerGroup:
    """Layers of one module that get the same input x.

    The first member's call computes all outputs; the others are kept here until they are taken, at
    most to the end of the module's forward.
    """

    def __init__(self, parent: nn.Module, members: list[Adapted]) -> None:
        self.parent = parent
        self.members = members
        self.is_open = False  # inside the parent's forward
        self.waiting: WaitingOutputs | None = None
        self.handles: list[Any] = []  # of the parent's hooks
        self.always_open = False
        for index, layer in enumerate(members):
            layer.group = self
            layer.index = index

    @property
    def acts(self) -> bool:
        return self.always_open or bool(self.handles)

    def watch_parent(self) -> None:
        """Start or stop acting, by whether the members' outputs can be computed together.

        Called whenever a member resolves its forward; a change makes the others resolve theirs.
        """
        if self.always_open:
            return
        acts = all(map(_may_be_grouped, self.members))
        if acts == bool(self.handles):
            return
        if acts:
            enter = self.parent.register_forward_pre_hook(self.enter_forward)
            leave = self.parent.register_forward_hook(self.leave_forward, always_call=True)
            self.handles = [enter, leave]
        else:
            self._remove_hooks()
        for layer in self.members:
            layer.resolve()

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, without waiting outputs."""
        return vars(self) | {"is_open": False, "waiting": None}

    def enter_forward(self, *_: Any) -> None:
        self.is_open, self.waiting = True, None

    def leave_forward(self, *_: Any) -> None:
        self.is_open, self.waiting = False, None

    def act_without_hooks(self) -> None:
        """Stay open always, without hooks, for compiled modules.

        Hooks have numbers that differ from one module to the next, and torch.compile would compile
        every module for itself.
        """
        self._remove_hooks()
        self.always_open = self.is_open = True
        for layer in self.members:
            layer.resolve()

    def dissolve(self) -> None:
        self._remove_hooks()
        for layer in self.members:
            layer.group = None
        for layer in self.members:
            layer.resolve()

    def _remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def compute(self, index: int, x: Tensor) -> Tensor | None:
        """A member's output for this very tensor, computed together with the others'.

        None where it has to be computed alone. An in-place change of the tensor between two calls
        is detected, except under torch.compile, which has no version counter.
        """
        tracing = torch.compiler.is_compiling()
        if not self.is_open or (not tracing and x.is_inference()):
            return None  # an inference tensor does not count its changes
        version = 0 if tracing else x._version
        grad = torch.is_grad_enabled()
        y = self._take_waiting(index, x, version, grad)
        if y is not None:
            return y
        self.waiting = None
        members = self.grouped_arguments(x)
        if members is None:
            return None
        outputs = dict(enumerate(call("lora_grouped", x, members)))
        y = outputs.pop(index)
        self.waiting = WaitingOutputs(outputs, x, version, grad)
        return y

    def _take_waiting(self, index: int, x: Tensor, version: int, grad: bool) -> Tensor | None:
        waiting = self.waiting
        if waiting is None or waiting.x is not x or index not in waiting.outputs:
            return None
        if (waiting.version, waiting.grad) != (version, grad):
            return None
        y = waiting.outputs.pop(index)
        if not waiting.outputs:
            self.waiting = None
        return y

    def grouped_arguments(self, x: Tensor) -> tuple[Member, ...] | None:
        """The arguments of lora_grouped after x.

        None where it is not faster, or where a layer has more than one plain adapter of the group's
        kind.
        """
        found = []
        for layer in self.members:
            active = layer.active()
            if len(active) != 1 or not layer.enabled:
                return None
            adapter, strength = active[0]
            found.append((layer.base, adapter, strength))
        kind = type(found[0][1])
        if kind not in (LoRA, DoRA):
            return None
        members = []
        for base, adapter, strength in found:
            if type(adapter) is not kind or not adapter.fits_lora_linear(base, strength):
                return None
            members.append(adapter.linear_arguments(base, x, strength))
        if not pays(x, tuple(members)):
            return None
        if kind is DoRA:
            norms = [adapter.norm(base) for base, adapter, _ in found]
            members = [m._replace(norm=norm) for m, norm in zip(members, norms, strict=True)]
        return tuple(members)


def may_group(device_type: str) -> bool:
    """Whether lora_grouped can run as Triton kernels on a device, or is a user's function."""
    mode = current_mode()
    if OPS["lora_grouped"].candidate is not None:
        return True
    if OPS["lora_linear"].candidate is not None:  # it computes each layer
        return False
    return mode == "triton" or (mode == "auto" and device_type != "cpu")


def _may_be_grouped(layer: Adapted) -> bool:
    # a subclass of Linear has a forward of its own, and its weight may cost time to read
    return type(layer.base) is nn.Linear and may_group(layer.base.weight.device.type)


def pays(x: Tensor, members: tuple[Member, ...]) -> bool:
    """Whether lora_grouped runs as Triton kernels on these arguments, or is a user's function."""
    mode = current_mode()
    if OPS["lora_grouped"].candidate is not None:
        return True
    if mode != "auto":
        return mode == "triton"
    return choice.choose_winner("lora_grouped", OPS["lora_grouped"], (x, members)) == "triton"


def build_groups(model: nn.Module) -> None:
    """Find the groups of the model's adapted layers again."""
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, Adapted) and module.group is not None:
            module.group.dissolve()
    for parent in modules:
        for names in SHARED_INPUTS:
            members = _find_members(parent, names)
            if len(members) > 1:
                LayerGroup(parent, members).watch_parent()


def remove_group_hooks(model: nn.Module) -> None:
    """Make the groups of compiled modules act without hooks.

    A traced forward calls all members of a group, so that no output is left over.
    """
    for module in model.modules():
        if isinstance(module, Adapted) and isinstance(module.group, LayerGroup):
            module.group.act_without_hooks()


def _find_members(parent: nn.Module, names: tuple[str, ...]) -> list[Adapted]:
    """The adapted Linear layers at those paths that no group has yet, of one input width."""
    if _module_at(parent, names[0]) is None:
        return []
    if getattr(parent, "is_cross_attention", False) is True:
        names = tuple(name for name in names if name != CROSS_ATTENTION_QUERY)
    found: list[Adapted] = []
    for name in names:
        layer = _module_at(parent, name)
        if isinstance(layer, Adapted) and isinstance(layer.base, nn.Linear):
            found.append(layer)
    members = []
    for layer in dict.fromkeys(found):
        if layer.group is None and layer.base.in_features == found[0].base.in_features:
            members.append(layer)
    return members


def _module_at(parent: nn.Module, path: str) -> nn.Module | None:
    module: Any = parent
    for name in path.split("."):
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return module
