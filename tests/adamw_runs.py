"""Parameters of odd shapes, and steps of an AdamW on them."""

import torch

SHAPES = (7, 3), (130,), (1,), (2, 3, 5), ()


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in SHAPES
    ]


def train(
    optimizer: torch.optim.Optimizer,
    params: list[torch.Tensor],
    steps: range,
    skip: int | None = None,
) -> list[torch.Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.grad = None if i == skip and step % 3 else grad
        optimizer.step()
    return [p.detach().clone() for p in params]


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(found, exact)
    )
