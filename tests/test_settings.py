"""Settings: a number out of its range names the option, and choices are the keys of the tables."""

import math
import re
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_args, get_type_hints

import docstring_parser
import pytest

from lora_core.adapters.kinds import KINDS
from lora_core.config import (
    PLUGIN_NAMES,
    AdapterConfig,
    Config,
    DataConfig,
    DensityName,
    NoiseConfig,
    OptimizerConfig,
    SamplesConfig,
    ScheduleName,
    WeightingName,
)
from lora_core.data.images import INTERPOLATIONS
from lora_core.diffusion.densities import DENSITIES
from lora_core.diffusion.losses import LOSSES, WEIGHTINGS
from lora_core.diffusion.prediction import PREDICTIONS
from lora_core.diffusion.sampling import SAMPLERS
from lora_core.errors import UserError
from lora_core.optim.building import OPTIMIZERS
from lora_core.optim.schedules import SCHEDULES
from lora_core.settings import (
    Above,
    AdapterSpec,
    AtLeast,
    ImageSettings,
    NoiseSettings,
    Share,
    WholeAtLeast,
    check_options,
)


@dataclass(frozen=True)
class Options:
    """One option for each kind of range."""

    count: Annotated[int, AtLeast(1)] = 1
    clip: Annotated[float, AtLeast(0, infinite=True)] = 1.0
    scale: Annotated[float, Above(0)] = 1.0
    dropout: Annotated[float, Share()] = 0.0
    start: Annotated[float, Share(zero=False)] = 0.5
    strength: Annotated[float, Share(zero=False, one=True)] = 1.0
    rank_pattern: Annotated[dict[str, float], WholeAtLeast(1)] = field(default_factory=dict)
    free: float = 0.0
    args: dict[str, Any] = field(default_factory=dict)
    flag: bool = False
    kind: Literal["a", "b"] = "a"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"count": 0}, "--x.count is 0; expected at least 1"),
        ({"count": 1.5}, "--x.count is 1.5; expected a whole number"),
        ({"clip": -0.5}, "--x.clip is -0.5; expected at least 0"),
        ({"clip": math.nan}, "--x.clip is nan; expected a finite number"),
        ({"scale": 0.0}, "--x.scale is 0; expected a number above 0"),
        ({"scale": math.inf}, "--x.scale is inf; expected a finite number"),
        ({"dropout": 1.0}, "--x.dropout is 1; expected a number in [0, 1)"),
        ({"start": 0.0}, "--x.start is 0; expected a number in (0, 1)"),
        ({"strength": 0.0}, "--x.strength is 0; expected a number in (0, 1]"),
        ({"rank_pattern": {"*": 2.5}}, "--x.rank-pattern *=2.5; expected a whole number of at l"),
        ({"rank_pattern": {"*": 0}}, "--x.rank-pattern *=0; expected a whole number of at least 1"),
        ({"free": math.inf}, "--x.free is inf; expected a finite number"),
        ({"kind": "c"}, "--x.kind is 'c'; expected one of a, b"),
    ],
)
def test_an_option_out_of_range_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check_options(Options(**change), "--x.")
    assert str(caught.value).startswith(sentence)


def test_the_ends_of_ranges() -> None:
    inside = Options(clip=math.inf, strength=1.0, dropout=0.0, free=-3.0, args={"eps": math.nan})
    check_options(inside, "--")


@pytest.mark.parametrize(
    ("section", "core"),
    [(AdapterConfig, AdapterSpec), (DataConfig, ImageSettings), (NoiseConfig, NoiseSettings)],
)
def test_sections_are_the_settings_of_the_core(section: type, core: type) -> None:
    assert issubclass(section, core)
    assert [f.name for f in fields(section)][: len(fields(core))] == [f.name for f in fields(core)]


def test_choices_are_the_keys_of_the_tables() -> None:
    def choices(section: type, name: str) -> set[str]:
        return set(get_args(get_type_hints(section)[name]))

    assert PLUGIN_NAMES[DensityName] == tuple(DENSITIES)
    assert PLUGIN_NAMES[WeightingName] == tuple(WEIGHTINGS)
    assert PLUGIN_NAMES[ScheduleName] == tuple(SCHEDULES)
    assert choices(NoiseConfig, "prediction") - {"model"} <= set(PREDICTIONS)
    assert choices(DataConfig, "interpolation") == set(INTERPOLATIONS)


@pytest.mark.parametrize(
    ("section", "option", "table"),
    [
        (Config, "loss", LOSSES),
        (Config, "weighting", WEIGHTINGS),
        (NoiseConfig, "density", DENSITIES),
        (AdapterConfig, "kind", KINDS),
        (OptimizerConfig, "name", OPTIMIZERS),
        (OptimizerConfig, "schedule", SCHEDULES),
        (SamplesConfig, "sampler", SAMPLERS),
    ],
)
def test_the_help_of_an_option_names_all_of_its_table(
    section: type, option: str, table: dict[str, Any]
) -> None:
    texts = {}
    for parent in section.__mro__[:-1]:
        for parameter in docstring_parser.parse_from_object(parent).params:
            texts.setdefault(parameter.arg_name, parameter.description or "")
    words = set(re.findall(r"[\w./]+:?\w*", texts[option]))
    assert set(table) <= words, set(table) - words
    assert any(".py:" in word for word in words)
