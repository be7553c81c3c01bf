"""The checkpoints of a run as an axis of a grid of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lora_core.errors import UserError
from lora_core.escaped_output import print_note
from lora_core.runs.image_grid import MOST_VALUES, Axis
from lora_core.runs.loras import LoraSource, lora_text, parse_lora
from lora_core.runs.report_images import evenly_chosen


def find_checkpoints(axis: Axis, given: Sequence[LoraSource] = ()) -> Axis:
    """The axis checkpoint=RUN with the checkpoints of the run in their order, and its end; another
    axis as it is.

    Each is a folder, of which `formats.load` finds the LoRA and the tokens. The checkpoint that a
    run writes after its last step is its end, and is shown once. Raises UserError for a folder with
    neither, and for a run that is also among the LoRAs `given`, which would act twice.
    """
    if not axis.run:
        return axis
    source = parse_lora(axis.run, "--grid checkpoint=")
    folder = Path(source.path)
    found = [path for path in folder.glob("checkpoints/*") if path.name.isdecimal()]
    by_step = {int(path.name): path for path in found if any(path.glob("*.safetensors"))}
    names = {f"step {step}": by_step[step] for step in sorted(by_step)}
    if any(folder.glob("[!.]*.safetensors")):
        last = _finished_steps(folder)
        if last is not None:
            names.pop(f"step {last}", None)
        names["end" if last is None else f"step {last}, the end"] = folder
    if not names:
        raise UserError(
            f"--grid checkpoint={axis.run}: {folder} is no run with checkpoints or files; name the "
            "folder that train.py wrote (--out)"
        )
    for lora in given:
        if Path(lora.path).resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"--grid checkpoint={axis.run} and --lora {lora.path} would both act on every "
                "image; leave --lora out"
            )
    chosen = evenly_chosen(list(names), MOST_VALUES)
    if len(chosen) < len(names):
        print_note(f"{len(chosen)} of {len(names)} checkpoints of {folder}, evenly chosen")
    loras = [lora_text(source._replace(path=str(names[name]))) for name in chosen]
    values = [float(place) for place in range(len(chosen))]
    return Axis(axis.setting, values, axis.run, tuple(chosen), tuple(loras))


def _finished_steps(folder: Path) -> int | None:
    """The steps of a finished run, from its summary.json."""
    try:
        steps = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None
