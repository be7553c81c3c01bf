"""A config of kohya's train_network.py, as a config of ours and the table of what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lora_core.adapters.targets import matches_pattern
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.settings import ImageSettings
from lora_core.toml import flatten_table, from_table, to_table
from models import read_layout
from training.block_rates import block_rate_patterns
from training.checks.model_checks import plan_adapters
from training.translation.kohya_data import translate_data
from training.translation.kohya_dataset import ForeignData, read_datasets
from training.translation.kohya_network import BLOCK_WEIGHTS, FLUX, translate_network
from training.translation.kohya_objective import translate_model, translate_objective
from training.translation.kohya_optimizer import (
    translate_groups,
    translate_optimizer,
    translate_schedule,
)
from training.translation.kohya_options import IGNORED, KOHYA_DEFAULTS, LEFT_OUT, TOOL
from training.translation.kohya_outputs import translate_outputs
from training.translation.kohya_steps import count_batches, translate_length
from training.translation.translated_options import (
    TranslatedOption,
    TranslatedOptions,
    nest_options,
)

OVERRIDDEN = "the dataset file has the images"
SAME = "as by default"


@dataclass(frozen=True)
class TranslatedRun:
    """A config and what it was made from."""

    config: Config
    records: tuple[TranslatedOptions, ...]  # of the command line and file, of the dataset file

    def format_tables(self) -> str:
        """The tables of both, one below the other, at most 100 columns wide."""
        return "\n\n".join(record.format_table() for record in self.records)


def translate_run(
    given: Mapping[str, Any],
    dataset: str | Path | None = None,
    *,
    script: str = "",
    processes: int = 1,
) -> TranslatedRun:
    """The config of kohya's options, given as in `kohya_options.read_config_file`.

    `dataset`: a dataset file in place of dataset_config. `script`: sdxl or flux where that is known
    from the script's name; otherwise the model says it. `processes`: those that share a step. Reads
    the sizes of the images, to count steps. Raises UserError for unknown options and for what a run
    of ours cannot be.
    """
    given = dict(given)
    if dataset is not None:
        given["dataset_config"] = str(dataset)
    options = TranslatedOptions(TOOL, KOHYA_DEFAULTS, given)
    options.defaults = {**KOHYA_DEFAULTS, **_renamed_defaults(options)}
    if not options["pretrained_model_name_or_path"]:
        raise options.refuse("pretrained_model_name_or_path", "give the base model")
    if options["dataset_class"]:
        raise options.refuse("dataset_class", "classes are not read; give folders of images")
    version = _model_version(options, script)
    translate_model(options, version)
    groups = translate_groups(options)
    arguments = translate_network(options, groups)
    file = options["dataset_config"]
    data = read_datasets(options, Path(file) if file else None)
    translate_data(options, data, version)
    settings, batch = _image_settings(options, data)
    batches = count_batches(data.subsets, settings, batch)
    steps, epoch = translate_length(options, batches, processes)
    translate_optimizer(options, groups)
    rate = _settings(options, data)["optimizer"]["lr"][groups[0]]
    translate_schedule(options, steps, rate)
    translate_objective(options, version)
    if any(subset["is_reg"] for subset in data.subsets):
        options.take("prior_loss_weight", {"prior.weight": float(options["prior_loss_weight"])})
    translate_outputs(options, steps, epoch, version)
    _translate_block_rates(options, data, arguments)
    _record_rest(options, data)
    config: Config = from_table(_settings(options, data))
    records = (options,) if data.record is None else (options, data.record)
    usual = flatten_table(to_table(Config()))
    for record in records:
        record.check_complete()
        record.entries = [entry for entry in record.entries if not _is_usual(entry, usual)]
    return TranslatedRun(config, records)


def _is_usual(entry: TranslatedOption, usual: Mapping[str, Any]) -> bool:
    """Whether an entry is of a default that is ours, too."""
    is_same = entry.is_default and entry.outcome == "taken"
    return is_same and all(usual.get(name) == own for name, own in entry.ours.items())


def _renamed_defaults(options: TranslatedOptions) -> dict[str, Any]:
    """Defaults that follow from other options: kohya's caption_extention is caption_extension."""
    if options.is_given("caption_extention"):
        return {"caption_extension": options["caption_extention"]}
    return {}


def _settings(options: TranslatedOptions, data: ForeignData) -> dict[str, Any]:
    """The options of both records as a TOML file has them; those of the dataset file win."""
    own = {} if data.record is None else data.record.options
    return nest_options(options.options | own)


def _image_settings(options: TranslatedOptions, data: ForeignData) -> tuple[ImageSettings, int]:
    """(how images are cut, images of a batch)."""
    table = _settings(options, data)
    names = [option.name for option in fields(ImageSettings)]
    own = {name: value for name, value in table["data"].items() if name in names}
    return ImageSettings(**own), int(table.get("batch_size", 1))


def _model_version(options: TranslatedOptions, script: str) -> str:
    """ "sd_v1", "sdxl_base_v1-0", "flux1" ...: by the script, the network, or the model."""
    if script:
        return script
    if options["network_module"] == FLUX:
        return "flux1"
    try:
        return read_layout(options["pretrained_model_name_or_path"]).base_model_version
    except UserError:  # a flag may name another model; else the run says it
        return ""


def _translate_block_rates(
    options: TranslatedOptions, data: ForeignData, arguments: Mapping[str, str]
) -> None:
    """Record the rates of the UNet's blocks. Raises UserError without the model's layers."""
    weights = [arguments.get(name) for name in BLOCK_WEIGHTS]
    if not any(weights):
        return
    config: Config = from_table(_settings(options, data))
    layout = read_layout(config.model, config.model_config, config.family)
    plan = plan_adapters(config, layout)
    component = next((name for name in plan if name not in layout.encoders), None)
    if component is None:
        given = ", ".join(name for name in BLOCK_WEIGHTS if arguments.get(name))
        options.ignore("network_args", f"{given}: without effect, the UNet is not trained")
        return
    globs = plan[component].targets
    modules = layout.components[component].modules
    paths = [path for path in modules if any(matches_pattern(path, glob) for glob in globs)]
    count = 9 if layout.base_model_version.startswith("sdxl") else 12
    threshold = float(arguments.get("block_lr_zero_threshold") or 0)
    rates, excluded = block_rate_patterns(weights, count, paths, threshold=threshold)
    ours: dict[str, Any] = {}
    if rates:
        ours["optimizer.lr_pattern"] = rates
    if excluded:
        ours["adapter.exclude"] = excluded
    options.take("network_args", ours, "the weights of its blocks")


def _record_rest(options: TranslatedOptions, data: ForeignData) -> None:
    """Entries of the options that nothing above has told of."""
    told = {entry.name for entry in options.entries}
    folders = ("train_data_dir", "reg_data_dir", "in_json", "dataset_repeats")
    for name, value in options.given.items():
        if name in told:
            continue
        is_usual = value == KOHYA_DEFAULTS[name] or value in (False, None)
        if name in LEFT_OUT and not is_usual:
            options.leave_out(name, LEFT_OUT[name][1])
        elif name in IGNORED:
            options.ignore(name, IGNORED[name][1])
        elif name in folders and data.record is not None:
            options.ignore(name, OVERRIDDEN)
        elif name in ("config_file", "dataset_config"):
            options.take(name, {})
        elif name == "caption_extention":
            options.take(name, {}, "read as caption_extension")
        elif name in IN_A_DATASET and data.record is not None:
            options.ignore(name, "the dataset file has a value of its own")
        else:
            options.ignore(name, SAME if is_usual else NOT_READ)


NOT_READ = "without effect beside the other options (in kohya's script neither)"
IN_A_DATASET = (
    "resolution", "train_batch_size", "enable_bucket", "bucket_reso_steps", "min_bucket_reso",
    "max_bucket_reso", "bucket_no_upscale", "shuffle_caption", "keep_tokens", "caption_extension",
    "caption_separator", "keep_tokens_separator", "secondary_separator", "enable_wildcard",
    "caption_prefix", "caption_suffix", "caption_dropout_rate", "caption_tag_dropout_rate",
    "color_aug", "flip_aug", "random_crop", "resize_interpolation", "alpha_mask",
)  # fmt: skip
