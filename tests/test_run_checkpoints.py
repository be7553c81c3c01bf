"""The checkpoints of a run as an axis: their order, their end, and what is no run."""

from pathlib import Path

import pytest

from lora_core.errors import UserError
from lora_core.runs.image_grid import MOST_VALUES, parse_axis
from lora_core.runs.loras import parse_lora
from lora_core.runs.run_checkpoints import find_checkpoints


def make_run(folder: Path, steps: list[int], name: str = "{step}.safetensors") -> Path:
    for step in steps:
        place = folder / "checkpoints" / str(step)
        place.mkdir(parents=True)
        (place / name.format(step=step)).write_bytes(b"x")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("name", ["{step}.safetensors", "run-{step:06d}.safetensors"])
def test_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", [5, 100, 20], name)
    (run / "checkpoints" / "7").mkdir()  # of a writer that was killed
    (run / "checkpoints" / "notes.txt").write_text("")
    axis = find_checkpoints(parse_axis(f"checkpoint={run}"))
    assert axis.captions == ["step 5", "step 20", "step 100"] and axis.values == [0, 1, 2]
    folders = [run / "checkpoints" / step for step in ("5", "20", "100")]
    assert [parse_lora(text).path for text in axis.loras] == list(map(str, folders))


def test_the_end_is_last_and_shown_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [5, 100])
    (run / "run.safetensors").write_bytes(b"x")
    names = find_checkpoints(parse_axis(f"checkpoint={run}")).captions
    assert names == ["step 5", "step 100", "end"]
    (run / "summary.json").write_text('{"steps": 100}')
    axis = find_checkpoints(parse_axis(f"checkpoint={run}:0.5@0.2-1.0"))
    assert axis.captions == ["step 5", "step 100, the end"]
    assert parse_lora(axis.loras[-1]) == parse_lora(f"{run}:0.5@0.2-1.0")


def test_no_run_and_a_run_twice_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    with pytest.raises(UserError, match="no run with checkpoints"):
        find_checkpoints(parse_axis(f"checkpoint={run}"))
    make_run(run, [3])
    given = [parse_lora(str(run / "checkpoints" / "3"))]
    with pytest.raises(UserError, match="leave --lora out"):
        find_checkpoints(parse_axis(f"checkpoint={run}"), given)
    find_checkpoints(parse_axis(f"checkpoint={run}"), [parse_lora(str(tmp_path / "other"))])
    seeds = parse_axis("seed=0:4")
    assert find_checkpoints(seeds) is seeds


def test_of_a_hundred_checkpoints_some_are_chosen_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", list(range(1, 101)))
    axis = find_checkpoints(parse_axis(f"checkpoint={run}"))
    assert len(axis.loras) == MOST_VALUES
    assert axis.captions[0] == "step 1" and axis.captions[-1] == "step 100"
    assert "64 of 100 checkpoints" in capsys.readouterr().err
