"""The record of a foreign config: every given option is told, nothing is wider than the screen."""

import pytest

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.toml import from_table, to_table
from training.translation.translated_options import (
    TranslatedOptions,
    nest_options,
    show_value,
    wrap_words,
)

DEFAULTS = {"network_dim": 4, "network_alpha": 1.0, "xformers": False, "lr_scheduler": "constant"}


def make_record(given: dict[str, object]) -> TranslatedOptions:
    return TranslatedOptions("kohya", DEFAULTS, given)


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"network_dmi is no option of kohya.*network_dim:"):
        make_record({"network_dmi": 8})
    with pytest.raises(UserError, match=r"--networkdim is .* --network_dim:"):
        TranslatedOptions("kohya", DEFAULTS, {"networkdim": 8}, spell="--{}")


def test_a_given_option_without_an_entry_is_a_gap_and_not_a_result() -> None:
    record = make_record({"network_dim": 8, "xformers": True})
    record.take("network_dim", {"adapter.rank": 8})
    with pytest.raises(ValueError, match="nothing was recorded for xformers"):
        record.to_config(Config)
    record.ignore("xformers", "attention always uses torch's SDPA")
    assert record.to_config(Config).adapter.rank == 8


def test_options_become_the_config_that_a_toml_file_would_give() -> None:
    record = make_record({"network_dim": 8})
    record.take("network_dim", {"adapter.rank": record["network_dim"]})
    record.take("network_alpha", {"adapter.alpha": record["network_alpha"]})
    record.change("lr_scheduler", {"stages.0.steps": 7, "stages.0.groups": ["tokens"]}, "why")
    table = {"adapter": {"rank": 8, "alpha": 1.0}, "stages": [{"steps": 7, "groups": ["tokens"]}]}
    assert record.to_config(Config) == from_table(table)


def test_a_whole_config_survives_nesting() -> None:
    flat = {"out": "runs/x", "optimizer.lr.denoiser": 1e-3, "stages.0.steps": 3, "stages.1.lr": {}}
    nested = {
        "out": "runs/x",
        "optimizer": {"lr": {"denoiser": 1e-3}},
        "stages": [{"steps": 3}, {"lr": {}}],
    }
    assert nest_options(flat) == nested
    assert nest_options({"adapter.rank_pattern": {"*.attn2.*": 4.0}}) == {
        "adapter": {"rank_pattern": {"*.attn2.*": 4.0}}
    }
    assert from_table(nest_options(to_table(Config()))) == Config()


def test_the_table_is_at_most_100_columns_and_has_every_option() -> None:
    given = {"network_dim": 8, "xformers": True, "lr_scheduler": "x" * 130}
    record = make_record(given)
    record.take("network_dim", {"adapter.rank": 8, "adapter.init": "kaiming"})
    record.take("network_alpha", {"adapter.alpha": 1.0})
    record.ignore("xformers", "attention always uses torch's SDPA " * 5)
    record.leave_out("lr_scheduler", "write it as a schedule of your own, my_schedule.py:fn")
    lines = record.format_table().splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert all(f"{name} = " in text for name in [*given, "network_alpha"])
    assert "adapter.rank = 8" in text and 'adapter.init = "kaiming"' in text
    alpha = next(line for line in lines if line.startswith("network_alpha"))
    assert "default of kohya" in alpha
    assert text.index("network_dim") < text.index("cannot be taken:") < text.index("xformers")


def test_values_are_shown_as_toml_writes_them() -> None:
    shown = [show_value(v) for v in (True, 1e-4, "a b", [512, 512], None, {"a": 1}, 3)]
    assert shown == ["true", "0.0001", '"a b"', "[512, 512]", "none", "{a = 1}", "3"]


def test_an_option_in_several_rows_has_its_value_in_the_first() -> None:
    record = make_record({"network_dim": 8})
    record.ignore("network_dim", "the last row")
    record.take("network_dim", {"adapter.rank": 8})
    record.change("network_dim", {}, "the second row")
    rows = [row for row in record.format_table().splitlines() if row.startswith("network_dim")]
    assert [row.split(" | ")[0].strip() for row in rows] == [
        "network_dim = 8",
        "network_dim = ...",
        "network_dim = ...",
    ]
    assert "adapter.rank = 8" in rows[0] and "the second row" in rows[1]


@pytest.mark.parametrize(
    "text, lines",
    [
        (
            'dataset_config = "lora_example_training_data/dataset_config.toml"',
            ['dataset_config = "lora_example_', '  training_data/dataset_config.toml"'],
        ),
        (
            "optimizer.weight_decay.text_encoder = 0.01",
            ["optimizer.weight_decay.text_", "  encoder = 0.01"],
        ),
        ('lr_scheduler = "cosine_with_restarts"', ["lr_scheduler =", '  "cosine_with_restarts"']),
        (
            "datasets.0.subsets.0.caption_extension",
            ["datasets.0.subsets.0.caption_", "  extension"],
        ),
        ("", [""]),
        ("x" * 80, ["x" * 34, "  " + "x" * 34, "  " + "x" * 12]),
    ],
)
def test_words_are_broken_where_a_reader_would(text: str, lines: list[str]) -> None:
    width = 33 if text.startswith("optimizer") else 36
    assert wrap_words(text, width) == lines


def test_a_default_without_a_value_has_a_row_where_it_sets_something() -> None:
    defaults = DEFAULTS | {"network_args": None, "vae": None}
    record = TranslatedOptions("kohya", defaults, {"network_dim": 8})
    record.take("network_dim", {"adapter.rank": 8})
    record.take("vae", {})
    record.take("network_args", {"adapter.targets": ["kohya"]})
    table = record.format_table()
    assert "network_args (not given)" in table and "adapter.targets" in table
    assert "vae" not in table
    assert record.to_config(Config).adapter.targets == ("kohya",)
