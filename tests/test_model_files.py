"""Whole models between the diffusers layout and single files.

Nothing is lost, diffusers reads ours, damage is one sentence.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from lora_core.formats.model_files import (
    NetworkLocation,
    SingleFileFacts,
    describe_single_file,
    join_networks,
    open_located_networks,
    split_networks,
    write_checkpoint_file,
    write_folder_from_single_file,
)
from lora_core.formats.weights import open_weights, weights_in_memory
from tests import tiny_pipeline, tiny_sdxl
from tests.network_locations import FIRST, REFINER, ROWS, SECOND, UNET, VAE, XL, tensors_of
from tests.refusals import sentence
from tests.tiny_sd2 import second_pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (pipeline, its folder); random biases and norms, so that no two tensors are alike."""
    made = {
        "first": tiny_pipeline.pipeline(),
        "second": second_pipeline(),
        "xl": tiny_sdxl.pipeline(),
        "refiner": tiny_sdxl.pipeline(refiner=True),
    }
    found = {}
    for kind, pipe in made.items():
        noise = torch.Generator().manual_seed(5)
        for network in networks(pipe, kind).values():
            for p in network.parameters():
                p.data += 0.1 * torch.randn(p.shape, generator=noise)
        folder = tmp_path_factory.mktemp(kind) / "model"
        pipe.save_pretrained(folder)
        found[kind] = pipe, folder
    return found


def networks(pipe, kind):
    return {row.component: getattr(pipe, row.component) for row in ROWS[kind]}


def shapes_of(pipe, kind):
    return {
        name: {key: tuple(t.shape) for key, t in network.state_dict().items()}
        for name, network in networks(pipe, kind).items()
    }


def files(folder):
    return {
        str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("kind", ROWS)
def test_a_folder_comes_back_bit_identical(tmp_path, models, kind, suffix):
    pipe, folder = models[kind]
    single, back = tmp_path / f"model.{suffix}", tmp_path / "back"
    write_checkpoint_file(open_located_networks(folder, ROWS[kind]), ROWS[kind], single)
    write_folder_from_single_file(single, ROWS[kind], shapes_of(pipe, kind), back, configs=folder)
    assert list(files(back)) == list(files(folder))
    for name, path in files(folder).items():
        if path.suffix != ".safetensors":
            assert (back / name).read_bytes() == path.read_bytes()
            continue
        ours, theirs = load_file(back / name), load_file(path)
        assert set(ours) == set(theirs)
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
        with safe_open(back / name, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    if kind == "first":
        loaded = StableDiffusionPipeline.from_pretrained(back)
        assert all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(tiny_pipeline.outputs(loaded), tiny_pipeline.outputs(pipe))
        )


@pytest.mark.parametrize(
    ("kind", "suffix", "make"),
    [
        ("first", "ckpt", StableDiffusionPipeline),
        ("second", "safetensors", StableDiffusionPipeline),
        ("xl", "safetensors", StableDiffusionXLPipeline),
    ],
)
def test_the_public_reader_loads_ours(tmp_path, models, kind, suffix, make):
    pipe, folder = models[kind]
    single, rows = tmp_path / f"model.{suffix}", ROWS[kind]
    rows = (
        (*rows[:2], replace(rows[2], spare=1)) if kind == "second" else rows
    )  # that reader leaves layer 23 out by name
    write_checkpoint_file(open_located_networks(folder, rows), rows, single)
    extra = {} if kind == "xl" else {"safety_checker": None}
    loaded = make.from_single_file(str(single), config=str(folder), local_files_only=True, **extra)
    for name, network in networks(pipe, kind).items():
        theirs = getattr(loaded, name).state_dict()
        assert set(theirs) == set(network.state_dict())
        assert all(torch.equal(t, network.state_dict()[key]) for key, t in theirs.items()), name
    if kind != "xl":
        for ours, theirs in zip(tiny_pipeline.outputs(pipe), tiny_pipeline.outputs(loaded)):
            assert torch.equal(ours, theirs)


def full_size():
    """(UNet and text encoder of 1.5, of 2.1, VAE) on the meta device."""
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **kinds
        )
        first = (
            UNet2DConditionModel(cross_attention_dim=768),
            CLIPTextModel(CLIPTextConfig(**tiny_sdxl.FULL_CLIP)),
        )
        unet = UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
        )
        tower = CLIPTextConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16
        )
        return first, (unet, CLIPTextModel(tower)), vae


def test_full_size_models_have_the_known_keys():
    """Counts of diffusers' converters (scripts/convert_diffusers_to_original_*).

    They agree key by key and shape by shape.
    """
    first, second, vae = full_size()
    unet, *text = tiny_sdxl.full_size()
    cases = (
        (FIRST, (first[0], vae, first[1]), (686, 248, 196), (4, 768, None, False, ("clip", 768))),
        (
            SECOND,
            (second[0], vae, second[1]),
            (686, 248, 280),
            (4, 1024, None, True, ("open_clip", 1024)),
        ),
        (
            XL,
            (unet, vae, *text),
            (1680, 248, 196, 389),
            (4, 2048, 2816, True, ("clip", 768), ("open_clip", 1280)),
        ),
    )
    known = {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
    }
    for rows, nets, counts, (channels, context, label, linear, *encoders) in cases:
        single = join_networks(
            {
                row.component: weights_in_memory(net.state_dict(), row.component)
                for row, net in zip(rows, nets)
            },
            rows,
        )
        assert (
            tuple(sum(key.startswith(row.prefix) for key in single.infos) for row in rows) == counts
        )
        assert known <= set(single.infos)
        assert single.shapes["first_stage_model.encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
        assert len(single.shapes["model.diffusion_model.middle_block.1.proj_in.weight"]) == (
            2 if linear else 4
        )
        prefixes = [row.prefix for row in rows[2:]]
        assert describe_single_file(single.shapes) == SingleFileFacts(
            channels, context, label, linear, dict(zip(prefixes, encoders)), True, ()
        )
        parts = split_networks(
            single,
            rows,
            {
                row.component: {k: tuple(t.shape) for k, t in net.state_dict().items()}
                for row, net in zip(rows, nets)
            },
        )
        assert {name: part.shapes for name, part in parts.items()} == {
            row.component: {k: tuple(t.shape) for k, t in net.state_dict().items()}
            for row, net in zip(rows, nets)
        }
    tower = "conditioner.embedders.1.model."
    assert single.shapes[f"{tower}transformer.resblocks.31.attn.in_proj_weight"] == (3840, 1280)
    assert {
        f"{tower}text_projection",
        f"{tower}positional_embedding",
        f"{tower}token_embedding.weight",
        f"{tower}ln_final.bias",
    } <= set(single.infos)


def test_rows_are_stacked_in_the_order_q_k_v_and_the_projection_is_turned(models):
    pipe, folder = models["xl"]
    single, text = join_networks(open_located_networks(folder, XL), XL), pipe.text_encoder_2
    attention = text.text_model.encoder.layers[1].self_attn
    fused = single.read("conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight")
    assert torch.equal(
        fused,
        torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
    )
    assert torch.equal(
        single.read("conditioner.embedders.1.model.text_projection"), text.text_projection.weight.T
    )
    q = single.read("first_stage_model.decoder.mid.attn_1.q.weight")
    assert torch.equal(q[:, :, 0, 0], pipe.vae.decoder.mid_block.attentions[0].to_q.weight)


def test_a_changed_model_is_written_through_its_reader(tmp_path, models):
    pipe, folder = models["first"]
    model = open_located_networks(folder, FIRST)
    unet = model["unet"]
    model["unet"] = replace(unet, read=lambda key: unet.read(key) + (key == "conv_in.weight"))
    write_checkpoint_file(model, FIRST, tmp_path / "a.safetensors")
    before, after = (
        tensors_of(join_networks(open_located_networks(folder, FIRST), FIRST)),
        load_file(tmp_path / "a.safetensors"),
    )
    assert [key for key in before if not torch.equal(before[key], after[key])] == [
        "model.diffusion_model.input_blocks.0.0.weight"
    ]
    assert torch.equal(
        after["model.diffusion_model.input_blocks.0.0.weight"], pipe.unet.conv_in.weight + 1
    )


def test_half_precision_and_its_overflow(tmp_path, models):
    _, folder = models["first"]
    model = open_located_networks(folder, FIRST)
    write_checkpoint_file(model, FIRST, tmp_path / "a.safetensors", dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "a.safetensors").values()} == {torch.float16}
    unet = model["unet"]
    model["unet"] = replace(
        unet, read=lambda key: unet.read(key) * (1e6 if key == "conv_in.weight" else 1)
    )
    text = sentence(write_checkpoint_file, model, FIRST, tmp_path / "b.ckpt", dtype=torch.float16)
    assert "input_blocks.0.0.weight" in text and "float16" in text
    assert not (tmp_path / "b.ckpt").exists() and [p.name for p in tmp_path.iterdir()] == [
        "a.safetensors"
    ]


def test_layers_that_readers_build_and_never_run(tmp_path, models, capsys):
    pipe, folder = models["second"]
    rows = (UNET, VAE, replace(SECOND[2], spare=1))
    write_checkpoint_file(open_located_networks(folder, rows), rows, tmp_path / "a.safetensors")
    written = load_file(tmp_path / "a.safetensors")
    head = "cond_stage_model.model.transformer.resblocks."
    assert torch.equal(written[f"{head}23.mlp.c_fc.weight"], written[f"{head}22.mlp.c_fc.weight"])
    assert len([key for key in written if key.startswith(f"{head}23.")]) == 12
    assert f"{head}23" in sentence(
        split_networks, open_weights(tmp_path / "a.safetensors"), SECOND, shapes_of(pipe, "second")
    )
    parts = split_networks(
        open_weights(tmp_path / "a.safetensors"), rows, shapes_of(pipe, "second")
    )
    assert all(
        torch.equal(parts["text_encoder"].read(key), t)
        for key, t in pipe.text_encoder.state_dict().items()
    )
    assert (
        "passed over 12 tensors that no network uses: layers that are never run (12)"
        in capsys.readouterr().out
    )


EXTRA = {
    "model_ema.diffusion_modelinput_blocks00weight": torch.ones(2),
    "model_ema.decay": torch.tensor(0.9),
    "betas": torch.ones(3),
    "alphas_cumprod_prev": torch.ones(3),
    "sqrt_alphas_cumprod": torch.ones(3),
    "sqrt_one_minus_alphas_cumprod": torch.ones(3),
    "logvar": torch.ones(3),
    "log_one_minus_alphas_cumprod": torch.ones(3),
    "sqrt_recipm1_alphas_cumprod": torch.ones(3),
    "posterior_mean_coef1": torch.ones(3),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
    "cond_stage_model.logit_scale": torch.tensor(4.6),
    "first_stage_model.loss.discriminator.main.0.weight": torch.ones(3),
    "lvlb_weights": torch.ones(3),
    "v_pred": torch.empty(0),
}


def test_extras_of_real_checkpoints_are_named_once_and_unknown_keys_refused(
    tmp_path, models, capsys
):
    pipe, folder = models["first"]
    tensors = tensors_of(join_networks(open_located_networks(folder, FIRST), FIRST))
    torch.save(
        {"state_dict": tensors | EXTRA, "epoch": 3, "callbacks": {NetworkLocation: FIRST[0]}},
        tmp_path / "old.ckpt",
    )
    single = open_weights(tmp_path / "old.ckpt")
    assert describe_single_file(single.shapes).markers == ("v_pred",)
    parts = split_networks(single, FIRST, shapes_of(pipe, "first"))
    assert torch.equal(parts["vae"].read("quant_conv.weight"), pipe.vae.quant_conv.weight)
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        f"passed over {len(EXTRA)} tensors" in line
        and "an average of the weights (2)" in line
        and "the noise schedule (9)" in line
    )
    odd = "model.diffusion_model.input_blocks.0.0.wait"
    text = sentence(
        split_networks,
        weights_in_memory(tensors | {odd: torch.ones(1)}, "a file"),
        FIRST,
        shapes_of(pipe, "first"),
    )
    assert (
        "1 unknown key(s)" in text
        and odd in text
        and "model.diffusion_model.input_blocks.0.0.weight" in text
    )
    assert split_networks(single, FIRST, {"unet": shapes_of(pipe, "first")["unet"]}).keys() == {
        "unet"
    }  # others are left alone


def test_other_spellings_are_read(models):
    pipe, folder = models["first"]
    tensors = tensors_of(join_networks(open_located_networks(folder, FIRST), FIRST))
    renamed = {
        key.replace("transformer.text_model.", "transformer."): t for key, t in tensors.items()
    }  # without the level
    flat = {
        key: t[:, :, 0, 0] if "proj_in.weight" in key or "attn_1.q.weight" in key else t
        for key, t in renamed.items()
    }
    parts = split_networks(weights_in_memory(flat, "a file"), FIRST, shapes_of(pipe, "first"))
    for name, network in networks(pipe, "first").items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(parts[name].read(key), tensor) and parts[name].infos[
                key
            ].shape == tuple(tensor.shape)


def test_bad_files_are_one_sentence(tmp_path, models):
    pipe, folder = models["first"]
    shapes, path = shapes_of(pipe, "first"), tmp_path / "a.safetensors"
    tensors = tensors_of(join_networks(open_located_networks(folder, FIRST), FIRST))
    key = "model.diffusion_model.input_blocks.0.0.weight"

    def refused(changed):
        return sentence(split_networks, weights_in_memory(changed, "a file"), FIRST, shapes)

    text = refused({k: t for k, t in tensors.items() if k != key})
    assert "lacks 1 of 208 tensors of unet" in text and key in text
    text = refused(tensors | {key: torch.ones(8, 9, 3, 3)})
    assert key in text and "[8, 9, 3, 3]" in text and "[8, 4, 3, 3]" in text
    assert key in refused(tensors | {key: torch.ones(8, 4, 3, 3, dtype=torch.int8)})
    text = refused(tensors_of(join_networks(open_located_networks(models["xl"][1], XL), XL)))
    assert "family" in text or "config" in text
    text = sentence(
        split_networks, weights_in_memory(tensors, "a file"), XL, shapes_of(models["xl"][0], "xl")
    )
    assert "clip 16 at cond_stage_model.transformer." in text or "config" in text
    text = sentence(
        split_networks,
        weights_in_memory({"lora_unet_x.alpha": torch.ones(1)}, "a file"),
        FIRST,
        shapes,
    )
    assert "no UNet, no VAE, no text encoder" in text
    write_checkpoint_file(open_located_networks(folder, FIRST), FIRST, path)
    data = path.read_bytes()
    for cut in (0, 5, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        assert str(path) in sentence(open_weights, path)
        assert not (tmp_path / "out").exists() and str(path) in sentence(
            write_folder_from_single_file, path, FIRST, shapes, tmp_path / "out", configs=folder
        )
    torch.save([torch.ones(2)], path.with_suffix(".ckpt"))
    assert "no named tensors" in sentence(open_weights, path.with_suffix(".ckpt"))
    assert "does not exist" in sentence(open_weights, tmp_path / "nowhere.safetensors")
    save_file({}, path)
    assert "no tensors" in sentence(open_weights, path)


def test_outputs_are_kept_or_whole(tmp_path, models, monkeypatch):
    pipe, folder = models["first"]
    model, shapes, single, back = (
        open_located_networks(folder, FIRST),
        shapes_of(pipe, "first"),
        tmp_path / "a.ckpt",
        tmp_path / "back",
    )
    write_checkpoint_file(model, FIRST, single)
    before = single.read_bytes()
    assert "--overwrite" in sentence(write_checkpoint_file, model, FIRST, single)
    assert ".safetensors or .ckpt" in sentence(
        write_checkpoint_file, model, FIRST, tmp_path / "a.gguf"
    )
    back.mkdir()
    (back / "mine.txt").write_text("keep me")
    assert "without a model" in sentence(
        write_folder_from_single_file, single, FIRST, shapes, back, configs=folder, overwrite=True
    )
    (back / "model_index.json").write_text("{}")
    assert "--overwrite" in sentence(
        write_folder_from_single_file, single, FIRST, shapes, back, configs=folder
    )
    assert "unet/config.json" in sentence(
        write_folder_from_single_file, single, FIRST, shapes, tmp_path / "c", configs=tmp_path
    )

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        for function, args, settings in (
            (write_checkpoint_file, (model, FIRST, single), {}),
            (write_folder_from_single_file, (single, FIRST, shapes, back), {"configs": folder}),
        ):
            assert "disk is full" in sentence(function, *args, overwrite=True, **settings)
    broken = replace(model["unet"], read=full)
    assert "disk is full" in sentence(
        write_checkpoint_file, model | {"unet": broken}, FIRST, single, overwrite=True
    )
    assert single.read_bytes() == before and (back / "mine.txt").read_text() == "keep me"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "back"]
    write_folder_from_single_file(
        single, FIRST, shapes, back, configs=folder, overwrite=True, dtype=torch.bfloat16
    )
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "back"]
        and not (back / "mine.txt").exists()
    )
    assert (
        load_file(back / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype
        == torch.bfloat16
    )


def test_a_network_without_names_is_refused():
    strange = {"conv_in.weight": torch.ones(1), "encoder_hid_proj.weight": torch.ones(1)}
    assert "encoder_hid_proj.weight" in sentence(
        join_networks, {"unet": weights_in_memory(strange, "here")}, [UNET]
    )
    assert "there is no vae" in sentence(
        join_networks,
        {"unet": weights_in_memory({"conv_in.weight": torch.ones(1)}, "here")},
        [UNET, VAE],
    )
    twice = {
        "add_embedding.linear_1.weight": torch.ones(1),
        "class_embedding.linear_1.weight": torch.ones(1),
    }
    assert "twice" in sentence(join_networks, {"unet": weights_in_memory(twice, "here")}, [UNET])


def test_inpainting_is_seen_in_the_shapes(models):
    pipe = tiny_sdxl.pipeline(channels=9)
    single = join_networks(
        {
            name: weights_in_memory(network.state_dict(), name)
            for name, network in networks(pipe, "xl").items()
        },
        XL,
    )
    facts = describe_single_file(single.shapes)
    assert (facts.channels, facts.context, facts.label, facts.linear) == (9, 40, 60, True)
    assert dict(facts.encoders) == {
        "conditioner.embedders.0.transformer.": ("clip", 16),
        "conditioner.embedders.1.model.": ("open_clip", 24),
    }
    refiner = join_networks(open_located_networks(Path(models["refiner"][1]), REFINER), REFINER)
    assert dict(describe_single_file(refiner.shapes).encoders) == {
        "conditioner.embedders.0.model.": ("open_clip", 24)
    }
