"""The table of published models: each has configs, and a variant the adapters of its original."""

from models.published import HUB_NAMES, PUBLISHED_MODELS
from models.published_configs import MODEL_FILES
from models.published_layouts import published_layout


def test_every_model_has_a_title_configs_and_a_hub_id() -> None:
    assert list(PUBLISHED_MODELS) == list(MODEL_FILES)
    assert set(HUB_NAMES.values()) == set(PUBLISHED_MODELS)
    titles = [row.title for row in PUBLISHED_MODELS.values()]
    assert len(set(titles)) == len(titles)


def test_a_variant_has_the_layers_of_its_original() -> None:
    """A refiner has other sizes, but the names and formats of SDXL."""
    for kind, row in PUBLISHED_MODELS.items():
        if row.like and kind not in ("sdxl-refiner", "flux-schnell"):
            own, other = published_layout(kind), published_layout(row.like)
            assert not PUBLISHED_MODELS[row.like].like
            assert own.family == other.family
            assert own.base_model_version.removesuffix("_v") == other.base_model_version
            for name, component in own.components.items():
                assert component.shapes.keys() == other.components[name].shapes.keys()
