"""Pairs: winners and losers of two folders or of a table, drawn alike and kept together."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

import train
from examples.diffusion_dpo import diffusion_dpo
from lora_core.config import AdapterConfig, Config, PriorConfig, Stage, ValidationConfig
from lora_core.data.buckets import describe_buckets
from lora_core.data.dataset import ImageDataset, ImageSettings, iterate_batches, micro_batches
from lora_core.data.pairs import scan_pairs
from lora_core.data.records import Record, find_unused_files, scan_folder
from lora_core.diffusion.losses import StepOutput
from lora_core.errors import UserError
from tests.conftest import distance, final, learned, merged, rows, same
from tests.image_examples import WILD, noise_image, save_image
from tests.opened_run import latent_files, open_parts
from tests.test_losses import make
from training.checks.config_checks import check_config
from training.checks.pair_checks import check_reads_pairs
from training.inputs.step_inputs import make_step_inputs
from training.run_identity import run_identity
from training.run_summary import RunLength, describe_run
from training.shared_config import shared_config

DPO = "examples/diffusion_dpo.py:diffusion_dpo"
SIZES = [(24, 16), (16, 16), (17, 29), (30, 20)]  # w, h
COLUMNS = "winner_file_name,loser_file_name"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, str]:
    """Four winners with captions, and their losers under other endings and in other sizes."""
    for i, (width, height) in enumerate(SIZES):
        save_image(noise_image(width, height, i), tmp_path / "winners" / f"{i}.png")
        save_image(noise_image(height, width, 10 + i), tmp_path / "losers" / f"{i}.bmp")
        (tmp_path / "winners" / f"{i}.txt").write_text(f"a photo of TOK {i}\nTOK {i}")
    return tmp_path / "winners", str(tmp_path / "losers")


def save_table(folder: Path, *table: dict[str, str]) -> Path:
    lines = [json.dumps(row) for row in table]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def names(pairs: list[Record]) -> list[tuple[str, str]]:
    return [(pair.path.name, pair.loser.path.name) for pair in pairs if pair.loser]


# ---------------------------------------------------------------- where pairs come from


def test_folders_pair_by_name_whatever_the_ending(folders: tuple[Path, str]) -> None:
    save_image(noise_image(24, 16, mode="L"), Path(folders[1]) / "0.mask.png")  # no loser
    winners, pairs = scan_pairs(*folders, repeats=2)
    assert names(pairs) == [(f"{i}.png", f"{i}.bmp") for i in range(4)] * 2
    assert winners == scan_folder(folders[0], repeats=2)  # what a run without pairs reads
    for winner, pair in zip(winners, pairs, strict=True):
        assert pair.loser and pair.captions == winner.captions == pair.loser.captions
        assert len({winner.key, pair.key, pair.loser.key}) == 3
    other = scan_pairs(folders[0], str(shutil.copytree(folders[1], Path(folders[1]) / "again")))
    assert other[1][0].key == pairs[0].key  # of the contents, not of the places
    save_image(noise_image(16, 24, 99), Path(folders[1]) / "again" / "0.bmp")
    changed = scan_pairs(folders[0], str(Path(folders[1]) / "again"))
    assert [a.key == b.key for a, b in zip(changed[1], pairs)] == [False, True, True, True]


def test_a_loser_with_the_winners_own_ending_comes_first(tmp_path: Path) -> None:
    for i, name in enumerate(("1.png", "1.bmp", "2.png")):
        save_image(noise_image(8, 8, i), tmp_path / "w" / name)
        save_image(noise_image(8, 8, 9 + i), tmp_path / "l" / name.replace("2.png", "2.gif"))
    _, pairs = scan_pairs(tmp_path / "w", str(tmp_path / "l"), caption="a")
    assert names(pairs) == [("1.bmp", "1.bmp"), ("1.png", "1.png"), ("2.png", "2.gif")]


def test_sub_folders_pair_with_sub_folders_of_the_same_name(tmp_path: Path) -> None:
    for folder in ("2_TOK", "1_cat"):
        for side, seed in (("good", 1), ("good/worse", 2)):
            save_image(noise_image(8, 8, seed), tmp_path / side / folder / "x.png")
    _, pairs = scan_pairs(tmp_path / "good", str(tmp_path / "good/worse"))
    assert [pair.captions for pair in pairs] == [("cat",), ("TOK",), ("TOK",)]
    assert pairs[0].loser and pairs[0].loser.path == tmp_path / "good/worse/1_cat/x.png"
    assert find_unused_files(tmp_path / "good", pairs) == {}


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_table_names_both_images_and_the_text(tmp_path: Path, ending: str) -> None:
    for i in range(3):
        save_image(noise_image(8, 8, i), tmp_path / f"a/{i}.png")
    rows = [("0", "1", "a dog"), ("0", "2", "a dog"), ("1", "0", "cafe\u0301"), ("0", "1", "dog")]
    if ending == "csv":
        text = "text,winner_file_name,loser_file_name\n"
        text += "\n".join(f"{words},a/{w}.png,a/{loser}.png" for w, loser, words in rows)
        (tmp_path / "metadata.csv").write_text(text)
    else:
        keys = [*COLUMNS.split(","), "text"]
        table = [dict(zip(keys, (f"a/{w}.png", f"a/{x}.png", text))) for w, x, text in rows]
        save_table(tmp_path, *table)
    winners, pairs = scan_pairs(tmp_path, COLUMNS)
    assert names(pairs) == [("0.png", "1.png"), ("0.png", "2.png"), ("1.png", "0.png")]
    assert [pair.captions for pair in pairs] == [("a dog", "dog"), ("a dog",), ("caf\u00e9",)]
    assert len({pair.key for pair in pairs}) == 3 and winners[0].key == winners[1].key
    assert find_unused_files(tmp_path, pairs) == {}
    identity = run_identity({"stages": []}, pairs, (), {})["images"]
    assert list(identity) == ["0.png over 1.png", "0.png over 2.png", "1.png over 0.png"]


def test_rows_without_a_text_take_the_one_caption(tmp_path: Path) -> None:
    for i in range(3):
        save_image(noise_image(8, 8, i), tmp_path / f"{i}.png")
    table = [{"w": "0.png", "l": "1.png", "text": ""}, {"w": "1.png", "l": "2.png", "text": "b"}]
    save_table(tmp_path, *table)
    _, pairs = scan_pairs(tmp_path, "w, l", caption="a photo")
    assert [pair.captions for pair in pairs] == [("a photo",), ("b",)]
    save_table(tmp_path, table[1])
    with pytest.raises(UserError, match="'a photo' has no use, because every pair has one"):
        scan_pairs(tmp_path, "w,l", caption="a photo")


def put_loser(name: str, seed: int) -> Callable[[Path], None]:
    return lambda root: void(save_image(noise_image(9, 9, seed), root / "losers" / name))


def void(_: object) -> None: ...


FOLDER_ERRORS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no loser": (
        lambda root: (root / "losers/2.bmp").unlink(),
        "1 of 4 winners have no loser, first .*winners/2.png: no image .*losers/2 with any ending",
    ),
    "no winner": (
        put_loser("7.png", 1),
        "loser .*losers/7.png belongs to no image in .*winners that has none yet",
    ),
    "two losers": (
        put_loser("1.png", 1),
        r"loser .*losers/1\.bmp belongs to no image in .*winners",
    ),
    "the same": (put_loser("1.bmp", 1), ""),
    "damaged": (
        lambda root: void((root / "losers/3.bmp").write_bytes(b"x")),
        "cannot read the image .*losers/3.bmp",
    ),
    "no folder": (lambda root: shutil.rmtree(root / "losers"), "losers is no folder; give the"),
}


@pytest.mark.parametrize("case", FOLDER_ERRORS)
def test_folders_that_do_not_pair_are_refused(
    folders: tuple[Path, str], tmp_path: Path, case: str
) -> None:
    spoil, said = FOLDER_ERRORS[case]
    spoil(tmp_path)
    if case == "the same":
        shutil.copy(folders[0] / "1.png", Path(folders[1]) / "1.bmp")
        said = r"winners/1\.png and .*losers/1\.bmp are the same image"
    with pytest.raises(UserError, match=said):
        scan_pairs(*folders)


@pytest.mark.parametrize(
    ("pairs", "row", "how", "said"),
    [
        ("w,l", {"w": "0.png", "text": "a"}, {}, 'has no "l", but w, text; each row needs w, l'),
        ("w,l", {"w": "0.png", "l": "9.png", "text": "a"}, {}, "names 9.png.*; correct l or add"),
        ("w,l", {"w": "0.png", "l": "1.png"}, {}, "expected the caption under one of text"),
        ("w,l,m", {"w": "0.png"}, {}, "'w,l,m', expected a folder, or two columns such as"),
        ("w,", {"w": "0.png"}, {}, "'w,', expected a folder, or two columns"),
        ("w,l", {"w": "0.png"}, {"captions": "txt"}, "--data.captions txt has no effect there"),
        ("w,l", {}, {}, "names the columns w and l of a metadata table, and .* has none"),
    ],
)  # fmt: skip
def test_tables_that_name_no_pairs_are_refused(
    tmp_path: Path, pairs: str, row: dict[str, str], how: dict[str, Any], said: str
) -> None:
    for i in range(2):
        save_image(noise_image(8, 8, i), tmp_path / f"{i}.png")
    if row:
        save_table(tmp_path, row)
    with pytest.raises(UserError, match=said):
        scan_pairs(tmp_path, pairs, **how)


# ---------------------------------------------------------------- examples and batches


def test_winner_and_loser_are_cut_mirrored_zoomed_and_colored_alike(tmp_path: Path) -> None:
    """The loser is the winner in another format: then every pixel is the same."""
    for i, size in enumerate(SIZES):
        image = noise_image(*size, i)
        save_image(image, tmp_path / "w" / f"{i}.png")
        save_image(image, tmp_path / "l" / f"{i}.bmp")
    records = scan_pairs(tmp_path / "w", str(tmp_path / "l"), captions="filename")[1]
    records = [replace(record, captions=("a", "b", "c")) for record in records]
    images = ImageDataset(records, WILD, caption_dropout=0.3)
    seen = set()
    for visit in range(12):
        winner, loser = (
            images.example(visit % 4, visit, is_loser=is_loser) for is_loser in (False, True)
        )
        assert torch.equal(winner.pixels, loser.pixels) and winner.crop == loser.crop
        assert (winner.key, winner.visit, winner.caption) == (loser.key, visit, loser.caption)
        assert winner.dropped == loser.dropped and loser.is_loser and not winner.is_loser
        seen.add((winner.caption, winner.crop))
    assert len(seen) > 8 and {caption for caption, _ in seen} == {"a", "b", "c", ""}


def test_images_of_different_sizes_are_cut_at_the_same_share(tmp_path: Path) -> None:
    """A ramp's pixel says where it was: 8 of 9 columns leave one place, 8 of 24 leave 16."""
    for side, width in (("w", 24), ("l", 40)):
        ramp = Image.frombytes("L", (width, 8), bytes(range(width)) * 8)
        save_image(ramp, tmp_path / side / "0.png")
    records = scan_pairs(tmp_path / "w", str(tmp_path / "l"), caption="a")[1]
    images = ImageDataset(records, ImageSettings(8, crop="random"))
    places = set()
    for visit in range(20):
        winner, loser = (images.example(0, visit, is_loser=is_loser) for is_loser in (False, True))
        left, right = (round((e.pixels[0, 0, 0].item() + 1) * 127.5) for e in (winner, loser))
        assert (left, right) == (winner.crop[1], loser.crop[1])
        assert abs(left / 16 - right / 32) < 1 / 16  # one draw in [0, 1), floored to pixels
        places.add(left)
    assert len(places) > 6


@pytest.mark.parametrize("buckets", [False, True])
def test_batches_are_winner_loser_winner_loser(folders: tuple[Path, str], buckets: bool) -> None:
    _, records = scan_pairs(*folders)
    settings = ImageSettings(16, flip=True, buckets=buckets, bucket_step=4 if buckets else 64)
    images = ImageDataset(records, settings)
    by_key = {record.key: record for record in records}
    seen = []
    for batch in iterate_batches(images, batch=2, seed=0, stop=4):
        assert batch.is_loser is not None and batch.is_loser.tolist() == [False, True] * 2
        assert batch.keys[::2] == batch.keys[1::2] and batch.visits[::2] == batch.visits[1::2]
        assert batch.captions[::2] == batch.captions[1::2]
        for i, (key, image) in enumerate(zip(batch.keys, batch.image_keys, strict=True)):
            record = by_key[key]
            assert record.loser and image == (record.loser.key if i % 2 else key)
            w, h = SIZES[records.index(record)]
            assert batch.original_sizes[i] == ((w, h) if i % 2 else (h, w))
            sizes = images.sizes[records.index(record)]  # the loser's own bucket lies across
            assert batch.pixels.shape[2:] == sizes
        parts = list(micro_batches(batch, 2))
        assert [part.keys for part in parts] == [batch.keys[:2], batch.keys[2:]]
        assert all(torch.equal(p.pixels, batch.pixels[2 * i :][:2]) for i, p in enumerate(parts))
        assert all(p.is_loser is not None and p.is_loser.tolist() == [False, True] for p in parts)
        seen += batch.keys[::2]
    assert set(seen) == by_key.keys() and (len(set(images.sizes)) > 1) == buckets
    said = describe_buckets(images.sizes, 2, "pair")
    assert said.startswith(
        "3 buckets" if buckets else "one bucket, 16 x 16: 4 pairs in 2 batches of 2"
    )


def test_single_images_do_not_mix_with_pairs(folders: tuple[Path, str]) -> None:
    winners, pairs = scan_pairs(*folders)
    with pytest.raises(ValueError, match="some records are pairs and others are single images"):
        ImageDataset([*pairs, *winners], ImageSettings(16))
    prior = ImageDataset([replace(one, is_prior=True) for one in winners], ImageSettings(16))
    with pytest.raises(ValueError, match="pairs of images have no prior images"):
        iterate_batches(ImageDataset(pairs, ImageSettings(16)), prior, batch=1, seed=0, stop=1)


# ---------------------------------------------------------------- runs


@pytest.fixture
def paired(config: Config, folders: tuple[Path, str]) -> Config:
    """Two steps of Diffusion-DPO on two pairs each."""
    change = {"images": str(folders[0]), "pairs": folders[1], "flip": True, "variants": 2}
    return merged(replace(config, loss=DPO), {"data": change})


def test_the_two_of_a_pair_have_the_same_noise_and_level_from_any_cache(
    paired: Config, quick: None, tmp_path: Path
) -> None:
    change = {"data": {"cache": str(tmp_path / "cache")}, "adapter": {"dropout": 0.1}}
    cached = merged(paired, change | {"noise": {"perturbation": 0.1, "offset": 0.1}})
    s = open_parts(cached)
    batch = next(iter(s.data.batches(cached, 0, 1)))
    (x,) = make_step_inputs(s.source, batch, cached.stages[0], 0, check=True)
    for same_for_both in (x.eps, x.eps_in, x.level.t, x.dropout_keys):
        assert same_for_both is not None and torch.equal(same_for_both[::2], same_for_both[1::2])
    assert x.is_loser is not None and x.is_loser.tolist() == [False, True] * 2
    assert not torch.equal(x.x0[::2], x.x0[1::2]) and len(set(x.level.t.tolist())) == 2
    assert len(latent_files(tmp_path / "cache")) == 4  # a file for each image of two pairs
    losers = [record.loser for record in s.data.training.records if record.loser]
    for i, key in enumerate(batch.image_keys):
        record = s.source.records[key]
        assert (record in losers) == (i % 2 == 1)
        mean, std = s.model.family.encode_images(batch.pixels[i : i + 1])
        row = s.source.latents.rows[key, batch.visits[i] % 2, batch.pixels.shape[-2:]]
        assert torch.equal(row["mean"], mean[0]) and torch.equal(row["std"], std[0])
    again = open_parts(replace(cached, out=cached.out + "2"))  # reads the files
    (y,) = make_step_inputs(again.source, batch, cached.stages[0], 0, check=True)
    assert torch.equal(x.x0, y.x0) and len(latent_files(tmp_path / "cache")) == 4


def test_a_step_is_the_mean_over_pairs_for_any_division(paired: Config, quick: None) -> None:
    longer = replace(paired, stages=(Stage(4),), batch_size=4, precision="fp64")
    whole = train.train(longer)
    parts = train.train(replace(longer, batch_size=2, accumulation=2, out=paired.out + "2"))
    assert distance(learned(parts), learned(whole)) < 1e-9
    first = rows(whole)[1]  # after the row of the first validation
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    card = (whole / "README.md").read_text()
    assert "| images | 8, at 16 pixels |" in card and "| batch | 4 pairs |" in card
    kept = replace(longer, stages=(Stage(2),), save_every=1, out=paired.out + "3")
    train.train(kept)
    resumed = train.train(replace(kept, stages=longer.stages, resume=True))
    assert same(final(resumed), final(whole))
    images = {row["key"] for row in rows(whole, "val")}
    assert images == {record.key for record in scan_folder(paired.data.images)}  # the winners


def test_another_loser_is_another_run(paired: Config, quick: None, folders: Any) -> None:
    train.train(paired)
    save_image(noise_image(20, 20, 99), Path(folders[1]) / "2.bmp")
    with pytest.raises(UserError, match=r"of 1 image changed: 2\.png over 2\.bmp"):
        train.train(replace(paired, resume=True))
    assert shared_config(paired, "out").data.pairs == ""
    columns = replace(paired, data=replace(paired.data, pairs=COLUMNS))
    assert shared_config(columns, "out").data.pairs == COLUMNS


def test_the_summary_counts_pairs(folders: tuple[Path, str]) -> None:
    _, records = scan_pairs(*folders)
    images = ImageDataset(records, ImageSettings(8))
    lines = describe_run(images, None, (), RunLength(10, 2, 3), {}).splitlines()
    assert (
        lines[0] == f"pairs: 4 in {folders[0]}, losers in {folders[1]}, 16 x 16 to 20 x 30 pixels"
    )
    assert lines[-1] == "training: 10 steps of 6 pairs (2 x 3), 15 epochs of 4"


# ---------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prior": {"prompt": "a dog"}}, "--prior.prompt adds class images"),
        ({"data": {"masks": "auto"}}, "--data.masks auto has no meaning with --data.pairs"),
        ({"data": {"dataset": "x/y", "images": ""}}, "not those of --data.dataset; write"),
    ],
)
def test_options_that_have_no_pairs_are_refused(
    paired: Config, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check_config(merged(paired, change))


def test_pairs_and_the_losses_that_read_them_need_each_other(
    paired: Config, quick: None, photos: Path
) -> None:
    with pytest.raises(UserError, match="the loss mse treats winners and losers alike"):
        train.train(replace(paired, loss="mse"))
    alone = merged(paired, {"data": {"pairs": "", "images": str(photos)}})
    with pytest.raises(UserError, match="diffusion_dpo compares the two images of pairs, and"):
        train.train(alone)
    check_reads_pairs(paired, train.training_step, diffusion_dpo)  # a step that reads them
    kept = merged(paired, {"prior": PriorConfig(swap={"TOK": "cat"}).__dict__})
    for with_masks in (kept, replace(kept, mask_scale="mixofshow")):
        _, functions = train.resolve_functions(with_masks, None, train.training_step)
        check_reads_pairs(paired, functions.loss, None)  # a loss made of it
    made = make()
    made.lazy["base_out"] = lambda: made.out
    with pytest.raises(UserError, match="there are none; give the folder with the losers"):
        diffusion_dpo(made)


def test_an_inpainting_model_has_no_pairs(paired: Config, tmp_path: Path) -> None:
    from tests.conftest import save_pipeline

    painting = replace(paired, model=str(save_pipeline(tmp_path / "nine", channels=9)))
    with pytest.raises(UserError, match=r"--data\.pairs compares two images under one condition"):
        open_parts(painting)


# ---------------------------------------------------------------- Diffusion-DPO


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("beta", [5000.0, 2.0])
def test_dpo_and_its_gradient_are_those_of_the_published_script(
    prediction: str, beta: float
) -> None:
    """SalesforceAIResearch/DiffusionDPO in float64: winners, then losers; -0.5 beta_dpo; means."""
    step = make(prediction)
    base = step.out + 0.01 * torch.randn_like(step.out)
    step.out.requires_grad_()
    step = replace(step, lazy={"base_out": lambda: base}, is_loser=torch.tensor([False, True] * 2))
    found = diffusion_dpo(step, beta=beta)
    (gradient,) = torch.autograd.grad(found.mean(), step.out)
    order = torch.tensor([0, 2, 1, 3])
    model_losses = (step.out - step.target)[order].double().square().mean((1, 2, 3))
    reference_losses = (base - step.target)[order].double().square().mean((1, 2, 3))
    model_difference = model_losses[:2] - model_losses[2:]
    inside = -0.5 * beta * (model_difference - (reference_losses[:2] - reference_losses[2:]))
    wanted = -torch.nn.functional.logsigmoid(inside)
    (wanted_gradient,) = torch.autograd.grad(wanted.mean(), step.out)
    torch.testing.assert_close(found[::2].double(), wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-12)
    assert torch.equal(found[::2], found[1::2])


def test_dpo_learns_the_preference_of_the_embedded_model(quick: None, tmp_path: Path) -> None:
    """Winners are drawings, losers their negatives. Before the first step the loss is ln 2 to the
    bit; after a few, winners have become more likely at noise that was not trained on.
    """
    for i, file in enumerate(sorted(Path("toy/concepts/zib").glob("*.png"))[:4]):
        drawing = Image.open(file).convert("RGB").resize((64, 64))
        save_image(drawing, tmp_path / "w" / f"{i}.png")
        save_image(ImageOps.invert(drawing), tmp_path / "l" / f"{i}.png")
    losses: list[Tensor] = []

    def watched(step: StepOutput) -> Tensor:
        losses.append(diffusion_dpo(step))
        return losses[-1]

    watched.reads_pairs = True  # type: ignore[attr-defined]
    config = Config(
        model="toy/model", out=str(tmp_path / "run"), device="cpu", batch_size=4, stages=(Stage(6),)
    )
    data = {"images": str(tmp_path / "w"), "pairs": str(tmp_path / "l"), "resolution": 64}
    data["caption"] = "a drawing"
    change = {"data": data, "optimizer": {"lr": {"denoiser": 1e-3}}}
    config = merged(replace(config, validation=ValidationConfig(every=-1)), change)
    train.train(replace(config, adapter=AdapterConfig(rank=8)), loss=watched)
    assert torch.equal(losses[0], torch.full((8,), 2.0).log())
    accuracy = [(loss < math.log(2)).float().mean().item() for loss in losses]
    assert accuracy[0] == 0 and sum(accuracy[3:]) / 3 > 0.75, accuracy
