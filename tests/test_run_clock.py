"""The date of files is the clock's, or the environment's for equal bytes."""

import time
from datetime import datetime

import pytest

from lora_core.errors import UserError
from lora_core.run_clock import current_time, iso_date


def test_the_clock_and_a_fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert abs(current_time() - time.time()) < 5
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert current_time() == 1_700_000_000
    assert datetime.fromisoformat(iso_date(1_700_000_000.9)).timestamp() == 1_700_000_000


@pytest.mark.parametrize("text", ["now", "-1", "1.5", "9" * 12, "٣"])
def test_a_date_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(UserError, match=r"SOURCE_DATE_EPOCH is .*; unset it"):
        current_time()
