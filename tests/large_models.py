"""Models of any size with random weights, written a tensor at a time; memory of their merges."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_core.formats.model_folders import network_stem
from lora_core.formats.weights import TensorInfo, Weights, open_weights, write_weights
from tests.tiny_pipeline import pipeline

NETWORKS = ("unet", "vae", "text_encoder")


def save_large_model(folder, widths, layers, *, seed, dtype=torch.float16):
    """Writes a folder in the diffusers layout; returns the bytes of its largest tensor in fp32."""
    blocks = dict(
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    with torch.device("meta"):
        pipe = pipeline(blocks=blocks)
    pipe.save_config(folder)
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    noise = torch.Generator().manual_seed(seed)
    largest = 0
    for name in NETWORKS:
        network = getattr(pipe, name)
        save = network.config.save_pretrained if name == "text_encoder" else network.save_config
        save(folder / name)
        infos = {key: TensorInfo(tuple(t.shape), dtype) for key, t in network.state_dict().items()}
        largest = max(largest, *(4 * torch.Size(info.shape).numel() for info in infos.values()))

        def read(key, infos=infos):
            return torch.empty(infos[key].shape).normal_(0, 0.02, generator=noise).to(dtype)

        weights = Weights(name, infos, read)
        write_weights(folder / name / f"{network_stem(name)}.safetensors", weights, {})
    return largest


def save_loras(folder, count, rank=4):
    """Writes LoRA files with random factors in fp16, under kohya's names, for the attention of
    Stable Diffusion 1.5: the layers that kohya trains. Returns the bytes of one.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    layers = {}
    for path, weight in unet.named_parameters():
        name = path.removesuffix(".weight")
        if name != path and ".attentions." in path and weight.ndim in (2, 4):
            layers[f"lora_unet_{name.replace('.', '_')}"] = weight.shape
    for number in range(count):
        noise = torch.Generator().manual_seed(number)
        tensors = {}
        for name, (out, inner, *kernel) in layers.items():
            shapes = {"up": (out, rank, *kernel), "down": (rank, inner, *kernel)}
            for role, shape in shapes.items():
                factor = torch.empty(shape).normal_(0, 0.02, generator=noise)
                tensors[f"{name}.lora_{role}.weight"] = factor.half()
            tensors[f"{name}.alpha"] = torch.tensor(float(rank))
        save_file(tensors, folder / f"{number:04}.safetensors")
    return (folder / "0000.safetensors").stat().st_size


def cut_into_shards(folder, count):
    """Writes the weights of the UNet of a folder anew, as `count` files and their index."""
    stem = network_stem("unet")
    whole = folder / "unet" / f"{stem}.safetensors"
    weights, places = open_weights(whole), {}
    keys = list(weights.infos)
    for number in range(count):
        name = f"{stem}-{number + 1:05}-of-{count:05}.safetensors"
        own = keys[number::count]
        infos = {key: weights.infos[key] for key in own}
        write_weights(whole.with_name(name), Weights(name, infos, weights.read), {})
        places |= dict.fromkeys(own, name)
    index = {"metadata": {}, "weight_map": places}
    whole.with_name(f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()


class AliveTensors(TorchDispatchMode):
    """The most bytes of tensors that were in memory at once, those of files in it included."""

    def __init__(self):
        super().__init__()
        self.peak, self.known = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.known = {key: own for key, own in self.known.items() if not own[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))
        return result


def run_limited(words, limit, files=1024):
    """(status, largest anonymous resident memory, seconds of a core) of a process with merge.py.

    It may have `limit` bytes of private memory, mapped files apart, and so many open files.
    """

    def set_limit():
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    command = [sys.executable, "merge.py", *map(str, words)]
    most, before = 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, preexec_fn=set_limit, env=environment)
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        most = max(most, 1024 * int(found[1])) if found else most
        time.sleep(0.02)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return process.returncode, most, seconds
