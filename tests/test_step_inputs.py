"""Inputs of a step: the same drawn ahead as on the spot, and latents from a cache."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from lora_core.config import AdapterConfig, Config, PriorConfig, Stage
from lora_core.data.dataset import micro_batches
from lora_core.errors import UserError
from tests.conftest import final, same
from tests.opened_run import open_parts
from training import cuda_graph
from training.stages import begin_stage
from training.step_inputs import InputSource, TokenIds, make_step_inputs


def test_another_vae_and_another_cache_change_what_they_should(
    config: Config, quick: None, model: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(5)
    vae = AutoencoderKL.from_pretrained(model / "vae")
    with torch.no_grad():
        vae.encoder.conv_out.weight.mul_(1.5)
    vae.save_pretrained(tmp_path / "vae")
    cached = replace(config, data=replace(config.data, cache=str(tmp_path / "cache")))
    base, filled = train.train(config), train.train(replace(cached, out=config.out + "1"))
    files = list((tmp_path / "cache").iterdir())
    assert 1 < len(files) <= 5 and same(final(base), final(filled))
    other = train.train(replace(cached, out=config.out + "2", vae=str(tmp_path / "vae")))
    assert not same(final(base), final(other)) and len(list((tmp_path / "cache").iterdir())) > len(
        files
    )


def test_inputs_drawn_ahead_are_those_drawn_on_the_spot(config: Config, quick: None) -> None:
    config = replace(
        config,
        accumulation=2,
        batch_size=1,
        stages=(Stage(1, ("denoiser", "text_encoder", "tokens")),),
        prior=PriorConfig(swap={"TOK": "cat"}),
        adapter=AdapterConfig(rank=2, dropout=0.1),
    )
    s = open_parts(config)
    stage = config.stages[0]
    begin_stage(stage, config, s.model, s.optimization)
    batch = next(iter(s.data.batches(config, 0, 1)))
    inputs = make_step_inputs(s.source, batch, stage, 0, check=True)
    assert len(inputs) == 2
    again = InputSource(config, s.data, s.model)  # encodes and tokenizes anew
    for part, ahead in zip(micro_batches(batch, 2), inputs, strict=True):
        (alone,) = make_step_inputs(
            InputSource(replace(config, accumulation=1), s.data, s.model),
            part, stage, 0, check=True,
        )  # fmt: skip
        given = cuda_graph.tree_tensors(ahead)
        for a, b in zip(cuda_graph.tree_tensors(alone), given, strict=True):
            assert torch.equal(a, b)
    repeated = make_step_inputs(again, batch, stage, 0, check=True)
    for a, b in zip(cuda_graph.tree_tensors(repeated), cuda_graph.tree_tensors(inputs)):
        assert torch.equal(a, b)
    x = inputs[0]
    assert isinstance(x.text, TokenIds) and x.swapped is not None
    assert x.dropout_keys is not None and x.step.item() == x.number == 0
    assert len(cuda_graph.tree_tensors(x)) >= 12


@pytest.mark.parametrize("change", ["nan", "shape", "names"])
def test_a_bad_row_of_the_latent_cache_is_named(
    config: Config, quick: None, tmp_path: Path, change: str
) -> None:
    config = replace(config, data=replace(config.data, cache=str(tmp_path / "cache")))
    train.train(config)
    for file in (tmp_path / "cache").iterdir():
        row = load_file(file)
        row = {
            "nan": lambda r: r | {"std": r["std"] * float("nan")},
            "shape": lambda r: {k: t[:, :2] for k, t in r.items()},
            "names": lambda r: {"x": r["mean"]},
        }[change](row)
        save_file({name: tensor.contiguous() for name, tensor in row.items()}, file)
    said = {
        "nan": "NaN or infinity in std",
        "shape": r"mean \[4, 2, 8\].*expected mean \[4, 8, 8\]",
        "names": "holds x .*expected mean",
    }
    with pytest.raises(UserError, match=rf"cache file .*safetensors .*{said[change]}.*delete it"):
        train.train(replace(config, out=config.out + "2"))
