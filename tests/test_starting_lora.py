"""Runs that start from a LoRA file: its update, ranks and tokens; resumed without it; refusals."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open

import train
from lora_core import formats
from lora_core.adapters import injection
from lora_core.adapters.weight_updates import AdapterState, LowRank, delta_weight, scaled_product
from lora_core.config import Config, OptimizerConfig, Stage
from lora_core.errors import UserError
from lora_core.toml import read_toml
from models import known, load_family
from tests.conftest import final, same
from tests.opened_run import OpenedRun, open_parts
from training import starting_lora

BOTH = (Stage(2, ("denoiser", "text_encoder")),)
EVERYTHING = {"targets": ("*",), "text_targets": ("*",)}
PUBLISHED = Path("/work/shared/data/lora_disney.safetensors")


@pytest.fixture
def begun(config: Config, quick: None, here: Path) -> Config:
    """The config of a run on all layers, in the folder of the LoRA files."""
    return replace(
        config,
        out=str(here / "tuned"),
        adapter=replace(config.adapter, **EVERYTHING),
        stages=BOTH,
        optimizer=OptimizerConfig(),
    )


def factors(opened: OpenedRun) -> dict[tuple[str, str], LowRank]:
    found = {}
    for component, module in opened.model.adapted.items():
        for path, lr in injection.adapter_factors(module).items():
            found[component, opened.model.family.layout.published(component, path)] = lr
    return found


def in_file(state: AdapterState) -> dict[tuple[str, str], LowRank]:
    found = {}
    for component, own in state.components.items():
        found |= {(component, path): lr for path, lr in own.items()}
    return found


def assert_started(opened: OpenedRun, state: AdapterState) -> None:
    """The update of the file, and zero on the layers that it has not."""
    own, given = factors(opened), in_file(state)
    assert given and given.keys() <= own.keys()
    for key, lr in own.items():
        delta = scaled_product(lr)
        wanted = scaled_product(given[key]) if key in given else torch.zeros_like(delta)
        assert torch.allclose(delta, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max())), key


@pytest.mark.parametrize("name", ["a", "b", "c"])  # diffusers, kohya (mixed ranks), cloneofsimo
def test_a_run_starts_with_the_update_ranks_and_alphas_of_a_file(
    begun: Config, states: dict[str, AdapterState], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_parts(replace(begun, from_lora=f"{name}.safetensors"))
    state = formats.load(f"{name}.safetensors", opened.model.family.layout)
    assert_started(opened, state)
    own = factors(opened)
    for key, lr in in_file(state).items():
        assert own[key].rank == lr.rank and own[key].scale == pytest.approx(lr.scale, rel=1e-12)
        assert torch.equal(own[key].up, lr.up.reshape(own[key].up.shape).float())
    rest = own.keys() - in_file(state).keys()
    assert all(own[key].rank == 4 for key in rest)
    out = capsys.readouterr().out
    assert f"{len(rest)} layers of {len(own)} not in {name}.safetensors, such as" in out or not rest
    assert f"{len(own) - len(rest)} layers keep their ranks and alphas" in out


def test_a_folder_of_peft_and_a_run_folder(begun: Config) -> None:
    unet = load_family(begun.model).modules["unet"]
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
    peft.get_peft_model(unet, settings).save_pretrained("own/unet")
    for source in ("own", "run"):
        opened = open_parts(replace(begun, from_lora=source, out=f"{begun.out}{source}"))
        assert_started(opened, formats.load(source, opened.model.family.layout))


def test_only_the_file_s_layers_make_a_config_without_patterns(
    begun: Config, states: dict[str, AdapterState], capsys: pytest.CaptureFixture[str]
) -> None:
    layers = {"targets": ("*attn?.to_*",), "text_targets": ("*self_attn.*",)}
    own = replace(begun.adapter, **layers)
    every = open_parts(replace(begun, adapter=replace(own, rank=3))).model
    updates = {}
    for component, module in every.adapted.items():
        updates[component] = {}
        for path, lr in injection.adapter_factors(module).items():
            published = every.family.layout.published(component, path)
            updates[component][published] = lr._replace(scale=0.5)
    state, layout = AdapterState(updates), every.family.layout
    formats.save(state, "own.safetensors", format="kohya", layout=layout)
    config = replace(begun, adapter=own, from_lora="own.safetensors", out=begun.out + "2")
    adapter = starting_lora.resolve_start(config).adapter
    assert (adapter.rank, adapter.alpha, adapter.rank_pattern) == (3, 1.5, {})
    assert "keep their ranks and alphas (rank 3, alpha 1.5)" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_ranks_of_the_config_by_svd_or_padding(
    begun: Config, states: dict[str, AdapterState], rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = replace(begun.adapter, rank=rank, alpha=3.0, exclude=("*conv*", "conv*"))
    opened = open_parts(
        replace(begun, from_lora="a.safetensors", from_lora_rank="adapter", adapter=adapter)
    )
    lost, whole = 0.0, 0.0
    own = factors(opened)
    for key, lr in in_file(states["a"]).items():
        if key in own:
            wanted = scaled_product(lr).double()
            delta = scaled_product(own[key]).double()
            assert own[key].rank == rank and own[key].scale == pytest.approx(3 / rank)
            left, values, right = torch.linalg.svd(wanted.flatten(1), full_matrices=False)
            near = left[:, :rank] * values[:rank] @ right[:rank]
            assert torch.allclose(delta.flatten(1), near, atol=1e-5 * float(values[0]))
            lost += float((near - wanted.flatten(1)).square().sum())
            whole += float(wanted.square().sum())
            if rank > 2:
                down = own[key].down[2:]
                assert down.abs().max() > 0 and not own[key].up[:, 2:].any()  # it can train
    out = capsys.readouterr().out
    if rank == 1:
        assert f"relative error {(lost / whole) ** 0.5:.2e} of its update" in out
    else:
        assert "relative error" not in out


def test_a_dora_starts_a_dora(
    begun: Config, states: dict[str, AdapterState], capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(begun, from_lora="d.safetensors")
    opened = open_parts(config)
    assert opened.config.adapter.kind == "dora"
    assert "d.safetensors is a DoRA, so --adapter.kind is dora" in capsys.readouterr().out
    own = factors(opened)
    for key, lr in in_file(states["d"]).items():
        assert torch.equal(own[key].magnitude, lr.magnitude.float())
        part = opened.model.adapted[key[0]]
        path = opened.model.family.layout.module_path(*key)
        base = part.get_submodule(path).base.weight
        assert torch.allclose(delta_weight(own[key], base), delta_weight(lr, base), atol=1e-6)
    wider = replace(config, from_lora_rank="adapter", out=begun.out + "2")
    own = factors(open_parts(wider))
    for key, lr in in_file(states["d"]).items():
        assert own[key].rank == 4 and torch.allclose(scaled_product(own[key]), scaled_product(lr))
    narrow = replace(wider, adapter=replace(begun.adapter, rank=1), out=begun.out + "3")
    with pytest.raises(UserError, match="is a DoRA of rank 2, which cannot be cut to 1"):
        open_parts(narrow)


def test_a_run_resumes_to_the_bit_without_the_file(begun: Config, here: Path) -> None:
    tokens = replace(begun.tokens, words=("TOK",), vectors=2)
    config = replace(
        begun,
        from_lora="run",
        tokens=tokens,
        stages=(Stage(2, ("denoiser", "text_encoder", "tokens")),),
        optimizer=OptimizerConfig(lr={"tokens": 1e-2}),
        save_every=1,
    )
    run, part = train.train(config), here / "part"
    shutil.copytree(run, part)
    shutil.rmtree(part / "checkpoints/2")
    recorded = read_toml(part / "config.toml")
    assert recorded.from_lora.startswith("run#")
    with safe_open(run / "pytorch_lora_weights.safetensors", "pt") as file:
        assert f'from_lora = "{recorded.from_lora}"' in file.metadata()["lora_core.config"]
    shutil.rmtree("run")
    resumed = train.train(replace(config, out=str(part), resume=True))
    assert same(final(run), final(resumed))
    metrics = [(each / "summary.json").read_text().split('"tokens"')[1] for each in (run, resumed)]
    assert metrics[0] == metrics[1]
    with pytest.raises(UserError, match="run"):
        starting_lora.resolve_start(replace(recorded, out=config.out + "again"))


def test_tokens_start_where_words_match(
    begun: Config, states: dict[str, AdapterState], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = states["a"].tokens["clip_l"]
    stages = (Stage(1, ("denoiser", "text_encoder", "tokens")),)
    tokens = replace(begun.tokens, words=("TOK",), vectors=2, norm_target=0.0)
    config = replace(begun, from_lora="run", stages=stages, tokens=tokens)
    opened = open_parts(config)
    (embedding,) = opened.model.embeddings.values()
    assert torch.equal(embedding.rows, rows) and torch.equal(embedding.initial, rows)
    assert torch.allclose(opened.model.norm_targets["text_encoder"], rows.norm(dim=1)[:, None])
    assert "TOK starts from the learned tokens of run (TOK)" in capsys.readouterr().out
    said = r"the learned tokens of run (TOK) are not read: no stage trains tokens of such a word"
    for i, change in enumerate(({"tokens": replace(tokens, vectors=3)}, {"stages": BOTH})):
        open_parts(replace(config, out=f"{begun.out}{i}", **change))
        assert said in capsys.readouterr().out


def test_what_does_not_fit_is_refused(begun: Config, here: Path) -> None:
    adapter = begun.adapter
    plain = replace(adapter, text_targets=("attention",))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"stages": (Stage(1),), "adapter": plain}, r"layers that get no adapter .*text_encoder.*"
         r"widen --adapter.text-targets .*mix \"a.safetensors@unet\""),
        ({"adapter": replace(adapter, targets=("*to_q",))}, "widen --adapter.targets"),
        ({"adapter": replace(adapter, kind="dora")}, "whose factors --adapter.kind dora"),
        ({"adapter": replace(adapter, kind="lokr")}, "--adapter.kind lokr cannot start from"),
        ({"adapter": replace(adapter, kind="full", rank=16)}, "--adapter.kind full cannot start"),
        ({"from_lora": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"from_lora": "a.safetensors#0123456789abcdef"}, "is not the file that the config was"),
        ({"from_lora": "d.safetensors", "adapter": replace(adapter, kind="loha")},
         "is a DoRA, whose factors --adapter.kind loha cannot"),
        ({"from_lora": "", "from_lora_rank": "adapter"}, "--from-lora-rank .*has no effect"),
        ({"from_lora": "base"}, "base"),
        ({"out": ".", "overwrite": True}, "--overwrite would move"),
    ]  # fmt: skip
    for change, said in cases:
        with pytest.raises(UserError, match=said):
            train.train(replace(begun, **{"from_lora": "a.safetensors", **change}))
    assert not Path(begun.out).exists()


def test_kinds_from_outside_with_loras_factors_start_from_files(begun: Config) -> None:
    import tests.test_example_kinds as examples

    root = Path(examples.__file__).parent.parent
    for kind, fits in (("LoRAFA", True), ("Riemannian", True), ("PiSSA", False), ("VeRA", False)):
        adapter = replace(begun.adapter, kind=f"{root / examples.KINDS[kind]}")
        config = replace(begun, adapter=adapter, from_lora="a.safetensors", out=begun.out + kind)
        if fits:
            opened = open_parts(config)
            assert_started(opened, formats.load("a.safetensors", opened.model.family.layout))
        else:
            with pytest.raises(UserError, match=f"{kind} cannot start from"):
                open_parts(config)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published LoRA is not on this disk")
def test_a_published_file(config: Config) -> None:
    file = starting_lora.read_start(
        replace(config, from_lora=str(PUBLISHED)), known.recognize_path(str(PUBLISHED))
    )
    assert len(file.layers) > 100 and all(lr.scale > 0 for lr in file.layers.values())
