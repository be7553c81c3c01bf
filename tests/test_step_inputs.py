"""Inputs of a step: the same drawn ahead as on the spot, latents from a cache, and holes of an
inpainting model.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from lora_core.config import AdapterConfig, Config, PriorConfig, Stage
from lora_core.data.dataset import Batch, micro_batches
from lora_core.errors import UserError
from lora_core.tensor_trees import tree_tensors
from tests.conftest import final, merged, same, save_pipeline
from tests.opened_run import OpenedRun, latent_files, open_parts
from training.inputs.step_inputs import InputSource, StepInputs, TokenIds, make_step_inputs
from training.stages import begin_stage


def test_another_vae_and_another_cache_change_what_they_should(
    config: Config, quick: None, model: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(5)
    vae = AutoencoderKL.from_pretrained(model / "vae")
    with torch.no_grad():
        vae.encoder.conv_out.weight.mul_(1.5)
    vae.save_pretrained(tmp_path / "vae")
    cached = replace(config, data=replace(config.data, cache=str(tmp_path / "cache")))
    base, filled = train.train(config), train.train(replace(cached, out=config.out + "1"))
    files = latent_files(tmp_path / "cache")
    assert 1 < len(files) <= 5 and same(final(base), final(filled))
    other = train.train(replace(cached, out=config.out + "2", vae=str(tmp_path / "vae")))
    assert not same(final(base), final(other)) and len(latent_files(tmp_path / "cache")) > len(
        files
    )


@pytest.mark.parametrize("encoder", ["clip_l", "clip_g"])
def test_token_positions_come_from_any_encoder_that_attention_reads(
    config: Config, photos: Path, tmp_path: Path, encoder: str
) -> None:
    """Tokens of SDXL's second text encoder alone are on the same columns of the maps."""
    from tests import tiny_sdxl

    tiny_sdxl.save(tmp_path / "xl")
    captions = {"captions": "one", "caption": "a TOK", "masks": "file"}
    changes = {"data": captions, "tokens": {"encoders": (encoder,)}, "loss": "attention"}
    changes |= {"model": str(tmp_path / "xl"), "stages": (Stage(1, ("tokens",)),)}
    changes |= {"adapter": AdapterConfig(), "optimizer": {"lr": {}}}
    s = open_parts(merged(config, changes))
    batch = next(iter(s.data.batches(s.config, 0, 1)))
    (inputs,) = make_step_inputs(s.source, batch, s.config.stages[0], 0, check=True)
    assert inputs.caption_tokens.learned is not None
    assert inputs.caption_tokens.learned.tolist() == [[2, 3], [2, 3]]  # after the start and "a"


def test_inputs_drawn_ahead_are_those_drawn_on_the_spot(config: Config, quick: None) -> None:
    config = replace(
        config,
        accumulation=2,
        batch_size=1,
        stages=(Stage(1, ("denoiser", "text_encoder", "tokens")),),
        prior=PriorConfig(swap={"TOK": "cat"}),
        adapter=AdapterConfig(rank=2, dropout=0.1),
    )
    s = open_parts(config)
    stage = config.stages[0]
    begin_stage(stage, config, s.model, s.optimization)
    batch = next(iter(s.data.batches(config, 0, 1)))
    inputs = make_step_inputs(s.source, batch, stage, 0, check=True)
    assert len(inputs) == 2
    again = InputSource(config, s.data, s.model)  # encodes and tokenizes anew
    for part, ahead in zip(micro_batches(batch, 2), inputs, strict=True):
        (alone,) = make_step_inputs(
            InputSource(replace(config, accumulation=1), s.data, s.model),
            part, stage, 0, check=True,
        )  # fmt: skip
        given = tree_tensors(ahead)
        for a, b in zip(tree_tensors(alone), given, strict=True):
            assert torch.equal(a, b)
    repeated = make_step_inputs(again, batch, stage, 0, check=True)
    for a, b in zip(tree_tensors(repeated), tree_tensors(inputs)):
        assert torch.equal(a, b)
    x = inputs[0]
    assert isinstance(x.text, TokenIds) and x.swapped is not None
    assert x.dropout_keys is not None and x.step.item() == x.number == 0
    assert len(tree_tensors(x)) >= 12


@pytest.mark.parametrize("change", ["nan", "shape", "names"])
def test_a_bad_row_of_the_latent_cache_is_named(
    config: Config, quick: None, tmp_path: Path, change: str
) -> None:
    config = replace(config, data=replace(config.data, cache=str(tmp_path / "cache")))
    train.train(config)
    for file in latent_files(tmp_path / "cache"):
        row = load_file(file)
        row = {
            "nan": lambda r: r | {"std": r["std"] * float("nan")},
            "shape": lambda r: {k: t[:, :2] for k, t in r.items()},
            "names": lambda r: {"x": r["mean"]},
        }[change](row)
        save_file({name: tensor.contiguous() for name, tensor in row.items()}, file)
    said = {
        "nan": "NaN or infinity in std",
        "shape": r"mean \[4, 2, 8\].*expected mean \[4, 8, 8\]",
        "names": "holds x .*expected mean",
    }
    with pytest.raises(UserError, match=rf"cache file .*safetensors .*{said[change]}.*delete it"):
        train.train(replace(config, out=config.out + "2"))


# ---------------------------------------------------------------- holes of an inpainting model


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for inpainting, whose latent pixels are 2 x 2 pixels."""
    return save_pipeline(tmp_path_factory.mktemp("painter") / "model", channels=9)


@pytest.fixture
def painting(config: Config, painter: Path, tmp_path: Path) -> Config:
    """Images of blue noise with a red part, which is also their mask; crops and flips at random."""
    folder = tmp_path / "marked"
    folder.mkdir()
    for i in range(2):
        pixels = torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(i)).byte()
        pixels[..., 0] = 0
        image = Image.frombytes("RGB", (24, 20), bytes(pixels.flatten().tolist()))
        mask = Image.new("L", (24, 20))
        box = (4 + 6 * i, 6, 9 + 6 * i, 15)
        image.paste((255, 0, 0), box)
        mask.paste(255, box)
        image.save(folder / f"{i}.png")
        mask.save(folder / f"{i}.mask.png")
        (folder / f"{i}.txt").write_text("a TOK")
    data = {
        "images": str(folder), "masks": "file", "mask_use": "hole", "resolution": 20,
        "flip": True, "crop": "random", "variants": 3,
    }  # fmt: skip
    return merged(replace(config, model=str(painter)), {"data": data})


def inputs_of(s: OpenedRun, step: int) -> tuple[Batch, StepInputs]:
    batch = next(iter(s.data.batches(s.config, step, step + 1)))
    (x,) = make_step_inputs(s.source, batch, s.config.stages[0], step, check=True)
    return batch, x


def test_a_hole_stays_on_its_part_of_the_image(painting: Config) -> None:
    """Under flips and crops; cloneofsimo's lora_pti mirrors the image and not its hole."""
    s = open_parts(painting)
    family = s.model.family
    flipped = set()
    for step in range(6):
        batch, x = inputs_of(s, step)
        assert batch.mask is not None and x.inpaint is not None and x.mask is None
        is_red = (batch.pixels[:, :1] == 1) & (batch.pixels[:, 1:] == -1).all(1, keepdim=True)
        assert torch.equal(is_red, batch.mask == 1) and is_red.any()
        hole = F.interpolate(batch.mask, x.x0.shape[-2:], mode="nearest")
        around, _ = family.encode_images(batch.pixels * (batch.mask == 0))
        assert torch.equal(x.inpaint[:, :1], hole)
        torch.testing.assert_close(x.inpaint[:, 1:], around, rtol=0, atol=2e-6)
        flipped.update(zip(batch.keys, (visit % 3 for visit in batch.visits), strict=True))
    assert len(flipped) == 6  # both images in all three variants


def test_inputs_with_holes_come_from_the_cache(
    painting: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six variants of the images, and six of the images with their holes; on the disk as well."""
    cached = merged(painting, {"data": {"cache": str(tmp_path / "cache")}})
    first, second = open_parts(cached), open_parts(replace(cached, out=cached.out + "2"))
    made = [inputs_of(first, step)[1] for step in range(8)]
    assert len(latent_files(tmp_path / "cache")) == 12
    monkeypatch.setattr(second.model.family, "encode_images", None)
    for step, x in enumerate(made):
        again = inputs_of(second, step)[1]
        assert x.inpaint is not None and again.inpaint is not None
        assert torch.equal(x.inpaint, again.inpaint) and torch.equal(x.x0, again.x0)


@pytest.mark.parametrize("use", ["loss", "hole", "both"])
def test_a_mask_is_a_weight_or_a_hole_or_both(painting: Config, use: str) -> None:
    """Images without a mask, and class images, have random holes and count whole."""
    folder = Path(painting.data.images)
    (folder / "1.mask.png").unlink()
    grey = Image.open(folder / "0.mask.png").point(lambda white: 100 if white else 0)
    grey.paste(200, (4, 6, 9, 10))
    grey.save(folder / "0.mask.png")
    own = merged(
        painting,
        {
            "data": {"masks": "auto", "mask_use": use, "flip": False, "variants": 0},
            "prior": {"prompt": "a cat", "count": 1},
        },
    )
    s = open_parts(own)
    batch, x = inputs_of(s, 0)
    has_own = [s.source.records[key].has_mask for key in batch.keys]
    assert sorted(has_own) == [False, False, False, True] and batch.is_prior.tolist() == [
        0,
        0,
        1,
        1,
    ]
    i = has_own.index(True)
    assert batch.mask is not None and x.inpaint is not None
    white = (batch.mask[i] > 0.5).float()
    hole = F.interpolate(white[None], x.x0.shape[-2:], mode="nearest")[0]
    assert torch.equal(x.inpaint[i, :1], hole) is (use != "loss")
    others = [j for j in range(4) if j != i]
    assert all(not torch.equal(x.inpaint[j, :1], hole) for j in others)
    assert (batch.mask[others] == 1).all()
    levels = set(batch.mask[i].unique().tolist())
    assert levels == (
        {0, 1}
        if use != "loss"
        else {0, torch.tensor(100 / 255).item(), torch.tensor(200 / 255).item()}
    )
    assert (x.mask is None) is (use == "hole")
    if x.mask is not None:
        assert torch.equal(x.mask, F.interpolate(batch.mask, x.x0.shape[-2:], mode="area"))


def test_a_hole_of_dark_greys_is_refused(painting: Config) -> None:
    folder = Path(painting.data.images)
    Image.open(folder / "0.mask.png").point(lambda grey: grey // 3).save(folder / "0.mask.png")
    with pytest.raises(UserError, match=r"the mask of .*0\.png .* cut to black and white at half"):
        open_parts(painting)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"masks": "none"}, "--data.mask-use has no effect without --data.masks"),
        ({"mask_use": "both"}, "--data.mask-use both has no effect on this model"),
    ],
)
def test_holes_that_nothing_paints_are_refused(
    painting: Config, model: Path, change: dict[str, str], said: str
) -> None:
    config = replace(painting, model=str(model))
    with pytest.raises(UserError, match=said):
        train.train(merged(config, {"data": change}))
    temperature = replace(painting, stages=(Stage(1, mask_temperature=2.0),))
    with pytest.raises(UserError, match="no effect without masks that weight the loss"):
        train.train(temperature)
