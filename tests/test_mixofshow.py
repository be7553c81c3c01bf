"""ED-LoRA files of Mix-of-Show, written as its trainer writes them."""

import pytest
import torch

from lora_core import formats
from lora_core.adapters.patch import patch
from lora_core.adapters.weight_updates import delta_weight
from lora_core.errors import UserError
from lora_core.formats.layout import layout_of
from lora_core.placeholders import bind_layers
from tests.tiny_pipeline import outputs, pipeline, random_state

PIPE = pipeline()
LAYOUT = layout_of({"unet": PIPE.unet, "text_encoder": PIPE.text_encoder})


def file(path, state, concepts=()):
    """What torch.save of Mix-of-Show's trainer leaves: 1x1 factors as convolutions, no scale."""
    own = {}
    for name, modules in state.components.items():
        own[name] = {}
        for key, lr in modules.items():
            own[name] |= {f"{key}.lora_down.weight": lr.down, f"{key}.lora_up.weight": lr.up}
    rows = {
        concept: torch.randn(16, 16, generator=torch.Generator().manual_seed(i))
        for i, concept in enumerate(concepts)
    }
    torch.save({"params": {"new_concept_embedding": rows, **own}}, path)
    return rows


def test_factors_and_rows_are_read(tmp_path):
    state = random_state(PIPE, scale=1.0, unet=("*attn?.to_*",), text=("*self_attn*proj",))
    rows = file(tmp_path / "edlora.pth", state, ["<dog1>", "<dog2>"])
    found = formats.load(tmp_path / "edlora.pth", LAYOUT)
    assert {n: set(m) for n, m in found.components.items()} == {
        n: set(m) for n, m in state.components.items()
    }
    for name, modules in state.components.items():
        for path, lr in modules.items():
            torch.testing.assert_close(
                delta_weight(found.components[name][path]), delta_weight(lr), rtol=0, atol=0
            )
    assert torch.equal(found.tokens["clip_l"], torch.cat(list(rows.values())))
    assert (
        found.token_names[0] == "<new0>"
        and found.token_names[16] == "<new16>"
        and len(found.token_names) == 32
    )


def test_it_acts_and_its_rows_belong_to_layers(tmp_path):
    state = random_state(PIPE, scale=1.0, unet=("*attn?.to_*",), text=())
    file(tmp_path / "edlora.pth", state, ["<dog1>"])
    modules = {"unet": PIPE.unet, "text_encoder": PIPE.text_encoder, "tokenizer": PIPE.tokenizer}
    before = outputs(PIPE)[0]
    with patch(modules, tmp_path / "edlora.pth", layout=LAYOUT) as p:
        assert (outputs(PIPE)[0] - before).abs().max() > 1e-3
        assert p.bind("a <dog1>") == "a <new0>" and p.placeholders[0].layers == 16
        assert bind_layers("a <dog1>", p.placeholders)[3] == "a <new3>"
        assert "<new3>" in PIPE.tokenizer.get_vocab()
    assert torch.equal(outputs(PIPE)[0], before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda p: p["unet"].update(
                {
                    "nowhere.lora_down.weight": torch.ones(1, 2),
                    "nowhere.lora_up.weight": torch.ones(2, 1),
                }
            ),
            "nearest known",
        ),
        (lambda p: p["unet"].popitem(), "is not a factor of a pair"),
        (lambda p: p["new_concept_embedding"].update({"<a>": torch.ones(3)}), "has no rows"),
        (
            lambda p: p["new_concept_embedding"].update(
                {"<a>": torch.full((16, 16), float("nan"))}
            ),
            "NaN or Inf",
        ),
    ],
)
def test_damage_is_one_sentence(tmp_path, change, said):
    file(tmp_path / "x.pth", random_state(PIPE, unet=("*attn1.to_q",), text=()), ["<dog1>"])
    data = torch.load(tmp_path / "x.pth", weights_only=True)
    change(data["params"])
    torch.save(data, tmp_path / "x.pth")
    with pytest.raises(UserError, match=said):
        formats.load(tmp_path / "x.pth", LAYOUT)
