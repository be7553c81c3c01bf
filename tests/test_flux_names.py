"""Names of the original code: kohya's counts, and every layer stored exactly once."""

from models.flux_names import BLOCKS, NAMES, SWAPPED, original_flux_names
from models.known import published_layout
from tests.original_weights import assert_stored_once


def test_every_layer_is_stored_once():
    part = published_layout("flux-dev").components["transformer"]
    assert_stored_once(part.modules, original_flux_names(part.modules))


def test_the_blocks_have_as_many_layers_as_sd_scripts_adapts():
    """sd-scripts wraps every Linear of its blocks: 19 * 10 + 38 * 3."""
    part = published_layout("flux-dev").components["transformer"]
    names = original_flux_names(path for path in part.shapes if path.split(".")[0] in BLOCKS)
    assert len(names["fused"]) + len(names["names"]) == 304


def test_a_path_outside_of_the_blocks_has_a_name_of_its_own():
    found = original_flux_names(NAMES)
    assert found == {"names": NAMES, "fused": {}, "swapped": SWAPPED}
