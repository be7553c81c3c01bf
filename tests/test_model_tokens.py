"""Tokens added to a whole model: diffusers finds their rows by their names."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_core.formats.model_folders import open_model_folder, weight_key
from tests.merge_commands import call, deltas


@pytest.mark.parametrize("name", ["base", "runwayml/stable-diffusion-v1-5"])
def test_upl_writes_the_model_with_its_tokens(
    here, states, layout, model, name, monkeypatch, capsys
):
    monkeypatch.setattr("models.hub_models.download_model", lambda _: model)
    call(name, "./c.safetensors", "./output_merged", "0.8", "--mode", "upl", lora_add=True)
    assert "100.00 % of the update's energy survived" in capsys.readouterr().out
    pipe = StableDiffusionPipeline.from_pretrained("output_merged", safety_checker=None)
    ids = pipe.tokenizer("a<s1><s2>", add_special_tokens=False).input_ids[1:]
    assert ids == pipe.tokenizer.convert_tokens_to_ids(
        ["<s1>", "<s2>"]
    ) and pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)
    assert torch.equal(
        pipe.text_encoder.get_input_embeddings().weight[ids], states["c"].tokens["clip_l"]
    )
    before = open_model_folder("base")
    for (component, path), update in deltas(states["c"]).items():
        weight = getattr(pipe, component).get_submodule(layout.module_path(component, path)).weight
        expected = (
            before[component].read(weight_key(before[component], layout, component, path))
            + 0.8 * update
        )
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)
