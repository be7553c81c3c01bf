"""Mix-of-Show's training command with this project's loop (arXiv 2305.18292).

    accelerate launch train_edlora.py -opt data/mixofshow_example_data/EDLoRA_hermione_RV51.yml

Paths in the options begin in the current folder. A table says what became of each option. The run,
a copy of the options and models/edlora_model-latest.pth are in experiments/NAME.yml. Further flags
are those of train.py, say --stages.0.steps 100. `python train_edlora.py` is the same.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import train
from lora_core.errors import exit_status
from lora_core.flags.command_line import override_options
from lora_core.text import print_escaped
from training import processes
from training.translation.edlora_files import save_experiment
from training.translation.edlora_options import translate_options
from training.translation.run_flags import check_free_folder


def run_training(argv: Sequence[str] | None = None) -> int:
    """Train as a file of options says; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-opt", required=True, help="YAML file of options", metavar="FILE")
    given, further = parser.parse_known_args(argv)

    def carry_out() -> None:
        job = translate_options(Path(given.opt))
        config = override_options(job.config, further, "train_edlora.py")
        check_free_folder(config)
        if processes.is_first():
            print_escaped(job.table)
        folder = train.train(config)
        if processes.is_first():
            print(f"done: {save_experiment(folder, job)}")

    return exit_status(carry_out)


if __name__ == "__main__":
    sys.exit(run_training())
