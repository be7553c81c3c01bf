"""Mix-of-Show's YAML options of an ED-LoRA, as a config of ours (arXiv 2305.18292).

    translate_options(Path("data/EDLoRA_hermione_RV51.yml")) -> EdloraJob

The run lies in experiments/NAME.yml, as its tutorial's second command has it: a copy of the options
and models/edlora_model-latest.pth.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_core import distributed
from lora_core.config import Config
from lora_core.data.captions import read_caption_file
from lora_core.data.concept_folders import list_images
from lora_core.data.listing import FolderContents
from lora_core.errors import UserError
from lora_core.text import is_number, read_text, shorten_value
from training.translation.edlora_training import translate_models, translate_train
from training.translation.translated_options import TranslatedOptions

PARTS = ("text_embedding", "text_encoder", "unet")
PART_OPTIONS = itertools.product(PARTS[1:], ("rank", "alpha", "where"))
LARGEST_OPTIONS = 1 << 18  # bytes; the published files have 3,000
TRANSFORM = "datasets.train.instance_transform"
TRANSFORMS = {"HumanResizeCropFinalV3", "ResizeCrop_InstanceMask", "ResizeFillMaskNew"}
FORMS = {"ToTensor", "Normalize"}  # pixels in [-1, 1], as here


DEFAULTS: dict[str, Any] = {  # of its trainer and data set, of options that are looked at here
    "name": None,
    "manual_seed": 0,
    "mixed_precision": "no",
    "gradient_accumulation_steps": 1,
    "datasets.train.concept_list": None,
    "datasets.train.use_caption": True,
    "datasets.train.use_mask": False,
    "datasets.train.replace_mapping": None,
    "datasets.train.batch_size_per_gpu": 1,
    "datasets.train.dataset_enlarge_ratio": 1,
    "datasets.val_vis.prompts": None,
    "models.pretrained_path": None,
    "models.enable_edlora": True,
    "models.new_concept_token": None,
    "models.initializer_token": None,
    "models.noise_offset": None,
    "models.attn_reg_weight": None,
    "models.reg_full_identity": True,
    "models.use_mask_loss": True,
    "train.optim_g.type": "AdamW",
    "train.optim_g.weight_decay": 0.01,
    "train.scheduler": "linear",
    "train.emb_norm_threshold": 0.55,
    "val.alpha_list": None,
    "val.sample.num_inference_steps": 50,
    "val.sample.guidance_scale": 7.5,
    **{f"models.finetune_cfg.{name}.lr": None for name in PARTS},
    **{f"models.finetune_cfg.{name}.lora_cfg.{key}": None for name, key in PART_OPTIONS},
}
WITHOUT_EFFECT = {  # on what is learned here -> why
    "datasets.train.name": "the data set is read as ours",
    "datasets.val_vis.name": "prompts are read from the file",
    "datasets.val_vis.latent_size": "images have the size of the training",
    "datasets.val_vis.replace_mapping": "prompts say the word itself",
    "datasets.val_vis.batch_size_per_gpu": "it changes no image",
    "models.enable_xformers": "attention always uses torch's own fast form",
    "models.gradient_checkpoint": "it is off",
    "path.pretrain_network": "the source does not read it",
    "train.optim_g.lr": "the networks have rates of their own",
    "train.unet_kv_drop_rate": "it is 0",
    "val.compose_visualize": "a sheet is always made",
    "logger.save_checkpoint_freq": "the last step is saved; --save-every N saves more",
    "models.finetune_cfg.text_embedding.enable_tuning": "a group of the stage",
    "models.finetune_cfg.text_encoder.enable_tuning": "a group of the stage",
    "models.finetune_cfg.unet.enable_tuning": "a group of the stage",
    "datasets.train.use_mask": "see the loss",
    "models.attn_reg_weight": "no attention is regularized",
    "models.reg_full_identity": "no attention is regularized",
    "models.use_mask_loss": "masks do not weight the loss, or are as it says",
    "train.optim_g.betas": "see weight_decay",
}


@dataclass(frozen=True)
class EdloraJob:
    """What a file of options asks for."""

    config: Config
    table: str  # what became of each option
    concepts: tuple[str, ...]  # <hermione1>, <hermione2>: their names in the .pth
    file: Path  # of the options
    model_name: str  # of the .pth


def read_options(file: Path) -> dict[str, Any]:
    """The options of a YAML file. Raises UserError for anything else than a table of them."""
    try:
        table = yaml.safe_load(read_text(file, LARGEST_OPTIONS))
    except FileNotFoundError:
        raise UserError(f"there is no file of options {file}; check -opt") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not YAML: {reason}") from None
    if not isinstance(table, dict):
        raise UserError(f"{file} is {shorten_value(table)}, expected a table of options")
    return table


def flatten_options(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """datasets.train.use_mask -> value, of every option; 1e-3 without a dot is a number, too.

    An entry of a list of transforms is an option of its own: instance_transform.ShuffleCaption.
    """
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not name.endswith("replace_mapping"):
            flat |= flatten_options(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            for transform in value:
                rest = {k: v for k, v in transform.items() if k != "type"}
                flat[f"{name}.{transform.get('type')}"] = rest
        else:
            is_text = isinstance(value, str) and is_number(value)
            flat[name] = float(value) if is_text else value
    return flat


def translate_options(file: Path) -> EdloraJob:
    """The job of a file of options, whose relative paths begin in the current folder.

    Raises UserError for what is missing and what cannot be carried out.
    """
    given = flatten_options(read_options(file))
    record = TranslatedOptions("Mix-of-Show", DEFAULTS | dict.fromkeys(given), given)
    out = Path("experiments") / file.name
    record.take("name", {"out": str(out)}, "named after the file, as in the tutorial's commands")
    count = _translate_data(record)
    concepts = translate_models(record)
    translate_train(record, count, distributed.process_count())
    _translate_validation(record)
    _translate_rest(record)
    kind = "edlora" if record["models.enable_edlora"] else "lora"
    return EdloraJob(
        record.to_config(Config), record.format_table(), concepts, file, f"{kind}_model-latest.pth"
    )


def value_of(record: TranslatedOptions, name: str, default: Any = None) -> Any:
    """An option's value; the default where the file has none or null."""
    value = record.given.get(name)
    return default if value is None else value


def _translate_data(record: TranslatedOptions) -> int:
    """The images, captions and masks; returns the number of images."""
    concepts = value_of(record, "datasets.train.concept_list")
    if not isinstance(concepts, str):
        raise UserError("datasets.train.concept_list is missing; name the JSON file of the concept")
    record.take("datasets.train.concept_list", {"data.images": concepts})
    if not Path(concepts).is_file():
        raise record.refuse("datasets.train.concept_list", "there is no such file")
    parts = list_images(Path(concepts)).parts
    if value_of(record, "datasets.train.use_caption", True) is False:
        prompts = {str(row.get("instance_prompt")) for row in json.loads(read_text(Path(concepts)))}
        if len(prompts) != 1:
            raise record.refuse("datasets.train.use_caption", "several concepts need captions")
        one = {"data.captions": "one", "data.caption": prompts.pop()}
        record.take("datasets.train.use_caption", one, "the concept's instance_prompt")
    elif "datasets.train.use_caption" in record.given:
        record.take("datasets.train.use_caption", {})
    tags = _count_tags(parts)
    for name in record.given:
        if name.startswith(f"{TRANSFORM}."):
            _translate_transform(record, name, dict(record[name]), tags)
    return sum(len(part.images) for part in parts)


def _count_tags(parts: Sequence[FolderContents]) -> int:
    """The largest number of parts between commas that a caption has."""
    most = 0
    for part in parts:
        for path in itertools.chain.from_iterable(part.texts.values()):
            most = max([most, *(len(text.split(",")) for text in read_caption_file(path))])
    return most


def _translate_transform(
    record: TranslatedOptions, name: str, values: dict[str, Any], tags: int
) -> None:
    """One transform of images or captions, of which one has `tags` parts."""
    kind = name.rpartition(".")[2]
    if kind in FORMS:
        record.take(name, {}, "pixels in [-1, 1], as here")
    elif "size" in values:
        ours = {"data.resolution": values["size"], "data.crop": "random", "data.zoom": 1.25}
        why = "cut to a square at a random place and size; there in half of the visits shrunk and "
        why += "put on black, which the loss leaves out"
        record.change(name, ours, why if kind in TRANSFORMS else f"unknown here; {why}")
    elif kind == "ShuffleCaption":
        kept = int(values.get("keep_token_num", 0))
        if tags < kept + 2:
            record.ignore(name, "no caption has two parts between commas that could change places")
            return
        ours = {"data.shuffle_caption": True, "data.keep_tokens": kept}
        record.take(name, ours, "the parts between commas")
    else:
        record.leave_out(name, "captions are as they are written")


def _translate_validation(record: TranslatedOptions) -> None:
    """The prompts, strengths and sampler of the validation sheets."""
    record.take(
        "datasets.val_vis.prompts", {"samples.prompts": list(read_validation_prompts(record))}
    )
    strengths = [float(alpha) for alpha in value_of(record, "val.alpha_list", [1.0])]
    record.take("val.alpha_list", {"samples.strengths": strengths}, "rows of the sample sheets")
    steps = int(value_of(record, "val.sample.num_inference_steps", 50))
    ours: dict[str, Any] = {"samples.steps": steps, "samples.sampler": "dpmpp_2m"}
    record.take("val.sample.num_inference_steps", ours)
    guidance = float(value_of(record, "val.sample.guidance_scale", 7.5))
    record.take("val.sample.guidance_scale", {"samples.guidance": guidance})
    for name in ("datasets.val_vis.num_samples_per_prompt", "val.val_during_save"):
        if name in record.given:
            record.change(name, {}, "test_edlora.py draws as many; a sheet here has one each")


def read_validation_prompts(record: TranslatedOptions) -> tuple[str, ...]:
    """The lines of the file of validation prompts. Raises UserError where there is none."""
    file = value_of(record, "datasets.val_vis.prompts")
    if not isinstance(file, str) or not Path(file).is_file():
        raise UserError(
            f"datasets.val_vis.prompts is {shorten_value(file)}; expected a text file with a "
            "prompt in each line"
        )
    return tuple(line.strip() for line in read_text(Path(file)).splitlines() if line.strip())


def _translate_rest(record: TranslatedOptions) -> None:
    """Seed and logging, and what has no effect here."""
    record.take("manual_seed", {"seed": int(value_of(record, "manual_seed", 0))})
    if "logger.print_freq" in record.given:
        record.take("logger.print_freq", {"log_every": int(record["logger.print_freq"])})
    told = {entry.name for entry in record.entries}
    for name in record.given:
        if name in WITHOUT_EFFECT and name not in told:
            record.ignore(name, WITHOUT_EFFECT[name])
        elif name not in told:
            record.leave_out(name, "no such option is known here")
