"""Benchmark of merging: the sum of two adapters of rank r, compressed to rank r, in factor space,
through the dense matrix and by peft; then a whole network's file.

    python -m benchmarks.merge [--threads 2] [--quick] [--json FILE]

`ours` is svd.compress_adapter(concat(...)), which takes one thread whatever is set. `dense` forms B
A of both and takes torch.linalg.svd, as sd-scripts' svd_merge_lora.py does, without its 99 % clamp.
`peft` is add_weighted_adapter(combination_type="svd") on a model of that one layer. Both get the
thin SVD, which neither takes by default, so both are faster here than for their users. All fp32,
the three take turns, figures are medians ("best" is dense / ours of the fastest rounds); the error
is measured in fp64 on the dense sum, as excess over the optimum (the truncated fp64 singular
values). The whole file: 722 Linear layers of SDXL's attention blocks at rank 32 in fp16, two of
them read, mixed, compressed to rank 32 and written, in its own process so that its peak memory is
known. On a busy machine use --threads 1, which also favors the peers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import timing
from lora_core.adapters.weight_updates import AdapterState, LowRank, scaled_product
from lora_core.errors import quiet_status
from merging.adapter_sums import Term, mix_layers
from merging.factor_sums import concat_factors, one_thread
from merging.svd import compress_adapter, singular_values
from merging.truncation import Keep, total_report

Contender = Callable[[list[LowRank], int], tuple[Tensor, Tensor]]
WEIGHTS = (0.7, 0.3)
RANKS = (4, 16, 32, 64, 128)
SQUARE_LAYERS = {f"attention {n} x {n}": (n, n) for n in (320, 640, 1280)}
OTHER_LAYERS = {  # of the 1.5 and XL networks: keys of cross attention, feed-forward, convolutions
    "keys 1280 x 768": (1280, 768),
    "keys 1280 x 2048": (1280, 2048),
    "ff 5120 x 640": (5120, 640),
    "ff 640 x 2560": (640, 2560),
    "ff 10240 x 1280": (10240, 1280),
    "ff 1280 x 5120": (1280, 5120),
    "conv 320 x 320 x 3 x 3": (320, 320, 3, 3),
    "conv 640 x 640 x 3 x 3": (640, 640, 3, 3),
    "conv 1280 x 1280 x 3 x 3": (1280, 1280, 3, 3),
}
SDXL_UNET = {  # config.json of stabilityai/stable-diffusion-xl-base-1.0, unet
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FILE_RANK = 32
MINIMUM_SECONDS = 0.05  # seconds that a contender runs in a round
SLOW_SECONDS = 2.0  # seconds of a dense SVD from which three rounds have to do instead of five


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merge", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="square layers at rank 16 and the whole file"
    )
    parser.add_argument("--json", type=Path, help="file for all the numbers")
    # set in the process that time_whole_file starts
    parser.add_argument("--whole", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.whole:
        print(json.dumps(merge_files(*args.whole)))
        return
    cases = list(itertools.product(SQUARE_LAYERS.items(), (16,) if args.quick else RANKS))
    if not args.quick:
        cases += itertools.product(OTHER_LAYERS.items(), (16, 64))
    machine = timing.describe_machine()
    print(f"{machine}; milliseconds are medians")
    heads = "".join(
        f"{head:>11}"
        for head in ("ours ms", "dense ms", "peft ms", "dense/ours", "peft/ours", "(best)")
    )
    print(f"{'layer':26}{'rank':>5}{heads}   excess error ours, dense, peft")
    rows = [report_case(*layer, rank, rounds=5) for layer, rank in cases]
    whole = time_whole_file(args.threads)
    if args.json:
        timing.write_json(
            args.json, {"machine": machine, "threads": args.threads, "layers": rows, "whole": whole}
        )


def report_case(name: str, shape: tuple[int, ...], rank: int, *, rounds: int) -> dict[str, Any]:
    """Measure one layer shape and rank; prints and returns the row of the table."""
    adapters = [synthetic_adapter(shape, rank, seed) for seed in (0, 1)]
    exact = concat_factors(
        [
            (weight, LowRank(lr.down.double(), lr.up.double(), lr.scale))
            for weight, lr in zip(WEIGHTS, adapters)
        ]
    )
    wished = scaled_product(exact).flatten(1)
    best = float(singular_values(exact)[:, rank:].norm())
    contenders: dict[str, Contender] = {
        "ours": merge_in_factor_space,
        "dense": merge_dense,
        "peft": Peft(adapters),
    }
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    excess = {}
    for key, merge in contenders.items():  # untimed: memory, threads, and the error
        start = time.perf_counter()
        up, down = merge(adapters, rank)
        if key == "dense" and time.perf_counter() - start > SLOW_SECONDS:
            rounds = 3
        excess[key] = float((up.double() @ down.double() - wished).norm()) / best - 1
    for _ in range(rounds):
        for key, merge in contenders.items():
            seconds[key].append(time_call(partial(merge, adapters, rank)))
    ms = {key: 1e3 * statistics.median(values) for key, values in seconds.items()}
    errors = ", ".join(f"{value:.0e}" for value in excess.values())
    figures = f"{ms['ours']:11.2f}{ms['dense']:11.1f}{ms['peft']:11.1f}"
    figures += f"{ms['dense'] / ms['ours']:10.0f}x{ms['peft'] / ms['ours']:10.0f}x"
    # of the fastest rounds, the steadier figure on a busy machine
    best_ratio = min(seconds["dense"]) / min(seconds["ours"])
    print(
        f"{name:26}{rank:5}{figures}{best_ratio:10.0f}x   {errors}   ({rounds} rounds)", flush=True
    )
    return {
        "layer": name,
        "rank": rank,
        "rounds": rounds,
        "ms": ms,
        "seconds": seconds,
        "excess": excess,
    }


def time_call(call: Callable[[], object]) -> float:
    """Mean seconds of one call, over as many as fill MINIMUM_SECONDS: a file has hundreds of
    layers, so that caches are warm.
    """
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < MINIMUM_SECONDS:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls


def synthetic_adapter(
    shape: tuple[int, ...], rank: int, seed: int, dtype: torch.dtype = torch.float32
) -> LowRank:
    """An adapter with a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    ones = [1] * (len(shape) - 2)
    down = torch.randn(rank, *shape[1:], generator=generator) / math.sqrt(math.prod(shape[1:]))
    up = (
        torch.randn(shape[0], rank, *ones, generator=generator)
        * (torch.arange(1, rank + 1) ** -0.7).view(1, -1, *ones)
        * 0.01
    )
    return LowRank(down.to(dtype), up.to(dtype), 0.5)


def merge_in_factor_space(adapters: list[LowRank], rank: int) -> tuple[Tensor, Tensor]:
    """(up [out, r], down [r, fan in]) of the compressed sum, computed in factor space."""
    small, _ = compress_adapter(concat_factors(list(zip(WEIGHTS, adapters))), Keep(rank=rank))
    return small.up.flatten(1), small.down.flatten(1)


def merge_dense(adapters: list[LowRank], rank: int) -> tuple[Tensor, Tensor]:
    """The same, computed through the dense matrix."""
    merged = torch.zeros(adapters[0].up.shape[0], adapters[0].down[0].numel())
    for weight, lr in zip(WEIGHTS, adapters):
        merged = merged + weight * (lr.up.flatten(1) @ lr.down.flatten(1)) * lr.scale
    u, sigma, vh = torch.linalg.svd(merged, full_matrices=False)
    return u[:, :rank] @ torch.diag(sigma[:rank]), vh[:rank]


class Peft:
    """peft's merge, on a model of one layer with both adapters."""

    def __init__(self, adapters: list[LowRank]) -> None:
        from peft import LoraConfig, get_peft_model

        lr = adapters[0]
        layer = (
            nn.Linear(lr.down.shape[1], lr.up.shape[0])
            if lr.down.ndim == 2
            else nn.Conv2d(lr.down.shape[1], lr.up.shape[0], 3)
        )
        config = LoraConfig(r=lr.rank, lora_alpha=int(lr.scale * lr.rank), target_modules=["layer"])
        host: Any = nn.ModuleDict({"layer": layer})
        model: Any = get_peft_model(host, config, adapter_name="a0")
        model.add_adapter("a1", config)
        held: Any = model.base_model.model
        self.model, self.layer = model, held["layer"]
        for i, adapter in enumerate(adapters):
            self.layer.lora_A[f"a{i}"].weight.data = adapter.down.clone()
            self.layer.lora_B[f"a{i}"].weight.data = adapter.up.clone()

    def __call__(self, adapters: list[LowRank], rank: int) -> tuple[Tensor, Tensor]:
        if "sum" in self.model.peft_config:
            self.model.delete_adapter("sum")
        options = {"combination_type": "svd", "svd_rank": rank, "svd_full_matrices": False}
        self.model.add_weighted_adapter(["a0", "a1"], list(WEIGHTS), "sum", **options)
        return self.layer.lora_B["sum"].weight.data.flatten(1), self.layer.lora_A[
            "sum"
        ].weight.data.flatten(1)


def time_whole_file(threads: int) -> dict[str, Any]:
    """Merge two synthetic files in another process; prints and returns its figures."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.safetensors" for i in (0, 1)]
        for seed, path in enumerate(paths):
            tensors: dict[str, Tensor] = {}
            for name, shape in sdxl_attention_layers().items():
                lr = synthetic_adapter(shape, FILE_RANK, layer_seed(name, seed), torch.float16)
                tensors |= {f"{name}.down": lr.down, f"{name}.up": lr.up}
            save_file(tensors, path)
        size = sum(path.stat().st_size for path in paths)
        command = [
            sys.executable,
            "-m",
            "benchmarks.merge",
            "--threads",
            str(threads),
            "--whole",
            *map(str, paths),
        ]
        figures = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
    figures |= {"input_mb": size / 2**20, "allowed_mb": 2 * size / 2**20 + 500}
    print(
        "whole file: {layers} layers of rank {rank}, two of {each:.0f} MB: "
        "{seconds:.1f} s ({cpu:.1f} s of processor time), of it {reading:.1f} s "
        "reading and writing; peak memory {peak_mb:.0f} MB, {start_mb:.0f} MB of it before the "
        "first file is read (allowed {allowed_mb:.0f}); "
        "error {error:.4f}, energy {energy:.4f}".format(
            **figures, rank=FILE_RANK, each=size / 2**21
        )
    )
    return figures


def sdxl_attention_layers() -> dict[str, tuple[int, ...]]:
    """Path -> weight shape of the Linear layers in SDXL's attention blocks, as in a kohya file."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
    return {
        name: tuple(m.weight.shape)
        for name, m in unet.named_modules()
        if isinstance(m, nn.Linear) and ".attentions." in name
    }


def layer_seed(name: str, seed: int) -> int:
    """The seed of a layer, the same in every process."""
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(name)) * 2 + seed


def merge_files(first: Path, second: Path) -> dict[str, float]:
    """Read two files, mix, compress to FILE_RANK, write fp16; returns seconds and megabytes."""
    start_mb, begin, cpu = peak_mb(), time.perf_counter(), time.process_time()
    states = [read_file(path) for path in (first, second)]
    reading, reports = time.perf_counter() - begin, []
    tensors: dict[str, Tensor] = {}
    with one_thread():
        for layer in mix_layers(
            [Term(state, weight) for state, weight in zip(states, WEIGHTS)], Keep(rank=FILE_RANK)
        ):
            assert layer.adapter is not None
            tensors |= {
                f"{layer.path}.down": layer.adapter.down.half(),
                f"{layer.path}.up": layer.adapter.up.half(),
            }
            reports.append(layer.report)
    writing = time.perf_counter()
    save_file(tensors, first.with_name("sum.safetensors"))
    end = time.perf_counter()
    row = total_report(reports)
    times = {
        "seconds": end - begin,
        "cpu": time.process_time() - cpu,
        "reading": reading + end - writing,
    }
    return {
        "layers": len(reports),
        "error": row.error,
        "energy": row.energy,
        "start_mb": start_mb,
        "peak_mb": peak_mb(),
    } | times


def read_file(path: Path) -> AdapterState:
    """The adapters in a file of `time_whole_file`."""
    tensors = load_file(path)
    names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    return AdapterState(
        {
            "unet": {
                name: LowRank(tensors[f"{name}.down"], tensors[f"{name}.up"], 0.5) for name in names
            }
        }
    )


def peak_mb() -> float:
    """Peak memory of this process in MB (Linux's /proc; getrusage would include the parent's)."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    sys.exit(quiet_status(main))
