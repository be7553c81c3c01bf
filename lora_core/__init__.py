"""LoRA, DoRA, textual inversion and pivotal tuning of text-to-image diffusion models."""

from lora_core.adapters.patch import Patch, patch

__all__ = ["Patch", "__version__", "patch"]
__version__ = "0.1.0"  # the same as in pyproject.toml
