"""Pretraining of the toy model in stages: `python -m toy.pretrain --seed 0`.

`--stage NAME` runs one stage, resuming where it stopped.
With two processes: `torchrun --nproc-per-node 2 -m toy.pretrain --seed 0` (each single-threaded,
gradients averaged). Batch sizes are per process, so one process takes twice the steps for the same
samples: then double the *_STEPS. Intermediates go to /tmp/toy_work.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL

from lora_core.errors import quiet_status
from toy import autoencoder, denoiser_training, networks
from toy.networks import WORK
from toy.sample import MODEL

VAE_STEPS, VAE_BATCH = 8_000, 4
UNET_STEPS, UNET_BATCH = 5_000, 32
DECODER_STEPS = 3_000
LATENTS = 40_000


def tokenizer_stage(seed: int) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        networks.write_tokenizer(WORK / "tokenizer")


def vae_stage(seed: int) -> None:
    torch.manual_seed(seed)
    vae = networks.make_autoencoder().to(memory_format=torch.channels_last)
    autoencoder.train_autoencoder(
        vae, WORK, "vae", steps=VAE_STEPS, size=VAE_BATCH, seed=seed, lr=3e-3
    )


def trained_vae(checkpoint: str = "vae") -> AutoencoderKL:
    """The autoencoder of a stage; its scaling factor is set once latents have been measured."""
    vae = networks.make_autoencoder()
    vae.load_state_dict(torch.load(WORK / f"{checkpoint}.pt", weights_only=True)["model"])
    if (WORK / "latents.pt").exists():
        vae.register_to_config(
            scaling_factor=round(
                torch.load(WORK / "latents.pt", weights_only=True, mmap=True)["scale"], 5
            )
        )
    return vae.requires_grad_(False)


def latents_stage(seed: int) -> None:
    if not (WORK / "latents.pt").exists():
        denoiser_training.cache_latents(
            trained_vae().to(memory_format=torch.channels_last), WORK / "latents.pt", LATENTS
        )


def unet_stage(seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = networks.load_tokenizer(WORK / "tokenizer")
    pair = denoiser_training.Pair(networks.make_denoiser(), networks.make_text_encoder(tokenizer))
    denoiser_training.train_denoiser(
        pair,
        tokenizer,
        WORK / "latents.pt",
        WORK,
        steps=UNET_STEPS,
        size=UNET_BATCH,
        seed=seed,
        lr=3e-3,
    )


def decoder_stage(seed: int) -> None:
    vae = trained_vae().to(memory_format=torch.channels_last)
    autoencoder.train_autoencoder(
        vae, WORK, "decoder", steps=DECODER_STEPS, size=VAE_BATCH, seed=seed, lr=1e-3
    )


def export_stage(seed: int) -> None:
    """Writes toy/model from the newest checkpoints, with averaged weights."""
    if dist.is_initialized() and dist.get_rank():
        return
    tokenizer = networks.load_tokenizer(WORK / "tokenizer")
    pair = denoiser_training.Pair(networks.make_denoiser(), networks.make_text_encoder(tokenizer))
    pair.modules().load_state_dict(torch.load(WORK / "unet.pt", weights_only=True)["average"])
    vae = trained_vae("decoder" if (WORK / "decoder.pt").exists() else "vae")
    networks.write_pipeline(MODEL, WORK / "tokenizer", pair.text, vae, pair.unet)


STAGES = {
    "tokenizer": tokenizer_stage,
    "vae": vae_stage,
    "latents": latents_stage,
    "unet": unet_stage,
    "decoder": decoder_stage,
    "export": export_stage,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=STAGES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    for name, stage in STAGES.items():
        if args.stage in (None, name):
            stage(args.seed)
        if dist.is_initialized():
            dist.barrier()  # the first process writes what every process reads next
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(quiet_status(main))
