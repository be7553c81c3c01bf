"""Identity of a run, kept in its checkpoints: options, images and weights that it was made from;
the differences between two identities.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_core import distributed
from lora_core.data.records import Record
from lora_core.diffusion.noise import Schedule
from lora_core.errors import UserError
from lora_core.text import hide_home, shorten_value

WHERE_WRITTEN = "where the run is written, not its result"
WHEN_LOOKED_AT = "when and how the run is observed"
COMPUTED_BY = "the threads and files that compute it"
ROUNDING = "the same formulas, rounded as that device or graph rounds"
WEIGHTS_PATH = "a path: the weights behind it are compared"
IMAGES_PATH = "a path: the images behind it are compared"
CAPTIONS = "where captions are: they are compared"
WITH_IMAGES = "compared with the images"
FREE_OPTIONS = {  # option or section -> why the result does not depend on it
    "out": WHERE_WRITTEN,
    "report": WHERE_WRITTEN,
    "push_to_hub": WHERE_WRITTEN,
    "resume": WHERE_WRITTEN,
    "resume_anyway": WHERE_WRITTEN,
    "overwrite": WHERE_WRITTEN,
    "save_every": WHEN_LOOKED_AT,
    "keep": WHEN_LOOKED_AT,
    "log_every": WHEN_LOOKED_AT,
    "list_targets": WHEN_LOOKED_AT,
    "samples": WHEN_LOOKED_AT,
    "files": WHERE_WRITTEN,
    "validation.every": WHEN_LOOKED_AT,
    "validation.images": WHEN_LOOKED_AT,
    "validation.count": WHEN_LOOKED_AT,
    "data.workers": COMPUTED_BY,
    "data.cache": COMPUTED_BY,
    "threads": COMPUTED_BY,
    "offload": COMPUTED_BY,
    "device": ROUNDING,
    "compile": ROUNDING,
    "cuda_graph": ROUNDING,
    "shard": ROUNDING,
    "gradient_checkpointing": ROUNDING,
    "stream": ROUNDING,
    "model": WEIGHTS_PATH,
    "model_config": WEIGHTS_PATH,
    "vae": WEIGHTS_PATH,
    "data.images": IMAGES_PATH,
    "data.pairs": IMAGES_PATH,
    "data.dataset": IMAGES_PATH,
    "data.streaming": IMAGES_PATH,
    "data.skip_bad": WITH_IMAGES,
    "data.split": IMAGES_PATH,
    "data.image_column": IMAGES_PATH,
    "prior.images": IMAGES_PATH,
    "data.caption_column": CAPTIONS,
    "data.captions": CAPTIONS,
    "data.caption": CAPTIONS,
    "data.subsets": IMAGES_PATH,
    "data.caption_extension": CAPTIONS,
    "data.caption_lines": CAPTIONS,
    "data.caption_prefix": CAPTIONS,
    "data.caption_suffix": CAPTIONS,
    "data.repeats": WITH_IMAGES,
    "data.masks": WITH_IMAGES,
    "prior.count": WITH_IMAGES,
    "stages": "compared one by one, those that have begun",
}
# Sections of a config, each a table of options.
SECTIONS = ("data", "prior", "adapter", "tokens", "noise", "optimizer", "samples", "validation",
            "files")  # fmt: skip
# Component -> the option for the precision that it is loaded in; for all others `precision`.
PRECISION_OPTIONS = {"vae": "vae_precision", "scheduler": ""}
VAE_UNITS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of its latents
EMPTY_IDENTITY: dict[str, Any] = {
    "settings": {}, "stages": [], "images": {}, "class images": {}, "model": {}
}  # fmt: skip
SAMPLED = 64  # numbers of each tensor
SHOWN = 3  # names in a sentence


def run_identity(
    config: Mapping[str, Any],
    records: Sequence[Record],
    prior: Sequence[Record],
    model: Mapping[str, str],
) -> dict[str, Any]:
    """The inputs of a run as JSON: its config (a table), images, class images, and the model (the
    table of `model_identity`).
    """
    return {
        "settings": {name: value for name, value in _flat(config) if not _is_free(name)},
        "stages": list(config["stages"]),
        "images": _images(records),
        "class images": _images(prior),
        "model": dict(model),
    }


def model_identity(
    modules: Mapping[str, nn.Module], schedule: Schedule, prediction: str
) -> dict[str, str]:
    """Component -> hash of its tensors' names, shapes and a sample of their numbers; also of the
    noise schedule.

    For modules as they were loaded, before adapters and tokens change them: the same for a folder,
    a hub id and a single file. 64 numbers spread over each tensor tell any two trainings apart and
    cost one transfer from the device.
    """
    found = {}
    for name, module in modules.items():
        if not any(tensor.is_meta for tensor in module.parameters()):  # of a plan: no weights
            found[name] = _hash_weights(module)
    content = hashlib.blake2b(f"{schedule.kind} {prediction}".encode(), digest_size=8)
    for tensor in (schedule.ts, schedule.alphas, schedule.sigmas):
        content.update(tensor.detach().cpu().double().numpy().tobytes())
    return found | {"scheduler": content.hexdigest()}


def check_identity(identity: Any) -> None:
    """Raises ValueError for what is no identity, such as that of a damaged checkpoint."""
    is_table = isinstance(identity, dict)
    for name, empty in EMPTY_IDENTITY.items():
        part = identity.get(name) if is_table else None
        if not isinstance(part, type(empty)):
            raise ValueError(f"the {name} that it was made from are {shorten_value(part)}")
    for stage in identity["stages"]:
        if not isinstance(stage, dict) or type(stage.get("steps")) is not int:
            raise ValueError(f"{shorten_value(stage)} is no stage")
    for image in (*identity["images"].values(), *identity["class images"].values()):
        if not isinstance(image, dict) or not image.keys() >= {"content", "captions", "repeats"}:
            raise ValueError(f"{shorten_value(image)} is no image")


def check_same_inputs(identity: Mapping[str, Any]) -> None:
    """Raises UserError where the processes of a run have other images, weights or options."""
    text = json.dumps(identity, sort_keys=True, default=str).encode()
    digests = distributed.gather_values(hashlib.blake2b(text, digest_size=16).digest())
    other = next((rank for rank, each in enumerate(digests) if each != digests[0]), 0)
    if other:
        every = distributed.gather_values(identity)
        changes = identity_changes(every[0], every[other], 0)
        raise UserError(
            f"process {other} trains from something else than process 0: {'; '.join(changes)}; "
            "give every machine the same images, model and options"
        )


def identity_changes(old: Mapping[str, Any], new: Mapping[str, Any], step: int) -> list[str]:
    """The differences between two identities for the first `step` steps: one phrase each, with the
    name, the old and the new value.
    """
    found = []
    settings = new["settings"]
    for name, value in old["settings"].items():
        if name in settings and settings[name] != value:
            found.append(f"{name} was {_shown(value)}, is {_shown(settings[name])}")
    found += _stages(old["stages"], new["stages"], step)
    for what in ("images", "class images"):
        found += _image_changes(old[what], new[what], what.removesuffix("s"))
    for name in dict.fromkeys([*old["model"], *new["model"]]):
        option = PRECISION_OPTIONS.get(name, "precision")
        # Another precision is listed above, and changes the numbers of the same weights.
        is_cast = old["settings"].get(option) != settings.get(option)
        if old["model"].get(name) != new["model"].get(name) and not is_cast:
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
    return name in FREE_OPTIONS or name.split(".")[0] in FREE_OPTIONS


def _stages(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], step: int
) -> list[str]:
    """Changes of the stages that have begun; the one under way may end earlier or later, but not
    before the steps that are done.
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
            done = min(step - first, before["steps"])
            found.append(
                f"stages.{i}.steps was {before['steps']}, is {new[i]['steps']}, "
                f"of which {done} are done"
            )
        first = last
    return found


def _images(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Name -> the image's content, size, captions and repeats, in the order of the records.

    The name of a pair has both images.
    """
    names = _names(records)
    found: dict[str, dict[str, Any]] = {}
    for record, name in zip(records, names):
        captions = "\0".join(record.captions)
        if record.tags.varies or record.tags.secondary_separator:
            captions += f"\0{record.tags}"
        found[name] = {
            "content": record.key,
            "size": list(record.size),
            "captions": hashlib.blake2b(
                captions.encode("utf-8", "surrogatepass"), digest_size=8
            ).hexdigest(),
            "repeats": found.get(name, {}).get("repeats", 0) + 1,
        }
    return found


def _names(records: Sequence[Record]) -> list[str]:
    """The files' names, with their folders where they lie in several; they stay the same when the
    data set is moved.
    """
    folders = {record.path.parent for record in records}
    names = []
    for record in records:
        name = (
            record.path.name
            if len(folders) == 1
            else f"{record.path.parent.name}/{record.path.name}"
        )
        names.append(name if record.loser is None else f"{name} over {record.loser.path.name}")
    return names


def _image_changes(old: Mapping[str, Any], new: Mapping[str, Any], what: str) -> list[str]:
    """Images that were added, removed or changed; `what`: "image" or "class image"."""
    groups = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
    }
    found = [
        f"{_count(len(names), what)} {verb}: {_some(names)}"
        for verb, names in groups.items()
        if names
    ]
    parts = {
        "content": "the content or the mask",
        "captions": "the captions",
        "repeats": "the repeats",
    }
    both = [name for name in old if name in new]
    for part, words in parts.items():
        names = [name for name in both if old[name][part] != new[name][part]]
        if names:
            found.append(f"{words} of {_count(len(names), what)} changed: {_some(names)}")
    if not found and list(old) != list(new):
        found.append(f"the order of the {what}s changed")
    return found


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def _shown(value: Any) -> str:
    """A value as a phrase."""
    if value is None:
        return "not set"
    return f"{value}" if value != "" else "empty"


@torch.no_grad()
def _hash_weights(module: nn.Module) -> str:
    """Hash of the names, shapes and some numbers of a network's tensors."""
    content = hashlib.blake2b(digest_size=8)
    config = getattr(module, "config", None)
    for key in VAE_UNITS:
        content.update(f"{key} {getattr(config, key, None)}".encode())
    samples: dict[torch.dtype, list[torch.Tensor]] = {}
    for name, tensor in module.state_dict().items():
        content.update(f"{name} {tuple(tensor.shape)}".encode())
        numbers = tensor.detach().reshape(-1)
        stride = max(1, numbers.numel() // SAMPLED)
        samples.setdefault(tensor.dtype, []).append(numbers[::stride][:SAMPLED])
    for part in samples.values():
        content.update(torch.cat(part).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def hide_image_names(change: str) -> str:
    """A change as headers and README.md, which people publish, list it: how many images, and not
    which; ~ for the home folder.
    """
    return hide_home(re.sub(r"\b(images? (?:added|removed|changed)): .*", r"\1", change))
