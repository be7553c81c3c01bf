"""The LoRAs that a page offers: all that were made, nothing else, and no path that it does not."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_core.errors import UserError
from lora_core.runs.found_loras import MERGED, UPLOADED, find_loras, keep_upload, pick_loras
from tests.pickle_examples import Danger

LORA = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 320),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": (320, 4),
}


def save_lora(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: torch.ones(*shape) for key, shape in LORA.items()}, file)
    return file


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    for name in ("b/b", "a/pytorch_lora_weights", "a/checkpoints/20/20", f"{MERGED}/sum/sum"):
        save_lora(runs / f"{name}.safetensors")
    save_lora(runs / UPLOADED / "mine.safetensors")
    save_lora(runs / ".hidden" / "x.safetensors")
    save_lora(runs / "a" / "checkpoints" / ".30.tmp" / "30.safetensors")
    save_lora(tmp_path / "outside.safetensors")
    state = runs / "c" / "checkpoints" / "10" / "state.safetensors"
    state.parent.mkdir(parents=True)
    save_file({f"groups/tokens/{number}": torch.ones(2, 768) for number in range(2)}, state)
    (runs / UPLOADED / "notes.txt").write_text("no LoRA")
    (runs / "d").mkdir()
    (runs / "d" / "torn.safetensors").write_bytes(b"\x10")
    return runs


def test_what_was_made_is_found(runs: Path, tmp_path: Path) -> None:
    names = ["a", "a/checkpoints/20", "b", f"{MERGED}/sum", f"{UPLOADED}/mine.safetensors"]
    assert find_loras(runs) == names
    assert find_loras(tmp_path / "nowhere") == []


def test_a_form_picks_what_was_found(runs: Path) -> None:
    picked = pick_loras(runs, ["a", 0.5, "", 1, None, 1, "a", -1])
    assert picked == [(str(runs / "a"), 0.5), (str(runs / "a"), -1.0)]
    assert pick_loras(runs, []) == []


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "d", "c/checkpoints/10", "/etc/passwd", "a/../b", ".", ".hidden",
     "b/b.safetensors", f"{UPLOADED}/notes.txt"],
)  # fmt: skip
def test_nothing_else_can_be_named(runs: Path, name: str) -> None:
    for each in (name, str(runs / "a")):
        with pytest.raises(UserError, match=r"is no LoRA in .*; choose one of the list"):
            pick_loras(runs, [each, 1.0])


def test_an_upload_is_kept_once(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "outside.safetensors"
    assert keep_upload(runs, file) == f"{UPLOADED}/outside.safetensors"
    assert f"{UPLOADED}/outside.safetensors" in find_loras(runs)
    with pytest.raises(UserError, match=r"outside\.safetensors is there already; rename"):
        keep_upload(runs, file)


def test_a_pickle_with_code_is_refused_and_not_executed(runs: Path, tmp_path: Path) -> None:
    for name, value in {"code.pt": Danger(), "table.pt": {"a": 1}}.items():
        (tmp_path / name).write_bytes(pickle.dumps(value))
        with pytest.raises(UserError, match=f"{name} is no LoRA file that can be read"):
            keep_upload(runs, tmp_path / name)
    assert not (runs / UPLOADED / "code.pt").exists()
