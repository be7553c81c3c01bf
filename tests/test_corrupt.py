"""The commands on the corpus of tests/corrupt: one sentence within seconds, and nothing written.

The same where the disk refuses an output.
"""

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import infer
import merge
import train
from lora_core.text import LONGEST_TEXT
from tests.conftest import save_photos
from tests.corrupt import others, pickles

SECONDS = 10  # of the processor
KILOBYTES = 2_000_000
SMALL = 100_000  # bytes
FILES: dict[str, Callable[[], bytes]] = {**pickles.FILES, **others.FILES}
ADAPTERS = [name for name in FILES if name.endswith((".ckpt", ".pt", ".bin", ".safetensors"))]
IMAGES = [name for name in FILES if name.endswith(".png")]
CONFIGS = [name for name in FILES if name.endswith(".toml")]
# Files that are fine where a command does not read what is wrong in them.
HARMLESS = {
    "slow_pattern.safetensors", "broken_config.safetensors", "dotted_config.safetensors",
    "typed_config.safetensors", "huge_product.safetensors",
}  # fmt: skip

Ended = Callable[..., str]


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Ended:
    """Runs a command line: the sentence of a refusal, "" for status 0."""

    def run(main: Callable[[list[str]], int], words: str, *more: str) -> str:
        capsys.readouterr()
        began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status = main([*words.split(), *more])
        assert time.process_time() - began < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < KILOBYTES
        errors = capsys.readouterr().err
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert status in (0, 2) and len(lines) == (status == 2), errors
        assert "Traceback" not in errors
        return lines[0] if lines else ""

    return run


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_crafted_adapter_is_refused(here: Path, ended: Ended, name: str) -> None:
    content = FILES[name]()
    Path(name).write_bytes(content)
    before = set(os.listdir())
    for words in (f"info {name}", f"convert {name} out.safetensors --model base"):
        assert ended(merge.main, words) or name in HARMLESS, words
    if len(content) < SMALL:  # the others take a second or two each time
        ended(merge.main, f"resize {name} out2.safetensors --rank 1 --model base")
        ended(merge.lora_add, f"{name} a.safetensors out3.safetensors 0.5")
    refused = ended(infer.main, f"--model base --lora {name} --out out.png --prompt a --steps 1")
    assert refused
    assert not Path(pickles.EXECUTED).exists()
    written = set(os.listdir()) - before
    assert not written or name in HARMLESS, written


@pytest.mark.parametrize("name", IMAGES)
def test_a_crafted_image_is_refused(here: Path, ended: Ended, name: str) -> None:
    Path(name).write_bytes(FILES[name]())
    before = set(os.listdir())
    assert ended(infer.main, f"--from {name} --out out.png")
    if "recipe" not in name:
        words = f"--model base --prompt a --init-image {name} --strength 0.5 --out out.png"
        assert ended(infer.main, words) or name.startswith("inflating")
        Path("out.png").unlink(missing_ok=True)
    assert set(os.listdir()) == before


@pytest.mark.parametrize("name", CONFIGS)
def test_a_crafted_config_is_refused(here: Path, ended: Ended, name: str) -> None:
    Path(name).write_bytes(FILES[name]())
    assert name in ended(train.main, f"{name} --out new")
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "text",
    [
        "(" * 2_000 + "a.safetensors" + ")" * 2_000,
        "(" + "-" * 2_000 + "a.safetensors)",
        "2*" * 2_000 + "a.safetensors",
        " + ".join(["a.safetensors"] * 20_000),
    ],
)
def test_a_crafted_sum_is_refused(here: Path, ended: Ended, text: str) -> None:
    assert "the sum" in ended(merge.main, "mix --out out.safetensors", text)


def test_a_gigabyte_of_text_is_not_read(here: Path, ended: Ended) -> None:
    others.write_sparse(Path("prompts.txt"))
    limit = f"{LONGEST_TEXT:,}"
    assert limit in ended(infer.main, "--model base --prompts prompts.txt --out out.png")
    save_photos(Path("data"), count=3)
    train_words = "--model base --data.images data --data.resolution 16 --adapter.rank 2 --out new"
    others.write_sparse(Path("data/0.txt"))
    assert limit in ended(train.main, train_words)
    Path("data/0.txt").write_text("word " * 50_000)
    assert "249,999 characters" in ended(train.main, train_words)
    for content in ("[" * others.DEPTH, json.dumps({"file_name": "0.png", "text": "x" * 10**6})):
        Path("data/metadata.jsonl").write_text(content)
        assert ended(train.main, train_words)
    others.write_sparse(Path("data/metadata.jsonl"))
    assert ended(train.main, train_words)


def damaged_models() -> Iterator[tuple[str, str]]:
    """(file of a model, its content)."""
    yield "model_index.json", "[" * others.DEPTH
    yield "model_index.json", '["StableDiffusionPipeline"]'
    yield "model_index.json", '{"_class_name": ["StableDiffusionPipeline"]}'
    yield "unet/config.json", '{"layers_per_block": 1000000000}'
    yield "unet/config.json", '{"block_out_channels": [8, "x"]}'
    yield "unet/config.json", '"runwayml/stable-diffusion-v1-5"'
    yield "text_encoder/config.json", '{"num_hidden_layers": 1000000000}'
    yield "text_encoder/config.json", '{"hidden_size": ' + "9" * 5000 + "}"
    yield "text_encoder/config.json", "null"
    yield "scheduler/scheduler_config.json", "7"


@pytest.mark.parametrize(("name", "content"), list(damaged_models()))
def test_a_crafted_model_is_refused(here: Path, ended: Ended, name: str, content: str) -> None:
    shutil.copytree("base", "broken")
    Path("broken", name).write_text(content)
    assert ended(merge.main, "fold broken a.safetensors out")
    assert ended(infer.main, "--model broken --prompt a --out out.png --steps 1")
    assert ended(train.main, "--model broken --data.images x --out new")
    assert not Path("out").exists() and not Path("out.png").exists()


SCORE = {"step": 2, "key": "a", "draw": 0, "bin": 0, "t": 500.0, "loss": 1.0}


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe", b"[]", b"null", b"{", b"[" * others.DEPTH, b"{}", b'{"step": 1e400}',
        json.dumps(SCORE | {"loss": "x"}).encode(), json.dumps(SCORE | {"key": {}}).encode(),
        json.dumps(SCORE | {"t": float("nan")}).encode(),
        json.dumps(SCORE | {"step": 2**70}).encode(),
    ],
)  # fmt: skip
def test_a_damaged_log_is_refused(tmp_path: Path, ended: Ended, line: bytes) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "val.jsonl").write_text(json.dumps(SCORE) + "\n")
    (tmp_path / "b" / "val.jsonl").write_bytes(line + b"\n")
    assert "val.jsonl" in ended(train.main, "--compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert not list(tmp_path.rglob("*.png"))


def test_many_scores_are_compared_in_seconds(tmp_path: Path, ended: Ended) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [json.dumps(SCORE | {"key": str(i), "t": float(i % 4)}) for i in range(30_000)]
        (tmp_path / name / "val.jsonl").write_text("\n".join(rows))
    assert not ended(train.main, "--compare", str(tmp_path / "a"), str(tmp_path / "b"))


# ---------------------------------------------------------------- the disk

PLACES = ("a.safetensors/below", "n" * 300, "/proc/none/of", "/dev/null/x")
OUTPUTS = (
    (merge.main, "convert a.safetensors {}.safetensors --model base"),
    (merge.main, "convert base {}.ckpt"),
    (merge.main, "convert base {}.safetensors"),
    (merge.main, "fold base a.safetensors {}"),
    (merge.main, "info a.safetensors --model base --plot {}.png"),
    (merge.lora_add, "a.safetensors a.safetensors {}.safetensors 0.5 --model base"),
    (infer.main, "--model base --prompt a --out {}.png --steps 1 --width 16 --height 16"),
)


@pytest.mark.parametrize(("main", "words"), OUTPUTS)
@pytest.mark.parametrize(
    "place", ["a.safetensors/below", "n" * 300, "/proc/none/of", "/dev/null/x"]
)
def test_an_output_that_cannot_be_made(
    here: Path, ended: Ended, main: Callable[[list[str]], int], words: str, place: str
) -> None:
    before = set(here.rglob("*"))
    assert ended(main, words.format(place))
    assert set(here.rglob("*")) == before


@pytest.mark.parametrize(("main", "words"), OUTPUTS)
def test_a_limit_of_the_size_of_files(
    here: Path, ended: Ended, main: Callable[[list[str]], int], words: str
) -> None:
    """As `ulimit -f` sets it: a write beyond it fails with EFBIG, as on a full disk."""
    before = set(here.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        sentence = ended(main, words.format("made"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in sentence or "cannot be written" in sentence
    assert set(here.rglob("*")) == before


def test_the_corpus_is_described() -> None:
    listed = (Path(__file__).parent / "corrupt" / "README.md").read_text().splitlines()
    names = [line.split("`")[1] for line in listed if line.startswith("| `")]
    assert sorted(names) == sorted(FILES)
