"""The command of kohya's train_network.py: the same flags and config files, run here.

    accelerate launch train_network.py --config_file=train_network_config.toml --network_dim=8

Flags win over the file. Prints what became of each option; docs/from_kohya.md has the details.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_core.errors import exit_status
from train import train
from training.translation.kohya_command import run_kohya_command

if __name__ == "__main__":
    sys.exit(exit_status(partial(run_kohya_command, sys.argv[1:], train)))
