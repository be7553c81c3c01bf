"""Networks that are quantized or streamed on their way to the device: which layers, and that fresh
adapters change nothing on them.
"""

import pytest
import torch
from torch import nn

from lora_core.adapters import injection
from lora_core.adapters.adapted_layer import adaptable_layers
from lora_core.adapters.folded_weights import fold_adapter
from lora_core.errors import UserError
from lora_core.family import LoadOptions
from lora_core.memory.quantized_weights import QuantizedLinear
from lora_core.settings import AdapterSpec
from models import load_family, placement
from models.placement import checkpointed_blocks, place_networks, repeated_blocks
from tests import tiny_flux

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux") / "model"
    tiny_flux.save(folder)
    return folder


def quantized_paths(network):
    return [path for path, layer in adaptable_layers(network).items() if is_packed(layer)]


def is_packed(layer):
    return isinstance(getattr(layer, "base", layer), QuantizedLinear)


def random_inputs(network):
    """Inputs of a tiny UNet."""
    c = network.config
    torch.manual_seed(1)
    text = torch.randn(2, 5, c.cross_attention_dim)
    return torch.randn(2, c.in_channels, 8, 8), torch.tensor([3, 700]), text


@torch.no_grad()
def run(network):
    return network(*random_inputs(network)).sample


def test_linear_layers_of_the_blocks_are_quantized_and_no_others(model):
    family = load_family(str(model))
    place_networks(family, CPU, "int8")
    unet = family.modules["unet"]
    packed = quantized_paths(unet)
    assert packed and all(".transformer_blocks." in path for path in packed)
    for path, layer in adaptable_layers(unet).items():
        if isinstance(layer, nn.Linear) and ".transformer_blocks." in path:
            assert path in packed
    assert not quantized_paths(family.modules["text_encoder"])


def test_flux_keeps_its_ends_and_a_large_encoder_is_quantized_unless_it_trains(
    flux_folder, monkeypatch
):
    family = load_family(str(flux_folder))
    place_networks(family, CPU, "fp8")
    transformer = family.modules["transformer"]
    packed = quantized_paths(transformer)
    ends = set(adaptable_layers(transformer)) - set(packed)
    assert {path.split(".")[0] for path in ends} == {
        "time_text_embed", "context_embedder", "x_embedder", "norm_out", "proj_out"
    }  # fmt: skip
    t5 = family.modules["text_encoder_2"]
    assert not quantized_paths(t5)
    monkeypatch.setattr(placement, "LARGE_ENCODER", 1)
    for trained, expected in ((["text_encoder", "text_encoder_2"], 0), (["text_encoder"], 1)):
        fresh = load_family(str(flux_folder))
        place_networks(fresh, CPU, "fp8", trained=trained)
        t5 = fresh.modules["text_encoder_2"]
        assert bool(quantized_paths(t5)) == bool(expected)
    before = family.encode_prompts(["a"]).prompt_embeds
    after = fresh.encode_prompts(["a"]).prompt_embeds
    assert 0 < float((after - before).norm() / before.norm()) < 0.1


@pytest.mark.parametrize(
    ("form", "stream"), [("fp8", False), ("int8", False), ("int4", False), ("int4", True)]
)
def test_fresh_adapters_are_the_identity_on_the_quantized_base(model, form, stream):
    families = [load_family(str(model), LoadOptions(torch.float32)) for _ in range(3)]
    for family, kind in zip(families, (None, "lora", "dora")):
        unet = family.modules["unet"]
        if kind:
            spec = AdapterSpec(kind=kind, targets=("*.attn1.*", "*.attn2.*", "*.conv1"), rank=2)
            injection.inject(unet, spec)
        place_networks(family, CPU, form, stream=stream)
    base, lora, dora = (run(family.modules["unet"]) for family in families)
    assert torch.equal(lora, base)
    assert torch.equal(dora, base)
    unet = families[2].modules["unet"]
    if not stream:
        with injection.cache_dora_norms(unet):
            assert torch.equal(run(unet), base)


def test_a_dora_keeps_its_gain(model):
    unet = load_family(str(model)).modules["unet"]
    injection.inject(unet, AdapterSpec(kind="dora", targets=("*.attn1.to_q",), rank=2))
    path, layer = next((p, x) for p, x in adaptable_layers(unet).items() if hasattr(x, "adapters"))
    dora = layer.adapter("default")
    dora.magnitude.data.mul_(torch.linspace(0.5, 2, len(dora.magnitude)))
    dora.up.data.normal_()
    gain = dora.magnitude / dora.norm(layer.base)
    layer.change_base(lambda base: QuantizedLinear(base, "int4"), CPU)
    assert layer.run is not None and is_packed(layer), path
    torch.testing.assert_close(dora.magnitude / dora.norm(layer.base), gain, rtol=1e-6, atol=0)


def test_packed_weights_take_no_fold_and_a_removed_adapter_leaves_them(model):
    family = load_family(str(model))
    unet = family.modules["unet"]
    place_networks(family, CPU, "int8")
    base = run(unet)
    injection.inject(unet, AdapterSpec(targets=("*.attn1.*",), rank=2))
    for up in injection.up_parameters(unet):
        up.data.normal_()
    changed = run(unet)
    with pytest.raises(UserError, match=r"has a packed weight \(--quantize\)"):
        fold_adapter(unet)
    assert torch.equal(run(unet), changed) and not torch.equal(changed, base)
    injection.remove(unet)
    assert torch.equal(run(unet), base)


def test_blocks_are_those_that_checkpointing_recomputes(model, flux_folder):
    unet = load_family(str(model)).modules["unet"]
    kinds = {type(block).__name__ for block in checkpointed_blocks(unet).values()}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D"}
    family = load_family(str(flux_folder))
    assert len(repeated_blocks(family.modules["transformer"])) == 4
    assert list(repeated_blocks(family.modules["text_encoder_2"])) == [
        "encoder.block.0", "encoder.block.1"
    ]  # fmt: skip


def test_what_cannot_be_done_is_refused(model):
    family = load_family(str(model))
    family.modules["unet"] = nn.Linear(4, 4)
    with pytest.raises(UserError, match="--quantize int8 finds no linear layer in the blocks"):
        place_networks(family, CPU, "int8")
    with pytest.raises(UserError, match="--stream finds no repeated blocks in Linear"):
        place_networks(family, CPU, "none", stream=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stream", [False, True])
def test_networks_that_are_not_resident_end_on_the_host_with_their_adapters(flux_folder, stream):
    family = load_family(str(flux_folder))
    injection.inject(family.modules["transformer"], AdapterSpec(targets=("*to_q",), rank=2))
    place_networks(family, torch.device("cuda"), "int8", stream=stream, resident=())
    for network in family.modules.values():
        assert all(p.device == CPU for p in [*network.parameters(), *network.buffers()])
