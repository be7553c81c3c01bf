"""Scales, ranks and patterns of peft's settings, with peft and diffusers as the oracles."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_core import formats
from lora_core.adapters.weight_updates import delta_weight
from lora_core.errors import UserError
from lora_core.formats import layout_of
from tests.adapter_checks import apply_state, disagreement, header
from tests.adapter_examples import save_file, save_good_file
from tests.tiny_pipeline import outputs, pipeline, random_state


def test_the_scale_in_peft_headers_is_honoured(pipe_layout, tmp_path):
    """A file as diffusers' newer scripts write it: alpha in the header only."""
    theirs, mine = pipeline(), pipeline()
    base, state = outputs(mine), random_state(mine, rank=4, scale=1.0)
    formats.save(state, tmp_path / "a.safetensors", layout=pipe_layout)
    fields = {}
    for c in state.components:
        fields |= {f"{c}.r": 4, f"{c}.lora_alpha": 2, f"{c}.target_modules": ["to_q"]}
    for c, level in (("unet", ""), ("text_encoder", "text_model.")):
        fields[f"{c}.target_modules"] = [path.removeprefix(level) for path in state.components[c]]
    save_file(
        load_file(tmp_path / "a.safetensors"),
        tmp_path / "b.safetensors",
        {"lora_adapter_metadata": json.dumps(fields)},
    )
    theirs.load_lora_weights(str(tmp_path), weight_name="b.safetensors")
    read = formats.load(tmp_path / "b.safetensors", pipe_layout)
    for modules in read.components.values():
        assert {lr.scale for lr in modules.values()} == {0.5}
    apply_state(mine, read, pipe_layout)
    assert disagreement(outputs(mine), outputs(theirs), base) < 1e-5
    formats.save(read, tmp_path / "c.safetensors", layout=pipe_layout, metadata=None)
    assert "lora_adapter_metadata" not in header(
        tmp_path / "c.safetensors"
    )  # the scale has moved into lora_B: it must not act twice


def test_a_broken_or_doubled_strength_in_the_header_is_refused(pipe, pipe_layout, tmp_path):
    tensors = save_good_file(tmp_path, pipe, pipe_layout, "diffusers")
    for value, more, expected in (
        ("{", {}, "broken header"),
        (json.dumps({"unet.r": 0, "unet.lora_alpha": 1}), {}, "broken header"),
        (
            json.dumps({"unet.r": 3, "unet.lora_alpha": 1, "unet.alpha_pattern": {"to_(q": 2}}),
            {},
            "to_.q.* not a regular expression",
        ),
        (
            json.dumps({"unet.r": 3, "unet.lora_alpha": 1, "unet.rank_pattern": {"to_q": "a"}}),
            {},
            "a rank of 'a'",
        ),
        (
            json.dumps({"unet.r": 3, "unet.lora_alpha": 1, "unet.rank_pattern": {"to_q": 2}}),
            {},
            "to_q in .* of rank 3, its settings have r = 2",
        ),
        (
            json.dumps({"unet.r": 3, "unet.lora_alpha": 1, "unet.use_dora": True}),
            {},
            "no magnitude for .* use_dora",
        ),
        ("[1]", {}, "expected a JSON object"),
        (
            json.dumps({"unet.r": 3, "unet.lora_alpha": 1}),
            {"unet.mid_block.attentions.0.proj_in.alpha": torch.ones(())},
            "strength twice",
        ),
    ):
        save_file(tensors | more, tmp_path / "a.safetensors", {"lora_adapter_metadata": value})
        with pytest.raises(UserError, match=expected):
            formats.load(tmp_path / "a.safetensors", pipe_layout)


class Net(nn.Module):
    """Layers of one name in several places, which patterns tell apart."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.ModuleDict(
                    {"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 6), "conv": nn.Conv2d(4, 6, 3)}
                )
                for _ in range(3)
            ]
        )
        self.to_q = nn.Linear(8, 4)


SETTINGS = [
    {},
    {"lora_alpha": 3},
    {"lora_alpha": 3, "use_rslora": True},
    {
        "rank_pattern": {"to_k": 2, "blocks.1.to_q": 5},
        "alpha_pattern": {"blocks.0.to_k": 7, "to_k": 1},
    },
    {
        "rank_pattern": {"to_k": 2},
        "alpha_pattern": {"[0-9].to_k": 1, "blocks.0.to_k": 7},
    },  # the first match wins, not the longest
    {
        "rank_pattern": {r"blocks\.\d+\.to_q": 3, "o_k": 7},
        "alpha_pattern": {r".*to_q": 1, "blocks.2": 9},
        "use_rslora": True,
    },
    {"use_dora": True, "lora_alpha": 3, "alpha_pattern": {"to_k": 2}},
]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_folder_of_peft_is_the_update_that_peft_makes(tmp_path, settings, binary):
    torch.manual_seed(0)
    net = Net()
    layout = layout_of(
        {"transformer": net, "text_encoder": nn.ModuleDict({"other": nn.Linear(2, 2)})}
    )
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    weights = {
        path: module.weight.detach().clone()
        for path, module in net.named_modules()
        if hasattr(module, "weight")
    }
    config = peft.LoraConfig(
        **({"r": 4, "lora_alpha": 4} | settings), target_modules=["to_q", "to_k", "conv"]
    )
    model = peft.get_peft_model(net, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.uniform_(parameter, 0.1, 1)
    model.save_pretrained(str(tmp_path))
    if binary:
        torch.save(
            load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin"
        )
        (tmp_path / "adapter_model.safetensors").unlink()
    read = formats.load(tmp_path, layout).components["transformer"]
    fresh = Net()
    fresh.load_state_dict({name: tensor for name, tensor in before.items()})
    merged = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).merge_and_unload()
    assert set(read) == set(weights)
    for path, lr in read.items():
        torch.testing.assert_close(
            weights[path] + delta_weight(lr, weights[path]),
            merged.get_submodule(path).weight,
            rtol=1e-5,
            atol=1e-5,
        )


def test_the_header_of_diffusers_tells_ranks_and_alphas_by_layer(pipe_layout, tmp_path):
    """diffusers writes and reads it; one pattern for both networks, whose first match differs."""
    theirs, mine = pipeline(), pipeline()
    base = outputs(mine)
    patterns = {
        "rank_pattern": {"to_q": 2, "q_proj": 3},
        "alpha_pattern": {"attn2.to_q": 9, "to_q": 5, "layers.0.self_attn.q_proj": 1},
    }
    config = {"r": 4, "lora_alpha": 2, "use_rslora": True, **patterns}
    for network, targets in (
        (theirs.unet, ["to_q", "to_v", "conv1"]),
        (theirs.text_encoder, ["q_proj", "fc1"]),
    ):
        network.add_adapter(peft.LoraConfig(**config, target_modules=targets))
        for parameter in network.parameters():
            if parameter.requires_grad:
                nn.init.uniform_(parameter, -0.5, 0.5)
    layers = {
        f"{name}_lora_layers": peft.get_peft_model_state_dict(getattr(theirs, name))
        for name in ("unet", "text_encoder")
    }
    recorded = {
        f"{n}_lora_adapter_metadata": getattr(theirs, n).peft_config["default"].to_dict()
        for n in ("unet", "text_encoder")
    }
    theirs.save_lora_weights(str(tmp_path), **layers, **recorded)
    apply_state(mine, formats.load(tmp_path / formats.NATIVE, pipe_layout), pipe_layout)
    assert disagreement(outputs(mine), outputs(theirs), base) < 1e-5


@pytest.mark.parametrize(
    "config, expected",
    [
        ("{", "broken"),
        ("[]", "expected a JSON object"),
        ({"peft_type": "LOHA"}, "LOHA adapter, expected LORA"),
        ({"r": "a"}, "a rank of 'a'"),
        ({"r": 3}, "tensors of rank 2, its settings have r = 3"),
        ({"r": 2, "use_dora": True}, "no magnitude for conv"),
        ({"r": 2, "lora_alpha": None}, "an alpha of None"),
        ({"r": 2, "rank_pattern": [1]}, r"rank_pattern \[1\]"),
        ({"r": 2, "alpha_pattern": {"(": 2}}, "not a regular expression"),
    ],
)
def test_broken_settings_are_refused(tmp_path, config, expected):
    layout = layout_of({"unet": nn.ModuleDict({"conv": nn.Conv2d(4, 6, 1)})})
    factors = {
        "base_model.model.conv.lora_A.weight": torch.ones(2, 4, 1, 1),
        "base_model.model.conv.lora_B.weight": torch.ones(6, 2, 1, 1),
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        config if isinstance(config, str) else json.dumps(config)
    )
    with pytest.raises(UserError, match=expected):
        formats.load(tmp_path, layout)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        formats.load(tmp_path, layout)
