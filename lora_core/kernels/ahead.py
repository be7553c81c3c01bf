"""Compiles the Triton kernels without a GPU and says what each needs: registers, spills, shared memory, tensor cores.

    python -m lora_core.kernels.ahead --arch 80 89 90 100 [--full] [--only NAME] [--json FILE]

prints one line for each configuration and chip and exits with 1 where one spills more than SPARED bytes,
asks for more shared memory than a block may have, or lacks the tensor core instructions it was written for.
Every Triton module lists its configurations: `builds(full) -> list[Build]`.
Compiled kernels stay in Triton's cache (TRITON_CACHE_DIR).
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lora_core.errors import UserError
from lora_core.kernels.device import interpreted

MODULES = ("linear", "dora", "compose", "loss", "dropout", "optimizers")

# Bytes of shared memory that one block may ask for (CUDA C++ programming guide, table of compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

# Bytes a thread may keep in local memory: four registers. ptxas guesses how many registers pay and, by release and chip, parks
# up to so many for one more block on the chip (Triton 3.7.1: in 22 of 1,508 compilations, none of which spills when it may take
# more; Triton 3.9.0: in none). A kernel that is too large for its registers spills ten times as much.
SPILL_ALLOWANCE = 16

# What instructions are called in PTX. Matrix products: mma on sm_80, wgmma on sm_90, tcgen05 on sm_100; small tiles take mma there too.
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"(?<![\w.])mma\.sync",
    "cp.async": r"\bcp\.async\.",
}
TENSOR_CORES = ("wgmma", "tcgen05", "mma")


class Build(NamedTuple):
    """One configuration of a kernel, as its launcher asks for it."""

    kernel: Any  # the @triton.jit function
    signature: Mapping[
        str, str
    ]  # argument, in order -> "*fp32", "*bf16", "*i64", "i32", "fp32" ... or "constexpr"
    constants: Mapping[
        str, Any
    ]  # the values of the constexpr arguments (None too, for a pointer that is not there)
    warps: int = 4
    stages: int = 2
    tensor_cores: bool = False  # its products must be tensor core instructions
    name: str = ""  # what the table calls this configuration
    multiples: tuple[
        str, ...
    ] = ()  # integer arguments that are multiples of 16, as the launcher sees them; pointers always are
    registers: int | None = None  # maxnreg: the most a thread may have; None: what ptxas guesses


class Resources(NamedTuple):
    """What a compiled kernel takes of a multiprocessor."""

    registers: int  # per thread
    spills: int  # bytes per thread on the stack and in local memory
    shared: int  # bytes per block
    kinds: tuple[str, ...]  # the rows of KINDS that its PTX holds


def compile_build(build: Build, arch: int) -> Resources:
    """What the kernel needs on sm_<arch>. Raises UserError under TRITON_INTERPRET=1, where there is nothing to compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(build.kernel, triton.JITFunction):
        raise UserError(
            "got a kernel of Triton's interpreter, expected one to compile; unset TRITON_INTERPRET"
        )
    names, signature = build.kernel.arg_names, dict(build.signature)
    if list(signature) != names:
        raise UserError(
            f"the build {build.name!r} lists the arguments {', '.join(signature)}; {build.kernel.__name__} takes {', '.join(names)}"
        )
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in build.multiples
    ]
    source = ASTSource(
        build.kernel,
        signature,
        dict(build.constants),
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": build.warps, "num_stages": build.stages, "maxnreg": build.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _usage(compiled.asm["cubin"])
    kinds = tuple(
        kind for kind, pattern in INSTRUCTIONS.items() if re.search(pattern, compiled.asm["ptx"])
    )
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, kinds)


def find_fault(build: Build, arch: int, found: Resources) -> str:
    """Why the kernel is refused on sm_<arch>, or nothing."""
    if found.spills > SPILL_ALLOWANCE:
        return f"spills {found.spills} bytes"
    if found.shared > SHARED_MEMORY[arch]:
        return f"asks for {found.shared} bytes of shared memory, {SHARED_MEMORY[arch]} are there"
    if build.tensor_cores and not set(TENSOR_CORES) & set(found.kinds):
        return "has no tensor core instruction"
    return ""


def _usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL of the one kernel in a cubin, by the cuobjdump that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}


def find_builds(full: bool, only: str = "") -> list[tuple[str, Build]]:
    """(module, build) of every Triton module that there is, those whose name holds `only`."""
    found = []
    for module in MODULES:
        if find_spec(f"lora_core.kernels.{module}") is not None:
            found += [
                (module, build)
                for build in importlib.import_module(f"lora_core.kernels.{module}").list_builds(
                    full
                )
            ]
    return [
        (module, build)
        for module, build in found
        if only in f"{module}.{build.name or build.kernel.__name__}"
    ]


def main(arguments: list[str] | None = None) -> int:
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
    given = parser.parse_args(arguments)
    if interpreted():
        raise UserError("TRITON_INTERPRET is set, so that there is nothing to compile; unset it")
    rows, found = [], find_builds(given.full, given.only)
    if not found:
        raise UserError(
            f"no kernel configuration matches --only {given.only!r}; there are modules {', '.join(MODULES)}"
        )
    print(f"{'kernel':58} {'sm':>3} {'registers':>9} {'spills':>6} {'shared':>7}  instructions")
    for module, build in found:
        for arch in given.arch:
            resources, name = (
                compile_build(build, arch),
                f"{module}.{build.name or build.kernel.__name__}",
            )
            wrong = find_fault(build, arch, resources)
            registers, spills, shared, kinds = resources
            print(
                f"{name:58} {arch:3} {registers:9} {spills:6} {shared:7}  {' '.join(kinds)} {wrong.upper()}".rstrip(),
                flush=True,
            )
            rows.append(
                {
                    "kernel": name,
                    "arch": arch,
                    "warps": build.warps,
                    "stages": build.stages,
                    **resources._asdict(),
                    "fault": wrong,
                }
            )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    refused = sum(bool(row["fault"]) for row in rows)
    print(f"{len(rows)} kernels compiled, {refused} refused")
    return 1 if refused else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
