"""Networks of kohya's and of LyCORIS: ranks, scales, layers, and what is refused."""

from typing import Any

import pytest

from lora_core.adapters.targets import matches_pattern
from lora_core.errors import UserError
from training.translation.kohya_network import translate_network
from training.translation.kohya_options import KOHYA_DEFAULTS
from training.translation.translated_options import TranslatedOptions


def network(module: str = "networks.lora", *arguments: str, **given: Any) -> TranslatedOptions:
    options = {"network_module": module, **given}
    if arguments:
        options["network_args"] = list(arguments)
    record = TranslatedOptions("kohya", KOHYA_DEFAULTS, options)
    translate_network(record, ("denoiser", "text_encoder"))
    record.check_complete()
    return record


def ours(module: str = "networks.lora", *arguments: str, **given: Any) -> dict[str, Any]:
    return network(module, *arguments, **given).options


def test_defaults_are_kohyas() -> None:
    found = ours()
    assert found["adapter.rank"] == 4 and found["adapter.alpha"] == 1.0
    assert found["adapter.init"] == "kaiming" and found["adapter.targets"] == ["kohya"]
    assert found["adapter.text_targets"] == ["kohya"] and "adapter.kind" not in found
    assert ours(network_dim=32, network_alpha=16)["adapter.alpha"] == 16
    assert ours(network_alpha=0)["adapter.alpha"] == 0  # the rank, as in kohya


def test_convolutions_have_a_rank_and_an_alpha_of_their_own() -> None:
    found = ours("networks.lora", "conv_dim=4", "conv_alpha=2", network_dim=16)
    assert found["adapter.targets"][0] == "all" and "*.downsamplers.*.conv" in str(found)
    ranks, alphas = found["adapter.rank_pattern"], found["adapter.alpha_pattern"]
    for path in ("down_blocks.0.resnets.0.conv1", "up_blocks.1.upsamplers.0.conv"):
        assert any(matches_pattern(path, glob) and rank == 4 for glob, rank in ranks.items())
        assert any(matches_pattern(path, glob) and alpha == 2 for glob, alpha in alphas.items())
    for path in ("mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv_shortcut"):
        assert not any(matches_pattern(path, glob) for glob in ranks)
    # LyCORIS: conv_dim and conv_alpha are those of the network where they are not given
    found = ours("lycoris.kohya", network_dim=16, network_alpha=8)
    assert found["adapter.targets"][0] == "all" and "adapter.rank_pattern" not in found


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["algo=lora"], "lora"),
        (["algo=locon"], "lora"),
        (["algo=loha"], "loha"),
        (["algo=lokr", "factor=8"], "lokr"),
        (["algo=lora", "dora_wd=True"], "dora"),
        (["algo=full"], "full"),
    ],
)
def test_algorithms_of_lycoris(arguments: list[str], kind: str) -> None:
    found = ours("lycoris.kohya", *arguments, "preset=attn-mlp")
    assert found.get("adapter.kind", "lora") == kind and found["adapter.targets"] == ["kohya"]
    assert found.get("adapter.factor") == (8 if kind == "lokr" else None)
    assert ("adapter.rank" in found) == (kind != "full")


def test_blocks_of_flux() -> None:
    assert ours("networks.lora_flux")["adapter.targets"] == ["kohya"]
    single = ours("networks.lora_flux", "train_blocks=single")["adapter.targets"]
    assert single == ["single_transformer_blocks.*"]
    some = ours("networks.lora_flux", "train_double_block_indices=0-1,4",
                "train_single_block_indices=none")  # fmt: skip
    assert some["adapter.targets"] == [f"transformer_blocks.{i}.*" for i in (0, 1, 4)]
    with pytest.raises(UserError, match="expected numbers as in 0-3,7"):
        ours("networks.lora_flux", "train_double_block_indices=a")


def test_dropouts_ratios_and_weights() -> None:
    found = ours(
        "networks.lora",
        "rank_dropout=0.1",
        "module_dropout=0.2",
        "loraplus_lr_ratio=16",
        network_weights="old.safetensors",
        dim_from_weights=True,
        scale_weight_norms=1.0,
        network_dropout=0.3,
    )
    assert (found["adapter.rank_dropout"], found["adapter.module_dropout"]) == (0.1, 0.2)
    assert found["optimizer.lora_plus"] == 16 and found["optimizer.max_update_norm"] == 1.0
    assert (found["from_lora"], found["from_lora_rank"]) == ("old.safetensors", "file")
    assert found["adapter.dropout"] == 0.3


def test_what_has_no_counterpart_is_said_or_refused() -> None:
    table = " ".join(network("networks.lora", "block_dims=1,2").format_table().split())
    assert "block_dims: give ranks by" in table.replace(" | | ", " ")
    for arguments, message in (
        (["algo=boft"], "algo=boft is not trained here"),
        (["algo=lokr", "dora_wd=True"], "dora_wd is for algo=lora"),
        (["preset=mine.toml"], "preset=mine.toml is not read"),
        (["conv_dims=4"], "network_args has conv_dims.*conv_dim"),
        (["conv_dim"], "expected KEY=VALUE"),
    ):
        with pytest.raises(UserError, match=message):
            ours("lycoris.kohya", *arguments)
    with pytest.raises(UserError, match=r"only networks\.lora, "):
        ours("networks.dylora")
