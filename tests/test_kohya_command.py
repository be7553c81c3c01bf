"""kohya's command lines as typed, and train.py --from-kohya."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import train
from lora_core.errors import UserError
from lora_core.toml import read_toml
from tests.test_kohya_runs import PUBLIC, data, write_file
from training.translation.kohya_command import read_kohya_command, run_kohya_command

__all__ = ["data"]  # a fixture
ROOT = Path(__file__).parent.parent
LINE = (
    "launch",
    "--num_cpu_threads_per_process=4",
    "train_network.py",
    "--config_file=lora_example_training_data/train_network_config.toml",
)


def test_the_command_as_typed_trains_the_embedded_model(tmp_path: Path) -> None:
    """In a copy of examples/kohya, so that nothing is written into the repository."""
    pytest.importorskip("accelerate")
    here = tmp_path / "examples" / "kohya"
    shutil.copytree(ROOT / "examples/kohya/lora_example_training_data",
                    here / "lora_example_training_data")  # fmt: skip
    (tmp_path / "toy").symlink_to(ROOT / "toy")
    (here / "train_network.py").symlink_to(ROOT / "examples/kohya/train_network.py")
    launcher = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    done = subprocess.run([launcher, *LINE], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "max_train_epochs = 2" in done.stdout and f"done: {here}/runs/zib" in done.stdout
    config = tomllib.loads((here / "runs/zib/config.toml").read_text())
    assert config["stages"][0]["steps"] == 6 and config["adapter"]["rank"] == 8
    assert (here / "runs/zib/zib.safetensors").is_file()
    assert len(list((here / "runs/zib/checkpoints").iterdir())) == 2


@pytest.mark.parametrize("script", ["train_network", "sdxl_train_network", "flux_train_network"])
def test_each_script_says_which_model_it_is_for(script: str) -> None:
    text = (ROOT / f"examples/kohya/{script}.py").read_text(encoding="utf-8")
    assert "run_kohya_command, sys.argv[1:], train" in text
    kind = script.removesuffix("train_network").removesuffix("_")
    assert (f'script="{kind}"' in text) == bool(kind)


def test_kohyas_flags_win_over_its_file(
    data: Path, model: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_file(data, PUBLIC["generated"], str(model))
    words = [f"--config_file={path}", "--network_dim=2", "--max_train_steps", "2"]
    run_kohya_command([*words, "--output_name=x"], train.train)
    config = read_toml(data / "out/x/config.toml")
    assert config.adapter.rank == 2 and config.steps == 2
    shown = capsys.readouterr().out
    assert "network_dim = 2" in shown and "adapter.rank = 2" in shown


def test_the_advice_about_an_occupied_folder_can_be_followed(
    data: Path, model: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error comes before the table; --resume with a path is kohya's own flag."""
    path = write_file(data, PUBLIC["generated"], str(model))
    words = [f"--config_file={path}", "--max_train_steps=2", "--output_name=x"]
    run_kohya_command(words, train.train)
    capsys.readouterr()
    with pytest.raises(UserError, match="already holds a run; pass --resume"):
        run_kohya_command([*words, "--resume", "old-state"], train.train)
    with pytest.raises(UserError, match="already holds a run"):
        read_kohya_command(["--from-kohya", str(path), "--out", str(data / "out/x")])
    assert not capsys.readouterr().out
    run_kohya_command(["--overwrite", *words], train.train)
    assert (data / "out/x.bak").is_dir()
    run_kohya_command(
        ["--resume", *words[:1], "--out", str(data / "out/x"), *words[1:]], train.train
    )
    assert "network_dim = " in capsys.readouterr().out
    run_kohya_command([*words, "--resume=old-state", f"--out={data / 'out/y'}"], train.train)
    shown = capsys.readouterr().out
    assert (data / "out/y/config.toml").is_file()
    assert 'resume = "old-state"' in shown and "without a path, --resume" in shown


def test_our_flags_win_after_from_kohya(
    data: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_file(data, PUBLIC["flat"], str(model))
    words = ["--from-kohya", str(path), "--adapter.rank", "3", "--out", str(data / "mine")]
    config = read_kohya_command(words)
    assert config is not None and config.adapter.rank == 3 and config.out == str(data / "mine")
    assert config.optimizer.lr == {"denoiser": 1e-4, "text_encoder": 5e-5}
    target = data / "ours.toml"
    assert train.main([*words, f"--write-config={target}"]) == 0
    assert read_toml(target) == config
    assert train.main([*words, "--write-config", str(target)]) == 2
    assert "exists; name another file" in capsys.readouterr().err


def test_a_dataset_file_takes_the_place_of_the_configs(data: Path, model: Path) -> None:
    file = data / "dataset.toml"
    images = data / "data" / "3_TOK"
    file.write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\nnum_repeats = 2\n"
    )
    path = write_file(data, PUBLIC["flat"], str(model))
    config = read_kohya_command([f"--from-kohya={path}", "--dataset", str(file)])
    assert config is not None and config.data.repeats == 2 and config.data.images == str(images)


@pytest.mark.parametrize("words", [["--from-kohya"], ["--from-kohya", "--out", "x"]])
def test_a_missing_file_is_said(words: list[str]) -> None:
    with pytest.raises(UserError, match="--from-kohya needs a file"):
        read_kohya_command(words)
