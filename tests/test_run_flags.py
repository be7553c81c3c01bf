"""Our flags of a run's folder among the words of another tool's command."""

from pathlib import Path
from typing import Any

import pytest

from lora_core.config import Config
from lora_core.errors import UserError
from training.translation.run_flags import apply_run_flags, check_free_folder, split_run_flags


@pytest.mark.parametrize(
    "words, own, rest",
    [
        (["--resume"], {"resume": True}, []),
        (["--overwrite", "--dim=4"], {"overwrite": True}, ["--dim=4"]),
        (["--resume", "state", "--overwrite"], {"overwrite": True}, ["--resume", "state"]),
        (["--resume=state"], {}, ["--resume=state"]),
        (["--resume_anyway", "--resume"], {"resume_anyway": True, "resume": True}, []),
        (["--dim", "4", "--out=a"], {"out": "a"}, ["--dim", "4"]),
        (["--overwritten"], {}, ["--overwritten"]),
    ],
)
def test_a_switch_with_a_value_is_the_other_tools(
    words: list[str], own: dict[str, Any], rest: list[str]
) -> None:
    assert split_run_flags(words) == (own, rest)


def test_an_occupied_folder_is_refused_by_a_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").touch()
    config = apply_run_flags(Config(), {"out": str(tmp_path), "resume": False})
    with pytest.raises(UserError, match="already holds a run"):
        check_free_folder(config)
    check_free_folder(apply_run_flags(config, {"resume": True}))
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun may have restarted it
    check_free_folder(config)
