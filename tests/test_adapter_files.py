"""Adapter files of any format: reading undoes writing, refusals name keys, diffusers loads ours."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats import NATIVE, embeddings
from tests.adapter_checks import (
    apply_state,
    assert_equal_states,
    assert_equal_updates,
    assert_same,
    disagreement,
    header,
)
from tests.adapter_examples import flow_state, published_size_layout, respelled, save_file
from tests.tiny_pipeline import outputs, pipeline, random_state


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_what_is_written_reads_back_bit_for_bit(pipe, pipe_layout, tmp_path, format, dora):
    state = random_state(pipe, dora=dora, mixed=format == "diffusers", scale=0.75)
    formats.save(state, tmp_path / "a.safetensors", format=format, layout=pipe_layout)
    assert_same(
        formats.load(tmp_path / "a.safetensors", pipe_layout), state, folded=format == "diffusers"
    )


def test_dtype_is_what_the_factors_get_and_an_overflow_is_refused(pipe, pipe_layout, tmp_path):
    state = random_state(pipe, dora=True)
    formats.save(
        state, tmp_path / "a.safetensors", format="kohya", layout=pipe_layout, dtype=torch.bfloat16
    )
    for key, tensor in load_file(tmp_path / "a.safetensors").items():
        assert tensor.dtype == (
            torch.float32 if key.endswith(("alpha", "dora_scale")) else torch.bfloat16
        )
    path, lr = next(iter(state.components["unet"].items()))
    state.components["unet"][path] = lr._replace(up=lr.up * 1e6)
    with pytest.raises(UserError, match=r"lora_B.*NaN or Inf.*float16"):
        formats.save(state, tmp_path / "b.safetensors", layout=pipe_layout, dtype=torch.float16)
    assert not (tmp_path / "b.safetensors").exists()


KINDS_OF_FILE = [
    {"scale": 0.5},
    {"mixed": True, "scale": 0.75},
    {"unet": ("*to_q", "*proj_in"), "text": ()},
]  # the last: diffusers' first-key trap
CASES = [("diffusers", {"dora": True}), *itertools.product(("diffusers", "kohya"), KINDS_OF_FILE)]


@pytest.mark.parametrize("format, kind", CASES, ids=str)
def test_diffusers_loads_the_file_to_the_same_outputs(pipe_layout, tmp_path, format, kind):
    theirs, mine = pipeline(), pipeline()
    base, state = outputs(mine), random_state(mine, **kind)
    run = tmp_path / "run"
    formats.save_run(state, run, layout=pipe_layout, metadata={"config": "seed = 1"})
    name = NATIVE if format == "diffusers" else "run.safetensors"
    theirs.load_lora_weights(str(run), **({} if format == "diffusers" else {"weight_name": name}))
    apply_state(mine, formats.load(run / name, pipe_layout), pipe_layout)
    components = slice(None) if "text_encoder" in state.components else slice(1)
    assert (
        disagreement(outputs(mine)[components], outputs(theirs)[components], base[components])
        < 1e-5
    )


def test_a_run_writes_three_files_and_reads_back_as_one(pipe, pipe_layout, tmp_path):
    state = random_state(pipe, scale=1.0)
    state.tokens, state.token_names = {"clip_l": torch.randn(3, 16)}, ("<s0>", "<s1>", "<s2>")
    recipe = {"config": "x = 1", **embeddings.placeholder_header({"TOK": state.token_names})}
    written = formats.save_run(state, tmp_path / "my.run", layout=pipe_layout, metadata=recipe)
    assert [p.name for p in written] == [NATIVE, "my.run.safetensors", "my.run_emb.safetensors"]
    assert all(
        header(p)["config"] == "x = 1"
        and json.loads(header(p)["token_names"]) == list(state.token_names)
        for p in written
    )
    assert header(written[1])["ss_output_name"] == "my.run"
    read = formats.load(tmp_path / "my.run", pipe_layout)
    assert_same(read, state, folded=True)
    assert torch.equal(
        read.tokens["clip_l"], state.tokens["clip_l"]
    ) and embeddings.placeholder_words(read) == {"TOK": state.token_names}
    (tmp_path / "my.run" / ".left.0a1b.tmp_emb.safetensors").write_bytes(b"")  # of a killed writer
    assert formats.load(tmp_path / "my.run", pipe_layout).token_names == state.token_names
    embeddings_alone = AdapterState(tokens={"clip_l": torch.randn(1, 16)}, token_names=("<x>",))
    formats.save(embeddings_alone, written[2], format="embeddings")
    with pytest.raises(UserError, match="trained with the tokens <s0>, <s1>, <s2>"):
        formats.load(tmp_path / "my.run", pipe_layout)
    formats.save(embeddings_alone, tmp_path / "my.run" / "b_emb.safetensors", format="embeddings")
    with pytest.raises(UserError, match="2 files to choose from"):
        formats.load(tmp_path / "my.run", pipe_layout)


@pytest.mark.parametrize(
    "key, what",
    [
        ("base_model.model.to_q.lora_A.weight", "does not say which network"),
        ("diffusion_model.x.lora_A.weight", "ComfyUI"),
        ("lora_controlnet", "control LoRA"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "a whole model"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("unet.x.to_q.oft_R.weight", "OFT"),
        ("base_model.model.x.oft_R.default.weight", "OFT"),
        ("base_model.model.x.ia3_l", "another method than LoRA"),
        ("base_model.model.x.lora_E", "another method than LoRA"),
        ("base_model.vera_A", "another method than LoRA"),
        ("base_model.model.x.vera_lambda_b", "another method than LoRA"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "ControlNet"),
        ("controlnet_blocks.0.weight", "ControlNet"),
        ("body.0.block1.weight", "T2I-Adapter"),
        ("adapter.body.0.resnets.0.block1.weight", "T2I-Adapter"),
        ("emb_params", "embedding"),
        ("unet.down.attn1.processor.to_q_lora.down.weight", "old attention processors"),
        ("model.diffusion_model.out.2.weight", "a whole model"),
        ("down_blocks.0.weight", "not an adapter file"),
    ],
)
def test_foreign_files_are_refused_by_their_name(tmp_path, key, what):
    save_file({key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=what):
        formats.load(tmp_path / "a.safetensors")


def test_saving_refuses_what_it_cannot_write(pipe, pipe_layout, tmp_path):
    state = AdapterState({"unet": {"nowhere": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}})
    with pytest.raises(UserError, match="no Linear or Conv2d named nowhere"):
        formats.save(state, tmp_path / "a.safetensors", layout=pipe_layout)
    with pytest.raises(UserError, match="needs a model's layout"):
        formats.save(state, tmp_path / "a.safetensors", format="kohya")
    with pytest.raises(UserError, match="no format koyha; the nearest is kohya"):
        formats.save(state, tmp_path / "a.safetensors", format="koyha")
    with pytest.raises(UserError, match="no token rows"):
        formats.save(state, tmp_path / "a.safetensors", format="embeddings")
    with pytest.raises(UserError, match="no adapted modules"):
        formats.save(AdapterState({"unet": {}}), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


MODULES = {"1.5": 282 + 72, "2.1": 282 + 138, "xl": 794 + 72 + 193, "flow": 504 + 72 + 168}


def everywhere(layout, *, scale, dtype=torch.bfloat16):
    """Rank 1 on every layer."""
    noise = torch.Generator().manual_seed(0)

    def factors(shape):
        down, up = (
            torch.randn(size, generator=noise).to(dtype)
            for size in ((1, *shape[1:]), (shape[0], 1, *[1] * (len(shape) - 2)))
        )
        return LowRank(down, up, scale)

    return AdapterState(
        {
            name: {path: factors(shape) for path, shape in part.shapes.items()}
            for name, part in layout.components.items()
        }
    )


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_every_layer_of_every_family_comes_back_bit_for_bit(tmp_path, name, format):
    layout = published_size_layout(name)
    state = everywhere(layout, scale=1.0 if format == "diffusers" else 0.75)
    assert sum(map(len, state.components.values())) == MODULES[name]
    formats.save(state, tmp_path / "a.safetensors", format=format, layout=layout)
    assert_equal_states(formats.load(tmp_path / "a.safetensors", layout), state)


@pytest.mark.parametrize("name", MODULES)
def test_the_update_is_the_same_in_either_format(tmp_path, name):
    layout = published_size_layout(name)
    state = everywhere(layout, scale=0.7, dtype=torch.float32)
    few = {
        part: [(path, lr) for path, lr in modules.items() if lr.up.numel() * lr.down.numel() < 5e6]
        for part, modules in state.components.items()
    }
    state.components = {part: dict(modules[::31]) for part, modules in few.items() if modules}
    for format in ("diffusers", "kohya"):
        formats.save(state, tmp_path / f"{format}.safetensors", format=format, layout=layout)
        assert_equal_updates(formats.load(tmp_path / f"{format}.safetensors", layout), state)


KOHYA = [  # (family, name in a file, component, path): as kohya, its forks and diffusers spell them
    (
        "1.5",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    (
        "1.5",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    ("1.5", "lora_unet_output_blocks_11_1_proj_in", "up_blocks.3.attentions.2.proj_in"),
    ("1.5", "lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
    ("1.5", "lora_unet_middle_block_2_in_layers_2", "mid_block.resnets.1.conv1"),
    ("1.5", "lycoris_mid_block_attentions_0_proj_out", "mid_block.attentions.0.proj_out"),
    (
        "2.1",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_2",
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
    ),
    (
        "xl",
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0",
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0",
    ),
    (
        "xl",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k",
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
    ),
    ("flow", "lora_unet_double_blocks_7_img_attn_proj", "transformer_blocks.7.attn.to_out.0"),
    (
        "flow",
        "lora_transformer_single_transformer_blocks_7_attn_to_q",
        "single_transformer_blocks.7.attn.to_q",
    ),
    (
        "flow",
        "lycoris_transformer_blocks_7_attn_add_k_proj",
        "transformer_blocks.7.attn.add_k_proj",
    ),
    ("xl", "lora_te2_text_model_encoder_layers_31_mlp_fc2", "text_model.encoder.layers.31.mlp.fc2"),
    (
        "flow",
        "lora_te3_encoder_block_3_layer_1_DenseReluDense_wo",
        "encoder.block.3.layer.1.DenseReluDense.wo",
    ),
    (
        "flow",
        "lora_te2_encoder_block_3_layer_1_DenseReluDense_wo",
        "encoder.block.3.layer.1.DenseReluDense.wo",
    ),
    (
        "1.5",
        "lora_te1_text_model_encoder_layers_3_self_attn_out_proj",
        "text_model.encoder.layers.3.self_attn.out_proj",
    ),
]
COMFY = [
    (
        "1.5",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    (
        "1.5",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1",
        "text_model.encoder.layers.1.mlp.fc1",
    ),
    (
        "2.1",
        "text_encoders.clip_h.transformer.text_model.encoder.layers.1.mlp.fc1",
        "text_model.encoder.layers.1.mlp.fc1",
    ),
    ("xl", "diffusion_model.output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
    (
        "xl",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.31.self_attn.q_proj",
        "text_model.encoder.layers.31.self_attn.q_proj",
    ),
    ("flow", "diffusion_model.double_blocks.3.txt_mlp.2", "transformer_blocks.3.ff_context.net.2"),
    (
        "flow",
        "diffusion_model.transformer_blocks.3.attn.to_q",
        "transformer_blocks.3.attn.to_q",
    ),  # ai-toolkit
    ("flow", "transformer_blocks.3.attn.to_q", "transformer_blocks.3.attn.to_q"),
    ("flow", "transformer.transformer_blocks.3.attn.to_q", "transformer_blocks.3.attn.to_q"),
    (
        "flow",
        "base_model.model.transformer_blocks.3.attn.to_q",
        "transformer_blocks.3.attn.to_q",
    ),  # fal
    (
        "flow",
        "text_encoders.t5xxl.transformer.encoder.block.3.layer.0.SelfAttention.q",
        "encoder.block.3.layer.0.SelfAttention.q",
    ),
]


@pytest.mark.parametrize("leaves", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
@pytest.mark.parametrize("name, module, path", KOHYA + COMFY)
def test_names_in_the_wild(tmp_path, name, module, path, leaves):
    layout = published_size_layout(name)
    candidates = [part for part in layout.components.values() if path in part.shapes]
    shape = (
        candidates[0].shapes[path]
        if "clip_g" not in module and "te2_text" not in module
        else candidates[-1].shapes[path]
    )
    down, up = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
    file = save_file(
        {
            f"{module}.{leaves[0]}.weight": down,
            f"{module}.{leaves[1]}.weight": up,
            f"{module}.alpha": torch.tensor(1),
        },
        tmp_path / "a.safetensors",
    )
    ((component, modules),) = formats.load(file, layout).components.items()
    assert (
        list(modules) == [path] and torch.equal(modules[path].up, up) and modules[path].scale == 0.5
    )
    assert component == next(
        n for n, part in reversed(list(layout.components.items())) if part.shapes.get(path) == shape
    )


def test_allow_extra_leaves_unknown_keys_out_and_says_so_once(pipe, pipe_layout, tmp_path, capsys):
    state = random_state(pipe, scale=1.0)
    odd = {f"unet.extra.{i}.lora_A.weight": torch.ones(1, 1) for i in range(5)}
    file = save_file(respelled(state, "A B") | odd, tmp_path / "a.safetensors")
    with pytest.raises(
        UserError,
        match=r"has 5 unknown key\(s\): unet.extra.0.lora_A.weight, .* and 2 more; "
        r"nearest known: unet\.",
    ):
        formats.load(file, pipe_layout)
    assert_equal_states(formats.load(file, pipe_layout, allow_extra=True), state)
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and said.startswith(f"{file} has 5 unknown key(s)")
        and said.endswith("left out\n")
    )
    with pytest.raises(UserError, match="unknown key"):  # nothing at all is known
        formats.load(save_file(odd, tmp_path / "b.safetensors"), pipe_layout, allow_extra=True)


def test_token_rows_bundled_with_a_lora_come_along(pipe, pipe_layout, tmp_path):
    state, rows = random_state(pipe, scale=1.0), torch.randn(2, 16)
    file = save_file(
        respelled(state, "A B") | {"bundle_emb.dog.emb_params": rows}, tmp_path / "a.safetensors"
    )
    read = formats.load(file, pipe_layout)
    assert_equal_states(read, state)
    assert torch.equal(read.tokens["clip_l"], rows) and len(read.token_names) == 2
    alone = formats.load(
        save_file({"bundle_emb.dog.emb_params": rows}, tmp_path / "b.safetensors"), pipe_layout
    )
    assert not alone.components and torch.equal(alone.tokens["clip_l"], rows)


def test_formats_that_are_only_read_say_so(pipe, tmp_path):
    with pytest.raises(UserError, match="comfyui is only read; the nearest is"):
        formats.save(random_state(pipe), tmp_path / "a.safetensors", format="comfyui")


def test_a_layout_is_not_changed_by_reading(flow_layout, tmp_path):
    before = replace(flow_layout)
    formats.save(
        flow_state(flow_layout, ["norm_out.linear"]),
        tmp_path / "a.safetensors",
        format="kohya",
        layout=flow_layout,
    )
    formats.load(tmp_path / "a.safetensors", flow_layout)
    assert before == flow_layout and Path(tmp_path / "a.safetensors").exists()
