"""Every published model's files are recognized as its own, whatever their format.

So are files with few layers, as far as shapes tell.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.formats.recognition import recognize_keys
from models import known
from models.published import PUBLISHED_MODELS
from tests import tiny_pipeline
from tests.published_files import PUBLISHED_FILES, Blocks, list_tensors
from tests.refusals import sentence

DISNEY = Path("/work/shared/data/lora_disney.safetensors")
ORIGINALS = [kind for kind, row in PUBLISHED_MODELS.items() if not row.like]
WRITTEN = [
    "diffusers",
    "kohya",
    "cloneofsimo",
]  # the formats of adapters; those of token rows alone cannot tell families of one width apart


def factors(shape, rank=2):
    out, *inner = shape
    return LowRank(
        torch.ones(1).expand(rank, *inner),
        torch.ones(1).expand(out, rank, *[1] * (len(inner) - 1)),
        1.0,
    )


def state_of(kind, component="", pattern=""):
    """An adapter of a kind; no memory is used for its factors.

    Of one component and the layers that match a pattern, where they are given.
    """
    layout = known.published_layout(kind)
    components = {
        name: {
            path: factors(shape) for path, shape in part.shapes.items() if re.search(pattern, path)
        }
        for name, part in layout.components.items()
        if component in ("", name) and layout.encoders.get(name) != "t5"
    }
    return AdapterState({name: modules for name, modules in components.items() if modules})


def written(state, format, layout):
    tensors, header = formats.FORMATS[format].write(state, layout, "a")
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}, header


ATTENTION = r"attn\d?\.|self_attn"  # what every format can spell
OWN_LAYERS = {"sd3": ATTENTION + r"|norm1\.linear"}  # 3.5 medium has the same first attention


@pytest.mark.parametrize("kind", ORIGINALS + ["sdxl-refiner"])
@pytest.mark.parametrize("format", WRITTEN)
def test_every_format_is_recognised_as_its_own_family(kind, format):
    layout = known.published_layout(kind)
    if (
        format == "cloneofsimo"
        and not layout.components.get("unet", layout.components.get("transformer")).numbering
    ):
        pytest.skip("no such files exist")
    cloneofsimo = r"attn\d\.|self_attn|ff\.net\.0"
    shapes, _ = written(
        state_of(
            kind,
            pattern=cloneofsimo if format == "cloneofsimo" else OWN_LAYERS.get(kind, ATTENTION),
        ),
        format,
        layout,
    )
    assert known.recognize_kind(shapes) == kind
    assert (
        known.recognize_adapter(
            {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        )
        is layout
    )


@pytest.mark.parametrize("kind", ORIGINALS + ["sdxl-refiner"])
def test_whole_networks_are_recognised(kind):
    shapes, header = written(state_of(kind), "diffusers", known.published_layout(kind))
    assert known.recognize_kind(shapes, header) == kind
    shapes, header = written(state_of(kind), "kohya", known.published_layout(kind))
    assert known.recognize_kind(shapes) == known.recognize_kind(shapes, header) == kind


@pytest.mark.parametrize(
    ("kind", "component", "pattern", "format"),
    [
        ("sd1", "unet", r"mid_block.*attn2\.to_k", "diffusers"),
        ("sd2", "unet", r"mid_block.*attn2\.to_v", "kohya"),
        (
            "sdxl",
            "unet",
            r"mid_block.*attn1\.to_q",
            "diffusers",
        ),  # others have no block of this depth
        ("sdxl", "unet", r"attentions\.1\.transformer_blocks\.9\.attn1\.to_q", "kohya"),
        (
            "sd1",
            "text_encoder",
            "",
            "kohya",
        ),  # lora_te: with a second encoder it is written lora_te1
        ("sd2", "text_encoder", "", "kohya"),
        ("sd2", "text_encoder", "layers.0.self_attn.q_proj", "diffusers"),
        ("sd1", "unet", "proj_in", "kohya"),  # a 1x1 convolution
        ("sd2", "unet", "proj_in", "kohya"),
        ("sdxl-refiner", "unet", r"mid_block.*attn1\.to_q", "diffusers"),
        ("sdxl", "text_encoder_2", "", "kohya"),
        ("flux-dev", "transformer", r"^transformer_blocks\.3\.attn\.to_q", "kohya"),
        ("flux-dev", "transformer", r"single_transformer_blocks\.3\.proj_out", "diffusers"),
        ("flux-schnell", "transformer", "guidance", "diffusers"),
        ("sd3.5-medium", "transformer", r"transformer_blocks\.3\.attn2\.to_k", "kohya"),
        ("sd3.5-large", "transformer", r"transformer_blocks\.3\.attn\.to_q", "diffusers"),
        ("flux2-klein-base-4b", "transformer", r"blocks\.3\.attn\.to_qkv_mlp_proj", "kohya"),
        ("flux2-klein-base-9b", "transformer", r"blocks\.3\.ff\.linear_in", "diffusers"),
        ("flux2-dev", "transformer", r"blocks\.3\.attn\.to_q$", "diffusers"),
        ("sd1-inpainting", "unet", r"conv_in|mid_block.*attn2\.to_k", "diffusers"),
    ],
)
def test_files_with_few_layers(kind, component, pattern, format):
    state = state_of(kind, component, pattern)
    if kind == "flux-schnell":
        assert not state.components  # it has no guidance, all else is as in dev
        return
    shapes, _ = written(state, format, known.published_layout(kind))
    assert known.recognize_kind(shapes) == kind


def test_what_shapes_do_not_tell_a_header_does_or_the_user():
    middle = written(
        state_of("sd1", "unet", r"mid_block.*attn1\.to_q"),
        "diffusers",
        known.published_layout("sd1"),
    )[0]
    assert "1.x and Stable Diffusion 2.x and Stable Diffusion XL alike" in sentence(
        known.recognize_adapter, middle
    )  # 1280 wide in all of them
    layer = written(
        state_of("sd1", "unet", r"up_blocks\.3.*attn1\.to_q"),
        "diffusers",
        known.published_layout("sd1"),
    )[0]
    text = sentence(known.recognize_adapter, layer, {}, "a.safetensors")
    assert (
        "Stable Diffusion 1.x and Stable Diffusion 2.x alike" in text
        and "--model" in text
        and "a.safetensors" in text
        and "up_blocks.3" in text
    )
    assert "Flux" not in text and "XL" not in text
    for version, kind in (("sd_v1", "sd1"), ("sd_v2", "sd2"), ("sd_v2_v", "sd2-v")):
        assert known.recognize_kind(layer, {"ss_base_model_version": version}) == kind
    assert (
        known.recognize_kind(layer, {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"})
        == "sd2-v"
    )
    encoder = written(state_of("sdxl", "text_encoder"), "kohya", known.published_layout("sdxl"))[0]
    assert "Stable Diffusion XL and Flux" in sentence(known.recognize_adapter, encoder)
    assert known.recognize_kind(encoder, {"ss_base_model_version": "flux1"}) == "flux-dev"
    context = written(
        state_of("sd1", "unet", r"attn2\.to_k"), "kohya", known.published_layout("sd1")
    )[0]
    assert (
        known.recognize_kind(context, {"ss_base_model_version": "sd_v2"}) == "sd1"
    )  # shapes before headers
    schnell = written(state_of("flux-schnell"), "kohya", known.published_layout("flux-schnell"))
    assert (
        known.recognize_kind(*schnell) == "flux-schnell"
        and known.recognize_kind(schnell[0]) == "flux-dev"
    )


def test_files_of_other_models_are_refused():
    pipe = tiny_pipeline.pipeline()
    state = tiny_pipeline.random_state(pipe)
    shapes, _ = written(
        state, "kohya", formats.layout_of({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    )
    text = sentence(known.recognize_adapter, shapes, None, "tiny.safetensors")
    assert text == "tiny.safetensors is of no published model; add --model FOLDER"
    for odd in (
        {},
        {"a.weight": (3, 3)},
        {"unet.nowhere.lora_A.weight": (4, 320), "unet.nowhere.lora_B.weight": (320, 4)},
        {"step": ()},
    ):
        assert "is of no published model" in sentence(known.recognize_adapter, odd)
    one, _ = written(
        state_of("sd1", pattern=r"attn2\.to_k"), "diffusers", known.published_layout("sd1")
    )
    other, _ = written(
        state_of("sdxl", pattern=r"attn2\.to_k"), "diffusers", known.published_layout("sdxl")
    )
    assert "is of no published model" in sentence(known.recognize_adapter, one | other)


K = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
CONV, FC, QKV = (
    "down_blocks_0_resnets_0_conv1",
    "text_model_encoder_layers_3_mlp_fc1",
    "double_blocks.0.img_attn.qkv",
)
TEXT_Q = "text_model.encoder.layers.0.self_attn.q_proj"
DOTTED = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        ("sd1", {f"lora_unet_{K}.lora_down.weight": (4, 768)}),
        (
            "sd2",
            {
                f"lora_unet_{K}.hada_w1_a": (640, 4),
                f"lora_unet_{K}.hada_w1_b": (4, 1024),
                f"lora_unet_{K}.alpha": (),
            },
        ),
        (
            "sd1",
            {
                f"lycoris_{K}.lokr_w1": (8, 8),
                f"lycoris_{K}.lokr_w2_a": (80, 4),
                f"lycoris_{K}.lokr_w2_b": (4, 96),
            },
        ),
        (
            "sd2",
            {
                f"lora_unet_{K}.lokr_w1_a": (8, 2),
                f"lora_unet_{K}.lokr_w1_b": (2, 8),
                f"lora_unet_{K}.lokr_w2": (80, 128),
            },
        ),
        ("sd2", {f"lora_unet_{K}.diff": (640, 1024)}),
        (
            "sdxl",
            {
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (
                    4,
                    2048,
                )
            },
        ),
        (
            "sdxl",
            {f"lora_unet_{K}.lora_down.weight": (4, 2048)},
        ),  # diffusers' names under kohya's prefix
        (
            "sd1",
            {
                "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.lora_A.weight": (
                    4,
                    768,
                )
            },
        ),
        ("sd1", {f"{DOTTED.removesuffix('to_k')}processor.to_k_lora.down.weight": (4, 768)}),
        ("sd1", {f"unet.{DOTTED.removesuffix('to_k')}processor.to_k_lora.down.weight": (4, 768)}),
        ("sd2", {f"unet.{DOTTED}.lora.down.weight": (4, 1024)}),
        ("sd1", {f"base_model.model.{DOTTED}.lora_A.default.weight": (4, 768)}),
        (
            "sd1",
            {
                f"base_model.model.{DOTTED}.lora_A.weight": (4, 768),
                f"base_model.model.{DOTTED}.lora_magnitude_vector": (640,),
            },
        ),
        (
            "flux-dev",
            {
                f"diffusion_model.{QKV}.lora_A.weight": (4, 3072),
                f"diffusion_model.{QKV}.lora_B.weight": (9216, 4),
            },
        ),
        (
            "flux-dev",
            {
                "double_blocks.0.processor.qkv_lora1.down.weight": (16, 3072),
                "double_blocks.0.processor.qkv_lora1.up.weight": (9216, 16),
            },
        ),
        (
            "flux-dev",
            {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)},
        ),
        (
            "flux-dev",
            {"lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down.weight": (4, 3072)},
        ),
        (
            "sd1",
            {
                f"lora_unet_{CONV}.lora_down.weight": (4, 320, 1, 1),
                f"lora_unet_{CONV}.lora_mid.weight": (4, 4, 3, 3),
                f"lora_unet_{K}.lora_down.weight": (4, 768),
            },
        ),
        (
            "sd2",
            {
                f"lora_unet_{CONV}.hada_w1_a": (4, 320),
                f"lora_unet_{CONV}.hada_w1_b": (4, 320),
                f"lora_unet_{CONV}.hada_t1": (4, 4, 3, 3),
                f"lora_unet_{K}.hada_w1_b": (4, 1024),
            },
        ),
        ("sd2", {f"lora_te_{FC}.hada_w1_a": (4096, 4), f"lora_te_{FC}.hada_w1_b": (4, 1024)}),
        (
            "sd1",
            {
                f"text_encoder.{TEXT_Q}.lora_linear_layer.down.weight": (4, 768),
                f"unet.{DOTTED}.lora.down.weight": (4, 768),
            },
        ),
        ("sd1", {"<s1>": (768,), "<s2>": (768,)}),
        ("sd2", {"emb_params": (3, 1024)}),
        ("sd1", {"clip_l": (2, 768)}),
        ("sdxl", {"clip_l": (2, 768), "clip_g": (2, 1280)}),
        ("sdxl", {"text_encoders_0": (2, 768), "text_encoders_1": (2, 1280)}),
        ("flux-dev", {"clip_l": (2, 768), "t5": (2, 4096), "t5xxl": (2, 4096)}),
    ],
)
def test_spellings_from_elsewhere(kind, tensors):
    assert known.recognize_kind(tensors) == kind


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_files_of_public_tools(name):
    file = PUBLISHED_FILES[name]
    shapes = list_tensors(file)
    assert recognize_keys(shapes).format == file.format
    known._refuse_other_families(shapes, name)
    assert known.recognize_kind(shapes, file.header) == file.kind
    layers = known._layers_in_file(shapes, file.format)
    assert len(layers) == sum(len(blocks.numbers) * len(blocks.layers) for blocks in file.blocks)
    assert known._shapes_by_layer(file.kind, file.format, layers).keys() == {
        layer.name for layer in layers
    }


def test_layers_that_two_models_have_need_the_models_name():
    """The first attention of Stable Diffusion 3 medium and 3.5 medium, which diffusers' script for
    both adapts. A double block of Flux and FLUX.2 klein 4B is Flux's.
    """
    medium = PUBLISHED_FILES["diffusers, SD 3.5 large"]
    short = tuple(Blocks(own.name, range(23), own.layers) for own in medium.blocks[:2])
    text = sentence(known.recognize_kind, list_tensors(medium._replace(width=1536, blocks=short)))
    assert "Stable Diffusion 3 medium and Stable Diffusion 3.5 medium alike" in text
    klein = PUBLISHED_FILES["diffusers, double blocks of klein 4B"]
    (first,) = [Blocks(own.name, (0,), own.layers) for own in klein.blocks[:1]]
    assert known.recognize_kind(list_tensors(klein._replace(blocks=(first,)))) == "flux-dev"


@pytest.mark.skipif(not DISNEY.is_file(), reason="the published file is not here")
def test_a_published_file():
    layout = known.recognize_path(DISNEY)
    assert (layout.family, layout.base_model_version) == ("sd", "sd_v1")
    state = formats.load(DISNEY, layout)
    assert {name: len(modules) for name, modules in state.components.items()} == {
        "unet": 144,
        "text_encoder": 48,
    }


def test_files_folders_and_pickles(tmp_path):
    def small(kind, pattern):
        parts = state_of(kind, pattern=pattern).components
        own = {
            n: {p: lr._replace(down=lr.down.clone(), up=lr.up.clone()) for p, lr in modules.items()}
            for n, modules in parts.items()
        }
        return AdapterState(
            own,
            {"clip_l": torch.ones(1, 768)} if kind == "sd1" else {},
            ("<s0>",) if kind == "sd1" else (),
        )

    run = tmp_path / "run"
    run.mkdir()
    formats.save_run(small("sd1", "attn2.to_k"), run, layout=known.published_layout("sd1"))
    assert len(list(run.iterdir())) == 3 and known.recognize_path(run) is known.published_layout(
        "sd1"
    )
    formats.save(
        small("sdxl", "attn2.to_k"),
        tmp_path / "xl.safetensors",
        format="kohya",
        layout=known.published_layout("sdxl"),
    )
    assert known.recognize_path(tmp_path / "xl.safetensors") is known.published_layout("sdxl")
    peft = tmp_path / "peft" / "unet"
    peft.mkdir(parents=True)
    save_file(
        {f"base_model.model.{DOTTED}.lora_A.weight": torch.ones(2, 1024)},
        peft / "adapter_model.safetensors",
    )
    assert known.recognize_path(tmp_path / "peft") is known.published_layout("sd2")
    torch.save(
        [torch.ones(320, 1), torch.ones(1, 320), torch.ones(320, 1), torch.ones(1, 1024)],
        tmp_path / "lora.pt",
    )
    assert known.recognize_path(tmp_path / "lora.pt") is known.published_layout("sd2")
    torch.save([torch.ones(768, 1), torch.ones(1, 768)], tmp_path / "lora.text_encoder.pt")
    assert known.recognize_path(tmp_path / "lora.text_encoder.pt") is known.published_layout("sd1")
    torch.save({"string_to_param": {"*": torch.ones(2, 1024)}, "name": "TOK"}, tmp_path / "emb.pt")
    assert known.recognize_path(tmp_path / "emb.pt") is known.published_layout("sd2")
    torch.save({f"lora_unet_{K}.lora_down.weight": torch.ones(4, 768)}, tmp_path / "k.pt")
    assert known.recognize_path(tmp_path / "k.pt") is known.published_layout("sd1")
    (tmp_path / "none").mkdir()
    assert "no .safetensors file" in sentence(known.recognize_path, tmp_path / "none")
    assert "does not exist" in sentence(known.recognize_path, tmp_path / "nowhere.safetensors")
    data = (tmp_path / "xl.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-9])
    assert "cut.safetensors" in sentence(known.recognize_path, tmp_path / "cut.safetensors")
