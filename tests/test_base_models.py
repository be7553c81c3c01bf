"""Whole models, opened without their weights: a layer's weight is found by its published path."""

import pytest

from lora_core.formats.model_folders import open_model_folder
from merging.base_models import base_weight_reader, layer_keys, open_base_model
from merging.commands import FileReadOptions
from tests.refusals import sentence


def test_a_weight_is_found_by_its_published_path(here, layout):
    base = open_base_model("base", FileReadOptions())
    assert base.layout == layout
    keys = layer_keys(base)
    assert len(keys) == len(set(keys)) == sum(len(c.shapes) for c in layout.components.values())
    read = base_weight_reader(base)
    for component, path in keys:
        assert tuple(read(component, path).shape) == layout.components[component].shapes[path]
    assert "has no prior; it has" in sentence(read, "prior", "x")
    stored = open_model_folder("base")["unet"].read("conv_in.weight")
    assert read("unet", "conv_in").equal(stored)


@pytest.mark.parametrize("path", ["a.safetensors", "run"])
def test_an_adapter_is_no_whole_model(here, path):
    assert "is not a whole model" in sentence(open_base_model, path, FileReadOptions())
