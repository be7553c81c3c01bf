"""Names of the original code: layers alone, joined, and outside of blocks."""

import pytest

from models.original_names import BlockNames, find_original_names

BLOCKS = {"blocks": BlockNames("layers", {"out": "proj"}, {"qkv": ("q", "k"), "kv2": ("q2", "k2")})}


def test_a_layer_is_named_or_joined():
    paths = ["first", "blocks.10.out", "blocks.10.q", "blocks.10.k"]
    assert find_original_names(paths, {"first": "in.0"}, BLOCKS) == {
        "names": {"first": "in.0", "blocks.10.out": "layers.10.proj"},
        "fused": {"layers.10.qkv": ("blocks.10.q", "blocks.10.k")},
    }


def test_a_layer_without_a_name_is_found_by_its_path():
    with pytest.raises(KeyError, match="second"):
        find_original_names(["second"], {}, BLOCKS)
