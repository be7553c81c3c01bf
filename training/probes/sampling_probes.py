"""Probes of the options of sampling, in the first step of a run and not after hours, at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_core.diffusion import generation, sampling
from lora_core.settings import SamplerSettings
from lora_core.tensor_trees import tree_tensors
from training.probes.first_step import FirstStep, Probe
from training.probes.input_probes import differing_arguments
from training.samples import SampleImages

Call = list[Tensor]  # what the denoiser gets in a call
CALLS = 3  # of the denoiser, at the beginning of sampling, that tell two samplers apart


def changes_sampling(option: str) -> Probe:
    """Whether sampling of the first prompt calls the denoiser with other tensors than with the
    option's default. None where the first calls need not show it, and in later stages.
    """

    def probe(first: FirstStep) -> bool | None:
        if first.inputs[0].number or not first.can_run_denoiser:
            return None
        samples = SampleImages(first.config, first.data, first.model, first.optimization)
        own, usual = samples.settings, SamplerSettings()
        other = replace(own, **{option: getattr(usual, option)})
        if option == "sampler":
            other = replace(other, sampler_args={})
        calls = first_calls(samples, own)
        others = first_calls(samples, other, until_unlike=calls)
        if len(others) != len(calls) or not all(map(_are_equal, calls, others)):
            return True
        return False if len(calls) == CALLS and _acts_early(option, own) else None

    return probe


def _acts_early(option: str, settings: SamplerSettings) -> bool:
    """Whether an option that acts does so in the first calls."""
    if option not in ("sampler", "sampler_args"):
        return True
    if settings.sampler not in sampling.SAMPLERS:  # one from a file may act at any time
        return False
    if option == "sampler":
        return settings.sampler != "flow_euler"  # for flow models the same as the default
    run = sampling.find_sampler(settings.sampler).run
    return bool(differing_arguments(run, settings.sampler_args))


class _SeenEnough(BaseException):
    """Further calls of the denoiser would show nothing more. No error, which a sampler from a file
    may catch, and of which a sentence would be made.
    """


def first_calls(
    samples: SampleImages, settings: SamplerSettings, *, until_unlike: Sequence[Call] = ()
) -> list[Call]:
    """The first calls of the denoiser when the first prompt is drawn with these settings, CALLS at
    most, in the sampler's precision. The last of them is not carried out, nor is one that differs
    from its like among `until_unlike`, after which nothing follows.
    """
    family: Any = samples.model.family
    denoise = family.denoise
    found: list[Call] = []

    def note(*given: Any) -> Tensor:
        call = [tensor.detach().clone() for tensor in tree_tensors(given)]
        likes = until_unlike[len(found) : len(found) + 1]
        found.append(call)
        if len(found) == CALLS or any(not _are_equal(call, like) for like in likes):
            raise _SeenEnough
        result: Tensor = denoise(*given)
        return result

    batch = samples.batch_of(samples.prompts[:1], [0])._replace(settings=settings)
    words = samples.model.placeholders
    with (
        samples.model.evaluating(),
        samples.optimization.averaged(),
        _replaced_denoise(family, note),
        suppress(_SeenEnough),  # inside: what was on the device comes back after no error
    ):
        list(generation.generate_batches(family, [batch], placeholders=words))
    return found


@contextmanager
def _replaced_denoise(family: Any, other: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, a family has another function in the place of `denoise`, a method or its own."""
    before = vars(family).get("denoise")
    family.denoise = other
    try:
        yield
    finally:
        if before is None:
            del family.denoise
        else:
            family.denoise = before


def _are_equal(own: Call, other: Call) -> bool:
    return len(own) == len(other) and all(map(torch.equal, own, other))
