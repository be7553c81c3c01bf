"""Prodigy's and AdamW's steps on the CPU, in compiled C.

Torch operations read and write Prodigy's state some twelve times a step, in pieces of any size; the
loops of loops.c do it twice. On one Zen 4 thread and SDXL's 23.2 M parameters at rank 16 that is
32 ms a step against prodigyopt's 100 (benchmarks/optimizer.py).

The C compiler runs once per machine: the library stays in ~/.cache/lora_core (XDG_CACHE_HOME),
named after its source, its flags and the processor. Without a compiler the same steps run in torch
operations, which one printed sentence reports.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import operator
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_core.kernels import steps
from lora_core.kernels.flat import FlatParameters
from lora_core.kernels.flat_steps import flat_prodigy_step
from lora_core.kernels.steps import AdamWSettings, MovingGroup, ProdigySettings
from lora_core.kernels.winners import cache_file

SOURCE = Path(__file__).with_name("loops.c")
# Without sqrt's errno and floating-point traps; otherwise IEEE arithmetic, NaN and infinity
# included, and sums in one order.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
DTYPES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}
COLUMNS = 6  # columns of Prodigy's scalars

INTEGER, ADDRESS = ctypes.c_int64, ctypes.c_void_p
ARGUMENTS = {  # of loops.c; the first three are parameters, gradients, geometry
    "prodigy_reduce": [INTEGER, *[ADDRESS] * 7, INTEGER, ADDRESS, ADDRESS],
    "prodigy_update": [INTEGER, *[ADDRESS] * 6],
    "adamw": [INTEGER, *[ADDRESS] * 7],
}
Loops = dict[tuple[str, torch.dtype], Callable[..., None]]


# ---------------------------------------------------------------- the compiled library


@functools.cache
def load_library() -> Loops | None:
    """The compiled loops by name and dtype; None, and one printed sentence, without a compiler."""
    try:
        return _find_loops(ctypes.CDLL(str(_library_file())))
    except (OSError, AttributeError):
        pass  # not built yet, or damaged
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")
    try:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "loops.so"
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            found = _find_loops(ctypes.CDLL(str(built)))
            _store_library(built)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        print(
            f"optimizer: no compiled loops ({reason}); steps on the CPU run in torch operations, "
            "which is slower",
            file=sys.stderr,
        )
        return None
    return found


def _find_loops(library: ctypes.CDLL) -> Loops:
    found = {}
    for name, arguments in ARGUMENTS.items():
        for dtype in DTYPES:
            loop = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")
            loop.argtypes, loop.restype = arguments, None
            found[name, dtype] = loop
    return found


def _library_file() -> Path:
    """The cached library of this processor; a shared home may serve several processors."""
    parts = [SOURCE.read_text(), *FLAGS, platform.system(), platform.machine(), _processor()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cache_file().with_name(f"loops-{key}.so")


def _processor() -> str:
    """The processor's model and instruction sets, for which -march=native compiles."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(named)))


def _store_library(built: Path) -> None:
    """Copies the library to the cache, whole or not at all; a read-only cache is no error."""
    target = _library_file()
    temporary = target.with_suffix(f".{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, temporary)
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- Prodigy


def fused_prodigy_step(
    scalars: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    groups: Sequence[MovingGroup],
) -> tuple[Tensor, ...]:
    """steps.prodigy_step in C.

    In torch operations where the tensors are not fp32 or fp64 on the CPU, a learning rate is a
    tensor, ranks share the sums, or there is no compiler.
    """
    for group in groups:
        sharded, lr, param = group.settings.sharded, group.settings.lr, group.flat.param
        if sharded or isinstance(lr, Tensor) or not param.is_cpu or param.dtype not in DTYPES:
            return flat_prodigy_step(scalars, found_inf, grad_scale, groups)
    loops = load_library()
    if loops is None:
        return flat_prodigy_step(scalars, found_inf, grad_scale, groups)
    params = tuple(map(operator.attrgetter("flat.param"), groups))
    if found_inf is not None and _read_scalar(found_inf):
        return params
    unscale = 1.0 if grad_scale is None else 1 / _read_scalar(grad_scale)
    # The scalars are read and written in place.
    table = (ctypes.c_double * scalars.numel()).from_address(scalars.data_ptr())
    numerators: dict[int, float] = {}
    denominator = 0.0
    calls = []
    for group in groups:
        settings, start = group.settings, COLUMNS * group.row
        d = table[start + steps.D]
        rate = _learning_rate(d, table[start + steps.K] + 1, settings)
        gradients = group.flat.send_table([], group.grads).data_ptr()
        inner, size = _update_moments(loops, group, gradients, d, rate, unscale)
        before = numerators.get(group.row, table[start + steps.NUMERATOR] * settings.beta3)
        numerators[group.row] = before + d / settings.d0 * rate * inner
        denominator += size
        calls.append((group, gradients, rate))
    if denominator == 0:
        return params
    d = _update_distance(table, groups[0], sum(numerators.values()), denominator)
    for group, gradients, rate in calls:
        _update_parameters(loops, group, gradients, d, rate, unscale)
    for index, numerator in numerators.items():
        table[COLUMNS * index + steps.NUMERATOR] = numerator
        table[COLUMNS * index + steps.K] += 1
    return params


def _learning_rate(d: float, k: float, settings: ProdigySettings) -> float:
    """d * lr * bias correction of step k, with the d from before the step."""
    rate = d * float(settings.lr)
    if settings.bias_correction:
        return rate * (1 - settings.beta2**k) ** 0.5 / (1 - settings.beta1**k)
    return rate


def _update_moments(
    loops: Loops, group: MovingGroup, gradients: int, d: float, rate: float, unscale: float
) -> tuple[float, float]:
    """(<g, p0 - p>, |s|_1) after updating m, v and s."""
    flat, settings = group.flat, group.settings
    state, m = flat.state, flat.state.get("exp_avg")
    coupled = 0.0 if settings.decouple else settings.weight_decay
    weight = d / settings.d0 * (d if settings.safeguard else rate)
    decays = settings.beta3, weight, d, settings.beta1, settings.beta2
    numbers = (ctypes.c_double * 7)(unscale, coupled, *decays)
    sums = (ctypes.c_double * 2)(0.0, 0.0)
    loops["prodigy_reduce", flat.param.dtype](
        len(group.grads),
        gradients,
        flat.geometry.data_ptr(),
        flat.param.data_ptr(),
        state["p0"].data_ptr(),
        None if m is None else m.data_ptr(),
        state["exp_avg_sq"].data_ptr(),
        state["s"].data_ptr(),
        settings.slice_p,
        numbers,
        sums,
    )
    return sums[0], sums[1]


def _update_distance(
    table: ctypes.Array[ctypes.c_double], group: MovingGroup, numerator: float, denominator: float
) -> float:
    """The new d, written to every group; unchanged for a NaN, which then shows in the weights."""
    settings, start = group.settings, COLUMNS * group.row
    d, d_max = table[start + steps.D], table[start + steps.D_MAX]
    d_hat = settings.d_coef * numerator / denominator
    d_max = d_hat if d_hat > d_max else d_max
    grown = (d_hat if d == settings.d0 and d_hat > d else d) * settings.growth_rate
    new_d = grown if grown < d_max else d_max
    for start in range(0, len(table), COLUMNS):
        table[start + steps.D] = new_d
        table[start + steps.D_MAX] = d_max
        table[start + steps.DENOMINATOR] = denominator
        table[start + steps.D_HAT] = d_hat
    return new_d


def _update_parameters(
    loops: Loops, group: MovingGroup, gradients: int, d: float, rate: float, unscale: float
) -> None:
    """p <- p - rate decay p - rate m / (sqrt(v) + d eps).

    Both sides of the quotient are divided by d; without m the gradient has no factor d yet.
    """
    flat, settings = group.flat, group.settings
    m = flat.state.get("exp_avg")
    coupled = 0.0 if settings.decouple else settings.weight_decay
    decay = -rate * settings.weight_decay if settings.decouple else 0.0
    by = -rate if m is None else -rate / d
    loops["prodigy_update", flat.param.dtype](
        len(group.grads),
        gradients,
        flat.geometry.data_ptr(),
        flat.param.data_ptr(),
        None if m is None else m.data_ptr(),
        flat.state["exp_avg_sq"].data_ptr(),
        (ctypes.c_double * 6)(unscale, coupled, decay, by, 1 / d, settings.eps),
    )


# ---------------------------------------------------------------- AdamW


def fused_adamw_step(
    param: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    flat: FlatParameters,
    grads: Sequence[Tensor | None],
    settings: AdamWSettings,
) -> tuple[Tensor, ...]:
    """steps.adamw_step in C.

    By torch's fused kernel, if it supports them, where the tensors are not fp32 or fp64 on the CPU,
    the learning rate is a tensor, or there is no compiler.
    """
    supported = param.is_cpu and param.dtype in DTYPES and not isinstance(settings.lr, Tensor)
    loops = load_library() if supported else None
    if loops is None:
        return _torch_fused_adamw(found_inf, grad_scale, flat, grads, settings)
    if found_inf is None or not _read_scalar(found_inf):
        unscale = 1.0 if grad_scale is None else 1 / _read_scalar(grad_scale)
        loops["adamw", param.dtype](
            len(grads),
            flat.send_table([], grads).data_ptr(),
            flat.geometry.data_ptr(),
            param.data_ptr(),
            flat.state["exp_avg"].data_ptr(),
            flat.state["exp_avg_sq"].data_ptr(),
            flat.state["step"].data_ptr(),
            (ctypes.c_double * 6)(
                unscale,
                float(settings.lr),
                settings.beta1,
                settings.beta2,
                settings.eps,
                settings.weight_decay,
            ),
        )
    return (param,)


def _torch_fused_adamw(
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    flat: FlatParameters,
    grads: Sequence[Tensor | None],
    settings: AdamWSettings,
) -> tuple[Tensor, ...]:
    """torch._fused_adamw_, if the state has the parameters' dtype; else steps.adamw_step."""
    device_type = flat.param.device.type
    same_dtype = flat.param.dtype == flat.state["exp_avg"].dtype
    if not same_dtype or device_type not in ("cpu", "cuda", "mps", "xpu"):
        return steps.adamw_step(flat.param, found_inf, grad_scale, flat, grads, settings)
    params, gradients, exp_avgs, exp_avg_sqs, counts = [], [], [], [], []
    for x, g, state in flat.iterate_tensors(grads):
        params.append(x)
        gradients.append(g)
        exp_avgs.append(state["exp_avg"])
        exp_avg_sqs.append(state["exp_avg_sq"])
        counts.append(state["step"].reshape(()))
    overflow = None if found_inf is None else found_inf.reshape(())
    torch._foreach_add_(counts, 1)
    torch._fused_adamw_(
        params,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        counts,
        **settings._asdict(),
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,  # divided out of the gradients themselves
        found_inf=overflow,
    )
    if overflow is not None:
        torch._foreach_sub_(counts, [overflow] * len(counts))
    return (flat.param,)


def _read_scalar(x: Tensor) -> float:
    """The value of a tensor with one element on the CPU, straight from its memory."""
    return float(DTYPES[x.dtype].from_address(x.data_ptr()).value)
