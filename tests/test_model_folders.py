"""Folders in the diffusers layout as older libraries wrote them."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from lora_core.formats.model_files import join_networks, open_located_networks
from tests.network_locations import FIRST, tensors_of
from tests.refusals import sentence


def test_folders_of_every_age_are_read(tmp_path, model):
    """Other forms of a folder give the same file.

    Shards, .bin, half-precision variants, the VAE's older names, a text_model level, position_ids.
    """
    expected = tensors_of(join_networks(open_located_networks(model, FIRST), FIRST))
    old = tmp_path / "old"
    shutil.copytree(model, old)
    unet = load_file(old / "unet/diffusion_pytorch_model.safetensors")
    names = sorted(unet)
    places = {
        key: f"diffusion_pytorch_model-0000{1 + (i % 2)}-of-00002.safetensors"
        for i, key in enumerate(names)
    }
    for name in set(places.values()):
        save_file({key: unet[key] for key in names if places[key] == name}, old / "unet" / name)
    (old / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": places})
    )
    vae = load_file(old / "vae/diffusion_pytorch_model.safetensors")
    older = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }
    for new, name in older.items():
        vae = {key.replace(new, name): t for key, t in vae.items()}
    torch.save(vae, old / "vae/diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False)
    text = load_file(old / "text_encoder/model.safetensors")
    level = {f"text_model.{key}": t for key, t in text.items()}
    save_file(
        level | {"text_model.embeddings.position_ids": torch.arange(16)[None]},
        old / "text_encoder/model.fp16.safetensors",
    )
    for name in (
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
    ):
        (old / f"{name}.safetensors").unlink()
    ours = tensors_of(join_networks(open_located_networks(old, FIRST), FIRST))
    assert torch.equal(
        ours.pop("cond_stage_model.transformer.text_model.embeddings.position_ids"),
        torch.arange(16)[None],
    )
    assert ours.keys() == expected.keys() and all(
        torch.equal(ours[key], t) for key, t in expected.items()
    )
    places[names[0]] = "../elsewhere.safetensors"
    (old / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": places})
    )
    assert "index.json" in sentence(open_located_networks, old, FIRST)
    shutil.rmtree(old / "vae")
    assert "vae has no weights" in sentence(open_located_networks, old, FIRST[1:])
