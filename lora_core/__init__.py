"""LoRA, DoRA, textual inversion and pivotal tuning of text-to-image diffusion models.

The public names are loaded when they are first used: `import lora_core` imports no torch.
"""

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


def __getattr__(name: str) -> Any:
    """A public name, imported now. Python calls this for names that the module does not have."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'lora_core' has no attribute {name!r}")
    value = getattr(import_module(PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
