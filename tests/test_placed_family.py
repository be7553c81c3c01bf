"""A family whose methods have their networks on the device."""

from pathlib import Path

import pytest
import torch

from lora_core.cross_attention import AttentionMap
from lora_core.diffusion.noise import NoiseLevel
from lora_core.family import Family, LoadOptions, Sizes
from models import load_family
from tests import tiny_flux, tiny_sdxl
from tests.conftest import save_pipeline
from training.networks.placed_family import PROMPTS_AT_ONCE, PlacedFamily
from training.networks.residency import DENOISER, TEXT_ENCODERS, VAE, Residency

CPU = torch.device("cpu")


def placed(family: Family, keeps_texts: bool = False) -> PlacedFamily:
    modules = family.modules
    parts = {
        TEXT_ENCODERS: [modules[name] for name in family.tokenizers],
        DENOISER: [modules[family.denoiser]],
        VAE: [modules["vae"]],
    }
    found = Residency(parts, CPU, moves=True, place=lambda *_: 0)
    return PlacedFamily(family, found, keeps_texts=keeps_texts)


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_each_method_has_its_networks_there_and_gives_the_same(name: str, tmp_path: Path) -> None:
    {"sd": save_pipeline, "sdxl": tiny_sdxl.save, "flux": tiny_flux.save}[name](tmp_path / "m")
    family = load_family(str(tmp_path / "m"), LoadOptions())
    own = placed(family)
    present = own.residency.present
    assert own.name == name and own.device == family.device == CPU
    pixels = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        ids = own.tokenize(["a"])
        assert not present  # tokenizers have no weights
        for method in ("encode_prompts", "encode_negative"):
            found, there = getattr(own, method)(["a", "b"]), getattr(family, method)(["a", "b"])
            assert torch.equal(found.prompt_embeds, there.prompt_embeds)
            assert present == {TEXT_ENCODERS}
        mean, _ = own.encode_images(pixels)
        assert present == {VAE} and torch.equal(mean, family.encode_images(pixels)[0])
        cond = own.add_size_embeddings(own.encode(ids), Sizes.uncropped(32, 32, 1), 2.0)
        assert present == {TEXT_ENCODERS}
        maps: list[AttentionMap] = []
        level = NoiseLevel(*(torch.full((1,), 0.5) for _ in range(3)))
        out = own.denoise(mean, level, cond, maps=maps)
        assert present == {DENOISER} and maps
        assert torch.equal(out, family.denoise(mean, level, cond, maps=[]))
        assert torch.equal(own.decode(mean), family.decode(mean)) and present == {VAE}
        own.bring_denoiser()
        assert present == {DENOISER}


def test_prompts_of_a_text_that_does_not_change_are_encoded_once(tmp_path: Path) -> None:
    family = load_family(str(save_pipeline(tmp_path / "m")), LoadOptions())
    asked: list[list[str]] = []
    encode = family.encode_prompts
    family.encode_prompts = lambda p: (asked.append(list(p)), encode(p))[1]  # type: ignore
    with torch.no_grad():
        own = placed(family, keeps_texts=True)
        first = own.encode_prompts(["a", "b"])
        again = own.encode_prompts(["a", "b"])
        assert torch.equal(first.prompt_embeds, again.prompt_embeds)
        own.encode_prompts(["a"])
        assert asked == [["a", "b"], ["a"]]  # the bits depend on the number of rows
        own.encode_negative(["a"])
        assert len(asked) == 3
        for i in range(PROMPTS_AT_ONCE):
            own.encode_prompts([str(i)])
        assert len(own.texts) == PROMPTS_AT_ONCE
        changing = placed(family)
        for _ in range(2):
            changing.encode_prompts(["c"])
        assert asked[-2:] == [["c"], ["c"]] and not changing.texts
