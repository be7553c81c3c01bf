"""The precision of a run's files: what is cast, what stays, and what does not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.config import Config, Stage
from lora_core.formats import Layout
from tests.conftest import final, same
from tests.test_configs import put
from training import file_precision

BOTH = {"stages": (Stage(2, groups=("denoiser", "tokens")),)}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lora_files_are_cast_and_nothing_else(
    config: Config, quick: None, layout: Layout, precision: str
) -> None:
    whole = train.train(put(config, BOTH | {"adapter.kind": "dora"}))
    values = {"adapter.kind": "dora", "files.precision": precision, "out": f"{config.out}_half/run"}
    half = train.train(put(config, BOTH | values))
    assert same(final(whole), final(half))  # the state to resume from
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    step = "checkpoints/2/run-000002.safetensors"
    for name in ("run.safetensors", "pytorch_lora_weights.safetensors", step):
        exact, cast = load_file(whole / name), load_file(half / name)
        assert exact.keys() == cast.keys()
        for key, tensor in cast.items():
            if key.endswith((".dora_scale", "magnitude_vector")):
                assert tensor.dtype == torch.float32 and torch.equal(tensor, exact[key])
            elif not key.endswith(".alpha"):
                assert tensor.dtype == dtype and torch.equal(tensor, exact[key].to(dtype))
    rows = load_file(half / "run_emb.safetensors")
    assert same(rows, load_file(whole / "run_emb.safetensors"))
    sizes = [(run / "run.safetensors").stat().st_size for run in (half, whole)]
    assert sizes[0] < sizes[1]
    assert formats.load(half, layout).tokens


def test_what_overflows_is_said_and_stays_whole(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = train.Checkpoints.learned_state

    def large(*words: object) -> AdapterState:
        state = learned(*words)
        first = next(iter(state.components["unet"]))
        own = state.components["unet"][first]
        state.components["unet"][first] = own._replace(up=own.up + 70_000)
        return state

    monkeypatch.setattr(train.Checkpoints, "learned_state", large)
    monkeypatch.setattr("training.probes.file_probes.fits_half", lambda *_: False)
    run = train.train(put(config, {"files.precision": "fp16", "stages": (Stage(1),)}))
    assert "has numbers that overflow fp16, so the files are in fp32" in capsys.readouterr().err
    found = load_file(run / "run.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert max(float(tensor.max()) for tensor in found.values()) > 65_504


def test_the_range_decides(capsys: pytest.CaptureFixture[str]) -> None:
    for largest, expected in ((65_504.0, torch.float16), (65_536.0, None)):
        factors = LowRank(torch.ones(1, 2), torch.full((2, 1), largest), 1.0)
        state = AdapterState({"unet": {"layer": factors}})
        assert file_precision.fitting_dtype(state, "fp16") == expected
        assert file_precision.fitting_dtype(state, "bf16") == torch.bfloat16
        assert file_precision.fitting_dtype(state, "fp32") is None
    assert "unet.layer has numbers" in capsys.readouterr().err


def test_files_in_half_precision_are_as_near_as_their_numbers(
    config: Config, quick: None, layout: Layout, tmp_path: Path
) -> None:
    """The update of a layer is off by at most the rounding of its two factors, 2 x 2^-11."""
    run = train.train(put(config, {"files.precision": "fp16", "stages": (Stage(2),)}))
    half = formats.load(run / "pytorch_lora_weights.safetensors", layout).components["unet"]
    state = {name: t for name, t in final(run).items() if name.startswith("groups/denoiser")}
    exact = sorted(float(tensor.norm()) for tensor in state.values())
    cast = []
    for own in half.values():
        cast += [float(own.down.float().norm()), float(own.up.float().norm() * own.scale)]
    assert len(cast) == len(exact)
    pairs = zip(sorted(cast), exact, strict=True)
    assert all(abs(a - b) <= 2**-10 * b + 1e-6 for a, b in pairs)
