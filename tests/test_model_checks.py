"""model_checks: what is refused, printed and returned once data and model are known."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.adapters.injection import inject
from lora_core.adapters.targets import select_paths
from lora_core.config import Config, Stage, TokensConfig
from lora_core.data.records import Record
from lora_core.errors import UserError
from lora_core.formats.layout import Layout
from lora_core.placeholders import make_placeholders
from lora_core.settings import AdapterSpec
from lora_core.tokens import install_tokens
from models import load_family, read_layout
from tests.conftest import merged
from training.checks import model_checks

BOTH = (Stage(groups=("denoiser", "text_encoder")),)


@pytest.fixture(scope="module")
def family(model: Path) -> Any:
    return load_family(str(model))


@pytest.fixture(scope="module")
def layout(model: Path) -> Layout:
    return read_layout(str(model), "")


def adapted(config: Config, **settings: Any) -> Config:
    return replace(config, adapter=replace(config.adapter, **settings))


def records(*captions: str) -> list[Record]:
    return [
        Record(Path(f"{i}.png"), (caption,), None, False, str(i), (16, 16))
        for i, caption in enumerate(captions)
    ]


# ---------------------------------------------------------------- adapters


def test_a_plan_holds_what_injection_chooses(config: Config, layout: Layout, family: Any) -> None:
    """The paths of a component's layers are those of the loaded module."""
    config = replace(config, stages=BOTH)
    plan = model_checks.plan_adapters(config, layout)
    assert set(plan) == {"unet", "text_encoder"}
    for name, spec in plan.items():
        module = copy.deepcopy(family.modules[name])
        part = layout.component(name)
        paths = [path.removeprefix(part.module_prefix) for path in part.shapes]
        assert inject(module, spec) == select_paths(paths, spec.targets)
    assert set(model_checks.plan_adapters(replace(config, stages=(Stage(),)), layout)) == {"unet"}


def test_presets_become_globs_and_globs_stay(config: Config, layout: Layout) -> None:
    targets = ("attention", "*.ff.net.2", "conv_in")
    plan = model_checks.plan_adapters(adapted(config, targets=targets), layout)
    globs = layout.presets["unet"]["attention"]
    assert plan["unet"].targets == (*globs, "*.ff.net.2", "conv_in")


def test_a_pattern_goes_to_the_components_that_it_matches(config: Config, layout: Layout) -> None:
    config = adapted(
        replace(config, stages=BOTH),
        exclude=("attn2.to_q",),
        rank_pattern={"*.to_k": 2, "*.k_proj": 3, "*to_v": 5},
        alpha_pattern={"q_proj": 1.0},
    )
    plan = model_checks.plan_adapters(config, layout)
    assert plan["unet"].exclude == ("attn2.to_q",) and plan["text_encoder"].exclude == ()
    assert plan["unet"].rank_pattern == {"*.to_k": 2, "*to_v": 5}
    assert plan["text_encoder"].rank_pattern == {"*.k_proj": 3}
    assert not plan["unet"].alpha_pattern
    assert plan["text_encoder"].alpha_pattern == {"q_proj": 1.0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"targets": ("atention",)}, "'atention' is no layer of unet and none of its presets"),
        ({"targets": ("*.to_z",)}, r"--adapter.targets: '\*.to_z' matches none of the 83 layers"),
        ({"exclude": ("k_proj",)}, "--adapter.exclude: 'k_proj' matches none of the"),
        ({"rank_pattern": {"mid.*": 2}}, "--adapter.rank-pattern: 'mid.*' matches none of the"),
        ({"alpha_pattern": {"to_z": 2.0}}, "--adapter.alpha-pattern: 'to_z' matches none of the"),
    ],
)
def test_what_matches_nowhere_is_refused(
    config: Config, layout: Layout, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        model_checks.plan_adapters(adapted(config, **settings), layout)


def two_layers(**settings: Any) -> tuple[nn.Module, list[str]]:
    network = nn.ModuleDict({"to_q": nn.Linear(6, 4), "to_v": nn.Linear(6, 2)})
    return network, inject(network, AdapterSpec(targets=("*",), **settings))


def test_the_adapters_are_counted(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    network, paths = two_layers(rank=2)
    config = adapted(config, rank=2)
    assert model_checks.report_adapters(config, {"unet": network}, {"unet": paths})
    count = 2 * (6 + 4) + 2 * (6 + 2)
    said = f"unet: lora, rank 2, {count} parameters on 2 layers"
    assert capsys.readouterr().out == f"{said}: attention 2\n"
    listing = replace(config, list_targets=True)
    model_checks.report_adapters(listing, {"unet": network}, {"unet": paths})
    assert capsys.readouterr().out == f"{said}\n  2  to_q, to_v\n"


def test_full_updates_have_no_rank(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    network, paths = two_layers(kind="full")
    full = adapted(config, kind="full")
    assert not model_checks.report_adapters(full, {"unet": network}, {"unet": paths})
    count = 6 * 4 + 4 + 6 * 2 + 2
    said = f"unet: full, {count} parameters on 2 layers: attention 2\n"
    assert capsys.readouterr().out == said


# ---------------------------------------------------------------- the model


class Levels:
    """The part of a schedule that the checks read."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count

    def __len__(self) -> int:
        return self.count


VP, FLOW = Levels("vp", 1000), Levels("flow", 1000)


def a_family(**settings: Any) -> Any:
    """What the checks read of a model: a UNet that predicts v, whose empty prompt is encoded."""
    plain = {"multiple": 8, "schedule": VP, "prediction": "v_prediction", "zeros": ()}
    return SimpleNamespace(**plain | {"distilled_guidance": False} | settings)


@pytest.mark.parametrize(
    ("change", "family", "said"),
    [
        ({}, {}, ""),
        ({"data": {"resolution": 20}}, {}, "--data.resolution 20 is not a multiple of 8"),
        ({"data": {"resolution": 20}}, {"multiple": 2}, ""),
        (
            {"data": {"buckets": True, "bucket_step": 4}},
            {},
            "--data.bucket-step 4 is not a multiple of 8",
        ),
        ({"data": {"bucket_step": 4}}, {}, ""),  # config_checks refuses it without buckets
        (
            {"validation": {"every": 1, "bins": 10}},
            {"schedule": Levels("vp", 9)},
            "--validation.bins is 10, more than the 9 timesteps",
        ),
        (
            {"noise": {"zero_terminal_snr": True}},
            {"prediction": "epsilon"},
            "--noise.zero-terminal-snr: at pure noise epsilon carries no information",
        ),
        ({"noise": {"zero_terminal_snr": True}}, {}, ""),
        ({"noise": {"shift": 3.0}}, {}, "--noise.shift and --noise.dynamic-shift have no effect"),
        ({"noise": {"dynamic_shift": True}}, {}, "which is no flow model"),
        ({"noise": {"shift": 3.0}}, {"schedule": FLOW}, ""),
        ({"noise": {"dynamic_shift": True}}, {"schedule": FLOW}, ""),
        (
            {"noise": {"dynamic_shift": True}},
            {"schedule": FLOW, "has_dynamic_shift": False},
            "--noise.dynamic-shift has no effect on this model, whose shift is the same at every",
        ),
        ({"noise": {"guidance": 2.0}}, {}, "--noise.guidance has no effect on this model"),
        ({"noise": {"guidance": 2.0}}, {"distilled_guidance": True}, ""),
        (
            {"data": {"caption_dropout": 0.1, "dropped": "zeros"}},
            {},
            "--data.dropped zeros has no effect on this model",
        ),
        (
            {"samples": {"negative": "blurry"}},
            {"distilled_guidance": True},
            "--samples.negative has no effect on a guidance-distilled model",
        ),
        ({"samples": {"negative": "blurry"}}, {}, ""),
    ],
)
def test_options_that_a_model_does_not_have_are_refused(
    config: Config, change: dict[str, Any], family: dict[str, Any], said: str
) -> None:
    config = merged(config, change)
    if not said:
        model_checks.check_model(config, a_family(**family))
        return
    with pytest.raises(UserError, match=said):
        model_checks.check_model(config, a_family(**family))


@pytest.mark.parametrize(
    ("share", "dropped", "zeros", "encoding"),
    [
        (0.0, "model", ("prompt_embeds",), ""),
        (0.1, "model", (), "the encoding of the empty prompt"),
        (0.1, "model", ("prompt_embeds",), "zeros"),
        (0.1, "zeros", ("prompt_embeds",), "zeros"),
        (0.1, "empty", ("prompt_embeds",), "the encoding of the empty prompt"),
    ],
)
def test_the_encoding_of_dropped_captions_is_printed(
    config: Config,
    capsys: pytest.CaptureFixture[str],
    share: float,
    dropped: str,
    zeros: tuple[str, ...],
    encoding: str,
) -> None:
    config = merged(config, {"data": {"caption_dropout": share, "dropped": dropped}})
    family = a_family(zeros=zeros)
    model_checks.check_model(config, family)
    assert capsys.readouterr().out == (f"dropped captions: {encoding}\n" if encoding else "")
    assert model_checks.drops_to_zeros(config, family) == (encoding == "zeros")


# ---------------------------------------------------------------- captions and tokens


@pytest.mark.parametrize("masks", ["auto", "any", "none"])
@pytest.mark.parametrize("found", [True, False])
def test_masks_that_are_asked_for_are_found(config: Config, masks: str, found: bool) -> None:
    config = merged(config, {"data": {"masks": masks}})
    images: Any = SimpleNamespace(has_masks=found)
    if found or masks == "none":
        model_checks.check_masks(config, images)
        return
    with pytest.raises(UserError, match=f"--data.masks {masks} finds no mask for any image"):
        model_checks.check_masks(config, images)


def test_words_are_swapped_whole_and_once() -> None:
    swap = {"TOK": "a TOK2", "TOK2": "dog"}
    assert model_checks.swap_words("TOK, TOK2 and TOKEN", swap) == "a TOK2, dog and TOKEN"
    assert model_checks.swap_words("a cat", swap) == "a cat"


@pytest.mark.parametrize(
    ("words", "init", "expected"),
    [
        (("TOK",), ("dog",), {"TOK": "dog"}),
        (("A", "B"), ("zero",), {"A": "zero", "B": "zero"}),
        (("A", "B"), ("red", "blue"), {"A": "red", "B": "blue"}),
        (("A", "A"), ("red",), "--tokens.words has a word twice: A A"),
        (("A", "B", "C"), ("red", "blue"), "--tokens.init has 2 entries for 3 words"),
        (("A",), (), "--tokens.init has 0 entries for 1 words"),
    ],
)
def test_each_word_has_an_initializer(
    config: Config, words: tuple[str, ...], init: tuple[str, ...], expected: dict[str, str] | str
) -> None:
    config = replace(config, tokens=TokensConfig(words=words, init=init))
    if isinstance(expected, dict):
        assert model_checks.token_initializers(config) == expected
        return
    with pytest.raises(UserError, match=expected):
        model_checks.token_initializers(config)


def test_images_without_the_placeholder_word_are_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model_checks.check_placeholder(records("TOK", "a TOK."), "TOK")
    assert not capsys.readouterr().err
    repeated = records("TOK", "a dog", "TOKEN")
    model_checks.check_placeholder(repeated * 2, "TOK")
    assert capsys.readouterr().err == (
        "warning: 2 of 3 images have captions without the placeholder word TOK, first 1.png\n"
    )
    with pytest.raises(UserError, match="no caption has the placeholder word CAT"):
        model_checks.check_placeholder(repeated, "CAT")


@pytest.mark.parametrize("own, side", [(512, 64), (64, 512), (161, 64), (25, 64)])
def test_a_resolution_far_from_the_models_is_said(config: Config, own: int, side: int) -> None:
    config = replace(config, model="toy/model", data=replace(config.data, resolution=own))
    said = f"--data.resolution {own}, and toy/model was made for {side} pixels"
    assert model_checks.describe_far_resolution(config, side) == said
    for near in (own, own * 2, own // 2, round(own * 2.5)):
        assert model_checks.describe_far_resolution(config, near) == ""


def check_limit(family: Any, captions: Sequence[str]) -> None:
    """The check of two words with two tokens each; the text encoder reads 16."""
    encoder = copy.deepcopy(family.modules["text_encoder"])
    tokenizer = copy.deepcopy(family.tokenizers["text_encoder"])
    words = make_placeholders(["TOK", "CAT"], vectors=2)
    rows = install_tokens(encoder, tokenizer, words, seed=0)
    length = tokenizer.model_max_length
    own: Any = SimpleNamespace(
        tokenizers={"text_encoder": tokenizer},
        tokenize=lambda prompts: {"ids": torch.zeros(len(prompts), length, dtype=torch.int64)},
    )
    model_checks.check_token_limit(own, {"text_encoder": rows}, words, records(*captions))


def test_tokens_beyond_the_limit_of_some_captions_are_a_warning(
    family: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    check_limit(family, ["a TOK", "CAT a"])
    assert not capsys.readouterr().err
    check_limit(family, ["a TOK", "CAT a", "a " * 13 + "TOK", "a " * 20 + "CAT"])
    assert capsys.readouterr().err == (
        "warning: 2 of 4 captions lose learned tokens beyond the 16 tokens that text_encoder "
        "reads, first of 2.png; write the placeholder word nearer the beginning\n"
    )


def test_a_token_beyond_the_limit_of_every_caption_is_refused(family: Any) -> None:
    said = (
        "the token <s1> of TOK lies beyond the 16 tokens that text_encoder reads in every caption, "
        "first of 1.png, so it would learn nothing; write TOK nearer the beginning"
    )
    with pytest.raises(UserError, match=said):
        check_limit(family, ["a CAT", "a " * 13 + "TOK", "a " * 20 + "TOK"])


def test_a_caption_of_several_images_is_told_by_the_first(
    family: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a " * 13 + "TOK"
    check_limit(family, ["a TOK", long, long])
    assert "first of 1.png" in capsys.readouterr().err
