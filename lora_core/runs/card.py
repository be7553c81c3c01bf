"""Write the README.md of a run folder, a model card for the hub, from card_template.md; upload.

The card describes the files of the folder and has code that loads them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData
from jinja2 import Environment, StrictUndefined, Template
from safetensors import safe_open

from lora_core.adapters.custom_files import CUSTOM_ADAPTER_ENDING
from lora_core.atomic_files import atomic_write
from lora_core.errors import UserError, first_line, printable
from lora_core.formats import EMBEDDINGS, NATIVE
from lora_core.formats.dora_readers import describe_reader_errors
from lora_core.formats.shared_header import published_files
from lora_core.placeholders import Placeholder, bind_placeholders, describe_tokens
from lora_core.runs.licenses import license_fields
from lora_core.runs.pictures import OVER_STEPS
from lora_core.shared_paths import path_from

TEMPLATE = Path(__file__).parent / "card_template.md"
# Files that `push_to_hub` leaves out: unfinished, large, or with names of machines and users.
IGNORED = (
    "checkpoints/*", "class_images/*", "*.tmp*", ".*", "wandb/*", "tensorboard/*",
    "skipped_files.txt",
)  # fmt: skip
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelCard:
    """The content of a model card that does not follow from the folder's files.

    Prompts have the placeholder words, not the tokens.
    """

    base_model: str  # folder or hub id
    pipeline: str  # diffusers' class for the base model
    encoders: Mapping[str, str] = field(default_factory=dict)  # attribute of the pipeline -> key
    # Text encoder -> id of the end of a text, where its config hides that id (eos_token_id 2, from
    # before transformers #24773): transformers then pools at the largest id, a learned token's.
    ends: Mapping[str, int] = field(default_factory=dict)
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)  # word -> its tokens, in order
    # Word -> number of cross-attention layers, of words with tokens for each layer (P+).
    layers: Mapping[str, int] = field(default_factory=dict)
    prompts: Sequence[str] = ()  # the first one is the example
    instance_prompt: str = ""  # a typical training caption; empty: the first prompt
    tags: Sequence[str] = ()  # in addition to text-to-image, diffusers and those of the files
    sampling: Mapping[str, float] = field(default_factory=dict)  # arguments of the pipeline's call
    training: Mapping[str, object] = field(default_factory=dict)  # table of settings: name -> value
    validation: Sequence[tuple[str, float, float]] = ()  # (timestep, loss before, loss after)
    scored: str = "loss"  # that loss in words: held-out loss, loss on the training images
    repo: str = ""  # hub repository that the card is for; empty: this disk
    license: str = ""  # an id of the hub, another name, or an address
    description: str = ""  # the model in a few sentences
    # Tool -> relative error of its update of a DoRA under kohya's names (formats.dora_readers)
    dora_errors: Mapping[str, float] = field(default_factory=dict)
    shows_images: bool = True  # the samples, if no private image is in them
    loads_tokens: bool = True  # whether that class has load_textual_inversion
    a1111: bool = True  # whether A1111 or Forge reads files of the model's family
    rerun: str = ""  # why config.toml alone does not repeat the run; empty: it does


def write_card(card: ModelCard, folder: str | Path) -> Path:
    """Writes the README.md of a finished run folder and returns its path."""
    folder = Path(folder).resolve()
    facts = {**_file_facts(card, folder), **_prompts(card, folder)}
    text = _read_template().render(card=card, **facts)
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(printable(text), encoding="utf-8")
    return folder / "README.md"


@cache
def _read_template() -> Template:
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "code": _code,
        "cell": _cell,
        "json": _json,
        "path": _path,
        "repr": repr,
        "shell": shlex.quote,
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def check_push_target(repo_id: str, *, public: bool = False) -> None:
    """Creates the hub repository if it is missing, a private one unless `public`, and checks that
    this login may write to it.

    Raises UserError if not, and for a public repository that is there without `public`.
    """
    try:
        api = HfApi()
        api.create_repo(repo_id, repo_type="model", private=not public, exist_ok=True)
        if hasattr(api, "auth_check"):
            api.auth_check(repo_id, write=True)
        is_open = not public and api.model_info(repo_id).private is False
    except Exception as error:  # see `push_to_hub`
        advice = "log in (hf auth login), or leave it out and upload the folder later"
        raise UserError(
            f"--push-to-hub {repo_id} cannot be written to: {first_line(error)}; {advice}"
        ) from None
    if is_open:
        raise UserError(
            f"--push-to-hub {repo_id} is a public repository; add --files.public to publish there, "
            "or name another, which is then made a private one"
        )


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    ignore: Sequence[str] = IGNORED,
    contents: Mapping[str, bytes] | None = None,
    public: bool = False,
) -> str:
    """Uploads a run folder to a hub repository; returns its address. One that is missing is
    created, private unless `public`; one that is there stays as it is.

    `ignore`: globs on paths relative to the folder. `contents`: files that have another content in
    the repository, as those with captions of the user's files in their headers have. Raises
    UserError when the hub refuses or cannot be reached; the folder is not changed.
    """
    contents = {**(contents or {}), **published_files(Path(folder))}
    try:
        api = HfApi()
        url = api.create_repo(repo_id, repo_type="model", private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            ignore_patterns=[*ignore, *contents],
            commit_message=f"Upload the run {Path(folder).resolve().name}",
        )
        for name, content in contents.items():
            api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id)
    except Exception as error:
        # The hub's client raises a dozen classes: no network, no token, no right to write, a bad
        # id, a card that it does not accept.
        raise UserError(
            f"{folder} is whole, but was not uploaded to {repo_id}: {first_line(error)}; "
            "fix that (hf auth login) and upload the folder"
        ) from None
    return str(url)


# ---------------------------------------------------------------- the template's variables


def _file_facts(card: ModelCard, folder: Path) -> dict[str, object]:
    """The variables of the template that depend on the files in the folder."""
    name = folder.name
    rows = _token_rows(folder)
    images = _image_files(folder) if card.shows_images else []
    return {
        "name": name,
        "front_matter": _front_matter(card, folder, rows, images).to_yaml(),
        "images": images,
        "contents": _contents(folder, rows),
        "files": _described_files(card, folder, rows),
        "rows": rows,
        "rows_file": f"{name}{EMBEDDINGS}",
        "lora": (folder / NATIVE).is_file(),
        "lora_file": NATIVE,
        "base_model": card.base_model if card.repo else path_from(folder, card.base_model),
        "kohya_lora": (folder / f"{name}.safetensors").is_file(),
        "lycoris": _has_lycoris_only(folder),
        "dora_note": _dora_note(card, folder),
        "whole_model": _has_whole_model(folder),
    }


def _prompts(card: ModelCard, folder: Path) -> dict[str, object]:
    """The variables of the template that are prompts.

    In A1111 and ComfyUI a token file's name in the prompt inserts all of its rows.
    """
    stem = f"{folder.name}{EMBEDDINGS}".removesuffix(".safetensors")
    return {
        "example": _example(card),
        "example_a1111": _example(card, dict.fromkeys(card.words, stem)),
        "example_comfyui": _example(card, dict.fromkeys(card.words, f"embedding:{stem}")),
        "trigger": card.instance_prompt or _example(card),
        "token_names": list(chain.from_iterable(card.words.values())),
        "shown_tokens": {own.word: describe_tokens(own) for own in _placeholders(card)},
    }


def _front_matter(
    card: ModelCard, folder: Path, rows: Sequence[str], images: Sequence[str]
) -> ModelCardData:
    """The card's metadata; base_model is left out on the hub, which refuses a local folder."""
    is_local = Path(card.base_model).is_dir() or not HUB_ID.fullmatch(card.base_model)
    tags = ["text-to-image", "diffusers", "diffusers-training"]
    tags += ["lora"] if (folder / NATIVE).is_file() else []
    tags += ["lycoris"] if _has_lycoris_only(folder) else []
    tags += ["textual-inversion"] if rows else []
    data = ModelCardData(
        base_model=None if is_local and card.repo else card.base_model,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(dict.fromkeys([*tags, *card.tags])),
    )
    for field_name, text in license_fields(card.license).items():
        data[field_name] = text
    example = _example(card)
    if prompt := _bind_words(card, card.instance_prompt) or example:
        data["instance_prompt"] = prompt
    if images:
        data["widget"] = [{"text": example or "-", "output": {"url": url}} for url in images]
    return data


def _contents(folder: Path, rows: Sequence[str]) -> str:
    """The weights in the folder, in words."""
    there = {
        f"a LoRA ({NATIVE})": (folder / NATIVE).is_file(),
        f"a LyCORIS adapter ({folder.name}.safetensors)": _has_lycoris_only(folder),
        "learned tokens": bool(rows),
        "a whole fine-tuned model (model/)": _has_whole_model(folder),
        f"an adapter for lora_core ({folder.name}{CUSTOM_ADAPTER_ENDING})": _has_own_only(folder),
    }
    text = " and ".join(name for name, is_there in there.items() if is_there) or "no weights yet"
    return text[0].upper() + text[1:]


def _described_files(card: ModelCard, folder: Path, rows: Sequence[str]) -> dict[str, str]:
    """Name -> description of the files that are there."""
    own = "the adapter's own parameters"
    if not (folder / NATIVE).is_file():
        own += ", which have no low-rank form"
    own += ": `lora_core.patch(pipe, FILE, kind=CLASS)` puts them on a model"
    settings = f"the run's settings: {_repeat_advice(folder)}"
    if card.repo:
        settings = "the run's settings, without the folders of its images"
    others = "ComfyUI and other tools that know the model"
    alone = f"the adapter under LyCORIS' names, for lora_core, {others}"
    kohya = f"the same LoRA under kohya's names, for {others}"
    known = {
        NATIVE: "LoRA under diffusers' names",
        f"{folder.name}.safetensors": alone if _has_lycoris_only(folder) else kohya,
        f"{folder.name}{EMBEDDINGS}": f"rows of the learned tokens: {', '.join(rows)}",
        f"{folder.name}{CUSTOM_ADAPTER_ENDING}": own,
        "model": "the whole model with all updates folded in, in the diffusers layout",
        "config.toml": card.rerun or settings,
    }
    return {name: description for name, description in known.items() if (folder / name).exists()}


def _repeat_advice(folder: Path) -> str:
    """The command that repeats the run into another folder, from where it was trained."""
    place, end = _place(folder), ""
    if not place:
        place, end = "FOLDER", ", where FOLDER is this folder"
    config, out = shlex.quote(f"{place}/config.toml"), shlex.quote(f"{place}2")
    return f"{_code(f'python train.py {config} --out {out}')} repeats it{end}"


def _place(folder: Path) -> str:
    """A folder below the current one, as commands there name it; "" for others."""
    here = Path.cwd()
    return folder.relative_to(here).as_posix() if here in folder.parents else ""


# ---------------------------------------------------------------- files


def _image_files(folder: Path) -> list[str]:
    """The newest sample sheet, before_after.png and the sheet over the steps, where they are."""
    sheets = sorted((folder / "samples").glob("step_*.png"))
    paths = (*sheets[-1:], folder / "before_after.png")
    if len(sheets) > 1:  # of one it is the same again
        paths = (*paths, folder / "samples" / OVER_STEPS)
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def _dora_note(card: ModelCard, folder: Path) -> str:
    """What A1111 and ComfyUI make of a DoRA under kohya's names; "" without one."""
    file = folder / f"{folder.name}.safetensors"
    if not file.is_file():
        return ""
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    if not any(name.endswith(".dora_scale") for name in names):
        return ""
    lora = NATIVE if card.repo else f"{_place(folder) or folder.name}/{NATIVE}"
    command = (
        f"python merge.py convert {shlex.quote(lora)} lora.safetensors --as lora --to kohya "
        f"--model {shlex.quote(card.base_model)}"
    )
    advice = f"{_code(command)} makes a plain LoRA, which every tool applies alike"
    return f"{describe_reader_errors(card.dora_errors)}. {advice}."


def _has_lycoris_only(folder: Path) -> bool:
    """Whether the adapter is under LyCORIS' names only: diffusers' cannot hold it."""
    return not (folder / NATIVE).is_file() and (folder / f"{folder.name}.safetensors").is_file()


def _has_own_only(folder: Path) -> bool:
    """Whether a run's adapters are in the file of their class alone."""
    others = (folder / NATIVE).is_file() or _has_lycoris_only(folder) or _has_whole_model(folder)
    return (folder / f"{folder.name}{CUSTOM_ADAPTER_ENDING}").is_file() and not others


def _has_whole_model(folder: Path) -> bool:
    return (folder / "model" / "model_index.json").is_file()


def _token_rows(folder: Path) -> list[str]:
    """The keys of the token file; none where it does not exist."""
    file = folder / f"{folder.name}{EMBEDDINGS}"
    if not file.is_file():
        return []
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


# ---------------------------------------------------------------- text


def _bind_words(card: ModelCard, prompt: str, spelling: Mapping[str, str] | None = None) -> str:
    """The prompt with every placeholder word replaced by its tokens, or by another spelling.

    With words for each layer it stays as it is, for programs that bind the words themselves.
    """
    if card.layers and spelling is None:
        return prompt
    words = {own.word: own for own in _placeholders(card)}
    words |= {word: Placeholder(word, (name,)) for word, name in (spelling or {}).items()}
    return bind_placeholders(prompt, list(words.values()))


def _placeholders(card: ModelCard) -> list[Placeholder]:
    return [
        Placeholder(word, tuple(tokens), layers=card.layers.get(word, 0))
        for word, tokens in card.words.items()
    ]


def _example(card: ModelCard, spelling: Mapping[str, str] | None = None) -> str:
    """The first prompt, bound."""
    return _bind_words(card, card.prompts[0] if card.prompts else card.instance_prompt, spelling)


def _code(text: str) -> str:
    """The text as inline code, backticks and bars in it included."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")


def _cell(value: object) -> str:
    """A value as it can be written in a cell of a table."""
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _path(name: str) -> str:
    """A model as Python code names it; no library expands a ~ itself."""
    return f"os.path.expanduser({_json(name)})" if name.startswith("~") else _json(name)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
