"""The noise level reaches the adapters that read it, once for each forward of their network."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_core.adapters import injection, noise_levels
from lora_core.adapters.adapted_layer import adapted_layers
from lora_core.adapters.injection import AdapterSpec
from lora_core.errors import UserError

FILE = '''
import torch
from torch import nn
from lora_core.adapters.adapter_module import Adapter

class Later(Adapter):
    """The output grows with the timestep."""
    reads_level = True
    def __init__(self, base, layer):
        super().__init__()
        self.by = nn.Parameter(torch.ones((), dtype=torch.float64))
    def update(self, base, x, y0, strength):
        return strength * self.by * self.level.fraction[:, None] * y0
'''


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, dtype=torch.float64)
        self.again: Any = None

    def forward(self, sample: Tensor, timestep: Any, text: Any = None) -> Tensor:
        return self.a(sample) if self.again is None else self.again(self.a, sample)


@pytest.fixture
def network(tmp_path: Any) -> Network:
    file = tmp_path / "later.py"
    file.write_text(FILE)
    model = Network()
    injection.inject(model, AdapterSpec(("a",), kind=f"{file}:Later"))
    noise_levels.set_largest_timestep(model, 1000)
    return model


X = torch.ones(2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "timestep", [500, torch.tensor(500), torch.tensor([500, 500]), torch.tensor([500.0, 500.0])]
)
def test_any_form_of_timestep(network: Network, timestep: Any) -> None:
    wanted = 1.5 * network.a.base(X)
    assert torch.equal(network(X, timestep), wanted)
    assert torch.equal(network(sample=X, timestep=timestep), wanted)
    assert torch.equal(network(X, text=None, timestep=timestep), wanted)


def test_a_copy_has_its_own_level_and_removal_takes_the_hook(network: Network) -> None:
    other = copy.deepcopy(network)
    assert torch.equal(other(X, 0), other.a.base(X))
    assert torch.equal(network(X, 1000), 2 * network.a.base(X))
    level, own = noise_levels.find_level(network), noise_levels.find_level(other)
    assert level is not own and own is not None and float(own.fraction[0]) == 0
    injection.remove(network)
    assert not network._forward_pre_hooks and noise_levels.find_level(network) is None
    injection.inject(network, AdapterSpec(("a",), rank=2))
    assert not network._forward_pre_hooks  # an adapter that reads no level costs no hook


def test_a_recomputed_block_has_the_level_of_its_forward(network: Network) -> None:
    level = noise_levels.find_level(network)
    assert level is not None
    gradients = []
    for again in (None, functools.partial(checkpoint, use_reentrant=False)):
        network.again = again
        if again is not None:
            network.again = functools.partial(again, context_fn=level.recompute_contexts)
        (adapter,) = adapted_layers(network)[0].adapters.values()
        adapter.by.grad = None
        first, second = network(X, 1000), network(X, 0)
        (first + second).sum().backward()
        gradients.append(adapter.by.grad.clone())
    assert gradients[0] != 0 and torch.equal(*gradients)
    assert float(level.t[0]) == 0


def test_what_is_not_known_is_said(network: Network, tmp_path: Any) -> None:
    noise_levels.set_largest_timestep(network, None)
    with pytest.raises(UserError, match=r"the t of pure noise is not known: call noise_levels"):
        network(X, 3)
    level = noise_levels.ForwardLevel()
    with pytest.raises(UserError, match="outside of its network's forward pass"):
        level.t  # noqa: B018
    plain = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UserError, match="a Sequential is called without a timestep"):
        injection.inject(plain, AdapterSpec(("0",), kind=f"{tmp_path / 'later.py'}:Later"))
    assert isinstance(plain[0], nn.Linear)
