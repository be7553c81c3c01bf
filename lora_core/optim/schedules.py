"""Learning-rate schedules, the choice of an optimiser, gradient clipping and fp16 loss scaling: what surrounds `optimizer.step()`."""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.optim.adamw import AdamW
from lora_core.plugins import load_from_file
from lora_core.prodigy import Prodigy


def _warmup_factor(step: int, warmup: int) -> float | None:
    return step / max(1, warmup) if step < warmup else None


def _progress(step: int, total: int, warmup: int) -> float:
    return (step - warmup) / max(1, total - warmup)


def constant_schedule(step: int, total: int, warmup: int) -> float:
    """1 after a linear warm-up."""
    warm = _warmup_factor(step, warmup)
    return 1.0 if warm is None else warm


def linear_schedule(step: int, total: int, warmup: int) -> float:
    """Falls from 1 to 0 on a straight line, after a linear warm-up."""
    warm = _warmup_factor(step, warmup)
    return max(0.0, (total - step) / max(1, total - warmup)) if warm is None else warm


def cosine_schedule(step: int, total: int, warmup: int, *, cycles: float = 0.5) -> float:
    """(1 + cos(2 pi cycles progress)) / 2 after a linear warm-up; half a cycle ends at 0 (arXiv 1608.03983 without restarts)."""
    warm = _warmup_factor(step, warmup)
    return (
        max(0.0, 0.5 * (1 + math.cos(2 * math.pi * cycles * _progress(step, total, warmup))))
        if warm is None
        else warm
    )


def cosine_restarts_schedule(step: int, total: int, warmup: int, *, cycles: int = 1) -> float:
    """`cycles` half cosines from 1 to 0, each beginning anew at 1 (arXiv 1608.03983), after a linear warm-up."""
    warm, progress = _warmup_factor(step, warmup), _progress(step, total, warmup)
    if warm is not None:
        return warm
    return (
        0.0 if progress >= 1 else max(0.0, 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1))))
    )


def polynomial_schedule(
    step: int, total: int, warmup: int, *, power: float = 1.0, end: float = 0.0
) -> float:
    """Falls from 1 to `end` as (1 - progress)^power after a linear warm-up; `end` is a fraction of the learning rate (diffusers: lr_end / lr)."""
    warm = _warmup_factor(step, warmup)
    if warm is not None:
        return warm
    return end if step > total else end + (1 - end) * (1 - _progress(step, total, warmup)) ** power


# name -> fn(step, total, warmup, **args) -> multiplier of the learning rate; steps count from 0; formulas of diffusers.optimization
SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant_schedule,
    "linear": linear_schedule,
    "cosine": cosine_schedule,
    "cosine_restarts": cosine_restarts_schedule,
    "polynomial": polynomial_schedule,
}

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": AdamW, "prodigy": Prodigy}
DEFAULT_RATES = {  # optimiser -> group -> learning rate; adamw: cloneofsimo's lora_pti, prodigy: arXiv 2306.06101
    "adamw": {"denoiser": 1e-4, "text_encoder": 1e-5, "tokens": 5e-4},
    "prodigy": {"denoiser": 1.0, "text_encoder": 1.0, "tokens": 1.0},
}
DEFAULT_WEIGHT_DECAYS = {
    "denoiser": 0.01,
    "text_encoder": 0.01,
    "tokens": 0.0,
}  # group -> weight decay
OWN_OPTIONS = (
    "params",
    "lr",
    "weight_decay",
    "betas",
)  # arguments of an optimiser that have options of their own


def resolve_schedule(name: str, **args: Any) -> Callable[[int, int, int], float]:
    """fn(step, total, warmup) -> multiplier, of a row of SCHEDULES or "path/to/file.py:function", with the schedule's own arguments bound.

    Raises UserError for an unknown name or argument, and, when called, for a multiplier that is not a finite number of at least 0.
    """
    file, _, function = name.rpartition(":")
    if name not in SCHEDULES and not file.endswith(".py"):
        known = f"{', '.join(SCHEDULES)} or path/to/file.py:function"
        raise UserError(
            f"schedule {name!r} is unknown; expected one of {known}{_nearest(name, SCHEDULES)}"
        )
    schedule = SCHEDULES[name] if name in SCHEDULES else load_from_file(file, function, "function")
    check_arguments(schedule, args, f"schedule {name}", given=("step", "total", "warmup"))

    def multiplier(step: int, total: int, warmup: int) -> float:
        try:
            value = float(schedule(step, total, warmup, **args))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"schedule {name} is called as fn(step, total, warmup) and returns a number: {error}"
            ) from error
        if not (math.isfinite(value) and value >= 0):
            raise UserError(
                f"schedule {name} is {value:g} at step {step} of {total}; expected a finite number of at least 0"
            )
        return value

    return multiplier


def resolve_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The optimiser class of a row of OPTIMIZERS, of a dotted path such as "torch.optim.Adagrad", or of "path/to/file.py:Class".

    Raises UserError if there is none.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    file, _, attribute = name.rpartition(":")
    if file.endswith(".py"):
        return _optimizer_class(load_from_file(file, attribute, "class"), name)
    path, _, attribute = name.rpartition(".")
    if not path:
        raise UserError(
            f"optimizer {name!r} is unknown; expected one of {', '.join(OPTIMIZERS)}, a dotted class path such as "
            f"torch.optim.Adagrad, or path/to/file.py:Class{_nearest(name, OPTIMIZERS)}"
        )
    try:
        module = importlib.import_module(path)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"optimizer {name!r}: module {path!r} cannot be imported ({error}); install it or mend the path"
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise UserError(
            f"optimizer {name!r}: module {path!r} has no {attribute!r}; name a class in it{_nearest(attribute, dir(module))}"
        )
    return _optimizer_class(found, name)


def _optimizer_class(found: Any, name: str) -> type[torch.optim.Optimizer]:
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(
            f"optimizer {name!r} is {found!r}, not a torch.optim.Optimizer class; name the class itself"
        )
    return found


def default_rates(name: str, groups: Iterable[str]) -> dict[str, float]:
    """Learning rate of each group for an optimiser of RATES, else its class's own default. Raises UserError where there is none."""
    own, names = _default_rate(name), list(groups)
    if own is None and names and name not in DEFAULT_RATES:
        rates = " ".join(f"{group}=1e-4" for group in names)
        raise UserError(
            f"optimizer {name} has no learning rate of its own; give --optimizer.lr, such as {rates}"
        )
    return {group: DEFAULT_RATES.get(name, {}).get(group, own) for group in names}  # type: ignore[misc]


def _default_rate(name: str) -> float | None:
    own = optimizer_arguments(name)["lr"].default if "lr" in optimizer_arguments(name) else None
    return float(own) if isinstance(own, float | int) else None


def optimizer_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """What the class of an optimiser takes."""
    return inspect.signature(resolve_optimizer(name)).parameters


def group_settings(
    name: str,
    groups: Iterable[str],
    *,
    lr: Mapping[str, float],
    decay: Mapping[str, float],
    betas: Mapping[str, Sequence[float]],
) -> dict[str, dict[str, Any]]:
    """What each group of an optimiser is given beside its parameters: name, lr, and weight_decay and betas where they are asked for.

    Learning rates that are not given are those of `default_rates`, weight decays those of DECAYS; where none is given and the class knows no
    weight decay, ours are no reason to refuse it.
    """
    names = list(groups)
    rates = default_rates(name, [group for group in names if group not in lr]) | dict(lr)
    decays = bool(decay) or "weight_decay" in optimizer_arguments(name)
    settings: dict[str, dict[str, Any]] = {}
    for group in names:
        settings[group] = {"name": group, "lr": rates[group]}
        settings[group] |= (
            {"weight_decay": decay.get(group, DEFAULT_WEIGHT_DECAYS[group])} if decays else {}
        )
        settings[group] |= {"betas": tuple(betas[group])} if group in betas else {}
    return settings


def split_lora_plus(
    groups: Iterable[Mapping[str, Any]], ups: Mapping[str, Sequence[Tensor]], ratio: float
) -> list[dict[str, Any]]:
    """The groups of a LoRA+ optimiser (arXiv 2402.12354): every group named in `ups` becomes two of its name, the rest and its `ups` at lr * ratio.

    Each group has its factor in "ratio" (1.0 but for the ups), so that a schedule may set lr = rate * factor * group["ratio"] later; with ratio 1
    nothing is split. `groups` have "name", "params" and "lr". Raises UserError for a ratio that is no positive number.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise UserError(
            f"--optimizer.lora-plus is {ratio}; expected a positive number (1: one learning rate for up and down, the paper's 16: up faster)"
        )
    found: list[dict[str, Any]] = []
    for group in groups:
        chosen = {id(p) for p in ups.get(group["name"], ())} if ratio != 1 else set()
        faster = [p for p in group["params"] if id(p) in chosen]
        slower = [p for p in group["params"] if id(p) not in chosen]
        if len(faster) != len(chosen):
            raise ValueError(
                f"{len(chosen) - len(faster)} of the ups of {group['name']} are not among its parameters"
            )
        found += [
            {**group, "params": params, "lr": group["lr"] * by, "ratio": by}
            for params, by in ((slower, 1.0), (faster, float(ratio)))
            if params
        ]
    return found


def build_optimizer(
    name: str, groups: list[dict[str, Any]], args: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimiser over named parameter groups, with further arguments of its class; UserError for what the class does not take or refuses."""
    for option in ("weight_decay", "betas"):
        if option not in optimizer_arguments(name) and any(option in group for group in groups):
            raise UserError(
                f"{name} takes no {option}; leave --optimizer.{option.replace('_', '-')} out"
            )
    check_arguments(resolve_optimizer(name), args, f"optimizer {name}", given=OWN_OPTIONS)
    rate = (
        {"lr": groups[0]["lr"]}
        if "lr" in optimizer_arguments(name) and _default_rate(name) is None
        else {}
    )  # a class may insist; the groups have theirs
    try:
        return resolve_optimizer(name)(groups, **rate, **args)
    except Exception as error:  # of a class that may be anybody's: TypeError, ValueError, AssertionError, RuntimeError without its device ...
        given = " ".join(f"{key}={value!r}" for key, value in args.items())
        raise UserError(
            f"{name} refuses its settings: {error}"
            + (f" (--optimizer.args are {given})" if given else "")
        ) from None


@contextmanager
def use_evaluation_parameters(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it the parameters are those that a schedule-free optimiser (arXiv 2405.15682) means to be used; any other changes nothing.

    Such an optimiser trains at one point and evaluates at another, between which its methods train() and eval() move the parameters, with rounding.
    They are put back bit for bit, so that looking at a model does not change its training.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in params]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for p, before in zip(params, kept):
                p.copy_(before)


def is_schedule_free(optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer]) -> bool:
    """Whether an optimiser or its class has train() and eval(), as those of the package schedulefree and its relatives."""
    return callable(getattr(optimizer, "train", None)) and callable(
        getattr(optimizer, "eval", None)
    )


def read_distance(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> Tensor | float | None:
    """The distance estimate d of a group, with Prodigy (arXiv 2306.06101) and its relatives: a copy. None where "d" is a setting or nothing."""
    d = group.get("d")
    if "d" in inspect.signature(type(optimizer)).parameters:  # torch's Adafactor clips at a d
        return None
    if isinstance(d, Tensor):
        return d.detach().clone().reshape(()) if d.numel() == 1 else None
    return float(d) if isinstance(d, int | float) else None


def check_arguments(
    fn: Callable[..., Any], args: Iterable[str], owner: str, *, given: Iterable[str] = ()
) -> None:
    """Raises UserError naming the first of `args` that `fn` does not take, with the nearest that it does; `given` are the program's own."""
    parameters = inspect.signature(fn).parameters
    for name in args:
        if name in given:
            raise UserError(
                f"{owner} has no argument {name!r} to set here: the program gives it; use the option of that name"
            )
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in parameters if name not in given]
    for name in args:
        if name not in known:
            raise UserError(
                f"{owner} has no argument {name!r}; expected {', '.join(known) or 'none'}{_nearest(name, known)}"
            )


SMALL_CLIP = 2**18  # elements whose copy end to end is cheaper on a CPU than a norm of each tensor


@torch.no_grad()
def clip_gradients_(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """The global L2 norm of the gradients before clipping (0-dim fp64 tensor on their device), which are scaled to norm `max_norm` if it is larger.

    torch's clip_grad_norm_ with the norm in float64 (its fp32 norm of a long tensor on the CPU is off by 3e-5); waits for nothing.
    A norm that is not finite makes the gradients NaN, as there; unscale fp16 gradients first. UserError when no parameter has a gradient.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        raise UserError(
            "there is no gradient to clip: no parameter of this stage took part in the loss"
        )
    if not max_norm > 0:
        raise UserError(
            f"the gradient norm to clip at is {max_norm}; expected a positive number (inf only measures)"
        )
    if grads[0].device.type == "cpu" and sum(g.numel() for g in grads) < SMALL_CLIP:
        norm = torch.linalg.vector_norm(
            torch.cat([g.reshape(-1) for g in grads]), dtype=torch.float64
        )
    else:
        norm = torch.linalg.vector_norm(
            torch.stack(torch._foreach_norm(grads, 2.0, _norm_dtype(grads[0])))
        )
    if max_norm < math.inf:
        _scale_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))  # 1e-6: torch's
    return norm


class LossScaler:
    """Dynamic loss scale for fp16 by torch.amp.GradScaler's rule (arXiv 1710.03740), in device tensors, on any device, which stay where they
    are in memory, so that a CUDA graph may hold a whole step.

    `scaler.scale(loss).backward(); scaler.unscale_(params); clip_(params, 1.0); scaler.step(optimizer); scaler.update()`.
    A step that overflowed changes no parameter and no optimiser state. Our optimisers and torch's fused ones take `found_inf` as a tensor and never
    wait for the device; any other may count on the host, so it is skipped as GradScaler does it, by asking the device once.
    """

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        init: float = 65536.0,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
    ) -> None:
        if not (init > 0 and growth > 1 and 0 < backoff < 1 and interval >= 1):
            raise UserError(
                f"loss scale got init {init}, growth {growth}, backoff {backoff}, interval {interval}; "
                "expected init > 0, growth > 1, backoff in (0, 1) and interval >= 1"
            )
        self.growth, self.backoff, self.interval = growth, backoff, interval
        self.current = torch.full((), init, dtype=torch.float32, device=device)  # the scale
        self.clean = torch.zeros(
            (), dtype=torch.int32, device=device
        )  # steps in a row without overflow
        self.skipped = torch.zeros(
            (), dtype=torch.int64, device=device
        )  # steps that overflowed, since the run began
        self.found_inf = torch.zeros(
            (), dtype=torch.float32, device=device
        )  # 1 after an overflow since the last update

    def scale(self, loss: Tensor) -> Tensor:
        """loss * scale, in fp32: a half-precision loss would overflow here already."""
        return loss.float() * self.current

    @torch.no_grad()
    def unscale_(self, params: Iterable[Tensor]) -> Tensor:
        """Divides the gradients by the scale, and returns found_inf (0-dim, 1.0 if any gradient is not finite); once before each step."""
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            raise UserError(
                "there is no gradient to unscale: no parameter of this stage took part in the loss"
            )
        _scale_(grads, 1 / self.current.double())
        largest = torch.stack([norm.float() for norm in torch._foreach_norm(grads, math.inf)])
        return self.found_inf.copy_(
            torch.maximum(self.found_inf, (~largest.isfinite().all()).float())
        )

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """optimizer.step(), or nothing at all where unscale_ met an overflow."""
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, self.found_inf  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        elif not self.found_inf:  # the one host sync, see the class
            optimizer.step()

    def update(self) -> None:
        """Backs off after an overflow, grows after `interval` clean steps in a row (never to infinity), and forgets the overflow."""
        overflow = self.found_inf != 0
        due = (self.clean + 1 >= self.interval) & ~overflow
        grown = self.current * self.growth
        self.current.copy_(
            torch.where(
                overflow,
                self.current * self.backoff,
                torch.where(due & grown.isfinite(), grown, self.current),
            )
        )
        self.skipped.add_(overflow)
        self.clean.copy_(torch.where(overflow | due, torch.zeros_like(self.clean), self.clean + 1))
        self.found_inf.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Scale, clean and skipped steps as tensors, and the settings."""
        counts = {"current": self.current, "clean": self.clean, "skipped": self.skipped}
        return counts | {"growth": self.growth, "backoff": self.backoff, "interval": self.interval}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state bit for bit, on this scaler's device."""
        self.current.copy_(state["current"])
        self.clean.copy_(state["clean"])
        self.skipped.copy_(
            state.get("skipped", self.skipped)
        )  # checkpoints of earlier versions did not count them
        self.growth, self.backoff, self.interval = (
            state["growth"],
            state["backoff"],
            state["interval"],
        )


def _scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """tensors *= factor, a 0-dim tensor, with fp32 factors for half-precision tensors."""
    torch._foreach_mul_(tensors, factor.to(torch.promote_types(tensors[0].dtype, torch.float32)))


def _norm_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (nearest: {close[0]})" if close else ""
