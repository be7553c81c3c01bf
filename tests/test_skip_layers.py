"""Skip-layer guidance on infer.py's command line; its images are compared in test_sd3.py."""

from pathlib import Path

import pytest
from PIL import Image

import infer
from lora_core.errors import UserError
from lora_core.image_options import Infer
from lora_core.runs.image_grid import grid_cells, parse_axis
from lora_core.runs.prompt_loras import read_tagged_prompt
from models import load_family
from models.skip_layers import SkipLayers, choose_skip_layers
from tests import tiny_flux, tiny_sd3

LINE = ["--steps", "10", "--prompt", "a cat", "--device", "cpu", "--max-sequence-length", "20"]
GUIDANCE = ["--skip-layers", "1", "2", "--skip-layer-stop", "0.4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sd3") / "model"
    tiny_sd3.save(folder)
    return str(folder)


def draw(model: str, out: Path, *words: str) -> bytes:
    assert infer.main(["--model", model, *LINE, "--out", str(out), *words]) == 0
    return Image.open(out).tobytes()


def test_the_options_change_the_image_and_its_recipe_repeats_it(model: str, tmp_path: Path) -> None:
    plain = draw(model, tmp_path / "plain.png")
    guided = draw(model, tmp_path / "guided.png", *GUIDANCE)
    stronger = draw(model, tmp_path / "more.png", *GUIDANCE, "--skip-layer-scale", "5")
    longer = draw(model, tmp_path / "longer.png", *GUIDANCE, "--skip-layer-start", "0.2")
    assert len({plain, guided, stronger, longer}) == 4
    again = ["--from", str(tmp_path / "guided.png"), "--out", str(tmp_path / "again.png")]
    assert infer.main([*again, "--device", "cpu"]) == 0
    assert Image.open(tmp_path / "again.png").tobytes() == guided


def test_cells_of_a_grid_have_the_guidance_of_their_own_options(model: str, tmp_path: Path) -> None:
    config = Infer(
        model=model,
        device="cpu",
        max_sequence_length=20,
        steps=10,
        skip_layers=(1, 2),
        skip_layer_stop=0.4,
    )
    axes = [parse_axis("guidance=2,4")]
    prompts = [read_tagged_prompt("a cat")]
    images, _ = infer.draw_cells(config, prompts, axes, grid_cells(axes))
    for guidance, image in zip("24", images, strict=True):
        alone = draw(model, tmp_path / f"{guidance}.png", *GUIDANCE, "--guidance", guidance)
        assert image.tobytes() == alone


def test_the_steps_are_those_strictly_inside_of_the_range(model: str) -> None:
    family = load_family(model)
    config = Infer(skip_layers=(1, 2), skip_layer_stop=0.4, steps=10, guidance=2.0)
    found = choose_skip_layers(family, config)
    assert found.weight == pytest.approx(2.8 / 2)
    low, high = found.sigmas
    sigmas = family.schedule_at(16, 16).step_sigmas(10)
    assert [i for i, sigma in enumerate(sigmas) if low <= sigma <= high] == [1, 2, 3]


def test_without_the_options_there_is_none(model: str) -> None:
    assert choose_skip_layers(load_family(model), Infer(steps=4)) == SkipLayers()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"skip_layers": (3,)}, "--skip-layers has 3; the blocks of this model are 0 to 2"),
        ({"skip_layers": (1,), "guidance": 1.0}, "cannot act at guidance 1, where one prompt"),
        ({"skip_layers": (1,), "guidance": 0.0}, "cannot act at guidance 0, where one prompt"),
        ({"skip_layers": (1,), "skip_layer_scale": 0.0}, "no effect with --skip-layer-scale 0"),
        ({"skip_layers": (1,), "strength": 0.5}, "of 10 steps, of which --strength leaves out 5,"),
        ({"skip_layers": (1,), "steps": 4}, "none of 4 steps is between --skip-layer-start 0.01"),
    ],
)
def test_guidance_that_cannot_act_is_refused(model: str, options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        choose_skip_layers(load_family(model), Infer(**{"steps": 10, **options}))


def test_other_models_and_lonely_options_are_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_flux.save(tmp_path / "flux")
    out = ["--out", str(tmp_path / "no.png")]
    for words, sentence in (
        (["--model", str(tmp_path / "flux"), "--skip-layers", "1"], "has no effect on this model"),
        (["--model", model, "--skip-layer-scale", "3"], "no effect without --skip-layers"),
    ):
        assert infer.main([*words, *LINE, *out]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()
