"""Apply a run's LoRA and tokens to a loaded model, generate an image, and undo it.

python train.py configs/toy_pti.toml        # or make demo: the run in runs/demo
python examples/patch_model.py
"""

from lora_core import load_family, patch
from lora_core.diffusion.generation import SamplerSettings, generate_images
from lora_core.runs.pictures import to_images

family = load_family("toy/model")
with patch(family, "runs/demo", {"unet": 0.8}) as p:  # denoiser, text encoder and tokens
    prompt = p.bind("a photo of TOK in the desert")
    pixels = generate_images(family, [prompt], [0], SamplerSettings())
to_images(pixels)[0].save("patched.png")  # the model is what it was before
