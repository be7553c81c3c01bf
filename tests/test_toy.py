"""The embedded model: scenes are functions of their seeds, concepts stay out of pretraining,
committed weights keep their promises.
"""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lora_core.formats.model_words import model_placeholders
from toy import autoencoder, distractors, draw, evaluate, fusion, networks, recogniser, sample
from toy.concepts import draw_concepts

ROOT = Path(__file__).parent.parent


def test_scene_and_picture_are_functions_of_the_seed():
    for seed in range(20):
        a, b = draw.scene(seed), draw.scene(seed)
        assert a == b and a.caption() == b.caption()
        assert draw.render_scene(a).tobytes() == draw.render_scene(b).tobytes()


def test_caption_says_what_the_scene_holds():
    for seed in range(300):
        s = draw.scene(seed)
        words = s.caption().split()
        assert s.object in words
        others = set(draw.OBJECTS) - {s.object}
        assert not others & set(words)
        assert set(words) & set(draw.COLORS) <= {s.color, s.background}
        assert s.color != s.background
        complete = s.caption(complete=True)
        assert (
            s.color in complete.split()
            and draw.background_phrase(s.background, s.style) in complete
        )


def test_evaluation_captions_state_what_is_expected():
    pairs = draw.evaluation_captions(140, 3)
    assert len(pairs) == 140
    for caption, expected in pairs:
        for name in ("object", "color"):
            assert expected[name] in caption.split()
        phrase = (
            draw.PLACES[expected["background"]][0]
            if expected["background"] in draw.PLACES
            else expected["background"]
        )
        assert phrase in caption
    counts = {o: sum(e["object"] == o for _, e in pairs) for o in draw.OBJECTS}
    assert max(counts.values()) - min(counts.values()) <= 1


def imported(path: Path) -> set[str]:
    """Dotted names of every module that a file imports anywhere, `from a import b` counted as a and
    a.b.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "__import__") and not called.endswith(
                "import_module"
            ), f"{path}:{node.lineno}: dynamic import"
    return names


def closure(start: str) -> set[str]:
    """Every module of this repository that `start` imports, directly or through others.

    Without lora_core, which imports nothing of toy (test_house.py).
    """
    seen, queue = set(), [start]
    while queue:
        name = queue.pop()
        path = ROOT.joinpath(*name.split("."))
        path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if name in seen or name.split(".")[0] == "lora_core" or not path.exists():
            continue
        seen.add(name)
        queue += [
            *imported(path),
            *(".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)),
        ]
    return seen


@pytest.mark.parametrize("entry", ["toy.draw", "toy.pretrain"])
def test_pretraining_cannot_import_the_concepts_or_the_recogniser(entry):
    reached = closure(entry)
    assert "toy.shapes" in reached
    assert not {
        m
        for m in reached
        if m.startswith(("toy.concepts", "toy.distractors", "toy.recogniser", "toy.evaluate"))
    }


def test_import_closure_would_notice():
    assert "toy.concepts.draw_concepts" in closure("toy.recogniser")


def test_every_grammar_word_is_one_token_and_any_text_survives(tmp_path):
    networks.write_tokenizer(tmp_path)
    tokenizer = networks.load_tokenizer(tmp_path)
    for word in networks.grammar_words():
        if "-" in word:  # CLIP cuts words at hyphens before merging
            continue
        assert len(tokenizer(word).input_ids) == 3, word
    text = "straße zib 漢字 <s1>"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(
        " ", ""
    ) == text.replace(" ", "")
    assert (
        max(len(tokenizer(draw.scene(i).caption(complete=True)).input_ids) for i in range(300))
        <= networks.MAX_TOKENS
    )
    for name in ("vocab.json", "merges.txt"):
        assert (sample.MODEL / "tokenizer" / name).read_text() == (tmp_path / name).read_text()


def test_weights_are_small_and_half_precision():
    files = list(sample.MODEL.rglob("*.safetensors"))
    assert len(files) == 3 and sum(f.stat().st_size for f in files) <= 12e6
    assert recogniser.WEIGHTS.stat().st_size <= 1.5e6
    for path in files:
        with safe_open(path, "pt") as f:
            assert {f.get_slice(k).get_dtype() for k in f.keys()} <= {"F16", "I64"}  # noqa: SIM118


def test_pipeline_loads_and_agrees_with_our_sampler():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(sample.MODEL, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(5 * 100_003))
    theirs = pipe(
        "a large red fish at night",
        latents=noise,
        num_inference_steps=25,
        guidance_scale=5.0,
        output_type="np",
    ).images[0]
    ours = sample.sample_images(sample.load_networks(), ["a large red fish at night"], seed=5)[0]
    np.testing.assert_allclose(theirs, (ours.permute(1, 2, 0).numpy() + 1) / 2, atol=2e-3)


def test_autoencoder_meets_its_bars():
    vae = sample.load_networks()[1]
    assert autoencoder.psnr(vae, autoencoder.held_out_images(48)).mean() >= 30
    for name in draw_concepts.CONCEPTS:
        pictures = [
            draw_concepts.render_concept(name, b, "place" if b in draw.PLACES else "plain", i)
            for i, b in enumerate(draw.BACKGROUNDS)
        ]
        assert autoencoder.psnr(vae, autoencoder.images_to_tensor(pictures)).mean() >= 28


def test_scaled_latents_have_unit_deviation():
    vae = sample.load_networks()[1]
    with torch.no_grad():
        z = (
            vae.encode(autoencoder.held_out_images(64)).latent_dist.mode()
            * vae.config.scaling_factor
        )
    assert abs(z.std().item() - 1) < 0.1


def test_recogniser_reads_held_out_drawings():
    reader = recogniser.load_recogniser()
    scenes = [draw.scene(860_000_000 + i) for i in range(300)]
    read = reader.scene(autoencoder.images_to_tensor([draw.render_scene(s) for s in scenes]))
    for name in ("background", "color", "object"):
        assert np.mean([r == getattr(s, name) for r, s in zip(read[name], scenes)]) >= 0.95


def test_concept_recogniser_is_right_and_strict():
    reader = recogniser.load_recogniser()
    examples = [distractors.concept_example(870_000_000 + i) for i in range(300)]
    pictures = autoencoder.images_to_tensor([picture for picture, _ in examples])
    for name in draw_concepts.CONCEPTS:
        truth = torch.tensor([labels["concept"] == name for _, labels in examples])
        assert ((reader.concept(pictures, name) > 0.5) == truth).float().mean() >= 0.98
        near = autoencoder.images_to_tensor(
            [
                distractors.near_miss(
                    name, b, "place" if b in draw.PLACES else "plain", 880_000_000 + i
                )
                for i, b in enumerate(draw.BACKGROUNDS * 4)
            ]
        )
        assert (reader.concept(near, name) > 0.5).float().mean() <= 0.05
    with pytest.raises(ValueError, match="unknown concept"):
        reader.concept(pictures[:1], "zob")


def test_the_score_of_a_concept_is_high_on_its_drawings_alone():
    drawn = torch.cat([evaluate.concept_images(name, 12) for name in draw_concepts.CONCEPTS])
    scenes = [draw.render_scene(draw.scene(865_000_000 + i)) for i in range(24)]
    others = autoencoder.images_to_tensor(scenes)
    assert evaluate.concept_score(drawn, ["TOK"] * 24).min() > 0.5
    assert evaluate.concept_score(others, ["TOK"] * 24).max() < 0.5
    assert evaluate.concept_score.reads_samples and evaluate.concept_score.higher_is_better


@pytest.mark.parametrize("name", [*draw_concepts.CONCEPTS, "inkwash"])
def test_concept_folder_is_what_the_code_draws(name):
    for i, (picture, caption) in enumerate(draw_concepts.training_set(name)):
        stored = Image.open(draw_concepts.FOLDER / name / f"{i:02d}.png").convert("RGB")
        assert (
            np.abs(np.asarray(stored, int) - np.asarray(picture, int)).max() <= 2
        )  # other builds of Pillow round differently
        assert (draw_concepts.FOLDER / name / f"{i:02d}.txt").read_text().strip() == caption
        assert "TOK" in caption
    assert len(list((draw_concepts.FOLDER / name).glob("*.png"))) == 5


def test_demo_prompts_are_new_contexts():
    for name in draw_concepts.CONCEPTS:
        seen = {background for background, _ in draw_concepts.STATED[name]}
        for prompt, background in draw_concepts.demo_prompts(24, 0, name):
            assert "TOK" in prompt and background not in seen and background in draw.BACKGROUNDS


def test_the_fusion_demo_draws_its_sheet(
    without_plots: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A few steps: every row is there, and the fused model is the one that infer.py draws."""
    scores = fusion.fuse_demo(fusion.FusionOptions(short=True, out=str(tmp_path / "fusion")))
    rows = ["each alone", "summed", "fused", "summed, in regions", "fused, in regions"]
    assert list(scores) == rows and set(scores["fused"]) == {"zib", "trilo"}
    assert set(scores["fused, in regions"]) == {"zib", "trilo", "both"}
    assert Image.open(tmp_path / "fusion" / "fusion.png").height > 700
    words = model_placeholders(tmp_path / "fusion" / "fused")
    assert [word.word for word in words] == ["TOK", "TOK2"] and words[0].layers == 4
    said = capsys.readouterr().out
    assert "--region" in said and "TOK2 at the right" in said
