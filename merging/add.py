"""merge.py add: cloneofsimo's lora_add, mode by mode.

lpl          LoRA + LoRA by its lossy formula (a1 B1 + a2 B2)(a1 A1 + a2 A2), with a warning; .pt
             lists are added by position, as in that tool
ljl          LoRA + LoRA joined exactly; tokens become <s0-0>, <s1-0> ..., the file's number first
upl          model + alpha_1 * LoRA as a folder in the diffusers layout, tokens in its tokenizer and
             text encoder
upl-ckpt-v2  the same as a CompVis .ckpt in half precision, and A1111's embedding of the tokens next
             to it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.formats.embedding_pickles import write_pickled_embedding
from lora_core.formats.pickles import write_pickle
from lora_core.formats.training_metadata import join_metadata
from lora_core.text import is_number
from merging.adapter_sums import (
    DenseOptions,
    LayerKey,
    Term,
    has_magnitude,
    layers_by_key,
    lpl_layers,
)
from merging.commands import ADD_USAGE, DEFAULT_ALPHA, Add, KeepOptions, MergeMethod, OpenOptions
from merging.expression import WeightedFile, quote_where_needed
from merging.factor_sums import LPL_WARNING, inner_product
from merging.mix import merge_terms, output_order
from merging.opening import (
    choose_output_format,
    describe_path,
    find_model,
    is_whole_model,
    needs_layout,
    open_adapter,
    open_adapters,
)
from merging.output import (
    Output,
    check_adapter_output,
    check_output,
    make_output,
    print_note,
    print_warning,
    print_written,
    report_table,
    round_adapter,
    settle_format,
    store_scales,
    write_adapter,
)
from merging.parameter_sums import sum_parameters
from merging.pt_lists import compare_with_sum, lpl_of_lists
from merging.stored_layers import stored_layers
from merging.token_names import describe_whole_rows, join_tokens
from merging.truncation import ApproximationReport

SAME_COSINE = 0.999  # of two updates: rounding to bf16 turns them by less


@dataclass(frozen=True)
class LoraAddition:
    """The arguments of lora_add."""

    path_1: str
    path_2: str
    alpha_1: float | None = None
    alpha_2: float | None = None
    mode: str = "lpl"
    with_text_lora: bool = False
    residual: str = ""

    @property
    def paths(self) -> tuple[str, str]:
        return self.path_1, self.path_2

    @property
    def alphas(self) -> tuple[float, float]:
        """Both weights, the default for one that is not given."""
        first = DEFAULT_ALPHA if self.alpha_1 is None else self.alpha_1
        return first, DEFAULT_ALPHA if self.alpha_2 is None else self.alpha_2

    @property
    def is_list_pair(self) -> bool:
        """Whether both files are cloneofsimo's .pt lists, which lpl adds by position."""
        return self.mode == "lpl" and all(path.endswith(".pt") for path in self.paths)


def run_add(options: Add) -> None:
    """Carries out one mode. Raises UserError before anything is written."""
    options = _place_words(options)
    alphas = []
    for text in (options.alpha_1, options.alpha_2):
        alphas.append(_parse_alpha(text) if text else None)
    job = LoraAddition(
        options.path_1,
        options.path_2,
        alphas[0],
        alphas[1],
        options.mode,
        options.with_text_lora,
        options.residual,
    )
    output = make_output("add", options, job.paths)
    _check_arguments(job)
    if job.is_list_pair:
        _add_pt_lists(job, output)
    elif job.mode == "lpl":
        _add_lpl(job, output, options.files)
    elif job.mode == "ljl":
        _join_ljl(job, output, options.files)
    else:
        _add_to_model(job, output, options.files)


def _place_words(options: Add) -> Add:
    """The options with the positional words in the fields without a flag, as python-fire does."""
    names = ("path_1", "path_2", "out", "alpha_1", "alpha_2")
    free = [name for name in names if not getattr(options, name)]
    twice = dict(zip(free, options.words)).get("alpha_1", "")
    if options.out and twice and not is_number(twice):
        raise UserError(
            f"the output is given twice, as {twice} and as --out {options.out}; give one of them"
        )
    if len(options.words) > len(free):
        surplus = options.words[len(free)]
        raise UserError(f"add takes {ADD_USAGE}, got {surplus!r} in addition")
    given: dict[str, Any] = dict(zip(free, options.words))
    options = replace(options, words=(), **given)
    if not (options.path_1 and options.path_2 and options.out):
        raise UserError(f"add takes {ADD_USAGE}, one of these is missing")
    return options


def _parse_alpha(text: str) -> float:
    if not is_number(text):
        raise UserError(f"the alpha {text!r} is not a number; add takes {ADD_USAGE}")
    return float(text)


def _check_arguments(job: LoraAddition) -> None:
    if job.mode == "ljl" and (job.alpha_1 is not None or job.alpha_2 is not None):
        raise UserError(
            "ljl joins both files at full strength and takes no alphas; mix takes weights: "
            'merge.py mix "0.7*a + 0.3*b" --out c'
        )
    if job.mode.startswith("upl") and job.alpha_2 is not None:
        raise UserError(f"{job.mode} adds one LoRA to a model and takes one alpha; drop ALPHA_2")
    if job.residual and not job.mode.startswith("upl"):
        raise UserError(
            f"--residual is for upl, where weights are rounded; {job.mode} has nothing of the kind"
        )
    if job.with_text_lora and not job.is_list_pair:
        print_note(
            "--with_text_lora changes nothing here: layers of the text encoder are always merged, "
            "except in .pt lists"
        )
    if job.mode in ("lpl", "ljl"):
        for path in job.paths:
            if is_whole_model(path):
                raise UserError(
                    f"{path} is a whole model and {job.mode} adds LoRA files; choose --mode upl"
                )


# ---------------------------------------------------------------- LoRA + LoRA


def _add_lpl(job: LoraAddition, output: Output, reading: OpenOptions) -> None:
    check_adapter_output(output)
    layout, reading = find_model(job.paths, reading, needed=needs_layout(output.format))
    output = output.with_model(reading.model)
    first, second = open_adapters(job.paths, layout, reading)
    weight_1, weight_2 = job.alphas
    _print_lpl_warning(job)
    state = lpl_layers(first, second, weight_1, weight_2)
    state.parameters = sum_parameters([Term(first, weight_1), Term(second, weight_2)])
    _warn_of_same_update(first, second, state, job.alphas)
    reports: dict[LayerKey, ApproximationReport] = {}
    for component, adapters in state.components.items():
        for path, lr in adapters.items():
            pair = first.components[component][path], second.components[component][path]
            report = compare_with_sum(lr, pair, job.alphas)
            adapters[path], reports[component, path] = round_adapter(lr, report, output.dtype)
    tokens, notes = join_tokens([first, second], job.paths)
    notes += describe_whole_rows([first, second], job.paths, job.alphas)
    _set_tokens(state, [first, second], job, tokens, notes)
    output = settle_format(
        output, layers=True, tokens=bool(state.tokens), default=choose_output_format(job.paths)
    )
    for note in output_order(state, [first, second], job.paths, output, layout):
        print_note(note)
    exact = f"the exact sum {weight_1:g}*a + {weight_2:g}*b"
    state, reports = store_scales(state, reports, output, layout)
    reports = stored_layers(output.format, layout).join_reports(reports, state)
    written = write_adapter(state, output, layout)
    print(report_table(reports, extra=f"the error is against {exact}"))
    print_written(written, output)


def _join_ljl(job: LoraAddition, output: Output, reading: OpenOptions) -> None:
    check_adapter_output(output)
    layout, reading = find_model(job.paths, reading, needed=needs_layout(output.format))
    output = output.with_model(reading.model)
    states = open_adapters(job.paths, layout, reading)
    if any(has_magnitude(state) for state in states):
        raise UserError(
            "ljl joins plain LoRAs and one of these files is a DoRA; mix takes it, with the base "
            "model's weights: --model MODEL"
        )
    tokens = any(state.tokens for state in states)
    output = settle_format(
        output, layers=True, tokens=tokens, default=choose_output_format(job.paths)
    )
    terms = [Term(state) for state in states]
    own = DenseOptions(), stored_layers(output.format, layout)
    state, reports, _ = merge_terms(terms, KeepOptions(), MergeMethod(), output.dtype, *own)
    order = [sorted(own.token_names) for own in states]
    joined, notes = join_tokens(
        states, ["0", "1"], lambda i, _, name: f"<s{i}-{order[i].index(name)}>"
    )
    _set_tokens(state, states, job, joined, notes)
    for note in output_order(state, states, job.paths, output, layout):
        print_note(note)
    state, reports = store_scales(state, reports, output, layout)
    written = write_adapter(state, output, layout)
    print(report_table(reports))
    print_written(written, output)


def _add_pt_lists(job: LoraAddition, output: Output) -> None:
    """Adds .pt lists by position, as cloneofsimo's tool does.

    Lists of different lengths or shapes are refused, where that tool drops the surplus.
    """
    if Path(output.path).suffix != ".pt":
        raise UserError(
            f"two .pt lists give a .pt list; the output {output.path} should end in .pt"
        )
    files = {"unet": (Path(job.path_1), Path(job.path_2), Path(output.path))}
    if job.with_text_lora:
        first, second, out = [path.with_suffix(".text_encoder.pt") for path in files["unet"]]
        missing = [str(path) for path in (first, second) if not path.is_file()]
        if missing:
            print_note(f"{' and '.join(missing)} is not there, so no text encoder is merged")
        else:
            files["text_encoder"] = (first, second, out)
    _print_lpl_warning(job)
    sums: dict[Path, list[Tensor]] = {}
    reports: dict[LayerKey, ApproximationReport] = {}
    for name, (first, second, out) in files.items():
        check_output(replace(output, path=str(out)))
        sums[out], own = lpl_of_lists(first, second, name, job.alphas, output.dtype)
        reports |= own
    if output.dry_run:
        sums = {}
    for out, tensors in sums.items():
        write_pickle(out, tensors)
    print(report_table(reports, extra="the error is against the exact sum"))
    print_written(sums, output)


def _set_tokens(
    state: AdapterState,
    inputs: Sequence[AdapterState],
    job: LoraAddition,
    tokens: AdapterState,
    notes: list[str],
) -> None:
    """Gives the sum its tokens and header, and prints the notes."""
    state.tokens, state.token_names = tokens.tokens, tokens.token_names
    metadata, left_out = join_metadata(inputs, job.paths)
    state.metadata = metadata | tokens.metadata
    for note in left_out + notes:
        print_note(note)


def _print_lpl_warning(job: LoraAddition) -> None:
    a, b = job.alphas
    first, second = map(quote_where_needed, job.paths)
    mix = f'merge.py mix "{a:g}*{first} + {b:g}*{second}" --out ...'
    print_warning(f"{LPL_WARNING}: {mix}")


def _warn_of_same_update(
    first: AdapterState, second: AdapterState, merged: AdapterState, alphas: tuple[float, float]
) -> None:
    """Says how many times lpl gives an update that both files hold: not the sum of the weights."""
    square, shared = _inner_product(first, first), _inner_product(first, second)
    sizes = (square * _inner_product(second, second)) ** 0.5
    if sizes and shared / sizes >= SAME_COSINE:
        times = _inner_product(merged, first) / square
        exact = alphas[0] + alphas[1] * shared / square
        print_warning(
            f"both files hold the same update (cosine {shared / sizes:.4f}), which lpl gives "
            f"{times:.3g} times; the sum would be {exact:.3g} times"
        )


def _inner_product(first: AdapterState, second: AdapterState) -> float:
    """The inner product of two adapters as one vector of all layers, which both have."""
    others = layers_by_key(second)
    total = 0.0
    for key, lr in layers_by_key(first).items():
        total += inner_product(lr, others[key])
    return total


# ---------------------------------------------------------------- model + LoRA


def _add_to_model(job: LoraAddition, output: Output, reading: OpenOptions) -> None:
    # imports the networks' libraries
    from merging.base_models import open_base_model
    from merging.model_sums import FoldOptions, write_model_sum

    if not is_whole_model(job.path_1):
        raise UserError(
            f"{job.mode} adds a LoRA to a model, and {job.path_1} is {describe_path(job.path_1)}; "
            "give a folder in the diffusers layout or a hub id first"
        )
    if is_whole_model(job.path_2):
        raise UserError(
            f"{job.path_2} is a whole model where a LoRA is expected; mix adds models: "
            'merge.py mix "0.6*A + 0.4*B" --out C'
        )
    files = [WeightedFile(1.0, job.path_1), WeightedFile(job.alphas[0], job.path_2)]
    if job.mode == "upl":
        write_model_sum(files, output, reading, FoldOptions(job.residual, folder=True))
        return
    if Path(output.path).suffix != ".ckpt":
        raise UserError(
            f"upl-ckpt-v2 writes a CompVis checkpoint; the output {output.path} should end in .ckpt"
        )
    state = open_adapter(job.path_2, open_base_model(job.path_1, reading).layout, reading)
    # A1111's embedding has one encoder's rows, the same in all layers
    is_plain = len(state.tokens) == 1 and not embeddings.word_layers(state)
    embedding = Path(output.path).with_suffix(".pt") if is_plain else None
    if embedding:
        check_output(replace(output, path=str(embedding)))
    output = replace(output, dtype=output.dtype or torch.float16)
    fold = FoldOptions(job.residual, tokens=embedding is None)
    write_model_sum(files, output, reading, fold)
    if embedding and not output.dry_run:
        _write_embedding(state, embedding)


def _write_embedding(state: AdapterState, path: Path) -> None:
    """Writes A1111's file of token rows, in the order of the tokens' names."""
    order = sorted(range(len(state.token_names)), key=lambda i: state.token_names[i])
    names = tuple(state.token_names[i] for i in order)
    rows = {key: value[order] for key, value in state.tokens.items()}
    header = embeddings.placeholder_header({path.stem: names})
    own = AdapterState(tokens=rows, token_names=names, metadata=header)
    write_pickled_embedding(own, path)
    print(f"written: {path}; put it into the embeddings folder, {path.stem} is its word in prompts")
