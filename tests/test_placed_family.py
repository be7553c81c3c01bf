"""A family whose methods have their networks on the device, and infer.py with it."""

import gc
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from transformers import T5Config, T5EncoderModel

import infer
from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.cross_attention import AttentionMap
from lora_core.diffusion.noise import NoiseLevel
from lora_core.family import Family, LoadOptions, Sizes
from lora_core.formats import embeddings
from lora_core.memory.placed_family import PROMPTS_AT_ONCE, PlacedFamily
from lora_core.memory.residency import DENOISER, TEXT_ENCODERS, VAE, Residency, model_parts
from models import load_family, placement
from tests import tiny_flux, tiny_sdxl
from tests.conftest import save_pipeline
from tests.norm_files import norm_changes, save_changes
from tests.parted_memory import parted_drawing
from tests.tiny_pipeline import random_state, save_sd_pipeline

CPU = torch.device("cpu")


def placed(family: Family, keeps_texts: bool = False) -> PlacedFamily:
    found = Residency(model_parts(family), CPU, moves=True, place=lambda *_: 0)
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


def test_a_second_model_has_parts_of_its_own(tmp_path: Path) -> None:
    families = [load_family(str(save_pipeline(tmp_path / name))) for name in "ab"]
    parts = model_parts(families[0]) | model_parts(families[1], "second ")
    found = Residency(parts, CPU, moves=True, place=lambda *_: 0)
    first = PlacedFamily(families[0], found, keeps_texts=False)
    second = PlacedFamily(families[1], found, keeps_texts=False, owner="second ")
    with torch.no_grad():
        first.encode_prompts(["a"])
        second.encode_prompts(["a"])
        assert found.present == {f"second {TEXT_ENCODERS}"}
        first.bring_denoiser()
        assert found.present == {DENOISER}
        second.decode(torch.zeros(1, 4, 8, 8))
        assert found.present == {f"second {VAE}"}


# ---------------------------------------------------------------- infer.py

TEXT_TURN, DENOISER_TURN, VAE_TURN = (
    [f"{part} comes", f"{part} leaves"] for part in (TEXT_ENCODERS, DENOISER, VAE)
)
REFINER_TURNS = [f"refiner's {move}" for move in (*TEXT_TURN, *DENOISER_TURN)]
ONCE = [*TEXT_TURN, *DENOISER_TURN, VAE_TURN[0]]  # each part once for all images
FROM_IMAGE = [*VAE_TURN, *ONCE]  # the VAE encodes first

# name -> (model, words, order of the moves)
DRAWINGS: dict[str, tuple[str, str, list[str]]] = {
    "batches": ("sd", "--prompt TOK --lora a --count 5 --batch 2", ONCE),
    "tags": ("sd", "--prompts tags.txt --lora a --count 2", ONCE),
    "strengths, seeds": ("sd", "--prompt TOK --lora a --grid unet=0,1 --grid seed=0:2", ONCE),
    "strengths of texts": ("sd", "--prompt TOK --lora a --lora b --grid lora1.text=0,1", ONCE),
    "guidance and steps": ("sd", "--prompt a --grid guidance=1,3 --grid steps=2,3", ONCE),
    "dora": ("sd", "--prompt a --lora dora --grid strength=0.5,1", ONCE),
    "norms": ("sd", "--prompt a --lora norms.safetensors --grid strength=0,1,2", ONCE),
    "image to image": ("sd", "--prompt a --init-image start.png --strength 0.5", FROM_IMAGE),
    "painting": ("sd", "--prompt a --init-image start.png --mask hole.png", FROM_IMAGE),
    "regions": ("sd", "--prompt a --lora a --region 0,0,16,32:TOK", ONCE),
    "packed": ("sd", "--prompt TOK --lora dora --quantize int8", ONCE),
    "streamed": ("sd", "--prompt TOK --lora a --quantize int4 --stream --count 2", ONCE),
    "refiner": (
        "sdxl",
        "--prompt a --refiner refiner --count 3 --batch 1",
        [*TEXT_TURN, *DENOISER_TURN, *REFINER_TURNS, VAE_TURN[0]],
    ),
    "flux": ("flux", "--prompts two.txt --lora of_flux:0.8 --max-sequence-length 16", ONCE),
    "flux, packed": (
        "flux", "--prompt a --lora of_flux --quantize fp8 --stream --max-sequence-length 16", ONCE,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd/, sdxl/, refiner/ and flux/, runs and LoRA files for them, and images to start from."""
    folder = tmp_path_factory.mktemp("turns")
    pipe = save_sd_pipeline(folder / "sd")
    layout = load_family(str(folder / "sd")).layout
    for i, name in enumerate("ab"):
        state = random_state(pipe, seed=i + 1)
        state.tokens = {"clip_l": torch.randn(2, 16, generator=torch.Generator().manual_seed(i))}
        state.token_names = ("<s0>", "<s1>")
        state.metadata = embeddings.placeholder_header({"TOK": ("<s0>", "<s1>")})
        (folder / name).mkdir()
        formats.save_run(state, folder / name, layout=layout)
    formats.save_run(random_state(pipe, dora=True), folder / "dora", layout=layout)
    save_changes(norm_changes(pipe.unet, pipe.text_encoder), folder / "norms.safetensors")
    tiny_sdxl.save(folder / "sdxl")
    tiny_sdxl.save(folder / "refiner", refiner=True)
    tiny_flux.save(folder / "flux")
    save_flux_lora(folder / "flux", folder / "of_flux")
    Image.effect_noise((32, 32), 80).convert("RGB").save(folder / "start.png")
    hole = Image.new("L", (32, 32))
    hole.paste(255, (0, 0, 16, 32))
    hole.save(folder / "hole.png")
    (folder / "tags.txt").write_text("TOK\na <lora:b:0.5>\nTOK\n")
    (folder / "two.txt").write_text("a cat\na dog\n")
    return folder


def save_flux_lora(model: Path, run: Path) -> None:
    """A LoRA of the transformer's attention: the text encoders have none."""
    family = load_family(str(model))
    noise = torch.Generator().manual_seed(1)
    factors = {}
    for path, module in family.modules["transformer"].named_modules():
        if path.endswith(("to_q", "to_v")):
            o, i = module.weight.shape
            down, up = (torch.randn(*shape, generator=noise) * 0.3 for shape in ((2, i), (o, 2)))
            factors[path] = LowRank(down, up, 0.5)
    formats.save_run(AdapterState({"transformer": factors}), run, layout=family.layout)


def draw_in(folder: Path, model: str, words: str, *more: str) -> list[bytes]:
    """The pixels of the images that infer.py writes to a folder."""
    given = ["--model", model, "--steps", "3", "--seed", "2", *words.split(), *more]
    assert infer.main([*given, "--out", str(folder / "x.png")]) == 0
    return [Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize(("model", "words", "order"), DRAWINGS.values(), ids=DRAWINGS)
def test_images_are_the_same_when_networks_take_turns(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    words: str,
    order: list[str],
) -> None:
    """To the bit; each part comes once for all images, and no two are there at a time."""
    monkeypatch.chdir(models)
    monkeypatch.setattr(placement, "LARGE_ENCODER", 1)  # every text encoder is as large as T5
    whole = draw_in(tmp_path / "whole", model, words)
    capsys.readouterr()
    with parted_drawing() as memory:
        parted = draw_in(tmp_path / "parted", model, words)
    assert parted == whole and len(set(map(len, whole))) == 1
    assert list(memory.order()) == order
    assert {len(there) for there in memory.together} == {0, 1}
    out, said = capsys.readouterr()
    assert len(out.splitlines()) == len(parted)  # the paths alone
    assert said.count("note: denoiser: on the GPU (4 GB)") == 1
    assert said.count("note: denoiser: left the GPU (4 GB freed)") == 1


def test_parts_come_again_for_more_images_but_prompts_are_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA on a text encoder changes what prompts are encoded to: then nothing is kept."""
    monkeypatch.chdir(models)
    monkeypatch.setattr("lora_core.diffusion.generation.MOST_WAITING", 2)
    later = [DENOISER_TURN[0], DENOISER_TURN[1], VAE_TURN[0]]
    for name, own, expected in (
        ("kept", "", [*ONCE, VAE_TURN[1], *later]),
        ("encoded again", "--lora a", [*ONCE, VAE_TURN[1], *ONCE]),
    ):
        words = f"--prompt a --count 3 --batch 1 {own}"
        whole = draw_in(tmp_path / name, "sd", words)
        with parted_drawing() as memory:
            assert draw_in(tmp_path / f"{name}, parted", "sd", words) == whole
        assert list(memory.order()) == expected


def test_no_offload_is_refused_on_the_cpu_and_a_family_of_a_file_stays(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(models / "sd"), "--prompt", "a", "--out", str(tmp_path / "x.png")]
    assert infer.main([*words, "--no-offload"]) == 2
    assert "--no-offload has no effect on the CPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    own = infer.Infer(device="cuda", family="own.py:FAMILY")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer, "use_device", torch.device)
        assert infer.first_device(own) == torch.device("cuda")
        said = "note: --family own.py:FAMILY: text encoders and VAE stay on the GPU, too\n"
        assert capsys.readouterr().err == said
        assert infer.first_device(infer.Infer(device="cuda")) == CPU
        kept = infer.Infer(device="cuda", offload=False)
        assert infer.first_device(kept) == torch.device("cuda")
        assert not capsys.readouterr().err


# ---------------------------------------------------------------- on a GPU


def save_large_flux(folder: Path) -> int:
    """A Flux with a T5 and a transformer of about 100 MB each; returns the bytes of both."""
    pipe = tiny_flux.pipeline()
    t5 = pipe.text_encoder_2.config.to_dict() | {"d_ff": 1 << 16, "num_layers": 4}
    torch.manual_seed(1)
    pipe.text_encoder_2 = T5EncoderModel(T5Config(**t5))
    wide = {"num_attention_heads": 24, "num_layers": 3, "num_single_layers": 3}
    pipe.transformer = FluxTransformer2DModel.from_config(dict(pipe.transformer.config) | wide)
    pipe.save_pretrained(folder)
    networks = pipe.text_encoder_2, pipe.transformer
    return sum(sum(p.nbytes for p in network.parameters()) for network in networks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", ["", "--quantize int8", "--stream"])
def test_on_a_gpu_images_are_the_same_and_the_peak_is_lower(tmp_path: Path, packed: str) -> None:
    together = save_large_flux(tmp_path / "flux")
    save_flux_lora(tmp_path / "flux", tmp_path / "lora")
    words = f"--prompt a --count 3 --batch 2 --max-sequence-length 16 {packed} --device cuda"
    lora = ["--lora", str(tmp_path / "lora")]
    drawn, peaks = [], []
    for name in ("--offload", "--no-offload"):
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        drawn.append(draw_in(tmp_path / name, str(tmp_path / "flux"), words, *lora, name))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert drawn[0] == drawn[1]
    assert peaks[0] < peaks[1]
    if not packed:
        assert peaks[0] < together <= peaks[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("model", "words"), [row[:2] for row in DRAWINGS.values()], ids=DRAWINGS)
def test_on_a_gpu_every_kind_of_image_is_the_same(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, words: str
) -> None:
    monkeypatch.chdir(models)
    ours = draw_in(tmp_path / "ours", model, words, "--device", "cuda")
    kept = draw_in(tmp_path / "kept", model, words, "--device", "cuda", "--no-offload")
    assert ours == kept
