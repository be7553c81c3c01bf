"""What a run is about to do, in a few lines before it begins: images, captions, masks, tokens, steps, and files that are left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_core.data.dataset import ImageDataset
from lora_core.data.listing import METADATA_TABLES, count_images
from lora_core.data.records import Record
from lora_core.data.sample_order import BucketOrder
from lora_core.errors import printable
from lora_core.tokens import Placeholder, bind_placeholders

NAMES = 3  # files of a kind that are named
LONGEST = 160  # characters of the example caption


class RunLength(NamedTuple):
    """How long a run is."""

    steps: int
    batch: int  # images in one forward pass
    accumulation: int  # forward passes for one step


def describe_run(
    folder: ImageDataset,
    prior: ImageDataset | None,
    abstractions: Sequence[Placeholder],
    length: RunLength,
    left_out: Mapping[str, Sequence[Path]],
) -> str:
    """The lines that are printed before training. `left_out`: reason -> files that nothing reads (`records.find_unused_files`)."""
    lines = [
        _images(folder),
        f"captions: {_sources(folder.records)}",
        f"  as trained: {_example(folder.records[0], abstractions)}",
    ]
    masked = {
        record.path for record in folder.records if record.mask_path is not None or record.use_alpha
    }
    if masked:
        lines.append(f"masks: {len(masked)} of {len(_paths(folder.records))} images have one")
    if prior is not None:
        lines.append(
            f"class images: {len(_paths(prior.records))} in {_place(prior.records)}, {prior.records[0].captions[0]!r}"
        )
    if abstractions:
        lines.append(
            "tokens: " + ", ".join(f"{a.word} is {''.join(a.names)}" for a in abstractions)
        )
    lines.append(_epochs(folder, length))
    root = Path(_place(folder.records))
    lines += [
        f"left out, {why}: {_named(paths, root, folder.records)}" for why, paths in left_out.items()
    ]
    return printable("\n".join(lines))


def _images(folder: ImageDataset) -> str:
    """How many images of which sizes."""
    records = folder.records
    count, areas = (
        len(_paths(records)),
        sorted({record.size for record in records}, key=lambda size: (size[0] * size[1], size)),
    )
    (low_h, low_w), (high_h, high_w) = areas[0], areas[-1]
    sizes = f"{low_w} x {low_h}" if len(areas) == 1 else f"{low_w} x {low_h} to {high_w} x {high_h}"
    visits = Counter(record.path for record in records)
    repeated = ""
    if len(records) > count:
        by_folder = {path.parent: times for path, times in visits.items()}
        often = (
            ", ".join(f"{path.name} x {times}" for path, times in by_folder.items())
            if len(by_folder) > 1
            else f"each x {max(visits.values())}"
        )
        repeated = f", {len(records)} with repeats ({often})"
    return f"images: {count} in {_place(records)}{repeated}, {sizes} pixels"


def _sources(records: Sequence[Record]) -> str:
    """Where the captions come from, with the number of images where there are several sources."""
    sources = {record.path: _source(record.source) for record in records}
    counts = Counter(sources.values())
    return (
        ", ".join(counts)
        if len(counts) == 1
        else ", ".join(f"{count} from {source}" for source, count in counts.items())
    )


def _source(source: Path | str) -> str:
    if isinstance(source, str):
        return source
    return source.name if source.name in METADATA_TABLES else f"{source.suffix.lower()} files"


def _example(record: Record, abstractions: Sequence[Placeholder]) -> str:
    caption = bind_placeholders(record.captions[0], abstractions)
    short = caption if len(caption) <= LONGEST else caption[:LONGEST] + "..."
    more = f", one of {len(record.captions)}" if len(record.captions) > 1 else ""
    return f"{short!r} ({record.path.name}{more})"


def _epochs(folder: ImageDataset, length: RunLength) -> str:
    """How many steps of how many images, and how often that is all of them."""
    images = length.batch * length.accumulation
    if folder.settings.buckets:
        epochs = length.steps / BucketOrder(folder.sizes, images, folder.seed).steps
    else:
        epochs = length.steps * images / len(folder)
    how = f" ({length.batch} x {length.accumulation})" if length.accumulation > 1 else ""
    steps = f"{length.steps:,} step{'s' * (length.steps > 1)} of {images} image{'s' * (images > 1)}{how}"
    return f"training: {steps}, {epochs:,.3g} epochs of {len(folder):,}"


def _named(paths: Sequence[Path], root: Path, records: Sequence[Record]) -> str:
    """The first names and the number of the others; of sub-folders with the number of their images."""
    taken, names = _paths(records), []
    for path in paths[:NAMES]:
        inside = (
            path.is_relative_to(root) and path != root
        )  # the folder itself: a table names some of its images
        name = path.relative_to(root).as_posix() if inside else str(path)
        images = count_images(path, taken) if path.is_dir() else 0
        names.append(f"{name}/ ({images} image{'s' * (images > 1)})" if images else name)
    return ", ".join(names) + (f" and {len(paths) - NAMES} more" if len(paths) > NAMES else "")


def _paths(records: Sequence[Record]) -> list[Path]:
    """The files, each once."""
    return list(dict.fromkeys(record.path for record in records))


def _place(records: Sequence[Record]) -> str:
    """The folder that all of the files are in."""
    first, *others = sorted({record.path.parent for record in records})
    while any(not path.is_relative_to(first) for path in others):
        first = first.parent
    return str(first)
