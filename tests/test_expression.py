"""recipe: a sum read and written, and the place of what cannot be read; selection: which layers an
@ means.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.errors import UserError
from lora_core.formats.layout import Component, Layout
from merging.expression import WeightedFile, parse_sum, render_sum
from merging.layer_choice import BLOCK_PRESETS, LAYER_GROUPS, multiply_factors, parse_layer_choice


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a.safetensors", [WeightedFile(1.0, "a.safetensors")]),
        ("-a", [WeightedFile(-1.0, "a")]),
        (
            "0.7*a + 0.3*b@attn - 0.2*c",
            [WeightedFile(0.7, "a"), WeightedFile(0.3, "b", ("attn",)), WeightedFile(-0.2, "c")],
        ),
        (
            "0.5*(a - 2*(c - d)@unet)@attn",
            [
                WeightedFile(0.5, "a", ("attn",)),
                WeightedFile(-1, "c", ("unet", "attn")),
                WeightedFile(1, "d", ("unet", "attn")),
            ],
        ),
        (
            "my-lora.safetensors - x/other-1.safetensors",
            [WeightedFile(1.0, "my-lora.safetensors"), WeightedFile(-1.0, "x/other-1.safetensors")],
        ),
        (
            "'my (c) + d.st'@[1, 0, 0.5] + 1e-3*\"it's\"",
            [WeightedFile(1.0, "my (c) + d.st", ("[1, 0, 0.5]",)), WeightedFile(0.001, "it's")],
        ),
        (
            "a@unet.*.attn?.to_q,conv=0.5 - 2(b)",
            [WeightedFile(1.0, "a", ("unet.*.attn?.to_q,conv=0.5",)), WeightedFile(-2.0, "b")],
        ),
        (
            "a@b-lora-content+0.5*b",
            [WeightedFile(1.0, "a", ("b-lora-content",)), WeightedFile(0.5, "b")],
        ),
        ("0.5*a + 2*(b + 0.25*a)", [WeightedFile(1.0, "a"), WeightedFile(2.0, "b")]),
        (
            "2*.5*00.safetensors + +3*0.7a",
            [WeightedFile(1.0, "00.safetensors"), WeightedFile(3.0, "0.7a")],
        ),
        (
            "runwayml/sd-v1-5 + -0.5*C:\\loras\\x.pt",
            [WeightedFile(1.0, "runwayml/sd-v1-5"), WeightedFile(-0.5, "C:\\loras\\x.pt")],
        ),
        ("a.safetensors+0.3*b", [WeightedFile(1.0, "a.safetensors"), WeightedFile(0.3, "b")]),
    ],
)
def test_sums_are_read_and_written(text, entries):
    assert parse_sum(text) == entries
    assert parse_sum(render_sum(entries)) == entries


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            WeightedFile,
            st.floats(-1e6, 1e6).filter(bool),
            st.text("ab-+. ()@*'é0", min_size=1, max_size=6),
            st.lists(st.sampled_from(["attn", "[1, 0]", "IN04,MID=0.5", "unet.*"]), max_size=2).map(
                tuple
            ),
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda e: (e.path, e.choices),
    )
)
def test_what_is_written_is_read_the_same(entries):
    assert parse_sum(render_sum(entries)) == entries


@pytest.mark.parametrize(
    ("text", "sentence", "place"),
    [
        ("", "it ends too early", 0),
        ("a + ", "it ends too early", 4),
        ("a b", "expected \\+ or -", 2),
        ("0.5", "expected \\* and a file", 3),
        ("0.5 + a", "expected \\* and a file", 3),
        ("(a", "not closed", 0),
        ("a + (b", "not closed", 4),
        ("a)", "never opened", 1),
        ("'a", "quote is not closed", 0),
        ("''", "quotes are empty", 0),
        ("0.3**a", "expected a file", 4),
        ("a@ attn", "layers right after", 2),
        ("(a b)", "expected \\+ , - or \\)", 3),
    ],
)
def test_mistakes_are_pointed_at(text, sentence, place):
    with pytest.raises(UserError, match=sentence) as info:
        parse_sum(text)
    assert str(info.value).splitlines()[1:] == [f"  {text}", f"  {' ' * place}^"]


def test_weights_that_cancel_are_refused():
    with pytest.raises(UserError, match="nothing is left"):
        parse_sum("a - 0.5*(a + a)")


# ---------------------------------------------------------------- layers

PATHS = [
    "conv_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.resnets.0.time_emb_proj",
    "up_blocks.1.attentions.2.proj_in",
]
TEXT = ["text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"]
KEYS = [("unet", path) for path in PATHS] + [("text_encoder", path) for path in TEXT]
BLOCKS = dict(zip(PATHS, (1, 2, 2, 2, 2, 4, 13, 19)))
UNET, ENCODER = (
    Component(("lora_unet",), dict.fromkeys(PATHS, (4, 4)), blocks=BLOCKS),
    Component(("lora_te",), dict.fromkeys(TEXT, (4, 4))),
)
LAYOUT = Layout(
    "tiny",
    "",
    {"unet": UNET, "text_encoder": ENCODER},
    {"text_encoder": "clip_l"},
    {"unet": {"mine": ("*.proj_in",)}},
    block_lists=(17, 26),
)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("attn", [0, 1, 1, 0, 0, 0, 0, 0, 1, 0]),
        ("self", [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]),
        ("cross", [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
        ("ff", [0, 0, 0, 1, 0, 0, 0, 0, 0, 1]),
        ("conv", [1, 0, 0, 0, 1, 1, 0, 0, 0, 0]),
        ("unet", [1] * 8 + [0] * 2),
        ("text", [0] * 8 + [1] * 2),
        ("text_encoder", [0] * 8 + [1] * 2),
        ("~conv", [0, 1, 1, 1, 0, 0, 1, 1, 1, 1]),
        ("attn=0.5,attn2.*=2,conv_in", [1, 0.5, 2, 0, 0, 0, 0, 0, 0.5, 0]),
        ("unet,~conv", [0, 1, 1, 1, 0, 0, 1, 1, 0, 0]),
        ("down_blocks.*.to_q", [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("mid_block", [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]),
        ("unet.down_blocks.0.downsamplers.*", [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]),
        ("mine", [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]),
        ("BASE,IN03=0.25,MID", [0, 0, 0, 0, 0, 0.25, 1, 0, 1, 1]),
        ("9," * 17 + "1", None),
        ("2,3,0,4,0,0,0,5,0,0,6,0,0,0,0,0,0", [1, 3, 3, 3, 3, 1, 5, 6, 2, 2]),
        ("[2, 3, 0, 4, 0, 0, 0, 5, 0, 0, 6, 0, 0, 0, 0, 0, 0]", [1, 3, 3, 3, 3, 1, 5, 6, 2, 2]),
        ("INS", [1, 1, 1, 1, 1, 1, 0, 0, 1, 1]),
        ("OUTD", [1, 0, 0, 0, 0, 1, 0, 1, 1, 1]),
    ],
)
def test_choices_mean_layers(text, weights):
    if weights is None:
        with pytest.raises(UserError, match="got 18 block weights"):
            parse_layer_choice(text, KEYS, LAYOUT)
        return
    chosen = parse_layer_choice(
        text, KEYS, LAYOUT
    )  # IN00 and IN03 are not in a list of 17, and so weigh 1
    assert [chosen(*key) for key in KEYS] == weights


def test_choices_multiply():
    both = multiply_factors(
        [parse_layer_choice("attn=0.5", KEYS, LAYOUT), parse_layer_choice("unet", KEYS, LAYOUT)]
    )
    assert [both(*key) for key in KEYS] == [0, 0.5, 0.5, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "layout", "sentence"),
    [
        ("atn", LAYOUT, "nearest: .*attn"),
        ("attn", None, None),
        ("IN09", LAYOUT, "none of the 10 layers"),
        ("MID", None, "name it with --model"),
        ("OUTD", None, "name it with --model"),
        ("attn=x", LAYOUT, "is not a number"),
        ("~attn=0.5", LAYOUT, "drop the ~ or the ="),
        ("1,0,1", LAYOUT, "takes a list of 17 or 26"),
        ("MID", Layout("flow", "", {}, {}), "no blocks"),
        ("OUTD", Layout("other", "", {}, {}, block_lists=(12, 20)), "takes 12 or 20 numbers"),
        ("cross,", LAYOUT, "none of the 10 layers"),
    ],
)
def test_choices_without_effect_are_refused(text, layout, sentence):
    if sentence is None:
        assert parse_layer_choice(text, KEYS, layout)("unet", PATHS[1]) == 1
        return
    with pytest.raises(UserError, match=sentence):
        parse_layer_choice(text, KEYS, layout)


def test_lists_of_presets_fit_their_length():
    assert all(max(ones) < 17 for ones in BLOCK_PRESETS.values()) and not set(BLOCK_PRESETS) & set(
        LAYER_GROUPS
    )
