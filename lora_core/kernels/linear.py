"""Triton twins of lora_linear, lora_grouped and lora_conv: four launches beside the frozen layers' products, forward and backward together.

Forward: shrink reads x once for all members, the frozen products run in cuBLAS, expand_ adds the up-projections in place (DoRA: and applies gain
and bias in the same pass). Backward: back_up reads dy, the frozen products make dx, back_down_ reads x and adds to dx in place. t = x' down^T is
saved, never x' or a mask. DoRA saves its output y, which attention keeps anyway, and not z = (y - bias) / gain: where |gain| is at most the machine
epsilon of y's dtype (the smallest normal number, without a bias), y no longer tells z from the bias, and that row's magnitude and norm get a gradient
of 0. The reference, which keeps z, gives one.

A weight is never differentiated. Activations are rounded to x's dtype where torch rounds them too: t, dS, dz, and each sum that dx takes up.
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
from lora_core.kernels.linear_tiles import is_plane
from lora_core.kernels.reference import Drop, Member

EACH = 6  # tensors of a member: weight, bias, down, up, magnitude, norm


class Static(NamedTuple):
    """What a group knows beside its tensors."""

    scales: tuple[float, ...]
    gain: bool  # DoRA
    words: tuple[int, ...] = ()  # of dropout, as linear_ops takes them
    kept: tuple[float, ...] = ()


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
    return _group(x, [Member(weight, bias, down, up, scale, magnitude, norm, drop)])[0]  # type: ignore[arg-type]


def lora_grouped(x: Tensor, members: tuple[Member, ...]) -> tuple[Tensor, ...]:
    """reference.lora_grouped: neighbours that are alike share their launches, at most four at a time."""
    outputs: list[Tensor] = []
    bundle: list[Member] = []
    for member in members:
        if bundle and (len(bundle) == ops.MEMBERS or _kind(member) != _kind(bundle[0])):
            outputs += _group(x, bundle)
            bundle = []
        bundle.append(member)
    return (*outputs, *_group(x, bundle)) if bundle else tuple(outputs)


def _kind(member: Member) -> tuple[Any, ...]:
    """What the members of one launch have in common."""
    gain, drop = _has_gain(member), member.drop
    return (
        gain,
        gain and member.bias is None,
        member.weight is None,
        drop and (id(drop.step), id(drop.rows)),
    )


def _has_gain(member: Member) -> bool:
    return member.weight is not None and member.magnitude is not None and member.norm is not None


def _group(x: Tensor, members: list[Member]) -> tuple[Tensor, ...]:
    drops = [member.drop for member in members if member.drop is not None]
    words = tuple(word for drop in drops for word in _words(drop))
    static = Static(
        tuple(float(m.scale) for m in members),
        _has_gain(members[0]),
        words,
        tuple(1 - drop.p for drop in drops),
    )
    step, rows = (drops[0].step, drops[0].rows) if drops else (None, None)
    return Grouped.apply(
        static,
        x,
        step,
        rows,
        *(tensor for m in members for tensor in (*m[:4], m.magnitude, m.norm)),
    )


def _words(drop: Drop) -> tuple[int, int]:
    """The hash of seed and layer, and the threshold below which an element is dropped: uint32 as Triton's int32."""
    return dropout.hash_stream(drop.seed, drop.layer), dropout.keep_threshold(drop.p)


class Grouped(torch.autograd.Function):
    """(static, x, step, rows, EACH tensors of every member) -> the members' outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        static: Static,
        x: Tensor,
        step: Tensor | None,
        rows: Tensor | None,
        *given: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, biases, downs, ups, magnitudes, norms = _columns(given)
        x2 = x.reshape(-1, x.shape[-1])
        drop = [] if step is None or rows is None else [step, rows]
        t = ops.run_op(ops.shrink, x2, x2, downs, drop, list(static.words), list(static.kept))
        ys = [
            _base(x2, weight, None if static.gain else bias, len(up))
            for weight, bias, up in zip(weights, biases, ups)
        ]
        gain = (
            (magnitudes, norms, [b for b in biases if b is not None])
            if static.gain
            else ([], [], [])
        )
        ops.run_op(ops.expand_, x2, ys, t, ups, list(static.scales), *gain, weights[0] is None)
        ctx.static, ctx.shape = static, x.shape
        ctx.set_materialize_grads(False)
        kept = [
            tensor
            for member in zip(
                weights, biases if static.gain else [None] * len(ups), downs, ups, magnitudes, norms
            )
            for tensor in member
        ]
        ctx.save_for_backward(x2, t, step, rows, *kept, *(ys if static.gain else []))
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        static, (x, t, step, rows, *saved) = ctx.static, ctx.saved_tensors
        needs = ctx.needs_input_grad
        given: list[Tensor | None] = [None] * (4 + EACH * len(dys))
        active = [i for i, dy in enumerate(dys) if dy is not None]
        if not active:
            return tuple(given)
        weights, biases, downs, ups, magnitudes, norms = (
            [column[i] for i in active] for column in _columns(saved[: EACH * len(dys)])
        )
        outs = [_rows(dys[i]) for i in active]
        scales, ranks = (
            [static.scales[i] for i in active],
            [len(down) for down in _columns(saved[: EACH * len(dys)])[2]],
        )
        gain: tuple[list[Tensor], ...] = ([], [], [], [])
        if static.gain:
            gain = (
                [saved[EACH * len(dys) + i] for i in active],
                magnitudes,
                norms,
                [b for b in biases if b is not None],
            )
        found = ops.run_op(
            ops.back_up,
            x,
            outs,
            t,
            [sum(ranks[:i]) for i in active],
            ups,
            scales,
            *gain,
            _guard(x.dtype, gain),
            needs[1],
        )
        ds, d_ups, found = found[0], found[1 : 1 + len(active)], found[1 + len(active) :]
        if static.gain and needs[1]:
            outs, found = found[: len(active)], found[len(active) :]
        dx = _base_gradient(x, outs, weights) if needs[1] else None
        drop, words = (
            ([step, rows], [w for i in active for w in static.words[2 * i : 2 * i + 2]])
            if static.words
            else ([], [])
        )
        if needs[1] or any(needs[4 + EACH * i + 2] for i in active):
            d_downs, kept = (
                [torch.empty_like(down) for down in downs],
                [static.kept[i] for i in active] if drop else [],
            )
            ops.run_op(
                ops.back_down_, x, dx, d_downs, ds, x, downs, drop, words, kept, weights[0] is None
            )
            for i, d_down in zip(active, d_downs):
                given[4 + EACH * i + 2] = d_down
        for place, i in enumerate(active):
            given[4 + EACH * i + 3] = d_ups[place]
            if static.gain:
                given[4 + EACH * i + 4], given[4 + EACH * i + 5] = found[place].unbind()
        given[1] = None if dx is None else dx.view(ctx.shape)
        return tuple(gradient if need else None for gradient, need in zip(given, needs))


def _columns(given: Any) -> tuple[list[Any], ...]:
    """The members' weights, biases, downs, ups, magnitudes and norms; the last four contiguous."""
    columns = [list(given[i::EACH]) for i in range(EACH)]
    return *columns[:2], *(
        [tensor if tensor is None else tensor.contiguous() for tensor in column]
        for column in columns[2:]
    )


def _base(x: Tensor, weight: Tensor | None, bias: Tensor | None, width: int) -> Tensor:
    """The frozen product of x [m, in], or room for what expand_ writes."""
    if weight is None:
        return x.new_empty(len(x), width)
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _base_gradient(x: Tensor, outs: list[Tensor], weights: list[Tensor | None]) -> Tensor:
    """dx [m, in] of the frozen products, or room for what back_down_ writes."""
    dx: Tensor | None = None
    for out, weight in zip(outs, weights):
        if weight is not None:
            dx = torch.mm(out, weight) if dx is None else dx.addmm_(out, weight)
    return torch.empty_like(x, memory_format=torch.contiguous_format) if dx is None else dx


def _rows(dy: Any) -> Tensor:
    """dy as [m, out] whose features lie side by side."""
    rows = dy.reshape(-1, dy.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _guard(dtype: torch.dtype, gain: tuple[list[Tensor], ...]) -> float:
    """The |gain| up to which y does not tell z."""
    return torch.finfo(dtype).eps if gain[3] else torch.finfo(dtype).tiny


class Geometry(NamedTuple):
    """A convolution's numbers, and the scale."""

    scale: float
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def pointwise(self, down: Tensor) -> bool:
        """Whether it is a linear layer of the pixels."""
        return (
            tuple(down.shape[2:]) == (1, 1) and set(self.stride) == {1} and set(self.padding) == {0}
        )


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
    """reference.lora_conv of one group: the up-projection by expand_, and a 1x1 convolution wholly by the linear kernels, in any memory format."""
    sides = resolve_padding(padding, down.shape[2:], dilation)
    assert groups == 1 and sides is not None  # supports has seen to it
    return Conv.apply(
        Geometry(float(scale), tuple(stride), sides, tuple(dilation)), x, weight, bias, down, up
    )


class Conv(torch.autograd.Function):
    """(geometry, x, weight, bias, down, up) -> y. Of a larger kernel the down-convolution is torch's, and its two gradients are."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Geometry,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
    ) -> Tensor:
        x, down2, up2 = _pixels(x), down.flatten(1).contiguous(), up.flatten(1).contiguous()
        if g.pointwise(down):
            cast, hidden, size = (
                None,
                ops.run_op(ops.shrink, x, x, [down2], [], [], []),
                x.shape[2:],
            )
        else:
            cast = down.to(x.dtype)
            hidden = F.conv2d(x, cast, None, g.stride, g.padding, g.dilation)
            size = hidden.shape[2:]
        layout = (
            torch.channels_last
            if x.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
        y = (
            F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation)
            if weight is not None
            else _room(x, (len(x), len(up), *size), layout)
        )
        ops.run_op(ops.expand_, x, [y], hidden, [up2], [g.scale], [], [], [], weight is None)
        ctx.geometry, ctx.up_shape, ctx.down_shape = g, up.shape, down.shape
        ctx.save_for_backward(x, weight, cast, down2, up2, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        g, (x, weight, cast, down, up, hidden) = ctx.geometry, ctx.saved_tensors
        needs, dy = ctx.needs_input_grad, _pixels(dy)
        ds, d_up = ops.run_op(
            ops.back_up, x, [dy], hidden, [0], [up], [g.scale], [], [], [], [], 0.0, False
        )
        dx = g_down = None
        if needs[1] and weight is not None:
            dx = _pixels(_conv_gradients(g, dy, x, weight, (True, False))[0])
        if cast is None:
            if needs[1] and dx is None:
                dx = torch.empty_like(x)
            g_down = torch.empty_like(down)
            ops.run_op(ops.back_down_, x, dx, [g_down], ds, x, [down], [], [], [], weight is None)
        else:
            more, g_down = _conv_gradients(g, ds, x, cast, (needs[1], needs[4]))
            dx = more if dx is None else dx.add_(more)
            g_down = (
                None
                if g_down is None
                else g_down.to(torch.float32, memory_format=torch.contiguous_format)
            )
        d_down = None if g_down is None else g_down.view(ctx.down_shape)
        return (
            None,
            dx if needs[1] else None,
            None,
            None,
            d_down if needs[4] else None,
            d_up.view(ctx.up_shape) if needs[5] else None,
        )


def _pixels(x: Tensor) -> Tensor:
    """x [b, c, h, w], copied where the kernels could not address its pixels as rows."""
    return x if is_plane(x) else x.contiguous()


def _room(x: Tensor, shape: tuple[int, ...], layout: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _conv_gradients(
    g: Geometry, dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, each None unless wanted."""
    mask = [*wanted, False]
    found = torch.ops.aten.convolution_backward(
        dy, x, weight, None, g.stride, g.padding, g.dilation, False, [0, 0], 1, mask
    )
    return found[0], found[1]
