"""prodigy_step and adamw_step with one pass over the memory each, on the CPU: loops.c, compiled when the first step asks for it.

Torch operations read and write the state some twelve times a step, whatever the size of their pieces; the two loops do it twice. On one Zen 4 thread
and SDXL's 23.2 M parameters at rank 16 that is 32 ms a step to prodigyopt's 100 (benchmarks/optimizer.py).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_core.kernels import steps
from lora_core.kernels.flat import FlatParameters
from lora_core.kernels.steps import AdamWSettings, MovingGroup

# Errors of sqrt and traps are not asked for; else the loops keep to IEEE arithmetic, NaN and infinity included, and their sums to one order.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
DTYPES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled loops, or None where that fails; a printed line says either. Nothing stays on disk: it is code for this very processor."""
    began, compiler = (
        time.perf_counter(),
        os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "cc"),
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "loops.so"
            command = [
                compiler,
                *FLAGS,
                str(Path(__file__).with_name("loops.c")),
                "-o",
                str(built),
                "-lm",
            ]
            subprocess.run(command, check=True, capture_output=True, text=True)
            loaded = ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        print(
            f"optimiser: no compiled loops ({reason}); steps on the CPU run in torch operations, which is slower",
            file=sys.stderr,
        )
        return None
    print(
        f"optimiser: loops for this CPU compiled with {compiler} in {time.perf_counter() - began:.1f} s",
        file=sys.stderr,
    )
    return loaded


def fused_prodigy_step(
    scalars: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    rows: Sequence[MovingGroup],
) -> tuple[Tensor, ...]:
    """steps.prodigy_step; by it where the tensors are not fp32 or fp64 on the CPU, an lr is a tensor, or ranks share the sums."""
    able = all(
        _is_supported(row.flat) and not row.recipe.sharded and not isinstance(row.recipe.lr, Tensor)
        for row in rows
    )
    if not able or (loops := load_library()) is None:
        return steps.prodigy_step(scalars, found_inf, grad_scale, rows)
    params = tuple(row.flat.param for row in rows)
    if found_inf is not None and _read_scalar(found_inf):
        return params
    table = (ctypes.c_double * scalars.numel()).from_address(
        scalars.data_ptr()
    )  # read and written as it lies
    unscale = 1.0 if grad_scale is None else 1 / _read_scalar(grad_scale)
    rates = [_learning_rate(table, row) for row in rows]
    numerators, denominator = (
        {row.group: table[6 * row.group + steps.NUMERATOR] * row.recipe.beta3 for row in rows},
        0.0,
    )
    for row, rate in zip(rows, rates):
        inner, size = _update_moments(loops, row, table[6 * row.group + steps.D], rate, unscale)
        numerators[row.group] += table[6 * row.group + steps.D] / row.recipe.d0 * rate * inner
        denominator += size
    if denominator == 0:
        return params
    d = _update_distance(table, rows[0], sum(numerators.values()), denominator)
    for row, rate in zip(rows, rates):
        _update_parameters(loops, row, d, rate, unscale)
    for group, numerator in numerators.items():
        table[6 * group + steps.NUMERATOR] = numerator
        table[6 * group + steps.K] += 1
    return params


def fused_adamw_step(
    param: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    flat: FlatParameters,
    grads: Sequence[Tensor | None],
    recipe: AdamWSettings,
) -> tuple[Tensor, ...]:
    """steps.adamw_step; where the tensors are not fp32 or fp64 on the CPU or lr is a tensor, by torch's fused kernel, if it takes them."""
    if (
        not _is_supported(flat)
        or isinstance(recipe.lr, Tensor)
        or (loops := load_library()) is None
    ):
        return _torch_fused_adamw(found_inf, grad_scale, flat, grads, recipe)
    if found_inf is None or not _read_scalar(found_inf):
        unscale = 1.0 if grad_scale is None else 1 / _read_scalar(grad_scale)
        numbers = _doubles(
            unscale, recipe.lr, recipe.beta1, recipe.beta2, recipe.eps, recipe.weight_decay
        )
        state = flat.state
        _find_loop(loops, "adamw", flat)(
            *_gradient_table(flat, grads),
            _pointer(param),
            _pointer(state["exp_avg"]),
            _pointer(state["exp_avg_sq"]),
            _pointer(state["step"]),
            numbers,
        )
    return (param,)


def _torch_fused_adamw(
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    flat: FlatParameters,
    grads: Sequence[Tensor | None],
    recipe: AdamWSettings,
) -> tuple[Tensor, ...]:
    """By torch._fused_adamw_, which wants state in the parameters' dtype; a grad_scale is divided out of the gradients themselves there."""
    if flat.param.dtype != flat.state["exp_avg"].dtype or flat.param.device.type not in (
        "cpu",
        "cuda",
        "mps",
        "xpu",
    ):
        return steps.adamw_step(flat.param, found_inf, grad_scale, flat, grads, recipe)
    moving = [
        (start, start + count, g)
        for (start, count, _), g in zip(flat.bounds, grads)
        if g is not None
    ]
    params, m, v = (
        [x[start:end] for start, end, _ in moving]
        for x in (flat.param, flat.state["exp_avg"], flat.state["exp_avg_sq"])
    )
    counts = [step for step, g in zip(flat.state["step"].unbind(), grads) if g is not None]
    torch._foreach_add_(counts, 1)
    torch._fused_adamw_(
        params, [g.reshape(-1) for _, _, g in moving], m, v, [], counts,
        lr=recipe.lr, beta1=recipe.beta1, beta2=recipe.beta2, weight_decay=recipe.weight_decay, eps=recipe.eps,
        amsgrad=False, maximize=False, grad_scale=grad_scale, found_inf=None if found_inf is None else found_inf.reshape(()),
    )  # fmt: skip
    if found_inf is not None:
        torch._foreach_sub_(counts, [found_inf.reshape(())] * len(counts))
    return (flat.param,)


def _learning_rate(table: ctypes.Array[ctypes.c_double], row: MovingGroup) -> float:
    """dlr = d * lr * bias correction, of the old d."""
    recipe, k = row.recipe, table[6 * row.group + steps.K] + 1
    rate = table[6 * row.group + steps.D] * float(recipe.lr)
    return (
        rate * (1 - recipe.beta2**k) ** 0.5 / (1 - recipe.beta1**k)
        if recipe.bias_correction
        else rate
    )


def _update_moments(
    loops: ctypes.CDLL, row: MovingGroup, d: float, rate: float, unscale: float
) -> tuple[float, float]:
    """(<g, p0 - p>, |s|_1) after bringing m, v and s up to date."""
    flat, recipe, sums = row.flat, row.recipe, _doubles(0.0, 0.0)
    weight = d / recipe.d0 * (d if recipe.safeguard else rate)
    numbers = _doubles(
        unscale, _coupled_decay(row), recipe.beta3, weight, d, recipe.beta1, recipe.beta2
    )
    arrays = [
        _pointer(x)
        for x in (
            flat.param,
            flat.state["p0"],
            flat.state.get("exp_avg"),
            flat.state["exp_avg_sq"],
            flat.state["s"],
        )
    ]
    _find_loop(loops, "prodigy_reduce", flat)(
        *_gradient_table(flat, row.grads), *arrays, ctypes.c_int64(recipe.slice_p), numbers, sums
    )
    return sums[0], sums[1]


def _update_distance(
    table: ctypes.Array[ctypes.c_double], row: MovingGroup, numerator: float, denominator: float
) -> float:
    """The new d, written to every group; a NaN moves nothing here and shows in the weights."""
    recipe, at = row.recipe, 6 * row.group
    d, d_max, d_hat = (
        table[at + steps.D],
        table[at + steps.D_MAX],
        recipe.d_coef * numerator / denominator,
    )
    d_max = d_hat if d_hat > d_max else d_max
    grown = (d_hat if d == recipe.d0 and d_hat > d else d) * recipe.growth_rate
    new = grown if grown < d_max else d_max
    for start in range(0, len(table), 6):
        table[start + steps.D], table[start + steps.D_MAX] = new, d_max
        table[start + steps.DENOMINATOR], table[start + steps.D_HAT] = denominator, d_hat
    return new


def _update_parameters(
    loops: ctypes.CDLL, row: MovingGroup, d: float, rate: float, unscale: float
) -> None:
    """p <- p - rate decay p - rate m / (sqrt(v) + d eps), both sides divided by d; without m the gradient has no d in it yet."""
    flat, recipe = row.flat, row.recipe
    decay = -rate * recipe.weight_decay if recipe.decouple else 0.0
    numbers = _doubles(
        unscale,
        _coupled_decay(row),
        decay,
        -rate / d if recipe.beta1 > 0 else -rate,
        1 / d,
        recipe.eps,
    )
    arrays = [
        _pointer(x) for x in (flat.param, flat.state.get("exp_avg"), flat.state["exp_avg_sq"])
    ]
    _find_loop(loops, "prodigy_update", flat)(*_gradient_table(flat, row.grads), *arrays, numbers)


def _coupled_decay(row: MovingGroup) -> float:
    return 0.0 if row.recipe.decouple else row.recipe.weight_decay


def _is_supported(flat: FlatParameters) -> bool:
    return flat.param.dtype in DTYPES and flat.param.device.type == "cpu"


def _find_loop(loops: ctypes.CDLL, name: str, flat: FlatParameters) -> ctypes._NamedFuncPointer:
    found = loops[f"{name}_{str(flat.param.dtype).removeprefix('torch.')}"]
    found.restype = None
    return found


def _gradient_table(
    flat: FlatParameters, grads: Sequence[Tensor | None]
) -> tuple[ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]:
    words = flat.words.send([0 if g is None else g.data_ptr() for g in grads], [])
    return ctypes.c_int64(len(grads)), _pointer(words), _pointer(flat.geometry)


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _doubles(*values: float) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * len(values))(*values)


def _read_scalar(x: Tensor) -> float:
    """The value of a tensor with one element on the CPU, straight from its memory."""
    return float(DTYPES[x.dtype].from_address(x.data_ptr()).value)
