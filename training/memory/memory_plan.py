"""The memory that a run needs on its device, by phase and by component, before a weight is read.

The networks are built on the meta device from their configs, one step is taken there, and the
tensors that live at one time are counted. What no tensor shows (CUDA's context, workspaces of its
libraries, gaps of the allocator) is estimated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_core.config import Config, Stage
from lora_core.data.buckets import bucket_sizes
from lora_core.diffusion import losses
from lora_core.family import Family
from lora_core.memory.live_tensors import tensor_bytes
from lora_core.memory.residency import reason_to_stay
from training.memory.planned_step import (
    Forward,
    PlannedRun,
    StepMemory,
    decoding_memory,
    denoising_memory,
    encoding_memory,
    image_memory,
    make_optimizer_state,
    micro_batch_rows,
    on_meta,
    open_planned_family,
    open_planned_run,
    plain_placement,
    planned_inputs,
    step_memory,
)
from training.memory.planned_weights import component_bytes, packed_bytes, unpacked_bytes

GB = 1e9
# CUDA's context and the kernels that torch loads into it: nvidia-smi shows 0.4 to 0.6 GB for a
# process with one tensor, by card and driver.
CONTEXT = int(0.5 * GB)
CUBLAS = 40 << 20  # its workspaces on a Hopper GPU (32 MiB and those of cublasLt); less on others
# The caching allocator rounds tensors up and leaves gaps; of tensors that come and go.
GAPS = 0.05
TRAINED, STATE, AVERAGE = "adapters and tokens", "optimizer state", "moving average"
GRADIENTS, ACTIVATIONS = "gradients", "activations"
WORKSPACE, OVERHEAD = "workspaces (estimate)", "CUDA context, gaps (estimate)"


@dataclass(frozen=True)
class MeasuredRun:
    """What the meta device tells of a run, for any way to store its frozen weights."""

    networks: Mapping[str, nn.Module]  # component -> network on the meta device, with adapters
    denoiser: str  # its component
    encoders: tuple[str, ...]  # components
    trained: int  # bytes of the parameters
    state: int
    average: int
    texts: Forward  # encoding a caption
    denoising: Forward  # one forward pass of sampling
    steps: Mapping[tuple[str, ...], StepMemory]  # groups that train together -> memory of a step


class ImageMemory(NamedTuple):
    """What the meta device tells of a VAE's work."""

    vae: nn.Module
    caches_latents: bool  # images are encoded once, not in each step
    encoding: Forward  # of one image, or of a batch where they are not cached
    decoding: Forward  # of the images that are drawn at once


@dataclass(frozen=True)
class Phase:
    """A phase of a run: component -> bytes on the device."""

    name: str
    parts: Mapping[str, int]
    groups: tuple[str, ...] = ()  # that train in it

    @property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run on a GPU, or on the CPU without CUDA's shares."""

    config: Config
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)


def plan_memory(config: Config, functions: Any) -> MemoryPlan:
    """The plan of a config; `functions` are the StepFunctions of the run. Raises UserError for a
    model whose configs cannot be read, and for a config that does not fit the model.
    """
    kind = "cpu" if config.device.startswith("cpu") else "cuda"
    plain = replace(plain_placement(config), vae_precision="fp32")
    if getattr(functions.loss, "reads_attention", False):  # no captions, so no tokens in them
        functions = replace(functions, loss=losses.mse)
    measured = _measure_steps(_Key(plain, functions, kind))
    few = replace(plain, vae_precision=config.vae_precision, gradient_checkpointing="none")
    images = _measure_images(_Key(replace(few, accumulation=1), kind))
    return MemoryPlan(config, tuple(_phases(config, measured, images, kind)))


# ---------------------------------------------------------------- what the meta device tells


class _Key:
    """Arguments of a measurement, equal where their text is: a config is not hashable."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.text = repr(arguments)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@functools.lru_cache(maxsize=64)
def _measure_steps(key: _Key) -> MeasuredRun:
    config, functions, kind = key.arguments
    size = largest_size(config)
    with on_meta(kind):
        run = open_planned_run(config, kind, weights_itself=functions.weights_itself)
        model, family = run.model, run.model.family
        make_optimizer_state(run)
        parameters = [list(params) for params in model.groups.values()]
        trained, average = tensor_bytes(parameters), run.optimization.average
        steps = {}
        for groups in dict.fromkeys(stage.groups for stage in config.stages):
            stage = Stage(1, groups)
            inputs = planned_inputs(run, stage, size)
            steps[groups] = step_memory(
                functions, stage, run.config, model, run.optimization, inputs
            )
        guided = config.samples.guidance != 1 and not family.distilled_guidance
        drawn, side = _drawn_images(config, family), config.data.resolution
        with model.frozen():  # no adapter drops anything
            texts = encoding_memory(run, drawn)
            denoising = denoising_memory(run, drawn * (1 + guided), (side, side))
        return MeasuredRun(
            networks=family.modules,
            denoiser=family.denoiser,
            encoders=tuple(model.encoders),
            trained=trained,
            state=_state_bytes(run),
            average=0 if average is None else tensor_bytes(average.averages),
            texts=texts,
            denoising=denoising,
            steps=steps,
        )


@functools.lru_cache(maxsize=64)
def _measure_images(key: _Key) -> ImageMemory:
    config, kind = key.arguments
    d, side = config.data, config.data.resolution
    with on_meta(kind):
        family = open_planned_family(config)
        # kept on the host, unless an image is another one in each visit
        caches = (not d.is_random or bool(d.variants)) and not family.inpainting
        rows = 1 if caches else micro_batch_rows(config)
        drawn = _drawn_images(config, family)
        return ImageMemory(
            family.modules["vae"],
            caches,
            image_memory(family, rows, largest_size(config)),
            decoding_memory(family, drawn, (side, side)),
        )


def takes_turns(config: Config) -> bool:
    """Whether networks leave the device while they do not work (--offload)."""
    return config.offload and not reason_to_stay(config.family)


def largest_size(config: Config) -> tuple[int, int]:
    """(h, w) in pixels of the largest images that a run may train on; no image is read."""
    d = config.data
    if not d.buckets:
        return d.resolution, d.resolution
    return max(bucket_sizes(d.resolution, d.bucket_step), key=lambda size: size[0] * size[1])


def _drawn_images(config: Config, family: Family) -> int:
    """Images that samples.py draws at once."""
    return 1 if family.inpainting else config.batch_size


def _state_bytes(run: PlannedRun) -> int:
    """Bytes of the optimizer's tensors, without the parameters themselves."""
    optimizer = run.optimization.optimizer
    own: set[int] = set()
    for group in optimizer.param_groups:
        own.update(p.untyped_storage()._cdata for p in group["params"])
    kept = []
    for leaf in tree_leaves([dict(state) for state in optimizer.state.values()]):
        if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in own:
            kept.append(leaf)
    return tensor_bytes(kept)


# ---------------------------------------------------------------- phases


def _phases(config: Config, m: MeasuredRun, images: ImageMemory, kind: str) -> Iterator[Phase]:
    """The phases of a run, in order."""
    trains_text = config.trains("text_encoder", "tokens")
    vae = [name for name in m.networks if name != m.denoiser and name not in m.encoders]
    adapts = config.trains("denoiser")
    opened = [*(m.encoders if trains_text else ()), *((m.denoiser,) if adapts else ())]
    late = {STATE: m.state, AVERAGE: m.average}
    networks = {**m.networks, vae[0]: images.vae}
    build = functools.partial(_phase, config, replace(m, networks=networks), kind)
    yield build("opening", opened, {}, Forward(0, _largest_packing(config, m)))
    yield build("captions", m.encoders, {}, m.texts)
    yield build("images", vae, {}, images.encoding)
    stays: list[str] = []  # at the addresses that a CUDA graph has
    for number, (groups, step) in enumerate(m.steps.items(), start=1):
        held = [m.denoiser]
        if "text_encoder" in groups or "tokens" in groups:
            held += m.encoders
        if not images.caches_latents:
            held += vae
        stays += held if config.cuda_graph else []
        own = {**late, GRADIENTS: step.gradients}
        activations = Forward(step.peak - step.gradients, step.workspace)
        name = "step" if len(m.steps) == 1 else f"step {number}"
        yield replace(build(name, held, own, activations), groups=groups)
    if stays:  # of samples, next to what the graph reads
        yield build("prompts", [*m.encoders, *stays], late, m.texts)
    yield build("samples", [m.denoiser, *stays], late, m.denoising)
    yield build("decoding", [*vae, *stays], late, images.decoding)


def _largest_packing(config: Config, m: MeasuredRun) -> int:
    """Bytes that packing the largest layer takes, before its network is on the device."""
    sizes = [0]
    for name in (m.denoiser, *m.encoders):
        network, is_denoiser = m.networks[name], name == m.denoiser
        sizes.append(packed_bytes(config, network, is_denoiser=is_denoiser))
    return max(sizes)


def _phase(
    config: Config, m: MeasuredRun, kind: str, name: str, held: Any, own: Mapping[str, int],
    forward: Forward,
) -> Phase:  # fmt: skip
    """A phase with the networks `held` on the device, with --no-offload all of them, with --shard
    the denoiser too.
    """
    present = list(held) if takes_turns(config) and kind == "cuda" else list(m.networks)
    present += [m.denoiser] if config.shard else []
    unpacked = 0
    parts: dict[str, int] = {}
    for component, network in m.networks.items():
        parts[component] = 0
        if component in present:
            is_denoiser = component == m.denoiser
            works = component in held
            parts[component] = component_bytes(
                config, network, is_denoiser=is_denoiser, works=works
            )
            if works and name != "opening":
                most = unpacked_bytes(config, network, is_denoiser=is_denoiser)
                unpacked = max(unpacked, most)
    parts[TRAINED] = m.trained
    parts |= {STATE: 0, AVERAGE: 0, GRADIENTS: 0, **own}
    parts[ACTIVATIONS] = forward.activations
    if kind == "cuda":
        parts[WORKSPACE] = forward.workspace + unpacked + CUBLAS
        parts[OVERHEAD] = CONTEXT + int(GAPS * (forward.activations + forward.workspace))
    return Phase(name, parts)
