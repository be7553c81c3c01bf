"""A config for another family's model: every pair of families is told apart."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.formats.layout import Layout
from lora_core.toml import read_toml
from models import read_layout
from models.families import families_with_preset
from tests import tiny_flux, tiny_flux2, tiny_sd3, tiny_sdxl
from tests.conftest import merged, save_pipeline
from training.checks.family_checks import FAMILY_NAMES, check_family

CONFIGS = Path(__file__).parent.parent / "configs"
# What a config of a family has that models of the others have not; of SD, SDXL has all.
MARKS: dict[str, dict[str, Any]] = {
    "sd": {"adapter": {"targets": ("extended",)}, "noise": {"prediction": "v_prediction"}},
    "sdxl": {"adapter": {"targets": ("b-lora-style",)}, "tokens": {"encoders": ("clip_g",)}},
    "flux": {"adapter": {"targets": ("fal",)}, "noise": {"guidance": 1.0, "shift": 3.0}},
    "sd3": {"tokens": {"encoders": ("clip_g", "t5")}},
    "flux2": {"noise": {"guidance": 1.0}},
}
ALIKE = (("sd", "sdxl"), ("flux2", "flux"))  # what the first has, the second has, too


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Layout]:
    root = tmp_path_factory.mktemp("families")
    save_pipeline(root / "sd")
    tiny_sdxl.save(root / "sdxl")
    tiny_flux.save(root / "flux")
    tiny_sd3.save(root / "sd3")
    tiny_flux2.save(root / "flux2")
    return {name: read_layout(str(root / name)) for name in FAMILY_NAMES}


def refusal(config: Config, layout: Layout) -> str:
    with pytest.raises(UserError) as caught:
        check_family(config, layout)
    return str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "given"), [pair for pair in permutations(MARKS, 2) if pair not in ALIKE]
)
def test_a_config_of_another_family_is_named(
    layouts: dict[str, Layout], wanted: str, given: str
) -> None:
    config = merged(Config(model="folder/model"), MARKS[wanted])
    sentence = refusal(config, layouts[given])
    assert f"folder/model is a model of the family {FAMILY_NAMES[given].name}, and" in sentence
    assert FAMILY_NAMES[wanted].name in sentence and FAMILY_NAMES[given].configs in sentence
    for words in MARKS[wanted].get("adapter", {}).get("targets", ()):
        assert f"--adapter.targets {words}" in sentence


def test_all_that_is_for_another_family_is_in_one_sentence(layouts: dict[str, Layout]) -> None:
    config = merged(Config(), MARKS["flux"] | {"max_sequence_length": 256, "clip_skip": 1})
    sentence = refusal(config, layouts["sdxl"])
    for words in (
        "--adapter.targets fal is for Flux;",
        "--max-sequence-length 256, --noise.shift 3 are for Flux, Stable Diffusion 3 or FLUX.2;",
        "--noise.guidance 1 is for Flux or FLUX.2; leave them out",
    ):
        assert words in sentence
    assert "clip-skip" not in sentence


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_fits_its_own_family(path: Path, layouts: dict[str, Layout]) -> None:
    """The names that the sentence gives for configs are those of the folder."""
    config = read_toml(path)
    starts = ("sdxl", "sd3", "flux2", "flux")
    family = next((name for name in starts if path.stem.startswith(name)), "sd")
    check_family(config, layouts[family])


def test_the_named_configs_exist() -> None:
    for _, pattern in FAMILY_NAMES.values():
        assert list(CONFIGS.parent.glob(pattern)), pattern


def test_a_family_of_ones_own_may_have_anything(layouts: dict[str, Layout]) -> None:
    config = merged(Config(), MARKS["flux"])
    check_family(replace(config, family="mine.py:FAMILY"), layouts["sd"])
    check_family(config, replace(layouts["sd"], family="mine"))


def test_presets_are_those_of_the_layouts(layouts: dict[str, Layout]) -> None:
    for family, layout in layouts.items():
        denoiser = "unet" if family in ("sd", "sdxl") else "transformer"
        for preset in layout.presets[denoiser]:
            assert family in families_with_preset(preset)
    assert families_with_preset("fal") == ("flux",) and not families_with_preset("to_q")
