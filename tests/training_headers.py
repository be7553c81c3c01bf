"""The header of a LoRA file as kohya's sd-scripts write it, with a user's training in it."""

import json

TRAINING = {  # about the training; stays true of the same update under other names or ranks
    "ss_tag_frequency": json.dumps({"10_cat": {"cat": 30, "sitting": 12}}),
    "ss_sd_model_name": "v1-5-pruned.safetensors",
    "ss_sd_model_hash": "4711abcd",
    "ss_new_sd_model_hash": "e" * 64,
    "ss_learning_rate": "0.0001",
    "ss_unet_lr": "0.0001",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit",
    "ss_num_train_images": "30",
    "ss_network_dropout": "0.1",
    "ss_training_comment": "a comment",
    "ss_output_name": "my_cat",
    "modelspec.title": "My cat",
    "modelspec.author": "someone",
    "modelspec.license": "CC-BY",
    "modelspec.date": "2024-05-06T07:08:09",
    "note": "kept before too",
}
TENSORS = {  # about the tensors; false of a file with other ranks, names or a DoRA
    "ss_network_dim": "777",
    "ss_network_alpha": "333",
    "ss_network_module": "lycoris.kohya",
    "ss_network_args": json.dumps(
        {"conv_dim": "99", "algo": "loha", "rank_dropout": "0.2", "loraplus_lr_ratio": "16"}
    ),
    "sshs_model_hash": "f" * 64,
    "sshs_legacy_hash": "0" * 8,
    "modelspec.hash_sha256": "0x" + "f" * 64,
}
