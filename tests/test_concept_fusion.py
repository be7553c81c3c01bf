"""Gradient fusion on a model: what each step keeps, and what it refuses."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_core.adapters import injection
from lora_core.adapters.weight_updates import AdapterState, LowRank, scaled_product
from lora_core.errors import UserError
from lora_core.family import Family
from lora_core.formats import embeddings
from lora_core.layer_prompts import encode_layer_prompts
from merging.concept_fusion import Fusion, FusionSettings, _FusionRun, changed_layers, fuse_concepts
from merging.concepts import Concept, add_prompts, join_concepts
from merging.layer_inputs import text_positions
from merging.token_names import TakenNames
from models import load_family
from tests import tiny_flux, tiny_sdxl
from tests.concept_files import MODEL, random_concept
from tests.conftest import save_pipeline

FAST = FusionSettings(steps=2, resolution=32)


def concepts_for(family: Family, *words: str) -> tuple[list[Concept], AdapterState]:
    """Random concepts, with Mix-of-Show's prompts, and the tokens of all."""
    concepts = []
    for seed, word in enumerate(words, 1):
        state = random_concept(family.layout, word, seed)
        strengths = dict.fromkeys(state.changed_components, 1.0)
        concepts.append(Concept(f"file {seed}", state, strengths))
    placed, learned, _ = join_concepts(concepts, TakenNames())
    return add_prompts(placed, ()), learned


@cache
def fused_toy() -> tuple[Family, list[Concept], AdapterState, Fusion]:
    family = load_family(MODEL)
    concepts, learned = concepts_for(family, "TOK", "TOK")
    return family, concepts, learned, fuse_concepts(family, concepts, learned, FAST)


def text_features(family: Family, concept: Concept) -> Tensor:
    """The text encoder's features of a concept's prompts, up to EOS."""
    with torch.no_grad():
        cond = encode_layer_prompts(family.encode_prompts, concept.bound_prompts())
    ids = family.tokenize(concept.bound_prompts())["ids"]
    return cond.prompt_embeds[text_positions(ids, family.tokenizers["text_encoder"].eos_token_id)]


def plain_model(learned: AdapterState) -> Family:
    """The base model with the tokens of all concepts, and an empty fusion on it."""
    family = load_family(MODEL)
    fuse_concepts(family, [], learned, FAST)
    return family


def test_text_features_are_nearer_to_each_concepts_own_than_those_of_the_sum() -> None:
    """What is left comes from the words before the tokens, which both concepts have: their inputs
    are equal, so that a fused layer can only give the mean of both outputs.
    """
    family, concepts, learned, _ = fused_toy()
    other = plain_model(learned)
    encoder = other.modules["text_encoder"]
    layout = other.layout

    def load(concept: Concept, name: str) -> None:
        own = concept.state.components["text_encoder"]
        factors = {layout.module_path("text_encoder", path): lr for path, lr in own.items()}
        injection.load_factors(encoder, factors, name)

    for concept in concepts:
        load(concept, "own")
        expected = text_features(other, concept)
        injection.remove(encoder, "own")
        for i, each in enumerate(concepts):
            load(each, f"sum{i}")
        summed = text_features(other, concept)
        injection.remove(encoder)
        fused = text_features(family, concept)
        assert (fused - expected).norm() < 0.5 * (summed - expected).norm()


def test_keys_and_values_of_learned_tokens_are_each_concepts_own() -> None:
    _, _, _, fusion = fused_toy()
    fits = fusion.fits["keys, values"]
    assert len(fits) == 8
    for fit in fits.values():
        assert fit.samples == 2 * 2 * 3  # concepts, prompts, two tokens and EOS
        assert sum(fit.residuals) <= 1.01e-12 * sum(fit.energies)
        assert min(fit.summed) > 1e-3 * max(fit.energies)


def test_every_layer_is_fused_once_with_the_sum_of_ranks() -> None:
    _, concepts, _, fusion = fused_toy()
    layers = changed_layers(concepts)
    assert list(fusion.updates) and set(fusion.updates) == set(layers)
    assert sum(map(len, fusion.fits.values())) == len(layers)
    for update in fusion.updates.values():
        assert isinstance(update, LowRank) and update.rank == 4
    kept = fusion.fits["other layers"].values()
    assert sum(sum(fit.residuals) for fit in kept) < sum(sum(fit.summed) for fit in kept)


def test_less_memory_takes_more_passes_with_the_same_result() -> None:
    """Sums of rows are the same; only what precedes them is drawn again."""
    _, _, _, fusion = fused_toy()
    family = load_family(MODEL)
    concepts, learned = concepts_for(family, "TOK", "TOK")
    again = fuse_concepts(family, concepts, learned, replace(FAST, memory=4e6))
    for key, update in fusion.updates.items():
        assert torch.equal(scaled_product(update), scaled_product(again.updates[key]))


def test_strengths_of_zero_leave_a_network_out() -> None:
    family = load_family(MODEL)
    concepts, learned = concepts_for(family, "TOK", "TOK")
    off = [replace(own, strengths={"unet": 0.5, "text_encoder": 0.0}) for own in concepts]
    fusion = fuse_concepts(family, off, learned, FAST)
    assert {component for component, _ in fusion.updates} == {"unet"}
    assert not fusion.fits["text encoders"]


def test_norms_and_biases_act_while_a_concepts_inputs_are_recorded() -> None:
    family = load_family(MODEL)
    concepts, learned = concepts_for(family, "TOK", "TOK")
    path = "text_model.encoder.layers.0.layer_norm1.bias"
    shift = 9 * torch.ones(family.layout.components["text_encoder"].parameters[path])
    changed = replace(concepts[0].state, parameters={"text_encoder": {path: shift}})
    concepts[0] = replace(concepts[0], state=changed)
    fusion = fuse_concepts(family, concepts, learned, FAST)
    before = fused_toy()[3]
    key = next(iter(fusion.fits["text encoders"]))
    assert fusion.fits["text encoders"][key].energies[0] != pytest.approx(
        before.fits["text encoders"][key].energies[0], rel=1e-3
    )
    own = family.modules["text_encoder"].get_parameter(
        path.removeprefix(family.layout.components["text_encoder"].module_prefix)
    )
    base = load_family(MODEL).modules["text_encoder"].state_dict()
    torch.testing.assert_close(own, dict(base)[next(k for k in base if path.endswith(k))] + shift)


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_other_families_are_fused_too(kind: str, tmp_path: Path) -> None:
    (tiny_sdxl if kind == "sdxl" else tiny_flux).save(tmp_path / kind)
    family = load_family(str(tmp_path / kind))
    concepts, learned = concepts_for(family, "ab", "cd")
    fusion = fuse_concepts(family, concepts, learned, FusionSettings(steps=2))
    networks = {component for component, _ in fusion.updates}
    assert networks >= {family.denoiser, "text_encoder"}
    crossed = fusion.fits["keys, values"].values()
    assert bool(crossed) == (kind == "sdxl")
    for fit in crossed:
        assert sum(fit.residuals) <= 1e-6 * sum(fit.energies)
    for fits in fusion.fits.values():
        assert sum(sum(fit.residuals) for fit in fits.values()) <= sum(
            sum(fit.energies) for fit in fits.values()
        )


def test_tokens_of_each_layer_are_fused_in_their_layer(tmp_path: Path) -> None:
    """P+: the inputs of keys and values differ from layer to layer."""
    family = load_family(MODEL)
    count = 4  # cross-attention layers of the embedded model
    concepts = []
    for seed in (1, 2):
        state = random_concept(family.layout, "TOK", seed)
        names = tuple(f"<n{i}>" for i in range(count))
        noise = torch.Generator().manual_seed(seed)
        rows = {"clip_l": 0.05 * torch.randn(count, 128, generator=noise)}
        header = embeddings.placeholder_header({"TOK": names}, {"TOK": count})
        state = replace(state, tokens=rows, token_names=names, metadata=header)
        strengths = dict.fromkeys(state.changed_components, 1.0)
        concepts.append(Concept(f"file {seed}", state, strengths))
    placed, learned, _ = join_concepts(concepts, TakenNames())
    placed = add_prompts(placed, ())
    fusion = fuse_concepts(family, placed, learned, FAST)
    fits = fusion.fits["keys, values"]
    assert {fit.samples for fit in fits.values()} == {2 * 2 * 2}
    assert len({fit.condition for fit in fits.values()}) == count
    assert all(sum(fit.residuals) <= 1.01e-12 * sum(fit.energies) for fit in fits.values())


def test_sets_that_cannot_tell_concepts_apart_are_refused() -> None:
    """The inputs of the second are among those of the first, and their updates differ."""
    family = load_family(MODEL)
    concepts, _ = concepts_for(family, "TOK", "TOK")
    concepts = [replace(own, placeholders=(), strengths={"unet": 1.0, "text_encoder": 0.0})
                for own in concepts]  # fmt: skip
    concepts = add_prompts(concepts, ["a creature\na house", "a creature"])
    with pytest.raises(UserError, match=r"too small: in the step keys, values .*condition number"):
        fuse_concepts(family, concepts, AdapterState(), FAST)


def test_a_layer_that_took_no_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = load_family(MODEL)
    concepts, learned = concepts_for(family, "TOK", "TOK")
    monkeypatch.setattr(_FusionRun, "read_prompts", lambda self, number: None)
    with pytest.raises(UserError, match="takes no part in drawing the prompts of file 1"):
        fuse_concepts(family, concepts, learned, FAST)


def test_models_and_sizes_without_images_are_refused(tmp_path: Path) -> None:
    inpainting = load_family(str(save_pipeline(tmp_path / "nine", channels=9)))
    with pytest.raises(UserError, match="inpainting model"):
        fuse_concepts(inpainting, [], AdapterState(), FAST)
    with pytest.raises(UserError, match="--resolution 31"):
        fuse_concepts(load_family(MODEL), [], AdapterState(), replace(FAST, resolution=31))
