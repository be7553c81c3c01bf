"""merge.py fuse: the written model draws each concept, alone and with the others."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

import infer
from lora_core import formats
from lora_core.adapters.weight_updates import DenseUpdate, scaled_product
from lora_core.formats.layout import Layout
from lora_core.formats.model_folders import open_model_folder, weight_key
from lora_core.formats.model_words import model_placeholders
from lora_core.placeholders import Placeholder
from merging.concept_fusion import Fusion, LayerFit
from merging.fuse import fit_table, shares_kept
from models import load_family
from tests.merge_commands import call, deltas, summed
from tests.norm_files import norm_changes, save_changes
from tests.tiny_pipeline import pipeline

FAST = ("--steps", "2", "--resolution", "16")


def test_a_fused_model_is_drawn_by_the_words_of_all_concepts(
    here: Path, states: dict, layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both runs have the same word and tokens; the model's tokenizer has those of both."""
    second = replace(states["c"], metadata=states["a"].metadata)
    formats.save_run(second, Path("run2"), layout=layout)
    call("fuse", "run", "run2:0.8", "--base", "base", "--out", "fused", *FAST)
    said = capsys.readouterr()
    assert "TOK of run2 is called TOK2 in the result" in said.err
    assert "C1 = run, recorded with 'photo of a TOK', 'TOK'" in said.out
    assert re.search(r"keys, values +8 +12 +\S+ +100.00 %", said.out)
    assert "largest condition number of inputs: " in said.out and "written: fused" in said.out
    assert model_placeholders("fused") == (
        Placeholder("TOK", ("<s1>", "<s2>")),
        Placeholder("TOK2", ("<s1-2>", "<s2-2>")),
    )
    words = ["--model", "fused", "--device", "cpu", "--steps", "1", "--width", "16"]
    words += ["--height", "16", "--guidance", "1", "--prompt", "a TOK and TOK2"]
    assert infer.main([*words, "--out", "x.png"]) == 0
    assert "none of the learned words" not in capsys.readouterr().err
    pipe = StableDiffusionPipeline.from_pretrained("fused", safety_checker=None)
    ids = pipe.tokenizer("<s1><s2-2>", add_special_tokens=False).input_ids
    assert ids == pipe.tokenizer.convert_tokens_to_ids(["<s1>", "<s2-2>"])
    # the words and tokens of a LoRA on top are renamed too
    assert infer.main([*words, "--lora", "run", "--out", "y.png"]) == 0
    said = capsys.readouterr().err
    assert "TOK of run is called TOK3 here" in said and "<s1> of run is called <s1-3>" in said


def test_a_sum_is_the_exact_one(here: Path, states: dict, layout: Layout) -> None:
    call("fuse", "run:0.5", "c.safetensors:unet=0.3,text=2", "summed", "--base", "base", "--how",
         "sum")  # fmt: skip
    found, base = open_model_folder("summed"), open_model_folder("base")
    wished = summed([(0.5, states["a"])])
    for key, update in deltas(states["c"]).items():
        wished[key] = wished.get(key, 0) + (2 if key[0] == "text_encoder" else 0.3) * update
    for (name, path), update in wished.items():
        key = weight_key(base[name], layout, name, path)
        expected = base[name].read(key) + update
        torch.testing.assert_close(found[name].read(key).double(), expected, rtol=0, atol=1e-6)


def test_the_written_weights_are_the_bases_plus_the_fused_updates(
    here: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a DoRA, whose fused update is a matrix, and into a single file."""
    kept: list[Fusion] = []

    def keep(*arguments: object) -> Fusion:
        kept.append(fuse(*arguments))  # type: ignore[arg-type]
        return kept[-1]

    from merging import fuse as command

    fuse = command.fuse_concepts
    monkeypatch.setattr(command, "fuse_concepts", keep)
    prompts = ("--prompts", "a b", "c d")
    call("fuse", "d.safetensors", "b.safetensors", "fused", "--base", "base", *prompts, *FAST)
    found, base = open_model_folder("fused"), open_model_folder("base")
    assert any(isinstance(update, DenseUpdate) for update in kept[0].updates.values())
    for (name, path), update in kept[0].updates.items():
        key = weight_key(base[name], layout, name, path)
        expected = base[name].read(key) + scaled_product(update)
        torch.testing.assert_close(found[name].read(key).double(), expected.double(), atol=1e-6,
                                   rtol=0)  # fmt: skip
    call("fuse", "run", "b.safetensors", "f.safetensors", "--base", "base", "--prompts", "TOK", "c",
         *FAST)  # fmt: skip
    assert Path("f.safetensors").is_file() and Path("f_emb.safetensors").is_file()


def test_a_fused_model_is_made_again_from_its_recipe(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.txt").write_text("a TOK\nTOK in b\n")
    call("fuse", "run:0.7", "b.safetensors", "fused", "--base", "base", "--prompts", "prompts.txt",
         "c d", *FAST)  # fmt: skip
    os.remove("prompts.txt")
    call("redo", "fused")
    said = capsys.readouterr().out
    assert "merge.py fuse --base base run:0.7 b.safetensors --prompts" in said
    assert "the same as before: fused" in said
    recipe = json.loads(Path("fused/lora_core_merge.json").read_text())
    assert recipe["options"]["prompts"] == ["a TOK\nTOK in b", "c d"]
    Path("secret").write_text("a key")
    for option, value in (("prompts", ["secret", "c"]), ("concepts", ["run", "other"])):
        changed = recipe | {"options": recipe["options"] | {option: value}}
        Path("fused/lora_core_merge.json").write_text(json.dumps(changed))
        call("redo", "fused", status=2)
        assert f"reads {value[option == 'concepts']}, which is not among its inputs" in (
            capsys.readouterr().err
        )
    changed = recipe | {"options": recipe["options"] | {"concepts": "run"}}
    Path("fused/lora_core_merge.json").write_text(json.dumps(changed))
    call("redo", "fused", status=2)
    assert "has 'run' as concepts, expected texts" in capsys.readouterr().err


def test_corrected_with_a_strong_pull_is_the_sum(here: Path) -> None:
    """At the smallest pull it is the least-squares fit (tests/test_least_squares.py)."""
    found = {}
    for how, more in {"sum": (), "corrected": ("--pull", "1e9", *FAST)}.items():
        call("fuse", "run", "c.safetensors", f"{how}_out", "--base", "base", "--how", how, *more)
        found[how] = load_family(f"{how}_out").modules["unet"].state_dict()
    for key, value in found["sum"].items():
        torch.testing.assert_close(found["corrected"][key], value, rtol=1e-5, atol=1e-6)


def test_words_of_a_fused_base_stay(here: Path) -> None:
    call("fold", "base", "run", "once")
    assert [own.word for own in model_placeholders("once")] == ["TOK"]
    call("fuse", "run", "b.safetensors", "twice", "--base", "once", "--how", "sum")
    assert model_placeholders("twice") == (
        Placeholder("TOK", ("<s1>", "<s2>")),
        Placeholder("TOK2", ("<s1-2>", "<s2-2>")),
    )


def test_norms_and_biases_are_summed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline()
    save_changes(norm_changes(pipe.unet, pipe.text_encoder), "norms.safetensors")
    call("fuse", "norms.safetensors:0.5", "run", "fused", "--base", "base", "--prompts", "c", "TOK",
         *FAST)  # fmt: skip
    assert "norms and biases are changed too" in capsys.readouterr().out


REFUSED = [
    (("run", "b.safetensors", "o"), "--base is required"),
    (("run", "--out", "o", "--base", "base"), "takes two or more concepts"),
    (("run", "b.safetensors", "--base", "base"), "--out is required"),
    (("run", "b.safetensors", "c.safetensors", "--base", "base"), "c.safetensors is there already"),
    (("run", "b.safetensors", "o", "--base", "a.safetensors"), "not a whole model"),
    (("run", "b.safetensors", "o", "--base", "base"), "b.safetensors has no learned words"),
    (("run", "c.safetensors", "o", "--base", "base", "--ridge", "-1"), "--ridge -1 is not"),
    (("run", "c.safetensors", "o", "--base", "base", "--memory", "0"), "--memory 0 is not"),
    (
        ("run", "c.safetensors", "o", "--base", "base", "--how", "sum", "--steps", "9"),
        "--steps has no effect with --how sum",
    ),
    (
        ("run", "c.safetensors", "o", "--base", "base", "--how", "corrected", "--pull", "0"),
        "--pull 0 is not",
    ),
    (
        ("run", "c.safetensors", "o", "--base", "base", "--pull", "0.2"),
        "--pull has no effect with --how gradient, it belongs to --how corrected",
    ),
    (
        ("run", "c.safetensors", "o", "--base", "base", "--how", "corrected", "--ridge", "0.2"),
        "--ridge has no effect with --how corrected, it belongs to --how gradient",
    ),
    (
        ("run", "c.safetensors", "o", "--base", "base", "--how", "sum", "--prompts", "{}"),
        "--prompts has no effect with --how sum",
    ),
    (("run", "c.safetensors", "o", "--base", "base", "--resolution", "13"), "--resolution 13"),
    (("run", "c.safetensors", "o", "--base", "base", "--resolution", "-16"), "--resolution -16"),
    (("run", "c.safetensors", "a.safetensors/o", "--base", "base"), "not a folder"),
    (
        ("run", "c.safetensors", "base", "--base", "base", "--overwrite"),
        "the output base is the input base, a whole model",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED)
def test_mistakes_are_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str
) -> None:
    call("fuse", *words, status=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence in errors[0]
    assert not Path("o").exists()


def test_a_token_file_that_exists_is_refused_before_anything_is_drawn(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("o_emb.safetensors").write_bytes(b"")
    call("fuse", "run", "c.safetensors", "o.safetensors", "--base", "base", *FAST, status=2)
    said = capsys.readouterr()
    assert "error: o_emb.safetensors is there already" in said.err
    assert "recorded with" not in said.out and not Path("o.safetensors").exists()


def test_concepts_of_different_families_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = {
        "sd1": ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768, 320),
        "xl": ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", 1280, 1280),
    }
    for name, (layer, inner, out) in layers.items():
        factors = {f"{layer}.lora_down.weight": torch.ones(1, inner)}
        factors[f"{layer}.lora_up.weight"] = torch.ones(out, 1)
        save_file(factors, f"{name}.safetensors")
    call("fuse", "sd1.safetensors", "xl.safetensors", "o", "--base", "base", status=2)
    assert capsys.readouterr().err == (
        "error: sd1.safetensors is for Stable Diffusion 1.x and xl.safetensors is for Stable "
        "Diffusion XL; give files of one model\n"
    )


def test_the_table_shows_what_is_kept_by_step() -> None:
    fit = LayerFit(12, 30.0, (0.1, 0.0), (1.0, 3.0), (1.0, 2.0), False)
    none = LayerFit(40, 20.0, (0.0, 0.5), (1.0, 3.0), (0.0, 2.0), False)
    fits = {"x": {("unet", "a"): fit, ("unet", "b"): fit}, "y": {("unet", "c"): none}, "z": {}}
    lines = fit_table(Fusion(fits=fits), 2).splitlines()
    assert lines[1].split() == ["x", "2", "12", "3.0e+01", "90.00", "%", "0.00", "%", "100.00", "%",
                                "-50.00", "%"]  # fmt: skip
    assert len(lines) == 4 and lines[3].endswith("3.0e+01, unet.b")
    assert shares_kept(fits["y"], 0) == (1.0, 1.0)
