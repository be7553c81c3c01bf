"""The native format, and every spelling of it that diffusers and peft have written."""

import pytest
import torch
from safetensors.torch import load_file

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats.container import with_header
from tests.adapter_checks import apply_state, assert_equal_states, assert_same, disagreement, header
from tests.adapter_examples import ATTENTION, STYLES, respelled, save_file
from tests.tiny_pipeline import outputs, pipeline, random_state


def test_native_reads_and_writes_without_a_layout(pipe, pipe_layout, tmp_path):
    state = random_state(pipe, dora=True, scale=1.0)
    formats.save(state, tmp_path / "a.safetensors")
    formats.save(state, tmp_path / "b.safetensors", layout=pipe_layout)
    bare, labelled = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert header(bare).items() <= header(labelled).items()
    assert with_header(bare, header(labelled)) == labelled.read_bytes()  # the rest byte for byte
    assert_same(formats.load(tmp_path / "a.safetensors"), state, folded=True)


@pytest.mark.parametrize("with_layout", [True, False])
def test_a_native_text_encoder_without_its_level_is_published_with_it(
    pipe, pipe_layout, tmp_path, with_layout
):
    formats.save(random_state(pipe, scale=1.0), tmp_path / "a.safetensors")
    save_file(
        {k.replace("text_model.", ""): t for k, t in load_file(tmp_path / "a.safetensors").items()},
        tmp_path / "b.safetensors",
    )
    assert_same(
        formats.load(tmp_path / "b.safetensors", pipe_layout if with_layout else None),
        random_state(pipe, scale=1.0),
        folded=True,
    )


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_of_diffusers_is_read(pipe, pipe_layout, tmp_path, style, alpha):
    state = random_state(
        pipe, scale=0.5 if alpha else 1.0, **(ATTENTION if style == "processors" else {})
    )
    file = save_file(respelled(state, style, alpha=alpha), tmp_path / "a.safetensors")
    assert_equal_states(formats.load(file, pipe_layout), state)
    if style not in ("processors", "to_out", "peft inside"):
        assert_equal_states(formats.load(file), state)


@pytest.mark.parametrize("style", ["A B", "lora", "linear layer", "processors"])
def test_diffusers_reads_these_spellings_alike(pipe_layout, tmp_path, style):
    """Its loader does not read the others: it loses their modules, or raises."""
    theirs, mine = pipeline(), pipeline()
    base, state = outputs(mine), random_state(mine, scale=1.0, **ATTENTION)
    unet, text = (
        {c: m for c, m in state.components.items() if c == name}
        for name in ("unet", "text_encoder")
    )
    spell_unet, spell_text = {"linear layer": ("A B", "linear layer"), "lora": ("lora", "A B")}.get(
        style, (style, style)
    )
    tensors = respelled(AdapterState(unet), spell_unet) | respelled(AdapterState(text), spell_text)
    file = save_file(tensors, tmp_path / "a.safetensors")
    theirs.load_lora_weights(str(tmp_path), weight_name=file.name)
    read = formats.load(file, pipe_layout)
    apply_state(mine, read, pipe_layout)
    assert disagreement(outputs(mine), outputs(theirs), base) < 1e-5


MAGNITUDES = [
    "lora_magnitude_vector",
    *(f"lora_magnitude_vector.{end}" for end in ("weight", "x.weight", "x")),
    "dora_scale",
]


@pytest.mark.parametrize("leaf", MAGNITUDES)
def test_every_spelling_of_a_magnitude_is_read(pipe, pipe_layout, tmp_path, leaf):
    state = random_state(pipe, scale=1.0, dora=True)
    tensors = respelled(state, "A B")
    for component, modules in state.components.items():
        for path, lr in modules.items():
            tail = [1] * (lr.down.ndim - 1)
            shape = (
                (-1, *tail)
                if leaf == "dora_scale"
                else (1, -1, 1, 1)
                if lr.down.ndim == 4
                else (-1,)
            )
            tensors[f"{component}.{path}.{leaf}"] = lr.magnitude.reshape(shape)
    file = save_file(tensors, tmp_path / "a.safetensors")
    assert_equal_states(formats.load(file, pipe_layout), state)
    assert_equal_states(formats.load(file), state)


def test_two_adapters_in_one_file_are_refused(pipe, pipe_layout, tmp_path):
    tensors = respelled(random_state(pipe), "named")
    file = save_file(
        tensors | {next(iter(tensors)).replace("my_run", "other"): torch.ones(1)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(
        UserError, match=r"has the adapters (my_run|other) .* and (my_run|other) .*, expected one"
    ):
        formats.load(file, pipe_layout)


def test_names_of_attention_processors_need_a_layout_and_may_lack_the_component(
    pipe, pipe_layout, tmp_path
):
    """diffusers' UNet files of early 2023 begin with the path."""
    state = random_state(pipe, scale=1.0, unet=ATTENTION["unet"], text=())
    tensors = respelled(state, "processors")
    with pytest.raises(UserError, match=r"names of old attention processors .*; name the model"):
        formats.load(save_file(tensors, tmp_path / "a.safetensors"))
    file = save_file(
        {key.removeprefix("unet."): tensor for key, tensor in tensors.items()},
        tmp_path / "b.safetensors",
    )
    assert_equal_states(formats.load(file, pipe_layout), state)
    with pytest.raises(UserError, match=r"does not say which network its keys .*; name the model"):
        formats.load(file)
