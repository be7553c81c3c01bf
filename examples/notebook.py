"""A LoRA in a training loop of your own, loaded by diffusers: python examples/notebook.py"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import lora_core as lc
from lora_core.data.images import image_to_pixels, read_image
from lora_core.diffusion.noise import add_noise

files = sorted(Path("toy/concepts/zib").glob("*.png"))
captions = [file.with_suffix(".txt").read_text().replace("TOK", "zib creature") for file in files]
images = [image_to_pixels(read_image(file).image.resize((64, 64))) for file in files]  # in [-1, 1]

family = lc.load_family("toy/model")
lc.inject(family, lc.AdapterSpec(("all",), rank=8))
optimizer = torch.optim.AdamW(lc.parameters(family), lr=2e-3)
latents, _ = family.encode_images(torch.stack(images))  # [b, c, h / 8, w / 8]
text = family.encode_prompts(captions)
for _ in range(200):
    level = family.schedule.level(torch.randint(1000, (len(files),)))  # t, alpha, sigma: [b]
    eps = torch.randn_like(latents)
    out = family.denoise(add_noise(latents, eps, level), level, text)
    torch.nn.functional.mse_loss(out, eps).backward()
    optimizer.step()
    optimizer.zero_grad()
lc.save(family, "zib.safetensors")

pipe = StableDiffusionPipeline.from_pretrained("toy/model")
pipe.load_lora_weights("zib.safetensors")
pipe("zib creature in a meadow", guidance_scale=4).images[0].save("zib.png")
