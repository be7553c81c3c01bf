"""Operators of CUDA in place of those into which the CPU and the meta device decompose them.

For counting what a step saves, allocates and launches on a GPU without one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


@contextmanager
def as_cuda() -> Iterator[None]:
    """Inside the block attention and RMS norm are one op forward and one backward, as on CUDA.

    The CPU and the meta device decompose them. Attention is flash attention (memory-efficient for
    fp32 or with a mask): whichever kernel a GPU chooses saves the same tensors. torch has no
    autocast on the meta device; inside the block it has CUDA's, whose lists of operators are
    CASTS_DOWN and CASTS_UP.
    """
    cast = _CastState()
    autocast, enabled, dtype = (
        torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    )  # fmt: skip

    def autocast_on_meta(device_type: str, *args: Any, **kwargs: Any) -> Any:
        if device_type == "meta":
            return _MetaAutocast(cast, *args, **kwargs)
        return autocast(device_type, *args, **kwargs)

    def is_enabled(*device_type: str) -> bool:
        return cast.dtype is not None if device_type == ("meta",) else enabled(*device_type)

    def cast_dtype(device_type: str) -> torch.dtype:
        return cast.dtype or torch.bfloat16 if device_type == "meta" else dtype(device_type)

    _active.append(True)
    try:
        with (
            _AsCuda(cast),
            patch.object(torch, "autocast", autocast_on_meta),
            patch.object(torch, "is_autocast_enabled", is_enabled),
            patch.object(torch, "get_autocast_dtype", cast_dtype),
        ):
            yield
    finally:
        _active.pop()


def has_meta_autocast() -> bool:
    """Whether torch.autocast may be asked about the meta device: inside `as_cuda`."""
    return bool(_active)


_active: list[bool] = []


# ---------------------------------------------------------------- memory inside an operator


def _attention_workspace(grad: Tensor, query: Tensor, *_: Any, **__: Any) -> int:
    """The gradient of the queries [b, h, s, d] in fp32 and one number a query, which the backward
    of flash and of memory-efficient attention sums up (arXiv 2205.14135, B.4).
    """
    return 4 * (query.numel() + math.prod(query.shape[:-1]))


def _convolution_workspace(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """cuDNN's copy of an input [b, c, h, w] with channels first into its own layout, and as much
    for the output, which has about as many pixels as the input or less. Nothing for channels last
    and for 1x1 convolutions, which need no copy.
    """
    if x.ndim != 4 or weight.shape[2:].numel() == 1:
        return 0
    if x.is_contiguous(memory_format=torch.channels_last):
        return 0
    return x.element_size() * x.shape[0] * x.shape[2:].numel() * sum(weight.shape[:2])


WORKSPACES = {  # aten operator -> bytes that CUDA's libraries take while it runs, an estimate
    "_scaled_dot_product_flash_attention_backward": _attention_workspace,
    "_scaled_dot_product_efficient_attention_backward": _attention_workspace,
    "convolution": _convolution_workspace,
}


# ---------------------------------------------------------------- autocast

# What torch.autocast does to the arguments of the operators that are used here, on CUDA:
# https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
CASTS_DOWN: set[Any] = {
    F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.mm, torch.bmm, torch.addmm,
    torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, F.scaled_dot_product_attention,
}  # fmt: skip
CASTS_UP: set[Any] = {
    F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, torch.pow, Tensor.pow,
    torch.rsqrt, Tensor.rsqrt, F.mse_loss,
}  # fmt: skip


class _CastState:
    """The dtype of autocast on the meta device; None while it is off."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None


class _MetaAutocast:
    """torch.autocast on the meta device; a context that can be entered again."""

    def __init__(
        self, state: _CastState, dtype: torch.dtype | None = None, enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:  # fmt: skip
        self.state, self.before = state, list[torch.dtype | None]()
        self.dtype = (dtype or torch.bfloat16) if enabled else None

    def __enter__(self) -> None:
        self.before.append(self.state.dtype)
        self.state.dtype = self.dtype

    def __exit__(self, *error: object) -> None:
        self.state.dtype = self.before.pop()


# ---------------------------------------------------------------- operators


class _AsCuda(TorchFunctionMode):
    def __init__(self, cast: _CastState) -> None:
        super().__init__()
        self.cast = cast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            with self:  # torch leaves it in here, and checkpointing recomputes in the backward
                return _run_backward(*args, **kwargs)
        if self.cast.dtype is not None and func in CASTS_DOWN:
            args, kwargs = _cast_tensors((args, kwargs), self.cast.dtype)
        elif self.cast.dtype is not None and func in CASTS_UP:
            args, kwargs = _cast_tensors((args, kwargs), torch.float32)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in (F.rms_norm, torch.rms_norm):
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _run_backward(
    root: Tensor, gradient: Tensor | None = None, retain_graph: bool | None = None,
    create_graph: bool = False, inputs: Any = None,
) -> None:  # fmt: skip
    """Tensor.backward by the engine alone: torch's own functions would call the mode again."""
    first = torch.ones_like(root) if gradient is None else gradient
    keeps = create_graph if retain_graph is None else retain_graph
    torch.autograd.Variable._execution_engine.run_backward(
        (root,), (first,), keeps, create_graph, tuple(inputs or ()),
        allow_unreachable=True, accumulate_grad=True,
    )  # fmt: skip


def _cast_tensors(arguments: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        is_cast = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_cast and value.dtype != torch.float64 else value

    return tree_map(cast, arguments)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    assert not enable_gqa
    tensors = query, key, value
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(*tensors, dropout_p, is_causal, scale=scale)[0]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(*tensors, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _rms_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    assert weight is not None and len(normalized_shape) == 1 and not weight.requires_grad
    return _RMSNorm.apply(x, weight, eps or torch.finfo(x.dtype).eps)


class _RMSNorm(torch.autograd.Function):
    """aten._fused_rms_norm and its backward, which exist on CUDA alone, with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = torch.ops.cuda_operators.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.cuda_operators.rms_norm_backward(dy, *ctx.saved_tensors), None, None


@torch.library.custom_op("cuda_operators::rms_norm", mutates_args=())
def _rms_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (x.float() * rstd * weight.float()).to(x.dtype), rstd


@torch.library.custom_op("cuda_operators::rms_norm_backward", mutates_args=())
def _rms_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    normal, slope = x.float() * rstd, dy.float() * weight.float()
    return ((slope - normal * (slope * normal).mean(-1, keepdim=True)) * rstd).to(x.dtype)


@_rms_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@_rms_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(x)
