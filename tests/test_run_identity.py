"""A checkpoint keeps the inputs of its run: changes are named, and options that do not matter are
free. Before and after are compared on the same images.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import train
from lora_core.config import (
    Config,
    OptimizerConfig,
    SamplesConfig,
    Stage,
    TokensConfig,
    ValidationConfig,
)
from lora_core.data.records import Record
from lora_core.errors import UserError
from lora_core.toml import to_table
from models import load_family
from tests.conftest import final, rows, same
from training import run_identity
from training.run_identity import FREE_OPTIONS, identity_changes, model_identity


def made(config: Config, *records: Record, model: dict[str, str] | None = None) -> dict:
    return json.loads(
        json.dumps(run_identity.run_identity(to_table(config), records, (), model or {}))
    )


def record(name: str, *captions: str, key: str = "k", folder: str = "/photos") -> Record:
    return Record(Path(folder) / name, captions or ("a TOK",), None, False, key + name, (64, 64))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seed": 7}, ["seed was 0, is 7"]),
        (
            {"batch_size": 2, "accumulation": 3},
            ["batch_size was 1, is 2", "accumulation was 1, is 3"],
        ),
        ({"data": replace(Config().data, resolution=64)}, ["data.resolution was 512, is 64"]),
        ({"tokens": TokensConfig(words=("A", "B"))}, ["tokens.words was ['TOK'], is ['A', 'B']"]),
        (
            {"optimizer": OptimizerConfig(lr={"denoiser": 0.1})},
            ["optimizer.lr was {}, is {'denoiser': 0.1}"],
        ),
        (
            {"stages": (Stage(10, lr={"denoiser": 1e-3}),)},
            ["stages.0.lr was {}, is {'denoiser': 0.001}"],
        ),
        ({"stages": (Stage(3),)}, ["stages.0.steps was 10, is 3, of which 5 are done"]),
        ({"clip_skip": 1, "loss": "huber"}, ["clip_skip was 0, is 1", "loss was mse, is huber"]),
    ],
)
def test_a_changed_option_is_named_with_both_values(change: dict, said: list[str]) -> None:
    config = Config(stages=(Stage(10),))
    assert sorted(identity_changes(made(config), made(replace(config, **change)), 5)) == sorted(
        said
    )


@pytest.mark.parametrize(
    "change",
    [
        {"stages": (Stage(20),)},
        {"stages": (Stage(5), Stage(3, ("tokens",)))},
        {"save_every": 5, "log_every": 1, "keep": 9},
        {"samples": SamplesConfig(every=3, prompts=("x",))},
        {"validation": ValidationConfig(every=4, images="other")},
        {"data": replace(Config().data, workers=3, cache="c", images="moved")},
        {
            "device": "cuda",
            "threads": 4,
            "out": "x",
            "model": "moved",
            "gradient_checkpointing": "all",
        },
        {
            "resume": True,
            "resume_anyway": True,
            "overwrite": True,
            "push_to_hub": "a/b",
            "report": "wandb",
        },
    ],
    ids=lambda change: " ".join(change),
)
def test_what_does_not_change_what_is_learned_is_free(change: dict) -> None:
    config = Config(stages=(Stage(10),))
    assert identity_changes(made(config), made(replace(config, **change)), 5) == []


def test_stages_are_compared_as_far_as_they_have_begun() -> None:
    config = Config(stages=(Stage(4), Stage(6, ("tokens",)), Stage(2)))
    begun, later = (
        replace(config, stages=(Stage(9), *config.stages[1:])),
        replace(config, stages=(*config.stages[:2], Stage(1, ("tokens",)))),
    )
    assert (
        identity_changes(made(config), made(begun), 3)
        == identity_changes(made(config), made(later), 10)
        == []
    )
    assert identity_changes(made(config), made(begun), 5) == [
        "stages.0.steps was 4, is 9, of which 4 are done"
    ]
    assert identity_changes(made(config), made(replace(config, stages=config.stages[:1])), 5) == [
        "stages.1 was there, is not"
    ]


def test_changed_images_are_counted_and_named() -> None:
    old = [record("a.png"), record("b.png"), record("c.png"), record("d.png")]
    new = [
        record("a.png"),
        record("b.png", "other"),
        record("c.png", key="x"),
        record("z.png"),
        record("a.png"),
    ]
    assert identity_changes(made(Config(), *old), made(Config(), *new), 1) == [
        "1 image added: z.png",
        "1 image removed: d.png",
        "the content or the mask of 1 image changed: c.png",
        "the captions of 1 image changed: b.png",
        "the repeats of 1 image changed: a.png",
    ]
    moved = [record(r.path.name, folder="/elsewhere") for r in old]
    assert identity_changes(made(Config(), *old), made(Config(), *moved), 1) == []
    assert identity_changes(made(Config(), *old), made(Config(), *old[::-1]), 1) == [
        "the order of the images changed"
    ]
    many = [record(f"{i}.png") for i in range(9)]
    assert identity_changes(made(Config(), *many), made(Config(), many[0]), 1) == [
        "8 images removed: 1.png, 2.png, 3.png ..."
    ]


def test_every_free_option_is_one_and_has_a_reason() -> None:
    table = to_table(Config())
    for name, reason in FREE_OPTIONS.items():
        section, _, option = name.partition(".")
        assert reason and (option in table[section] if option else section in table), name


def test_another_model_is_told_by_its_weights_not_its_path(model: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(model, tmp_path / "copy")
    family, other = load_family(str(model)), load_family(str(copied))
    one, two = (model_identity(f.modules, f.schedule, f.prediction) for f in (family, other))
    assert one == two and set(one) == {"unet", "vae", "text_encoder", "scheduler"}
    with torch.no_grad():
        next(other.modules["unet"].parameters()).mul_(1.01)
        other.modules["vae"].register_to_config(scaling_factor=0.5)
    three = model_identity(other.modules, other.schedule, "v_prediction")
    assert identity_changes(made(Config(), model=one), made(Config(), model=three), 1) == [
        f"the model's {name} is another one" for name in ("unet", "vae", "scheduler")
    ]
    half, rough = (
        replace(Config(), precision="bf16"),
        replace(Config(), vae_precision="bf16"),
    )  # numbers that are rounded are no other model
    for config, said in (
        (half, ["precision was fp32, is bf16", "vae", "scheduler"]),
        (rough, ["vae_precision was fp32, is bf16", "unet", "scheduler"]),
    ):
        found = identity_changes(made(Config(), model=one), made(config, model=three), 1)
        assert found == [said[0], *(f"the model's {name} is another one" for name in said[1:])]


def test_a_resumed_run_names_what_changed_or_takes_it_and_says_so(
    config: Config, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = Path(shutil.copytree(config.data.images, tmp_path / "photos"))
    config = replace(config, data=replace(config.data, images=str(photos)))
    run = train.train(config)
    before = final(run)
    Image.new("RGB", (24, 24), "white").save(photos / "zzz.png")
    (photos / "zzz.txt").write_text("a photo of TOK")
    longer = replace(config, stages=(Stage(3),), resume=True, seed=5)
    with pytest.raises(
        UserError, match=r"seed was 0, is 5; 1 image added: zzz\.png; .*--resume-anyway"
    ):
        train.train(longer)
    assert same(final(run), before)
    train.train(replace(longer, resume_anyway=True))
    said = ["from step 2 on: seed was 0, is 5", "from step 2 on: 1 image added"]
    shown = capsys.readouterr().out
    assert (
        all(line in shown for line in said)
        and "of the 5 images that both validations have" in shown
    )
    summary, scores = json.loads((run / "summary.json").read_text()), rows(run, "val")
    card = (run / "README.md").read_text()
    assert summary["changes"] == said and "1 image added" in card and "zzz" not in card
    first, last = ({r["key"]: r["loss"] for r in scores if r["step"] == step} for step in (0, 3))
    assert len(last) == 6 and summary["val_loss_before"] == pytest.approx(sum(first.values()) / 5)
    assert summary["val_loss_after"] == pytest.approx(sum(last[key] for key in first) / 5)
    (logged,) = [r["val_change"] for r in rows(run) if r["step"] == 3 and "val_change" in r]
    assert logged == pytest.approx(summary["val_loss_after"] / summary["val_loss_before"] - 1)
    with safe_open(run / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["lora_core.changes"].split("\n") == said
    train.train(replace(longer, stages=(Stage(4),)))  # what was taken is the run's own from then on
    assert json.loads((run / "summary.json").read_text())["changes"] == said


def test_a_run_that_goes_on_with_other_images_ends_without_a_comparison(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train.train(config)
    other = Path(config.out).parent / "other"
    other.mkdir()
    for i in range(2):
        Image.new("RGB", (24, 24), (90 * i, 30, 60)).save(other / f"{i}.png")
        (other / f"{i}.txt").write_text("a TOK")
    new = replace(
        config,
        data=replace(config.data, images=str(other)),
        stages=(Stage(3),),
        resume=True,
        resume_anyway=True,
    )
    train.train(new)
    assert (
        told := "the validation after 3 steps has none of the images of the first one"
    ) in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert (
        told in summary["compared"]
        and summary["val_loss_after"] is None
        and "loss before" not in (run / "README.md").read_text()
    )
    assert [r for r in rows(run) if r["step"] == 3 and "val_loss" in r and "val_change" not in r]


def test_resume_anyway_needs_resume(config: Config) -> None:
    with pytest.raises(UserError, match="--resume-anyway has no effect without --resume"):
        train.train(replace(config, resume_anyway=True))
