"""LoRA, DoRA, textual inversion and pivotal tuning of text-to-image diffusion models.

The public names are loaded when they are first used: `import lora_core` imports no torch.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__version__ = "0.1.0"  # the same as in pyproject.toml

PUBLIC = {  # name -> its module
    "AdapterSpec": "lora_core.settings",
    "Patch": "lora_core.adapters.patch",
    "Prodigy": "lora_core.prodigy",
    "UserError": "lora_core.errors",
    "inject": "lora_core.adapters.injection",
    "patch": "lora_core.adapters.patch",
    "remove": "lora_core.adapters.injection",
}
__all__ = ["__version__", *PUBLIC]  # noqa: PLE0604 (the names are strings)


def load_names_lazily(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package: it imports a public name from its module at the first use.

    `modules`: name -> its module. Python calls `__getattr__` for names that a module lacks.
    """

    def load_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(modules[name]), name)
        setattr(import_module(package), name, value)
        return value

    return load_name


__getattr__ = load_names_lazily(__name__, PUBLIC)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
