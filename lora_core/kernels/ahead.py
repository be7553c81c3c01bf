"""Ahead-of-time compilation of the Triton kernels, without a GPU, and the resources of each.

    python -m lora_core.kernels.ahead --arch 80 89 90 100 [--full] [--only NAME] [--json FILE]

Prints registers, spills, shared memory and instructions, one line for each configuration and chip.
Exits with 1 where one spills more than SPILL_ALLOWANCE bytes, needs more shared memory than a block
may have, or lacks the tensor core instructions that it was written for. Compiled kernels stay in
Triton's cache (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.errors import UserError, exit_status
from lora_core.kernels.device import interpreted

# Name on the command line -> module and function that list its configurations: (full) -> [Build].
BUILD_LISTS = {
    "linear": ("linear_builds", "list_linear_builds"),
    "dora": ("dora", "list_norm_builds"),
    "compose": ("compose", "list_compose_builds"),
    "loss": ("loss", "list_mse_builds"),
    "dropout": ("dropout", "list_dropout_builds"),
    "optimizers": ("optimizers", "list_optimizer_builds"),
}

# Bytes of shared memory that one block may have (CUDA C++ programming guide, table of compute
# capabilities).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

# Bytes a thread may spill to local memory: four registers. ptxas limits the registers by a
# heuristic and, depending on release and chip, spills up to so many to fit one more block on the
# chip (Triton 3.7.1: in 22 of 1,508 compilations, none of which spills under a higher limit; Triton
# 3.9.0: in none). A kernel that is too large for its registers spills ten times as much.
SPILL_ALLOWANCE = 16

# Patterns of instructions in PTX. Matrix products: mma on sm_80, wgmma on sm_90, tcgen05 on sm_100;
# small tiles take mma there too.
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"(?<![\w.])mma\.sync",
    "cp.async": r"\bcp\.async\.",
}
TENSOR_CORES = ("wgmma", "tcgen05", "mma")

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}

# "*fp32", "*bf16", "*i64", "i32", "fp32" ... or "constexpr"; of a table, a tuple of such.
Signature = str | tuple[Any, ...]
ArgumentPath = tuple[int, ...]  # index of an argument, then of an entry inside a table


class Build(NamedTuple):
    """One configuration of a kernel, as its launcher compiles it."""

    kernel: Any  # the @triton.jit function
    signature: Mapping[str, Signature]  # of every argument, in order
    # Values of the constexpr arguments by name or path (and None for a pointer that is not passed).
    constants: Mapping[Any, Any]
    warps: int = 4
    stages: int = 2
    tensor_cores: bool = False  # its products must be tensor core instructions
    name: str = ""  # of this configuration, in the table that is printed
    # Integer arguments that are multiples of 16, by name or path; pointers always are.
    multiples: tuple[str | ArgumentPath, ...] = ()
    registers: int | None = None  # maxnreg: the most a thread may have; None: what ptxas guesses


class Resources(NamedTuple):
    """Resources of a multiprocessor that a compiled kernel takes."""

    registers: int  # per thread
    spills: int  # bytes per thread on the stack and in local memory
    shared: int  # bytes per block
    kinds: tuple[str, ...]  # the keys of INSTRUCTIONS that its PTX holds


def describe_launch(kernel: Any, arguments: Mapping[str, Any], **build: Any) -> Build:
    """The build that Triton's launcher would compile for these arguments (tensors may be on meta).

    Like the launcher it treats 1 and None as constants and marks multiples of 16, inside tables
    too. `build`: the other fields of Build.
    """
    signature = {}
    multiples = []
    constants: dict[str | ArgumentPath, Any] = {}

    def describe(value: Any, path: ArgumentPath, parameter: Any) -> Signature:
        if isinstance(value, tuple):
            entries = [describe(entry, (*path, i), parameter) for i, entry in enumerate(value)]
            return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
        specialized = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor):
            return f"*{TYPES[value.dtype]}"
        if isinstance(value, float):
            return "fp32"
        if specialized and value % 16 == 0:
            multiples.append(path)
        return "i32" if abs(value) < 2**31 else "i64"

    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        signature[name] = describe(arguments[name], (i,), parameter)
    return Build(kernel, signature, constants, multiples=tuple(multiples), **build)


def compile_build(build: Build, arch: int) -> Resources:
    """The kernel's resources on sm_<arch>.

    Raises UserError under TRITON_INTERPRET=1, where there is nothing to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(build.kernel, triton.JITFunction):
        raise UserError(
            "got a kernel of Triton's interpreter, expected one to compile; unset TRITON_INTERPRET"
        )
    names = build.kernel.arg_names
    signature = dict(build.signature)
    if list(signature) != names:
        raise UserError(
            f"the build {build.name!r} lists the arguments {', '.join(signature)}; "
            f"{build.kernel.__name__} takes {', '.join(names)}"
        )
    aligned = _find_pointers(tuple(signature.values()), ())
    for place in build.multiples:
        aligned.append((names.index(place),) if isinstance(place, str) else place)
    attributes = {path: [["tt.divisibility", 16]] for path in aligned}
    source = ASTSource(build.kernel, signature, dict(build.constants), attributes)
    options = {"num_warps": build.warps, "num_stages": build.stages, "maxnreg": build.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _read_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    kinds = tuple(kind for kind, pattern in INSTRUCTIONS.items() if re.search(pattern, ptx))
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, kinds)


def find_fault(build: Build, arch: int, found: Resources) -> str:
    """Why the compiled kernel fails the check on sm_<arch>; empty where it passes."""
    if found.spills > SPILL_ALLOWANCE:
        return f"spills {found.spills} bytes"
    if found.shared > SHARED_MEMORY[arch]:
        available = SHARED_MEMORY[arch]
        return f"needs {found.shared} bytes of shared memory, {available} are available"
    if build.tensor_cores and not set(TENSOR_CORES) & set(found.kinds):
        return "has no tensor core instruction"
    return ""


def find_builds(full: bool, only: str = "") -> list[tuple[str, Build]]:
    """(name in BUILD_LISTS, build) of every kernel module, those whose name holds `only`."""
    found = []
    for name, (module, function) in BUILD_LISTS.items():
        list_builds = getattr(importlib.import_module(f"lora_core.kernels.{module}"), function)
        for build in list_builds(full):
            if only in build_name(name, build):
                found.append((name, build))
    return found


def build_name(module: str, build: Build) -> str:
    """The name of a build in the table that is printed."""
    return f"{module}.{build.name or build.kernel.__name__}"


def _find_pointers(signature: Signature, path: ArgumentPath) -> list[ArgumentPath]:
    """Paths of all pointers below `path`."""
    if isinstance(signature, str):
        return [path] if signature.startswith("*") else []
    found = []
    for i, entry in enumerate(signature):
        found += _find_pointers(entry, (*path, i))
    return found


def _read_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL of the one kernel in a cubin, by the cuobjdump that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}


def main(arguments: list[str] | None = None) -> int:
    given = _parse(arguments)
    if interpreted():
        raise UserError("TRITON_INTERPRET is set, so that there is nothing to compile; unset it")
    found = find_builds(given.full, given.only)
    if not found:
        raise UserError(
            f"no kernel configuration matches --only {given.only!r}; "
            f"there are modules {', '.join(BUILD_LISTS)}"
        )
    print(f"{'kernel':58} {'sm':>3} {'registers':>9} {'spills':>6} {'shared':>7}  instructions")
    rows = []
    for module, build in found:
        for arch in given.arch:
            row = _compile_row(build_name(module, build), build, arch)
            print(_format_row(row), flush=True)
            rows.append(row)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    refused = sum(bool(row["fault"]) for row in rows)
    print(f"{len(rows)} kernels compiled, {refused} refused")
    return 1 if refused else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lora_core.kernels.ahead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=list(SHARED_MEMORY),
        default=[80, 89, 90],
        help="compute capabilities",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="every configuration that is dispatched, not a few of each kernel",
    )
    parser.add_argument("--only", default="", help="configurations whose module.name holds this")
    parser.add_argument("--json", type=Path, help="write the table there")
    return parser.parse_args(arguments)


def _compile_row(name: str, build: Build, arch: int) -> dict[str, Any]:
    """One line of the table."""
    found = compile_build(build, arch)
    row = {"kernel": name, "arch": arch, "warps": build.warps, "stages": build.stages}
    return row | found._asdict() | {"fault": find_fault(build, arch, found)}


def _format_row(row: dict[str, Any]) -> str:
    numbers = f"{row['registers']:9} {row['spills']:6} {row['shared']:7}"
    kinds = " ".join(row["kinds"])
    return f"{row['kernel']:58} {row['arch']:3} {numbers}  {kinds} {row['fault'].upper()}".rstrip()


if __name__ == "__main__":
    sys.exit(exit_status(main))
