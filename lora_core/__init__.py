"""LoRA, DoRA, textual inversion and pivotal tuning of diffusion models.

    import lora_core as lc

    family = lc.load_family("toy/model")       a folder, hub id or single file
    spec = lc.AdapterSpec(("attention",), rank=8)
    lc.inject(family, spec)                    adapters on a preset's layers
    params = lc.parameters(family)             for lc.Prodigy or any optimizer
    lc.set_strength(family, 0.5)               acts as W + 0.5 delta W
    lc.save(family, "mine.safetensors")        for diffusers, or format="kohya"
    lc.load(family, "other.safetensors")       any adapter file, to train on
    lc.state(family)                           the factors, an AdapterState
    lc.remove(family)                          the layers as they were before

    with lc.patch(pipe, "runs/dog", 0.8) as p: a file on a model, and off again
        pipe(p.bind("a photo of TOK"))

In the place of the family, each function takes a diffusers pipeline, a
dictionary of its parts, or one network. AdapterSpec has the kind of adapter
(lora, dora, lokr, loha, full, or a class of yours), its rank and its targets:
globs on the paths of layers or, for a family, names of its presets, which
lc.presets(family) lists. Mistakes raise lc.UserError, a sentence that says
what to do.

help(lc.inject) describes one function, help("lora_core.diffusion.losses") one
module. docs/python.md has a training loop, and a table of the same calls in
peft and cloneofsimo/lora.

The names are loaded when they are first used: importing lora_core imports no
torch.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__version__ = "0.1.0"  # the same as in pyproject.toml

# name -> its module, or "module:name there"
PUBLIC = {
    "AdapterSpec": "lora_core.settings",
    "Patch": "lora_core.adapters.patch",
    "Prodigy": "lora_core.prodigy",
    "UserError": "lora_core.errors",
    "inject": "lora_core.adapters.model_adapters:inject_adapters",
    "load": "lora_core.adapters.model_adapters:load_adapter",
    "load_family": "models",
    "parameters": "lora_core.adapters.model_adapters:trained_parameters",
    "patch": "lora_core.adapters.patch",
    "presets": "lora_core.adapters.model_adapters:target_presets",
    "remove": "lora_core.adapters.model_adapters:remove_adapters",
    "save": "lora_core.adapters.model_adapters:save_adapter",
    "set_strength": "lora_core.adapters.model_adapters:set_adapter_strength",
    "state": "lora_core.adapters.model_adapters:adapter_state",
}
# help(lora_core) describes these at length; of a class it would list every inherited method.
__all__ = ["__version__", *(name for name in PUBLIC if name.islower())]  # noqa: PLE0604


def load_names_lazily(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package: it imports a public name from its module at the first use.

    `modules`: name -> its module, or "module:name there". Python calls `__getattr__` for names that
    a module lacks.
    """

    def load_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, other = modules[name].partition(":")
        value = getattr(import_module(module), other or name)
        setattr(import_module(package), name, value)
        return value

    return load_name


__getattr__ = load_names_lazily(__name__, PUBLIC)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
