"""A custom schedule of the learning rate: constant, then down by 1 - sqrt (arXiv 2405.18392).

python train.py configs/toy_pti.toml --optimizer.schedule examples/my_schedule.py:cooldown \
    --optimizer.schedule-args share=0.4 --out runs/cooldown
"""

import math


def cooldown(step: int, steps: int, *, share: float = 0.2) -> float:
    """1, and 1 - sqrt(x) in the last `share` of the steps, with x from 0 to 1."""
    x = max(0.0, step / steps - (1 - share)) / share
    return 1 - math.sqrt(min(1.0, x))
