"""The contenders do the same work on the same weights."""

import pytest
import torch

from benchmarks import contenders
from benchmarks.contenders import FrozenStep, OurStep, PeftStep
from tests.tiny_problem import random, tiny
from training import cuda_graph


def test_a_clone_shares_every_parameter():
    network = tiny().network
    clone = contenders.clone_network(network)
    assert clone is not network
    assert all(a is b for a, b in zip(network.parameters(), clone.parameters(), strict=True))
    last = contenders.clone_network(network, channels_last=True)
    for a, b in zip(network.parameters(), last.parameters(), strict=True):
        assert torch.equal(a, b)
        assert (a is b) == (a.ndim != 4)
        assert a.is_contiguous(), "the layout of the others' weights has changed"


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_ours_begins_where_the_frozen_network_is_and_both_peers_train(name):
    problem = tiny(name)
    before = [p.clone() for p in problem.network.parameters()]
    frozen = FrozenStep(problem, contenders.clone_network(problem.network))
    expected = float(frozen())
    for kind in ("lora", "dora"):
        ours = OurStep(problem, kind, contenders.clone_network(problem.network))
        assert float(ours()) == pytest.approx(expected, rel=1e-5)
        peer = PeftStep(problem, kind, contenders.clone_network(problem.network))
        peer()
        for step in (ours, peer):
            start = [p.detach().clone() for p in step.parameters]
            step()
            assert all(
                not torch.equal(a, b) for a, b in zip(start, step.parameters, strict=True)
            ), f"{type(step).__name__} {kind} does not train"
        assert sum(p.numel() for p in ours.parameters) == sum(p.numel() for p in peer.parameters)
        assert {p.dtype for p in (*ours.parameters, *peer.parameters)} == {torch.float32}
    assert all(
        torch.equal(a, b) and b.grad is None
        for a, b in zip(before, problem.network.parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_ours_and_the_peer_compute_the_same_gradients(kind):
    problem = tiny()
    ours, peer = (
        OurStep(problem, kind, contenders.clone_network(problem.network)),
        PeftStep(problem, kind, contenders.clone_network(problem.network)),
    )
    theirs = {name: p for name, p in peer.network.named_parameters() if p.requires_grad}
    pairs = []
    names = {
        "down": "lora_A.default.weight",
        "up": "lora_B.default.weight",
        "magnitude": "lora_magnitude_vector.default.weight",
    }
    for path in problem.paths:
        adapter = ours.network.get_submodule(path).adapter("default")
        pairs += [
            (getattr(adapter, own), theirs[f"{path}.{name}"])
            for own, name in names.items()
            if hasattr(adapter, own)
        ]
    assert len(pairs) == len(theirs) == len(ours.parameters)
    with torch.no_grad():
        for i, (mine, other) in enumerate(pairs):
            mine.copy_(mine * 1.1 if mine.ndim == 1 else random(*mine.shape, seed=i) * 0.2)
            other.copy_(mine)
    x_t, t = random(2, 4, 8, 8, seed=1), torch.tensor([3, 700])
    for step in (ours, peer):
        (problem.out(step.network, x_t, t) * random(2, 4, 8, 8, seed=2)).sum().backward()
    for mine, other in pairs:
        assert torch.allclose(
            mine.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max())
        )
        assert mine.grad.abs().max() > 0


def test_frozen_goes_back_to_the_first_adapted_layers_and_no_further():
    problem = tiny()
    reached = []
    network = contenders.clone_network(problem.network)
    frozen = FrozenStep(problem, network)

    def watch(name):
        def seen(_module, _args, y):
            if y.requires_grad:
                y.register_hook(lambda grad: reached.append(name))

        network.get_submodule(name).register_forward_hook(seen)

    for name in ("down_blocks.0.resnets.0", *problem.paths):
        watch(name)
    frozen()
    assert set(problem.paths) == set(reached), (
        "the gradient stops short of a layer that an adapter trains, or passes the first ones"
    )


def test_a_graph_replays_the_device_part_on_new_random_numbers(monkeypatch):
    """The recording is a stand-in: what is replayed is seen from the inputs that it overwrites."""

    class Kept:
        def record(self):
            return torch.no_grad().__class__()  # any context will do

        def replay(self):
            pass

    monkeypatch.setattr(cuda_graph, "CudaGraph", Kept)
    problem, seen = tiny(), []
    step = OurStep(problem, "lora", contenders.clone_network(problem.network), graph=True)
    monkeypatch.setattr(
        step, "update", lambda sampled: (seen.append(sampled) or sampled.eps.sum(),)
    )
    assert isinstance(step.optimizer.param_groups[0]["lr"], torch.Tensor)
    found = [float(step()) for _ in range(cuda_graph.WARMUP_CALLS + 3)]
    assert len(seen) == cuda_graph.WARMUP_CALLS + 1, "captured once, after the warm calls"
    assert len(set(found[: cuda_graph.WARMUP_CALLS + 1])) == cuda_graph.WARMUP_CALLS + 1
    held, fresh = seen[-1], step.sample_step()
    assert not torch.equal(held.eps, fresh.eps)
    step.visit -= 1
    step()
    assert torch.equal(held.eps, fresh.eps)
    assert torch.equal(held.level.t, fresh.level.t)
