"""The thumbnail, NAME.preview.png and NAME.json of a finished run."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

import train
from lora_core.config import Config, Stage
from lora_core.formats.container import read_header
from tests.conftest import save_pipeline
from tests.manager_readers import raw_header, tensor_hash
from tests.test_configs import put
from training.headers.manager_files import THUMBNAIL, encode_thumbnail

BASE = {"stages": (Stage(1, groups=("denoiser",)),), "samples.steps": 1}


def thumbnail_of(file: Path) -> Image.Image:
    kind, _, data = raw_header(file)[THUMBNAIL].partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_a_sample_of_the_end_is_the_thumbnail_and_the_preview(config: Config) -> None:
    run = train.train(put(config, BASE | {"files.thumbnail": 9, "files.sidecars": True}))
    file = run / "run.safetensors"
    side = config.data.resolution
    with Image.open(run / "run.preview.png") as preview:
        assert preview.size == (side, side) and not preview.info
        small = preview.convert("RGB").resize((9, 9), Image.Resampling.LANCZOS)
    assert thumbnail_of(file).size == (9, 9)
    near = zip(small.tobytes(), thumbnail_of(file).tobytes(), strict=True)
    assert sum(abs(a - b) for a, b in near) / (3 * 81) < 16  # JPEG
    assert raw_header(file)["sshs_model_hash"] == tensor_hash(file)  # of the file as it is now
    assert (run / "run.json").is_file()
    for other in ("pytorch_lora_weights.safetensors", "checkpoints/1/run-000001.safetensors"):
        assert THUMBNAIL not in read_header(run / other)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["files"]["run.safetensors"] == file.stat().st_size
    assert {"run.json", "run.preview.png"} <= summary["files"].keys()


def test_none_is_made_where_it_is_not_wanted(config: Config, quick: None) -> None:
    run = train.train(put(config, BASE | {"files.thumbnail": 0}))
    assert THUMBNAIL not in raw_header(run / "run.safetensors")
    assert not list(run.glob("*.preview.png")) and not (run / "run.json").exists()


def test_an_inpainting_model_has_none(config: Config, tmp_path: Path) -> None:
    """Its samples show the surroundings of validation images, also with --samples.show-data."""
    model = save_pipeline(tmp_path / "inpaint", channels=9)
    values = {"model": str(model), "files.sidecars": True, "samples.show_data": True}
    run = train.train(put(config, BASE | values))
    assert THUMBNAIL not in raw_header(run / "run.safetensors")
    assert (run / "run.json").is_file() and not list(run.glob("*.preview.png"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_thumbnail_is_small_and_has_nothing_but_pixels(mode: str) -> None:
    image = Image.effect_noise((300, 200), 60).convert("RGB").convert(mode)
    image.info["comment"] = "anna"
    exif = image.getexif()
    exif[0x010E] = "anna in the garden"
    data = base64.b64decode(encode_thumbnail(image, 256).partition(",")[2])
    assert len(data) < 60_000 and b"anna" not in data
    assert Image.open(io.BytesIO(data)).size == (256, 171)
