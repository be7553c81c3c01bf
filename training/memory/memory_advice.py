"""The sentence for a run that finds no memory: the numbers, and options that would fit."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from lora_core.config import Config
from lora_core.errors import UserError, is_out_of_memory
from lora_core.memory.memory_errors import MemoryShortage, describe_shortage, read_shortage
from training.memory import plan_options
from training.memory.memory_plan import GB, plan_memory
from training.memory.plan_options import Fit, Saving

OPTIONS = 3  # that a sentence names
# Less than the plan of what did not fit, which may be some percent off.
MARGIN = 0.9
PHASES = {  # function in whose call the memory was missing, innermost first -> when that was
    "draw_class_image": "while class images were drawn",
    "save_sample_grid": "while samples were drawn",
    "before_after_grid": "while samples were drawn",
    "draw": "while samples were drawn",
    "validate": "during validation",
    "encode_images": "while an image was encoded",
    "encode_prompts": "while a caption was encoded",
    "make_step_inputs": "while the inputs of a step were made",
    "optimizer_step": "in a training step",
    "open_model": "while the model was loaded",
    "open_optimizer": "while the optimizer was made",
    "restore": "while a checkpoint was loaded",
    "finish_run": "while the results were written",
}
GENERAL = (
    "lower it with --gradient-checkpointing blocks, --precision bf16, or --batch-size 1 with "
    "--accumulation"
)


@contextmanager
def explained(config: Config, resolve: Callable[[], tuple[Config, Any]]) -> Iterator[None]:
    """Turns an error about memory inside the block into a UserError of one sentence: when, how
    much was asked for and in use, and options that would fit by the plan. `resolve` gives
    the config and the StepFunctions of the run.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        shortage, when = read_shortage(error), _phase_of(error.__traceback__)
        error.__traceback__ = None  # its frames hold the tensors of the step
        _forget_tensors()
        advice = _advice(config, resolve, shortage)
        notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("process ")]
        sentence = f"out of memory {when}: {describe_shortage(shortage)}; {advice}"
        raise UserError(": ".join([*notes, sentence])) from None


def _phase_of(trace: TracebackType | None) -> str:
    """When the error came, by the functions that were being called."""
    names = []
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return next((words for name, words in PHASES.items() if name in names), "in this run")


def _forget_tensors() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _advice(
    config: Config, resolve: Callable[[], tuple[Config, Any]], shortage: MemoryShortage
) -> str:
    """The options that would fit, with their planned peak; general ones without a plan."""
    try:
        planned, functions = resolve()
        fits = fitting_options(planned, functions, shortage.total)
    except Exception:  # of any library: the sentence matters more than its advice
        fits = []
    if not fits:
        return f"{GENERAL}; python train.py CONFIG --plan shows what fits"
    told = [f"{shlex.join(fit.words)} ({fit.plan.peak.total / GB:.1f} GB)" for fit in fits]
    if len(told) == 1:
        return f"by the plan (--plan) this would fit: {told[0]}"
    return f"by the plan (--plan) these would fit: {', '.join(told[:-1])} or {told[-1]}"


def fitting_options(config: Config, functions: Any, total: int) -> list[Fit]:
    """Up to three sets of options that fit into `total` bytes (0: unknown), and into less than the
    plan of the config, which has just not fit. Each is without the last option of those before.
    """
    limit = MARGIN * plan_memory(config, functions).peak.total
    if total:
        limit = min(limit, total)
    found: list[Fit] = []
    without: list[tuple[str, ...]] = []
    savings = plan_options.possible_savings(config)
    while len(found) < OPTIONS:
        fit = plan_options.find_fit(config, functions, limit, without=without)
        if not isinstance(fit, Fit) or not fit.words:
            break
        found.append(fit)
        without.append(_last_saving(fit, savings).words)
    return found


def _last_saving(fit: Fit, savings: list[Saving]) -> Saving:
    """The costliest option of a fit."""
    text = shlex.join(fit.words)
    return [saving for saving in savings if shlex.join(saving.words) in text][-1]
