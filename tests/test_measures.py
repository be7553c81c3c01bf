"""Measures of finished runs: of the network as in training, of drawn images, and by CLIP."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

import train
from lora_core.config import (
    AdapterConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    SamplesConfig,
    Stage,
    TokensConfig,
    ValidationConfig,
)
from lora_core.data.images import image_to_pixels, read_image
from lora_core.errors import UserError
from lora_core.runs.comparison import NO_TIME, read_recorded_run, recorded_losses
from models.image_similarity import ImageSimilarity
from tests.conftest import blank_grid
from tests.tiny_clip import save_clip
from training import results, samples
from training.comparisons import measures
from training.comparisons.trained_runs import TrainedRun, open_trained_run

OWN = """
def absolute(step, *, factor=1.0):
    return factor * (step.out - step.target).abs().mean((1, 2, 3))

def brightness(images, prompts):
    assert images.shape[1:] == (3, 16, 16) and all("TOK" in prompt for prompt in prompts)
    return images.mean((1, 2, 3)) + len(prompts)
brightness.reads_samples = brightness.higher_is_better = True

def one_number(images, prompts):
    return images.mean()

def words(images, prompts):
    return prompts

def misspelt(images, prompts):
    return images.maen()
one_number.reads_samples = words.reads_samples = misspelt.reads_samples = True

def no_number(step):
    return step.out.mean((1, 2, 3)).log() * float("nan")

def unknown(step):
    return step.outt
"""


@pytest.fixture(scope="module")
def runs(
    model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Path]]:
    """Two runs with another loss each, a moving average, tokens, weights by noise level, and whole
    batches made of two.
    """
    config = Config(
        model=str(model),
        device="cpu",
        batch_size=2,
        accumulation=2,
        ema=0.5,
        weighting="min_snr",
        adapter=AdapterConfig(rank=2),
        data=DataConfig(images=str(photos), resolution=16),
        tokens=TokensConfig(init=("c",)),
        optimizer=OptimizerConfig(lr={"denoiser": 1e-1, "tokens": 1e-1}),
        stages=(Stage(2, ("denoiser", "tokens")),),
        samples=SamplesConfig(steps=1, guidance=1.0, prompts=("a TOK",)),
        validation=ValidationConfig(bins=2, draws=2),
    )
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:  # the images and plots of a run are not needed
        blank = Image.new("RGB", (1, 1))
        patch.setattr(samples.pictures, "draw_grid", blank_grid)
        patch.setattr(
            results.SampleImages, "draw", lambda self, prompts, **_: [blank] * len(prompts)
        )
        patch.setattr(results.reports, "plot_metrics", lambda *_: [])
        made = []
        for loss in ("mse", "huber"):
            made.append(train.train(replace(config, loss=loss, out=str(folder / loss))))
    (folder / "own.py").write_text(OWN)
    yield made


@pytest.fixture(scope="module")
def trained(runs: list[Path]) -> TrainedRun:
    return open_trained_run(runs[0])


def test_the_model_is_the_one_that_was_trained(runs: list[Path], trained: TrainedRun) -> None:
    """Its scores are those that the run recorded at its end, to the bit."""
    recorded = recorded_losses(read_recorded_run(runs[0]))
    assert trained.scorer.score() == recorded
    with trained.model.without_adapters():
        assert trained.scorer.score() != recorded


def test_a_loss_is_measured_as_in_training_without_weights(
    runs: list[Path], trained: TrainedRun
) -> None:
    recorded = recorded_losses(read_recorded_run(runs[0]))
    names = ["mse", "x0", "l1", f"{runs[0].parent / 'own.py'}:absolute"]
    found = measures.find_measures(names, {})
    values = [measures.score_by_loss(trained, own.loss, train.training_step) for own in found]
    table = DDPMScheduler.from_pretrained(trained.config.model, subfolder="scheduler")
    for mse, x0, l1, own, score in zip(*values, recorded, strict=True):
        assert mse[:4] == score[:4] == x0[:4] == l1[:4]
        assert mse.loss == pytest.approx(score.loss, rel=1e-5)
        # x0 = (x_t - sigma eps) / alpha, so an error of eps is sigma / alpha of it in x0
        alpha = table.alphas_cumprod[int(score.t)].item()
        assert x0.loss == pytest.approx(score.loss * (1 - alpha) / alpha, rel=1e-4)
        assert own.loss == pytest.approx(l1.loss, rel=1e-5) and l1.loss != mse.loss
    (tripled,) = measures.find_measures(names[3:], {"factor": 3.0})
    again = measures.score_by_loss(trained, tripled.loss, train.training_step)
    assert again[0].loss == pytest.approx(3 * values[3][0].loss, rel=1e-6)


def test_images_are_those_of_the_trained_model_for_the_captions(
    runs: list[Path], trained: TrainedRun, tmp_path: Path
) -> None:
    clip = save_clip(tmp_path / "clip")
    own = f"{runs[0].parent / 'own.py'}:brightness"
    wanted = measures.find_measures([own, f"clip:{clip}"], {})
    assert [measure.higher_is_better for measure in wanted] == [True] * 3
    found = measures.measure_runs(runs[:1], wanted, train.training_step)
    assert [own.name for own in found[1:]] == ["clip text clip", "clip image clip"]
    captions = ["a photo of TOK"] * 5
    drawn = trained.samples.draw(captions)
    assert drawn[0].tobytes() != trained.samples.draw(captions, base=True)[0].tobytes()
    bright, texts, likeness = ([s.loss for s in own.scores[runs[0]]] for own in found)
    pixels = torch.stack([image_to_pixels(image) for image in drawn])
    assert bright == pytest.approx((pixels.mean((1, 2, 3)) + 5).tolist(), rel=1e-6)
    similarity = ImageSimilarity(str(clip), "cpu")
    images = similarity.embed_images(drawn)
    words = similarity.embed_texts(["a photo of c"])  # its initializer
    assert texts == pytest.approx((images @ words.T)[:, 0].tolist(), rel=1e-6)
    files = sorted(Path(trained.config.data.images).glob("?.png"))
    real = similarity.embed_images([read_image(file).image for file in files])
    assert likeness == pytest.approx((images @ real.T).mean(1).tolist(), rel=1e-6)
    scores = found[0].scores[runs[0]]
    assert len({score.key for score in scores}) == 5
    assert {(score.draw, score.bin, score.t) for score in scores} == {(0, -1, NO_TIME)}


def test_the_command_prints_each_measure(
    runs: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--compare", str(runs[0]), "--against", str(runs[1]), "--plot"]
    own = f"{runs[0].parent / 'own.py'}:brightness"
    given = ["--metric", "loss", "--metric", "huber", "--metric", own]
    capsys.readouterr()
    assert train.main([*words, str(tmp_path / "p.png"), *given]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  loss: 'mse' in A, 'huber' in B") for line in printed) == 1
    for name in ("loss", "huber", own):
        assert sum(line.startswith(f"{name}: ") for line in printed) == 1, name
    plots = [line.removeprefix("plot: ") for line in printed if line.startswith("plot: ")]
    assert len(set(plots)) == 3 and all(Image.open(plot).width > 100 for plot in plots)
    assert not any("adapters:" in line or "resumed" in line for line in printed)
    assert train.main([*words, str(tmp_path / "q.png"), "--metric", "l1"]) == 0
    assert (tmp_path / "q.png").is_file()


@pytest.mark.parametrize(
    ("specs", "args", "message"),
    [
        (["hubr"], {}, "'hubr', the nearest is 'huber'; choose x0, mse, l1"),
        (["x0", "huber"], {"delta": 0.2}, "give it with one measure alone"),
        (["loss"], {"delta": 0.2}, "takes no argument; leave --metric-arg out"),
        (["huber"], {"dleta": 0.2}, "huber takes no argument 'dleta'"),
        (["none.py:fn"], {}, "names no Python file"),
        (["clip:nowhere/at/all"], {}, "nowhere/at/all"),
        (["clip:"], {}, "names no model; expected clip:MODEL"),
        (["examples/diffusion_dpo.py:diffusion_dpo"], {}, "compares the two images of pairs"),
    ],
)
def test_a_measure_that_is_none_is_refused(specs: list, args: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measures.find_measures(specs, args)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_number", r"returned \[\] numbers, expected 5 finite ones"),
        ("words", "words returned list, expected 5 numbers"),
        ("misspelt", r"misspelt fails: AttributeError: .*'maen'.* \(.*own.py, line 17\)"),
        ("no_number", r"no_number gives \[nan, nan\] for validation images at timestep \d+;"),
        ("unknown", r"unknown fails: AttributeError: .*'outt'.*, line 24\)"),
    ],
)
def test_what_is_not_one_number_an_image_is_a_sentence(
    trained: TrainedRun, name: str, message: str
) -> None:
    (wanted,) = measures.find_measures([f"{trained.folder.parent / 'own.py'}:{name}"], {})
    with pytest.raises(UserError, match=message):
        if wanted.loss:
            measures.score_by_loss(trained, wanted.loss, train.training_step)
        else:
            wanted.of_samples(trained, [Image.new("RGB", (16, 16))] * 5)


def test_runs_that_cannot_be_opened_are_named(runs: list[Path], tmp_path: Path) -> None:
    """Unfinished ones before another is opened."""
    wanted = measures.find_measures(["x0"], {})
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "checkpoints").symlink_to(runs[0] / "checkpoints")
    text = (runs[0] / "config.toml").read_text()
    (moved / "config.toml").write_text(text.replace("steps = 2\n", "steps = 3\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "open_trained_run", None)
        with pytest.raises(UserError, match="moved has done 2 of 3 steps"):
            measures.measure_runs([runs[0], moved], wanted, train.training_step)
    images = str(read_recorded_run(runs[0]).settings["data.images"])
    (moved / "config.toml").write_text(text.replace(images, "nowhere/at/all"))
    with pytest.raises(UserError, match=r"moved cannot be .* can be corrected: .*nowhere/at/all"):
        measures.measure_runs([moved], wanted, train.training_step)


def test_a_measure_that_fails_is_one_sentence(runs: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def typo(step): return step.outt\n"
        "def images(pixels, prompts): return pixels.mean1()\n"
        "def short(pixels): return pixels\n"
        "images.reads_samples = short.reads_samples = True\n"
    )
    for name, said in (
        ("typo", r"typo fails: AttributeError: .*'outt' \(.*mine.py, line 1\)"),
        ("images", r"images fails: AttributeError: .*'mean1' \(.*mine.py, line 2\)"),
        ("short", r"is called as fn\(images, prompts\), and cannot be: too many"),
    ):
        with pytest.raises(UserError, match=said):
            measures.measure_runs(
                runs[:1], measures.find_measures([f"{file}:{name}"], {}), train.training_step
            )


def test_images_drawn_otherwise_are_not_compared(runs: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    text = (runs[1] / "config.toml").read_text()
    assert "steps = 1\nguidance = 1.0" in text
    (other / "config.toml").write_text(text.replace("guidance = 1.0", "guidance = 2.0"))
    wanted = measures.find_measures([f"{runs[0].parent / 'own.py'}:brightness"], {})
    with pytest.raises(UserError, match=r"with samples.guidance 1.0, .* with 2.0"):
        measures.measure_runs([runs[0], other], wanted, train.training_step)
    (other / "config.toml").write_text(text.replace("batch_size = 2", "batch_size = 3"))
    wanted = measures.find_measures(["examples/contrastive_flow.py:contrastive_flow"], {})
    with pytest.raises(UserError, match=r"with batch_size 2, .* with 3; .* train with the same"):
        measures.measure_runs([runs[0], other], wanted, train.training_step)
