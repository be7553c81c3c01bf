"""Riemannian preconditioning of LoRA (arXiv 2402.02347): each factor's gradient is divided by the
Gram matrix of the other, so that one learning rate fits all ranks and scales.

    python train.py configs/toy_pti.toml --adapter.kind examples/riemannian.py:Riemannian \
        --optimizer.name adamw --out runs/riemannian

`change_gradients` is called before the gradients of a step are clipped. The file is a plain LoRA.
"""

import torch
from torch import Tensor

from lora_core.adapters.kinds import LoRA

DELTA = 1e-6  # what is added to the Gram matrices, as in the paper


class Riemannian(LoRA):
    @torch.no_grad()
    def change_gradients(self) -> None:
        """up.grad (down down^T + delta)^-1 and (up^T up + delta)^-1 down.grad"""
        down, up = self.down.flatten(1), self.up.flatten(1)
        if self.down.grad is None or self.up.grad is None:
            return  # nothing reached this layer
        of_up = _solve(down @ down.T, self.up.grad.flatten(1).T).T
        of_down = _solve(up.T @ up, self.down.grad.flatten(1))
        self.up.grad.copy_(of_up.view_as(self.up))
        self.down.grad.copy_(of_down.view_as(self.down))


def _solve(gram: Tensor, gradient: Tensor) -> Tensor:
    damped = gram.double() + DELTA * torch.eye(len(gram), device=gram.device)
    return torch.linalg.solve_ex(damped, gradient.double())[0].to(gradient.dtype)
