"""Images from captions with the toy model, by DDIM and classifier-free guidance.

Song et al., arXiv 2010.02502.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from toy.denoiser_training import Pair, alphas_cumprod, token_ids

MODEL = Path(__file__).parent / "model"


def load_networks(folder: Path = MODEL) -> tuple[Pair, AutoencoderKL, CLIPTokenizer]:
    """Networks in fp32 in evaluation mode, and the tokenizer, from a diffusers folder."""
    # the other way of loading needs accelerate
    whole = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", **whole)
    text = CLIPTextModel.from_pretrained(
        folder / "text_encoder", dtype=torch.float32, trust_remote_code=False
    )
    vae = AutoencoderKL.from_pretrained(folder / "vae", **whole)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    return Pair(unet.eval(), text.eval()), vae.eval(), tokenizer


@torch.no_grad()
def sample_latents(
    pair: Pair, ids: Tensor, empty: Tensor, x: Tensor, *, guidance: float, steps: int
) -> Tensor:
    """Latents after `steps` deterministic DDIM steps from pure noise x [b, c, h, w].

    Leading spacing, offset 1, as in Stable Diffusion.
    """
    alphas, stride = alphas_cumprod(), 1000 // steps
    context = pair.text(input_ids=torch.cat([empty, ids])).last_hidden_state
    for t in range((steps - 1) * stride + 1, 0, -stride):
        both = pair.unet(torch.cat([x, x]), t, encoder_hidden_states=context).sample
        plain, prompted = both.chunk(2)
        eps = plain + guidance * (prompted - plain)
        a, b = alphas[t], alphas[max(t - stride, 0)]
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    return x


def sample_images(
    parts: tuple[Pair, AutoencoderKL, CLIPTokenizer],
    captions: list[str],
    *,
    seed: int,
    guidance: float = 5.0,
    steps: int = 25,
) -> Tensor:
    """Images [b, 3, 64, 64] in [-1, 1].

    Image i depends on (seed, i) and its caption, not on the rest of the batch.
    """
    pair, vae, tokenizer = parts
    noise = []
    for i in range(len(captions)):
        generator = torch.Generator().manual_seed(seed * 100_003 + i)
        noise.append(torch.randn(1, 8, 16, 16, generator=generator))
    out = []
    for i in range(0, len(captions), 25):
        x = torch.cat(noise[i : i + 25])
        ids = token_ids(tokenizer, captions[i : i + 25])
        empty = token_ids(tokenizer, [""] * len(x))
        z = sample_latents(pair, ids, empty, x, guidance=guidance, steps=steps)
        with torch.no_grad():
            out.append(vae.decode(z / vae.config.scaling_factor).sample.clamp(-1, 1))
    return torch.cat(out)
