"""The page of examples/web_demo.py: its functions against the scripts, its server, and all of its
tabs in a browser. Skipped without gradio (pip install -e ".[web]"); its browser also without
playwright or Chromium.
"""

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("gradio", reason="gradio is not installed: the page is not tried")

import infer
import merge
import train
from examples import web_demo
from examples.web_demo import GRIDS, draw, watch_run
from lora_core.toml import read_toml
from tests.conftest import same
from training.photo_run import CAPTION, PhotoRuns

ZIB = sorted(Path("toy/concepts/zib").glob("*.png"))
SCRIPT = Path(web_demo.__file__)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: one of two steps, with learned tokens, and its copy."""
    folder = tmp_path_factory.mktemp("runs")
    config = read_toml(Path("configs/toy_pti.toml"))
    stages = tuple(replace(stage, steps=1) for stage in config.stages)
    samples = replace(config.samples, steps=1)
    validation = replace(config.validation, every=-1)
    quick = replace(config, stages=stages, samples=samples, validation=validation, device="cpu")
    train.train(replace(quick, out=str(folder / "mine")))
    shutil.copytree(folder / "mine" / "checkpoints" / "2", folder / "other")
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> PhotoRuns:
    shutil.copytree(trained, tmp_path / "runs")
    return PhotoRuns("toy/model", tmp_path / "runs", {"toy": Path("configs/toy_pti.toml")})


def drawn(runs: PhotoRuns, *rows: Any, prompt: str = CAPTION, **changes: Any) -> Any:
    numbers = {"count": 2, "seed": 3, "steps": 2, "guidance": 4, "axis": GRIDS[0]}
    numbers |= {"start": 0, "stop": 1, "by": 0.5, **changes}
    return draw(runs, prompt, "", *numbers.values(), *rows)


def recipe(path: Path | str) -> dict[str, Any]:
    with Image.open(path) as image:
        return dict(image.info)


def test_a_drawing_is_that_of_the_script(runs: PhotoRuns, tmp_path: Path) -> None:
    paths, said = drawn(runs, "mine", 0.5, "", 1, "other", 1)
    words = ["--lora", f"{runs.folder}/mine:0.5", "--lora", f"{runs.folder}/other"]
    words += ["--prompt", CAPTION, "--seed", "3", "--steps", "2", "--guidance", "4"]
    words += ["--model", "toy/model", "--count", "2", "--out", str(tmp_path / "a.png")]
    assert infer.main(words) == 0
    for path, oracle in zip(paths, ("a_000.png", "a_001.png"), strict=True):
        assert Path(path).parent == runs.folder / "drawn.web"
        with Image.open(path) as ours, Image.open(tmp_path / oracle) as theirs:
            assert ours.tobytes() == theirs.tobytes()
    assert "TOK" in said  # the note on the second file's word


def test_a_drawing_has_the_recipe_that_repeats_it(runs: PhotoRuns, tmp_path: Path) -> None:
    (path,), _ = drawn(runs, "mine", 0.5, count=1)
    assert infer.main(["--from", path, "--out", str(tmp_path / "again.png")]) == 0
    with Image.open(path) as ours, Image.open(tmp_path / "again.png") as theirs:
        assert ours.tobytes() == theirs.tobytes()


def test_a_grid_is_one_sheet_over_its_values(runs: PhotoRuns) -> None:
    (path,), said = drawn(runs, "mine", 1, axis="strength")
    assert said == "" and '"strength=0:1:0.5"' in recipe(path)["lora_core"]
    with Image.open(path) as sheet, Image.open(drawn(runs, "mine", 1)[0][0]) as single:
        assert sheet.width > 3 * single.width


@pytest.mark.parametrize(
    ("changes", "rows", "said"),
    [
        ({"prompt": " "}, [], "error: write a prompt"),
        ({"prompt": "a <lora:/etc/passwd:1> TOK"}, [], "error: write a prompt, without <lora"),
        ({}, ["../runs/mine", 1], "error: '../runs/mine' is no LoRA in "),
        ({}, ["/etc/passwd", 1], "error: '/etc/passwd' is no LoRA in "),
        ({"axis": "strength"}, [], "error: --grid strength needs a --lora"),
        ({"axis": "strength", "by": 0}, ["mine", 1], "error: --grid strength=0:1:0: expected"),
        ({"steps": 0}, [], "error: --steps"),
    ],
)
def test_a_mistake_is_a_sentence(
    runs: PhotoRuns, changes: dict[str, Any], rows: list[Any], said: str
) -> None:
    paths, text = drawn(runs, *rows, **changes)
    assert paths == [] and text.startswith(said) and "\n" not in text
    assert not (runs.folder / "drawn.web").exists()


def test_nothing_is_drawn_during_a_run(runs: PhotoRuns) -> None:
    class Running:
        is_running, folder = True, "mine"

    runs.newest = Running()  # type: ignore[assignment]
    assert drawn(runs) == ([], "error: mine is training; stop it, or wait until it ends")


@pytest.mark.parametrize("rank", [0, 4])
def test_a_sum_is_that_of_the_script(
    runs: PhotoRuns, tmp_path: Path, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, said = web_demo.merge(runs, "sum", rank, "mine", 0.5, None, 1, "other", -0.25)
    text = f"0.5*{runs.folder}/mine - 0.25*{runs.folder}/other"
    words = ["mix", text, "--out", str(tmp_path / "sum.safetensors"), "--model", "toy/model"]
    capsys.readouterr()
    assert merge.main([*words, *(["--rank", str(rank)] if rank else [])]) == 0
    place = runs.folder / "merged.web" / "sum"
    lines = capsys.readouterr().out.replace(str(tmp_path / "sum"), str(place / "sum")).splitlines()
    assert [line for line in said.splitlines() if line in lines] == lines
    assert bool(re.search(r"total +\d+ +\d+ +\d+ +\d+\.\d+ % +\d\.\d+e-\d+", said)) == bool(rank)
    assert paths == [str(place / "sum.safetensors"), str(place / "sum_emb.safetensors")]
    for path in map(Path, paths):
        assert same(load_file(path), load_file(tmp_path / path.name))
    again, said = web_demo.merge(runs, "sum", rank, "mine", 1)
    assert again == [] and "is there already" in said


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("../sum", ["mine", 1], "error: '../sum' cannot name a folder"),
        ("sum", [], "error: "),
        ("sum", ["mine/checkpoints", 1], "error: 'mine/checkpoints' is no LoRA in "),
    ],
)
def test_a_wrong_sum_writes_nothing(runs: PhotoRuns, name: str, rows: list[Any], said: str) -> None:
    paths, text = web_demo.merge(runs, name, 0, *rows)
    assert paths == [] and text.startswith(said)
    assert not (runs.folder / "merged.web").exists()


def test_what_has_not_changed_is_not_sent_again(runs: PhotoRuns) -> None:
    assert all(value["__type__"] == "update" for value in watch_run(runs, None))
    assert not any(len(value) > 1 for value in watch_run(runs, None))


# ---------------------------------------------------------------- the server and a browser


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs that the server writes to."""
    return tmp_path_factory.mktemp("served") / "runs"


@pytest.fixture(scope="module")
def address(served: Path) -> Iterator[str]:
    """The address of a server, in a process of its own."""
    folder = served.parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-u", str(SCRIPT), "--port", str(port), "--runs", str(served)]
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while "Running on local URL" not in (folder / "log.txt").read_text():
        assert server.poll() is None and time.monotonic() < end, (folder / "log.txt").read_text()
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(30)


def test_only_this_computer_can_open_the_page(address: str) -> None:
    """Of all addresses of this computer it answers at 127.0.0.1 alone."""
    port = int(address.rpartition(":")[2])
    assert urlopen(address).status == 200
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    listening = Path("/proc/net/tcp")
    if listening.exists():
        ends = [line.split()[1] for line in listening.read_text().splitlines()[1:]]
        assert {end for end in ends if end.endswith(f":{port:04X}")} == {f"0100007F:{port:04X}"}


@pytest.mark.parametrize(
    "path", ["/etc/passwd", str(SCRIPT), "README.md", "toy/model/model_index.json"]
)
def test_the_server_gives_no_other_file(address: str, path: str) -> None:
    with pytest.raises(HTTPError) as info:
        urlopen(f"{address}/gradio_api/file={path}")
    assert info.value.code in (403, 404)


def test_all_tabs_work_in_a_browser(address: str, served: Path, tmp_path: Path) -> None:
    """Twenty steps with a stop between them, samples while it trains, a drawing, a grid, a sum."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    chromium = chromium or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed: the page is not tried in a browser")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        requests: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        use_train_tab(page, driver.expect)
        captions = [file.read_text() for file in sorted(served.glob("mine.web/photos/*.txt"))]
        assert captions == ["TOK on red stripes", *[CAPTION] * 4]
        use_draw_tab(page, driver.expect, tmp_path)
        use_merge_tab(page, driver.expect)
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) == 0 and errors == []
        assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
        browser.close()


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def choose(page: Any, label: str, option: str) -> None:
    page.get_by_label(label).locator("visible=true").click()
    page.locator(f"li[role=option][aria-label='{option}']").last.click()


def use_train_tab(page: Any, expect: Any) -> None:
    progress = page.get_by_label("Progress")
    press(page, "Train")
    expect(progress).to_have_value("error: there are no photos; add at least one", timeout=60_000)
    page.set_input_files("input[type=file] >> nth=0", [str(path.resolve()) for path in ZIB])
    expect(page.get_by_text("04.png")).to_be_visible()
    cell = page.get_by_role("gridcell").filter(has_text=CAPTION).first
    cell.dblclick()
    page.keyboard.press("Control+A")
    page.keyboard.type("TOK on red stripes")
    page.keyboard.press("Enter")
    page.get_by_label("Steps", exact=True).first.fill("20")
    page.get_by_label("Samples every N steps").fill("5")
    press(page, "Train")
    expect(progress).to_have_value(re.compile("step [1-9]"), timeout=120_000)
    press(page, "Stop")
    saved = re.compile(r"interrupted: the run is saved after step \d+")
    expect(progress).to_have_value(saved, timeout=60_000)
    expect(page.locator("img[src*='step_0000']")).to_be_visible()
    press(page, "Resume")
    expect(progress).to_have_value(re.compile("finished in .*mine"), timeout=180_000)
    expect(page.locator("img[src*='before_after']")).to_be_visible()
    expect(page.get_by_role("row", name=re.compile(r"^mine_emb\.safetensors"))).to_be_visible()
    press(page, "What train.py printed ▼")
    expect(page.get_by_text("resumed after step")).to_be_visible()


def use_draw_tab(page: Any, expect: Any, folder: Path) -> None:
    page.get_by_role("tab", name="Draw").click()
    choose(page, "LoRA 1", "mine")
    page.get_by_label("Images, if no grid").fill("2")
    page.get_by_label("Steps", exact=True).last.fill("4")
    press(page, "Draw")
    expect(page.locator("img[src*='_001.png']").first).to_be_visible()
    page.locator("img[src*='_000.png']").first.click()
    with page.expect_download() as saving:
        page.get_by_label("Download").locator("visible=true").first.click()
    saving.value.save_as(folder / "saved.png")
    assert "mine" in recipe(folder / "saved.png")["lora_core"]  # nothing was lost on the way
    page.keyboard.press("Escape")
    choose(page, "Grid over", "strength")
    press(page, "Draw")
    expect(page.locator("img[src*='_000.png']")).to_have_count(0)
    sheet = r"[...document.images].some(i => /\d{8}_\d{6}\.png/.test(i.src) && i.offsetParent)"
    page.wait_for_function(sheet)


def use_merge_tab(page: Any, expect: Any) -> None:
    page.get_by_role("tab", name="Merge").click()
    choose(page, "LoRA 1", "mine")
    choose(page, "LoRA 2", "mine/checkpoints/20")
    page.get_by_label("number input for Rank of the sum (0: exact)").fill("4")
    page.keyboard.press("Tab")
    press(page, "Merge")
    expect(page.get_by_text("relative error")).to_be_visible()
    expect(page.get_by_role("row", name=re.compile(r"^sum\.safetensors"))).to_be_visible()
