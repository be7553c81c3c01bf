"""A LoRA in a training loop of your own, loaded by diffusers: python examples/notebook.py"""

from pathlib import Path

import numpy
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import lora_core as lc
from lora_core.diffusion.noise import RandomKeys, add_noise, sample_levels

STEPS = 200
files = sorted(Path("toy/concepts/zib").glob("*.png"))
captions = [file.with_suffix(".txt").read_text().replace("TOK", "zib creature") for file in files]
images = [numpy.array(Image.open(file).convert("RGB").resize((64, 64))) for file in files]
pixels = torch.tensor(numpy.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1  # [b, 3, h, w]

family = lc.load_family("toy/model")
lc.inject(family, lc.AdapterSpec(("all",), rank=8))
optimizer = torch.optim.AdamW(lc.parameters(family), lr=2e-3)
latents, _ = family.encode_images(pixels)  # [b, c, h / 8, w / 8]
text = family.encode_prompts(captions)
for step in range(STEPS):
    keys = RandomKeys(0, tuple(captions), (step,) * len(captions))  # seed, images, visits
    level = sample_levels(family.schedule, keys)  # timestep, alpha, sigma [b]
    eps = keys.normal("noise", tuple(latents.shape[1:]))
    out = family.denoise(add_noise(latents, eps, level), level, text)
    torch.nn.functional.mse_loss(out, eps).backward()
    optimizer.step()
    optimizer.zero_grad()
lc.save(family, "zib.safetensors")

pipe = StableDiffusionPipeline.from_pretrained("toy/model")
pipe.load_lora_weights("zib.safetensors")
pipe("zib creature in a meadow", guidance_scale=4).images[0].save("zib.png")
