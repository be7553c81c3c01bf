"""Files of a few training steps on the embedded model: others get the same output and update.

Native and kohya's files are read by diffusers' own pipeline; cloneofsimo's, which nothing else
reads today, are read back.
"""

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.nn import functional as F

import infer
import merge
import train
from lora_core import formats, patch
from lora_core.adapters import injection
from lora_core.adapters.injection import AdapterSpec
from lora_core.adapters.weight_updates import AdapterState, scaled_product
from lora_core.config import Config, OptimizerConfig, Stage
from lora_core.errors import UserError
from models import read_layout
from tests.conftest import final, same

MODEL = Path(__file__).parent.parent / "toy" / "model"
EVERYWHERE = (
    "attentions.*.to_*",
    "attentions.*.proj*",
    "attentions.*.net.*",
    "resnets.*.conv*",
    "time_emb_proj",
)
PLACES = {  # format -> layers that it can hold in files that others read, for a LoRA
    "diffusers": EVERYWHERE,
    "kohya": EVERYWHERE,
    "cloneofsimo": ("attentions.*.to_*", "attentions.*.net.0.proj"),
}
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
STEPS, RATE = 8, 5e-3


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(
        MODEL, safety_checker=None, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def layout():
    return read_layout(str(MODEL))


def modules(pipe):
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}


def batch(pipe):
    """Latents, noise levels and the embeddings of two captions, always the same."""
    size, generator = pipe.unet.config.sample_size, torch.Generator().manual_seed(5)
    latents = torch.randn(2, pipe.unet.config.in_channels, size, size, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    levels = torch.tensor([200, 700])
    ids = pipe.tokenizer(
        ["a red cat", "a dog"], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return latents, noise, levels, ids


def output(pipe):
    latents, noise, levels, ids = batch(pipe)
    with torch.no_grad():
        return pipe.unet(
            pipe.scheduler.add_noise(latents, noise, levels), levels, pipe.text_encoder(ids)[0]
        ).sample


def trained(pipe, layout, kind, places):
    """A state of UNet and text encoder after a few steps towards the opposite of the noise."""
    found = {"unet": places, "text_encoder": TEXT}
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    try:
        for i, (name, net) in enumerate(networks.items()):
            injection.inject(
                net.requires_grad_(False),
                AdapterSpec(targets=found[name], kind=kind, rank=3, alpha=6.0),
                seed=i,
            )
        wanted = []
        for net in networks.values():
            wanted += injection.adapter_parameters(net)
        optimizer = torch.optim.AdamW(wanted, lr=RATE)
        latents, noise, levels, ids = batch(pipe)
        for _ in range(STEPS):
            prediction = pipe.unet(
                pipe.scheduler.add_noise(latents, noise, levels), levels, pipe.text_encoder(ids)[0]
            ).sample
            F.mse_loss(prediction, -noise).backward()
            optimizer.step()
            optimizer.zero_grad()
        names = {
            name: {path: layout.published(name, path) for path in injection.adapter_factors(net)}
            for name, net in networks.items()
        }
        components = {
            name: {names[name][path]: lr for path, lr in injection.adapter_factors(net).items()}
            for name, net in networks.items()
        }
        return AdapterState(components)
    finally:
        for net in networks.values():
            injection.remove(net)


@pytest.fixture(scope="module")
def states(pipe, layout):
    return {
        "diffusers": trained(pipe, layout, "lora", PLACES["diffusers"]),
        "kohya": trained(pipe, layout, "lora", PLACES["kohya"]),
        "cloneofsimo": trained(pipe, layout, "lora", PLACES["cloneofsimo"]),
        "dora": trained(pipe, layout, "dora", PLACES["diffusers"]),
    }


def ours(pipe, layout, file):
    """Our output with a file, and how far it is from the model's own."""
    plain = output(pipe)
    with patch(modules(pipe), file, layout=layout):
        patched = output(pipe)
    assert torch.equal(output(pipe), plain)
    assert (patched - plain).abs().max() > 0.1  # training has moved the model
    return patched


def theirs(pipe, file):
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    try:
        return output(pipe)
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize(
    ("kind", "format"), [("diffusers", "diffusers"), ("kohya", "kohya"), ("dora", "diffusers")]
)
def test_diffusers_computes_what_we_compute(pipe, layout, states, tmp_path, kind, format):
    file = tmp_path / "trained.safetensors"
    formats.save(states[kind], file, format=format, layout=layout)
    assert (theirs(pipe, file) - ours(pipe, layout, file)).abs().max() <= 1e-5


@pytest.mark.parametrize("format", ["diffusers", "kohya", "cloneofsimo"])
def test_every_format_has_the_same_update(layout, states, tmp_path, format):
    state, file = states["cloneofsimo"], tmp_path / "trained.safetensors"
    formats.save(state, file, format=format, layout=layout)
    read = formats.load(file, layout)
    assert {name: set(part) for name, part in read.components.items()} == {
        name: set(part) for name, part in state.components.items()
    }
    for name, part in state.components.items():
        for path, lr in part.items():
            assert (
                scaled_product(read.components[name][path]) - scaled_product(lr)
            ).abs().max() <= 1e-6, path


def test_cloneofsimos_file_computes_the_same(pipe, layout, states, tmp_path):
    files = [tmp_path / f"{format}.safetensors" for format in PLACES]
    for format, file in zip(PLACES, files, strict=True):
        formats.save(states["cloneofsimo"], file, format=format, layout=layout)
    native, *others = (ours(pipe, layout, file) for file in files)
    assert all((other - native).abs().max() <= 1e-5 for other in others)
    assert (theirs(pipe, files[0]) - native).abs().max() <= 1e-5


def test_a_dora_is_no_cloneofsimo_file(layout, states, tmp_path):
    with pytest.raises(UserError, match="DoRA"):
        formats.save(
            states["dora"], tmp_path / "trained.safetensors", format="cloneofsimo", layout=layout
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_a_run_of_lycoris_kinds_is_resumed_and_read_everywhere(
    config: Config, quick: None, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = replace(
        config,
        adapter=replace(config.adapter, kind=kind, rank=1, dropout=0.1),
        optimizer=OptimizerConfig(lr={"denoiser": 0.3, "text_encoder": 0.3}),
        stages=(Stage(4, ("denoiser", "text_encoder")),),
    )
    run = train.train(own)
    said = f"the run writes run.safetensors, under LyCORIS' names; diffusers' file {formats.NATIVE}"
    assert said in capsys.readouterr().out and not (run / formats.NATIVE).exists()
    card = (run / "README.md").read_text()
    assert "A LyCORIS adapter (run.safetensors)" in card and "load_lora_weights" not in card
    assert f"| adapter | {kind}, rank 1, alpha 1 |" in card
    step = formats.load(run / "checkpoints" / "4", read_layout(config.model))
    state = formats.load(run, read_layout(config.model))
    assert state.dense.keys() == {"unet", "text_encoder"} and not state.components
    for name, updates in state.dense.items():
        for path, update in updates.items():
            saved = step.dense[name][path].tensors
            assert all(torch.equal(saved[role], own) for role, own in update.tensors.items())
    if kind == "lokr":  # a LoHa is resumed and drawn by the same code
        part = replace(own, out=config.out + "part", stages=(Stage(2, own.stages[0].groups),))
        train.train(part)
        assert same(final(train.train(replace(own, out=part.out, resume=True))), final(run))
        images_agree(run, config.model, tmp_path)


def images_agree(run: Path, model: str, folder: Path) -> None:
    """Images with a run's adapter are those of the model that it is folded into."""
    assert merge.main(["fold", model, str(run), str(folder / "folded")]) == 0
    images = []
    for words in (["--model", folder / "folded"], ["--model", model, "--lora", run],
                  ["--model", model]):  # fmt: skip
        out = folder / f"{len(images)}.png"
        drawn = [*words, "--prompt", "a", "--steps", "2", "--out", out]
        assert infer.main([str(word) for word in drawn]) == 0
        images.append(numpy.asarray(Image.open(out)).astype(int))
    folded, applied, plain = images
    assert abs(folded - applied).max() <= 2 < abs(folded - plain).max()


@pytest.mark.parametrize("option", ["alpha", "rslora"])
def test_a_scale_that_no_lokr_has_is_refused(config: Config, quick: None, option: str) -> None:
    adapter = replace(config.adapter, kind="lokr", rank=10_000, **{option: 2})
    with pytest.raises(
        UserError, match=rf"--adapter.{option} has no effect: every LoKr has a whole"
    ):
        train.train(replace(config, adapter=adapter))
