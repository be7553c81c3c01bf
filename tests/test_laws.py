"""The law that an implementation is held to: what breaks it and what does not."""

from __future__ import annotations

import torch

from benchmarks import laws
from benchmarks.cases import Setting, copy_arguments, make_cases
from lora_core.kernels import reference


def test_the_law_finds_one_wrong_element_and_passes_another_order_of_a_sum():
    (case,) = make_cases("dora_compose", Setting("cpu", torch.bfloat16, 4), None, [(64, 24, 24)])
    truth = laws.run_outcome(
        reference.dora_compose, reference.dora_compose, copy_arguments(case.args, torch.float64)
    )
    eager = laws.run_outcome(reference.dora_compose, reference.dora_compose, case.args)
    own = laws.errors_to_truth(eager, truth)

    def one_wrong(*args):
        out = reference.dora_compose(*args)
        return torch.cat([out.flatten()[:-1], out.flatten()[-1:] + 0.1]).view(out.shape)

    def rounded_early(y0, bias, lora, gain, strength=1.0):
        return reference.dora_compose(y0, bias, lora, gain.bfloat16().float(), strength)

    for function in (one_wrong, rounded_early):
        assert (
            laws.broken_law(
                laws.run_outcome(function, reference.dora_compose, case.args), truth, own
            )
            is not None
        )
    running = dict(truth.values) | {"gradient of gain": running_sum(case.args)}
    spare = eager.spare
    assert (
        laws.broken_law(
            laws.Outcome({key: value for key, value in running.items()}, spare), truth, own
        )
        is None
    )


def running_sum(args):
    """The gradient of gain, summed over the rows one after another in fp32."""
    y0, bias, lora, _ = (arg.detach().float() for arg in args)
    terms = laws.output_gradient(y0).float() * (y0 - bias + lora)
    total = torch.zeros(y0.shape[-1])
    for row in terms[0]:
        total = total + row
    return total
