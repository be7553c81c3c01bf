"""What a flag of another tool is here: a row of the tables of `trainer_flags` and `program_flags`.

A row has the names of a flag, the tools that have it, and our words for it, in which {} is the
value that the user gave. Where the value is written in another way here, `read` translates it. A
row without words of ours says in a sentence why there is none.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lora_core.text import is_number

DIFFUSERS, PTI, KOHYA, MIXOFSHOW = "diffusers", "lora_pti", "kohya", "Mix-of-Show"
DISTILL, COMPVIS, OTHERS = "lora_distill", "CompVis", "other tools"
ALL = (DIFFUSERS, PTI, KOHYA)

# The words of a value as the other tool reads them -> the words here; "" where they do not carry
# over: the answer then shows VALUE.
Reader = Callable[[Sequence[str]], str]


class OtherFlag(NamedTuple):
    """A flag of other tools, under one or more names that mean the same."""

    names: str  # separated by spaces, with _ for -
    tools: tuple[str, ...]
    here: str  # our words, with {} for the value; empty: there are none
    remark: str = ""  # how the meaning differs, or, without words of ours, the sentence itself
    read: Reader = shlex.join  # a value as it is written here


# ---------------------------------------------------------------- values


def rename_value(names: Mapping[str, str], *, others: bool = True) -> Reader:
    """One of some names as its name here; other names stay as they are, or do not carry over."""
    return lambda words: names.get(words[0], words[0] if others else "")


def split_value(sign: str) -> Reader:
    """The parts of a text as words."""
    return lambda words: " ".join(" ".join(words).replace(sign, " ").split())


def read_side(words: Sequence[str]) -> str:
    """The side of a square, from one number or from two that are equal."""
    sides = set(",".join(words).replace("x", ",").split(","))
    return sides.pop() if len(sides) == 1 else ""


def read_fraction(words: Sequence[str]) -> str:
    """A timestep of 1000 as a fraction."""
    return f"{int(words[0]) / 1000:g}" if words[0].isdecimal() else ""


def read_negative(words: Sequence[str]) -> str:
    """The number with the other sign."""
    return f"{-float(words[0]) or 0:g}" if is_number(words[0]) else ""


def count_parts(words: Sequence[str]) -> str:
    """The number of parts between bars: "<s1>|<s2>" is 2."""
    return str(words[0].count("|") + 1)


def read_first(words: Sequence[str]) -> str:
    """What is in front of a bar."""
    return words[0].partition("|")[0]


def read_sum(words: Sequence[str]) -> str:
    """Files as a sum in quotes."""
    return shlex.quote(" + ".join(words))


read_optimizer = rename_value(
    {
        "AdamW": "adamw",
        "adamW": "adamw",
        "Prodigy": "prodigy",
        "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
        "Lion8bit": "bitsandbytes.optim.Lion8bit",
        "SGDNesterov": "torch.optim.SGD",
    }
)
read_schedule = rename_value(
    {
        "constant_with_warmup": "constant",
        "cosine_with_restarts": "cosine_restarts",
        "warmup_stable_decay": "wsd",
    }
)
KOHYA_SAMPLERS = {
    "ddim": "ddim",
    "euler": "euler",
    "k_euler": "euler",
    "euler_a": "euler_ancestral",
    "k_euler_a": "euler_ancestral",
    "dpmsolver++": "dpmpp_2m",
    "dpmsolver": "dpmpp_2m",
}
read_sampler = rename_value(KOHYA_SAMPLERS, others=False)
read_scheme = rename_value(
    {
        "none": "--weighting none",
        "sigma_sqrt": "--weighting sigma_sqrt",
        "cosmap": "--weighting cosmap",
        "logit_normal": "--noise.density logit_normal",
        "mode": "--noise.density mode",
    },
    others=False,
)
read_timesteps = rename_value(
    {
        "sigmoid": "--noise.density logit_normal",
        "uniform": "--noise.density uniform",
        "shift": "--noise.density logit_normal --noise.shift 3",
    },
    others=False,
)
read_precision = rename_value({"no": "fp32", "float": "fp32"})
read_report = rename_value({"tensorboard": "tensorboard", "wandb": "wandb"}, others=False)
read_visibility = rename_value(
    {"public": "--files.public", "private": "--files.no-public"}, others=False
)
