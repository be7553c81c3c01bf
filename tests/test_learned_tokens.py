"""Learned tokens of a run: starts, stopped rows, and tokens for each layer from caption to file."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from lora_core import formats
from lora_core.config import Config, Stage, TokensConfig
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.placeholders import Placeholder
from lora_core.tokens import hold_rows_
from tests import tiny_flux
from tests.conftest import learned, rows
from training.learned_tokens import describe_learned_tokens

LAYERS = 4  # cross-attention layers of the tiny UNet


@pytest.fixture
def layered(config: Config) -> Config:
    """Two vectors in each layer, the first random, the second a letter; LoRA in both networks."""
    tokens = TokensConfig(vectors=2, init=("<rand-0.013>+b",), per_layer=True, norm="none")
    stages = (Stage(3, ("denoiser", "text_encoder", "tokens")),)
    return replace(config, tokens=tokens, stages=stages)


def test_ed_lora_trains_saves_and_resumes(
    layered: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train.train(layered)
    said = capsys.readouterr().out
    assert "tokens: TOK is <s0><s1> to <s6><s7>, by layer" in said
    assert re.search(r"<s1> to <s7>, 4 layers: norm .* to .*, moved .* to .*, nearest b in 4", said)
    assert "diffusers, A1111 and ComfyUI cannot read such words" in (run / "README.md").read_text()
    (file,) = run.glob("*_emb.safetensors")
    state = formats.load(file)
    assert state.tokens["clip_l"].shape == (2 * LAYERS, 16)
    assert embeddings.word_layers(state) == {"TOK": LAYERS}
    own = state.tokens["clip_l"].unflatten(0, (LAYERS, 2))
    assert (own[0] - own[1]).abs().amax(-1).min() > 0, "each layer has learned its own rows"
    whole = learned(run)
    out = layered.out + "_resumed"
    first = replace(layered, out=out, save_every=1, stages=(Stage(2, layered.stages[0].groups),))
    train.train(first)
    again = train.train(replace(layered, out=out, resume=True, resume_anyway=True))
    assert all(torch.equal(value, learned(again)[key]) for key, value in whole.items())


def test_learned_tokens_are_one_line_each_and_one_for_all_layers() -> None:
    def entry(name: str, norm: float, word: str, encoder: str = "clip_l") -> dict[str, Any]:
        near = [(f"{word}</w>", 0.9), ("b</w>", 0.5)]
        return {"encoder": encoder, "name": name, "nearest": near, "norm": norm, "drift": 0.1}

    placeholders = [
        Placeholder("A", ("<s0>", "<s1>", "<s2>"), layers=3),
        Placeholder("B", ("<s3>", "<s4>")),
    ]
    words = ("cat", "dog", "cat", "fox", "owl")
    learned = [entry(f"<s{i}>", i + 1, word) for i, word in enumerate(words)]
    assert describe_learned_tokens(learned, placeholders) == [
        "<s0> to <s2>, 3 layers: norm 1.000 to 3.000, moved 0.100 to 0.100, "
        "nearest cat in 2, dog in 1",
        "<s3>: norm 4.000, moved 0.100, nearest fox 0.90, b 0.50",
        "<s4>: norm 5.000, moved 0.100, nearest owl 0.90, b 0.50",
    ]
    both = learned + [entry(own["name"], 1, "x", "clip_g") for own in learned]
    lines = describe_learned_tokens(both, placeholders)
    assert len(lines) == 6 and lines[1].startswith("<s3> of clip_l: ")
    assert lines[3].startswith("<s0> to <s2> of clip_g, 3 layers: ")


def test_rows_of_all_layers_start_alike(layered: Config, quick: None) -> None:
    config = replace(
        layered,
        tokens=replace(layered.tokens, norm="none"),
        stages=(Stage(1, ("denoiser", "tokens"), lr={"tokens": 0.0}),),
    )
    (file,) = train.train(config).glob("*_emb.safetensors")
    own = formats.load(file).tokens["clip_l"].unflatten(0, (LAYERS, 2))
    assert torch.equal(own, own[:1].expand_as(own))
    assert not torch.equal(own[0, 0], own[0, 1])


def test_one_layer_for_all_equals_plain_tokens(layered: Config, quick: None) -> None:
    """With rows that do not train, a text for each layer is the same text in all layers."""
    still = {"tokens": 0.0}
    runs = []
    for per_layer in (True, False):
        config = replace(
            layered,
            out=f"{layered.out}_{per_layer}",
            tokens=replace(layered.tokens, init=("b",), vectors=1, per_layer=per_layer),
            stages=(Stage(3, ("denoiser", "tokens"), lr=still, weight_decay=still),),
        )
        runs.append([row["loss"] for row in rows(train.train(config)) if "loss" in row])
    assert runs[0] == runs[1]


def test_stopped_rows_never_move_again() -> None:
    before, after = torch.full((2, 4), 0.5), torch.randn(2, 4)
    assert torch.equal(hold_rows_(after.clone(), before, limit=0.99), before)
    assert torch.equal(hold_rows_(after.clone(), before, limit=1.01), after)


def test_rows_stop_at_the_norm_and_others_go_on(config: Config, quick: None) -> None:
    """Mix-of-Show's rule: the step that reaches the limit counts, later ones do not."""
    stage = Stage(6, ("denoiser", "tokens"), lr={"tokens": 0.05}, norm="stop")
    lengths = {}
    for steps in range(1, 7):
        run = replace(
            config,
            out=f"{config.out}_{steps}",
            stages=(replace(stage, steps=steps),),
            tokens=TokensConfig(init=("<rand-0.01>",), norm_target=0.5),
        )
        (file,) = train.train(run).glob("*_emb.safetensors")
        lengths[steps] = formats.load(file).tokens["clip_l"]
    means = [float(lengths[steps].norm(dim=-1).mean()) for steps in range(1, 7)]
    reached = next(i for i, mean in enumerate(means) if mean >= 0.5)
    assert 0 < reached < 5 and means[reached - 1] < 0.5
    assert all(torch.equal(lengths[reached + 1], lengths[steps]) for steps in range(reached + 1, 7))


def test_rows_that_would_never_train_are_refused(config: Config, quick: None) -> None:
    tokens = TokensConfig(norm="stop", norm_target=0.01)
    stages = (Stage(2, ("denoiser", "tokens")),)
    with pytest.raises(UserError, match="would stop the token rows of text_encoder before"):
        train.train(replace(config, tokens=tokens, stages=stages))


def test_per_layer_tokens_need_layers_that_read_the_text(config: Config, tmp_path: Path) -> None:

    tiny_flux.save(tmp_path / "flux", guidance=False)
    flux = replace(
        config,
        model=str(tmp_path / "flux"),
        tokens=TokensConfig(per_layer=True),
        stages=(Stage(1, ("denoiser", "tokens")),),
    )
    with pytest.raises(UserError, match=r"--tokens\.per-layer needs layers of cross-attention"):
        train.train(flux)
