"""Triton implementations of lora_linear, lora_grouped and lora_conv.

Four launches in addition to the frozen layers' products, forward and backward together. Forward:
shrink reads x once for all members, the frozen products run in cuBLAS, expand_ adds the
up-projections in place (DoRA: and applies gain and bias in the same pass). Backward: back_up reads
dy, the frozen products give dx, back_down_ reads x and adds to dx in place. t = x' down^T is saved,
never x' (x after dropout) or a mask.

DoRA saves its output y, which attention keeps anyway, and not z = (y - bias) / gain: where |gain|
is at most the machine epsilon of y's dtype (the smallest normal number, without a bias), z cannot
be recovered from y, and that channel's magnitude and norm get a gradient of 0. The reference, which
keeps z, gives a nonzero one.

A weight is never differentiated. Activations are rounded to x's dtype where torch rounds them too:
t, dS, dz, and each partial sum of dx.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_core.kernels import dropout
from lora_core.kernels import linear_ops as ops
from lora_core.kernels.linear_shapes import resolve_padding
from lora_core.kernels.linear_tiles import is_plane, sums_before
from lora_core.kernels.reference import Drop, Member

EACH = 6  # tensors of a member: weight, bias, down, up, magnitude, norm
NO_DROPOUT: tuple[list[Tensor], list[int], list[float]] = ([], [], [])


# ---------------------------------------------------------------- linear layers


class GroupSettings(NamedTuple):
    """Settings of a group of linear layers, in addition to its tensors."""

    scales: tuple[float, ...]
    gain: bool  # DoRA
    words: tuple[int, ...] = ()  # of dropout, as linear_launches takes them, two for each member
    kept: tuple[float, ...] = ()

    def select_dropout(
        self, active: list[int], step: Tensor | None, rows: Tensor | None
    ) -> tuple[list[Tensor], list[int], list[float]]:
        """([step, rows], words, kept) of the active members; empty lists without dropout."""
        if step is None or rows is None:
            return NO_DROPOUT
        words: list[int] = []
        for i in active:
            words += self.words[2 * i : 2 * i + 2]
        return [step, rows], words, [self.kept[i] for i in active]


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
    """reference.lora_linear, as a group of one."""
    member = Member(weight, bias, down, up, scale, magnitude, norm, drop)  # type: ignore[arg-type]
    return _run_group(x, [member])[0]


def lora_grouped(x: Tensor, members: tuple[Member, ...]) -> tuple[Tensor, ...]:
    """reference.lora_grouped: up to four adjacent members of one kind share their launches."""
    outputs: list[Tensor] = []
    bundle: list[Member] = []
    for member in members:
        if bundle and (len(bundle) == ops.MEMBERS or _kind(member) != _kind(bundle[0])):
            outputs += _run_group(x, bundle)
            bundle = []
        bundle.append(member)
    return (*outputs, *_run_group(x, bundle)) if bundle else tuple(outputs)


def _kind(member: Member) -> tuple[Any, ...]:
    """Properties that the members of one launch share."""
    gain = _has_gain(member)
    drop = member.drop
    keys = drop and (id(drop.step), id(drop.rows))
    return gain, gain and member.bias is None, member.weight is None, keys


def _has_gain(member: Member) -> bool:
    return member.weight is not None and member.magnitude is not None and member.norm is not None


def _run_group(x: Tensor, members: list[Member]) -> tuple[Tensor, ...]:
    step, rows = None, None
    words: list[int] = []
    kept: list[float] = []
    tensors: list[Tensor | None] = []
    for member in members:
        tensors += [*member[:4], member.magnitude, member.norm]
        if member.drop is not None:
            step, rows = member.drop.step, member.drop.rows
            words += _dropout_words(member.drop)
            kept.append(1 - member.drop.p)
    scales = tuple(float(member.scale) for member in members)
    settings = GroupSettings(scales, _has_gain(members[0]), tuple(words), tuple(kept))
    return GroupedLinear.apply(settings, x, step, rows, *tensors)


def _dropout_words(drop: Drop) -> tuple[int, int]:
    """The hash of seed and layer, and the smallest hash of a kept element, as int32."""
    return dropout.hash_stream(drop.seed, drop.layer), dropout.keep_threshold(drop.p)


class GroupedLinear(torch.autograd.Function):
    """(settings, x, step, rows, EACH tensors of every member) -> the members' outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: GroupSettings,
        x: Tensor,
        step: Tensor | None,
        rows: Tensor | None,
        *given: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, biases, downs, ups, magnitudes, norms = _member_columns(given)
        flat = x.reshape(-1, x.shape[-1])
        everyone = list(range(len(ups)))
        drop = settings.select_dropout(everyone, step, rows)
        t = ops.run_op(ops.shrink, flat, flat, downs, *drop)
        gains: tuple[list[Tensor], ...] = ([], [], [])
        if settings.gain:  # the bias is added after it
            gains = magnitudes, norms, [bias for bias in biases if bias is not None]
        ys = []
        for i in everyone:
            bias = None if settings.gain else biases[i]
            ys.append(_frozen_output(flat, weights[i], bias, len(ups[i])))
        fresh = weights[0] is None
        ops.run_op(ops.expand_, flat, ys, t, ups, list(settings.scales), *gains, fresh)
        ctx.settings, ctx.shape = settings, x.shape
        ctx.set_materialize_grads(False)
        kept: list[Tensor | None] = []
        for i in everyone:
            bias = biases[i] if settings.gain else None
            kept += [weights[i], bias, downs[i], ups[i], magnitudes[i], norms[i]]
        ctx.save_for_backward(flat, t, step, rows, *kept, *(ys if settings.gain else []))
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        settings, needs = ctx.settings, ctx.needs_input_grad
        x, t, step, rows, *saved = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * (4 + EACH * len(dys))
        active = [i for i, dy in enumerate(dys) if dy is not None]
        if not active:
            return tuple(gradients)
        columns = _member_columns(saved[: EACH * len(dys)])
        starts = sums_before([len(down) for down in columns[2]])
        weights, biases, downs, ups, magnitudes, norms = (
            [column[i] for i in active] for column in columns
        )
        outs = [_flat_rows(dys[i]) for i in active]
        gain: tuple[list[Tensor], ...] = ([], [], [], [])
        if settings.gain:
            ys = [saved[EACH * len(dys) + i] for i in active]
            gain = ys, magnitudes, norms, [bias for bias in biases if bias is not None]
        scales = [settings.scales[i] for i in active]
        factors = t, [starts[i] for i in active], ups, scales
        guard = _gain_guard(x.dtype, bool(gain[3]))
        ds, *found = ops.run_op(ops.back_up, x, outs, *factors, *gain, guard, needs[1])
        d_ups, found = found[: len(active)], found[len(active) :]
        if settings.gain and needs[1]:
            outs, found = found[: len(active)], found[len(active) :]  # dz
        dx = _frozen_gradient(x, outs, weights) if needs[1] else None
        if needs[1] or any(needs[4 + EACH * i + 2] for i in active):
            d_downs = [torch.empty_like(down) for down in downs]
            drop = settings.select_dropout(active, step, rows)
            fresh = weights[0] is None
            ops.run_op(ops.back_down_, x, dx, d_downs, ds, x, downs, *drop, fresh)
            for i, d_down in zip(active, d_downs):
                gradients[4 + EACH * i + 2] = d_down
        for place, i in enumerate(active):
            first = 4 + EACH * i
            gradients[first + 3] = d_ups[place]
            if settings.gain:
                gradients[first + 4], gradients[first + 5] = found[place].unbind()
        gradients[1] = None if dx is None else dx.view(ctx.shape)
        return tuple(gradient if need else None for gradient, need in zip(gradients, needs))


def _member_columns(given: Any) -> tuple[list[Any], ...]:
    """The members' weights, biases, downs, ups, magnitudes and norms; the last four contiguous."""
    columns = []
    for i in range(EACH):
        column = list(given[i::EACH])
        if i >= 2:
            column = [None if tensor is None else tensor.contiguous() for tensor in column]
        columns.append(column)
    return tuple(columns)


def _frozen_output(x: Tensor, weight: Tensor | None, bias: Tensor | None, width: int) -> Tensor:
    """The frozen product of x [m, in]; uninitialized without a weight, for expand_ to write."""
    if weight is None:
        return x.new_empty(len(x), width)
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _frozen_gradient(x: Tensor, outs: list[Tensor], weights: list[Tensor | None]) -> Tensor:
    """dx [m, in] of the frozen products; uninitialized without any, for back_down_ to write."""
    dx: Tensor | None = None
    for out, weight in zip(outs, weights):
        if weight is not None:
            dx = torch.mm(out, weight) if dx is None else dx.addmm_(out, weight)
    return torch.empty_like(x, memory_format=torch.contiguous_format) if dx is None else dx


def _flat_rows(dy: Any) -> Tensor:
    """dy as [m, out], with contiguous features."""
    rows = dy.reshape(-1, dy.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _gain_guard(dtype: torch.dtype, bias: bool) -> float:
    """The |gain| up to which z cannot be recovered from y."""
    return torch.finfo(dtype).eps if bias else torch.finfo(dtype).tiny


# ---------------------------------------------------------------- convolutions


class ConvSettings(NamedTuple):
    """A convolution's numbers, and the adapter's scale."""

    scale: float
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def is_pointwise(self, down: Tensor) -> bool:
        """Whether it is a linear layer applied to each pixel."""
        one_pixel = tuple(down.shape[2:]) == (1, 1)
        return one_pixel and set(self.stride) == {1} and set(self.padding) == {0}


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
    """reference.lora_conv of one group, in any memory format.

    The up-projection runs in expand_, a 1x1 convolution entirely in the linear kernels.
    """
    sides = resolve_padding(padding, down.shape[2:], dilation)
    assert groups == 1 and sides is not None  # linear_shapes.conv_supports checks both
    settings = ConvSettings(float(scale), tuple(stride), sides, tuple(dilation))
    return AdaptedConv.apply(settings, x, weight, bias, down, up)


class AdaptedConv(torch.autograd.Function):
    """(settings, x, weight, bias, down, up) -> y.

    For kernels larger than 1x1 the down-convolution and its two gradients are torch's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: ConvSettings,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
    ) -> Tensor:
        window = settings.stride, settings.padding, settings.dilation
        x = _addressable(x)
        down_rows, up_rows = down.flatten(1).contiguous(), up.flatten(1).contiguous()
        if settings.is_pointwise(down):
            cast, size = None, x.shape[2:]
            hidden = ops.run_op(ops.shrink, x, x, [down_rows], *NO_DROPOUT)
        else:
            cast = down.to(x.dtype)
            hidden = F.conv2d(x, cast, None, *window)
            size = hidden.shape[2:]
        if weight is not None:
            y = F.conv2d(x, weight, bias, *window)
        else:
            y = _empty_like_images(x, (len(x), len(up), *size))
        fresh = weight is None
        ops.run_op(ops.expand_, x, [y], hidden, [up_rows], [settings.scale], [], [], [], fresh)
        ctx.settings, ctx.up_shape, ctx.down_shape = settings, up.shape, down.shape
        ctx.save_for_backward(x, weight, cast, down_rows, up_rows, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        settings = ctx.settings
        x, weight, cast, down, up, hidden = ctx.saved_tensors
        _, wants_x, _, _, wants_down, wants_up = ctx.needs_input_grad
        dy = _addressable(dy)
        factors = hidden, [0], [up], [settings.scale]
        ds, d_up = ops.run_op(ops.back_up, x, [dy], *factors, [], [], [], [], 0.0, False)
        dx = d_down = None
        if wants_x and weight is not None:
            dx = _addressable(_conv_gradients(settings, dy, x, weight, (True, False))[0])
        if cast is None:
            if wants_x and dx is None:
                dx = torch.empty_like(x)
            d_down = torch.empty_like(down)
            fresh = weight is None
            ops.run_op(ops.back_down_, x, dx, [d_down], ds, x, [down], *NO_DROPOUT, fresh)
        else:
            more, d_down = _conv_gradients(settings, ds, x, cast, (wants_x, wants_down))
            dx = more if dx is None else dx.add_(more)
            if d_down is not None:
                d_down = d_down.to(torch.float32, memory_format=torch.contiguous_format)
        d_down = d_down.view(ctx.down_shape) if wants_down and d_down is not None else None
        d_up = d_up.view(ctx.up_shape) if wants_up else None
        return None, dx if wants_x else None, None, None, d_down, d_up


def _addressable(x: Tensor) -> Tensor:
    """x [b, c, h, w], copied where the kernels cannot address its pixels as rows."""
    return x if is_plane(x) else x.contiguous()


def _empty_like_images(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialized images of this shape in x's memory format."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _conv_gradients(
    settings: ConvSettings, dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, each None unless wanted."""
    window = settings.stride, settings.padding, settings.dilation
    d_x, d_weight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, *window, False, [0, 0], 1, [*wanted, False]
    )
    return d_x, d_weight
