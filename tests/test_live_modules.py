"""Files on networks in memory: pipelines, dictionaries and single networks of three families."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lora_core import formats, patch
from lora_core.adapters.injection import AdapterSpec, adapter_factors, inject, remove
from lora_core.adapters.live_modules import collect_modules, live_layout, networks_of
from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from models import known
from tests import tiny_flux, tiny_pipeline, tiny_sdxl
from tests.numbered_files import EXTENDED, PLAIN, TEXT, file_of, old_order, walk

DISNEY = Path(__file__).parents[2] / "shared" / "data" / "lora_disney.safetensors"
PIPELINES = {"sd": tiny_pipeline.pipeline, "sdxl": tiny_sdxl.pipeline, "flux": tiny_flux.pipeline}
UNET_CLASSES = ["CrossAttention", "Attention", "GEGLU"]


@pytest.fixture(params=PIPELINES)
def pipe(request):
    return PIPELINES[request.param]()


def contents(pipe):
    """Every number of a pipeline's networks, and its tokenizers' contents."""
    found = {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            state = {key: value.clone() for key, value in part.state_dict().items()}
            found |= {f"{name}.{key}": value for key, value in state.items()}
        elif hasattr(part, "backend_tokenizer"):
            found[name] = part.backend_tokenizer.to_str()
    return found


def assert_same_contents(before, after):
    assert list(before) == list(after)
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else None
        assert same if same is not None else value == after[key], key


def trained_state(pipe, *, tokens=True):
    """Factors of every attention in every network, and two tokens in every text encoder."""
    networks = networks_of(pipe.components)
    layout = live_layout(networks)
    noise = torch.Generator().manual_seed(3)
    state = AdapterState()
    for name, network in networks.items():
        globs = ("*to_q", "*to_v", "*.q_proj", "*.SelfAttention.q")
        targets = [
            glob for glob in globs
            if any(path.endswith(glob[1:]) for path, _ in network.named_modules())
        ]  # fmt: skip
        inject(network, AdapterSpec(targets=tuple(targets), rank=2), seed=0)
        factors = adapter_factors(network)
        remove(network)
        state.components[name] = {
            layout.published(name, path): lr._replace(
                up=torch.randn(lr.up.shape, generator=noise), down=lr.down.detach().clone()
            )
            for path, lr in factors.items()
        }
    if tokens:
        for name, key in layout.encoders.items():
            width = layout.component(name).width
            state.tokens[key] = torch.randn(2, width, generator=noise)
        state.token_names = ("<s0>", "<s1>")
    return state, layout


def test_a_run_acts_on_the_whole_pipeline_and_leaves_no_trace(pipe, tmp_path):
    state, layout = trained_state(pipe)
    formats.save_run(
        state, tmp_path / "run", layout=layout,
        metadata=formats.placeholder_header({"TOK": ("<s0>", "<s1>")}),
    )  # fmt: skip
    before = contents(pipe)
    with patch(pipe, tmp_path / "run") as p:
        assert set(p.adapted) == set(state.components) and set(p.embedded) == set(layout.encoders)
        assert p.bind("a TOK") == "a <s0><s1>"
        for name, key in layout.encoders.items():
            tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
            ids = tokenizer("<s0><s1>", add_special_tokens=False, return_tensors="pt").input_ids
            table = getattr(pipe, name).get_input_embeddings()
            assert torch.equal(table(ids[:, -2:])[0], state.tokens[key])
    assert_same_contents(before, contents(pipe))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_one_file_on_a_pipeline_a_dictionary_and_its_components(family, format, tmp_path):
    pipe = PIPELINES[family]()
    state, layout = trained_state(pipe, tokens=False)
    file = tmp_path / "a.safetensors"
    formats.save(state, file, format=format, layout=layout)
    for given in (pipe, pipe.components, networks_of(pipe.components)):
        with patch(given, file) as p:
            for name, factors in state.components.items():
                path, lr = next(iter(factors.items()))
                layer = p.modules[name].get_submodule(layout.module_path(name, path))
                x = torch.randn(3, lr.down.shape[1])
                expected = layer.base(x) + lr.scale * x @ lr.down.T @ lr.up.T
                torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["unet", "transformer", "text_encoder", "text_encoder_2"])
def test_one_network_is_named_by_its_class(name, tmp_path):
    pipe = tiny_flux.pipeline() if name == "transformer" else tiny_sdxl.pipeline()
    network = getattr(pipe, name)
    state, layout = trained_state(pipe, tokens=False)
    state.components = {name: state.components[name]}
    formats.save(state, tmp_path / "a.safetensors", layout=layout)
    before = contents(pipe)
    with patch(network, tmp_path / "a.safetensors", 0.5) as p:
        assert p.adapted == [name] and p.modules == {name: network}
    assert_same_contents(before, contents(pipe))


def test_one_network_says_what_a_file_needs_besides(tmp_path):
    pipe = tiny_pipeline.pipeline()
    state, layout = trained_state(pipe)
    formats.save(state, tmp_path / "a.safetensors", layout=layout)
    formats.save(state, tmp_path / "t.safetensors", format="embeddings", layout=layout)
    formats.save(state, tmp_path / "k.safetensors", format="kohya", layout=layout)
    numbered = tiny_pipeline.random_state(pipe, unet=PLAIN, text=TEXT)
    formats.save(numbered, tmp_path / "n.safetensors", format="cloneofsimo", layout=layout)
    before = contents(pipe)
    for given, file, sentence in (
        (pipe.unet, "a", "adapts text_encoder, but only unet was given; .* the whole pipeline"),
        (pipe.unet, "k", "adapts text_encoder, but only unet was given; .* the whole pipeline"),
        (pipe.unet, "n", "adapts text_encoder, but only unet was given; .* the whole pipeline"),
        (pipe.text_encoder, "a", "adapts unet, but only text_encoder was given"),
        (pipe.text_encoder, "n", "adapts unet, but only text_encoder was given"),
        (pipe.text_encoder, "t", "needs a tokenizer in the modules"),
        (pipe.vae, "a", "the class AutoencoderKL does not tell"),
        (nn.Linear(2, 2), "a", 'the class Linear does not tell .* pass {"unet": network}'),
        ("toy/model", "a", "a str cannot be patched; pass a diffusers pipeline"),
        (pipe.tokenizer, "a", "a CLIPTokenizer.* cannot be patched"),
    ):
        with pytest.raises(UserError, match=sentence):
            patch(given, tmp_path / f"{file}.safetensors")
    assert_same_contents(before, contents(pipe))


def test_a_class_of_ones_own_has_the_name_of_its_base():
    class MyUNet(UNet2DConditionModel):
        pass

    unet = tiny_pipeline.pipeline().unet
    unet.__class__ = MyUNet
    assert collect_modules(unet) == {"unet": unet}


# ---------------------------------------------------------------- numbered layers


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_numbered_files_fit_networks_in_memory(family, old, extended, said, tmp_path):
    """Numbers from cloneofsimo's own walk, over either order of registration."""
    pipe = PIPELINES[family]()
    globs = EXTENDED if extended else PLAIN
    classes = UNET_CLASSES + ["ResnetBlock2D"] * extended
    state = tiny_pipeline.random_state(pipe, unet=globs, text=TEXT, scale=1.0)
    kinds = (nn.Linear, nn.Conv2d) if extended else nn.Linear
    copy = PIPELINES[family]()
    unet = old_order(copy.unet) if old else copy.unet
    encoder = walk(copy.text_encoder, ["CLIPAttention"])
    walks = {"unet": walk(unet, classes, kinds),
             "text_encoder": ["text_model." + path for path in encoder]}  # fmt: skip
    header = {"unet": classes, "text_encoder": ["CLIPAttention"]}
    tensors, entries = file_of(state, walks, header)
    tensors["<s1>"], entries["<s1>"] = torch.randn(16), "<embed>"
    save_file(tensors, tmp_path / "n.safetensors", entries if said else {"<s1>": "<embed>"})
    before = contents(pipe)
    with patch(pipe, tmp_path / "n.safetensors") as p:
        for name, level in (("unet", ""), ("text_encoder", "text_model.")):
            found = adapter_factors(p.modules[name], p.name)
            own = {level + path: lr for path, lr in found.items()}
            assert own.keys() == state.components[name].keys()
            for path, lr in state.components[name].items():
                assert torch.equal(own[path].down, lr.down) and torch.equal(own[path].up, lr.up)
    assert_same_contents(before, contents(pipe))


def test_numbers_need_the_classes_that_they_count(tmp_path):
    save_file({"unet:0:up": torch.ones(2, 1), "unet:0:down": torch.ones(1, 2)}, tmp_path / "n.st")
    with pytest.raises(UserError, match="numbers the layers of no network"):
        patch({"unet": nn.Sequential(nn.Linear(2, 2))}, tmp_path / "n.st")
    with pytest.raises(UserError, match="has 1 layers for unet, expected"):
        patch(tiny_pipeline.pipeline().unet, tmp_path / "n.st")


@pytest.mark.skipif(not DISNEY.exists(), reason="the published file is not here")
def test_a_published_file_fits_the_networks_of_stable_diffusion():
    """lora_disney of cloneofsimo's repository, on networks whose weights are never read."""
    config = CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        encoder = CLIPTextModel(config)
    modules = {"unet": unet.to_empty(device="cpu"), "text_encoder": encoder.to_empty(device="cpu")}
    expected = formats.load(DISNEY, known.recognize_path(DISNEY))
    assert [len(own) for own in expected.components.values()] == [48, 144]
    with patch({**modules, "tokenizer": tiny_pipeline.tokenizer()}, DISNEY) as p:
        for name, factors in expected.components.items():
            prefix = live_layout(modules).component(name).module_prefix
            found = adapter_factors(modules[name], p.name)
            assert {prefix + path for path in found} == set(factors)
            for path, lr in found.items():
                assert torch.equal(lr.up, factors[prefix + path].up)
        assert p.placeholders
