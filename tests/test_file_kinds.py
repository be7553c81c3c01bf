"""DoRAs by columns and LyCORIS' updates on a model act as the weight that LyCORIS merges."""

import copy
import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import infer
import merge
from lora_core.adapters import injection
from lora_core.adapters.file_kinds import ColumnDoRA, LycorisUpdate, kind_of_update
from lora_core.adapters.folded_weights import fold_adapter, merged_state_dict, unfold_adapter
from lora_core.adapters.patch import patch
from lora_core.adapters.weight_updates import DenseUpdate, LowRank
from lora_core.errors import UserError
from tests.tiny_pipeline import save_sd_pipeline

LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "plain": lambda: nn.Linear(6, 6, bias=False),
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2),
    "reflect": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "one": lambda: nn.Conv2d(4, 4, 1),
    "groups": lambda: nn.Conv2d(6, 4, 3, groups=2),
}


def inputs(layer):
    if isinstance(layer, nn.Linear):
        return torch.randn(2, 3, layer.in_features)
    return torch.randn(2, layer.in_channels, 8, 8)


def column_dora(layer, rank=2):
    """Factors of a layer and LyCORIS' merged weight without wd_on_output, in fp64."""
    weight = layer.weight.detach().double()
    groups = getattr(layer, "groups", 1)
    ones = [1] * (weight.ndim - 2)
    down = torch.randn(rank, *weight.shape[1:])
    up = torch.randn(len(weight), rank // groups, *ones)
    magnitude = torch.rand(1, weight.shape[1], *ones) + 0.5
    update = torch.cat(
        [
            (u.flatten(1).double() @ d.flatten(1).double()).reshape(-1, *weight.shape[1:])
            for u, d in zip(up.chunk(groups), down.chunk(groups), strict=True)
        ]
    )
    tuned = weight + 0.5 * update
    norm = tuned.transpose(0, 1).flatten(1).norm(dim=1).reshape(magnitude.shape)
    return LowRank(down, up, 0.5, magnitude), tuned * magnitude.double() / norm


def run_with(layer, weight, x):
    other = copy.deepcopy(layer).double()
    with torch.no_grad():
        other.weight.copy_(weight)
        return other(x.double()).float()


@pytest.mark.parametrize("strength", [1.0, 0.3, -1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_a_dora_by_columns_acts_as_its_merged_weight(name, strength):
    layer = LAYERS[name]()
    net, x = nn.ModuleDict({"a": layer}), inputs(layer)
    before = layer.weight.detach().clone()
    lr, merged = column_dora(layer)
    at_strength = before.double() + strength * (merged - before.double())
    injection.load_factors(net, {"a": lr}, "file", strength)
    assert type(net["a"].adapter("file")) is ColumnDoRA
    torch.testing.assert_close(net["a"](x), run_with(layer, at_strength, x), rtol=1e-5, atol=1e-5)
    folded = merged_state_dict(net, "file", strength)["a.weight"]
    torch.testing.assert_close(folded, at_strength.float(), rtol=1e-6, atol=1e-6)
    fold_adapter(net, "file", strength)
    torch.testing.assert_close(net["a"].base.weight.detach(), folded, rtol=0, atol=0)
    unfold_adapter(net, "file")
    injection.remove(net, "file")
    assert net["a"] is layer and torch.equal(layer.weight, before)


@pytest.mark.parametrize("magnitude", ["", "rows", "columns"])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_a_dense_update_acts_as_its_merged_weight(name, magnitude):
    layer = LAYERS[name]()
    net, x, weight = nn.ModuleDict({"a": layer}), inputs(layer), layer.weight.detach().double()
    delta = torch.randn(weight.shape)
    merged, given = weight + delta.double(), None
    if magnitude:
        axis = 0 if magnitude == "rows" else 1
        others = [d for d in range(weight.ndim) if d != axis]
        norm = merged.square().sum(others, keepdim=True).sqrt()
        given = torch.rand(norm.shape) + 0.5
        merged = merged * given.double() / norm
        given = given.flatten() if magnitude == "rows" else given
    update = DenseUpdate("full", tuple(weight.shape), {"diff": delta}, magnitude=given)
    injection.load_factors(net, {"a": update}, "file", 0.5)
    assert type(net["a"].adapter("file")) is LycorisUpdate
    half = weight + 0.5 * (merged - weight)
    torch.testing.assert_close(net["a"](x), run_with(layer, half, x), rtol=1e-5, atol=1e-5)
    injection.set_strength(net, "file", 0.0)
    assert torch.equal(net["a"](x), layer(x))
    injection.remove(net, "file")
    assert net["a"] is layer


def test_kinds_add_up_on_one_layer():
    """W + t1 (W_1 - W) + t2 (W_2 - W) + delta, each against the base weight."""
    layer = LAYERS["linear"]()
    net, x = nn.ModuleDict({"a": layer}), inputs(layer)
    weight = layer.weight.detach().double()
    lr, merged = column_dora(layer)
    delta = torch.randn(5, 7)
    plain = LowRank(torch.randn(2, 7), torch.randn(5, 2), 2.0)
    injection.load_factors(net, {"a": lr}, "one", 0.5)
    update = DenseUpdate("full", (5, 7), {"diff": delta})
    injection.load_factors(net, {"a": update}, "two", -1.0)
    injection.load_factors(net, {"a": plain}, "three")
    total = weight + 0.5 * (merged - weight) - delta.double()
    total += 2 * plain.up.double() @ plain.down.double()
    torch.testing.assert_close(net["a"](x), run_with(layer, total, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_keeps_wide_factors(dtype):
    layer = nn.Linear(64, 32)
    lr, _ = column_dora(layer)
    net, x = nn.ModuleDict({"a": layer.to(dtype)}), torch.randn(4, 64).to(dtype)
    injection.load_factors(net, {"a": lr}, "file")
    net.to(dtype)
    adapter = net["a"].adapter("file")
    assert adapter.gain.dtype == adapter.down.dtype == torch.float32
    weight = layer.weight.detach().float()
    tuned = weight + 0.5 * lr.up @ lr.down
    merged = tuned * lr.magnitude / tuned.norm(dim=0)
    exact = x.double() @ merged.double().T + layer.bias.detach().double()
    got = net["a"](x)
    assert got.dtype == dtype
    limit = 8 * torch.finfo(dtype).eps * float(exact.norm())
    assert float((got.detach().double() - exact).norm()) < limit


def test_what_does_not_fit_is_refused_before_any_change():
    layer = nn.Linear(7, 5)
    net = nn.ModuleDict({"a": layer})
    lr, _ = column_dora(layer)
    wrong = {
        r"magnitude \[1, 7\]": lr._replace(magnitude=torch.ones(1, 5)),
        "the full update of a has the shape": DenseUpdate(
            "full", (5, 6), {"diff": torch.ones(5, 6)}
        ),
    }
    for expected, update in wrong.items():
        with pytest.raises(UserError, match=expected):
            injection.load_factors(net, {"a": update}, "file")
    assert net["a"] is layer
    injection.load_factors(net, {"a": lr}, "file")
    with pytest.raises(UserError, match="remove it first or load under another name"):
        injection.load_factors(net, {"a": lr}, "file")
    quantized = nn.Linear(7, 5)
    quantized.weight = nn.Parameter(torch.ones(5, 7, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="whose columns have no norms"):
        injection.load_factors(nn.ModuleDict({"a": quantized}), {"a": lr}, "file")


def test_kinds_by_update():
    lr, _ = column_dora(nn.Linear(7, 5))
    assert kind_of_update(lr) is ColumnDoRA
    kinds = [kind_of_update(lr._replace(magnitude=m)).__name__ for m in (None, torch.ones(5))]
    assert kinds == ["LoRA", "DoRA"]
    assert kind_of_update(DenseUpdate("full", (1, 1), {"diff": torch.ones(1, 1)})) is LycorisUpdate


def lycoris_file(path, pipe):
    """LoHa, LoKr, full and a DoRA by columns in one file, and each layer's merged weight."""
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    start = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
    first, second = block.attn1, block.attn2
    width = first.to_q.weight.shape[0]
    w1, w2 = torch.randn(width, 2), torch.randn(2, width)
    w3, w4 = torch.randn(width, 2), torch.randn(2, width)
    left, right = torch.randn(2, 2), torch.randn(width // 2, width // 2)
    diff = torch.randn(width, width)
    dora, merged = column_dora(second.to_k)
    tensors = {
        f"{start}attn1_to_q.hada_w1_a": w1, f"{start}attn1_to_q.hada_w1_b": w2,
        f"{start}attn1_to_q.hada_w2_a": w3, f"{start}attn1_to_q.hada_w2_b": w4,
        f"{start}attn1_to_q.alpha": torch.tensor(1.0),
        f"{start}attn1_to_k.lokr_w1": left, f"{start}attn1_to_k.lokr_w2": right,
        f"{start}attn1_to_v.diff": diff,
        f"{start}attn2_to_k.lora_down.weight": dora.down,
        f"{start}attn2_to_k.lora_up.weight": dora.up,
        f"{start}attn2_to_k.alpha": torch.tensor(1.0),
        f"{start}attn2_to_k.dora_scale": dora.magnitude,
    }  # fmt: skip
    save_file(tensors, path, {"ss_network_args": json.dumps({"wd_on_output": "False"})})
    deltas = {first.to_q: 0.5 * (w1 @ w2) * (w3 @ w4), first.to_k: torch.kron(left, right)}
    deltas |= {first.to_v: diff, second.to_k: merged.float() - second.to_k.weight.detach()}
    return deltas


def test_patch_applies_a_file_and_gives_the_weights_back(pipe, tmp_path):
    deltas = lycoris_file(tmp_path / "l.safetensors", pipe)
    modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    xs = {layer: torch.randn(3, layer.in_features) for layer in deltas}
    paths = {layer: path for path, layer in pipe.unet.named_modules() if layer in deltas}
    with patch(modules, tmp_path / "l.safetensors", 0.5) as patched:
        for layer, delta in deltas.items():
            x = xs[layer]
            wanted = run_with(layer, layer.weight + 0.5 * delta, x)
            got = pipe.unet.get_submodule(paths[layer])(x)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        patched.set_strength(0.0)
        for layer, x in xs.items():
            assert torch.equal(pipe.unet.get_submodule(paths[layer])(x), layer(x))
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert all(pipe.unet.get_submodule(paths[layer]) is layer for layer in deltas)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_infer_draws_as_the_folded_model(tmp_path, monkeypatch, strength):
    monkeypatch.chdir(tmp_path)
    pipe = save_sd_pipeline(Path("model"))
    lycoris_file("l.safetensors", pipe)
    assert merge.main(["fold", "model", f"{strength}*l.safetensors", "folded"]) == 0
    common = ["--prompt", "a", "--steps", "3", "--seed", "5"]
    images = []
    for name, lora in (("folded", []), ("model", ["--lora", f"l.safetensors:{strength}"]),
                       ("model", [])):  # fmt: skip
        out = f"{len(images)}.png"
        assert infer.main(["--model", name, *common, "--out", out, *lora]) == 0
        images.append(numpy.asarray(Image.open(out)).astype(int))
    folded, applied, plain = images
    assert abs(folded - applied).max() <= 2 < abs(folded - plain).max()
