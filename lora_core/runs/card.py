"""The README.md of a run folder: a model card that huggingface_hub reads, with lines of code that load the files beside it; and its upload."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData
from safetensors import safe_open

from lora_core.adapters.custom_files import CUSTOM_ADAPTER_ENDING
from lora_core.errors import UserError, printable
from lora_core.formats import EMBEDDINGS, NATIVE
from lora_core.runs.run_folder import atomic_write
from lora_core.tokens import Placeholder, bind_placeholders

IGNORED = ("checkpoints/*", "class_images/*", "*.tmp*", ".*")  # what `push` leaves on this disk
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TEXT, TOKENIZER = "text_encoder", "tokenizer"  # text_encoder_2 reads what tokenizer_2 writes


@dataclass(frozen=True)
class ModelCard:
    """What a card says that is not to be seen in the folder. Prompts have the placeholder words, not the tokens."""

    base_model: str  # folder or hub id
    pipeline: str  # diffusers' class for the base model
    encoders: Mapping[str, str] = field(default_factory=dict)  # text encoder's attribute of the pipeline -> key of its token rows
    ends: Mapping[str, int] = field(default_factory=dict)  # text encoders whose config hides the id of the end of a text -> that id
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)  # placeholder word -> its tokens, in the order of the rows
    prompts: Sequence[str] = ()  # the first one is the example
    instance_prompt: str = ""  # the caption that stands for the training images; empty: the first prompt
    tags: Sequence[str] = ()  # beside text-to-image, diffusers and what the folder holds
    sampling: Mapping[str, float] = field(default_factory=dict)  # keyword arguments of the pipeline's call
    training: Mapping[str, object] = field(default_factory=dict)  # how it was trained: name -> value, rows of a table
    validation: Sequence[tuple[str, float, float]] = ()  # (timestep, loss before, loss after)
    scored: str = "loss"  # what that loss is: held-out, on the training images
    repo: str = ""  # hub repository that the card is for; empty: this disk
    rerun: str = ""  # why config.toml alone does not repeat the run; empty: it does


def write_card(card: ModelCard, folder: str | Path) -> Path:
    """The README.md now in a finished run folder. It speaks of the files that are there: LoRA, token rows, a whole model in model/, pictures."""
    folder = Path(folder).resolve()
    parts = [_title(card, folder), _picture(folder), _words(card), _files(card, folder), _diffusers(card, folder), _elsewhere(card, folder)]
    body = "\n\n".join(part for part in [*parts, _trained(card)] if part)
    with atomic_write(folder / "README.md") as temporary:
        text = f"---\n{_front(card, folder).to_yaml()}\n---\n\n{body}\n"
        temporary.write_text(printable(text), encoding="utf-8")
    return folder / "README.md"


def check_push_target(repo_id: str) -> None:
    """Makes the hub repository where it is missing and asks whether this login may write to it. Raises UserError where it may not."""
    try:
        api = HfApi()
        api.create_repo(repo_id, repo_type="model", exist_ok=True)
        if hasattr(api, "auth_check"):
            api.auth_check(repo_id, write=True)
    except Exception as error:  # see `push`
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        cure = "log in (hf auth login), or leave it out and upload the folder later"
        raise UserError(f"--push-to-hub {repo_id} cannot be written to: {reason}; {cure}") from None


def push_to_hub(folder: str | Path, repo_id: str, *, ignore: Sequence[str] = IGNORED) -> str:
    """The address of the hub repository that now has the run's files; it is made where it does not exist.

    `ignore`: globs on paths relative to the folder. Raises UserError when the hub refuses or cannot be reached: the folder is as it was.
    """
    try:
        api = HfApi()
        url = api.create_repo(repo_id, repo_type="model", exist_ok=True)
        name = Path(folder).resolve().name
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), ignore_patterns=list(ignore), commit_message=f"Upload the run {name}")
    except Exception as error:  # the hub's client raises a dozen classes: no network, no token, no right, a bad id, a card it does not like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} is whole, but was not uploaded to {repo_id}: {reason}; mend that (hf auth login) and upload the folder") from None
    return str(url)


# ---------------------------------------------------------------- front matter


def _front(card: ModelCard, folder: Path) -> ModelCardData:
    """base_model is left out for the hub where it is a folder here, which the hub refuses."""
    local = Path(card.base_model).is_dir() or not HUB_ID.fullmatch(card.base_model)
    has = {"lora": (folder / NATIVE).is_file(), "textual-inversion": bool(_rows(folder))}
    tags = ["text-to-image", "diffusers", "diffusers-training", *(tag for tag, there in has.items() if there), *card.tags]
    example = _example(card)
    pictures = [{"text": example or "-", "output": {"url": picture}} for picture in _pictures(folder)]
    data = ModelCardData(base_model=None if local and card.repo else card.base_model, library_name="diffusers", tags=tags)
    if prompt := _bound(card, card.instance_prompt) or example:
        data["instance_prompt"] = prompt
    if pictures:
        data["widget"] = pictures
    return data


def _pictures(folder: Path) -> list[str]:
    """The newest sample sheet and before_after.png, as far as they are there."""
    sheets = sorted((folder / "samples").glob("*.png"))[-1:]
    return [path.relative_to(folder).as_posix() for path in (*sheets, folder / "before_after.png") if path.is_file()]


# ---------------------------------------------------------------- body


def _title(card: ModelCard, folder: Path) -> str:
    what = {
        f"a LoRA ({NATIVE})": (folder / NATIVE).is_file(),
        "learned tokens": bool(_rows(folder)),
        "a whole fine-tuned model (model/)": _whole(folder),
    }
    made = " and ".join(name for name, there in what.items() if there) or "no weights yet"
    return f"# {folder.name}\n\n{made[0].upper()}{made[1:]} for {_code(card.base_model)}, trained with lora_core."


def _picture(folder: Path) -> str:
    found = _pictures(folder)
    return f"![{folder.name}]({found[-1]})" if found else ""


def _words(card: ModelCard) -> str:
    """How to name in a prompt what was learned."""
    if not card.words:
        prompt = card.instance_prompt or _example(card)
        return f"## Trigger\n\nPrompt it as it was captioned: {_code(prompt)}." if prompt else ""
    rows = [f"| {_code(word)} | {_code(''.join(names))} |" for word, names in card.words.items()]
    return "\n".join(
        [
            "## Trigger words",
            "",
            "| in captions | in prompts, once the tokens are loaded |",
            "|---|---|",
            *rows,
            "",
            f"Example: {_code(_example(card))}.",
        ]
    )


def _files(card: ModelCard, folder: Path) -> str:
    kinds = {
        NATIVE: "LoRA under diffusers' names",
        f"{folder.name}.safetensors": "the same LoRA under kohya's names, for A1111 and ComfyUI",
        f"{folder.name}{EMBEDDINGS}": "rows of the learned tokens: " + ", ".join(_rows(folder)),
        f"{folder.name}{CUSTOM_ADAPTER_ENDING}": "the adapter's own parameters, which have no low-rank form: lora_core.adapters.custom_files.load_adapters reads them",
        "model": "the whole model, what was learned folded in, in the diffusers layout",
        "config.toml": card.rerun or "the run's settings: `python train.py config.toml` repeats it",
    }
    rows = [f"- [{name}]({name}): {what}" for name, what in kinds.items() if (folder / name).exists()]
    return "\n".join(["## Files", "", *rows]) if rows else ""


def _diffusers(card: ModelCard, folder: Path) -> str:
    """Lines that run as they are, in the folder or, for a card of the hub, anywhere."""
    rows, lora = _rows(folder), (folder / NATIVE).is_file()
    where = f"snapshot_download({json.dumps(card.repo)})" if card.repo else '"."  # where this file is'
    model = 'f"{folder}/model"' if _whole(folder) else json.dumps(card.base_model)
    lines = [f"from diffusers import {card.pipeline}"]
    lines += ["from huggingface_hub import snapshot_download"] if card.repo else []
    lines += ["from safetensors.torch import load_file"] if rows else []
    lines += ["", f"folder = {where}"] if lora or rows or _whole(folder) else [""]
    lines += [f'pipe = {card.pipeline}.from_pretrained({model})  # on a GPU: torch_dtype=torch.bfloat16, then pipe.to("cuda")']
    lines += [f'pipe.load_lora_weights(folder, weight_name="{NATIVE}")'] if lora else []
    if rows:
        lines.append(f'rows = load_file(f"{{folder}}/{folder.name}{EMBEDDINGS}")')
        lines += [_load_rows(card, component, key) for component, key in card.encoders.items() if key in rows]
        lines += [line for component, end in card.ends.items() for line in _mend_end(component, end)]
    arguments = "".join(f", {name}={value!r}" for name, value in card.sampling.items())
    lines += [f"image = pipe({json.dumps(_example(card), ensure_ascii=False)}{arguments}).images[0]", 'image.save("image.png")']
    return "\n".join(["## diffusers", "", "```python", *lines, "```"])


def _load_rows(card: ModelCard, component: str, key: str) -> str:
    """The line that gives one text encoder its rows of all tokens."""
    names = json.dumps([name for names in card.words.values() for name in names], ensure_ascii=False)
    tokenizer = component.replace(TEXT, TOKENIZER)
    return f'pipe.load_textual_inversion(rows["{key}"], token={names}, text_encoder=pipe.{component}, tokenizer=pipe.{tokenizer})'


def _mend_end(component: str, end: int) -> list[str]:
    """Lines for a config from before transformers #24773, which says eos_token_id 2: transformers then pools at the largest id, a learned token."""
    return [
        f"for part in pipe.{component}.modules():  # its config hides the end of a text, and the pooled state would be a learned token's",
        '    if hasattr(part, "eos_token_id"):',
        f"        part.eos_token_id = {end}",
    ]


def _elsewhere(card: ModelCard, folder: Path) -> str:
    """A1111 and ComfyUI: where the files go, and the prompt. There a file of tokens is called by its name, all rows at once."""
    lora, rows = (folder / f"{folder.name}.safetensors").is_file(), bool(_rows(folder))
    if not lora and not rows:
        return ""
    stem = f"{folder.name}{EMBEDDINGS}".removesuffix(".safetensors")
    here, there = (_example(card, dict.fromkeys(card.words, name)) for name in (stem, f"embedding:{stem}"))
    lines = ["## A1111", ""]
    lines += [f"- `{folder.name}.safetensors` into `models/Lora`"] if lora else []
    lines += [f"- `{stem}.safetensors` into `embeddings`; its file name is the trigger"] if rows else []
    lines += [f"- prompt {_code(here + f' <lora:{folder.name}:1>' * lora)}", "", "## ComfyUI", ""]
    lines += [f"- `{folder.name}.safetensors` into `models/loras`, node *Load LoRA*"] if lora else []
    lines += [f"- `{stem}.safetensors` into `models/embeddings`"] if rows else []
    lines += [f"- prompt {_code(there)}"]
    if rows and len(card.words) > 1:
        lines += ["", f"Both put all tokens where the file is named: they cannot tell {', '.join(card.words)} apart."]
    return "\n".join(lines)


def _trained(card: ModelCard) -> str:
    lines = []
    if card.training:
        rows = [f"| {name} | {_cell(value)} |" for name, value in card.training.items()]
        lines += ["## Training", "", "| | |", "|---|---|", *rows]
    if card.validation:
        rows = [f"| {t} | {before:.5f} | {after:.5f} | {after / before - 1:+.1%} |" for t, before, after in card.validation]
        lines += ["", "| timestep | loss before | loss after | change |", "|---|---|---|---|", *rows]
        lines += ["", f"The {card.scored} is taken at fixed timesteps and fixed noise."]
    return "\n".join(lines).strip()


# ---------------------------------------------------------------- small things


def _whole(folder: Path) -> bool:
    return (folder / "model" / "model_index.json").is_file()


def _rows(folder: Path) -> list[str]:
    """The keys of the file of token rows, none where there is no such file."""
    file = folder / f"{folder.name}{EMBEDDINGS}"
    if not file.is_file():
        return []
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _bound(card: ModelCard, prompt: str, spelling: Mapping[str, str] | None = None) -> str:
    """The prompt with every placeholder word replaced by its tokens, or by another spelling."""
    names = {word: tuple(tokens) for word, tokens in card.words.items()} | {word: (name,) for word, name in (spelling or {}).items()}
    return bind_placeholders(prompt, [Placeholder(word, tokens) for word, tokens in names.items()])


def _example(card: ModelCard, spelling: Mapping[str, str] | None = None) -> str:
    return _bound(card, card.prompts[0] if card.prompts else card.instance_prompt, spelling)


def _code(text: str) -> str:
    """As inline code, whatever is in it."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
