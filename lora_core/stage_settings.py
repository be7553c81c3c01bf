"""The optimizer and the stages of a training run: two sections of its config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NewType, get_args

from lora_core.option_types import GROUP_NUMBERS, SCHEDULE_NAMES, name_or_file
from lora_core.settings import Above, AtLeast

ScheduleName = NewType("ScheduleName", str)  # one of SCHEDULE_NAMES or file.py:fn
_SCHEDULE = name_or_file("schedule", SCHEDULE_NAMES)
Group = Literal["denoiser", "text_encoder", "tokens"]
GROUPS: tuple[str, ...] = get_args(Group)


@dataclass(frozen=True)
class OptimizerConfig:
    """One optimizer; a group each for denoiser, text_encoder and tokens."""

    name: str = "adamw"
    """adamw, prodigy, the dotted path of any torch optimizer, or my_optimizer.py:Class."""
    lr: Annotated[dict[str, float], AtLeast(0), GROUP_NUMBERS] = field(default_factory=dict)
    """Learning rate: one number for all groups, or per group; others: denoiser=1e-4
    text_encoder=1e-5 tokens=5e-4, with prodigy 1 each, with other classes their own default."""
    weight_decay: Annotated[dict[str, float], AtLeast(0), GROUP_NUMBERS] = field(
        default_factory=dict
    )
    """Weight decay: one number for all groups, or per group; others: 0.01 for adapters, 0 for
    tokens."""
    betas: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Betas per group, e.g. "tokens=0.9,0.99"; others: the optimizer's own."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer's class, e.g. safeguard_warmup=true d_coef=2. Empty: its
    own defaults."""
    schedule: Annotated[ScheduleName, _SCHEDULE] = ScheduleName("constant")
    """Learning rate over a stage: constant, linear, cosine, cosine_restarts, polynomial, wsd, rex,
    inverse_sqrt, or my_schedule.py:fn, with fn(step, steps)."""
    schedule_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the schedule, e.g. cycles=3 or power=2. Empty: its own defaults."""
    schedules: dict[str, str] = field(default_factory=dict)
    """Schedule per group, e.g. "denoiser=cosine tokens=constant"; others: --optimizer.schedule,
    whose arguments a group of the same schedule has, too."""
    warmup: Annotated[int, AtLeast(0)] = 0
    """Steps of linear warm-up at the beginning of each stage. 0: none."""
    lr_pattern: Annotated[dict[str, float], Above(0)] = field(default_factory=dict)
    """Learning rate of layers with adapters relative to their group's, per glob on their paths,
    e.g. "up_blocks.1.*=0.5"; a later match overrides an earlier one; others: 1."""
    lora_plus: Annotated[float, Above(0)] = 1.0
    """Learning rate of up relative to that of down (LoRA+, arXiv 2402.12354)."""
    clip: Annotated[float, AtLeast(0, infinite=True)] = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    max_update_norm: Annotated[float, AtLeast(0)] = 0.0
    """Largest Frobenius norm of a LoRA layer's update, alpha / rank * up @ down, whose factors are
    scaled down after each step (kohya's max norm, usually 1); 0: no limit."""


@dataclass(frozen=True)
class Stage:
    """A stage of training: the groups that train, and for how many steps.

    Options that are not set are those of [optimizer], [noise] and [tokens].
    """

    steps: int = 1000
    """Steps of the optimizer in this stage."""
    groups: tuple[Group, ...] = ("denoiser",)
    """Groups that step; the others are frozen and keep their optimizer state."""
    lr: Annotated[dict[str, float], AtLeast(0), GROUP_NUMBERS] = field(default_factory=dict)
    """Learning rate in this stage: one number for all its groups, or per group."""
    weight_decay: Annotated[dict[str, float], AtLeast(0), GROUP_NUMBERS] = field(
        default_factory=dict
    )
    """Weight decay in this stage: one number for all its groups, or per group."""
    schedule: Annotated[ScheduleName | None, _SCHEDULE] = None
    """Learning rate over this stage, of all its groups but those of --stages.I.schedules."""
    schedules: dict[str, str] = field(default_factory=dict)
    """Schedule per group in this stage."""
    warmup: Annotated[int | None, AtLeast(0)] = None
    """Steps of linear warm-up at the beginning of this stage; unset: --optimizer.warmup."""
    low: float | None = None
    """Lowest timestep of this stage, as a fraction of the schedule."""
    high: float | None = None
    """Highest timestep of this stage, as a fraction of the schedule."""
    norm: Literal["none", "pull", "rescale", "stop"] | None = None
    """Norm control of the token rows in this stage."""
    mask_temperature: Annotated[float, Above(0)] = 1.0
    """The mask is raised to this power: above 1 the background counts less."""

    def schedule_of(self, group: str, usual: OptimizerConfig) -> str:
        """The schedule of a group's learning rate in this stage."""
        own = self.schedules.get(group) or self.schedule
        return own or usual.schedules.get(group) or usual.schedule

    def warmup_of(self, usual: OptimizerConfig) -> int:
        """The steps of linear warm-up in this stage."""
        return usual.warmup if self.warmup is None else self.warmup
