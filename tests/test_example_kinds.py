"""The adapters of examples/, against the formulas of their papers in float64, and against peft
where it has the method; short runs of those that need something of training.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_riemannian_optimizer
from safetensors.torch import load_file
from torch import Tensor, nn

import infer
import train
from lora_core import formats, patch
from lora_core.adapters import injection, kind_laws, noise_levels, training_requests
from lora_core.adapters.adapted_layer import layers_with_adapter
from lora_core.adapters.injection import AdapterSpec
from lora_core.adapters.kinds import kind_class
from lora_core.config import Config, Stage
from lora_core.errors import UserError
from tests import tiny_pipeline
from tests.conftest import final, same
from tests.product_examples import needs_lycoris

KINDS = {
    "IA3": "examples/my_adapter.py:IA3",
    "VeRA": "examples/vera.py:VeRA",
    "PiSSA": "examples/start_from_weight.py:PiSSA",
    "OLoRA": "examples/start_from_weight.py:OLoRA",
    "TLoRA": "examples/t_lora.py:TLoRA",
    "LoRAFA": "examples/lora_fa.py:LoRAFA",
    "Riemannian": "examples/riemannian.py:Riemannian",
}
OUTPUTS, INPUTS, RANK = (7, 9), (6, 7), 3
COMMON = {"r": RANK, "target_modules": ["a", "b"]}


class Denoiser(nn.Module):
    """Two layers, of other widths, that a timestep comes along with."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a = nn.Linear(INPUTS[0], OUTPUTS[0], dtype=dtype)
            self.b = nn.Linear(INPUTS[1], OUTPUTS[1], bias=False, dtype=dtype)

    def forward(self, sample: Tensor, timestep: Any = 0) -> Tensor:
        return self.b(self.a(sample))


def example(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 5, INPUTS[0], generator=generator, dtype=torch.float64).to(dtype)


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Denoiser:
    model = Denoiser(dtype)
    if kind != "IA3":
        options = {"rank": RANK, **options}
    injection.inject(model, AdapterSpec(("a", "b"), kind=KINDS[kind], **options), seed=3)
    return model


def adapters(model: nn.Module) -> list[Any]:
    return [layer.adapter("default") for layer in layers_with_adapter(model, "default").values()]


def nudge(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in injection.adapter_parameters(model):
            parameter += torch.randn(parameter.shape, generator=generator).to(parameter) / 2


def by_hand(weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    y = example()
    for weight, bias in zip(weights, biases, strict=True):
        y = nn.functional.linear(y, weight, bias)
    return y


@pytest.mark.parametrize("file", sorted({kind.split(":")[0] for kind in KINDS.values()}))
def test_an_idea_has_forty_lines(file: str) -> None:
    text = Path(file).read_text()
    assert len(text.splitlines()) <= 40
    assert "arXiv" in text and "python train.py configs/" in text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_is_the_base_layer_and_keeps_the_laws(kind: str, dtype: torch.dtype) -> None:
    model, plain = adapted(kind, dtype), Denoiser(dtype)
    noise_levels.set_largest_timestep(model, 1.0)
    x = example(dtype)
    assert torch.equal(model(x, 0.5), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), bases(model)))
    kind_laws.check_kind_laws({"unet": model}, KINDS[kind])


def bases(model: nn.Module) -> list[Tensor]:
    return [value for name, value in model.state_dict().items() if ".base." in name]


def test_ia3_scales_the_outputs_as_pefts() -> None:
    model = adapted("IA3")
    nudge(model)
    settings = peft.IA3Config(target_modules=["a", "b"], feedforward_modules=[])
    peer = peft.get_peft_model(Denoiser(), settings).double()
    scales = [adapter.scale.detach().double() for adapter in adapters(model)]
    base = Denoiser()
    weights = [(1 + s)[:, None] * layer.weight for s, layer in zip(scales, (base.a, base.b))]
    assert torch.allclose(model(example()), by_hand(weights, [(1 + scales[0]) * base.a.bias, None]))
    with torch.no_grad():
        for layer, scale in zip((peer.model.a, peer.model.b), scales):
            layer.ia3_l["default"].copy_((1 + scale)[:, None])
    assert torch.allclose(model(example()), peer(example()))


@needs_lycoris
def test_ia3_is_lycoris_too() -> None:
    """Its outputs where it scales them (bypass), and its change of the weight."""
    from lycoris.modules.ia3 import IA3Module

    model, base = adapted("IA3"), Denoiser()
    nudge(model)
    for adapter, name, width in zip(adapters(model), "ab", INPUTS):
        layer = getattr(base, name)
        peer = IA3Module(name, layer)
        peer.apply_to()  # takes the layer's own forward
        peer.weight.data = adapter.scale.detach().double()
        delta, _ = peer.get_diff_weight()
        assert torch.allclose(adapter.delta_weight(layer).double(), delta)
        x = example()[..., :1].expand(-1, -1, width)
        assert torch.allclose(getattr(model, name)(x), peer.bypass_forward(x))


def test_vera_has_one_pair_for_all_layers_and_is_pefts() -> None:
    model = adapted("VeRA")
    first, second = adapters(model)
    assert first.pair is second.pair and first.pair.A.data_ptr() == second.pair.A.data_ptr()
    assert first.pair.A.shape == (RANK, max(INPUTS)) and first.pair.B.shape == (max(OUTPUTS), RANK)
    assert [p.numel() for p in injection.adapter_parameters(model)] == [RANK, 7, RANK, 9]
    assert set(first.state_dict()) == {"d", "b"}
    assert torch.equal(first.pair.B, adapters(adapted("VeRA"))[0].pair.B)
    model.to(torch.float32)
    assert first.pair is second.pair
    model.to(torch.float64)
    nudge(model)
    settings = peft.VeraConfig(vera_dropout=0.0, **COMMON)
    peer = peft.get_peft_model(Denoiser(), settings)
    a, b = peer.base_model.vera_A["default"], peer.base_model.vera_B["default"]
    limits = [tensor.abs().max() / math.sqrt(6 / tensor.shape[1]) for tensor in (a, b)]
    own = [t.abs().max() / math.sqrt(6 / t.shape[1]) for t in (first.pair.A, first.pair.B)]
    assert all(0.8 < float(limit) <= 1 for limit in (*limits, *own))
    with torch.no_grad():
        a.copy_(first.pair.A)
        b.copy_(first.pair.B)
        for layer, adapter in zip(
            (peer.base_model.model.a, peer.base_model.model.b), (first, second)
        ):
            layer.vera_lambda_d["default"].copy_(adapter.d[:, 0])
            layer.vera_lambda_b["default"].copy_(adapter.b[:, 0])
    assert torch.allclose(model(example()), peer.double()(example()), atol=1e-6)
    (a, b), base, weights = (first.pair.A.double(), first.pair.B.double()), Denoiser(), []
    for adapter, layer in zip((first, second), (base.a, base.b)):
        out, inner = layer.weight.shape
        d, v = adapter.d[:, 0].double(), adapter.b[:, 0].double()
        weights.append(layer.weight + torch.diag(v) @ b[:out] @ torch.diag(d) @ a[:, :inner])
    assert torch.allclose(model(example()), by_hand(weights, [base.a.bias, None]), atol=1e-6)


@pytest.mark.parametrize("kind", ["PiSSA", "OLoRA"])
def test_lora_that_starts_from_the_weight_is_pefts(kind: str) -> None:
    model = adapted(kind, torch.float32, alpha=2.0 * RANK)
    settings = peft.LoraConfig(init_lora_weights=kind.lower(), lora_alpha=2 * RANK, **COMMON)
    peer = peft.get_peft_model(Denoiser(torch.float32), settings)
    layers = peer.base_model.model.a, peer.base_model.model.b
    for adapter, layer in zip(adapters(model), layers):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.allclose(adapter.up @ adapter.down, b @ a, atol=1e-5)
        assert torch.allclose(
            adapter.down.abs(), a.abs(), atol=1e-4
        )  # singular vectors have a sign
    nudge(model)
    with torch.no_grad():
        for adapter, layer in zip(adapters(model), layers):
            layer.lora_A["default"].weight.copy_(adapter.down)
            layer.lora_B["default"].weight.copy_(adapter.up)
            layer.base_layer.weight.copy_(bases(model)[0 if layer is layers[0] else 2])
            layer.base_layer.weight -= 2 * adapter.up0 @ adapter.down0
    x = example(torch.float32)
    assert torch.allclose(model(x), peer(x), atol=2e-4)
    update = injection.adapter_factors(model)["a"]
    assert update.rank == 2 * RANK
    first = adapters(model)[0]
    wanted = 2 * (first.up @ first.down - first.up0 @ first.down0)
    assert torch.allclose(update.scale * update.up @ update.down, wanted, atol=1e-5)


@needs_lycoris
def test_t_lora_has_the_ranks_of_lycoris() -> None:
    from lycoris.modules.tlora import compute_timestep_mask

    adapter = adapters(adapted("TLoRA", rank=6))[0]
    timesteps = torch.arange(0.0, 1001.0, 50.0, dtype=torch.float64)
    adapter.level = SimpleNamespace(fraction=timesteps / 1000)
    wanted = [compute_timestep_mask(t, 1000, 6, min_rank=3)[0] for t in timesteps.tolist()]
    assert torch.equal(adapter.rank_mask(timesteps), torch.stack(wanted).double())


def test_t_lora_masks_ranks_by_the_level_of_each_example() -> None:
    model = adapted("TLoRA", rank=6)
    nudge(model)
    noise_levels.set_largest_timestep(model, 1000.0)
    timesteps = torch.tensor([0.0, 400.0, 700.0, 1000.0])
    y = model(example(), timesteps)
    base = Denoiser()
    for i, t in enumerate(timesteps.tolist()):
        acting = math.floor((6 - 3) * (1000 - t) / 1000) + 3
        own = [adapter.up[:, :acting] @ adapter.down[:acting] for adapter in adapters(model)]
        weights = [layer.weight + delta for layer, delta in zip((base.a, base.b), own)]
        assert torch.allclose(y[i], by_hand(weights, [base.a.bias, None])[i])
    with pytest.raises(UserError, match="no LoRA file holds"):
        injection.adapter_factors(model)


def test_lora_fa_trains_up_as_a_frozen_down_of_peft() -> None:
    model = adapted("LoRAFA")
    peer = peft.get_peft_model(Denoiser(), peft.LoraConfig(lora_alpha=RANK, **COMMON)).double()
    layers = peer.base_model.model.a, peer.base_model.model.b
    with torch.no_grad():
        for adapter, layer in zip(adapters(model), layers):
            layer.lora_A["default"].weight.copy_(adapter.down)
            layer.lora_A["default"].requires_grad_(False)
    downs = [adapter.down.clone() for adapter in adapters(model)]
    optimizers = [
        torch.optim.AdamW(injection.adapter_parameters(model), lr=0.1),
        torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=0.1),
    ]
    assert len(optimizers[0].param_groups[0]["params"]) == 2
    for _ in range(3):
        for optimizer, network in zip(optimizers, (model, peer)):
            optimizer.zero_grad()
            network(example()).square().sum().backward()
            optimizer.step()
    assert torch.allclose(model(example()), peer(example()))
    assert all(torch.equal(a, b.down) for a, b in zip(downs, adapters(model)))


def test_riemannian_gradients_are_the_papers_and_pefts() -> None:
    model = adapted("Riemannian")
    nudge(model)
    model(example()).square().sum().backward()
    own, wanted = adapters(model), []
    for adapter in own:
        down, up, eye = adapter.down.detach(), adapter.up.detach(), torch.eye(RANK).double()
        of_up = adapter.up.grad @ torch.linalg.inv(down @ down.T + 1e-6 * eye)
        of_down = torch.linalg.inv(up.T @ up + 1e-6 * eye) @ adapter.down.grad
        wanted.append((of_up, of_down))
    peer = peft.get_peft_model(Denoiser(), peft.LoraConfig(lora_alpha=RANK, **COMMON)).double()
    layers = peer.base_model.model.a, peer.base_model.model.b
    with torch.no_grad():
        for adapter, layer in zip(own, layers):
            layer.lora_A["default"].weight.copy_(adapter.down)
            layer.lora_B["default"].weight.copy_(adapter.up)
    optimizer = create_riemannian_optimizer(peer, torch.optim.SGD, lr=1.0, reg=1e-6)
    peer(example()).square().sum().backward()
    optimizer.step()
    hooks = training_requests.gradient_hooks(model)
    assert len(hooks) == 2
    for hook in hooks:
        hook()
    for adapter, (of_up, of_down), layer in zip(own, wanted, layers):
        assert torch.allclose(adapter.up.grad, of_up, rtol=1e-9)
        assert torch.allclose(adapter.down.grad, of_down, rtol=1e-9)
        stepped = adapter.up.detach() - adapter.up.grad
        assert torch.allclose(layer.lora_B["default"].weight, stepped, rtol=1e-6)


def halves(config: Config, kind: str, groups: tuple[str, ...] = ("denoiser",)) -> list[Path]:
    """A run of two steps, and the same run resumed after the first of them."""
    own = replace(
        config,
        adapter=replace(config.adapter, kind=KINDS[kind]),
        stages=(Stage(2, groups),),
        save_every=1,
    )
    run, part = train.train(own), Path(f"{config.out}part")
    shutil.copytree(run, part)
    shutil.rmtree(part / "checkpoints/2")
    return [run, train.train(replace(own, out=str(part), resume=True))]


def test_a_run_of_vera_is_a_lora_and_its_own_vectors(config: Config, quick: None) -> None:
    run, resumed = halves(config, "VeRA", ("denoiser", "text_encoder"))
    assert same(final(run), final(resumed))
    own = load_file(run / "run_adapter.safetensors")
    assert {name.rpartition(".")[2] for name in own} == {"b", "d"}
    state = formats.load(run)
    assert state.components.keys() == {"unet", "text_encoder"} and not state.custom
    from models import load_family

    family = load_family(config.model)
    modules = {name: family.modules[name] for name in state.components}
    with patch(modules, run, kind=KINDS["VeRA"]) as applied:
        found = injection.adapter_factors(modules["unet"], applied.name)
    for path, factors in state.components["unet"].items():
        delta = found[family.layout.module_path("unet", path)]
        wanted = factors.scale * factors.up @ factors.down
        assert torch.equal(delta.scale * delta.up @ delta.down, wanted)
        assert wanted.abs().max() > 0


def test_a_run_of_t_lora_reads_the_level_wherever_the_network_is_called(
    config: Config, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    mask: Callable[..., Tensor] = kind_class(KINDS["TLoRA"]).rank_mask

    def remember(adapter: Any, x: Tensor) -> Tensor:
        seen.append(adapter.level.fraction.tolist())
        return mask(adapter, x)

    monkeypatch.setattr(kind_class(KINDS["TLoRA"]), "rank_mask", remember)
    run, resumed = halves(config, "TLoRA")
    assert same(final(run), final(resumed))
    assert not (run / "model").exists() and not list(run.glob("pytorch*"))
    card = (run / "README.md").read_text()
    assert "An adapter for lora_core (run_adapter.safetensors)" in card and "low-rank" in card
    assert [0.5, 0.5] in seen  # the one bin of the validation
    assert any(levels[0] != levels[1] for levels in seen if len(levels) == 2)  # of training
    seen.clear()
    words = ["--model", config.model, "--lora", str(run), "--prompt", "a TOK", "--steps", "2"]
    words += ["--adapter-kind", KINDS["TLoRA"], "--out", str(tmp_path / "a.png")]
    assert infer.main(words) == 0
    drawn = {tuple(levels) for levels in seen}  # with guidance: each level twice
    assert len(drawn) == 2 and all(level[0] == level[1] < 1 for level in drawn)
    with patch(tiny_pipeline.pipeline(), run, kind=KINDS["TLoRA"]) as applied:
        level = noise_levels.find_level(applied.modules["unet"])
        assert level is not None and level.t_max == 1000
    assert noise_levels.find_level(applied.modules["unet"]) is None
    both = replace(config, stages=(Stage(1, ("denoiser", "text_encoder")),), out=config.out + "te")
    with pytest.raises(UserError, match="TLoRA reads the noise level, which a text encoder"):
        train.train(replace(both, adapter=replace(config.adapter, kind=KINDS["TLoRA"])))
