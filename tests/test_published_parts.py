"""The configs of published parts: known keys only, and the published numbers of parameters."""

import inspect

import diffusers
import pytest
import torch
import transformers

from models import published_parts as parts
from models.published_configs import MODEL_FILES

# Parameters, of a transformer with its table of positions. Published as sizes of files in bf16:
# 8,044,936,192 and 16,381,470,720 bytes of Qwen3's, and 7,751,105,712 with a header of 16,560 of
# FLUX.2 klein base 4B's, or in words ("2B", "2.5B", "8.1B", "9B", "32B", "24B").
COUNTS = {
    "SD3_TRANSFORMER": 2_084_951_104,
    "SD35_MEDIUM": 2_469_663_936,
    "SD35_LARGE": 8_146_280_768,
    "KLEIN_4B": 3_875_544_576,
    "KLEIN_9B": 9_078_581_248,
    "FLUX2_TRANSFORMER": 32_223_281_152,
    "QWEN3_4B": 4_022_468_096,
    "QWEN3_8B": 8_190_735_360,
    "MISTRAL_SMALL": 24_011_361_280,
}


def build_network(config):
    """The network of a config, without weights."""
    with torch.device("meta"):
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(config)
        network = getattr(transformers, config["architectures"][0])
        return network(network.config_class(**config))


@pytest.mark.parametrize("name", COUNTS)
def test_a_network_has_as_many_parameters_as_the_published_one(name):
    state = build_network(getattr(parts, name)).state_dict(keep_vars=True)
    found = {id(tensor): tensor.numel() for tensor in state.values()}  # tied ones once
    assert sum(found.values()) == COUNTS[name]


def unknown_keys(config, defaults):
    """The keys of a text encoder's config that transformers' config object does not have."""
    found = set()
    for key, value in config.items():
        if key == "rope_theta":  # transformers 5 keeps it with other facts of the positions
            found |= {key} - set(defaults.rope_parameters)
        elif not hasattr(defaults, key):
            found.add(key)
        elif isinstance(value, dict):
            found |= unknown_keys(value, getattr(defaults, key))
    return found


def test_every_key_is_known_to_its_class():
    """Both libraries take others without a word."""
    unknown = set()
    for files in MODEL_FILES.values():
        for name, config in files.items():
            if "_class_name" in config and name != "model_index.json":
                takes = inspect.signature(getattr(diffusers, config["_class_name"])).parameters
                unknown |= set(config) - set(takes) - {"_class_name"}
            elif "architectures" in config:
                defaults = getattr(transformers, config["architectures"][0]).config_class()
                unknown |= unknown_keys(config, defaults)
    assert unknown == set()
