"""A model in one file is the model in its folder: the same numbers, names and noise.

An error in a file is one sentence.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lora_core.family import Sizes
from lora_core.formats.model_files import (
    SingleFileFacts,
    describe_single_file,
    join_networks,
    split_networks,
    write_checkpoint_file,
)
from lora_core.formats.weights import open_weights, weights_in_memory
from models import (
    LoadOptions,
    hub_models,
    load_family,
    read_layout,
    read_schedule,
    save_family,
    single_file,
)
from models.published_configs import published_configs
from models.single_file import convert_to_folder, locate_networks, open_parts, recognize_checkpoint
from tests import tiny_sdxl
from tests.conftest import save_pipeline
from tests.refusals import sentence
from tests.tiny_sd2 import second_pipeline

NAMES = ("first", "inpainting", "second", "xl", "refiner")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> its folder; the single file is next to it."""
    root = tmp_path_factory.mktemp("models")
    save_pipeline(root / "first")
    inpainting = save_pipeline(root / "inpainting")
    config = UNet2DConditionModel.load_config(inpainting / "unet") | {
        "in_channels": 9,
        "_use_default_values": [],
    }
    torch.manual_seed(2)
    UNet2DConditionModel.from_config(config).save_pretrained(inpainting / "unet")
    second_pipeline().save_pretrained(root / "second")
    tiny_sdxl.save(root / "xl")
    tiny_sdxl.save(root / "refiner", refiner=True)
    for name in NAMES:
        save_single_file(str(root / name), root / f"{name}.safetensors")
    return {name: root / name for name in NAMES}


def save_single_file(model, path, config="", **options):
    """Writes a model (a folder, a hub id, a single file) as one .safetensors or .ckpt."""
    weights, locations = open_parts(model, config)
    write_checkpoint_file(weights, locations, path, **options)


def file(folder):
    return str(folder.with_suffix(".safetensors"))


def outputs(family):
    """Everything that a family computes, for one fixed input."""
    noise, (c, side) = torch.Generator().manual_seed(3), (family.latent_channels, 8)
    dtype = family.modules["unet"].dtype
    x = torch.randn(2, c, side, side, generator=noise).to(dtype)
    pixels = torch.rand(1, 3, side * family.factor, side * family.factor, generator=noise) * 2 - 1
    inpaint = (
        torch.randn(2, 1 + c, side, side, generator=noise).to(dtype) if family.inpainting else None
    )
    level = family.schedule.level(torch.tensor([3, 700]))
    with torch.no_grad():
        cond = family.encode_prompts(["a cat", "dog"])
        told = family.add_size_embeddings(cond, Sizes([(8, 8)] * 2, [(0, 0)] * 2, (8, 8)), 1.0)
        return [
            cond.prompt_embeds,
            *cond.extra.values(),
            family.denoise(x, level, told, inpaint),
            *family.encode_images(pixels),
            family.decode(x.float()),
        ]


@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, "safetensors") for name in NAMES), ("second", "ckpt")]
)
def test_a_file_is_its_folder(tmp_path, models, name, suffix):
    path = tmp_path / f"model.{suffix}"
    save_single_file(str(models[name]), path)
    ours, theirs = (
        load_family(str(path), LoadOptions(config=str(models[name]))),
        load_family(str(models[name])),
    )
    assert all(torch.equal(a, b) for a, b in zip(outputs(ours), outputs(theirs), strict=True))
    for field in (
        "name",
        "pipeline",
        "prediction",
        "spacing",
        "offset",
        "factor",
        "multiple",
        "resolution",
        "inpainting",
        "layout",
        "clip_skip",
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert type(ours) is type(theirs) and ours.modules.keys() == theirs.modules.keys()
    for key, module in ours.modules.items():
        assert not module.training and not any(p.requires_grad for p in module.parameters())
        assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))
        spaces = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in module.state_dict().values()
        }
        assert sum(spaces.values()) == sum(t.nbytes for t in module.state_dict().values()), (
            key
        )  # no tensor keeps a larger one alive
        for p in module.parameters():
            p.data.add_(1)  # in memory of its own
    again = load_family(str(path), LoadOptions(config=str(models[name])))
    assert all(torch.equal(a, b) for a, b in zip(outputs(again), outputs(theirs), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_outline_and_noise_are_the_folders(models, name):
    path, config = file(models[name]), str(models[name])
    assert read_layout(path, config) == read_layout(config)
    for changes in ({}, {"prediction_type": "v_prediction"}):
        (ours, row), (theirs, expected) = (
            read_schedule(path, changes, config=config),
            read_schedule(config, changes),
        )
        assert row == expected and torch.equal(
            ours.level(torch.arange(1000)).sigma, theirs.level(torch.arange(1000)).sigma
        )


def test_precision_another_vae_and_clip_skip(models):
    path, config = file(models["xl"]), str(models["xl"])
    how = LoadOptions(dtype=torch.bfloat16, vae=config + "/vae", clip_skip=1)
    ours, theirs = load_family(path, replace(how, config=config)), load_family(config, how)
    assert {name: module.dtype for name, module in ours.modules.items()} == {
        name: module.dtype for name, module in theirs.modules.items()
    }
    assert (
        ours.modules["unet"].dtype == torch.bfloat16
        and ours.modules["vae"].dtype == torch.float32
        and ours.clip_skip == 1
    )
    assert all(torch.equal(a, b) for a, b in zip(outputs(ours), outputs(theirs), strict=True))


def test_a_file_without_a_vae_takes_another(tmp_path, models):
    config = str(models["first"])
    tensors = {
        key: tensor
        for key, tensor in load_file(file(models["first"])).items()
        if not key.startswith("first_stage_model.")
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert (
        "no vae at first_stage_model."
        in (
            text := sentence(
                load_family, str(tmp_path / "a.safetensors"), LoadOptions(config=config)
            )
        )
        and "--vae" in text
    )
    ours = load_family(
        str(tmp_path / "a.safetensors"), LoadOptions(config=config, vae=config + "/vae")
    )
    assert all(
        torch.equal(a, b) for a, b in zip(outputs(ours), outputs(load_family(config)), strict=True)
    )


def marked(tmp_path, folder, *names):
    save_file(
        load_file(file(folder)) | {name: torch.empty(0) for name in names},
        tmp_path / "marked.safetensors",
    )
    return str(tmp_path / "marked.safetensors")


def test_markers_tell_the_prediction(tmp_path, models, capsys):
    config = str(models["xl"])
    path = marked(tmp_path, models["xl"], "v_pred", "ztsnr")
    family = load_family(path, LoadOptions(config=config))
    assert (family.prediction, family.spacing) == (
        "v_prediction",
        "trailing",
    ) and family.schedule.level(torch.tensor([999])).alpha.item() == 0
    assert "prediction_type = v_prediction" in capsys.readouterr().err
    assert (
        read_schedule(path, {}, config=config)[1] == "v_prediction"
        and read_schedule(path, {"prediction_type": "epsilon"}, config=config)[1] == "epsilon"
    )
    assert (
        load_family(
            path, LoadOptions(config=config, scheduler={"prediction_type": "epsilon"})
        ).prediction
        == "epsilon"
    )
    assert "edm_mean" in sentence(
        load_family, marked(tmp_path, models["xl"], "edm_mean", "edm_std")
    )
    tiny_sdxl.save(tmp_path / "edm", scheduler="edm")
    save_single_file(str(tmp_path / "edm"), tmp_path / "edm.safetensors")
    path = marked(tmp_path, tmp_path / "edm", "edm_mean", "edm_std")
    assert load_family(path, LoadOptions(config=str(tmp_path / "edm"))).prediction == "edm"
    assert "edm_vpred.sigma_max" in sentence(
        load_family,
        marked(tmp_path, tmp_path / "edm", "edm_vpred.sigma_max"),
        LoadOptions(config=str(tmp_path / "edm")),
    )


@pytest.mark.parametrize("name", ["first", "second", "xl"])
def test_to_a_folder_and_back(tmp_path, models, name):
    convert_to_folder(file(models[name]), tmp_path / "back", str(models[name]))
    ours, theirs = load_family(str(tmp_path / "back")), load_family(str(models[name]))
    assert all(torch.equal(a, b) for a, b in zip(outputs(ours), outputs(theirs), strict=True))
    save_single_file(
        file(models[name]), tmp_path / "again.safetensors", config=str(models[name])
    )  # from a file to a file
    before, after = (
        load_file(path) for path in (file(models[name]), tmp_path / "again.safetensors")
    )
    assert before.keys() == after.keys() and all(
        torch.equal(after[key], tensor) for key, tensor in before.items()
    )


def test_a_changed_family_is_saved_as_a_folder(tmp_path, models):
    path, config = file(models["xl"]), str(models["xl"])
    family = load_family(path, LoadOptions(config=config))
    state = {key: tensor + 1 for key, tensor in family.modules["unet"].state_dict().items()}
    save_family(family, path, tmp_path / "model", {"unet": state}, config)
    back = load_family(str(tmp_path / "model"))
    assert all(
        torch.equal(tensor, state[key]) for key, tensor in back.modules["unet"].state_dict().items()
    )
    assert torch.equal(
        back.encode_prompts(["a"]).prompt_embeds, family.encode_prompts(["a"]).prompt_embeds
    )


# ---------------------------------------------------------------- published models, without weights


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("sd1", 1130),
        ("sd1-inpainting", 1130),
        ("sd2", 686 + 248 + 280),
        ("sd2-v", 686 + 248 + 280),
        ("sd2-inpainting", 686 + 248 + 280),
        ("sdxl", 2513),
        ("sdxl-inpainting", 2513),
        ("sdxl-refiner", None),
    ],
)
def test_full_size_key_lists(tmp_path, kind, counts):
    """The keys of a published file name their kind.

    Every one of them has its place in the networks of the known configs.
    """
    rows = locate_networks(published_configs(kind))
    modules = single_file.build_meta_networks(published_configs(kind), rows)
    whole = join_networks(
        {name: weights_in_memory(module.state_dict(), name) for name, module in modules.items()},
        tuple(replace(row, spare=0) for row in rows),
    )
    assert counts in (None, len(whole.infos))
    facts = describe_single_file(whole.shapes)
    assert single_file.recognize_checkpoint(facts, "a", v=kind == "sd2-v") == kind and set(
        facts.encoders
    ) == {row.prefix for row in rows[2:]}
    parts = split_networks(
        whole,
        rows,
        {
            name: {key: tuple(t.shape) for key, t in module.state_dict().items()}
            for name, module in modules.items()
        },
    )
    assert {name: part.shapes for name, part in parts.items()} == {
        n: {k: tuple(t.shape) for k, t in m.state_dict().items()} for n, m in modules.items()
    }


def test_published_models_need_no_config(tmp_path, monkeypatch, models, capsys):
    """A tiny file in the place of a published one.

    Its configs and its tokenizers, which the hub's cache has, are found.
    """
    calls = []
    load = single_file.CLIPTokenizer.from_pretrained

    def cached(source, **settings):
        calls.append((source, settings))
        return load(models[name] / "tokenizer")

    monkeypatch.setattr(single_file.CLIPTokenizer, "from_pretrained", cached)
    bare = {}
    for name in ("xl", "first", "second"):
        bare[name] = shutil.copytree(
            models[name],
            tmp_path / name,
            ignore=shutil.ignore_patterns("tokenizer*", "*.safetensors"),
        )
    kinds = {"xl": "sdxl", "first": "sd1", "second": "sd2"}
    for name, kind in kinds.items():
        monkeypatch.setattr(
            single_file,
            "recognize_checkpoint",
            lambda facts, source, v=False, kind=kind: "sd2-v" if v and kind == "sd2" else kind,
        )
        monkeypatch.setattr(single_file, "published_configs", lambda kind, name=name: bare[name])
        assert load_family(file(models[name])).pipeline.startswith("StableDiffusion")
        assert [settings["pad_token"] for _, settings in calls] == {
            "xl": ["<|endoftext|>", "!"],
            "first": ["<|endoftext|>"],
            "second": ["!"],
        }[name]
        assert all(
            settings["local_files_only"] and settings["model_max_length"] == 16
            for _, settings in calls
        )
        assert ("may be a 512 model" in capsys.readouterr().err) == (name == "second")
        assert read_layout(file(models[name])) == read_layout(str(models[name]))
        convert_to_folder(file(models[name]), tmp_path / f"{name}-folder")
        calls.clear()
    assert {"tokenizer", "tokenizer_2"} <= {
        path.name for path in (tmp_path / "xl-folder").iterdir()
    }


def test_without_a_tokenizer_it_is_said(tmp_path, monkeypatch, models):
    def nothing(*args, **settings):
        raise OSError("offline\nand more")

    bare = shutil.copytree(
        models["first"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")
    )
    monkeypatch.setattr(single_file.CLIPTokenizer, "from_pretrained", nothing)
    text = sentence(load_family, file(models["first"]), LoadOptions(config=str(bare)))
    assert "openai/clip-vit-large-patch14 (offline)" in text and "--model-config" in text


# ---------------------------------------------------------------- bad input


def test_wrong_files_are_one_sentence(tmp_path, models):
    first, xl = file(models["first"]), file(models["xl"])
    text = sentence(load_family, first)
    assert first in text and "context 16" in text and "--model-config" in text
    text = sentence(load_family, first, LoadOptions(config=str(models["xl"])))
    assert "text_encoder" in text and first in text
    assert xl in sentence(load_family, xl, LoadOptions(config=str(models["first"])))
    assert "family or for another config" in sentence(
        load_family, file(models["inpainting"]), LoadOptions(config=str(models["first"]))
    )
    assert "text_encoder" in sentence(load_family, first, LoadOptions(config=str(models["second"])))
    assert "nowhere.safetensors does not exist" in sentence(
        load_family, str(tmp_path / "nowhere.safetensors")
    )
    assert "nowhere.ckpt does not exist" in sentence(read_layout, str(tmp_path / "nowhere.ckpt"))
    data = Path(first).read_bytes()
    for cut in (0, 5, 300, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:cut])
        assert "cut.safetensors" in sentence(
            load_family, str(tmp_path / "cut.safetensors"), LoadOptions(config=str(models["first"]))
        )
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    assert "--lora" in sentence(load_family, str(tmp_path / "lora.safetensors"))
    save_file(
        {"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "flux.safetensors"
    )
    assert "Flux" in sentence(load_family, str(tmp_path / "flux.safetensors"))
    tensors = load_file(first)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(
        {k: t for k, t in tensors.items() if k != "model.diffusion_model.out.2.bias"},
        tmp_path / "less.safetensors",
    )
    assert "lacks 1 of" in sentence(
        load_family, str(tmp_path / "less.safetensors"), LoadOptions(config=str(models["first"]))
    )
    text_less = {k: t for k, t in tensors.items() if not k.startswith("cond_stage_model.")}
    save_file(text_less, tmp_path / "less.safetensors")
    assert "no text_encoder" in sentence(
        load_family, str(tmp_path / "less.safetensors"), LoadOptions(config=str(models["first"]))
    )
    save_file(tensors | {key: tensors[key] * 1e6}, tmp_path / "huge.safetensors")
    half = LoadOptions(config=str(models["first"]), dtype=torch.float16)
    assert (
        "conv_in.weight"
        in (text := sentence(load_family, str(tmp_path / "huge.safetensors"), half))
        and "float16" in text
    )


def test_settings_without_effect_are_refused(tmp_path, models):
    config = str(models["first"])
    assert "--model-config" in sentence(load_family, config, LoadOptions(config=config))
    assert "--model-config" in sentence(
        read_layout, config, config
    ) and "--model-config" in sentence(read_schedule, config, {}, 0, config)
    assert "--max-sequence-length" in sentence(
        load_family, file(models["first"]), LoadOptions(config=config, max_sequence_length=64)
    )
    assert "--clip-skip" in sentence(
        load_family, file(models["first"]), LoadOptions(config=config, clip_skip=9)
    )
    assert "unet/config.json" in sentence(
        load_family,
        file(models["first"]),
        LoadOptions(
            config=str(
                shutil.copytree(config, tmp_path / "c", ignore=shutil.ignore_patterns("unet"))
            )
        ),
    )
    flux = tmp_path / "flux"
    flux.mkdir()
    shutil.copy(published_configs("flux-dev") / "model_index.json", flux)
    assert "FluxPipeline" in sentence(locate_networks, flux)


def test_half_precision_and_existing_outputs(tmp_path, models):
    path = tmp_path / "half.ckpt"
    save_single_file(str(models["first"]), path, dtype=torch.float16)
    assert {info.dtype for info in open_weights(path).infos.values()} == {torch.float16}
    family = load_family(str(path), LoadOptions(config=str(models["first"])))
    assert family.modules["unet"].dtype == torch.float32
    assert "--overwrite" in sentence(save_single_file, str(models["first"]), path)
    assert "--overwrite" in sentence(
        convert_to_folder, file(models["first"]), models["first"], str(models["first"])
    )
    load_family(str(models["first"]))  # the folder is as it was


def test_configs_and_models_of_the_hub(tmp_path, models, monkeypatch):
    wanted = []
    root = models["first"]

    def list_files(self, name):
        return [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]

    def snapshot(name, allow_patterns):
        weights = [pattern for pattern in allow_patterns if pattern.endswith(".safetensors")]
        wanted.append((name, weights))
        if name != "someone/tiny":
            raise OSError("no such repository")
        return str(root)

    monkeypatch.setattr(hub_models, "snapshot_download", snapshot)
    monkeypatch.setattr(hub_models.HfApi, "list_repo_files", list_files)
    ours = load_family(file(models["first"]), LoadOptions(config="someone/tiny"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(outputs(ours), outputs(load_family(str(models["first"]))), strict=True)
    )
    save_single_file("someone/tiny", tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == load_file(file(models["first"])).keys()
    (_, configs), (name, weights) = wanted
    assert name == "someone/tiny" and not configs
    assert set(weights) == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert "no such repository" in sentence(
        load_family, file(models["first"]), LoadOptions(config="someone/other")
    )


def test_checkpoints_are_told_by_their_widths():
    def facts(channels, context, label=None):
        return SingleFileFacts(channels, context, label, True, {}, True, ())

    expected = {
        (4, 768, None): "sd1",
        (9, 768, None): "sd1-inpainting",
        (4, 1024, None): "sd2",
        (9, 1024, None): "sd2-inpainting",
        (4, 2048, 2816): "sdxl",
        (9, 2048, 2816): "sdxl-inpainting",
        (4, 1280, 2560): "sdxl-refiner",
    }
    assert {key: recognize_checkpoint(facts(*key), "a") for key in expected} == expected
    assert (
        recognize_checkpoint(facts(4, 1024), "a", v=True) == "sd2-v"
        and recognize_checkpoint(facts(4, 768), "a", v=True) == "sd1"
    )
    for key in ((8, 768), (5, 1024), (4, 1024, 1024), (4, 40, 60), (None, None)):
        text = sentence(recognize_checkpoint, facts(*key), "a.ckpt")
        assert "a.ckpt" in text and "--model-config" in text and "Flux" not in text
