"""The strengths of LoRAs while images are drawn: as given, of a grid's cell, by noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_core.adapters.patch import Patch
from lora_core.errors import UserError
from lora_core.runs.loras import WHOLE_RANGE, LoraSource, match_components, strengths_by_component

ROUNDING = 1e-6  # of a noise share, so that a range includes its ends


@dataclass(frozen=True)
class LoraStrengths:
    """Sets the strengths of the LoRAs that draw a batch: `ImageBatch.prepare`.

    `loras` are those of `patches`, in order. `settings`, a grid's cell, changes their strengths:
    strength, unet or text of all LoRAs, or lora0.strength, lora1.unet ...
    """

    patches: Sequence[Patch]
    loras: Sequence[LoraSource]
    settings: Mapping[str, float]

    def __call__(self, share: float | None = None, *, off: bool = False) -> None:
        """Set the strengths; those of denoisers at a noise `share` in [0, 1] are 0 for a LoRA whose
        range it lies outside of. `off`: 0 for all, whatever they adapt.

        Text encoders read a prompt once, before the steps: their strengths do not depend on it.
        """
        for i, (applied, lora) in enumerate(zip(self.patches, self.loras)):
            strengths = self._strengths(i, applied, lora)
            if share is not None and not _is_inside(share, lora.shares):
                for name in strengths:
                    if not name.startswith("text_encoder"):
                        strengths[name] = 0.0
            if off:
                strengths = dict.fromkeys(strengths, 0.0)
            if applied.adapted:
                applied.set_strength(strengths)

    @property
    def follows_level(self) -> bool:
        """Whether some LoRA acts in a range of noise levels only."""
        return any(lora.shares != WHOLE_RANGE for lora in self.loras)

    @property
    def adapts(self) -> bool:
        """Whether some LoRA changes a network."""
        return any(applied.adapted for applied in self.patches)

    def check_levels(self, shares: Sequence[float]) -> None:
        """Raises UserError for a LoRA that acts in none of the steps, which have these shares of
        noise, and for a range of a file that changes no denoiser.
        """
        for applied, lora in zip(self.patches, self.loras):
            denoisers = [name for name in applied.adapted if not name.startswith("text_encoder")]
            if lora.shares != WHOLE_RANGE and not denoisers:
                raise UserError(
                    f"{lora.path} adapts no denoiser, so the range of noise levels "
                    f"{lora.shares[0]:g}-{lora.shares[1]:g} would have no effect; leave it out"
                )
            if not any(_is_inside(share, lora.shares) for share in shares):
                raise UserError(
                    f"{lora.path} acts at noise levels {lora.shares[0]:g}-{lora.shares[1]:g}, and "
                    f"the {len(shares)} steps have {min(shares):.3f} to {max(shares):.3f}, none of "
                    "them inside; widen the range"
                )

    def _strengths(self, i: int, applied: Patch, lora: LoraSource) -> dict[str, float]:
        """Component -> strength of LoRA number i, as given and then changed by the settings."""
        strengths = strengths_by_component(lora, applied.adapted)
        for name, value in self.settings.items():
            which, _, part = name.rpartition(".")
            if which not in ("", f"lora{i}") or part not in ("strength", "unet", "text"):
                continue
            if part == "strength":
                strengths = dict.fromkeys(applied.adapted, value)
            else:
                named = match_components(part, applied.adapted, lora.path, value)
                strengths |= dict.fromkeys(named, value)
        return strengths


def _is_inside(share: float, shares: tuple[float, float]) -> bool:
    return shares[0] - ROUNDING <= share <= shares[1] + ROUNDING
