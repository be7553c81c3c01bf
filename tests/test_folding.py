"""fold: what is streamed is what a patched model has, models add up, rounding is counted, folders
are whole or not at all.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_core.adapters import injection
from lora_core.adapters.weight_updates import (
    AdapterState,
    DenseUpdate,
    LowRank,
    delta_weight,
    scaled_product,
)
from lora_core.errors import UserError
from lora_core.formats.layout import layout_of
from lora_core.formats.model_folders import open_model_folder, weight_key, write_model_folder
from lora_core.formats.weights import Weights, weights_in_memory
from merging.adapter_sums import Term, layers_by_key
from merging.folding import FoldStatistics, fold_adapters, with_embedding_rows
from tests.conftest import save_pipeline
from tests.tiny_pipeline import pipeline, random_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("fold") / "model")


@pytest.fixture(scope="module")
def pipe(folder):
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@pytest.fixture(scope="module")
def layout(pipe):
    return layout_of({"unet": pipe.unet, "text_encoder": pipe.text_encoder})


def tensors(weights: Weights) -> dict[str, torch.Tensor]:
    return {key: weights.read(key) for key in weights.infos}


@pytest.mark.parametrize("dora", [False, True])
def test_streamed_weights_are_those_of_a_patched_model(folder, pipe, layout, dora):
    state = random_state(pipe, mixed=True, dora=dora)
    ledger = FoldStatistics()
    made = fold_adapters([(1.0, open_model_folder(folder))], [Term(state, 0.7)], layout, ledger)
    fresh = pipeline()
    for name, modules in state.components.items():
        network = getattr(fresh, name)
        network.load_state_dict(getattr(pipe, name).state_dict())
        injection.load_factors(
            network, {layout.module_path(name, path): lr for path, lr in modules.items()}, "x"
        )
        injection.set_strength(network, "x", 0.7)
        for path in modules:
            wrapper = network.get_submodule(layout.module_path(name, path))
            expected = wrapper.base.weight + 0.7 * delta_weight(modules[path], wrapper.base.weight)
            torch.testing.assert_close(
                made[name].read(weight_key(made[name], layout, name, path)),
                expected,
                rtol=0,
                atol=1e-6,
            )
    assert set(ledger.roundings) == set(layers_by_key(state))
    assert ledger.surviving_energy == pytest.approx(1, abs=1e-6)
    untouched = [key for key in made["vae"].infos]
    assert all(
        torch.equal(made["vae"].read(key), open_model_folder(folder)["vae"].read(key))
        for key in untouched
    )


def test_the_folded_model_draws_like_the_patched_one(folder, pipe, layout, tmp_path):
    state = random_state(pipe)
    write_model_folder(
        fold_adapters([(1.0, open_model_folder(folder))], [Term(state)], layout, FoldStatistics()),
        folder,
        tmp_path / "out",
    )
    folded, patched = (
        StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None),
        pipeline(),
    )
    for name, modules in state.components.items():
        getattr(patched, name).load_state_dict(getattr(pipe, name).state_dict())
        injection.load_factors(
            getattr(patched, name),
            {layout.module_path(name, path): lr for path, lr in modules.items()},
            "x",
        )
    noise = torch.Generator().manual_seed(0)
    x, condition = torch.randn(2, 4, 8, 8, generator=noise), torch.randn(2, 5, 16, generator=noise)
    with torch.no_grad():
        ours, theirs = (
            p.unet(x, torch.tensor([3, 700]), condition).sample for p in (folded, patched)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_models_add_up_under_other_names_of_keys(folder, layout):
    first = open_model_folder(folder)
    noise = torch.Generator().manual_seed(1)
    other = {
        name: weights_in_memory(
            {
                key.removeprefix("text_model."): torch.randn(
                    i.shape, generator=noise, dtype=torch.float64
                )
                for key, i in w.infos.items()
            },
            "b",
        )
        for name, w in first.items()
    }
    first["text_encoder"] = weights_in_memory(
        {
            f"text_model.{key.removeprefix('text_model.')}": t
            for key, t in tensors(first["text_encoder"]).items()
        },
        "a",
    )
    made = fold_adapters(
        [(0.6, first), (0.4, other)], [], layout, FoldStatistics(), dtype=torch.float64
    )
    for name, weights in first.items():
        for key in weights.infos:
            expected = 0.6 * weights.read(key).double() + 0.4 * other[name].read(
                key.removeprefix("text_model.")
            )
            torch.testing.assert_close(made[name].read(key), expected, rtol=0, atol=1e-7)
            assert made[name].infos[key].dtype == torch.float64


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_rounding_is_counted_and_its_residual_kept(folder, pipe, layout, size):
    """At a thousandth of the weights' size most of the update is lost in bfloat16; the residual
    gives it back.
    """
    state = random_state(pipe, rank=2, size=0.05 * size**0.5)
    ledger = FoldStatistics(residual_rank=8)
    base = {
        name: weights_in_memory({key: t.bfloat16() for key, t in tensors(w).items()}, "b")
        for name, w in open_model_folder(folder).items()
    }
    made = fold_adapters([(1.0, base)], [Term(state)], layout, ledger)
    wished = whole = lost = 0.0
    for name, modules in state.components.items():
        for path, lr in modules.items():
            key = weight_key(made[name], layout, name, path)
            before, after, update = (
                base[name].read(key).double(),
                made[name].read(key).double(),
                scaled_product(lr).double(),
            )
            assert made[name].infos[key].dtype == torch.bfloat16
            residual = scaled_product(ledger.residual.components[name][path]).double()
            wished, whole = (
                wished + float(update.square().sum()),
                whole + float((before + update - after).square().sum()),
            )
            lost += float((before + update - after - residual).square().sum())
    survived = max(0, 1 - whole / wished)
    assert ledger.surviving_energy == pytest.approx(survived, rel=1e-3) and (
        survived > 0.9 if size == 1 else survived < 0.05
    )
    assert sum(row.lost**2 for row in ledger.layer_reports().values()) == pytest.approx(
        whole, rel=1e-3
    )
    assert lost == pytest.approx(
        sum(row.lost**2 for row in ledger.residual_reports.values()), rel=1e-2
    )
    assert lost < (0.7 if size == 1 else 1e-3) * whole
    for name in made:
        tensors(made[name])  # read again: counted once
    assert ledger.surviving_energy == pytest.approx(survived, rel=1e-3)


def test_updates_that_are_no_factors_are_folded(folder, layout):
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    update = torch.randn(8, 8)
    state = AdapterState({"unet": {path: DenseUpdate("full", (8, 8), {"diff": update})}})
    ledger, base = FoldStatistics(residual_rank=1), open_model_folder(folder)
    made = fold_adapters([(1.0, base)], [Term(state, 2.0)], layout, ledger)["unet"].read(
        f"{path}.weight"
    )
    torch.testing.assert_close(made, base["unet"].read(f"{path}.weight") + 2 * update)
    assert ledger.ranks["unet", path] == 8


MISFITS = {
    "component": "change transformer, which the model does not have",
    "path": "no Linear or Conv2d",
    "shape": "base weight",
    "overflow": "NaN or Inf",
}


@pytest.mark.parametrize(("change", "sentence"), MISFITS.items())
def test_what_does_not_fit_is_refused(folder, pipe, layout, change, sentence):
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    good = LowRank(torch.ones(1, 8), torch.ones(8, 1), 1.0)
    bad = {
        "component": {"transformer": {path: good}},
        "path": {"unet": {"nowhere.to_q": good}},
        "shape": {"unet": {path: good._replace(down=torch.ones(1, 9))}},
        "overflow": {"unet": {path: good._replace(scale=1e6)}},
    }
    with pytest.raises(UserError, match=sentence):
        made = fold_adapters(
            [(1.0, open_model_folder(folder))],
            [Term(AdapterState(bad[change]))],
            layout,
            FoldStatistics(),
            dtype=torch.float16,
        )
        tensors(made["unet"])


def test_models_of_two_kinds_are_refused(folder, layout):
    first = open_model_folder(folder)
    for other, sentence in (
        ({name: w for name, w in first.items() if name != "vae"}, "only models of one kind"),
        (
            first | {"vae": weights_in_memory({"x": torch.zeros(1)}, "b")},
            "differ in .* tensors of vae",
        ),
        (
            first
            | {
                "vae": Weights(
                    "b",
                    {k: i._replace(shape=(3,)) for k, i in first["vae"].infos.items()},
                    first["vae"].read,
                )
            },
            "of one kind",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            fold_adapters([(0.5, first), (0.5, other)], [], layout, FoldStatistics())


def test_rows_are_set_and_tables_grow():
    table = torch.arange(6.0).reshape(3, 2).half()
    grown = with_embedding_rows(
        weights_in_memory({"t": table, "other": table}, "x"),
        "t",
        {1: torch.tensor([9.0, 9.0]), 4: torch.tensor([7.0, 7.0])},
    )
    assert grown.infos["t"] == ((5, 2), torch.float16)
    assert grown.read("t").tolist() == [[0, 1], [9, 9], [4, 5], [0, 0], [7, 7]] and table[
        1
    ].tolist() == [2, 3]
    assert torch.equal(grown.read("other"), table)


def test_a_folder_is_copied_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    model, out = open_model_folder(folder), tmp_path / "out"
    write_model_folder(model, folder, out)
    assert sorted(p.relative_to(out) for p in out.rglob("*")) == sorted(
        p.relative_to(folder) for p in folder.rglob("*")
    )
    for name, weights in open_model_folder(out).items():
        assert all(
            torch.equal(weights.read(key), model[name].read(key)) for key in model[name].infos
        )
    with pytest.raises(UserError, match="--overwrite"):
        write_model_folder(model, folder, out)
    before = (out / "model_index.json").read_bytes()

    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left|disk is full"):
        write_model_folder(model, folder, out, overwrite=True, finish=full)
    broken = model | {"unet": Weights("x", model["unet"].infos, lambda key: full(key))}
    with pytest.raises(UserError, match=r"No space left|disk is full"):
        write_model_folder(broken, folder, out, overwrite=True)
    assert (out / "model_index.json").read_bytes() == before and os.listdir(tmp_path) == ["out"]
    write_model_folder(
        model, folder, out, overwrite=True, finish=lambda new: (new / "more.json").write_text("{}")
    )
    assert json.loads((out / "more.json").read_text()) == {} and os.listdir(tmp_path) == ["out"]
