"""Sections of a page: frames of the sliders, settings of several runs, files."""

from pathlib import Path

from lora_core.runs.report_data import NO_DEFAULT, ChangedOption, RunRecord
from lora_core.runs.report_images import RunImages, Sheet, SheetImage, read_images
from lora_core.runs.report_sections import (
    common_settings,
    differing_settings,
    last_samples,
    list_files,
    make_viewer,
)
from tests.report_runs import write_run


def picture(role: str, strength: float | None) -> SheetImage:
    return SheetImage("data:,", 1, 1, f"{role} {strength}", role, strength, "")


def test_sliders_reach_every_image_and_begin_at_the_last_step(tmp_path: Path) -> None:
    viewer = make_viewer(read_images(write_run(tmp_path / "a"), shows_data=False))
    assert viewer.positions == ("base model", "step 4", "step 8")
    assert viewer.strengths == ("0.5", "1") and viewer.start == 1
    places = [(frame.position, frame.strength) for frame in viewer.frames]
    assert places == [(0, -1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [frame.is_shown for frame in viewer.frames] == [False] * 4 + [True]
    assert viewer.words["held"] == [[-1], [0, 1], [0, 1]]


def test_sheets_may_have_different_strengths() -> None:
    """A run that was resumed with other ones."""
    first, last = (picture("sample", s) for s in (0.5, 0.8))
    images = RunImages((Sheet(1, (first,)), Sheet(2, (last,))))
    viewer = make_viewer(images)
    assert viewer.strengths == ("0.5", "0.8") and viewer.words["held"] == [[0], [1]]
    assert viewer.words["other"] == ["drawn at 0.5 only", "drawn at 0.8 only"]
    assert last_samples(images) == ("step 2, strength 0.8", [last])
    assert last_samples(RunImages()) == ("", []) and make_viewer(RunImages()).frames == ()


def test_images_at_the_end_take_the_place_of_a_strength_that_no_sheet_has() -> None:
    half, after = picture("sample", 0.5), picture("after", None)
    images = RunImages((Sheet(1, (half,)), Sheet(2, (half,))), (after,))
    assert make_viewer(images).words["held"] == [[0], [0, 1]]
    assert last_samples(images) == ("step 2, strength 1", [after])
    assert last_samples(RunImages((), (after,))) == ("after training, strength 1", [after])


def test_settings_of_runs_are_common_or_differ() -> None:
    model, loss = ChangedOption("model", "m", "empty"), ChangedOption("loss", "huber", "mse")
    lr = ChangedOption("optimizer.lr.tokens", "1", NO_DEFAULT)
    records = [RunRecord(Path("a"), "a", (model, loss)), RunRecord(Path("b"), "b", (model, lr))]
    assert common_settings(records) == [model]
    rows = differing_settings(records)
    assert rows == [("loss", ["huber", "mse"]), ("optimizer.lr.tokens", ["", "1"])]


def test_files_have_their_sizes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / ".hidden").write_text("x")
    (run / "report.html").write_text("x")
    files = dict(list_files(run))
    assert next(iter(files)) == "a.safetensors" and files["a.safetensors"] == 2000
    inside = sum(file.stat().st_size for file in (run / "samples").iterdir())
    assert files["samples/"] == inside and not files.keys() & {".hidden", "report.html"}
