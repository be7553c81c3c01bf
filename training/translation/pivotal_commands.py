"""The commands lora_pti and lora_ppim of cloneofsimo, and its training scripts, by their words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_core.config import Config
from lora_core.errors import exit_status, print_help
from lora_core.text import check_unicode, print_escaped
from training import processes
from training.inputs.prepared_files import prepare_faces
from training.translation import lora_ppim, lora_pti, lora_scripts
from training.translation.run_flags import check_free_folder

Train = Callable[[Config], Path]


def run_pti_command(words: Sequence[str], train: Train) -> int:
    """Train as a command line of lora_pti says; returns the exit status."""

    def run(words: list[str]) -> None:
        train_pivotal_job(lora_pti.translate_lora_pti(words), train)

    return _run_command(run, lora_pti.describe_flags(), words)


def run_script_command(name: str, words: Sequence[str], train: Train) -> int:
    """Train as a command line of one of its training scripts says; returns the exit status."""

    def run(words: list[str]) -> None:
        train_pivotal_job(lora_scripts.translate_script(name, words), train)

    return _run_command(run, lora_scripts.describe_script(name), words)


def run_ppim_command(words: Sequence[str]) -> int:
    """Prepare images as a command line of lora_ppim says; returns the exit status."""
    return _run_command(lora_ppim.run_lora_ppim, lora_ppim.HELP, words)


def train_pivotal_job(job: lora_pti.PivotalJob, train: Train) -> None:
    """Print what became of the flags, train, and write the file into the run's folder."""
    check_free_folder(job.config)
    if processes.is_first():
        print_escaped(job.table)
    if job.face_model:
        prepare_faces(job.config, job.face_model)
    folder = train(job.config)
    if processes.is_first():
        print(f"done: {lora_pti.save_pivotal_file(folder, job)}, and the run's own files")


def _run_command(run: Callable[[list[str]], object], help_text: str, words: Sequence[str]) -> int:
    """Run a command by its words, or print its help; returns the exit status."""
    if not words or {"-h", "--help"} & set(words):
        print_help(lambda: print(help_text))
        return 0 if words else 2

    def carry_out() -> None:
        check_unicode(words, "the argument")
        run(list(words))

    return exit_status(carry_out)
