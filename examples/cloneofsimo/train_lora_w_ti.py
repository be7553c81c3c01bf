"""cloneofsimo's script for a token and a LoRA (run_lorpt.sh) with this project's loop.

    accelerate launch train_lora_w_ti.py --pretrained_model_name_or_path=MODEL \
        --instance_data_dir=IMAGES --output_dir=OUT --placeholder_token="<krk>" \
        --initializer_token=woman --learning_rate=1e-5 --max_train_steps=5000

A table says what became of each flag. OUT/lora_weight.safetensors is in cloneofsimo's format.
"""

import sys

from train import train
from training.translation.pivotal_commands import run_script_command

if __name__ == "__main__":
    sys.exit(run_script_command("train_lora_w_ti.py", sys.argv[1:], train))
