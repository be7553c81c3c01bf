"""Libraries are silent in our programs; errors and our own warnings are not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUIET = "from lora_core.quiet_libraries import Notice, speak_alone; speak_alone()\n"
SAVED = """
import sys, torch
from transformers import CLIPTextConfig, CLIPTextModel, logging
small = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=9,
                       num_attention_heads=1)
CLIPTextModel(small).save_pretrained(sys.argv[1])
logging.get_logger("transformers.x").warning("a library's warning")
import warnings
warnings.warn("a library's own", UserWarning)
warnings.warn("a library's future", FutureWarning)
CLIPTextModel.from_pretrained(sys.argv[1])
"""


def run_code(code: str, *words: str, **environment: str) -> str:
    """All that a program prints, on both streams."""
    clean = {name: value for name, value in os.environ.items() if "VERBOSITY" not in name}
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "PYTHONWARNINGS"):
        clean.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env=clean | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout


def test_bars_logs_and_warnings_of_libraries_are_silent(tmp_path: Path) -> None:
    loud = run_code(SAVED, str(tmp_path))
    for words in ("Writing model shards", "a library's warning", "a library's own"):
        assert words in loud  # else this test could not fail
    code = f"{QUIET}from diffusers import AutoencoderKL\n{SAVED}"
    assert run_code(code, str(tmp_path)) == ""


def test_a_user_can_hear_them(tmp_path: Path) -> None:
    heard = run_code(QUIET + SAVED, str(tmp_path), PYTHONWARNINGS="default",
                     TRANSFORMERS_VERBOSITY="warning")  # fmt: skip
    assert "a library's warning" in heard
    assert "warning: a library's own (UserWarning, <string>)\n" in heard


def test_our_own_warnings_are_lines_of_ours() -> None:
    code = "import warnings\nwarnings.warn('the kernel\\nis slow', Notice)\n"
    assert run_code(QUIET + code) == "warning: the kernel\\nis slow\n"


def test_errors_are_raised_as_ever() -> None:
    code = "from transformers import AutoConfig\nAutoConfig.from_pretrained('nowhere/x')"
    assert "Error" in run_code(QUIET + code)


@pytest.mark.parametrize("script", ["train.py", "infer.py", "merge.py"])
def test_a_script_silences_them_before_it_imports_them(script: str) -> None:
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "nowhere.toml"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit:
    pass
import logging, os
print(os.environ["TRANSFORMERS_VERBOSITY"], logging.getLogger("torch").level == logging.ERROR)
"""
    assert run_code(code).splitlines()[-1] == "error True"


def test_bars_are_silent_where_the_hub_was_imported_before_us() -> None:
    """As by gradio in examples/web_demo.py; transformers asks the hub when it is imported."""
    code = "import huggingface_hub.utils, models; from transformers.utils import logging; "
    code += "print(logging.is_progress_bar_enabled())"
    assert run_code(code) == "False\n"
    assert run_code(code, HF_HUB_DISABLE_PROGRESS_BARS="0") == "True\n"
