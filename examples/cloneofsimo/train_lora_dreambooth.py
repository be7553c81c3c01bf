"""cloneofsimo's DreamBooth script with this project's loop.

    accelerate launch train_lora_dreambooth.py --pretrained_model_name_or_path=MODEL \
        --instance_data_dir=IMAGES --output_dir=OUT --instance_prompt="style of sks" \
        --learning_rate=1e-4 --max_train_steps=1000 --train_batch_size=1

A table says what became of each flag. OUT/lora_weight.safetensors is in cloneofsimo's format.
"""

import sys

from train import train
from training.translation.pivotal_commands import run_script_command

if __name__ == "__main__":
    sys.exit(run_script_command("train_lora_dreambooth.py", sys.argv[1:], train))
