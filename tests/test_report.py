"""The page about runs: whole and safe HTML, what it shows of each kind of run, and its sliders in a
browser.
"""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_core import report
from lora_core.errors import UserError
from lora_core.report import format_duration, main, write_report
from tests.report_runs import write_jsonl, write_run

HOSTILE = '"><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
EMPTY = {"meta", "link", "img", "input", "path", "polyline", "circle", "line", "rect"}  # no end tag


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects elements and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.words += data


def page_of(*runs: Path) -> Page:
    return Page(write_report(runs).read_text())


def check_loads_nothing(text: str) -> None:
    page = Page(text)
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert "url(" not in text and "@import" not in text
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_page_of_a_run_is_one_whole_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", {"samples": {"show_data": True}})
    out = write_report([run])
    assert out == run / "report.html"
    check_loads_nothing(text := out.read_text())
    page = Page(text)
    links = {a["href"][1:] for tag, a in page.elements if tag == "a"}
    assert links == {a["id"] for tag, a in page.elements if tag == "section"}
    said = "3 steps of tokens, then 5 steps of denoiser on toy/model"
    for words in (said, "reading", "TOK on mars", "pipe = load(x < y)", "held-out loss", "<s0>",
                  "mine.safetensors", "2 kB"):  # fmt: skip
        assert words in page.words, words
    labels = {a["for"] for tag, a in page.elements if tag == "label"}
    sliders = {a["id"] for tag, a in page.elements if tag == "input" and a["type"] == "range"}
    assert labels == sliders == {"step", "strength"}
    images = [a for tag, a in page.elements if tag == "img"]
    assert len(images) == 1 + 2 + 2 * 4 + 1 and all(a["alt"] for a in images)


def test_training_images_are_counted_and_not_shown(tmp_path: Path) -> None:
    """Also where before_after.png has them, from a run that was set to show them."""
    run = write_run(tmp_path / "mine", {"samples": {"show_data": True}})
    config = run / "config.toml"
    shown = write_report([run]).read_text().count("data:image/jpeg")
    config.write_text(config.read_text().replace("show_data = true", "show_data = false"))
    text = write_report([run]).read_text()
    assert text.count("data:image/jpeg") == shown - 1
    assert "1 image. Neither they nor captions from files are shown" in text


def test_nothing_of_a_stranger_becomes_html(tmp_path: Path) -> None:
    name = "<i>&\"'run"
    run = write_run(tmp_path / name, {"loss": HOSTILE}, prompts=(HOSTILE, "</script>"))
    rows = [{"step": step, "loss": 0.5, HOSTILE: 1.0} for step in range(1, 3)]
    write_jsonl(run / "metrics.jsonl", rows)
    summary = json.loads((run / "summary.json").read_text())
    summary["tokens"][0] |= {"name": HOSTILE, "nearest": [[HOSTILE, 0.5]]}
    summary |= {"scored": HOSTILE, "changes": [HOSTILE]}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "README.md").write_text(f"# x\n\n## {HOSTILE}\n\n`{HOSTILE}`\n\n```\n{HOSTILE}\n```\n")
    for runs in ([run], [run, write_run(tmp_path / "other", {"loss": "huber"})]):
        text = write_report(runs).read_text()
        check_loads_nothing(text)
        page = Page(text)
        tags = [tag for tag, _ in page.elements]
        assert tags.count("script") == (2 if len(runs) == 1 else 1) and "i" not in tags
        assert not [a for _, a in page.elements if any(key.startswith("on") for key in a)]
        assert page.words.count(HOSTILE) >= 5 and html.escape(HOSTILE) not in page.words


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    words = page_of(write_run(tmp_path / "a", finished=False)).words
    assert "not finished, 8 of 8 steps are done" in words
    assert "written at the end of a run" in words and "no README.md yet" in words
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.toml").write_text('model = "toy/model"\n')
    words = page_of(tmp_path / "b").words
    for said in (
        "no metrics yet",
        "no validation yet",
        "no sample sheets yet",
        "not finished, 0 steps",
    ):
        assert said in words, said


def test_a_run_without_validation_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "val.jsonl").unlink()
    assert "the run was trained without validation" in page_of(run).words


def test_a_damaged_run_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    (run / "samples" / "step_000004.png").write_bytes(b"no image")
    (run / "config.toml").write_text("model = ")
    words = page_of(run).words
    assert "metrics.jsonl, line 10 is not JSON" in words and "Training loss" in words
    assert "step_000004.png cannot be read" in words and "step 8" in words
    assert "Its settings cannot be read" in words


def test_several_runs_are_compared_by_group(tmp_path: Path) -> None:
    runs = []
    for loss, scale in (("mse", 1.0), ("huber", 0.7)):
        for seed in range(5):
            run = tmp_path / f"{loss}_{seed}"
            runs.append(write_run(run, {"loss": loss}, seed=seed, scale=scale))
    out = write_report(runs)
    assert out == tmp_path / "report.html"
    check_loads_nothing(text := out.read_text())
    page = Page(text)
    assert "mse, huber: 10 runs" in page.words and "A = mse, B = huber" in page.words
    assert re.search(r"B lower by 0\.\d+ \N{PLUS-MINUS SIGN} 0\.\d+ over 5 seeds, 3 images",
                     page.words)  # fmt: skip
    for run in runs:
        assert run.name in page.words
    assert len(text) < 10_000_000


def test_a_page_replaces_a_page_and_no_other_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    write_report([run])
    write_report([run])
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(UserError, match=r"--out .*mine\.html is a file that is no page"):
        write_report([run], tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    with pytest.raises(UserError, match="is a folder"):
        write_report([run], tmp_path)
    with pytest.raises(UserError, match="no run to report on"):
        write_report([])


def test_the_command_prints_the_page_or_one_sentence(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "a")
    assert main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'page.html'}\n"
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path} holds no run" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err


def test_images_of_all_runs_together_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "a")
    whole = len(write_report([run]).read_text())
    size = re.findall(r'src="(data:image[^"]*)"', write_report([run]).read_text())
    monkeypatch.setattr(report, "MOST_BYTES", sum(map(len, size)) - 1)
    text = write_report([run]).read_text()
    assert len(text) < whole and "1 of 2 sample sheets are shown" in text


def test_durations_are_in_words() -> None:
    assert [format_duration(s) for s in (41.6, 200, 7_500)] == ["42 s", "3 min 20 s", "2 h 5 min"]


# ---------------------------------------------------------------- in a browser

DRIVER = """
<script>
window.addEventListener("load", () => {
  const shown = () => [...document.querySelectorAll("#viewer .cells")]
    .filter((frame) => frame.offsetParent !== null)
    .map((frame) => [frame.dataset.step, frame.dataset.strength]);
  const move = (id, value) => {
    const input = document.getElementById(id);
    input.value = value;
    input.dispatchEvent(new Event("input"));
    return [shown(), document.getElementById(id + "-words").textContent];
  };
  const seen = { start: shown(), early: move("step", 1), weak: move("strength", 0),
    base: move("step", 0), late: move("step", 2) };
  const svg = document.querySelector("#training svg[data-x]"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 14 }));
  seen.readout = svg.closest("figure").querySelector(".readout").textContent;
  seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  seen.loaded = [...document.images].filter((image) => image.naturalWidth > 0).length;
  seen.images = document.images.length;
  seen.hacked = window.hacked ?? null;
  seen.errors = window.errors;
  document.body.innerHTML = "<pre id=seen></pre>";
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script>
"""


def test_sliders_work_in_a_browser_without_errors(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    browser = browser or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed: the page's sliders are not tried in a browser")
    run = write_run(tmp_path / "mine", prompts=(HOSTILE, "a TOK"))
    text = write_report([run]).read_text()
    catch = "<script>window.errors = []; onerror = (text) => { errors.push(text); };</script>"
    text = text.replace("<head>", f"<head>{catch}", 1).replace("</body>", f"{DRIVER}</body>")
    (tmp_path / "driven.html").write_text(text)
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    words += ["--window-size=420,900", "--virtual-time-budget=2000", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "driven.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    seen = json.loads(html.unescape(found[1]))
    assert seen["start"] == [["2", "1"]]
    assert seen["early"] == [[["1", "1"]], "step 4"]
    assert seen["weak"] == [[["1", "0"]], "0.5"]
    assert seen["base"] == [[["0", "-1"]], "base model"]
    assert seen["late"] == [[["2", "0"]], "step 8"]
    assert re.fullmatch(r"8: mean of 5 0\.\d+", seen["readout"])
    assert seen["wide"] == 0  # nothing scrolls sideways but tables
    assert seen["loaded"] == seen["images"] > 8
    assert seen["hacked"] is None and seen["errors"] == []
    assert "CONSOLE" not in done.stderr
