"""What a run was made from, as its checkpoints keep it: options, images, weights; and what changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_core.data.records import Record
from lora_core.diffusion.noise import Schedule

FREE = {  # option or section -> why another value leaves what is learned as it is
    **dict.fromkeys(
        ("out", "report", "push_to_hub", "resume", "resume_anyway", "overwrite"),
        "where the run is written, not what",
    ),
    **dict.fromkeys(
        (
            "save_every",
            "keep",
            "log_every",
            "samples",
            "validation.every",
            "validation.images",
            "validation.count",
        ),
        "when and how it is looked at",
    ),
    **dict.fromkeys(("data.workers", "data.cache", "threads"), "who computes it"),
    **dict.fromkeys(
        ("device", "compile", "cuda_graph", "gradient_checkpointing"),
        "the same formulas, rounded as that device or graph rounds",
    ),
    **dict.fromkeys(("model", "model_config", "vae"), "a path: the weights behind it are compared"),
    **dict.fromkeys(
        ("data.images", "data.dataset", "data.split", "data.image_column", "prior.images"),
        "a path: the images behind it are compared",
    ),
    **dict.fromkeys(
        ("data.caption_column", "data.captions", "data.caption"),
        "where captions are: they are compared",
    ),
    **dict.fromkeys(("data.repeats", "data.masks", "prior.count"), "compared with the images"),
    "stages": "compared one by one, those that have begun",
}
SECTIONS = (
    "data",
    "prior",
    "adapter",
    "tokens",
    "noise",
    "optimizer",
    "samples",
    "validation",
)  # of a config, each a table of options
CAST = {
    "vae": "vae_precision",
    "scheduler": "",
}  # component -> the option that it is loaded by, for all others `precision`
SAMPLED = 64  # numbers of each tensor
SHOWN = 3  # names in a sentence


def run_identity(
    config: Mapping[str, Any],
    records: Sequence[Record],
    prior: Sequence[Record],
    model: Mapping[str, str],
) -> dict[str, Any]:
    """What JSON can hold of a run: its config (as a table), its images, its class images, its model
    (of `model_identity`)."""
    settings = {name: value for name, value in _flat(config) if not _is_free(name)}
    return {
        "settings": settings, "stages": list(config["stages"]), "images": _images(records), "class images": _images(prior), "model": dict(model),
    }  # fmt: skip


def model_identity(
    modules: Mapping[str, nn.Module], schedule: Schedule, prediction: str
) -> dict[str, str]:
    """Component -> hash of its tensors' names, shapes and a sample of their numbers; also of the
    noise schedule.

    As loaded, so before adapters and tokens change it, and the same for a folder, a hub id and a
    single file. 64 numbers spread over each tensor tell any two trainings apart and cost one
    transfer from the device.
    """
    found = {name: _weights(module) for name, module in modules.items()}
    content = hashlib.blake2b(f"{schedule.kind} {prediction}".encode(), digest_size=8)
    for tensor in (schedule.ts, schedule.alphas, schedule.sigmas):
        content.update(tensor.detach().cpu().double().numpy().tobytes())
    return found | {"scheduler": content.hexdigest()}


def identity_changes(old: Mapping[str, Any], new: Mapping[str, Any], step: int) -> list[str]:
    """What differs between two identities for the first `step` steps, one phrase each with its
    name, its old and its new value.
    """
    found = [f"{name} was {_shown(value)}, is {_shown(new['settings'][name])}"
             for name, value in old["settings"].items() if name in new["settings"] and new["settings"][name] != value]  # fmt: skip
    found += _stages(old["stages"], new["stages"], step)
    for what in ("images", "class images"):
        found += _differing(old[what], new[what], what.removesuffix("s"))
    for name in dict.fromkeys([*old["model"], *new["model"]]):
        option = CAST.get(name, "precision")
        cast = old["settings"].get(option) != new["settings"].get(
            option
        )  # said above; numbers of another precision tell nothing
        if old["model"].get(name) != new["model"].get(name) and not cast:
            found.append(f"the model's {name} is another one")
    return found


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of a config's options; a table of numbers by group is one value."""
    for name, value in table.items():
        if isinstance(value, Mapping) and not prefix and name in SECTIONS:
            yield from _flat(value, f"{name}.")
        else:
            yield prefix + name, value


def _is_free(name: str) -> bool:
    return name in FREE or name.split(".")[0] in FREE


def _stages(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], step: int
) -> list[str]:
    """Changes of the stages that have begun; the one under way may end earlier or later, but not
    before what is done of it.
    """
    found: list[str] = []
    first = 0
    for i, before in enumerate(old):
        last = first + before["steps"]
        if first >= step:
            break
        if i >= len(new):
            return [*found, f"stages.{i} was there, is not"]
        for key in sorted({*before, *new[i]} - {"steps"}):
            if before.get(key) != new[i].get(key):
                found.append(
                    f"stages.{i}.{key} was {_shown(before.get(key))}, is {_shown(new[i].get(key))}"
                )
        under_way = last >= step and first + new[i]["steps"] >= step
        if before["steps"] != new[i]["steps"] and not under_way:
            found.append(
                f"stages.{i}.steps was {before['steps']}, is {new[i]['steps']}, of which {min(step - first, before['steps'])} are done"
            )
        first = last
    return found


def _images(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Name -> what is trained on of the image, in the order in which the run draws from them."""
    names = _names(records)
    found: dict[str, dict[str, Any]] = {}
    for record, name in zip(records, names):
        captions = hashlib.blake2b(
            "\0".join(record.captions).encode("utf-8", "surrogatepass"), digest_size=8
        ).hexdigest()
        kept = {
            "content": record.key,
            "size": list(record.size),
            "captions": captions,
            "repeats": found.get(name, {}).get("repeats", 0) + 1,
        }
        found[name] = kept
    return found


def _names(records: Sequence[Record]) -> list[str]:
    """The files' names, with their folders where they lie in several: what stays when the data set
    is moved.
    """
    folders = {record.path.parent for record in records}
    return [
        record.path.name if len(folders) == 1 else f"{record.path.parent.name}/{record.path.name}"
        for record in records
    ]


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], what: str) -> list[str]:
    found = []
    for verb, names in (
        ("added", [n for n in new if n not in old]),
        ("removed", [n for n in old if n not in new]),
    ):
        if names:
            found.append(f"{_count(len(names), what)} {verb}: {_some(names)}")
    both = [name for name in old if name in new]
    for part, word in (
        ("content", "the content or the mask"),
        ("captions", "the captions"),
        ("repeats", "the repeats"),
    ):
        names = [name for name in both if old[name][part] != new[name][part]]
        if names:
            found.append(f"{word} of {_count(len(names), what)} changed: {_some(names)}")
    if not found and list(old) != list(new):
        found.append(f"the order of the {what}s changed")
    return found


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def _shown(value: Any) -> str:
    return "not set" if value is None else f"{value}" if value != "" else "empty"


@torch.no_grad()
def _weights(module: nn.Module) -> str:
    content = hashlib.blake2b(digest_size=8)
    for key in (
        "scaling_factor",
        "shift_factor",
        "latents_mean",
        "latents_std",
    ):  # of a VAE: the units of its latents
        content.update(f"{key} {getattr(getattr(module, 'config', None), key, None)}".encode())
    samples: dict[torch.dtype, list[torch.Tensor]] = {}
    for name, tensor in module.state_dict().items():
        content.update(f"{name} {tuple(tensor.shape)}".encode())
        numbers = tensor.detach().reshape(-1)
        samples.setdefault(tensor.dtype, []).append(
            numbers[:: max(1, numbers.numel() // SAMPLED)][:SAMPLED]
        )
    for part in samples.values():
        content.update(torch.cat(part).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
