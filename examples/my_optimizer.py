"""A custom optimizer: Lion (arXiv 2302.06675, algorithm 2), which steps by signs.

python train.py configs/toy_pti.toml --optimizer.name examples/my_optimizer.py:Lion \
    --optimizer.lr denoiser=3e-4 tokens=1e-3 --out runs/lion
"""

from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """p -= lr (sign(beta1 m + (1 - beta1) g) + weight_decay p), and m the average of g by beta2."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in filter(lambda p: p.grad is not None, group["params"]):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                sign = m.lerp(p.grad, 1 - group["betas"][0]).sign()
                p.sub_(group["lr"] * (sign + group["weight_decay"] * p))
                m.lerp_(p.grad, 1 - group["betas"][1])
