"""Mix-of-Show's two commands as a tutorial types them, and the file that its loaders read."""

import contextlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState
from lora_core.formats.embeddings import placeholder_words, word_layers
from lora_core.toml import read_toml
from tests.conftest import save_pipeline
from tests.installed_commands import ROOT, typed_words
from tests.mixofshow_example import save_example
from training.translation.edlora_files import rename_concepts

TRAIN = (
    "accelerate launch train_edlora.py -opt data/mixofshow_example_data/EDLoRA_hermione_RV51.yml"
)
TEST = (
    "accelerate launch test_edlora.py "
    "-opt experiments/EDLoRA_hermione_RV51.yml/EDLoRA_hermione_RV51.yml \\\n"
    "    --lora-path experiments/EDLoRA_hermione_RV51.yml/models/edlora_model-latest.pth \\\n"
    "    --save-dir experiments/EDLoRA_hermione_RV51.yml/visualization_test\n"
)
RUN = "experiments/EDLoRA_hermione_RV51.yml"


def run_line(line: str, folder: Path) -> int:
    """Carry out `accelerate launch SCRIPT WORDS` in this process: one process starts one script."""
    (words,) = typed_words(line, folder)
    assert words[0] == "launch"
    file = ROOT / "examples/mixofshow" / words[1]
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name = "run_training" if file.stem == "train_edlora" else "run_validation"
    run: Callable[[list[str]], int] = getattr(module, name)
    with contextlib.chdir(folder):
        return run(words[2:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tutorial's folder after its first command."""
    folder = tmp_path_factory.mktemp("mixofshow")
    save_example(folder)
    assert run_line(TRAIN, folder) == 0
    return folder


def test_the_first_command_writes_what_the_second_names(trained: Path) -> None:
    file = f"{RUN}/EDLoRA_hermione_RV51.yml"
    options = trained / "data/mixofshow_example_data/EDLoRA_hermione_RV51.yml"
    assert (trained / file).read_text() == options.read_text()
    content = torch.load(trained / RUN / "models/edlora_model-latest.pth", weights_only=True)
    params = content["params"]
    concepts = params["new_concept_embedding"]
    assert {name: rows.shape for name, rows in concepts.items()} == {
        "<hermione1>": (16, 16),
        "<hermione2>": (16, 16),
    }
    # its loader asks for two tensors of each of the layers that it replaces: 16 blocks x 8, 2 x 4
    assert len(params["unet"]) == 2 * 128 and len(params["text_encoder"]) == 2 * 8
    state = formats.load(trained / RUN)
    rows = state.tokens["clip_l"]
    assert torch.equal(concepts["<hermione1>"], rows[0::2])
    assert torch.equal(concepts["<hermione2>"], rows[1::2])
    for path, lr in state.components["unet"].items():
        up = params["unet"][f"{path}.lora_up.weight"]
        down = params["unet"][f"{path}.lora_down.weight"]
        product = lr.scale * lr.up @ lr.down  # type: ignore[union-attr]
        assert torch.allclose(up @ down, product, atol=1e-6), path


def test_the_config_is_that_of_configs_edlora(trained: Path) -> None:
    config, hand = read_toml(trained / RUN / "config.toml"), read_toml(Path("configs/edlora.toml"))
    assert config.loss == hand.loss and config.loss_arg == hand.loss_arg
    assert config.optimizer.lr == hand.optimizer.lr and config.noise == hand.noise
    assert config.optimizer.weight_decay == hand.optimizer.weight_decay
    assert config.tokens.words == hand.tokens.words and config.tokens.per_layer
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.init) == (4, 4.0, "kaiming")
    assert config.data.crop == hand.data.crop and config.data.zoom == hand.data.zoom
    assert config.precision == hand.precision and config.stages[0].groups == hand.stages[0].groups


def test_the_second_command_draws_each_prompt_at_each_strength(trained: Path) -> None:
    assert run_line(TEST, trained) == 0
    folder = trained / RUN / "visualization_test"
    drawn = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    expected = ["sheet.png"]
    for alpha in ("0", "0.7"):
        expected += [f"validation_edlora_{alpha}/image_00{i}.png" for i in range(4)]
    assert drawn == sorted(expected)
    assert (folder / "prompts.txt").read_text().startswith("a <hermione1> <hermione2>\n")
    first, strong = (
        Image.open(folder / f"validation_edlora_{alpha}/image_000.png").tobytes()
        for alpha in ("0", "0.7")
    )
    assert first != strong


def test_a_model_that_the_format_cannot_hold_keeps_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_example(tmp_path)
    save_pipeline(tmp_path / "small")
    file.write_text(file.read_text().replace("path: model", "path: small"))
    assert run_line(TRAIN, tmp_path) == 0
    assert "test_edlora.py takes the folder of the run" in capsys.readouterr().out
    line = f"accelerate launch test_edlora.py -opt {RUN}/{file.name} --lora-path {RUN} --save-dir x"
    assert run_line(line, tmp_path) == 0
    assert (tmp_path / "x/sheet.png").is_file()


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_example(tmp_path)
    text = file.read_text()
    for old, new, said in (
        ("hermione.json", "hermione2.json", "hermione2.json"),
        ("test_woman.txt", "nothing.txt", "expected a text file with a prompt in each line"),
        ("<hermione1>+<hermione2>", "<a>+<b>", "expected the concepts of datasets.train.replace"),
        ("type: AdamW", "type: SGD", "it is AdamW there, too"),
        ("where: Attention", "where: Resnet", "expected one of Attention, Transformer2DModel"),
        ("scheduler: linear", "scheduler: cosine", "always decays linearly"),
        ("name:", "name: [", "is not YAML"),
    ):
        file.write_text(text.replace(old, new))
        assert run_line(TRAIN, tmp_path) == 2
        assert said in capsys.readouterr().err, new
    assert not (tmp_path / "experiments").exists()


def test_each_vector_of_a_word_becomes_a_concept() -> None:
    names = tuple(f"<s{i}>" for i in range(8))
    header = formats.placeholder_header({"A": names[:4], "B": names[4:]}, {"A": 2, "B": 2})
    state = AdapterState(tokens={"clip_l": torch.eye(8)}, token_names=names, metadata=header)
    renamed = rename_concepts(state, ("<a1>", "<a2>", "<b1>", "<b2>"))
    assert placeholder_words(renamed) == {
        "<a1>": ("<s0>", "<s2>"),
        "<a2>": ("<s1>", "<s3>"),
        "<b1>": ("<s4>", "<s6>"),
        "<b2>": ("<s5>", "<s7>"),
    }
    assert word_layers(renamed) == dict.fromkeys(("<a1>", "<a2>", "<b1>", "<b2>"), 2)
