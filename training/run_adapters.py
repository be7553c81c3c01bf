"""Adapters of a run: their injection, parameter groups, learning rates and gradient hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lora_core import tokens
from lora_core.adapters import injection, noise_levels, training_requests
from lora_core.adapters.adapted_layer import layers_with_adapter
from lora_core.adapters.targets import last_match
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.family import Family
from lora_core.settings import AdapterSpec
from training.checks import model_checks


@dataclass(frozen=True)
class RunAdapters:
    """The adapters of a run, and what their kind asks of training."""

    adapted: dict[str, nn.Module]  # component -> network with adapters
    has_factors: bool  # whether LoRA or LyCORIS files can hold the adapters
    # group -> parameters with a learning rate of their own, and its ratio to the group's
    rate_ratios: dict[str, dict[Tensor, float]]
    gradient_hooks: dict[str, list[Callable[[], None]]]  # group -> change_gradients of its adapters


def inject_run_adapters(
    config: Config, family: Family, plan: Mapping[str, AdapterSpec]
) -> RunAdapters:
    """Inject the adapters of a plan, component -> spec, and print them.

    Raises UserError for a kind that breaks the laws of adapters, or that no file could hold.
    """
    adapted = {name: family.modules[name] for name in plan}
    paths = {
        name: injection.inject(family.modules[name], spec, seed=config.seed)
        for name, spec in plan.items()
    }
    for module in adapted.values():
        noise_levels.set_largest_timestep(module, family.schedule.t_max)
    has_factors = model_checks.report_adapters(config, adapted, paths)
    ratios: dict[str, dict[Tensor, float]] = {}
    hooks: dict[str, list[Callable[[], None]]] = {}
    for name, module in adapted.items():
        group = group_of(family, name)
        own = training_requests.parameter_rates(module)
        for parameter, factor in layer_rates(module, config.optimizer.lr_pattern).items():
            own[parameter] = own.get(parameter, 1.0) * factor
        if config.optimizer.lora_plus != 1:
            for up in injection.up_parameters(module):
                own[up] = own.get(up, 1.0) * config.optimizer.lora_plus
        ratios.setdefault(group, {}).update(own)
        hooks.setdefault(group, []).extend(training_requests.gradient_hooks(module))
    return RunAdapters(adapted, has_factors, ratios, hooks)


def layer_rates(network: nn.Module, pattern: Mapping[str, float]) -> dict[Tensor, float]:
    """The parameters of adapters whose layers match a glob, and the last match's learning rate.

    Raises UserError for a parameter that layers with different rates share.
    """
    found: dict[Tensor, float] = {}
    for path, layer in layers_with_adapter(network, "default").items() if pattern else ():
        factor = last_match(path, pattern, 1.0)
        assert factor is not None
        for parameter in layer.adapter("default").parameters():
            if found.setdefault(parameter, factor) != factor:
                raise UserError(
                    f"--optimizer.lr-pattern gives {path} the rate {factor:g} and another layer, "
                    f"which shares a parameter with it, {found[parameter]:g}; give both the same"
                )
    return {parameter: factor for parameter, factor in found.items() if factor != 1}


def parameter_groups(
    family: Family,
    adapted: Mapping[str, nn.Module],
    embeddings: Mapping[str, tokens.LearnedEmbedding],
) -> dict[str, list[nn.Parameter]]:
    """Group -> its trainable parameters; groups without any are left out."""
    groups: dict[str, list[nn.Parameter]] = {"denoiser": [], "text_encoder": [], "tokens": []}
    for name in [family.denoiser, *family.tokenizers]:
        if name in adapted:
            groups[group_of(family, name)] += injection.adapter_parameters(family.modules[name])
    groups["tokens"] = [embedding.rows for embedding in embeddings.values()]
    return {name: params for name, params in groups.items() if params}


def group_of(family: Family, component: str) -> str:
    """The group of parameters that a component's adapters belong to."""
    return "text_encoder" if component in family.tokenizers else "denoiser"
