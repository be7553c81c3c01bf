"""Flat parameters: what nobody may notice."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.errors import UserError
from lora_core.kernels.flat import ALIGNED, DeviceTable
from lora_core.optim.adamw import AdamW
from lora_core.prodigy import Prodigy

MAKE = {
    "prodigy": lambda params: Prodigy(params, d0=1e-2),
    "adamw": lambda params: AdamW(params, lr=1e-2),
}


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7),
        torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        torch.nn.Linear(1, 1),
    )


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, skip: str = ""
) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for name, p in model.named_parameters():
            p.grad = None if name == skip else torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


def values(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", MAKE)
def test_parameters_keep_their_identity_layout_and_alignment(name: str) -> None:
    model = network()
    params, before = (
        list(model.parameters()),
        [(p.shape, p.stride(), p.requires_grad) for p in model.parameters()],
    )
    loss = sum((p**2).sum() for p in params)
    loss.backward()
    versions, seen = [p._version for p in params], []
    params[0].register_post_accumulate_grad_hook(lambda p: seen.append(p))
    MAKE[name](params).step()
    assert all(p is q for p, q in zip(params, model.parameters()))
    assert before == [(p.shape, p.stride(), p.requires_grad) for p in params]
    assert all(p.data_ptr() % ALIGNED == 0 for p in params) and all(
        p._version > v for p, v in zip(params, versions)
    )
    sum((p**2).sum() for p in params).backward()
    assert seen == [params[0]] and params[0].grad.shape == params[0].shape
    row_major = [p for p in params if p.is_contiguous()]
    assert (
        len({p.untyped_storage().data_ptr() for p in row_major}) == 1 < len(row_major) < len(params)
    )


def test_a_graph_over_a_parameter_that_moved_is_refused() -> None:
    """Autograd's own check of saved tensors: the version counters are the parameters'."""
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    p = model[0].weight
    y = (p * p).sum()
    train(model, optimizer, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("how", ["data", "to", "half a group", "load"])
def test_rebound_parameters_are_found(name: str, how: str) -> None:
    """The same run with and without someone taking a parameter out of the buffer in its middle."""
    runs = []
    for meddled in (False, True):
        model = network()
        optimizer = MAKE[name](list(model.parameters()))
        train(model, optimizer, 2, skip="0.bias" if how == "half a group" else "")
        if meddled and how == "data":
            model[0].weight.data = model[0].weight.data.clone()
        if meddled and how == "to":
            model.to(torch.float64).to(torch.float32)
        if meddled and how == "load":
            model.load_state_dict(copy.deepcopy(model.state_dict()), assign=False)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, 3)
        runs.append(values(model))
        if how == "half a group":
            break
    assert same(runs[0], runs[-1])
    fresh = network()
    assert not same(values(fresh), runs[0])


@pytest.mark.parametrize("name", MAKE)
def test_a_value_written_between_two_steps_counts(name: str) -> None:
    """Through p.copy_ and p.data = ...: the next step goes on from there, channels last or not."""
    for rebind in (False, True):
        model = network()
        optimizer = MAKE[name](list(model.parameters()))
        train(model, optimizer, 1)
        for p in model.parameters():
            if rebind:
                p.data = torch.full_like(p, 5.0)
            else:
                with torch.no_grad():
                    p.fill_(5.0)
        train(model, optimizer, 1)
        assert all((p.detach() - 5).abs().max() < 0.5 for p in model.parameters())
        assert all((p.detach() != 5).any() for p in model.parameters())


@pytest.mark.parametrize("name", MAKE)
def test_files_copies_and_state_dicts_notice_nothing(name: str, tmp_path) -> None:
    model = network()
    optimizer = MAKE[name](list(model.parameters()))
    train(model, optimizer, 2)
    contiguous = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(
        contiguous, tmp_path / "weights.safetensors"
    )  # refuses tensors that overlap in memory
    assert same(
        list(load_file(tmp_path / "weights.safetensors").values()),
        [contiguous[key] for key in sorted(contiguous)],
    )
    torch.save((model, optimizer), tmp_path / "both.pt")
    stored = torch.load(tmp_path / "both.pt", weights_only=False)
    for other, again in (copy.deepcopy((model, optimizer)), stored):
        assert same(values(other), values(model))
        kept = values(model)
        train(other, again, 1)
        assert same(kept, values(model)) and not same(kept, values(other))
    copied, again = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2), train(copied, again, 2)
    assert same(values(model), values(copied))


@pytest.mark.parametrize("name", MAKE)
def test_a_parameter_without_gradient_keeps_its_bits_and_gets_its_state_later(name: str) -> None:
    model = network()
    optimizer = MAKE[name](list(model.parameters()))
    still = model[0].bias
    before = still.detach().clone()
    train(model, optimizer, 2, skip="0.bias")
    assert torch.equal(still, before) and still not in optimizer.state
    train(model, optimizer, 1)
    assert not torch.equal(still, before) and still in optimizer.state
    kept = [value.clone() for value in optimizer.state[still].values()]
    train(model, optimizer, 1, skip="0.bias")
    assert same(kept, list(optimizer.state[still].values()))


@pytest.mark.parametrize("name", MAKE)
def test_a_sparse_gradient_is_refused(name: str) -> None:
    p = torch.zeros(3, 2, requires_grad=True)
    p.grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (3, 2))
    with pytest.raises(UserError, match="sparse=False"):
        MAKE[name]([p]).step()


def test_a_device_table_holds_doubles_and_whole_numbers() -> None:
    table = DeviceTable(torch.device("cpu"))
    sent = table.send([0.1, -1e-300], [3, -(2**62)])
    assert sent[:2].view(torch.float64).tolist() == [0.1, -1e-300]
    assert sent[2:].tolist() == [3, -(2**62)]
    address = sent.data_ptr()
    assert table.send([0.1, 2.0], [3, 4]).data_ptr() == address


@pytest.mark.parametrize("damage", ["missing", "further", "shorter"])
@pytest.mark.parametrize("name", MAKE)
def test_a_state_that_no_step_has_made_is_refused(name: str, damage: str) -> None:
    """As a stranger's checkpoint may have; it would be read into a neighbour's numbers."""
    model = network()
    optimizer = MAKE[name](model.parameters())
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    state = saved["state"][3]
    if damage == "missing":
        del state["exp_avg"]
    elif damage == "further":
        state["more"] = torch.zeros(())
    else:
        state["exp_avg"] = state["exp_avg"].flatten()[:-1]
    model = network()
    optimizer = MAKE[name](model.parameters())
    optimizer.load_state_dict(saved)
    with pytest.raises(UserError, match="saved state of a parameter has the sizes"):
        train(model, optimizer, 1)
