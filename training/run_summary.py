"""Summary printed before training: images, captions, masks, tokens, steps, files left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_core.data.dataset import ImageDataset
from lora_core.data.listing import METADATA_TABLES, count_images
from lora_core.data.records import Record, every_image
from lora_core.data.sample_order import BucketOrder
from lora_core.errors import printable
from lora_core.placeholders import Placeholder, bind_layers, bind_placeholders, describe_tokens

MOST_NAMES = 3  # files of a kind that are named
LONGEST_CAPTION = 160  # characters of the example


class RunLength(NamedTuple):
    """Length of a run."""

    steps: int
    batch: int  # images in one forward pass
    accumulation: int  # forward passes for one step


def describe_run(
    folder: ImageDataset,
    prior: ImageDataset | None,
    placeholders: Sequence[Placeholder],
    length: RunLength,
    left_out: Mapping[str, Sequence[Path]],
) -> str:
    """The summary that is printed before training, one line for each subject.

    `left_out`: reason -> files that nothing reads (`records.find_unused_files`).
    """
    records = folder.records
    lines = [
        _describe_images(folder),
        f"captions: {_describe_sources(records)}",
        f"  as trained: {_example_caption(records[0], placeholders)}",
    ]
    masked = {r.path for r in records if r.mask_path is not None or r.use_alpha}
    if masked:
        lines.append(f"masks: {len(masked)} of {len(_paths(records))} images have one")
    if prior is not None:
        count = len(_paths(prior.records))
        caption = prior.records[0].captions[0]
        lines.append(f"class images: {count} in {_common_folder(prior.records)}, {caption!r}")
    if placeholders:
        words = [f"{own.word} is {describe_tokens(own)}" for own in placeholders]
        lines.append(f"tokens: {'; '.join(words)}")
    lines.append(_describe_length(folder, length))
    root = Path(_common_folder(records))
    for reason, paths in left_out.items():
        lines.append(f"left out, {reason}: {_list_files(paths, root, records)}")
    return printable("\n".join(lines))


def _describe_images(folder: ImageDataset) -> str:
    """The number of images and their sizes."""
    records = folder.records
    what, count = "images", len(_paths(records))
    places = _common_folder(records)
    losers = [record.loser for record in records if record.loser is not None]
    if losers:
        what, count = "pairs", len({record.key for record in records})
        places = f"{places}, losers in {_common_folder(losers)}"
    found = {record.size for record in every_image(records)}
    areas = sorted(found, key=lambda size: (size[0] * size[1], size))
    (low_h, low_w), (high_h, high_w) = areas[0], areas[-1]
    sizes = f"{low_w} x {low_h}"
    if len(areas) > 1:
        sizes += f" to {high_w} x {high_h}"
    repeated = ""
    if len(records) > count:
        repeated = f", {len(records)} with repeats ({_describe_repeats(records)})"
    return f"{what}: {count} in {places}{repeated}, {sizes} pixels"


def _describe_repeats(records: Sequence[Record]) -> str:
    visits = Counter((record.path, record.key) for record in records)
    by_folder = {path.parent: times for (path, _), times in visits.items()}
    if len(by_folder) == 1:
        return f"each x {max(visits.values())}"
    return ", ".join(f"{path.name} x {times}" for path, times in by_folder.items())


def _describe_sources(records: Sequence[Record]) -> str:
    """Where the captions come from, with the number of images where there are several sources."""
    sources = {record.path: _describe_source(record.source) for record in records}
    counts = Counter(sources.values())
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} from {source}" for source, count in counts.items())


def _describe_source(source: Path | str) -> str:
    if isinstance(source, str):
        return source
    return source.name if source.name in METADATA_TABLES else f"{source.suffix.lower()} files"


def _example_caption(record: Record, placeholders: Sequence[Placeholder]) -> str:
    """The first caption of an image, with its placeholder replaced by tokens, and the file name.

    Of words with tokens for each layer the text of the first layer.
    """
    caption = bind_placeholders(record.plain_caption, placeholders)
    short = caption if len(caption) <= LONGEST_CAPTION else caption[:LONGEST_CAPTION] + "..."
    more = f", one of {len(record.captions)}" if len(record.captions) > 1 else ""
    if isinstance(bind_layers(record.plain_caption, placeholders), tuple):
        more += ", in the first layer"
    return f"{short!r} ({record.path.name}{more})"


def _describe_length(folder: ImageDataset, length: RunLength) -> str:
    """The number of steps, of images in a step, and of epochs."""
    images = length.batch * length.accumulation
    if folder.settings.buckets:
        epochs = length.steps / BucketOrder(folder.sizes, images, folder.seed).steps
    else:
        epochs = length.steps * images / len(folder)
    product = f" ({length.batch} x {length.accumulation})" if length.accumulation > 1 else ""
    steps = f"{length.steps:,} step{'s' * (length.steps > 1)}"
    visits = f"{images} {'pair' if folder.has_pairs else 'image'}{'s' * (images > 1)}{product}"
    passes = f"{epochs:,.3g} epoch{'' if f'{epochs:,.3g}' == '1' else 's'}"
    return f"training: {steps} of {visits}, {passes} of {len(folder):,}"


def _list_files(paths: Sequence[Path], root: Path, records: Sequence[Record]) -> str:
    """The first names, sub-folders with the number of their images, and the number of the other
    files.
    """
    taken = _paths(records)
    names = []
    for path in paths[:MOST_NAMES]:
        # A path can be the root itself: a table there names only some of its images.
        is_inside = path.is_relative_to(root) and path != root
        name = path.relative_to(root).as_posix() if is_inside else str(path)
        images = count_images(path, taken) if path.is_dir() else 0
        names.append(f"{name}/ ({images} image{'s' * (images > 1)})" if images else name)
    more = f" and {len(paths) - MOST_NAMES} more" if len(paths) > MOST_NAMES else ""
    return ", ".join(names) + more


def _paths(records: Sequence[Record]) -> list[Path]:
    """The files, each once."""
    return list(dict.fromkeys(record.path for record in records))


def _common_folder(records: Sequence[Record]) -> str:
    """The folder that all of the files are in."""
    first, *others = sorted({record.path.parent for record in records})
    while any(not path.is_relative_to(first) for path in others):
        first = first.parent
    return str(first)
