"""The date that files are given: the clock's, or that of SOURCE_DATE_EPOCH."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime

from lora_core.errors import UserError

VARIABLE = "SOURCE_DATE_EPOCH"  # reproducible-builds.org: seconds since 1970, for equal bytes


def current_time() -> float:
    """Seconds since 1970, of the clock or of the environment variable SOURCE_DATE_EPOCH.

    Raises UserError for a variable that is no such number.
    """
    fixed = os.environ.get(VARIABLE, "")
    if not fixed:
        return time.time()
    if not fixed.isascii() or not fixed.isdecimal() or len(fixed) > 11:  # year 5138
        raise UserError(
            f"{VARIABLE} is {fixed[:40]!r}, expected whole seconds since 1970; unset it to take "
            "the date of the clock"
        )
    return float(fixed)


def iso_date(seconds: float) -> str:
    """A time as ISO 8601 in UTC, which says nothing of where it was: 2026-11-29T17:50:15Z."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
