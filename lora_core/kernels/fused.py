"""Faster implementations of the adapter operations in torch, with hand-written gradients.

They make fewer passes over memory than the reference and run wherever there is no kernel. Factors
and hidden states are laid out as [r, ...] here, with which both factors' products read x and dy
fastest (bf16, rank 16, one x86 thread: 0.6-0.9 of the time of the products in the reference's
order).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_core.kernels import reference
from lora_core.kernels.reference import Drop, Member, wide_dtype
from lora_core.memory.cuda_operators import has_meta_autocast

# Up to 128 x 128 the weight W + scale up down is cheaper to form than its two products with x are
# to launch: forward + backward at rank 8 takes 0.54-0.86 of the reference's time (64 to 4096 rows,
# one x86 thread); from 256 x 256 on it takes more than the split form (1.1-1.4 of it).
MERGE_LIMIT = 128 * 128
WIDE_DTYPES = (torch.float32, torch.float64)
ONE_BY_ONE = (1, 1), (0, 0), (1, 1)  # stride, padding and dilation of a 1x1 convolution

Grads = tuple[Any, ...]  # one for each argument of forward, None where none is needed


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    drop: Drop | None = None,
) -> Tensor:
    """reference.lora_linear with the update added in place and x read once for it.

    A small weight is merged with its update instead. Saved for the backward: x, x down^T and, for
    DoRA, the output before the gain; a dropout mask is recomputed. DoRA in half precision is
    rounded once more than in the reference, before the gain.
    """
    if weight is not None and drop is None and _merges(x, weight, down):
        merged = torch.addmm(weight, up, down, alpha=scale)
        if magnitude is not None and norm is not None:
            merged = merged * (magnitude / norm)[:, None]
        return F.linear(x, merged, bias)
    if _autocasts(x):
        x, weight, bias = _autocast(x), _autocast(weight), _autocast(bias)
    p, seed, layer, step, rows = (0.0, 0, 0, None, None) if drop is None else drop
    return _Linear.apply(
        x, weight, bias, down, up, scale, magnitude, norm, p, seed, layer, step, rows
    )


def lora_grouped(x: Tensor, members: tuple[Member, ...]) -> tuple[Tensor, ...]:
    """reference.lora_grouped, member by member.

    Reading x once for all of them is no faster on a CPU.
    """
    return tuple(lora_linear(x, *member) for member in members)


def lora_conv(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """reference.lora_conv with the update added in place.

    A small weight is merged with its update instead, for one convolution.
    """
    if groups != 1 or isinstance(padding, str) or x.ndim != 4:
        return reference.lora_conv(
            x, weight, bias, down, up, scale, stride, padding, dilation, groups
        )
    if weight is not None and _merges(x, weight, down):
        merged = torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1), alpha=scale)
        return F.conv2d(x, merged.view(weight.shape), bias, stride, padding, dilation)
    if _autocasts(x):
        x, weight, bias = _autocast(x), _autocast(weight), _autocast(bias)
    return _Conv.apply(x, weight, bias, down, up, scale, stride, padding, dilation)


def dora_compose(
    y0: Tensor, bias: Tensor | None, lora: Tensor, gain: Tensor, strength: float = 1.0
) -> Tensor:
    """reference.dora_compose as y0 a + lora b + c with one factor a channel.

    Two passes in fp32 or better, and one that rounds.
    """
    return _Compose.apply(y0, bias, lora, gain, strength)


def snr_weighted_mse(
    out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
) -> Tensor:
    """reference.snr_weighted_mse in three passes over the output (four with a mask).

    One more in the backward, for which the difference is kept.
    """
    mask_learns = mask is not None and mask.requires_grad
    if mask_learns or (weight is not None and weight.requires_grad):
        return reference.snr_weighted_mse(out, target, mask, weight)
    return _SquaredError.apply(out, target, mask, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        magnitude: Tensor | None,
        norm: Tensor | None,
        p: float,
        seed: int,
        layer: int,
        step: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.drop, ctx.up_dtype = scale, (p, seed, layer), up.dtype
        dropped = x
        if step is not None and rows is not None:
            dropped = reference.keyed_dropout(x, p, seed, layer, step, rows)
        down = down.to(x.dtype)
        up = up.t().to(x.dtype, memory_format=torch.contiguous_format)  # [r, out]
        hidden = F.linear(down, _flat(dropped))  # [r, m]
        if weight is None:
            y = (hidden.t() @ up).mul_(scale).view(*x.shape[:-1], up.shape[1])
        else:
            # The same call as the base layer's, so that the bits are the same.
            y = F.linear(x, weight, bias).contiguous()
            y.view(-1, up.shape[1]).addmm_(hidden.t(), up, alpha=scale)
        z, gain = None, None
        if weight is not None and magnitude is not None and norm is not None:
            gain = magnitude / norm
            z = _flat(y)
            offset = None
            if bias is not None:  # bias (1 - gain): the gain leaves the bias alone
                wide = bias.to(gain.dtype)
                offset = torch.addcmul(wide, wide, gain, value=-1)
            y = _affine(z, gain, offset).view(y.shape)
        ctx.save_for_backward(x, weight, bias, down, up, hidden, z, gain, norm, step, rows)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> Grads:
        if dy is None:
            return (None,) * 13
        x, weight, bias, down, up, hidden, z, gain, norm, step, rows = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_down, wants_up, _, *others = ctx.needs_input_grad
        wants_magnitude, wants_norm, *_ = others
        d_x = d_weight = d_bias = d_down = d_up = d_magnitude = d_norm = None
        with _exactly(dy):
            dy = _flat(dy)
            if wants_bias:
                d_bias = dy.sum(0)
            if z is not None:
                d_gain = _moment(dy, z, bias, gain)
                d_magnitude = d_gain / norm if wants_magnitude else None
                d_norm = -d_gain * gain / norm if wants_norm else None
                dy = _affine(dy, gain, None)
            p, seed, layer = ctx.drop
            keep = None
            if step is not None:
                ones = torch.ones_like(x)
                keep = reference.keyed_dropout(ones, p, seed, layer, step, rows) != 0
            if wants_up:
                d_up = _scaled((hidden @ dy).t(), ctx.up_dtype, ctx.scale)
            if wants_weight:
                d_weight = dy.t() @ _flat(x)
            if wants_x or wants_down:
                back = F.linear(up, dy)  # [r, m]
                if wants_down:
                    dropped = x if keep is None else _dropped(x, keep, p)
                    d_down = back @ _flat(dropped)
                    d_down = _scaled(d_down, ctx.up_dtype, ctx.scale)
                if wants_x:
                    kept = None if keep is None else _flat(keep)
                    d_x = _input_gradient(dy, weight, back, down, ctx.scale, kept, p).view(x.shape)
        d_factors = d_down, d_up, None, d_magnitude, d_norm
        return d_x, d_weight, d_bias, *d_factors, None, None, None, None, None


def _input_gradient(
    dy: Tensor,
    weight: Tensor | None,
    back: Tensor,
    down: Tensor,
    scale: float,
    keep: Tensor | None,
    p: float,
) -> Tensor:
    """dy W + scale keep (back^T down) / (1 - p)  [m, in]"""
    if weight is None or keep is not None:
        update = (back.t() @ down).mul_(scale)
        update = update if keep is None else _dropped(update, keep, p)
        return update if weight is None else (dy @ weight).add_(update)
    return (dy @ weight).addmm_(back.t(), down, alpha=scale)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.window, ctx.dtype = scale, (stride, padding, dilation), up.dtype
        down, up = down.to(x.dtype), up.to(x.dtype)
        hidden = F.conv2d(x, down, None, stride, padding, dilation)
        if weight is None:
            y = F.conv2d(hidden, up).mul_(scale)
        else:
            y = F.conv2d(x, weight, bias, stride, padding, dilation)
            _add_1x1(y, hidden, up.flatten(1), scale)
        ctx.save_for_backward(x, weight, down, up, hidden)
        ctx.bias = None if bias is None else list(bias.shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> Grads:
        if dy is None:
            return (None,) * 9
        x, weight, down, up, hidden = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_down, wants_up, *_ = ctx.needs_input_grad
        d_x = d_weight = d_bias = d_down = d_up = None
        with _exactly(dy):
            wants = [wants_x, wants_weight, wants_bias]
            if weight is not None and any(wants):
                gradients = _convolution_backward(dy, x, weight, ctx.bias, ctx.window, wants)
                d_x, d_weight, d_bias = gradients
            wants = [wants_x or wants_down, wants_up, False]
            back, d_up, _ = _convolution_backward(dy, hidden, up, None, ONE_BY_ONE, wants)
            if wants_x or wants_down:
                wants = [wants_x, wants_down, False]
                gradients = _convolution_backward(back, x, down, None, ctx.window, wants)
                through, d_down, _ = gradients
                d_down = _scaled(d_down, ctx.dtype, ctx.scale) if wants_down else None
                if wants_x:
                    scale = ctx.scale
                    d_x = through.mul_(scale) if d_x is None else d_x.add_(through, alpha=scale)
            d_up = _scaled(d_up, ctx.dtype, ctx.scale) if wants_up else None
        return d_x, d_weight, d_bias, d_down, d_up, None, None, None, None


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y0: Tensor, bias: Tensor | None, lora: Tensor, gain: Tensor, strength: float
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.strength = strength
        dtype = wide_dtype(y0.dtype)
        shift = strength * (gain.to(dtype) - 1)
        base = y0.to(dtype)
        if bias is None:
            y = base * (1 + shift)
        else:
            y = torch.addcmul(-shift * bias.to(dtype), base, 1 + shift)
        y.addcmul_(lora.to(dtype), strength * gain.to(dtype))
        ctx.save_for_backward(y0, bias, lora, gain)
        return y.to(y0.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> Grads:
        if dy is None:
            return (None,) * 5
        y0, bias, lora, gain = ctx.saved_tensors
        strength = ctx.strength
        channels = gain.flatten().to(wide_dtype(dy.dtype))
        wants_y0, wants_bias, wants_lora, wants_gain, _ = ctx.needs_input_grad
        d_y0 = d_bias = d_lora = d_gain = None
        rows = _channels(dy, gain)
        if wants_lora:
            d_lora = _affine(rows, strength * channels, None).view(dy.shape).to(lora.dtype)
        if wants_y0 and strength == 1 and d_lora is not None and d_lora.dtype == y0.dtype:
            d_y0 = d_lora
        elif wants_y0:
            d_y0 = _affine(rows, 1 + strength * (channels - 1), None).view(dy.shape)
        if wants_bias:
            axes = [axis for axis in range(rows.ndim) if axis != 1]
            d_bias = -strength * (channels - 1) * rows.sum(axes, dtype=channels.dtype)
            d_bias = d_bias.view(bias.shape).to(bias.dtype)
        if wants_gain:
            d_gain = _moment(rows, _channels(y0, gain), bias, channels)
            d_gain = d_gain + _moment(rows, _channels(lora, gain), None, channels)
            d_gain = (strength * d_gain).view(gain.shape).to(gain.dtype)
        return d_y0, d_bias, d_lora, d_gain, None


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        dtype = torch.promote_types(out.dtype, torch.float32)
        difference = out.to(dtype) - target.to(dtype)
        if mask is None:
            losses = (difference * difference).flatten(1).mean(1)
            factor = torch.full_like(losses, 2 / max(1, out[0].numel()))
        else:
            area = reference.masked_area(difference, mask)
            losses = (mask * (difference * difference)).sum((1, 2, 3)) / area
            factor = 2 / area
        ctx.save_for_backward(difference, mask, factor if weight is None else factor * weight)
        ctx.dtypes = out.dtype, target.dtype
        return losses if weight is None else losses * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        difference, mask, factor = ctx.saved_tensors
        factor = (g * factor).view(-1, *[1] * (difference.ndim - 1))
        slope = difference * (factor if mask is None else factor * mask)
        wants_out, wants_target, *_ = ctx.needs_input_grad
        d_out = slope.to(ctx.dtypes[0]) if wants_out else None
        d_target = (-slope).to(ctx.dtypes[1]) if wants_target else None
        return d_out, d_target, None, None


def _affine(rows: Tensor, factor: Tensor, offset: Tensor | None) -> Tensor:
    """rows * factor + offset with one number for each channel (dimension 1).

    In fp32, rounded once to rows' dtype. It is computed as batch normalization with mean 0 and
    variance 1: the one torch op that reads bf16, multiplies by fp32 and writes bf16 in one pass
    (4096 x 320: 0.2 ms; `rows * factor` and its rounding 2.4 ms).
    """
    mean, deviation = torch.zeros_like(factor), torch.ones_like(factor)
    return torch.native_batch_norm(rows, factor, offset, mean, deviation, False, 0.0, 0.0)[0]


def _moment(rows: Tensor, z: Tensor, mean: Tensor | None, like: Tensor) -> Tensor:
    """Sum of rows * (z - mean) over all but the channels (dimension 1), in one pass.

    It is the weight's gradient of the same normalization. The mean and the deviation of 1 are
    passed twice: on a CPU torch reads the running ones, on a GPU the saved ones.
    """
    if not rows.numel():  # torch divides by the number of elements
        return torch.zeros_like(like)
    ones = torch.ones_like(like)
    center = torch.zeros_like(like) if mean is None else mean.flatten().to(like.dtype)
    statistics = center, ones, center, ones
    wanted = [False, True, False]
    return torch.ops.aten.native_batch_norm_backward(
        rows, z.to(rows.dtype), ones, *statistics, False, 0.0, wanted
    )[1]


def _scaled(gradient: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """scale * gradient, contiguous, in dtype; in place where it has that layout and dtype."""
    out = gradient
    if gradient.dtype != dtype or not gradient.is_contiguous():
        out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device).copy_(gradient)
    return out if scale == 1 else out.mul_(scale)


def _dropped(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """reference.keyed_dropout of x with the mask `keep`."""
    return torch.where(keep, x / (1 - p), 0)


def _add_1x1(y: Tensor, hidden: Tensor, up: Tensor, scale: float) -> None:
    """y += scale * (1x1 convolution of hidden with up [out, r]), in place, in y's memory format."""
    if y.is_contiguous():
        y.flatten(2).baddbmm_(up.expand(len(y), *up.shape), hidden.flatten(2), alpha=scale)
    elif y.is_contiguous(memory_format=torch.channels_last):
        _flat(y.permute(0, 2, 3, 1)).addmm_(_flat(hidden.permute(0, 2, 3, 1)), up.t(), alpha=scale)
    else:
        y.add_(F.conv2d(hidden, up[:, :, None, None]), alpha=scale)


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: list[int] | None, window: Any, wants: list[bool]
) -> Grads:
    stride, padding, dilation = window
    return torch.ops.aten.convolution_backward(
        dy, x, weight, bias, stride, padding, dilation, False, [0, 0], 1, wants
    )


def _channels(t: Tensor, gain: Tensor) -> Tensor:
    """t [..., out] as [m, out] for a gain [out], t [..., out, h, w] as [b, out, h, w] for more."""
    return t.reshape(-1, *t.shape[t.ndim - gain.ndim :])


def _flat(t: Tensor) -> Tensor:
    """[..., d] -> [m, d], also where m = 0."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _autocast(t: Any) -> Any:
    """t in the dtype to which torch.autocast casts operands of a product; fp64 is not cast."""
    if t is None or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))


def _autocasts(t: Tensor) -> bool:
    # torch has no autocast on the meta device, but where a step of CUDA is planned on it
    return (not t.is_meta or has_meta_autocast()) and torch.is_autocast_enabled(t.device.type)


def _exactly(t: Tensor) -> Any:
    """A context without autocast, so that a backward uses the dtypes of its forward."""
    return torch.autocast(t.device.type, enabled=False) if _autocasts(t) else nullcontext()


def _merges(x: Tensor, weight: Tensor, down: Tensor) -> bool:
    """Whether W + scale up down is formed first: W is small and nothing is cast.

    In a half-precision weight the sum would round a small update away.
    """
    dtype = x.dtype
    if weight.numel() > MERGE_LIMIT or dtype not in WIDE_DTYPES:
        return False
    if dtype != weight.dtype or dtype != down.dtype:
        return False
    return not _autocasts(x)
