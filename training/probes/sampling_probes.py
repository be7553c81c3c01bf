"""Probes of the options of sampling, in the first step of a run and not after hours, at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.diffusion import generation
from lora_core.settings import SamplerSettings
from lora_core.tensor_trees import tree_tensors
from training.probes.first_step import FirstStep, Probe
from training.samples import SampleImages

Call = list[Tensor]  # what the denoiser gets in a call
CALLS = 3  # of the denoiser, at the beginning of sampling, that tell two samplers apart


def changes_sampling(option: str) -> Probe:
    """Whether sampling of the first prompt calls the denoiser with other tensors than with the
    option's default. None where it has too few calls to show it, and in later stages.
    """

    def probe(first: FirstStep) -> bool | None:
        if first.inputs[0].number or first.config.shard:  # all processes would have to do the same
            return None
        samples = SampleImages(first.config, first.data, first.model, first.optimization)
        own, usual = samples.settings, SamplerSettings()
        other = replace(own, **{option: getattr(usual, option)})
        if option == "sampler":
            other = replace(other, sampler_args={})
            if own.sampler == "flow_euler":  # for flow models the same as the default
                return None
        calls = first_calls(samples, own)
        others = first_calls(samples, other, until_unlike=calls)
        if len(others) != len(calls) or not all(map(_are_equal, calls, others)):
            return True
        return False if len(calls) == CALLS else None

    return probe


class _SeenEnough(Exception):
    """Further calls of the denoiser would show nothing more."""


def first_calls(
    samples: SampleImages, settings: SamplerSettings, *, until_unlike: Sequence[Call] = ()
) -> list[Call]:
    """The first calls of the denoiser when the first prompt is drawn with these settings, CALLS at
    most. The last of them is not carried out, nor is one that differs from its like among
    `until_unlike`, after which nothing follows.
    """
    model = samples.model
    found: list[Call] = []

    def note(_module: nn.Module, given: Any, named: Any) -> None:
        call = [tensor.detach().clone() for tensor in tree_tensors([given, named])]
        likes = until_unlike[len(found) : len(found) + 1]
        found.append(call)
        if len(found) == CALLS or any(not _are_equal(call, like) for like in likes):
            raise _SeenEnough

    handle = model.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with model.evaluating(), samples.optimization.averaged():
            batch = samples.batch_of(samples.prompts[:1], [0])._replace(settings=settings)
            drawn = generation.generate_batches(
                model.family, [batch], placeholders=model.placeholders
            )
            list(drawn)  # nothing is drawn before
    except _SeenEnough:
        pass
    finally:
        handle.remove()
    return found


def _are_equal(own: Call, other: Call) -> bool:
    return len(own) == len(other) and all(map(torch.equal, own, other))
