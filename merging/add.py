"""cloneofsimo's lora_add, mode by mode.

lpl          LoRA + LoRA by its lossy formula (a1 B1 + a2 B2)(a1 A1 + a2 A2), with a warning; .pt lists go by position, as there
ljl          LoRA + LoRA joined exactly; tokens become <s0-0>, <s1-0> ..., the file's number first
upl          model + alpha_1 * LoRA as a folder in the diffusers layout, tokens in its tokenizer and text encoder
upl-ckpt-v2  the same as a CompVis .ckpt in half precision, and A1111's embedding of the tokens beside it
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.formats.container import check_finite
from lora_core.formats.embedding_pickles import write_pickled_embedding
from lora_core.formats.pickles import read_pickle
from lora_core.runs.run_folder import atomic_write
from merging.adapter_sums import DenseOptions, LayerKey, Term, lpl_layers
from merging.compare import frobenius_norm
from merging.expression import WeightedFile
from merging.factor_sums import LPL_WARNING, concat_factors, lpl
from merging.mix import KeepOptions, MergeMethod, join_tokens, merge_terms
from merging.model_sums import FoldOptions, write_model_sum
from merging.opening import (
    OpenOptions,
    choose_output_format,
    find_layout,
    is_whole_model,
    open_adapter,
    open_base_model,
)
from merging.output import (
    Output,
    check_adapter_output,
    check_output,
    print_note,
    print_warning,
    print_written,
    report_table,
    round_adapter,
    write_adapter,
)
from merging.svd import ApproximationReport

ADD_MODES = ("lpl", "ljl", "upl", "upl-ckpt-v2")
DEFAULT_ALPHA = 0.5  # the seed's default of both


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


def add_files(job: LoraAddition, output: Output, reading: OpenOptions) -> None:
    """Carries out one mode. Raises UserError before anything is written, also for arguments that the mode does not use."""
    if job.mode not in ADD_MODES:
        raise UserError(f"--mode {job.mode} is unknown; choose {', '.join(ADD_MODES)}")
    pt = job.mode == "lpl" and all(path.endswith(".pt") for path in (job.path_1, job.path_2))
    _check_arguments(job, pt)
    if pt:
        _add_pt_lists(job, output)
    elif job.mode == "lpl":
        _add_lpl(job, output, reading)
    elif job.mode == "ljl":
        _join_ljl(job, output, reading)
    else:
        _add_to_model(job, output, reading)


def _check_arguments(job: LoraAddition, pt: bool) -> None:
    if job.mode == "ljl" and (job.alpha_1 is not None or job.alpha_2 is not None):
        raise UserError(
            'ljl joins both files at full strength and takes no alphas; mix takes weights: merge.py mix "0.7*a + 0.3*b" --out c'
        )
    if job.mode.startswith("upl") and job.alpha_2 is not None:
        raise UserError(f"{job.mode} adds one LoRA to a model and takes one alpha; drop ALPHA_2")
    if job.residual and not job.mode.startswith("upl"):
        raise UserError(
            f"--residual is for upl, where weights are rounded; {job.mode} has nothing of the kind"
        )
    if job.with_text_lora and not pt:
        print_note(
            "--with_text_lora changes nothing here: layers of the text encoder are always merged, except in .pt lists"
        )
    if job.mode in ("lpl", "ljl"):
        for path in (job.path_1, job.path_2):
            if is_whole_model(path):
                raise UserError(
                    f"{path} is a whole model and {job.mode} adds LoRA files; choose --mode upl"
                )


def _both_alphas(job: LoraAddition) -> tuple[float, float]:
    return tuple(DEFAULT_ALPHA if alpha is None else alpha for alpha in (job.alpha_1, job.alpha_2))  # type: ignore[return-value]


# ---------------------------------------------------------------- LoRA + LoRA


def _add_lpl(job: LoraAddition, output: Output, reading: OpenOptions) -> None:
    check_adapter_output(output)
    paths = (job.path_1, job.path_2)
    layout = find_layout(paths, reading)
    first, second = (open_adapter(path, layout, reading) for path in paths)
    alphas = _both_alphas(job)
    _print_lpl_warning(job, "same" if _hold_same_update(first, second) else "")
    state = lpl_layers(first, second, *alphas)
    reports: dict[LayerKey, ApproximationReport] = {}
    for component, rows in state.components.items():
        for path, lr in rows.items():
            pair = first.components[component][path], second.components[component][path]
            rows[path], reports[component, path] = round_adapter(
                lr, _compare_with_sum(lr, pair, alphas), output.dtype
            )
    tokens, said = join_tokens([first, second], paths)
    state.tokens, state.token_names, state.metadata = (
        tokens.tokens,
        tokens.token_names,
        tokens.metadata,
    )
    for line in said:
        print_note(line)
    output = replace(output, format=output.format or choose_output_format(paths))
    check_adapter_output(output, tokens=bool(state.tokens))
    print(
        report_table(
            reports, extra=f"the error is against the exact sum {alphas[0]:g}*a + {alphas[1]:g}*b"
        )
    )
    print_written(write_adapter(state, output, layout), output)


def _join_ljl(job: LoraAddition, output: Output, reading: OpenOptions) -> None:
    check_adapter_output(output)
    paths = (job.path_1, job.path_2)
    layout = find_layout(paths, reading)
    states = [open_adapter(path, layout, reading) for path in paths]
    if any(
        lr.magnitude is not None
        for state in states
        for rows in state.components.values()
        for lr in rows.values()
    ):
        raise UserError(
            "ljl joins plain LoRAs and one of these files is a DoRA; mix takes it, with the base model's weights: --model MODEL"
        )
    output = replace(output, format=output.format or choose_output_format(paths))
    state, reports = merge_terms(
        [Term(own) for own in states], KeepOptions(), MergeMethod(), output, DenseOptions()
    )
    order = [sorted(own.token_names) for own in states]
    tokens, said = join_tokens(
        states, [str(i) for i in range(2)], lambda i, _, name: f"<s{i}-{order[i].index(name)}>"
    )
    state.tokens, state.token_names, state.metadata = (
        tokens.tokens,
        tokens.token_names,
        tokens.metadata,
    )
    for line in said:
        print_note(line)
    check_adapter_output(output, tokens=bool(state.tokens))
    print(report_table(reports))
    print_written(write_adapter(state, output, layout), output)


def _add_pt_lists(job: LoraAddition, output: Output) -> None:
    """By position, as the seed does; lists of different lengths or shapes are refused, where it drops the surplus."""
    if Path(output.path).suffix != ".pt":
        raise UserError(
            f"two .pt lists give a .pt list; the output {output.path} should end in .pt"
        )
    files = [(Path(job.path_1), Path(job.path_2), Path(output.path))]
    if job.with_text_lora:
        text = tuple(path.with_suffix(".text_encoder.pt") for path in files[0])
        if all(path.is_file() for path in text[:2]):
            files.append(text)  # type: ignore[arg-type]
        else:
            print_note(
                f"{' and '.join(str(path) for path in text[:2] if not path.is_file())} is not there, so no text encoder is merged"
            )
    _print_lpl_warning(job, "")
    done: list[tuple[Path, list[Tensor]]] = []
    reports: dict[LayerKey, ApproximationReport] = {}
    for first, second, out in files:
        check_output(replace(output, path=str(out)))
        name = "text_encoder" if out is not files[0][2] else "unet"
        tensors, own = _lpl_of_lists(first, second, name, _both_alphas(job))
        reports |= own
        done.append((out, tensors))
    print(report_table(reports, extra="the error is against the exact sum"))
    for out, tensors in [] if output.dry_run else done:
        with atomic_write(out) as temporary, temporary.open("wb") as opened:
            torch.save(
                [tensor if output.dtype is None else tensor.to(output.dtype) for tensor in tensors],
                opened,
            )
    print_written([] if output.dry_run else [out for out, _ in done], output)


def _lpl_of_lists(
    first: Path, second: Path, name: str, alphas: tuple[float, float]
) -> tuple[list[Tensor], dict[LayerKey, ApproximationReport]]:
    """[up, down, up, ...] of the lossy sum, and the reports by number."""
    a, b = _read_pt_list(first), _read_pt_list(second)
    if len(a) != len(b):
        raise UserError(
            f"{first} has {len(a) // 2} layers, {second} {len(b) // 2}; lpl needs the same, mix takes any (with --model)"
        )
    tensors: list[Tensor] = []
    reports: dict[LayerKey, ApproximationReport] = {}
    for i in range(0, len(a), 2):
        pair = LowRank(a[i + 1], a[i], 1.0), LowRank(b[i + 1], b[i], 1.0)
        try:
            merged_pair = lpl(*pair, *alphas)
        except UserError as error:
            raise UserError(f"layer {i // 2}: {error}") from None
        reports[name, str(i // 2)] = _compare_with_sum(merged_pair, pair, alphas)
        tensors += [part.to(a[i].dtype).clone() for part in (merged_pair.up, merged_pair.down)]
    return tensors, reports


def _read_pt_list(path: Path) -> list[Tensor]:
    if not path.is_file():
        raise UserError(f"{path} is not there; give a LoRA file")
    data = read_pickle(path)
    if (
        not isinstance(data, list)
        or len(data) % 2
        or not data
        or not all(isinstance(part, Tensor) and part.is_floating_point() for part in data)
    ):
        raise UserError(
            f"{path} is no list of up and down factors; give a LoRA saved by cloneofsimo's tools"
        )
    check_finite({str(i): part for i, part in enumerate(data)}, str(path))
    return data


def _compare_with_sum(
    lr: LowRank, pair: tuple[LowRank, LowRank], alphas: tuple[float, float]
) -> ApproximationReport:
    """How far the lossy sum is from the exact one."""
    exact = concat_factors(list(zip(alphas, pair)))
    size, lost = frobenius_norm(exact), frobenius_norm(concat_factors([(1.0, exact), (-1.0, lr)]))
    return ApproximationReport(lr.rank, exact.rank, size, lost)


def _print_lpl_warning(job: LoraAddition, case: str) -> None:
    a, b = _both_alphas(job)
    print_warning(
        f'{LPL_WARNING}: merge.py mix "{a:g}*{job.path_1} + {b:g}*{job.path_2}" --out ...'
    )
    if case:
        print_warning(
            f"both files hold the same update, which lpl gives {(a + b) ** 2:g} times; the sum would be {a + b:g} times"
        )


def _hold_same_update(first: AdapterState, second: AdapterState) -> bool:
    return all(
        torch.equal(lr.up, other.up) and torch.equal(lr.down, other.down)
        for component, rows in first.components.items()
        for path, lr in rows.items()
        if (other := second.components.get(component, {}).get(path)) is not None
        and other.up.shape == lr.up.shape
    )


# ---------------------------------------------------------------- model + LoRA


def _add_to_model(job: LoraAddition, output: Output, reading: OpenOptions) -> None:
    if not is_whole_model(job.path_1):
        raise UserError(
            f"{job.mode} adds a LoRA to a model, and {job.path_1} is none; give a folder in the diffusers layout or a hub id first"
        )
    if is_whole_model(job.path_2):
        raise UserError(
            f'{job.path_2} is a whole model where a LoRA is expected; mix adds models: merge.py mix "0.6*A + 0.4*B" --out C'
        )
    entries = [WeightedFile(1.0, job.path_1), WeightedFile(_both_alphas(job)[0], job.path_2)]
    how = FoldOptions(job.residual, folder=job.mode == "upl")
    if job.mode == "upl":
        write_model_sum(entries, output, reading, how)
        return
    if Path(output.path).suffix != ".ckpt":
        raise UserError(
            f"upl-ckpt-v2 writes a CompVis checkpoint; the output {output.path} should end in .ckpt"
        )
    state = open_adapter(job.path_2, open_base_model(job.path_1, reading).layout, reading)
    embedding = (
        Path(output.path).with_suffix(".pt") if len(state.tokens) == 1 else None
    )  # A1111's has one encoder's rows
    if embedding:
        check_output(replace(output, path=str(embedding)))
    write_model_sum(
        entries,
        replace(output, dtype=output.dtype or torch.float16),
        reading,
        replace(how, tokens=embedding is None),
    )
    if embedding and not output.dry_run:
        _write_embedding(state, embedding)


def _write_embedding(state: AdapterState, path: Path) -> None:
    """A1111's file, rows in the order of the tokens' names."""
    order = sorted(range(len(state.token_names)), key=lambda i: state.token_names[i])
    names = tuple(state.token_names[i] for i in order)
    rows = {key: value[order] for key, value in state.tokens.items()}
    write_pickled_embedding(
        AdapterState(
            tokens=rows,
            token_names=names,
            metadata=embeddings.placeholder_header({path.stem: names}),
        ),
        path,
    )
    print(f"written: {path}; put it into the embeddings folder, {path.stem} is its word in prompts")
