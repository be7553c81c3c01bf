"""The frozen denoiser divided among the processes of a run: FSDP2 (torch's fully_shard)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lora_core import distributed
from lora_core.byte_sizes import format_bytes
from lora_core.config import Config
from lora_core.errors import UserError
from models.placement import named_blocks


def check_sharding(config: Config) -> None:
    """Raises UserError where --shard cannot be carried out; needs the number of processes."""
    if not config.shard:
        return
    count = distributed.process_count()
    if count == 1:
        raise UserError(
            "--shard divides the denoiser among several processes, and this run has one; start it "
            "with torchrun --nproc-per-node N, or leave the option out"
        )
    if config.adapter.kind != "lora":
        raise UserError(
            f"--shard trains LoRA, and --adapter.kind {config.adapter.kind} reads whole weights "
            "between the steps; use --adapter.kind lora, or leave --shard out"
        )
    if config.passes_per_step % count or config.images_per_step % count:
        raise UserError(
            f"--shard needs as many forward passes in each process, and a step of "
            f"{config.images_per_step} images in {config.passes_per_step} passes is not divided "
            f"evenly among {count}; change --batch-size, --accumulation or the number of processes"
        )
    if config.compile:
        raise UserError(
            "--shard gathers the weights of a block before it works, which --compile does not see; "
            "leave one of them out"
        )


def shard_denoiser(
    denoiser: nn.Module, groups: Mapping[str, Sequence[nn.Parameter]], device: torch.device
) -> None:
    """Divide the frozen weights of each repeated block, and of the rest, among the processes, in
    place: a block's weights are gathered for its forward and again for its backward pass. The
    network may be on the host: a block comes to the device when it is divided.

    Trained parameters stay whole in each process: their gradients are summed with all others.
    """
    mesh = init_device_mesh(device.type, (distributed.process_count(),))
    trained = {p for p in denoiser.parameters() if p.requires_grad}
    for params in groups.values():
        trained.update(params)
    blocks = list(named_blocks(denoiser).values())
    whole = held_bytes(denoiser)
    for module in (*blocks, denoiser):
        for p in trained & set(module.parameters()):  # which fully_shard does not move
            p.data = p.data.to(device)
        fully_shard(module, mesh=mesh, ignored_params=trained & set(module.parameters()))
    print(
        f"denoiser: {format_bytes(held_bytes(denoiser))} of {format_bytes(whole)} in each of "
        f"{distributed.process_count()} processes, and {len(blocks)} blocks gathered as they work"
    )


def held_bytes(module: nn.Module) -> int:
    """The bytes of a module's parameters that this process holds."""
    sizes = []
    for p in module.parameters():
        own = p.to_local() if isinstance(p, DTensor) else p
        sizes.append(own.numel() * own.element_size())
    return sum(sizes)
