"""Mistakes end in one sentence on stderr and status 2, before any work; nothing is overwritten.

Ctrl-C saves what was learned.
"""

import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import infer
import train
from lora_core.config import Config, PriorConfig, SamplesConfig, Stage
from lora_core.errors import CLOSED_PIPE, UserError
from lora_core.layer_prompts import encode_layer_prompts
from lora_core.placeholders import bind_layers, make_placeholders
from lora_core.runs import run_folder as run_module
from lora_core.tokens import install_tokens
from lora_core.toml import read_toml, to_toml
from models import load_family
from tests.conftest import final, learned, merged, same, save_photos
from training import setup, signals
from training.checks import config_checks

TOKENS = (Stage(2, ("tokens",)),)
ONLY: dict[str, Any] = {"stages": TOKENS, "optimizer": {"lr": {}}, "adapter": {"rank": 16}}


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(config: Config, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The sentence of a run that is refused: status 2, one line, no traceback, nothing written."""
    file = Path(config.out).parent / "given.toml"
    file.write_text(to_toml(config))
    before = snapshot(file.parent)
    capsys.readouterr()
    assert train.main([str(file), *flags]) == 2
    said = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")
    ]
    assert len(said) == 1 and said[0].startswith("error: "), said
    assert snapshot(file.parent) == before
    return said[0]


# ---------------------------------------------------------------- the config alone

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"data": {"images": ""}}, "--data.images"),
    "no folder": (
        {"data": {"images": "/no/such/folder"}},
        "the image folder /no/such/folder does not exist",
    ),
    "no stage": ({"stages": ()}, "at least one stage"),
    "no steps": ({"stages": (Stage(0),)}, "at least one step"),
    "no groups": ({"stages": (Stage(1, ()),)}, "stages.0.groups"),
    "batch": ({"batch_size": 0}, "--batch-size is 0; expected at least 1"),
    "bins": ({"validation": {"bins": 0}}, "--validation.bins is 0"),
    "workers": ({"data": {"workers": -1}}, "--data.workers is -1"),
    "clip": ({"optimizer": {"clip": -1.0}}, "--optimizer.clip is -1;"),
    "dropout": ({"adapter": {"dropout": 1.0}}, "--adapter.dropout is 1"),
    "negative lr": ({"optimizer": {"lr": {"denoiser": -1.0}}}, "--optimizer.lr denoiser=-1"),
    "nan lr": (
        {"stages": (Stage(1, lr={"denoiser": float("nan")}),)},
        "--stages.0.lr denoiser=nan",
    ),
    "lr of nobody": (
        {"optimizer": {"lr": {"text_encoder": 1.0}}},
        "--optimizer.lr names text_encoder, which no stage trains",
    ),
    "stage lr of nobody": (
        {"stages": (Stage(1, lr={"tokens": 1.0}),)},
        "--stages.0.lr names tokens, which this stage does not train",
    ),
    "low": ({"noise": {"low": 0.7, "high": 0.5}}, "timesteps 0.7 to 0.5"),
    "offset": ({"noise": {"offset": -1.0}}, "--noise.offset is -1; expected at least 0"),
    "zero snr of epsilon": (
        {"noise": {"zero_terminal_snr": True}},
        "--noise.prediction v_prediction",
    ),
    "loss": ({"loss": "msse"}, "unknown loss 'msse', the nearest is 'mse'"),
    "loss file": ({"loss": "nothing.py:fn"}, "nothing.py:fn names no Python file"),
    "loss argument": ({"loss_arg": {"delta": 1.0}}, "mse takes no argument 'delta'"),
    "weighting argument": (
        {"weighting": "min_snr", "weighting_arg": {"gama": 1.0}},
        "min_snr takes no argument 'gama'; it takes gamma",
    ),
    "optimizer": (
        {"optimizer": {"name": "adamv"}},
        "unknown optimizer 'adamv', the nearest is 'adamw'",
    ),
    "optimizer module": (
        {"optimizer": {"name": "torch.optmi.SGD"}},
        "module 'torch.optmi' cannot be imported",
    ),
    "optimizer class": ({"optimizer": {"name": "torch.optim.SDG"}}, "nearest: SGD"),
    "optimizer argument": (
        {"optimizer": {"args": {"epss": 1.0}}},
        "no argument 'epss'.*nearest: eps",
    ),
    "nan of a section": (
        {"data": {"zoom": math.nan}},
        "--data.zoom is nan; expected a finite number",
    ),
    "infinite offset": (
        {"noise": {"offset": math.inf}},
        "--noise.offset is inf; expected a finite number",
    ),
    "infinite rate": (
        {"optimizer": {"lr": {"denoiser": math.inf}}},
        "--optimizer.lr denoiser=inf; expected a finite number",
    ),
    "infinite rate of a stage": (
        {"stages": (Stage(1, ("denoiser", "tokens"), lr={"tokens": math.inf}),)},
        "--stages.0.lr tokens=inf; expected a",
    ),
    "nan to clip at": (
        {"optimizer": {"clip": math.nan}},
        "--optimizer.clip is nan; expected a finite number",
    ),
    "half a rank": (
        {"adapter": {"rank_pattern": {"*": 2.5}}},
        r"--adapter.rank-pattern \*=2.5; expected a whole number",
    ),
    "argument of no weighting": (
        {"weighting_arg": {"gamma": 5}},
        "--weighting-arg has no effect without --weighting",
    ),
    "text for a weighting": (
        {"weighting": "min_snr", "weighting_arg": {"gamma": "a"}},
        "argument gamma of weighting min_snr is 'a', expected a number",
    ),
    "negative weights": (
        {"weighting": "min_snr", "weighting_arg": {"gamma": -1}},
        "weighting min_snr with gamma=-1 gives weights from -1 to -1",
    ),
    "no weights": (
        {"weighting": "soft_min_snr", "weighting_arg": {"gamma": 0}},
        "gives weights from 0 to 0; expected numbers of at least 0",
    ),
    "weights of nan": (
        {"weighting": "min_snr", "weighting_arg": {"gamma": math.nan}},
        "gives weights from nan to nan",
    ),
    "text for a loss": (
        {"loss": "huber", "loss_arg": {"delta": "a"}},
        "argument delta of loss huber is 'a', expected a number",
    ),
    "more bins than timesteps": (
        {"validation": {"bins": 1001}},
        "--validation.bins is 1001, more than the 1000 timesteps",
    ),
    "a function as a kind": (
        {"adapter": {"kind": "examples/my_loss.py:edges"}},
        "not a torch.nn.Module class",
    ),
    "optimizer value": (
        {"optimizer": {"args": {"eps": -1.0}}},
        "adamw refuses its settings: AdamW got eps = -1.0",
    ),
    "optimizer closure": (
        {"optimizer": {"name": "torch.optim.LBFGS"}, "stages": (Stage(1, ("denoiser", "tokens")),)},
        "LBFGS",
    ),
    "decay of none": (
        {"optimizer": {"name": "torch.optim.Rprop", "weight_decay": {"denoiser": 0.1}}},
        "takes no weight_decay",
    ),
    "betas of none": (
        {"optimizer": {"name": "torch.optim.SGD", "betas": {"denoiser": (0.9, 0.9)}}},
        "takes no betas",
    ),
    "schedule argument": (
        {"optimizer": {"schedule_args": {"cycles": 2}}},
        "schedule constant takes no argument 'cycles'; it takes none",
    ),
    "sampler": ({"samples": {"sampler": "eulerr"}}, "eulerr.*euler"),
    "device": ({"device": "gpu"}, "--device gpu cannot be used"),
    "rank": (
        {"adapter": {"rank": 64}},
        r"rank 64 exceeds min\(in, out\) = 8 for "
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "target": (
        {"adapter": {"targets": ("attn1.to_qq",)}},
        "'attn1.to_qq' matches none of the .* nearest: .*attn1.to_q",
    ),
    "preset": (
        {"adapter": {"targets": ("atention",)}},
        "'atention' is no layer of unet and none of its presets, which are attention",
    ),
    "exclude": (
        {"adapter": {"exclude": ("ff.nett",)}},
        "--adapter.exclude: 'ff.nett' matches none",
    ),
    "rank pattern": (
        {"adapter": {"rank_pattern": {"ff.net.0.proj": 2}}},
        "--adapter.rank-pattern: 'ff.net.0.proj' matches none",
    ),
    "kind": ({"adapter": {"kind": "lorra"}}, "unknown adapter kind 'lorra'.*lora"),
    "resolution": ({"data": {"resolution": 17}}, "--data.resolution 17 is not a multiple of 2"),
    "model": ({"model": ""}, "--model"),
    "no model": ({"model": "/no/such/model"}, "/no/such/model is not a local folder; the hub"),
    "no placeholder": (
        ONLY | {"data": {"captions": "one", "caption": "a photo"}},
        "no caption has the placeholder word TOK",
    ),
    "word twice": (ONLY | {"tokens": {"words": ("TOK", "TOK")}}, "a word twice"),
    "initializer": (
        ONLY | {"tokens": {"vectors": 2, "init": ("c a t",)}},
        "initializer 'c a t' of TOK is 3 tokens, more than its 2 learned vectors",
    ),
    "initializers": (
        ONLY | {"tokens": {"init": ("c", "d")}},
        "--tokens.init has 2 entries for 1 words",
    ),
    "masks": ({"data": {"masks": "alpha"}}, "no alpha channel"),
    "held out": ({"validation": {"images": "/no/held/out"}}, "/no/held/out does not exist"),
    "vae": ({"vae": "/no/vae"}, "/no/vae"),
    # options without effect
    "mask temperature": (
        {"stages": (Stage(1, mask_temperature=2.0),)},
        "mask-temperature has no effect without masks",
    ),
    "stage norm": ({"stages": (Stage(1, norm="pull"),)}, "--stages.0.norm has no effect"),
    "tokens": (
        {"tokens": {"vectors": 3}},
        "--tokens.vectors has no effect without a stage that trains tokens",
    ),
    "norm target": (
        ONLY | {"tokens": {"norm": "none", "norm_target": 0.4}},
        "--tokens.norm-target has no effect without --tokens.norm pull",
    ),
    "adapter": (
        {"stages": TOKENS, "optimizer": {"lr": {}}},
        "--adapter.rank has no effect without a stage that trains denoiser or text_encoder",
    ),
    "text targets": (
        {"adapter": {"text_targets": ("kohya",)}},
        "--adapter.text-targets has no effect without a stage that trains text_encoder",
    ),
    "prior": ({"prior": {"weight": 0.5}}, "--prior.weight has no effect without --prior.prompt"),
    "prior count": ({"prior": {"count": 3}}, "--prior.count has no effect"),
    "discount": (
        {"noise": {"multires_discount": 0.5}},
        "--noise.multires-discount has no effect without --noise.multires-levels",
    ),
    "variants": ({"data": {"variants": 3}}, "--data.variants has no effect without a random crop"),
    "cache": (
        {"data": {"cache": "cache", "flip": True}},
        "--data.cache has no effect without --data.variants",
    ),
    "caption": ({"data": {"captions": "txt", "caption": "a cat"}}, "--data.caption is not used"),
    "base word": ({"samples": {"base_word": "cat"}}, "--samples.base-word has no effect"),
    "images and dataset": (
        {"data": {"dataset": "user/name"}},
        "either a folder with --data.images or a dataset",
    ),
    "two shifts": (
        {"noise": {"shift": 3.0, "dynamic_shift": True}},
        "--noise.shift 3 gives another; choose one",
    ),
    "shift": ({"noise": {"shift": 3.0}}, "Stable Diffusion, and --noise.shift 3 is for Flux"),
    "guidance": (
        {"noise": {"guidance": 1.0}},
        "Stable Diffusion, and --noise.guidance 1 is for Flux or FLUX.2; leave it out",
    ),
    "density": (
        {"noise": {"density": "logit_normal", "density_args": {"meen": 1.0}}},
        "'meen'.*mean",
    ),
    "density args": (
        {"noise": {"density_args": {"mean": 1.0}}},
        "--noise.density-args has no effect without --noise.density",
    ),
    "encoders": (
        ONLY | {"tokens": {"encoders": ("t5",)}},
        "and --tokens.encoders t5 is for Flux or Stable Diffusion 3; leave it out",
    ),
    "vectors of random": (ONLY | {"tokens": {"vectors": 0}}, "random"),
    "rank of full": ({"adapter": {"kind": "full", "rank": 3}}, "full"),
    "lora plus of full": (
        {"adapter": {"kind": "full", "rank": 16}, "optimizer": {"lora_plus": 4.0}},
        r"has no up and down, to which LoRA\+ gives",
    ),
    "ema": ({"ema": 1.0}, r"--ema is 1; expected a number in \[0, 1\)"),
    "class prompt": (
        ONLY | {"prior": {"prompt": "a photo of TOK"}},
        "--prior.prompt is 'a photo of TOK' and holds the placeholder word TOK",
    ),
    "class of a swap": (
        {"prior": {"swap": {"TOK": "a TOK"}}},
        "--prior.swap TOK is 'a TOK' and holds the placeholder",
    ),
    "class prompt of a swap": (
        {"prior": {"swap": {"TOK": "cat"}, "prompt": "TOK"}},
        "--prior.prompt is 'TOK' and holds the placeholder",
    ),
    "base word of a word": (
        ONLY | {"samples": {"base_word": "TOK"}},
        "--samples.base-word is 'TOK' and holds the placeholder",
    ),
    "init of a word": (
        ONLY | {"tokens": {"init": ("a TOK",)}},
        "--tokens.init is 'a TOK' and holds the placeholder",
    ),
    "cut placeholder": (
        ONLY | {"data": {"captions": "one", "caption": "a " * 20 + "TOK"}},
        "token <s0> of TOK lies beyond the 16 tokens .* every",
    ),
    "cut vector": (
        ONLY | {"data": {"captions": "one", "caption": "a " * 13 + "TOK"}},
        "token <s1> of TOK lies beyond the 16 tokens",
    ),
    "swap word": ({"prior": {"swap": {"FOO": "cat"}}}, "no caption has the placeholder word FOO"),
    "swap weight": (
        {"prior": {"swap_weight": 2.0}},
        "--prior.swap-weight has no effect without --prior.swap",
    ),
    "bucket step": (
        {"data": {"bucket_step": 8}},
        "--data.bucket-step has no effect without --data.buckets",
    ),
    "odd buckets": (
        {"data": {"buckets": True, "bucket_step": 3}},
        "--data.bucket-step 3 is not a multiple of 2",
    ),
    "caption column": (
        {"data": {"caption_column": "words", "captions": "txt"}},
        "--data.caption-column has no effect",
    ),
    "split": ({"data": {"split": "test"}}, "--data.split has no effect without --data.dataset"),
    "clip skip": ({"clip_skip": 9}, "--clip-skip is 9; expected 0 to 1"),
    "sequence": ({"max_sequence_length": 9}, "--max-sequence-length 9 is for Flux"),
    "negative": ({"samples": {"negative": "ugly"}}, "--samples.negative has no effect"),
    "warm-up": (
        {"optimizer": {"warmup": 3}, "stages": (Stage(5), Stage(2))},
        "--optimizer.warmup is 3 steps, longer than stage 1 of 2",
    ),
    "a stage's warm-up": (
        {"stages": (Stage(2, warmup=3),)},
        "--stages.0.warmup is 3 steps, longer than stage 0 of 2",
    ),
    "every stage's norm": (
        ONLY | {"tokens": {"norm": "rescale"}, "stages": (Stage(2, ("tokens",), norm="none"),)},
        "--tokens.norm has no effect",
    ),
    "every stage's low": (
        {"noise": {"low": 0.1}, "stages": (Stage(2, low=0.2),)},
        "--noise.low has no effect without a stage that has no low",
    ),
    "every stage's high": (
        {"noise": {"high": 0.5}, "stages": (Stage(2, high=0.7),)},
        "--noise.high has no effect",
    ),
    "every stage's schedule": (
        {"optimizer": {"schedule": "linear"}, "stages": (Stage(2, schedule="cosine"),)},
        "--optimizer.schedule has no effect",
    ),
    "stage decay of none": (
        {
            "optimizer": {"name": "torch.optim.Rprop"},
            "stages": (Stage(2, weight_decay={"denoiser": 0.1}),),
        },
        "no weight_decay",
    ),
    "validation of none": (
        {"validation": {"every": -1, "bins": 3}},
        "--validation.bins has no effect without --validation.every 0 or more",
    ),
    "held out for none": (
        {"validation": {"every": -1, "bins": 8, "images": "held"}},
        "--validation.images has no effect",
    ),
    "count of none": (
        {"validation": {"every": -1, "bins": 8, "count": 3}},
        "--validation.count has no effect",
    ),
    "seed of none": (
        {"validation": {"every": -1, "bins": 8, "seed": 3}},
        "--validation.seed has no effect",
    ),
    "less than none": (
        {"validation": {"every": -2}},
        "--validation.every is -2; expected at least -1",
    ),
    "count": ({"validation": {"count": -1}}, "--validation.count is -1; expected at least 0"),
    "dropped": (
        {"data": {"dropped": "zeros"}},
        "--data.dropped has no effect without --data.caption-dropout",
    ),
    "schedule": (
        {"optimizer": {"schedule": "my_schedule.py:fn"}},
        "my_schedule.py:fn names no Python file",
    ),
    "handed over": (
        {"loss": "<lambda of a.py>"},
        "--loss is <lambda of a.py>, which was passed in Python",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_config_is_one_sentence_and_moves_nothing(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, said = CONFIGS[name]
    (Path(config.out) / "samples").mkdir(parents=True)
    (Path(config.out) / "config.toml").write_text("the old run")
    sentence = refused(merged(replace(config, overwrite=True), change), capsys)
    assert re.search(said, sentence), sentence


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "option",
    [
        "samples.guidance",
        "optimizer.lr.denoiser",
        "noise.guidance",
        "tokens.norm_target",
        "prior.weight",
    ],
)
def test_numbers_that_are_none_are_refused_before_anything_is_read(
    config: Config, option: str, value: str
) -> None:
    name, table = option.split("."), float(value)
    for key in reversed(name):
        table = {key: table}  # type: ignore[assignment]
    config = merged(
        config, {"stages": (Stage(2, ("denoiser", "tokens")),), "prior": {"prompt": "a cat"}}
    )
    with pytest.raises(
        UserError, match=rf"--{name[0]}\.{name[1].replace('_', '-')}.*{value}.*expected"
    ):
        config_checks.check_config(merged(config, table))  # type: ignore[arg-type]


def test_texts_that_no_file_of_a_run_could_hold_are_refused_first(config: Config) -> None:
    for change, option in (
        ({"out": "runs/caf\udce9"}, "--out 'runs/caf"),
        ({"samples": {"prompts": ("TOK", "caf\udce9")}}, "--samples.prompts 'caf"),
        ({"prior": {"swap": {"caf\udce9": "cat"}}}, "--prior.swap 'caf"),
    ):
        with pytest.raises(UserError, match=rf"^{option}\\xe9' has bytes that are not UTF-8"):
            config_checks.check_config(merged(config, change))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_sizes = 2", "unknown key batch_sizes; did you mean batch_size?"),
        ("[optimizer]\nnane = 'adamw'", "unknown key optimizer.nane; did you mean optimizer.name?"),
        ("[[stages]]\nstep = 3", "unknown key stages.0.step; did you mean stages.0.steps?"),
        ("weighting = 'min_snrr'", "weighting"),
        ("[optimizer]\nschedule = 'cosin'", "schedule"),
        ("batch_size = 'two'", "batch_size"),
        ("batch_size = ", "is not a TOML file"),
    ],
)
def test_a_wrong_toml_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (tmp_path / "a.toml").write_text(text)
    assert train.main([str(tmp_path / "a.toml")]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ")
        and error.count("\n") == 1
        and said in error
        and str(tmp_path / "a.toml") in error
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimzer.name", "adamw"], "--optimizer.name"),
        (["--weighting", "min_snrr"], "min_snr"),
        (["--batch-size", "two"], "--batch-size"),
        (["--optimizer.lr", "denoiser"], "KEY=VALUE"),
    ],
)
def test_a_wrong_flag_names_the_nearest(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_no_config_file_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert train.main([str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr().err == f"error: no config file {tmp_path}/none.toml\n"


# ---------------------------------------------------------------- images and models


def test_wrong_images_are_named(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def said(folder: Path) -> str:
        return refused(merged(config, {"data": {"images": str(folder)}}), capsys)

    (tmp_path / "empty").mkdir()
    assert "no images in" in said(tmp_path / "empty")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("no picture")
    (tmp_path / "text" / "a.txt").write_text("TOK")
    assert f"cannot read the image {tmp_path}/text/a.png" in said(tmp_path / "text")
    cut = save_photos(tmp_path / "cut", side=64)
    whole = (cut / "2.png").read_bytes()
    (cut / "2.png").write_bytes(whole[: len(whole) // 2])
    assert f"cannot read the image {cut}/2.png" in said(cut)
    bare = save_photos(tmp_path / "bare")
    (bare / "3.txt").unlink()
    assert f"1 of 5 images lack a .txt file with a caption, first {bare}/3.png" in said(bare)


def test_captions_without_the_placeholder_are_counted(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    some = save_photos(tmp_path / "some")
    for name in ("1.txt", "4.txt"):
        (some / name).write_text("a photo")
    train.train(
        merged(
            config,
            {
                "data": {"images": str(some)},
                "stages": TOKENS,
                "optimizer": {"lr": {}},
                "adapter": {"rank": 16},
            },
        )
    )
    assert (
        "warning: 2 of 5 images have captions without the placeholder word TOK, first 1.png"
        in capsys.readouterr().err
    )


def test_wrong_models_are_named(
    config: Config, plain: None, model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def said(path: Path) -> str:
        return refused(replace(config, model=str(path)), capsys)

    for part in (
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ):
        broken = shutil.copytree(model, tmp_path / part.replace("/", "_"))
        shutil.rmtree(broken / part) if (broken / part).is_dir() else (broken / part).unlink()
        assert part in said(broken) and str(broken) in said(broken)
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"x")
    assert str(single) in said(single) and "truncated, damaged or no safetensors file" in said(
        single
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    assert "is a KandinskyPipeline, which is not supported; supported are StableDiffusion" in said(
        other
    )
    cut = shutil.copytree(model, tmp_path / "cut")
    weights = next((cut / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load unet/" in said(cut)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_the_files_lack_are_named_and_not_made_up(
    model: Path, tmp_path: Path, part: str
) -> None:
    cut = shutil.copytree(model, tmp_path / "cut")
    file = next((cut / part).glob("*.safetensors"))
    tensors = load_file(file)
    lost = [sorted(tensors)[i] for i in (2, 5, 7)]
    save_file(
        {name: t for name, t in tensors.items() if name not in lost},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(
        UserError,
        match=rf"cannot load {part}/ of {cut}: its files lack \S*{re.escape(lost[0])} and 2 more",
    ):
        load_family(str(cut))


def test_a_token_of_the_vocabulary_is_refused(
    config: Config, plain: None, model: Path, capsys: Any, tmp_path: Path
) -> None:
    from transformers import CLIPTokenizer

    known = shutil.copytree(model, tmp_path / "known")
    tokenizer = CLIPTokenizer.from_pretrained(known / "tokenizer")
    tokenizer.add_tokens(["<s0>"])
    tokenizer.save_pretrained(known / "tokenizer")
    wrong = merged(
        config,
        {"model": str(known), "stages": TOKENS, "optimizer": {"lr": {}}, "adapter": {"rank": 16}},
    )
    assert "the token <s0> is already in the tokenizer's vocabulary" in refused(wrong, capsys)


# ---------------------------------------------------------------- the output folder


def test_another_run_is_not_overwritten(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train.train(config)
    first = final(run)
    sentence = refused(replace(config, seed=1), capsys)
    assert "--resume" in sentence and "--overwrite" in sentence and "run.bak" in sentence
    assert "--resume and --overwrite" in refused(
        replace(config, seed=1), capsys, "--resume", "--overwrite"
    )
    train.train(replace(config, seed=1, overwrite=True))
    assert same(final(run.with_name("run.bak")), first) and not same(final(run), first)
    assert "overwrite = false" in (run / "config.toml").read_text()


def test_a_reader_of_the_output_that_has_ended_is_no_error(
    tmp_path: Path, photos: Path, model: Path
) -> None:
    words = [
        "train.py",
        "--model",
        str(model),
        "--data.images",
        str(photos),
        "--data.resolution",
        "16",
        "--out",
        str(tmp_path / "run"),
    ]
    root = Path(train.__file__).parent
    with subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        said = [line for line in child.stderr.read().splitlines() if "arning" not in line]
    assert (said, child.returncode) == ([], CLOSED_PIPE) and not (tmp_path / "run").exists()


def test_there_must_be_something_to_resume(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no run in" in refused(config, capsys, "--resume")


@pytest.mark.parametrize("where", ["checkpoint", "log", "picture", "adapter"])
def test_a_full_disk_is_one_sentence(
    config: Config, quick: None, capsys: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_bytes(path: Path, mode: str = "r", *args: Any, **given: Any) -> Any:
        return full() if mode == "wb" else open(path, mode, *args, **given)

    writers: dict[str, tuple[Any, str, Any]] = {
        "checkpoint": (run_module, "save_file", full),
        "picture": (Image.Image, "save", full),
        "adapter": (Path, "open", full_for_bytes),
    }
    if where == "log":

        def open_full(*args: Any, **settings: Any) -> Full:
            return Full(open(*args, **settings))

        monkeypatch.setattr(run_module, "open", open_full, raising=False)
    else:
        monkeypatch.setattr(*writers[where])
    file = Path(config.out).parent / "given.toml"
    file.write_text(to_toml(config))
    assert train.main([str(file)]) == 2
    (error,) = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("optimiser: ")
    ]
    assert error.startswith("error: the disk is full: ") and config.out in error
    assert not [p for p in Path(config.out).rglob(".*")]


class Full:
    """A file on a full disk."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------- Ctrl-C


def interrupt_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> None:
    """SIGINT in the at-th call of a function."""
    whole, calls = getattr(owner, name), [0]

    def call(*args: Any, **settings: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            signal.raise_signal(signal.SIGINT)
        return whole(*args, **settings)

    monkeypatch.setattr(owner, name, call)


def test_ctrl_c_saves_and_says_how_to_go_on(
    config: Config, quick: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        config, stages=(Stage(5),), out=str(Path(config.out).with_name("my run")), overwrite=True
    )
    given = Path(config.out).parent / "given.toml"
    given.write_text(to_toml(config))
    with monkeypatch.context() as patch:
        interrupt_in(patch, train, "make_step_inputs", 3)
        assert train.main([str(given)]) == 130
    error = capsys.readouterr().err
    assert (
        error.startswith("interrupted: the run is saved after step 3, go on with: python train.py ")
        and error.count("\n") == 1
    )
    assert (Path(config.out) / "checkpoints/3").is_dir() and signal.getsignal(
        signal.SIGINT
    ) is signal.default_int_handler
    command = shlex.split(error.split("go on with: ")[1])
    assert train.main(command[2:]) == 0
    whole = train.train(replace(config, out=config.out + "2"))
    assert same(final(Path(config.out)), final(whole))


def test_ctrl_c_before_the_first_step_claims_nothing(
    config: Config, quick: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Path(config.out).parent / "given.toml"
    given.write_text(to_toml(config))
    with monkeypatch.context() as patch:
        interrupt_in(patch, setup, "open_model", 1)
        assert train.main([str(given)]) == 130
    assert (
        capsys.readouterr().err == "interrupted: nothing was saved\n"
        and not Path(config.out).exists()
    )
    with monkeypatch.context() as patch:
        interrupt_in(patch, train.Log, "validate", 1)
        assert train.main([str(given)]) == 130
    error = capsys.readouterr().err
    assert "no step is saved" in error and "--resume" not in error
    assert train.main([str(given), "--overwrite"]) == 0


def test_ctrl_c_in_the_first_step_and_at_the_end(
    config: Config, quick: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name, at, step in (
        (train, "make_step_inputs", 1, 1),
        (train.results, "before_after_grid", 1, 2),
    ):
        with (
            monkeypatch.context() as patch,
            pytest.raises(KeyboardInterrupt, match=f"saved after step {step}, go on with"),
        ):
            interrupt_in(patch, owner, name, at)
            train.train(config)
        run = train.train(replace(config, resume=True))
        assert len(learned(run)) == 64
        shutil.rmtree(run)


def test_the_second_ctrl_c_ends_at_once(
    config: Config, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
    interrupt_in(monkeypatch, train, "make_step_inputs", 2)
    interrupt_in(monkeypatch, train, "encode_conditioning", 2)
    with pytest.raises(KeyboardInterrupt, match="no step is saved"):
        train.train(config)


def test_the_committed_configs_pass_the_checks() -> None:
    for file in (Path(__file__).parent.parent / "configs").glob("*.toml"):
        found = read_toml(file)
        config_checks.check_config(
            replace(found, data=replace(found.data, images=found.data.images or "photos"))
        )
    with pytest.raises(UserError, match="prior"):
        config_checks.check_config(
            Config(
                data=replace(Config().data, images="x"),
                prior=PriorConfig(weight=2),
                samples=SamplesConfig(),
            )
        )


def test_targets_are_checked_before_any_weight_is_read(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for file in Path(config.model).rglob("*.json"):  # a model of configs only
        (copy := tmp_path / "model" / file.relative_to(config.model)).parent.mkdir(
            exist_ok=True, parents=True
        )
        copy.write_bytes(file.read_bytes())
    config = replace(config, model=str(tmp_path / "model"))
    assert "matches none of the" in refused(
        merged(config, {"adapter": {"targets": ("attn1.to_qq",)}}), capsys
    )
    assert "cannot load" in refused(config, capsys)


def test_a_prompt_that_is_too_long_says_what_is_cut(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = load_family(str(model))
    for _ in range(2):
        family.encode_prompts(["a b c d e f g h i j k l m n o p", "a b"])
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "warning: the prompt is 18 tokens long and CLIP reads 16; cut off: 'o p'"


def test_the_texts_of_one_prompt_for_each_layer_have_one_warning(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = load_family(str(model))
    words = make_placeholders(["TOK"], vectors=1, layers=5)
    (encoder,) = family.tokenizers
    tokenizer = family.tokenizers[encoder]
    install_tokens(family.modules[encoder], tokenizer, words, seed=0)
    long = "a b c d e f g h i j k l m n TOK p"
    encode_layer_prompts(family.encode_prompts, [bind_layers(long, words)])
    encode_layer_prompts(family.encode_prompts, [bind_layers(f"b {long}", words)])
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warning: the prompt is 18 tokens long and CLIP reads 16; cut off: '<s0>p'"
    assert second.startswith("warning: the prompt is 19 tokens long")


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"samples": {"every": 9}}, "--samples.every 9"),
        ({"validation": {"every": 3}}, "--validation.every 3"),
        ({"save_every": 250}, "--save-every 250"),
    ],
)
def test_what_is_never_due_is_said(
    config: Config, capsys: pytest.CaptureFixture[str], change: dict[str, Any], flag: str
) -> None:
    config_checks.check_config(merged(config, change))
    assert capsys.readouterr().err == f"warning: {flag} has no effect in a run of 2 steps\n"
    config_checks.check_config(merged(config, {**change, "stages": (Stage(250),)}))
    assert not capsys.readouterr().err


def test_small_pictures_are_named(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(merged(config, {"data": {"resolution": 32}}))
    assert (
        "warning: 5 of 5 images are smaller than 32 pixels and scaled up, first "
        in capsys.readouterr().err
    )


def test_a_lora_of_another_family_is_refused(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests import tiny_sdxl

    run = train.train(config)
    tiny_sdxl.save(tmp_path / "xl")
    capsys.readouterr()
    assert (
        infer.main(
            [
                "--model",
                str(tmp_path / "xl"),
                "--lora",
                str(run),
                "--prompt",
                "a",
                "--out",
                str(tmp_path / "o.png"),
            ]
        )
        == 2
    )
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "another model" in said[0] and not (tmp_path / "o.png").exists()
