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


def run_limited(words, limit):
    """(status, largest anonymous resident memory, seconds of a core) of a process with merge.py.

    It may have `limit` bytes of private memory, mapped files apart.
    """

    def set_limit():
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

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
