"""A folder with a valid file of every kind that the commands read, and the commands that read it.

Small enough that a command on it takes milliseconds. A run of two steps is trained for its logs and
its checkpoint.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import infer
import merge
import train
from lora_core import formats
from lora_core.config import (
    AdapterConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    SamplesConfig,
    Stage,
    ValidationConfig,
)
from lora_core.runs.image_recipe import save_with_recipe
from lora_core.toml import to_toml
from tests.conftest import save_photos, save_pipeline
from tests.merge_commands import save_loras

OUT = "out"  # the folder that holds every output
PROGRAMS = {
    "merge": merge.main,
    "lora_add": merge.lora_add,
    "infer": infer.main,
    "train": train.main,
}
ADAPTER = (  # commands on one adapter file
    "merge info {} --model model",
    "merge info {}",
    "merge convert {} {out}.safetensors --to kohya --model model",
    "merge convert {} {out}.safetensors --to diffusers",
    "merge resize {} {out}.safetensors --rank 1 --model model",
    "merge mix 0.5*{}+0.5*a.safetensors --out {out}.safetensors --model model",
    "merge diff {} a.safetensors --model model",
    "merge fold model {} {out}",
    "merge fold model 0.5*{} {out}.safetensors",
    "lora_add {} a.safetensors {out}.safetensors 0.5",
    "infer --model model --lora {} --prompt TOK --out {out}.png --width 16 --height 16 --steps 1",
)
MODEL = (  # commands on a whole model
    "merge mix 0.5*{}+0.5*model --out {out}",
    "merge convert {} {out}.safetensors",
    "merge convert {} {out}",
    "merge fold {} a.safetensors {out}",
    "merge distill {} model {out}.safetensors --rank 1",
    "merge explain {} model a.safetensors",
    "merge info {}",
    "lora_add {} a.safetensors {out} 0.5 --mode upl",
    "infer --model {} --prompt a --out {out}.png --width 16 --height 16 --steps 1",
    "train --model {} --data.images photos --data.resolution 16 --adapter.rank 2 "
    "--stages.0.steps 1 --validation.every -1 --out {out}",
    "train --model {} --data.images photos --data.resolution 16 --out {out} --preview-density",
)
SINGLE = (
    "merge convert {} {out}.safetensors --model-config model",
    "merge fold {} a.safetensors {out}.safetensors --model-config model",
    "merge distill {} model {out}.safetensors --rank 1 --model-config model",
    "merge mix 0.5*{}+0.5*{} --out {out}.ckpt --model-config model",
    "merge info {}",
    "infer --model {} --model-config model --prompt a --out {out}.png --width 16 --height 16 "
    "--steps 1",
)
REDO = ("merge redo {} --out {out}.safetensors", "merge redo {} --dry-run", "merge info {}")
RESUME = ("train {run}/config.toml --resume", "train --compare {run} runs/other")
TRAIN = "train --model model --data.images {data} --data.resolution 16 --adapter.rank 2 "
ONE_STEP = "--stages.0.steps 1 --batch-size 1 --validation.every -1 --out {out}"
DATA = (
    TRAIN + ONE_STEP,
    f"{TRAIN} --data.captions metadata {ONE_STEP}",
    f"{TRAIN} --data.captions txt --data.caption a {ONE_STEP}",
    f"{TRAIN} --data.masks file {ONE_STEP}",
)
RECIPE = (
    "infer --from {} --out {out}.png",
    "infer --model model --prompt a --init-image {} --width 16 --height 16 --strength 0.5 "
    "--out {out}.png",
)
TOML = ("train {} --preview-density --out {out}", "train {} --resume --out {out}")
TOKENS = (
    "merge info {}",
    "merge info {} --model model",
    "merge convert {} {out}.safetensors --to embeddings --model model",
    "merge convert {} {out}.pt --to a1111 --model model",
    "merge mix 0.5*{} --out {out}.safetensors --model model",
    "infer --model model --lora {} --prompt a --out {out}.png --width 16 --height 16 --steps 1",
    "merge fold model {} {out}",
)
COMMANDS = {  # kind of file -> the commands that read it
    "adapter": ADAPTER,
    "tokens": TOKENS,
    "pickle": (*ADAPTER, *TOKENS),
    "recipe": REDO,
    "model": MODEL,
    "single file": SINGLE,
    "run": RESUME,
    "run's adapter": (ADAPTER[0], ADAPTER[-1]),
    "data": DATA,
    "image": RECIPE,
    "config": TOML,
    "prompts": (
        "infer --model model --prompts {} --out {out}.png --width 16 --height 16 --steps 1",
    ),
    "sidecar": ("merge redo {folder} --out {out}", "merge info {folder}"),
}


@dataclass(frozen=True)
class Target:
    """A file that a command reads."""

    kind: str  # a key of COMMANDS
    path: Path  # in the workspace
    given: Path  # what the command names: the file, or the model or run around it


def make_config(folder: Path, out: str) -> Config:
    """Two steps of the tiny model, a validation at both ends, and a token."""
    return Config(
        model="model",
        out=out,
        device="cpu",
        batch_size=2,
        log_every=1,
        adapter=AdapterConfig(rank=2, targets=("*to_q",)),
        data=DataConfig(images="photos", resolution=16),
        optimizer=OptimizerConfig(lr={"denoiser": 1e-2}),
        stages=(Stage(steps=2),),
        samples=SamplesConfig(steps=1, guidance=1.0, prompts=("a TOK",)),
        validation=ValidationConfig(bins=1),
    )


def build_workspace(folder: Path, layout: formats.Layout) -> list[Target]:
    """Writes the files below the current folder, which is `folder`, and lists the targets."""
    save_pipeline(folder / "model")
    shutil.copytree(folder / "model", folder / "broken")
    weights = folder / "broken/unet/diffusion_pytorch_model.safetensors"
    save_file({key: 1.1 * t for key, t in load_file(weights).items()}, weights)
    save_photos(folder / "photos", side=16)
    states = save_loras(folder, layout)
    _save_pickles(folder)
    _save_token_files(folder, states, layout)
    _save_foreign_formats(folder)
    _save_runs(folder)
    _save_data(folder)
    _save_recipes(folder)
    return sorted(list_targets(folder), key=lambda target: (target.kind, str(target.path)))


def list_targets(folder: Path) -> Iterator[Target]:
    groups = {
        "adapter": "*.safetensors",
        "pickle": "pickles/*",
        "tokens": "tokens/*",
        "image": "images/*",
        "config": "configs/*",
        "prompts": "prompts.txt",
        "recipe": "recipes/*.safetensors",
        "single file": "single/*",
    }
    for kind, pattern in groups.items():
        for path in sorted(folder.glob(pattern)):
            yield Target(kind, path, path)
    for path in sorted((folder / "broken").rglob("*")):
        if path.is_file():
            yield Target("model", path, folder / "broken")
    for path in sorted((folder / "runs/done").rglob("*")):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".b2"):
            yield Target("run", path, folder / "runs/done")
        elif path.is_file() and path.suffix == ".safetensors":
            kind = "run" if path.name == "state.safetensors" else "run's adapter"
            yield Target(kind, path, folder / "runs/done" if kind == "run" else path)
    yield Target("config", folder / "runs/done/config.toml", folder / "runs/done/config.toml")
    for path in sorted((folder / "data").rglob("*")):
        if path.is_file():
            yield Target("data", path, folder / "data")
    yield Target("sidecar", folder / "mixed/lora_core_merge.json", folder / "mixed")


def _save_pickles(folder: Path) -> None:
    (folder / "pickles").mkdir()
    native = load_file(folder / "a.safetensors")
    torch.save(native, folder / "pickles/native.bin")
    torch.save(native, folder / "pickles/older.bin", _use_new_zipfile_serialization=False)
    torch.save(native, folder / "pickles/zipped.ckpt")
    torch.save({"state_dict": native, "epoch": 3}, folder / "pickles/nested.pt")
    torch.save({"params": {"unet": {}, "new_concept_embedding": {}}}, folder / "pickles/params.pt")


def _save_token_files(folder: Path, states: dict, layout: formats.Layout) -> None:
    (folder / "tokens").mkdir()
    rows = torch.randn(2, 16)
    save_file({"emb_params": rows}, folder / "tokens/a1111.safetensors")
    save_file({"clip_l": rows}, folder / "tokens/pair.safetensors")
    formats.save(
        states["a"], folder / "tokens/ours.safetensors", format="embeddings", layout=layout
    )
    a1111 = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": rows},
        "name": "dog",
        "step": 1,
    }
    torch.save(a1111, folder / "tokens/a1111.pt")
    torch.save({"<dog>": rows[0]}, folder / "tokens/learned_embeds.bin")
    torch.save({"clip_l": rows}, folder / "tokens/pair.pti", _use_new_zipfile_serialization=False)


def _save_foreign_formats(folder: Path) -> None:
    native = load_file(folder / "a.safetensors")
    layers = {key: tensor for key, tensor in native.items() if key.startswith("unet.")}
    comfy = {key.replace("unet.", "diffusion_model.", 1): t for key, t in layers.items()}
    save_file(comfy, folder / "comfy.safetensors")
    peft = {key.replace("unet.", "base_model.model.", 1): t for key, t in layers.items()}
    save_file(peft, folder / "peft.safetensors")
    recorded = {"unet.r": 2, "unet.lora_alpha": 1, "unet.rank_pattern": {"to_q": 2}}
    header = {"lora_adapter_metadata": json.dumps(recorded)}
    save_file(native, folder / "recorded.safetensors", header)
    kohya = load_file(folder / "b.safetensors")
    arguments = {"ss_network_args": json.dumps({"wd_on_output": "False"})}
    first = next(key for key in kohya if key.endswith("attn1_to_q.lora_down.weight"))
    stem = first.removesuffix(".lora_down.weight")
    size = kohya[first].shape[1]
    lycoris = {
        f"{stem}.hada_w{i}_{x}": torch.randn(*(size, 2)[:: 1 if x == "a" else -1])
        for i, x in (("1", "a"), ("1", "b"), ("2", "a"), ("2", "b"))
    }
    save_file(lycoris, folder / "lycoris.safetensors", arguments)


def _save_runs(folder: Path) -> None:
    for name in ("done", "other"):
        config = make_config(folder, f"runs/{name}")
        train.train(config)


def _save_data(folder: Path) -> None:
    data = save_photos(folder / "data", side=16, count=4)
    (data / "3.txt").unlink()
    (data / "3.json").write_text(json.dumps({"text": "a photo of TOK"}))
    rows = [{"file_name": f"{i}.png", "text": f"a photo {i} of TOK"} for i in range(4)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _save_recipes(folder: Path) -> None:
    (folder / "images").mkdir()
    asked = infer.Infer(
        model="model", prompt="a TOK", lora=("a.safetensors:0.5",), steps=1, width=16, height=16
    )
    save_with_recipe(Image.new("RGB", (16, 16)), folder / "images/made.png", asked)
    Image.new("RGB", (16, 16), "red").save(folder / "images/plain.jpg")
    (folder / "configs").mkdir()
    (folder / "configs/run.toml").write_text(to_toml(make_config(folder, "out/run")))
    (folder / "prompts.txt").write_text("a photo\nanother\n")
    (folder / "recipes").mkdir()
    (folder / "single").mkdir()
    for words in (
        "mix 0.5*a.safetensors+0.5*b.safetensors --out recipes/mixed.safetensors --model model",
        "resize a.safetensors recipes/small.safetensors --rank 1 --model model",
        "convert model single/model.safetensors",
        "convert model single/model.ckpt",
        "mix 0.5*model+0.5*broken --out mixed",
    ):
        if merge.main(words.split()):
            print("workspace:", words)
