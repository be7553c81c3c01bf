"""Runs on a quantized or streamed base: the bits of runs without streaming, and files that fit the
model's own weights.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train
from lora_core import formats
from lora_core.adapters import injection
from lora_core.config import AdapterConfig, OptimizerConfig, Stage
from lora_core.errors import UserError
from lora_core.toml import parse_toml
from models import load_family
from tests.conftest import final, learned, merged, rows, same
from tests.opened_run import open_parts
from training import nonfinite
from training.checks import config_checks
from training.inputs.step_inputs import make_step_inputs

STREAMED = {"stream": True, "gradient_checkpointing": "blocks"}


@pytest.fixture
def dora(config):
    """The config with a DoRA whose magnitudes move visibly."""
    optimizer = OptimizerConfig(lr={"denoiser": 3e-2})
    return replace(config, adapter=AdapterConfig(kind="dora", rank=2), optimizer=optimizer)


@pytest.mark.parametrize("change", [{}, {"quantize": "int8"}, {"adapter": {"kind": "dora"}}])
def test_streamed_runs_have_the_same_bits(quick, config, change):
    config = merged(config, {**change, "gradient_checkpointing": "blocks"})
    plain = train.train(config)
    streamed = train.train(merged(config, {**STREAMED, "out": f"{config.out}_streamed"}))
    assert same(final(streamed), final(plain))
    assert [row.get("loss") for row in rows(streamed)] == [row.get("loss") for row in rows(plain)]


def test_a_run_on_four_bits_resumes_to_the_bit(quick, config):
    config = merged(config, {"quantize": "int4", **STREAMED, "stages": (Stage(steps=4),)})
    whole = train.train(config)
    half = merged(config, {"out": f"{config.out}_half", "stages": (Stage(steps=2),)})
    train.train(half)
    resumed = train.train(merged(config, {"out": half.out, "resume": True}))
    assert same(learned(resumed), learned(whole))
    with pytest.raises(UserError, match="quantize was int4, is fp8"):
        train.train(merged(config, {"out": half.out, "resume": True, "quantize": "fp8"}))


def test_a_lora_file_has_the_same_form_and_says_how_it_was_trained(quick, config):
    plain = train.train(config)
    packed = train.train(merged(config, {"quantize": "fp8", "out": f"{config.out}_fp8"}))
    files = [folder / f"{folder.name}.safetensors" for folder in (plain, packed)]
    shapes = [{k: t.shape for k, t in load_file(file).items()} for file in files]
    assert shapes[0] == shapes[1]
    header = formats.load(str(files[1]), load_family(config.model).layout).metadata
    assert parse_toml(header["lora_core.config"], "the header")["quantize"] == "fp8"


def test_a_dora_file_acts_on_the_own_weights_as_it_was_trained(quick, dora):
    """Its gains, magnitude / norm, are those of the run."""
    opened = open_parts(replace(dora, quantize="int4"))
    opened.take_steps(3)
    file = opened.checkpoints.learned_state(3).components["unet"]
    own = load_family(dora.model).modules["unet"]
    layout = opened.model.family.layout
    trained = opened.model.adapted["unet"]
    changed = 0.0
    for path, layer in injection.layers_with_adapter(trained, "default").items():
        adapter = layer.adapter("default")
        gain = adapter.magnitude / adapter.norm(layer.base)
        update = file[layout.published("unet", path)]
        weight = own.get_submodule(path).weight
        norm = (weight + update.scale * update.up @ update.down).norm(dim=1)
        torch.testing.assert_close(update.magnitude / norm, gain, rtol=1e-5, atol=0)
        changed = max(
            changed, float((update.magnitude / adapter.magnitude.detach() - 1).abs().max())
        )
    assert changed > 1e-3  # 4 bits: the norms of the two weights differ


def test_full_updates_are_folded_into_the_own_weights(quick, config):
    adapter = AdapterConfig(kind="full", targets=("*.attn1.to_q",))
    rate = OptimizerConfig(lr={"denoiser": 1e-3})
    run = train.train(
        merged(config, {"adapter": adapter, "optimizer": rate, "quantize": "int8", **STREAMED})
    )
    before = load_family(config.model).modules["unet"].state_dict()
    after = load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    changed = [key for key in after if not torch.equal(after[key], before[key])]
    assert changed and all(".attn1.to_q." in key for key in changed)
    updates = [t for name, t in sorted(learned(run).items()) if t.ndim == 2]
    largest = max(float((after[key] - before[key]).abs().max()) for key in changed)
    assert largest == pytest.approx(max(float(t.abs().max()) for t in updates), rel=1e-3)


def test_the_search_for_nan_looks_at_packed_weights(quick, config):
    opened = open_parts(merged(config, {"quantize": "fp8", **STREAMED}))
    batch = next(iter(opened.data.batches(opened.config, 0, 1)))
    opened.take_steps(1)
    inputs = make_step_inputs(opened.source, batch, opened.config.stages[0], 0, check=True)
    assert nonfinite.find_nonfinite_part(inputs, opened.model, opened.config) == ""
    block = next(m for m in opened.model.denoiser.modules() if hasattr(m, "packed_scale"))
    block.packed_scale.fill_(float("nan"))
    sentence = nonfinite.find_nonfinite_part(inputs, opened.model, opened.config)
    assert "unet has NaN or infinity among its weights" in sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantize": "int8", "precision": "fp64"}, "--precision is fp64"),
        ({"quantize": "int4", "compile": True}, "--compile cannot trace the packed weights"),
        ({**STREAMED, "compile": True}, "--compile needs weights that stay"),
        ({**STREAMED, "cuda_graph": True}, "--cuda-graph needs weights that stay"),
        ({"quantize": "int8", "shard": True}, "--shard divides .* and --quantize stores"),
        ({**STREAMED, "shard": True}, "--shard divides .* and --stream stores"),
        ({"stream": True}, "--stream needs --gradient-checkpointing"),
    ],
)
def test_what_does_not_go_together_is_refused(config, change, words):
    with pytest.raises(UserError, match=words):
        config_checks.check_config(merged(config, change))
