"""A problem of benchmarks/contenders.py on the tiny networks."""

import torch

from benchmarks import contenders
from models import flux
from tests import tiny_flux, tiny_pipeline, tiny_sdxl

ATTENTION = ("*attn?.to_*",)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(name: str = "sd") -> contenders.Problem:
    """A problem of the tiny networks, rank 4, batch 2, 8 x 8 latents."""
    if name == "flux":
        pipe = tiny_flux.pipeline()
        inputs = {
            "encoder_hidden_states": random(2, 6, 32),
            "pooled_projections": random(2, 16),
            "guidance": torch.ones(2),
        }
        inputs |= {"img_ids": flux.image_position_ids(8, 8), "txt_ids": torch.zeros(6, 3)}
        return contenders.build_problem(
            name,
            pipe.transformer,
            inputs,
            random(2, 4, 8, 8),
            dict(pipe.scheduler.config),
            ("*.to_q", "*.to_v"),
            4,
        )
    if name == "sdxl":
        pipe = tiny_sdxl.pipeline(scheduler="ddim")
        inputs = {
            "encoder_hidden_states": random(2, 5, 40),
            "added_cond_kwargs": {"text_embeds": random(2, 12), "time_ids": random(2, 6)},
        }
    else:
        pipe, inputs = tiny_pipeline.pipeline(), {"encoder_hidden_states": random(2, 5, 16)}
    return contenders.build_problem(
        name, pipe.unet, inputs, random(2, 4, 8, 8), dict(pipe.scheduler.config), ATTENTION, 4
    )
