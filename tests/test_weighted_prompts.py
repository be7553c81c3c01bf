"""Weights of prompts act on CLIP's hidden states, as A1111's "Original" emphasis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import infer
from lora_core.family import LoadOptions
from lora_core.prompt_weights import WeightedPrompt
from models import load_family
from models.sd import final_norm
from models.weighted_prompts import emphasize_states
from tests import tiny_flux
from tests.tiny_pipeline import CHUNK


def a1111_emphasis(z: Tensor, multipliers: Sequence[float]) -> Tensor:
    """modules/sd_emphasis.py, EmphasisOriginal, in float64: z [s, d]."""
    z = z.double()
    before = z.mean()
    z = z * torch.tensor(multipliers, dtype=torch.float64)[:, None]
    return z * (before / z.mean())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_hidden_states_are_those_of_a1111(model: Path, sdxl: Path, family: str) -> None:
    """Each encoder's states of each chunk by themselves; pooled prompts are not weighted."""
    path = model if family == "sd" else sdxl
    loaded = load_family(str(path), LoadOptions(max_token_length=150))
    one = load_family(str(path))
    if family == "sd":  # an untrained norm has the mean 0, which no factor restores
        for either in (loaded, one):
            final_norm(either.modules["text_encoder"]).bias.data += 0.3
    text = "a b (c d:1.5) e [f] g h i j k (l m n o) p"
    weights = [1, 1, 1.5, 1.5, 1, 1 / 1.1, 1, 1, 1, 1, 1, *[1.1] * 4, 1]
    plain = loaded.encode_prompts([text.translate(str.maketrans("", "", "()[]:.15"))])
    cond = loaded.encode_prompts([WeightedPrompt(text), WeightedPrompt("a b")])
    widths = [encoder.config.hidden_size for encoder in map(one.modules.get, one.tokenizers)]
    letters = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p"]
    expected = []
    for number in range(2):
        own = letters[CHUNK * number : CHUNK * (number + 1)]
        padded = [1.0, *weights[CHUNK * number : CHUNK * (number + 1)]]
        padded += [1.0] * (CHUNK + 2 - len(padded))
        states = one.encode_prompts([" ".join(own)]).prompt_embeds[0].split(widths, dim=-1)
        expected.append(torch.cat([a1111_emphasis(z, padded) for z in states], -1))
    first, last = expected
    joined = torch.cat([first[:1], first[1:-1], last[1:-1], last[-1:]])
    torch.testing.assert_close(cond.prompt_embeds[0].double(), joined, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(cond.prompt_embeds[0], plain.prompt_embeds[0], atol=1e-3)
    for name, values in plain.extra.items():
        torch.testing.assert_close(cond.extra[name][:1], values)
    # the row without weights is untouched, whatever the other has
    alone = loaded.encode_prompts(["a b"]).prompt_embeds
    assert torch.equal(loaded.encode_prompts([WeightedPrompt("a b")]).prompt_embeds, alone)
    torch.testing.assert_close(cond.prompt_embeds[1:], alone)


def test_a_mean_of_zero_is_not_restored() -> None:
    z = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    z -= z.mean()
    weights = torch.tensor([[1.0, 1.5, 0.5, 1.0]])
    torch.testing.assert_close(emphasize_states(z, weights), z * weights[..., None])


def draw(path: Path, out: Path, *words: str) -> bytes:
    base = ["--model", str(path), "--steps", "2", "--device", "cpu", "--overwrite"]
    assert infer.main([*base, "--out", str(out), *words]) == 0
    return Image.open(out).tobytes()


def test_images_have_weights_where_they_are_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, emphasis = tmp_path / "a.png", ("--emphasis", "a1111")
    text = draw(model, out, "--prompt", "a (b:1.8)")
    assert "(b:1.8) is read as text; --emphasis a1111" in capsys.readouterr().err
    weighted = draw(model, out, "--prompt", "a (b:1.8)", *emphasis)
    assert "read as text" not in capsys.readouterr().err
    plain = draw(model, out, "--prompt", "a b")
    assert len({text, weighted, plain}) == 3
    assert draw(model, out, "--prompt", "a (b:1.0)", "--negative", "(c)", *emphasis) != plain
    literal = draw(model, out, "--prompt", r"a \(b\) (c)", *emphasis)
    assert literal == draw(model, out, "--prompt", r"a \(b\) ((c:1.0))", *emphasis)
    draw(model, out, "--prompt", "a (b:1.8)", *emphasis)
    again = tmp_path / "again.png"  # the recipe has the prompt as it was written, and the option
    assert infer.main(["--from", str(out), "--device", "cpu", "--out", str(again)]) == 0
    assert Image.open(again).tobytes() == weighted
    sheet = draw(model, out, "--prompt", "a (b:1.8)", *emphasis, "--grid", "seed=0:2")
    assert sheet != draw(model, out, "--prompt", "a b", "--grid", "seed=0:2")
    size = ("--width", "16", "--height", "16")
    box = ("--region", "0,0,8,16: b (c:1.9)", "--prompt", "a", *size)
    assert draw(model, out, *box, *emphasis) != draw(model, out, *box)


def test_models_whose_denoiser_reads_no_hidden_states_of_clip_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "flux"
    tiny_flux.save(folder)
    words = ["--model", str(folder), "--prompt", "a (b:1.2)", "--emphasis", "a1111"]
    assert infer.main([*words, "--device", "cpu", "--out", str(tmp_path / "a.png")]) == 2
    assert "scales the hidden states of CLIP" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))
