"""A page that trains, draws and merges LoRAs (docs/web_demo.md): python examples/web_demo.py"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
import torch
import tyro

from infer import Infer, infer
from lora_core.errors import UserError, printed_by
from lora_core.prompt_tags import TAG
from lora_core.runs.found_loras import MERGED, find_loras, keep_upload, pick_loras
from merging.commands import AdapterFileOptions, KeepOptions, Mix
from merging.expression import WeightedFile, render_sum
from merging.mix import run_mix
from training.photo_run import CAPTION, PhotoRun, PhotoRuns, caption_table, check_name

TOY = "toy/model"
PROMPTS = "a photo of TOK\na photo of TOK on a red striped background\na drawing of TOK in a meadow"
GRIDS = ("no grid", "strength", "guidance", "steps", "seed")
text_area = partial(gr.Code, interactive=False, wrap_lines=True, show_line_numbers=False)


def watch_run(runs: PhotoRuns, seen: Any) -> list[Any]:
    """What there is to see of the newest run; nothing where it is what was `seen` before."""
    run = runs.newest
    if run is None or (now := run.progress()) == seen:
        return [gr.skip()] * 7
    bar = f"<progress style='width: 100%' max={run.steps} value={now.step}></progress>"
    plot = pd.DataFrame(dict(zip(("step", "loss"), now.losses))) if now.step else None
    files = [] if now.is_running else sorted(map(str, run.folder.glob("*.safetensors")))
    made = gr.update(value=files, visible=bool(files))
    return [now, now.sentence, bar, now.images and str(now.images), plot, now.output, made]


def draw(runs: PhotoRuns, prompt: str, negative: str, *form: Any) -> tuple[list[str], str]:
    """(images, what was said)."""
    count, seed, steps, guidance, axis, start, stop, by, *rows = form
    paths: list[str] = []

    def run() -> None:
        runs.check_idle()
        if TAG.search(prompt) or not prompt.strip():
            raise UserError("write a prompt, without <lora: ...> tags: the lists have the files")
        loras = tuple(f"{path}:{weight:g}" for path, weight in pick_loras(runs.folder, rows))
        grid = () if axis == GRIDS[0] else (f"{axis}={start:g}:{stop:g}:{by:g}",)
        out = runs.folder / "drawn.web" / time.strftime("%Y%m%d_%H%M%S.png")
        request = Infer(
            model=runs.model, lora=loras, prompt=prompt, negative=negative, out=str(out), grid=grid,
            count=1 if grid else count, seed=seed, steps=steps, guidance=guidance,
        )  # fmt: skip
        paths.extend(map(str, infer(request)))

    said = printed_by(run)
    torch.cuda.empty_cache()  # for the next run, which is another process
    return paths, said


def merge(runs: PhotoRuns, name: str, rank: int, *rows: Any) -> tuple[list[str], str]:
    """(files of the sum, the table of errors that merge.py mix prints)."""
    paths: list[str] = []

    def run() -> None:
        out = runs.folder / MERGED / check_name(name) / f"{name}.safetensors"
        files = [WeightedFile(weight, path) for path, weight in pick_loras(runs.folder, rows)]
        keep, model = KeepOptions(rank=rank or None), AdapterFileOptions(model=runs.model)
        run_mix(Mix(render_sum(files), str(out), keep=keep, files=model))
        paths.extend(sorted(map(str, out.parent.iterdir())))

    said = printed_by(run)
    return paths, said


def train_tab(runs: PhotoRuns) -> None:
    """Photos and settings on the left, the run on the right."""
    config = runs.read_preset(next(iter(runs.presets)))
    with gr.Column():
        gr.Markdown("Add 5 to 20 photos of one thing. In the captions, TOK stands for that thing.")
        photos = gr.Gallery(show_label=False, columns=5, height=150, type="filepath", buttons=[])
        captions = gr.Dataframe(headers=["Photo", "Caption"], column_widths=["25%", "75%"],
                                static_columns=[0], type="array", buttons=[])  # fmt: skip
        with gr.Row():
            name = gr.Textbox("mine", label="Name of the run")
            preset = gr.Dropdown(list(runs.presets), label="Preset")
            side = gr.Number(config.data.resolution, label="Resolution (pixels)", precision=0)
        with gr.Row():
            steps = gr.Number(config.steps, label="Steps", precision=0)
            every = gr.Number(config.steps // 6, label="Samples every N steps", precision=0)
            again = gr.Checkbox(label="Replace a run of this name")
        prompts = gr.Textbox(PROMPTS, label="Prompts of the samples", lines=3)
        with gr.Row():
            train = gr.Button("Train", variant="primary")
            stop = gr.Button("Stop", variant="stop")
            resume = gr.Button("Resume")
    with gr.Column():
        said = gr.Textbox("there is no run yet", label="Progress", lines=2, interactive=False)
        bar = gr.HTML()
        images = gr.Image(show_label=False, interactive=False, buttons=["download", "fullscreen"])
        loss = gr.LinePlot(x="step", y="loss", title="Loss, mean of 20 steps", height=200)
        made = gr.File(label="LoRA files", visible=False, interactive=False)
        with gr.Accordion("What train.py printed", open=False):
            output = text_area(show_label=False, max_lines=20)
    form = [photos, captions, name, preset, steps, every, side, prompts, again]
    photos.change(caption_table, [photos, captions], captions)
    preset.change(lambda name: [n := runs.read_preset(name).steps, n // 6], preset, [steps, every])
    train.click(lambda *form: printed_by(lambda: runs.start(PhotoRun(*form))), form, said)
    stop.click(runs.stop)
    resume.click(lambda name: printed_by(partial(runs.resume, name)), name, said)
    shown = [gr.State(), said, bar, images, loss, output, made]
    gr.Timer(1).tick(partial(watch_run, runs), shown[0], shown, show_progress="hidden")


def lora_rows(runs: PhotoRuns, tab: gr.Tab, label: str, value: float) -> list[Any]:
    """Three lists of LoRAs, each with a slider, and a button to upload one more."""
    rows: list[Any] = []
    for number in (1, 2, 3):
        with gr.Row():
            rows.append(gr.Dropdown([""], label=f"LoRA {number}", scale=2))
            rows.append(gr.Slider(-2, 2, value, step=0.05, label=label, scale=3))
    upload = gr.UploadButton("Upload a LoRA file", file_types=[".safetensors", ".pt"], size="sm")
    said = gr.Markdown()

    def keep(file: str | None = None) -> list[Any]:
        text = printed_by(lambda: file and print(keep_upload(runs.folder, Path(file))))
        return [text, *[gr.update(choices=["", *find_loras(runs.folder)])] * 3]

    upload.upload(keep, upload, [said, *rows[::2]])
    tab.select(keep, None, [said, *rows[::2]])
    return rows


def draw_tab(runs: PhotoRuns, tab: gr.Tab) -> None:
    """A prompt, LoRAs and a grid on the left, images on the right."""
    with gr.Column():
        prompt = gr.Textbox(CAPTION, label="Prompt", lines=2)
        negative = gr.Textbox(label="Negative prompt (what the images should not show)")
        rows = lora_rows(runs, tab, "Strength", 1)
        form: list[Any] = [prompt, negative]
        with gr.Row():
            for label, number in {"Images, if no grid": 4, "Seed": 0, "Steps": 25}.items():
                form.append(gr.Number(number, label=label, precision=0, min_width=80))
            form.append(gr.Number(4, label="Guidance", min_width=80))
        with gr.Row():
            form.append(gr.Dropdown(list(GRIDS), label="Grid over", min_width=80))
            for label, value in {"From": 0, "To": 1.2, "In steps of": 0.3}.items():
                form.append(gr.Number(value, label=label, min_width=80))
        go = gr.Button("Draw", variant="primary")
    with gr.Column():
        images = gr.Gallery(show_label=False, columns=2, height=610, object_fit="contain",
                            interactive=False, buttons=["download", "fullscreen"])  # fmt: skip
        said = gr.Textbox(label="Notes", lines=2)
    go.click(partial(draw, runs), [*form, *rows], [images, said])


def merge_tab(runs: PhotoRuns, tab: gr.Tab) -> None:
    """LoRAs with weights on the left, their sum and its error on the right."""
    with gr.Column():
        rows = lora_rows(runs, tab, "Weight", 0.5)
        name = gr.Textbox("sum", label="Name of the sum")
        rank = gr.Slider(0, 128, 0, step=1, label="Rank of the sum (0: exact)")
        go = gr.Button("Merge", variant="primary")
    with gr.Column():
        said = text_area(label="Error of the sum", lines=14)
        made = gr.File(label="Files of the sum", interactive=False)
    go.click(partial(merge, runs), [name, rank, *rows], [made, said])


def main(model: str = TOY, runs: str = "runs", port: int = 7860, share: bool = False) -> None:
    """Train, draw and merge LoRAs on a page that only this computer can open.

    Args:
        model: the base model, a folder or hub id in the diffusers layout, or a single file
        runs: folder of the runs; the page reads LoRA files there, and writes nowhere else
        port: port of the page, http://127.0.0.1:PORT
        share: also open a public address; whoever knows it can use this computer's GPU
    """
    more = {"toy": Path("configs/toy_pti.toml")} if model == TOY else {}
    photo_runs = PhotoRuns(model, Path(runs), more)
    with gr.Blocks(title="lora_core", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# LoRA: train, draw, merge\nBase model: {model}")
        with gr.Tab("Train"), gr.Row():
            train_tab(photo_runs)
        with gr.Tab("Draw") as tab, gr.Row():
            draw_tab(photo_runs, tab)
        with gr.Tab("Merge") as tab, gr.Row():
            merge_tab(photo_runs, tab)
    page.launch(
        server_name="127.0.0.1", server_port=port, share=share, allowed_paths=[runs],
        theme=gr.themes.Default(primary_hue="green", font=["sans-serif"], font_mono=["monospace"]),
        run_history=False, footer_links=[],
    )  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
