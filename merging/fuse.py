"""merge.py fuse: the LoRAs of several concepts in one model, each kept on its own prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.escaped_output import print_note
from lora_core.family import Family, LoadOptions
from lora_core.formats.model_words import model_placeholders
from lora_core.runs.loras import read_run_settings
from merging.adapter_sums import Term
from merging.base_models import BaseModel, model_configs, open_base_model
from merging.commands import DrawingOptions, Fuse
from merging.concept_fusion import Fusion, FusionSettings, LayerFit, fuse_concepts
from merging.concepts import Concept, add_prompts, join_concepts, prompt_texts, read_concepts
from merging.folding import FoldStatistics, fold_adapters
from merging.model_sums import (
    is_single_file_name,
    print_fold_table,
    token_file_output,
    write_diffusers_folder,
    write_model_file,
)
from merging.model_tokens import known_tokens
from merging.output import align_columns, check_output, make_output, print_warning, print_written
from merging.stored_layers import LayerKey
from merging.token_names import TakenNames
from models import choose_device, load_family

LEAST_KEPT = 0.5  # below this share of a concept's outputs in a step a warning is printed


def run_fuse(options: Fuse) -> None:
    """Writes the model of several concepts. Raises UserError before anything is written."""
    if not options.base:
        raise UserError("--base is required: the model that the concepts were trained on")
    _refuse_idle_options(options)
    if not 0 <= options.ridge < math.inf:
        raise UserError(f"--ridge {options.ridge:g} is not 0 or more; 0.001 is the default")
    if not 0 < options.pull < math.inf:
        raise UserError(f"--pull {options.pull:g} is not a number above 0; 0.3 is the default")
    if not options.drawing.memory > 0:
        raise UserError(f"--memory {options.drawing.memory:g} is not a number of gigabytes above 0")
    options = replace(options, prompts=prompt_texts(options.prompts))
    base = open_base_model(options.base, options.files)
    concepts = read_concepts(options.concepts, base.layout, options.files)
    output = make_output("fuse", options, [options.base, *(own.path for own in concepts)])
    is_file = is_single_file_name(output.path)
    check_output(output, folder=not is_file)
    with model_configs(base, options.files) as configs:
        taken = TakenNames(known_tokens(configs, base.layout), _base_words(base))
        concepts, learned, notes = join_concepts(concepts, taken)
        for note in notes:
            print_note(note)
        token_file_output(learned, output)  # raises before minutes of drawing
        terms = [concept.term for concept in concepts]
        if options.how != "sum":
            concepts = add_prompts(concepts, options.prompts)
            fusion = _fuse_on_model(options, base, concepts, learned)
            parameters = [replace(term.state, components={}) for term in terms]
            kept = [term._replace(state=own) for term, own in zip(terms, parameters)]
            terms = [Term(fusion.state()), *kept]
        statistics = FoldStatistics()
        weighted = [(1.0, base.model)]
        model = fold_adapters(weighted, terms, base.layout, statistics, dtype=output.dtype)
        if is_file:
            written = write_model_file(model, base, learned, output)
        else:
            written = write_diffusers_folder(model, base, learned, output, configs)
    print_fold_table(statistics, terms)
    print_written(written, output)


def _fuse_on_model(
    options: Fuse, base: BaseModel, concepts: Sequence[Concept], learned: AdapterState
) -> Fusion:
    """The fused updates; prints how well each concept's outputs are kept."""
    paths = [concept.path for concept in concepts]
    drawing = options.drawing
    settings = FusionSettings(
        drawing.steps,
        drawing.images,
        drawing.seed,
        drawing.resolution,
        1e9 * drawing.memory,
        options.ridge,
        options.pull if options.how == "corrected" else 0.0,
    )
    family = _load_model(options, base, paths)
    fusion = fuse_concepts(family, concepts, learned, settings)
    for number, concept in enumerate(concepts, 1):
        shown = ", ".join(map(repr, concept.prompts))
        print(f"C{number} = {concept.path}, recorded with {shown}")
    print(fit_table(fusion, len(concepts)))
    _warn_of_losses(fusion, paths)
    return fusion


def _load_model(options: Fuse, base: BaseModel, paths: Sequence[str]) -> Family:
    """The base model in fp32, with the settings that the concepts were trained with."""
    run = read_run_settings(paths)
    if run.scheduler or run.text:
        print_note(f"drawing with {run.scheduler | run.text}, as the concepts were trained")
    how = LoadOptions(
        device=choose_device(options.drawing.device),
        scheduler=run.scheduler,
        clip_skip=run.text.get("clip_skip", 0),
        max_sequence_length=run.text.get("max_sequence_length", 0),
        max_token_length=run.text.get("max_token_length", 0),
        config="" if base.folder else options.files.model_config,
    )
    return load_family(str(base.folder or base.path), how)


def fit_table(fusion: Fusion, concepts: int) -> str:
    """Layers, inputs, worst condition number, and what is kept of each concept, by step.

    kept = 1 - |X_c (D - D_c)^T|^2 / |X_c D_c^T|^2 over all layers of a step, for the fused update D
    and for the sum of updates.
    """
    titles = []
    for number in range(1, concepts + 1):
        titles += [f"C{number} kept", "by sum"]
    rows = [("", "layers", "inputs", "condition", *titles)]
    worst: tuple[float, str] = 0.0, ""
    for step, fits in fusion.fits.items():
        if not fits:
            continue
        condition, layer = max((fit.condition, ".".join(key)) for key, fit in fits.items())
        worst = max(worst, (condition, layer))
        cells = [step, str(len(fits)), str(min(fit.samples for fit in fits.values()))]
        cells.append(f"{condition:.1e}")
        for number in range(concepts):
            cells += [_percent(share) for share in shares_kept(fits, number)]
        rows.append(tuple(cells))
    lines = align_columns(rows)
    return "\n".join([*lines, f"largest condition number of inputs: {worst[0]:.1e}, {worst[1]}"])


def shares_kept(fits: Mapping[LayerKey, LayerFit], concept: int) -> tuple[float, float]:
    """(what the fused layers keep of a concept's outputs, what the sum of updates keeps).

    1 for a concept that changes none of the layers.
    """
    energy = sum(fit.energies[concept] for fit in fits.values())
    if not energy:
        return 1.0, 1.0
    residual = sum(fit.residuals[concept] for fit in fits.values())
    summed = sum(fit.summed[concept] for fit in fits.values())
    return 1 - residual / energy, 1 - summed / energy


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _warn_of_losses(fusion: Fusion, paths: Sequence[str]) -> None:
    for step, fits in fusion.fits.items():
        for number, path in enumerate(paths):
            share = shares_kept(fits, number)[0]
            if share < LEAST_KEPT:
                print_warning(
                    f"only {_percent(share)} of what {path} does in the step {step} is kept: its "
                    "inputs there are much like those of the others, or far fewer"
                )


def _refuse_idle_options(options: Fuse) -> None:
    """Raises UserError for options that the chosen method does not read."""
    usual = Fuse()
    idle = []
    for name, how in (("ridge", "gradient"), ("pull", "corrected")):
        if getattr(options, name) != getattr(usual, name) and options.how != how:
            idle.append((f"--{name}", f"it belongs to --how {how}"))
    if options.how == "sum":
        idle += [("--prompts", "nothing is drawn")] if options.prompts else []
        for option in fields(DrawingOptions):
            if getattr(options.drawing, option.name) != option.default:
                idle.append((f"--{option.name}", "nothing is drawn"))
    for flag, why in idle:
        raise UserError(f"{flag} has no effect with --how {options.how}, {why}; leave it out")


def _base_words(base: BaseModel) -> list[str]:
    """The placeholder words that the base model has already."""
    return [own.word for own in model_placeholders(base.folder)] if base.folder else []
