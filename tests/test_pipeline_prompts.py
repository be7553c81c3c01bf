"""Words with tokens for each cross-attention layer, on diffusers' pipelines and in infer.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import infer
from lora_core import formats, patch
from lora_core.cross_attention import LayerAttention, pack_layers
from lora_core.diffusion.generation import SamplerSettings, generate_images
from lora_core.errors import UserError
from lora_core.family import Family
from lora_core.formats.embeddings import placeholder_header
from lora_core.placeholders import bind_placeholders
from lora_core.runs.pictures import to_images
from models import load_family
from tests import tiny_flux, tiny_sdxl
from tests.layered_files import LAYERS, layered_state, save_deep_folder
from tests.tiny_pipeline import pipeline

PROMPT = "a <dog1> b <dog2>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deep_folder(tmp_path_factory.mktemp("deep"))


@pytest.fixture
def pipe(folder: Path) -> StableDiffusionPipeline:
    found = StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def family(folder: Path) -> Iterator[Family]:
    yield load_family(str(folder / "model"))


def parts(family: Family) -> dict[str, object]:
    return {**family.modules, "tokenizer": family.tokenizers["text_encoder"]}


def processors(pipe: StableDiffusionPipeline) -> dict[str, object]:
    return dict(pipe.unet.attn_processors)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("file", ["a.pth", "run"])
def test_a_pipeline_draws_as_our_sampler_does(
    folder: Path, pipe, family: Family, file: str, guidance: float
) -> None:
    prompt = PROMPT if file == "a.pth" else "a <dog> b TOK cat"
    negative = "c d" if guidance > 1 else ""
    settings = SamplerSettings(steps=3, guidance=guidance, negative=negative, sampler="ddim")
    with patch(parts(family), folder / file, 0.8, layout=family.layout) as p:
        ours = generate_images(family, [prompt], [5], settings, placeholders=p.placeholders)
        plain = generate_images(family, [prompt], [5], settings)
    assert (ours - plain).abs().max() > 0.02, "the words act"
    with patch(pipe, folder / file, 0.8) as p:
        theirs = pipe(
            **p.encode(prompt, negative),
            generator=torch.Generator().manual_seed(5),
            num_inference_steps=3,
            guidance_scale=guidance,
            output_type="pt",
        ).images
    torch.testing.assert_close(ours / 2 + 0.5, theirs, rtol=0, atol=2e-5)


def test_several_prompts_and_words_for_all_layers(folder: Path, pipe) -> None:
    with patch(pipe, folder / "run") as p:
        both = p.encode(["a TOK", "a cat"], negative="d")
        assert {tuple(embeds.shape) for embeds in both.values()} == {(2, 16, LAYERS * 16)}
        alone = p.encode("a cat", negative="d")
        assert {tuple(embeds.shape) for embeds in alone.values()} == {(1, 16, 16)}
        wide = pack_layers(alone["prompt_embeds"][:, None].expand(-1, LAYERS, -1, -1))
        torch.testing.assert_close(both["prompt_embeds"][1:], wide, rtol=0, atol=1e-6)
        images = pipe(**both, num_inference_steps=2, output_type="pt").images
    assert len(images) == 2


def test_undo_gives_back_the_very_processors(folder: Path, pipe) -> None:
    before, state = processors(pipe), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    names = [name for name, _ in pipe.unet.named_modules()]
    p = patch(pipe, folder / "a.pth")
    changed = [name for name, own in processors(pipe).items() if own is not before[name]]
    assert len(changed) == LAYERS and all(".attn2." in name for name in changed)
    p.undo()
    p.undo()
    assert all(own is before[name] for name, own in processors(pipe).items())
    assert [name for name, _ in pipe.unet.named_modules()] == names
    assert list(pipe.unet.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in pipe.unet.state_dict().items())


def test_two_files_share_the_processors(folder: Path, pipe) -> None:
    rename = {"<dog1>": "<cat1>", "<dog2>": "<cat2>"}
    rename |= {f"<new{i}>": f"<other{i}>" for i in range(2 * LAYERS)}
    before = processors(pipe)
    with patch(pipe, folder / "a.pth"):
        first = processors(pipe)
        with patch(pipe, folder / "b.pth", rename=rename) as p:
            assert processors(pipe) == first
            assert p.placeholders[0].word == "<cat1>" and p.placeholders[0].layers == LAYERS
            pipe(**p.encode("a <cat1>"), num_inference_steps=1, output_type="pt")
        assert processors(pipe) == first
    assert processors(pipe) == before


def test_plain_words_leave_the_processors_alone(tmp_path: Path, pipe) -> None:
    save_file({"emb_params": torch.randn(2, 16)}, tmp_path / "dog.safetensors")
    before = processors(pipe)
    with patch(pipe, tmp_path / "dog.safetensors") as p:
        assert processors(pipe) == before
        assert set(p.encode("a dog")) == {"prompt_embeds", "negative_prompt_embeds"}


def test_numbered_tokens_are_in_the_prompt_once(tmp_path: Path, pipe, family: Family) -> None:
    """A pipeline puts <dog>, <dog>_1 and <dog>_2 in the place of <dog>."""
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    save_file({"emb_params": rows}, tmp_path / "dog.safetensors")
    with patch(parts(family), tmp_path / "dog.safetensors", layout=family.layout) as p:
        assert p.bind("a dog b") == "a <dog><dog>_1<dog>_2 b"
        ours = family.encode_prompts([p.bind("a dog b")]).prompt_embeds
    with patch(pipe, tmp_path / "dog.safetensors") as p:
        assert p.bind("a dog b") == "a <dog> b"
        theirs = p.encode("a dog b")["prompt_embeds"]
        again = pipe.encode_prompt(p.bind("a dog b"), torch.device("cpu"), 1, False)[0]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert torch.equal(again, theirs)


def test_pooled_embeds_are_those_of_our_family(tmp_path: Path) -> None:
    """SDXL: both encoders' states, the mean of the layers' pooled ones, zeros for no negative."""
    pipe = tiny_sdxl.pipeline()
    pipe.save_pretrained(tmp_path / "model")
    family = load_family(str(tmp_path / "model"))
    layers = len(family.layout.cross_attention)
    names = [f"<s{i}>" for i in range(layers)]
    noise = torch.Generator().manual_seed(2)
    widths = {"clip_l": pipe.text_encoder, "clip_g": pipe.text_encoder_2}
    state = formats.load(_save_rows(tmp_path / "x.safetensors", widths, names, noise))
    assert layers > 1 and len(state.token_names) == layers
    with patch(pipe, tmp_path / "x.safetensors") as p:
        found = p.encode("a TOK")
    for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
        assert not found[name].any()
    tokenizers = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    modules = {name: family.tokenizers[own] for name, own in tokenizers.items()} | family.modules
    with patch(modules, tmp_path / "x.safetensors", layout=family.layout) as p:
        texts = [bind_placeholders("a TOK", p.placeholders, layer) for layer in range(layers)]
        by_layer = family.encode_prompts(texts)
    packed = pack_layers(by_layer.prompt_embeds[None])
    torch.testing.assert_close(found["prompt_embeds"], packed, rtol=0, atol=1e-5)
    pooled = next(iter(by_layer.extra.values())).mean(0, keepdim=True)
    torch.testing.assert_close(found["pooled_prompt_embeds"], pooled, rtol=0, atol=1e-5)
    with patch(pipe, tmp_path / "x.safetensors") as p:
        pipe(**p.encode("a TOK", "b"), num_inference_steps=1, height=64, width=64, output_type="pt")


def _save_rows(path: Path, encoders, names: list[str], noise: torch.Generator) -> Path:
    rows = {
        key: torch.randn(len(names), encoder.config.hidden_size, generator=noise)
        for key, encoder in encoders.items()
    }
    save_file(rows, path, metadata=placeholder_header({"TOK": names}, {"TOK": len(names)}))
    return path


# ---------------------------------------------------------------- what is refused


def test_one_text_cannot_hold_the_word(folder: Path, pipe) -> None:
    with patch(pipe, folder / "run") as p:
        assert p.bind("a cat") == "a <s48>"
        with pytest.raises(UserError, match=r"TOK has tokens for each of 16 .*pipe\(\*\*p\.encode"):
            p.bind("a TOK")


def test_encode_needs_a_pipeline(folder: Path, family: Family) -> None:
    modules = parts(family)
    needs = pytest.raises(UserError, match="encode needs a diffusers pipeline")
    with patch(modules, folder / "a.pth", layout=family.layout) as p, needs:
        p.encode(PROMPT)


def test_another_number_of_layers_is_refused(folder: Path) -> None:
    shallow = pipeline()
    words = {"<dog1>": (1, LAYERS)}
    state = layered_state(shallow, words, unet=("*attn1.to_q",), text=())
    tokens = folder / "words.safetensors"
    formats.save(state, tokens, format="embeddings")
    vocabulary = shallow.tokenizer.get_vocab()
    with pytest.raises(UserError, match=r"tokens of <dog1> for each of 16 .* this unet has 4; use"):
        patch(shallow, tokens)
    with pytest.raises(UserError, match="no unet was given; pass it too, or the whole pipeline"):
        patch({"text_encoder": shallow.text_encoder, "tokenizer": shallow.tokenizer}, tokens)
    flow = tiny_flux.pipeline()
    with pytest.raises(UserError, match=r"no unet was given|have width"):
        patch(flow, tokens)
    assert shallow.tokenizer.get_vocab() == vocabulary


def test_processors_that_do_more_than_attention_are_kept(folder: Path, pipe) -> None:
    class Watching(AttnProcessor2_0):
        pass

    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    module.set_processor(Watching())
    with pytest.raises(UserError, match=r"mid_block.*attn2 has Watching; take it off"):
        patch(pipe, folder / "a.pth")
    assert not any(isinstance(own, LayerAttention) for own in processors(pipe).values())


# ---------------------------------------------------------------- infer.py


class OneText:
    """diffusers' processor, reading a text of its own: per-layer conditioning done by hand."""

    def __init__(self, text: Tensor) -> None:
        self.text, self.inner = text, AttnProcessor2_0()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        text = self.text.expand(len(hidden_states), -1, -1)
        return self.inner(attn, hidden_states, text, attention_mask)


def draw(folder: Path, out: Path, *words: str) -> bytes:
    model = ("--model", str(folder / "model"), "--steps", "2", "--guidance", "1", "--seed", "3")
    assert infer.main([*model, "--out", str(out), *words]) == 0
    return Image.open(out).tobytes()


def test_infer_binds_the_words_of_a_file_by_layer(
    folder: Path, family: Family, tmp_path: Path
) -> None:
    drawn = draw(
        folder, tmp_path / "x.png", "--lora", f"{folder / 'a.pth'}:0.8", "--prompt", PROMPT
    )
    with patch(parts(family), folder / "a.pth", 0.8, layout=family.layout) as p:
        for layer, path in enumerate(family.layout.cross_attention):
            text = bind_placeholders(PROMPT, p.placeholders, layer)
            assert text == f"a <new{layer}> b <new{LAYERS + layer}>"
            embeds = family.encode_prompts([text]).prompt_embeds
            family.modules["unet"].get_submodule(path).set_processor(OneText(embeds))
        by_hand = generate_images(family, [""], [3], SamplerSettings(steps=2, guidance=1))
    assert drawn == to_images(by_hand)[0].tobytes()


def test_infer_renames_words_that_two_files_share(folder: Path, tmp_path: Path, capsys) -> None:
    files = ("--lora", str(folder / "a.pth"), "--lora", f"{folder / 'b.pth'}:0")
    first = draw(folder, tmp_path / "x.png", *files, "--prompt", "a <dog1>")
    assert "<dog1> of" in capsys.readouterr().err
    second = draw(folder, tmp_path / "y.png", *files, "--prompt", "a <dog1-2>")
    assert first != second
    alone = draw(folder, tmp_path / "z.png", *files[:2], "--prompt", "a <dog1>")
    assert first == alone


def test_infer_refuses_a_file_for_another_network(folder: Path, model: Path, capsys) -> None:
    words = {"<dog1>": (1, LAYERS)}
    state = layered_state(pipeline(), words, unet=("*attn1.to_q",), text=())
    formats.save(state, folder / "few.safetensors", format="embeddings")
    lora = str(folder / "few.safetensors")
    status = infer.main(["--model", str(model), "--lora", lora, "--prompt", "a <dog1>"])
    assert status and "this unet has 4" in capsys.readouterr().err
