"""infer.py: what its words mean, that a picture's recipe redraws it, and what it refuses."""

from collections.abc import Callable
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline
from PIL import Image, ImageChops, ImageStat
from safetensors.torch import load_file

import infer
from lora_core import formats, patch
from lora_core.diffusion.sampling import SAMPLERS
from lora_core.formats import embeddings
from lora_core.runs import pictures
from lora_core.runs.loras import RunSettings
from models import load_family
from tests.tiny_pipeline import random_state, save_sd_pipeline

BLANK = Image.new("RGB", (1, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and two run folders a/ and b/ with LoRA and tokens, strong enough to see."""
    folder = tmp_path_factory.mktemp("infer")
    pipe = save_sd_pipeline(folder / "model")
    family = load_family(str(folder / "model"))
    for i, name in enumerate("ab"):
        state = random_state(pipe, seed=i + 1)
        state.tokens = {
            "clip_l": torch.randn(2, 16, generator=torch.Generator().manual_seed(i)) * 0.3
        }
        state.token_names = ("<s0>", "<s1>")
        state.metadata = embeddings.placeholder_header({"TOK": ("<s0>", "<s1>")})
        (folder / name).mkdir()
        formats.save_run(state, folder / name, layout=family.layout)
    return folder


def draw(folder: Path, out: str, *words: str) -> bytes:
    path = folder / out
    assert (
        infer.main(
            [
                "--model",
                str(folder / "model"),
                "--steps",
                "3",
                "--overwrite",
                "--out",
                str(path),
                *words,
            ]
        )
        == 0
    )
    return Image.open(path).tobytes()


def test_recipe_in_the_picture_redraws_it(folder: Path) -> None:
    first = draw(
        folder,
        "x.png",
        "--prompt",
        "TOK a",
        "--lora",
        f"{folder / 'a'}:unet=0.6,text=0.9",
        "--seed",
        "5",
        "--sampler",
        "euler",
    )
    assert infer.main(["--from", str(folder / "x.png"), "--out", str(folder / "y.png")]) == 0
    assert Image.open(folder / "y.png").tobytes() == first
    assert (
        infer.main(["--from", str(folder / "x.png"), "--out", str(folder / "z.png"), "--seed", "6"])
        == 0
    )
    assert Image.open(folder / "z.png").tobytes() != first
    assert "TOK a" in Image.open(folder / "x.png").info["parameters"]


def test_strength_zero_is_the_base_and_tokens_come_along(folder: Path) -> None:
    base = draw(folder, "base.png", "--prompt", "a")
    assert draw(folder, "zero.png", "--prompt", "a", "--lora", f"{folder / 'a'}:0") == base
    assert draw(folder, "one.png", "--prompt", "a", "--lora", str(folder / "a")) != base
    with_word = draw(folder, "word.png", "--prompt", "TOK", "--lora", f"{folder / 'a'}:0")
    assert (
        with_word
        == draw(folder, "names.png", "--prompt", "<s0><s1>", "--lora", f"{folder / 'a'}:0")
        != base
    )


def test_tokens_beside_a_single_file_come_along(folder: Path) -> None:
    whole = draw(folder, "whole.png", "--prompt", "a TOK", "--lora", str(folder / "a"))
    for name in ("pytorch_lora_weights.safetensors", "a.safetensors"):
        single = draw(folder, "single.png", "--prompt", "a TOK", "--lora", str(folder / "a" / name))
        assert max(abs(x - y) for x, y in zip(single, whole)) <= 1
    both = [
        "--lora",
        str(folder / "a" / "a.safetensors"),
        "--lora",
        str(folder / "b" / "b.safetensors"),
    ]
    files = draw(folder, "two.png", "--prompt", "TOK TOK2", *both)
    folders = draw(
        folder,
        "runs.png",
        "--prompt",
        "TOK TOK2",
        "--lora",
        str(folder / "a"),
        "--lora",
        str(folder / "b"),
    )
    assert max(abs(x - y) for x, y in zip(files, folders)) <= 1


def test_parts_have_their_own_strength(folder: Path) -> None:
    pictures = {
        draw(folder, f"{i}.png", "--prompt", "a", "--lora", f"{folder / 'a'}:{s}")
        for i, s in enumerate(("unet=1,text=0", "unet=0,text=1", "1", "0"))
    }
    assert len(pictures) == 4


def test_two_runs_with_the_same_words_are_kept_apart(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--lora", f"{folder / 'a'}:0", "--lora", f"{folder / 'b'}:0"]
    alone = [
        draw(folder, f"alone_{n}.png", "--prompt", "TOK", "--lora", f"{folder / n}:0") for n in "ab"
    ]
    capsys.readouterr()
    together = [draw(folder, f"both_{w}.png", "--prompt", w, *words) for w in ("TOK", "TOK2")]
    assert together == alone
    assert "TOK of" in (said := capsys.readouterr().err) and "is called TOK2 here" in said


def test_batches_files_and_grids_show_the_same_pictures(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a\n\nb TOK\n")
    words = [
        "--model",
        str(folder / "model"),
        "--lora",
        str(folder / "a"),
        "--prompts",
        str(folder / "prompts.txt"),
        "--steps",
        "3",
        "--count",
        "2",
    ]
    for batch in ("1", "3"):
        assert (
            infer.main([*words, "--batch", batch, "--out", str(folder / f"many{batch}.png")]) == 0
        )
    for i in range(4):
        one, three = (Image.open(folder / f"many{batch}_{i:03d}.png").tobytes() for batch in "13")
        assert max(abs(x - y) for x, y in zip(one, three)) <= 1
    assert Image.open(folder / "many1_003.png").tobytes() == draw(
        folder, "b1.png", "--prompt", "b TOK", "--seed", "1", "--lora", str(folder / "a")
    )


@pytest.mark.parametrize(
    "axis",
    [
        "strength=0:1:0.5",
        "lora1.unet=0:1:1",
        "text=0,2",
        "guidance=1,3",
        "adapter_guidance=1:3:1",
        "steps=2,4",
        "seed=0:2",
    ],
)
def test_each_axis_changes_the_picture(
    folder: Path, axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets, captions = [], []

    def look(*args: Any, **words: Any) -> Image.Image:
        captions.append(args[0][0].captions[0].split()[0])
        sheets.append(pictures.draw_grid(*args, **words))
        return sheets[-1]

    monkeypatch.setattr(infer, "draw_grid", look)
    words = [
        "--lora",
        str(folder / "a"),
        "--lora",
        f"{folder / 'b'}:unet=0.5,text=0.5",
        "--prompt",
        "a TOK",
    ]
    draw(folder, "grid.png", *words, "--grid", axis)
    sheet = Image.open(folder / "grid.png")
    setting = axis.partition("=")[0]
    assert captions == [{"lora0": "a", "lora1": "b"}.get(setting.partition(".")[0], setting)]
    boxes = [cell["box"] for cell in sheets[0].info[pictures.CELLS]]
    cells = [sheet.crop(box).tobytes() for box in boxes]
    assert cells[0] != cells[1]
    again = ["--from", str(folder / "grid.png"), "--out", str(folder / "again.png")]
    assert infer.main([*again, "--overwrite"]) == 0
    assert Image.open(folder / "again.png").tobytes() == sheet.tobytes()


def test_image_to_image_equals_the_pipelines(folder: Path) -> None:
    Image.effect_noise((40, 32), 80).convert("RGB").save(folder / "start.png")
    words = [
        "--prompt",
        "a",
        "--init-image",
        str(folder / "start.png"),
        "--seed",
        "2",
        "--guidance",
        "3",
    ]
    near, far = (
        draw(folder, f"{s}.png", *words, "--steps", "10", "--strength", s) for s in ("0.2", "0.8")
    )
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder / "model", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.encode = _mean_of(pipe.vae)
    square = Image.open(folder / "start.png").crop((4, 0, 36, 32))
    for ours, strength in ((near, 0.2), (far, 0.8)):
        noise = torch.Generator().manual_seed(2)
        theirs = (
            pipe(
                "a",
                image=square,
                strength=strength,
                num_inference_steps=10,
                guidance_scale=3.0,
                generator=noise,
            )
            .images[0]
            .tobytes()
        )
        assert max(abs(x - y) for x, y in zip(ours, theirs)) <= 1
    assert near != far


def test_a_plain_model_paints_where_the_mask_is_white(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outside, the image is what the VAE makes of it, as in the pipelines; --from repeats it."""
    Image.effect_noise((32, 32), 80).convert("RGB").save(folder / "start.png")
    hole = Image.new("L", (32, 32))
    hole.paste(255, (0, 0, 16, 32))
    hole.save(folder / "hole.png")
    start = ["--init-image", str(folder / "start.png")]
    words = [*start, "--mask", str(folder / "hole.png"), "--steps", "4"]
    painted = draw(folder, "painted.png", "--prompt", "a", *words)
    again = ["--from", str(folder / "painted.png"), *words, "--overwrite"]
    assert infer.main([*again, "--out", str(folder / "again.png")]) == 0
    assert Image.open(folder / "again.png").tobytes() == painted
    other = draw(folder, "other.png", "--prompt", "b", "--seed", "4", *words)
    differs = []
    for x in range(32):
        columns = [
            Image.frombytes("RGB", (32, 32), image).crop((x, 0, x + 1, 32)).tobytes()
            for image in (painted, other)
        ]
        differs.append(columns[0] != columns[1])
    assert all(differs[:16])
    assert infer.main(["--model", str(folder / "model"), "--prompt", "a", *words[2:]]) == 2
    assert "need an image to start from (--init-image)" in capsys.readouterr().err


def _mean_of(vae: AutoencoderKL) -> Callable[[torch.Tensor], SimpleNamespace]:
    """An `encode` whose posterior samples its mean: infer.py starts from the mean, diffusers from
    a sample.
    """
    encode = vae.encode

    def mean(x: torch.Tensor) -> SimpleNamespace:
        middle = encode(x).latent_dist.mean
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator=None: middle))

    return mean


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "--prompt"),
        (["--prompt", "a", "--prompts", "f"], "--prompt"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "a", "--lora", "nowhere"], "nowhere"),
        (["--prompt", "a", "--out", "x.jpg"], "png"),
        (["--prompt", "a", "--sampler", "eulr"], "euler"),
        (["--prompt", "a", "--width", "33"], "multiples of 4"),
        (["--prompt", "a", "--width", "-64"], "--width is -64"),
        (["--prompt", "a", "--strength", "nan"], "--strength is nan"),
        (["--prompt", "a", "--guidance", "inf"], "--guidance is inf"),
        (["--prompt", "a", "--seed", str(2**64)], "--seed"),
        (["--prompt", "a", "--seed", str(2**64 - 1), "--count", "2"], "--seed"),
        (["--prompt", "a", "--out", f"{__file__}/x.png"], "which is a file"),
        (["--prompt", "a", "--strength", "0.5"], "--init-image"),
        (["--prompt", "a", "--init-image", "nowhere.png", "--strength", "0.5"], "nowhere.png"),
        (["--prompt", "a", "--mask", "nowhere.png"], "nowhere.png"),
        (["--prompt", "a", "--grid", "strength=0:1:0.5"], "--lora"),
        (["--prompt", "a", "--grid", "seed=0:2", "--count", "2"], "grid"),
        (["--prompt", "a", "--count", "0"], "--count"),
        (["--prompt", "a", "--device", "nowhere"], "--device nowhere"),
        (["--from", "nowhere.png"], "nowhere.png"),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path,
    tmp_path: Path,
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (
        words if "--from" in words else ["--model", str(folder / "model"), "--steps", "3", *words]
    )
    assert (
        infer.main(
            arguments if "--out" in words else [*arguments, "--out", str(tmp_path / "out.png")]
        )
        == 2
    )
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and sentence in said[0], said
    assert not list(tmp_path.iterdir())


def test_patching_from_python_is_undone(folder: Path) -> None:
    family = load_family(str(folder / "model"))
    modules = {**family.modules, "tokenizer": family.tokenizers["text_encoder"]}
    before = {name: module for name, module in family.unet.named_modules()}
    with patch(modules, folder / "a", {"unet": 0.8, "text_encoder": 1.0}) as p:
        assert p.bind("a TOK") == "a <s0><s1>"
        rows = family.text_encoder.get_input_embeddings()(
            torch.tensor(modules["tokenizer"].convert_tokens_to_ids(["<s0>", "<s1>"]))
        )
        assert torch.equal(rows, load_file(folder / "a" / "a_emb.safetensors")["clip_l"])
    after = dict(family.unet.named_modules())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert "<s0>" not in modules["tokenizer"].get_vocab()


def test_a_refiner_draws_the_last_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests import tiny_sdxl

    tiny_sdxl.save(tmp_path / "base")
    tiny_sdxl.save(tmp_path / "refiner", refiner=True)
    words = [
        "--model",
        str(tmp_path / "base"),
        "--prompt",
        "a cat",
        "--steps",
        "5",
        "--sampler",
        "euler",
    ]
    refined = ["--refiner", str(tmp_path / "refiner")]
    runs = {
        "base": [],
        "late": [*refined, "--refiner-start", "0.8"],
        "early": [*refined, "--refiner-start", "0.2"],
    }
    for name, flags in runs.items():
        assert infer.main([*words, *flags, "--out", str(tmp_path / f"{name}.png")]) == 0
    pictures = {Image.open(tmp_path / f"{name}.png").tobytes() for name in runs}
    assert len(pictures) == 3
    assert infer.main([*words, "--refiner-start", "0.5", "--out", str(tmp_path / "x.png")]) == 2
    assert "--refiner-start has no effect without --refiner" in capsys.readouterr().err
    assert (
        infer.main(
            [
                *words,
                *refined,
                "--from",
                str(tmp_path / "late.png"),
                "--out",
                str(tmp_path / "again.png"),
            ]
        )
        == 0
    )
    assert (
        Image.open(tmp_path / "again.png").tobytes() == Image.open(tmp_path / "late.png").tobytes()
    )


@pytest.mark.parametrize(("given", "used"), [(0, 1), (2, 2)])
def test_a_clip_skip_that_is_given_wins_over_that_of_the_loras_run(
    monkeypatch: pytest.MonkeyPatch, given: int, used: int
) -> None:
    opened = []
    settings = RunSettings(scheduler={}, text={"clip_skip": 1, "max_sequence_length": 77})
    monkeypatch.setattr(infer, "read_run_settings", lambda paths: settings)
    monkeypatch.setattr(infer, "load_family", lambda path, options: opened.append(options))
    infer.open_models(infer.Infer(clip_skip=given), [])
    assert opened[0].clip_skip == used and opened[0].max_sequence_length == 77


@pytest.mark.parametrize(
    "ending, many",
    [
        (".png", ["--count", "2"]),
        (".png", ["--grid", "seed=0:2"]),
        (".png", []),
        (".gif", ["--grid", "seed=0:2"]),
        (".webp", ["--grid", "seed=0:2"]),
    ],
)
def test_images_that_exist_are_not_replaced(
    folder: Path, tmp_path: Path, ending: str, many: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"x{ending}"
    last = tmp_path / "x_001.png" if many[:1] == ["--count"] else out
    last.write_bytes(b"a photo")
    words = ["--model", str(folder / "model"), "--prompt", "a", "--steps", "1", *many]
    assert infer.main([*words, "--out", str(out)]) == 2
    assert f"{last} is there already; pass --overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [last.name]
    assert last.read_bytes() == b"a photo"
    assert infer.main([*words, "--out", str(out), "--overwrite"]) == 0
    Image.open(last).verify()


def test_the_default_output_is_not_replaced_either(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(folder / "model"), "--prompt", "a", "--steps", "1"]
    assert [infer.main(words), infer.main(words)] == [0, 2]
    Path("dir.png").mkdir()
    assert infer.main([*words, "--out", "dir.png", "--overwrite"]) == 2


def test_prompts_of_a_file_over_strengths_are_one_sheet(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mix-of-Show's validation sheet: a row for each prompt, a column for each strength."""
    (folder / "two.txt").write_text("a TOK\nb TOK\n")
    sheets = []
    monkeypatch.setattr(
        infer, "draw_grid", lambda rows, title: sheets.append((rows, title)) or BLANK
    )
    words = ["--lora", str(folder / "a"), "--seed", "3"]
    sheet = ["--prompts", str(folder / "two.txt"), "--grid", "strength=0,0.7,1"]
    draw(folder, "sheet.png", *words, *sheet)
    ((rows, title),) = sheets
    assert title == "the prompts of two.txt" and [row.label for row in rows] == ["a TOK", "b TOK"]
    assert rows[0].captions == ["strength 0", "strength 0.7", "strength 1"]
    for row in rows:
        for image, strength in zip(row.images, ("0", "0.7", "1")):
            one = ["--lora", f"{folder / 'a'}:{strength}", "--seed", "3", "--prompt", row.label]
            assert image.tobytes() == draw(folder, "one.png", *one)


def test_a_sheet_of_prompts_has_one_axis(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "two.txt").write_text("a\nb\n")
    words = ["--model", str(folder / "model"), "--prompts", str(folder / "two.txt")]
    axes = ["--grid", "guidance=1:2", "--grid", "seed=0:2"]
    assert infer.main([*words, *axes, "--out", str(folder / "none.png")]) == 2
    assert "one axis and several prompts" in capsys.readouterr().err


def test_regions_draw_their_own_prompts(folder: Path) -> None:
    """A region over the whole image is its prompt; half of it changes that half most."""
    whole = ["--lora", str(folder / "a"), "--region", "0,0,32,32: a TOK; negative: b"]
    ours = draw(folder, "region.png", *whole, "--prompt", "cat", "--negative", "b")
    alone = ["--lora", str(folder / "a"), "--prompt", "a TOK", "--negative", "b"]
    assert ours == draw(folder, "alone.png", *alone)
    plain = draw(folder, "plain.png", "--lora", str(folder / "a"), "--prompt", "cat")
    half = ["--lora", str(folder / "a"), "--region", "0,0,16,32: a TOK", "--prompt", "cat"]
    changed = draw(folder, "half.png", *half)
    assert changed not in (plain, ours)
    recipe = ["--from", str(folder / "half.png"), "--out", str(folder / "again.png")]
    assert infer.main([*recipe, "--overwrite"]) == 0
    assert Image.open(folder / "again.png").tobytes() == changed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--region", "0,0,40,32: a"], "not inside the image, 32 x 32"),
        (["--region", "0,0,1,1: a"], "no whole cell of any attention layer"),
        (["--region", "0,0,8,8: a; negative: b", "--guidance", "1"], "no effect at guidance 1"),
    ],
)
def test_regions_that_cannot_act_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    command = ["--model", str(folder / "model"), "--steps", "1", "--prompt", "a"]
    assert infer.main([*command, "--out", str(folder / "none.png"), *words]) == 2
    assert said in capsys.readouterr().err and not (folder / "none.png").exists()


def test_a_sampler_from_a_file_draws_and_its_arguments_too(folder: Path) -> None:
    """Our euler from a file draws our euler's image; ddim with eta 1 is no ddim."""
    file = folder / "mine.py"
    file.write_text(
        "from lora_core.diffusion.sampling import euler_ancestral\n\n"
        "def own(denoise, x, levels, *, noise):\n"
        "    return euler_ancestral(denoise, x, levels, noise=noise)\n"
    )
    words = ["--prompt", "a cat", "--steps", "2", "--sampler"]
    ours = draw(folder, "ours.png", *words, "euler_ancestral")
    assert draw(folder, "theirs.png", *words, f"{file}:own") == ours
    random = draw(folder, "random.png", *words, "ddim", "--sampler-args", "eta=1")
    assert random != draw(folder, "plain.png", *words, "ddim")
    again = str(folder / "same_eta.png")
    assert infer.main(["--from", str(folder / "random.png"), "--out", again]) == 0
    assert Image.open(again).tobytes() == random


def test_a_wrong_sampler_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "short.py").write_text("def short(denoise, x, levels):\n    return x[:, :1]\n")
    model = str(folder / "model")
    for words, said in (
        (["--model", "nowhere", "--sampler", "eular"], "unknown sampler 'eular', the nearest"),
        (["--model", model, "--sampler", f"{folder}/short.py:short"], "short returned [1, 1, "),
    ):
        status = infer.main([*words, "--prompt", "a", "--out", str(folder / "bad_sampler.png")])
        assert status == 2 and said in capsys.readouterr().err


def test_quantized_and_streamed_models_draw_with_loras(folder: Path) -> None:
    words = ("--prompt", "a TOK", "--lora", str(folder / "a"))
    plain, packed = (
        draw(folder, "q.png", *words),
        draw(folder, "q.png", *words, "--quantize", "fp8"),
    )
    assert packed != plain
    assert draw(folder, "q.png", *words, "--quantize", "fp8", "--stream") == packed
    assert draw(folder, "q.png", *words, "--stream") == plain


def test_what_can_be_listed_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert infer.main(["--list", "samplers"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in SAMPLERS) and "eta=0.0" in out


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run's folder with three checkpoints, with steps and tokens of their own, and its end, which
    the last of them is.
    """
    run = folder / "run"
    layout = load_family(str(folder / "model")).layout
    for step in (5, 10, 20):
        state = random_state(save_sd_pipeline(folder / "scratch"), seed=step)
        rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(step))
        state.tokens, state.token_names = {"clip_l": rows}, ("<s0>", "<s1>")
        state.metadata = embeddings.placeholder_header({"TOK": ("<s0>", "<s1>")})
        place = run / "checkpoints" / str(step)
        place.mkdir(parents=True)
        formats.save_run(state, place, layout=layout)
    formats.save_run(state, run, layout=layout)
    (run / "summary.json").write_text('{"steps": 20}')
    return run


@pytest.mark.parametrize(
    "other, single",
    [
        ("seed=3,4", [["--seed", "3"], ["--seed", "4"]]),
        ("strength=0.5,2", [[":0.5"], [":2"]]),
        ("", [[]]),
    ],
)
def test_a_grid_over_checkpoints_has_the_images_of_each(
    folder: Path, run: Path, other: str, single: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are those of one call for each checkpoint, with its own tokens; the recipe draws
    the sheet again.
    """
    sheets = []

    def look(rows: Any, title: str) -> Image.Image:
        sheets.append(rows)
        return pictures.draw_grid(rows, title=title)

    monkeypatch.setattr(infer, "draw_grid", look)
    axes = ["--grid", f"checkpoint={run}", *(["--grid", other] if other else [])]
    drawn = draw(folder, "checkpoints.png", "--prompt", "a TOK", *axes)
    (rows,) = sheets
    files = {"step 5": run / "checkpoints" / "5", "step 10": run / "checkpoints" / "10"}
    files["step 20, the end"] = run
    names = [row.label for row in rows] if other else rows[0].captions
    assert names == list(files)
    images = list(chain.from_iterable(row.images for row in rows))
    assert len({image.tobytes() for image in images}) == len(images)
    for number, (file, words) in enumerate(product(files.values(), single)):
        strength = words[0] if words[:1] and words[0][0] == ":" else ""
        seed = words if len(words) == 2 else []
        one = draw(folder, "one.png", "--prompt", "a TOK", "--lora", f"{file}{strength}", *seed)
        assert images[number].tobytes() == one
    again = ["--from", str(folder / "checkpoints.png"), "--out", str(folder / "again.png")]
    assert infer.main([*again, "--overwrite"]) == 0
    assert Image.open(folder / "again.png").tobytes() == drawn


def test_checkpoints_come_after_the_loras_that_are_given(folder: Path, run: Path) -> None:
    words = ["--prompt", "a TOK TOK2", "--lora", f"{folder / 'a'}:0.5"]
    axis = ["--grid", f"checkpoint={run}:0.7"]
    draw(folder, "both.webp", *words, *axis)
    draw(folder, "last.png", *words, "--lora", f"{run}:0.7")
    first, *_, last = frame_errors(folder / "both.webp", folder / "last.png")
    assert last < 6 and last < first / 2


def frame_errors(animation: Path, image: Path) -> list[float]:
    """The mean difference of each frame to an image, in 8-bit steps; WebP is lossy."""
    frames = Image.open(animation)
    wanted = Image.open(image).resize((256, 256), Image.Resampling.LANCZOS)
    errors = []
    for place in range(frames.n_frames):
        frames.seek(place)
        drawn = frames.convert("RGB").crop((0, 0, 256, 256))
        errors.append(max(ImageStat.Stat(ImageChops.difference(drawn, wanted)).mean))
    return errors


@pytest.mark.parametrize("out", ["alpha.gif", "alpha.webp"])
def test_strengths_become_frames(
    folder: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(folder, out, "--prompt", "a", "--lora", str(folder / "a"), "--grid", "strength=0:1:0.25")
    said = capsys.readouterr().err
    assert f"{out}: 5 frames of 0.2 s, the first and the last 1 s, 2.6 s in all" in said
    assert Image.open(folder / out).n_frames == 5


def test_animations_and_checkpoints_that_cannot_be_are_refused(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "two.txt").write_text("a\nb\n")
    seeds, strengths = ["--grid", "seed=0:2"], ["--grid", "strength=0,1"]
    one, lora = ["--prompt", "a"], ["--lora", str(folder / "a")]
    mistakes = [
        ([*one, "--out", "x.gif"], "an animation, over one --grid axis"),
        ([*one, *lora, *seeds, *strengths, "--out", "x.gif"], "an animation, over one"),
        (["--prompts", str(folder / "two.txt"), *seeds, "--out", "x.webp"], "and of one prompt"),
        ([*one, *seeds, "--out", "x.jpg"], ".png"),
        ([*one, *seeds, *seeds], "seed twice"),
        ([*one, "--grid", "checkpoint="], "expected checkpoint=RUN"),
        ([*one, "--grid", f"checkpoint={folder / 'model'}"], "no run with checkpoints"),
        ([*one, "--grid", f"checkpoint={run}", "--lora", str(run)], "leave --lora out"),
        ([*one, "--grid", f"checkpoint={run}", "--grid", "lora1.unet=0,1"], "1 given"),
    ]
    for words, sentence in mistakes:
        assert infer.main(["--model", str(folder / "model"), *words]) == 2
        assert sentence in capsys.readouterr().err
    assert not Path("x.gif").exists()


@pytest.mark.parametrize("words", [["--stream"], ["--quantize", "int8"]])
def test_checkpoints_are_drawn_by_models_that_change(
    folder: Path, run: Path, words: list[str]
) -> None:
    """Quantized and streamed models are read anew for each checkpoint."""
    pytest.importorskip("torchao") if "int8" in words else None
    more = ["--prompt", "a TOK", *words]
    draw(folder, "changed.webp", *more, "--grid", f"checkpoint={run}")
    draw(folder, "changed.png", *more, "--lora", str(run))
    first, *_, last = frame_errors(folder / "changed.webp", folder / "changed.png")
    assert last < 6 and last < first / 2
