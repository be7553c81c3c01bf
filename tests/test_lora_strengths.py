"""Ranges of noise levels of LoRAs, and guidance away from the base model: steps by hand."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import infer
from lora_core import formats
from lora_core.adapters import injection
from lora_core.adapters.weight_updates import AdapterState
from lora_core.diffusion import generation, sampling
from lora_core.diffusion.generation import ImageBatch
from lora_core.errors import UserError
from lora_core.family import Family
from lora_core.formats import embeddings
from lora_core.memory.placed_family import PlacedFamily
from lora_core.memory.residency import Residency, model_parts
from lora_core.placeholders import bind_placeholders
from lora_core.runs.lora_strengths import LoraStrengths
from lora_core.runs.loras import LoraSource, apply_loras, lora_text, parse_lora
from lora_core.settings import AdapterSpec, SamplerSettings
from models import load_family
from tests import tiny_flux, tiny_sdxl
from tests.injected_nets import shake
from tests.tiny_pipeline import random_state, save_sd_pipeline

STEPS, SIZE = 5, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, two LoRAs a and b of all networks with tokens, and a DoRA d of the UNet."""
    folder = tmp_path_factory.mktemp("strengths")
    pipe = save_sd_pipeline(folder / "model")
    layout = load_family(str(folder / "model")).layout
    for seed, name in enumerate("abd", 1):
        networks = {"dora": True, "text": ()} if name == "d" else {}
        state = random_state(pipe, seed=seed, **networks)
        if name != "d":
            rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed)) * 0.3
            state.tokens, state.token_names = {"clip_l": rows}, ("<s0>", "<s1>")
            state.metadata = embeddings.placeholder_header({"TOK": ("<s0>", "<s1>")})
        (folder / name).mkdir()
        formats.save_run(state, folder / name, layout=layout)
    return folder


def drawn(
    family: Family, patches: list, loras: list[LoraSource], prompt: str, settings: SamplerSettings
) -> Tensor:
    """The pixels that the program draws."""
    prepare = LoraStrengths(patches, loras, {})
    batch = ImageBatch([prompt], [3], settings, prepare=prepare)
    words = list(chain.from_iterable(patch.placeholders for patch in patches))
    (pixels,) = generation.generate_batches(family, [batch], placeholders=words)
    return pixels


@torch.no_grad()
def by_hand(
    family: Family, patches: list, loras: list[LoraSource], prompt: str, settings: SamplerSettings
) -> Tensor:
    """The same by Euler steps in the open: strengths set before each call, outputs combined."""
    levels = sampling.sampler_levels(
        "euler", family.schedule, settings.steps, spacing=family.spacing, offset=family.offset
    )
    words = list(chain.from_iterable(patch.placeholders for patch in patches))

    def set_all(factors: list[float], *, text: bool = True) -> None:
        for patch, lora, factor in zip(patches, loras, factors):
            strengths = {}
            for name in patch.adapted:
                is_text = name.startswith("text_encoder")
                strengths[name] = lora.strength * (factor if not is_text or text else 1)
            if strengths:
                patch.set_strength(strengths)

    def encode() -> tuple[object, object]:
        bound = bind_placeholders(prompt, words)
        return family.encode_prompts([bound]), family.encode_negative([settings.negative])

    def guided(x: Tensor, i: int, cond: object, uncond: object) -> Tensor:
        level = sampling.step_level(levels, i, x)
        c, u = (family.denoise(x, level, text) for text in (cond, uncond))
        return u + settings.guidance * (c - u)

    ones, zeros = [1.0] * len(loras), [0.0] * len(loras)
    set_all(ones)
    own_text = encode()
    set_all(zeros)
    base_text = encode()
    shape = (family.latent_channels, SIZE // family.factor, SIZE // family.factor)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, *shape, generator=generator)
    for i in range(settings.steps):
        alpha, sigma = float(levels.alpha[i]), float(levels.sigma[i])
        s = sigma / alpha
        inside = [lo <= s / (1 + s) <= hi for lo, hi in (lora.shares for lora in loras)]
        set_all([float(own) for own in inside], text=False)
        adapted = guided(x, i, *own_text)
        set_all(zeros)
        base = guided(x, i, *base_text)
        eps = base + settings.adapter_guidance * (adapted - base)
        x0 = (x - sigma * eps) / alpha
        x = float(levels.alpha[i + 1]) * x0 + float(levels.sigma[i + 1]) * eps
    set_all(ones)
    return family.decode(x)


def settings_of(**more: object) -> SamplerSettings:
    return SamplerSettings("euler", STEPS, 3.0, "b", width=SIZE, height=SIZE, **more)


CASES = {
    "one range": (["a:0.9@0.5-1"], 1.0),
    "the lower part": (["a:0.9@0-0.6"], 1.0),
    "two ranges": (["a:0.9@0.5-1", "b:0.7@0.2-0.8"], 1.0),
    "one of two": (["a:0.9", "b:-0.7@0.7-1"], 1.0),
    "a DoRA": (["d:0.8@0.4-0.9"], 1.0),
    "guidance": (["a:0.9"], 2.5),
    "less": (["a:0.9"], 0.3),
    "of a DoRA": (["d"], 1.7),
    "of two in ranges": (["a:0.9@0.5-1", "d:0.6@0-0.7"], 2.0),
    "the base": (["a:0.9"], 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_images_are_those_of_steps_by_hand(folder: Path, case: str) -> None:
    texts, weight = CASES[case]
    loras = [parse_lora(str(folder / text)) for text in texts]
    family = load_family(str(folder / "model"))
    settings = settings_of(adapter_guidance=weight)
    with ExitStack() as stack:
        patches = apply_loras(family, loras, stack)
        pixels = drawn(family, patches, loras, "a TOK", settings)
        expected = by_hand(family, patches, loras, "a TOK", settings)
        torch.testing.assert_close(pixels, expected, rtol=1e-3, atol=1e-3)
        usual = drawn(family, patches, [lora._replace(shares=(0, 1)) for lora in loras], "a TOK",
                      settings_of())  # fmt: skip
        assert (pixels - usual).abs().max() > 0.01


def test_at_1_and_0_and_in_the_whole_range_nothing_changes(folder: Path) -> None:
    """Bit for bit, and with one pass a step."""
    family = load_family(str(folder / "model"))
    lora = parse_lora(f"{folder / 'a'}:0.9")
    with ExitStack() as stack:
        patches = apply_loras(family, [lora], stack)
        usual = drawn(family, patches, [lora], "a c", settings_of())
        assert torch.equal(
            usual, drawn(family, patches, [lora], "a c", settings_of(adapter_guidance=1.0))
        )
        whole = [lora._replace(shares=(0.0, 0.9999))]
        assert torch.equal(usual, drawn(family, patches, whole, "a c", settings_of()))
        calls: list[int] = []
        denoise = family.denoise
        family.denoise = lambda *rest: calls.append(1) or denoise(*rest)  # type: ignore
        base = drawn(family, patches, [lora], "a c", settings_of(adapter_guidance=0.0))
        assert len(calls) == STEPS
        drawn(family, patches, [lora], "a c", settings_of(adapter_guidance=0.5))
        assert len(calls) == 3 * STEPS
        off = [lora._replace(strength=0.0)]
        assert torch.equal(base, drawn(family, patches, off, "a c", settings_of()))


@pytest.mark.parametrize("name", ["a", "d"])
def test_networks_that_come_to_work_give_the_same(folder: Path, name: str) -> None:
    """Offloading: with encodings that are kept where no text encoder has adapters."""
    family = load_family(str(folder / "model"))
    lora = parse_lora(f"{folder / name}:0.9@0.2-1")
    settings = settings_of(adapter_guidance=1.5, emphasis="a1111")
    with ExitStack() as stack:
        patches = apply_loras(family, [lora], stack)
        usual = drawn(family, patches, [lora], "a (c:1.3)", settings)
        residency = Residency(model_parts(family), torch.device("cpu"), moves=True,
                              place=lambda *_: 0)  # fmt: skip
        placed = PlacedFamily(family, residency, keeps_texts=name == "d")
        for _ in range(2):
            assert torch.equal(drawn(placed, patches, [lora], "a (c:1.3)", settings), usual)


def test_the_share_is_a_flows_sigma_and_k_diffusions_in_the_others() -> None:
    level = generation.NoiseLevel(*(torch.tensor([v]) for v in (0.0, 0.7, 0.3)))
    assert float(level.share) == pytest.approx(0.3)
    edm = generation.NoiseLevel(*(torch.tensor([v]) for v in (0.0, 1.0, 4.0)))
    assert float(edm.share) == pytest.approx(0.8)
    noise = generation.NoiseLevel(*(torch.tensor([v]) for v in (999.0, 0.0, 1.0)))
    assert float(noise.share) == 1


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("x:0.8@0.2-1", (0.2, 1)),
        ("x:unet=0.5,text=1@0-0.50", (0, 0.5)),
        ("x:1", (0, 1)),
        ("runs/x@0.2-1.0", (0.2, 1)),
        ("runs/a@b", (0, 1)),
    ],
)
def test_ranges_are_written_as_they_are_read(text: str, shares: tuple[float, float]) -> None:
    lora = parse_lora(text)
    assert lora.shares == shares
    assert parse_lora(lora_text(lora)) == lora


def test_a_range_that_is_none_is_refused() -> None:
    for text in ("x:1@", "x:1@0.5", "x:1@0.5-0.5", "x:1@0.8-0.2", "x:1@0-1.1", "x:1@a-b"):
        with pytest.raises(UserError, match="cannot read the range"):
            parse_lora(text)


def draw(folder: Path, out: Path, *words: str) -> bytes:
    base = ["--model", str(folder / "model"), "--steps", "3", "--device", "cpu", "--overwrite"]
    assert infer.main([*base, "--out", str(out), "--prompt", "a TOK", *words]) == 0
    return Image.open(out).tobytes()


def test_images_repeat_from_their_recipes_in_grids_and_regions(
    folder: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "a.png", tmp_path / "b.png"
    ranged = ("--lora", f"{folder / 'a'}:0.9@0.5-1", "--lora", f"{folder / 'b'}:0.8")
    for words in (ranged, (*ranged, "--adapter-guidance", "2")):
        image = draw(folder, out, *words)
        assert infer.main(["--from", str(out), "--device", "cpu", "--out", str(again)]) == 0
        assert Image.open(again).tobytes() == image
        again.unlink()
    sheets = set()
    for lora in ("a:0.9", "a:0.9@0.6-1"):
        words = ("--lora", str(folder / lora), "--grid", "strength=0:1:0.5")
        sheets.add(draw(folder, out, *words))
    assert len(sheets) == 2
    box = ("--lora", str(folder / "a"), "--region", "0,0,8,16: b c", "--width", "16",
           "--height", "16")  # fmt: skip
    assert draw(folder, out, *box) != draw(folder, out, *box, "--adapter-guidance", "3")
    guided = ("--lora", str(folder / "a"), "--adapter-guidance", "2")
    one = draw(folder, out, *guided)
    words = ["--model", str(folder / "model"), "--steps", "3", "--device", "cpu", "--prompt"]
    assert infer.main([*words, "a TOK", "--count", "3", "--out", str(out), *guided]) == 0
    first = Image.open(tmp_path / "a_000.png").tobytes()
    assert max(abs(x - y) for x, y in zip(first, one)) <= 1


def test_what_cannot_act_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model", str(folder / "model"), "--steps", "3", "--device", "cpu", "--prompt", "a"]
    base += ["--out", str(tmp_path / "no.png")]
    for words, said in (
        (["--adapter-guidance", "2"], "no effect without a LoRA"),
        (["--lora", f"{folder / 'a'}:1@0.99-1"], "none of them inside"),
    ):
        assert infer.main([*base, *words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


def test_flow_models_and_a_refiner_take_both(tmp_path: Path) -> None:
    tiny_flux.save(tmp_path / "flux")
    tiny_sdxl.save(tmp_path / "base")
    tiny_sdxl.save(tmp_path / "refiner", refiner=True)
    for name in ("flux", "base"):
        family = load_family(str(tmp_path / name))
        denoiser = family.modules[family.denoiser]
        injection.inject(denoiser, AdapterSpec(targets=("*.to_q", "*.to_v"), rank=2))
        shake(denoiser)
        state = AdapterState({family.denoiser: injection.adapter_factors(denoiser)})
        (tmp_path / f"{name}_lora").mkdir()
        formats.save_run(state, tmp_path / f"{name}_lora", layout=family.layout)
    common = ["--steps", "4", "--device", "cpu", "--prompt", "a", "--overwrite"]
    common += ["--width", "16", "--height", "16"]
    flux = ["--model", str(tmp_path / "flux"), "--lora", f"{tmp_path / 'flux_lora'}:1@0.5-1"]
    refined = ["--model", str(tmp_path / "base"), "--refiner", str(tmp_path / "refiner")]
    refined += ["--refiner-start", "0.5", "--lora", f"{tmp_path / 'base_lora'}:1@0.5-1"]
    for words in (flux, refined):
        images = set()
        for more in ([], ["--adapter-guidance", "2"], ["--adapter-guidance", "0"]):
            out = tmp_path / "x.png"
            assert infer.main([*common, *words, *more, "--out", str(out)]) == 0
            images.add(Image.open(out).tobytes())
        assert len(images) == 3
