"""The components of a model folder: what is missing or broken is named, code is not run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import SD3Transformer2DModel

import infer
import merge
from lora_core import formats
from lora_core.errors import UserError
from models import LoadOptions, load_family
from models.components import load_network, read_prompt_length
from tests import tiny_flux, tiny_sd3
from tests.tiny_pipeline import random_state, save_sd_pipeline

CODE = """
from pathlib import Path
Path({mark!r}).write_text("it ran")
from transformers import CLIPTextModel, CLIPTokenizer, CLIPTextConfig
class Own(CLIPTextModel): pass
class OwnTokenizer(CLIPTokenizer): pass
class OwnConfig(CLIPTextConfig): pass
"""
AUTO_MAP = {
    "AutoConfig": "code.OwnConfig",
    "AutoModel": "code.Own",
    "AutoTokenizer": ["code.OwnTokenizer", "code.OwnTokenizer"],
}


@pytest.mark.parametrize(
    "missing", ["vae", "unet", "text_encoder", "tokenizer", "scheduler", "model_index.json"]
)
def test_a_missing_part_is_named(tmp_path: Path, missing: str) -> None:
    save_sd_pipeline(tmp_path)
    path = tmp_path / missing
    path.unlink() if path.is_file() else path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=missing):
        load_family(str(tmp_path))


@pytest.mark.parametrize("keeps_class", [True, False])
def test_code_in_a_model_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, keeps_class: bool
) -> None:
    """Every config of the folder names a class in a Python file next to it."""
    monkeypatch.chdir(tmp_path)
    pipe = save_sd_pipeline(tmp_path / "model")
    state = random_state(pipe)
    state.tokens = {"clip_l": pipe.text_encoder.get_input_embeddings().weight[:1].detach().clone()}
    state.token_names = ("<s0>",)
    Path("run").mkdir()
    formats.save_run(state, "run", layout=load_family("model").layout)
    for config in Path("model").glob("*/*config.json"):
        table = json.loads(config.read_text()) | {"auto_map": AUTO_MAP}
        if not keeps_class:
            table.pop("tokenizer_class", None)
            table |= {"model_type": "own"} if config.parent.name == "text_encoder" else {}
        config.write_text(json.dumps(table))
        (config.parent / "code.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    infer.main(["--model", "model", "--prompt", "a", "--steps", "1"])
    merge.main(["fold", "model", "run", "folded"])
    merge.main(["add", "model", "run", "grown", "0.5", "--mode", "upl"])
    merge.main(["convert", "model", "whole.safetensors"])
    merge.main(["info", "model"])
    assert not Path("mark").exists()


@pytest.mark.parametrize("length", ["77", None, 0, -1, 77.0, True, 10**30])
def test_a_prompt_length_that_is_no_number_of_tokens_is_refused(length) -> None:
    tokenizer = SimpleNamespace(model_max_length=length)
    with pytest.raises(UserError, match="model_max_length"):
        read_prompt_length(tokenizer)
    assert read_prompt_length(SimpleNamespace(model_max_length=77)) == 77


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("vae", {"scaling_factor": "a"}, "'a' as scaling_factor, expected a number"),
        ("vae", {"scaling_factor": None}, "None as scaling_factor, expected a number"),
        ("vae", {"scaling_factor": 0}, "0 as scaling_factor, expected a number"),
        ("vae", {"scaling_factor": [1, 2]}, "[1, 2] as scaling_factor, expected a number"),
        ("vae", {"shift_factor": float("nan")}, "nan as shift_factor, expected a number"),
        ("vae", {"latents_mean": "x"}, "'x' as latents_mean, expected 4 numbers"),
        ("vae", {"latents_std": [1, 2, 3]}, "[1, 2, 3] as latents_std, expected 4 numbers"),
        ("unet", {"sample_size": 10**6}, "sample_size 1000000, expected 1 to 1024"),
        ("unet", {"sample_size": "64"}, "sample_size '64', expected 1 to 1024"),
        ("unet", {"sample_size": None}, "sample_size None, expected 1 to 1024"),
        ("unet", {"sample_size": [8, 8]}, "sample_size [8, 8], expected 1 to 1024"),
        ("unet", {"sample_size": -8}, "sample_size -8, expected 1 to 1024"),
    ],
)
def test_units_and_sizes_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, changes: dict, said: str
) -> None:
    save_sd_pipeline(tmp_path / "model")
    config = tmp_path / "model" / file / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    words = ["--model", str(tmp_path / "model"), "--prompt", "a", "--steps", "1"]
    assert infer.main([*words, "--out", str(tmp_path / "o.png")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize("change", ["spread", "empty", "longer"])
def test_a_tokenizer_of_another_vocabulary_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """Its numbers would lie outside the encoder's table, or every word would be unknown."""
    save_sd_pipeline(tmp_path / "model")
    folder = tmp_path / "model" / "tokenizer"
    whole = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    if change == "spread":
        whole["model"]["vocab"] = {word: 1000 * i for word, i in vocabulary.items()}
        whole["added_tokens"] = []
    elif change == "longer":
        whole["model"]["vocab"] = vocabulary | {"aa": len(vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    if change == "empty":
        for file in folder.iterdir():
            if file.name != "tokenizer_config.json":
                file.unlink()
    words = ["--model", str(tmp_path / "model"), "--prompt", "a", "--steps", "1"]
    assert infer.main([*words, "--out", str(tmp_path / "o.png")]) == 2
    assert "the tokenizer of text_encoder has" in capsys.readouterr().err


def test_a_base_models_own_dropout_never_acts(tmp_path: Path) -> None:
    """T5's is 0.1; checkpointed layers, which are in training mode, would be drawn anew."""
    tiny_flux.save(tmp_path / "flux")
    family = load_family(str(tmp_path / "flux"))
    t5 = family.modules["text_encoder_2"]
    assert t5.config.dropout_rate == 0.1  # type: ignore[union-attr]
    ids = torch.arange(2 * 8).view(2, 8)
    expected = t5.eval()(ids).last_hidden_state
    assert torch.equal(t5.train()(ids).last_hidden_state, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_networks_on_the_meta_device_are_those_that_are_loaded(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tiny_flux.save(tmp_path / "flux")
    (tmp_path / "flux" / "tokenizer_2" / "tokenizer.json").unlink()  # not read
    planned = load_family(str(tmp_path / "flux"), LoadOptions(dtype, "meta"))
    tiny_flux.save(tmp_path / "flux")
    loaded = load_family(str(tmp_path / "flux"), LoadOptions(dtype))
    for name, network in loaded.modules.items():
        ours = planned.modules[name].state_dict()
        for key, tensor in network.state_dict().items():
            assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype), key
        assert all(tensor.is_meta for tensor in ours.values())


def test_a_network_has_its_precision_whatever_its_first_tensor_has(tmp_path: Path) -> None:
    """The first tensor of Stable Diffusion 3's is a table of positions, fp32 in every precision."""
    tiny_sd3.save(tmp_path)
    path = str(tmp_path)
    network = load_network(SD3Transformer2DModel, path, "transformer", torch.bfloat16, "cpu")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
