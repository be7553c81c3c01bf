"""The model card: metadata that the hub's library reads, code that runs as it is written, the
upload.
"""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import RepoCard
from PIL import Image

import infer
from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats import embeddings, layout_of, save_run
from lora_core.runs import card as cards
from lora_core.runs.card import ModelCard, push_to_hub, write_card
from models import read_layout
from tests.layered_files import save_deep_folder

TOKENS = {"TOK": ("<s0>", "<s1>")}


def code(text: str) -> str:
    """The fenced python of a card; there is one."""
    (found,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return found


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def factors(layout, component: str, glob: str = "to_q", count: int = 3) -> dict[str, LowRank]:
    noise = torch.Generator().manual_seed(0)
    paths = [
        (path, shape) for path, shape in layout.components[component].shapes.items() if glob in path
    ][:count]
    return {
        path: LowRank(
            torch.randn(2, i, generator=noise), torch.randn(o, 2, generator=noise), 1.0, None
        )
        for path, (o, i) in paths
    }


def leave(
    folder: Path,
    layout,
    *,
    lora: bool = True,
    rows: dict[str, int] | None = None,
    denoiser: str = "unet",
) -> Path:
    """A run folder with a LoRA on a few layers, two token rows for each encoder in `rows` (key ->
    width), and images.
    """
    folder.mkdir(parents=True)
    state = AdapterState(
        {denoiser: factors(layout, denoiser)} if lora else {},
        {key: torch.full((2, width), 0.1) for key, width in (rows or {}).items()},
        TOKENS["TOK"] if rows else (),
    )
    save_run(state, folder, layout=layout)
    for name in ("samples/step_000005.png", "samples/step_000010.png", "before_after.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / name)
    return folder


def run_code(card: Path, monkeypatch: pytest.MonkeyPatch) -> Image.Image:
    """Executes the card's python where the card is; the picture that it saves."""
    monkeypatch.chdir(card.parent)
    exec(compile(code(card.read_text()), str(card), "exec"), {})
    return Image.open(card.parent / "image.png")


@pytest.fixture
def card(model: Path) -> ModelCard:
    return ModelCard(
        base_model=str(model),
        pipeline="StableDiffusionPipeline",
        encoders={"text_encoder": "clip_l"},
        words=TOKENS,
        prompts=("a TOK in the snow", "b"),
        instance_prompt='a photo of TOK: "x" # y',
        tags=("template:sd-lora",),
        sampling={"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16},
        training={"steps": 10, "groups": "denoiser | tokens"},
        validation=[("62", 0.5, 0.25), ("all", 0.4, 0.3)],
    )


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    return leave(tmp_path / "my run", read_layout(str(model)), rows={"clip_l": 16})


def test_repo_card_reads_it(card: ModelCard, run: Path) -> None:
    path = write_card(card, run)
    assert path == run / "README.md"
    for kind in (RepoCard, huggingface_hub.ModelCard):
        data = kind.load(path).data.to_dict()
        assert (
            data["base_model"] == card.base_model
            and data["library_name"] == "diffusers"
            and "license" not in data
        )
        assert (
            data["instance_prompt"] == 'a photo of <s0><s1>: "x" # y'
        )  # quoted: a colon, quotes and a # are YAML's own
        assert {
            "text-to-image",
            "lora",
            "textual-inversion",
            "diffusers",
            "template:sd-lora",
        } <= set(data["tags"])
        assert [w["output"]["url"] for w in data["widget"]] == [
            "samples/step_000010.png",
            "before_after.png",
        ]
        assert all(
            (run / w["output"]["url"]).is_file() and w["text"] == "a <s0><s1> in the snow"
            for w in data["widget"]
        )


def test_body_says_how_it_was_made(card: ModelCard, run: Path) -> None:
    text = write_card(card, run).read_text()
    assert "| `TOK` | `<s0><s1>` |" in section(text, "Trigger words")
    training = section(text, "Training")
    assert "| steps | 10 |" in training and "| groups | denoiser \\| tokens |" in training
    assert (
        "| 62 | 0.50000 | 0.25000 | -50.0% |" in training
        and "| all | 0.40000 | 0.30000 | -25.0% |" in training
    )
    assert "![my run](before_after.png)" in text


def test_python_runs_and_the_files_matter(
    card: ModelCard, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    with_lora = run_code(write_card(card, run), monkeypatch)
    assert with_lora.size == (16, 16)
    assert "load_lora_weights" in code((run / "README.md").read_text())
    bare = shutil.copytree(
        run, run.parent / "bare", ignore=shutil.ignore_patterns("pytorch_lora*", "*_emb*")
    )
    torch.manual_seed(0)
    without = run_code(write_card(replace(card, words={}), bare), monkeypatch)
    assert "load" not in code((bare / "README.md").read_text())
    assert with_lora.tobytes() != without.tobytes()


def test_a_relative_model_is_found_from_the_runs_folder(
    card: ModelCard, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The python runs in the run's folder, the command in the one that it was trained in."""
    work = tmp_path / "work"
    work.mkdir()
    run = leave(work / "runs" / "anna", read_layout(str(model)), rows={"clip_l": 16})
    (run / "config.toml").touch()
    shutil.copytree(model, work / "toy")
    monkeypatch.chdir(work)
    text = write_card(replace(card, base_model="toy"), run).read_text()
    assert 'from_pretrained("../../toy")' in text and 'folder = "."' in text
    assert "`python train.py runs/anna/config.toml --out runs/anna2` repeats it" in text
    assert str(tmp_path) not in text
    assert run_code(run / "README.md", monkeypatch).size == (16, 16)


def test_a_run_far_from_the_current_folder_names_no_folders(card: ModelCard, run: Path) -> None:
    (run / "config.toml").touch()
    text = write_card(replace(card, base_model="toy/model"), run).read_text()
    assert "train.py FOLDER/config.toml --out FOLDER2` repeats it, where FOLDER is this" in text
    assert 'from_pretrained("toy/model")' in text and str(run.parent) not in text


def test_only_tokens(
    card: ModelCard, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = leave(tmp_path / "words", read_layout(str(model)), lora=False, rows={"clip_l": 16})
    text = write_card(card, run).read_text()
    assert (
        "load_lora_weights" not in text
        and "<lora:" not in text
        and "models/Lora" not in text
        and "- lora\n" not in text
    )
    assert "prompt `a words_emb in the snow`" in section(text, "A1111")
    assert run_code(run / "README.md", monkeypatch).size == (16, 16)


def test_only_lora(card: ModelCard, model: Path, tmp_path: Path) -> None:
    run = leave(tmp_path / "plain", read_layout(str(model)))
    text = write_card(
        replace(card, words={}, prompts=("a photo of sks dog",), instance_prompt=""), run
    ).read_text()
    assert "textual" not in text and "embedding" not in text and "load_file" not in text
    assert "prompt `a photo of sks dog <lora:plain:1>`" in section(
        text, "A1111"
    ) and "`a photo of sks dog`" in section(text, "Trigger")


def test_whole_model(
    card: ModelCard, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = leave(tmp_path / "full", read_layout(str(model)), lora=False)
    shutil.copytree(model, run / "model")
    card = replace(card, words={}, base_model="nowhere/at-all")
    text = write_card(card, run).read_text()
    assert 'from_pretrained(f"{folder}/model")' in text and "ComfyUI" not in text
    assert run_code(run / "README.md", monkeypatch).size == (16, 16)


def test_without_pictures_prompts_or_numbers(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    text = write_card(
        ModelCard(base_model=str(model), pipeline="StableDiffusionPipeline"), folder
    ).read_text()
    data = RepoCard.load(folder / "README.md").data.to_dict()
    assert (
        "widget" not in data
        and "instance_prompt" not in data
        and "![" not in text
        and "## Training" not in text
    )


def test_a1111_and_comfyui_are_told_the_files_that_are_there(card: ModelCard, run: Path) -> None:
    text = write_card(card, run).read_text()
    for title, prompt in {
        "A1111": "a my run_emb in the snow <lora:my run:1>",
        "ComfyUI": "a embedding:my run_emb in the snow",
    }.items():
        part = section(text, title)
        assert prompt in part
        assert all((run / name).is_file() for name in re.findall(r"`([^`]*\.safetensors)`", part))
    assert "apart" not in text
    two = write_card(replace(card, words={"TOK": ("<s0>",), "TOK2": ("<s1>",)}), run).read_text()
    assert "cannot tell TOK, TOK2 apart" in two and "| `TOK2` | `<s1>` |" in two


def test_a_pipeline_without_a_loader_of_tokens_gets_one(card: ModelCard, run: Path) -> None:
    """tests/test_sd3.py runs this code."""
    text = write_card(replace(card, loads_tokens=False), run).read_text()
    assert "class TokenPipeline(TextualInversionLoaderMixin, StableDiffusionPipeline)" in text
    assert "pipe = TokenPipeline.from_pretrained(" in text
    (run / f"{run.name}_emb.safetensors").unlink()
    plain = write_card(replace(card, loads_tokens=False, words={}), run).read_text()
    assert "TokenPipeline" not in plain


def test_a1111_is_left_out_for_models_that_it_does_not_know(card: ModelCard, run: Path) -> None:
    words = {"TOK": ("<s0>",), "TOK2": ("<s1>",)}
    text = write_card(replace(card, a1111=False, words=words), run).read_text()
    assert "A1111" not in text and "It puts all tokens" in section(text, "ComfyUI")


def test_a_card_for_the_hub(card: ModelCard, run: Path) -> None:
    text = write_card(replace(card, repo="me/run"), run).read_text()
    assert 'snapshot_download("me/run")' in code(text)
    assert (
        "base_model" not in RepoCard.load(run / "README.md").data.to_dict()
    )  # a folder of this disk: the hub refuses such a card
    write_card(replace(card, repo="me/run", base_model="org/model"), run)
    assert RepoCard.load(run / "README.md").data.base_model == "org/model"


# ---------------------------------------------------------------- other families


@pytest.mark.parametrize(
    "module, pipeline, denoiser, encoders",
    [
        (
            "tiny_sdxl",
            "StableDiffusionXLPipeline",
            "unet",
            {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
        ),
        (
            "tiny_flux",
            "FluxPipeline",
            "transformer",
            {"text_encoder": "clip_l", "text_encoder_2": "t5"},
        ),
    ],
)
def test_python_runs_for_two_encoders(
    module: str,
    pipeline: str,
    denoiser: str,
    encoders: dict,
    card: ModelCard,
    tmp_path: Path,
    monkeypatch,
) -> None:
    import importlib

    import diffusers

    tiny = importlib.import_module(f"tests.{module}")
    model = tmp_path / "model"
    tiny.save(model)
    pipe = getattr(diffusers, pipeline).from_pretrained(model)
    layout = layout_of(
        {name: getattr(pipe, name) for name in (denoiser, *encoders)}, encoders=encoders
    )
    widths = {
        key: getattr(pipe, name).get_input_embeddings().weight.shape[1]
        for name, key in encoders.items()
    }
    run = leave(tmp_path / "two", layout, rows=widths, denoiser=denoiser)
    card = replace(card, base_model=str(model), pipeline=pipeline, encoders=encoders)
    text = write_card(card, run).read_text()
    for name, key in encoders.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        assert f'rows["{key}"]' in text
        assert f"text_encoder=pipe.{name}, tokenizer=pipe.{tokenizer})" in text
    assert run_code(run / "README.md", monkeypatch).size == (16, 16)


# ---------------------------------------------------------------- upload


def test_push_makes_the_repository_and_leaves_checkpoints_here(
    card: ModelCard, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Api:
        def create_repo(self, repo_id, **settings):
            calls.append(("create", repo_id, settings))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, **settings):
            calls.append(("upload", settings))

    monkeypatch.setattr(cards, "HfApi", Api)
    write_card(card, run)
    for name in ("checkpoints/10/state.safetensors", "class_images/0.png", "latents/a.safetensors"):
        (run / name).parent.mkdir(parents=True)
        (run / name).touch()
    assert (
        push_to_hub(run, "me/run", ignore=(*cards.IGNORED, "latents/*"))
        == "https://huggingface.co/me/run"
    )
    (_, repo, made), (_, sent) = calls
    assert (
        repo == "me/run"
        and made["exist_ok"]
        and sent["repo_id"] == "me/run"
        and Path(sent["folder_path"]) == run
    )
    files = [p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()]
    sent_files = set(
        huggingface_hub.utils.filter_repo_objects(files, ignore_patterns=sent["ignore_patterns"])
    )
    assert {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "before_after.png",
        "samples/step_000010.png",
    } <= sent_files
    assert not [
        name for name in sent_files if name.startswith(("checkpoints", "class_images", "latents"))
    ]


def test_a_refused_push_is_one_sentence(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self, *_, **__):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nand more lines")

    monkeypatch.setattr(cards.HfApi, "create_repo", refuse)
    with pytest.raises(
        UserError, match=r"not uploaded to me/run: Token is required; fix that"
    ) as caught:
        push_to_hub(run, "me/run")
    assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match="not uploaded to a/b/c"
    ):  # the client's own check of the id
        monkeypatch.undo()
        push_to_hub(run, "a/b/c")


def test_a_dora_says_what_a1111_and_comfyui_make_of_it(
    card: ModelCard, run: Path, model: Path
) -> None:
    """In its own numbers where they are known, else in measured ones; a LoRA says nothing."""
    title = "DoRA in A1111 and ComfyUI"
    assert title not in write_card(card, run).read_text()
    state = AdapterState({"unet": factors(read_layout(str(model)), "unet")})
    for path, lr in state.components["unet"].items():
        state.components["unet"][path] = lr._replace(magnitude=torch.ones(len(lr.up)))
    save_run(state, run, layout=read_layout(str(model)))
    measured = section(write_card(card, run).read_text(), title)
    assert "187 to 543 % in A1111 and 10 to 12 % in ComfyUI" in measured
    command = "pytorch_lora_weights.safetensors' lora.safetensors --as lora --to kohya"
    assert f"{command} --model {model}" in measured
    own = replace(card, dora_errors={"A1111": 5.26, "ComfyUI": 0.108})
    text = section(write_card(own, run).read_text(), title)
    assert "of this one the update is wrong by 526 % in A1111 and 10.8 % in ComfyUI" in text


@pytest.mark.parametrize("whole_model", [False, True])
def test_words_for_layers_are_drawn_by_our_own_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_model: bool
) -> None:
    """The code of the card runs; nothing in it promises that other tools read such words."""
    folder = save_deep_folder(tmp_path)
    run = folder / "run"
    words = embeddings.placeholder_words(formats.load(run))
    if whole_model:  # as runs of other adapters than LoRA leave it, in their folder
        shutil.copytree(folder / "model", run / "model")
        (run / "pytorch_lora_weights.safetensors").rename(run / "run_adapter.safetensors")
        (run / "run.safetensors").unlink(missing_ok=True)
    card = ModelCard(
        base_model=str(folder / "model"),
        pipeline="StableDiffusionPipeline",
        encoders={"text_encoder": "clip_l"},
        words=words,
        layers={"<dog>": 16, "TOK": 16},
        prompts=('a <dog> "b" TOK cat',),
        sampling={"num_inference_steps": 2, "height": 32, "width": 32},
    )
    text = write_card(card, run).read_text()
    assert "| `<dog>` | `<s0><s1> to <s30><s31>, by layer` |" in text
    assert "| `cat` | `<s48>` |" in text
    assert "diffusers, A1111 and ComfyUI cannot read such words" in text
    assert "load_textual_inversion" not in text
    assert not re.search(r"^## (A1111|ComfyUI|diffusers)$", text, re.MULTILINE)
    assert run_code(run / "README.md", monkeypatch).size == (32, 32)
    (line,) = re.findall(r"```bash\npython infer\.py (.*)\n```", text)
    monkeypatch.chdir(folder)
    options = [*shlex.split(line), "--steps", "2"]
    assert options[options.index("--prompt") + 1] == 'a <dog> "b" TOK cat'
    assert infer.main(options) == 0
    assert RepoCard.load(run / "README.md").data.to_dict()["instance_prompt"].startswith("a <dog>")


def test_the_hubs_parser_finds_license_pipeline_and_description(card: ModelCard, run: Path) -> None:
    own = replace(
        card,
        license="CreativeML OpenRAIL-M",
        description="A cat.",
        tags=("pet", "lora"),
        repo="a/b",
    )
    loaded = huggingface_hub.ModelCard.load(write_card(replace(own, base_model="org/base"), run))
    data = loaded.data.to_dict()
    assert data["license"] == "creativeml-openrail-m" and "license_name" not in data
    assert data["pipeline_tag"] == "text-to-image" and data["base_model"] == "org/base"
    assert data["tags"].count("lora") == 1 and "pet" in data["tags"]
    assert "\n\nA cat.\n" in loaded.text
    other = huggingface_hub.ModelCard.load(write_card(replace(own, license="Mine only"), run))
    assert (other.data.license, other.data.license_name) == ("other", "mine-only")
