"""Probes of adapters: which layers have them, at which rank and scale, by the config's patterns."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lora_core.adapters import injection
from lora_core.config import AdapterConfig, Config, Stage
from training.probes import adapter_probes as probes

PRESETS = {"attention": ("*.to_q", "*.to_k")}


def injected(**settings: Any) -> Any:
    """A step of a denoiser with two blocks, in whose layers to_q, to_k and to_v adapters of these
    settings are; rank 4 unless they say another.
    """
    names = ("to_q", "to_k", "to_v")
    blocks = [nn.ModuleDict({name: nn.Linear(8, 8) for name in names}) for _ in range(2)]
    denoiser = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
    usual = {"targets": ("*.to_q", "*.to_k"), "rank": 4}
    injection.inject(denoiser, AdapterConfig(**(usual | settings)), seed=0)
    family = SimpleNamespace(
        modules={"unet": denoiser}, tokenizers={}, layout=SimpleNamespace(presets={"unet": PRESETS})
    )
    return SimpleNamespace(model=SimpleNamespace(family=family, adapted={"unet": denoiser}))


def asked(step: Any, **settings: Any) -> Any:
    """The step, in a run whose config has these settings of adapters."""
    adapter = replace(AdapterConfig(rank=4), **settings)
    step.config = Config(adapter=adapter, stages=(Stage(1, ("denoiser",)),))
    return step


@pytest.mark.parametrize(
    "wanted, found",
    [
        ({"targets": ("attention",)}, True),
        ({"targets": ("*.to_q", "blocks.*.to_k")}, True),
        ({"targets": ("*.to_q",)}, False),  # to_k has adapters too
        ({"targets": ("attention", "*.to_v")}, False),  # to_v has none
        ({"targets": ("attention", "*.to_v"), "exclude": ("*.to_v",)}, True),
    ],
)
def test_layers_with_adapters_are_those_of_the_targets(wanted: Any, found: bool) -> None:
    assert probes.adapts_denoiser(asked(injected(), **wanted)) is found
    assert probes.adapts_text_encoders(asked(injected(), **wanted)) is None  # none trains


@pytest.mark.parametrize("exclude, found", [(("*.to_v",), True), (("blocks.1.*",), False)])
def test_excluded_layers_have_none(exclude: tuple[str, ...], found: bool) -> None:
    assert probes.excludes_layers(asked(injected(), exclude=exclude)) is found


def test_kinds_are_told_apart() -> None:
    assert probes.has_kind(asked(injected(kind="dora"), kind="dora"))
    assert not probes.has_kind(asked(injected(kind="lora"), kind="dora"))


def test_the_last_pattern_of_a_layer_counts() -> None:
    patterns = {"*.to_q": 2.0, "blocks.1.*": 3.0}
    step = asked(injected(rank_pattern=patterns), rank_pattern=patterns)
    assert probes.has_rank(step) and probes.has_pattern_ranks(step)
    step = asked(injected(rank_pattern={"*.to_q": 2.0}), rank_pattern=patterns)
    assert probes.has_rank(step) and not probes.has_pattern_ranks(step)
    everywhere = {"*": 2.0}
    step = asked(injected(rank_pattern=everywhere), rank=8, rank_pattern=everywhere)
    assert probes.has_rank(step) is None  # no layer has the rank of the config


def test_scales_are_those_of_alpha_and_its_patterns() -> None:
    patterns = {"*.to_q": 2.0}
    for rslora in (False, True):
        given = {"alpha": 1.0, "alpha_pattern": patterns, "rslora": rslora}
        step = asked(injected(**given), **given)
        assert probes.has_scale(step) and probes.has_pattern_scales(step)
        step = asked(injected(**given), **given | {"rslora": not rslora})
        assert not probes.has_scale(step) and not probes.has_pattern_scales(step)
    step = asked(injected(alpha=1.0), alpha=1.0, alpha_pattern=patterns)
    assert probes.has_scale(step) and not probes.has_pattern_scales(step)
