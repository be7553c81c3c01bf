"""StepOutput: what a loss is given, the result of one training step's forward pass."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from lora_core.cross_attention import AttentionMap
from lora_core.diffusion.noise import NoiseLevel
from lora_core.diffusion.prediction import PREDICTIONS, to_loss_space
from lora_core.errors import UserError

ATTENTION_ADVICE = (
    "; maps are recorded in the forward pass of a loss that asks for them: "
    "write my_loss.reads_attention = True below my_loss"
)


@dataclass
class StepOutput:
    """Output, target, latents, noise and noise levels of one training step: the input of a loss.

    Members that cost another forward pass are computed at first access.
    """

    out: Tensor  # [b, c, h, w] the network's output
    target: Tensor  # [b, c, h, w] the training target, in the same parameterization
    x0: Tensor  # [b, c, h, w] clean latents
    eps: Tensor  # [b, c, h, w] the noise added to them
    x_t: Tensor  # [b, c, h, w] noised latents, the network's input before c_in
    level: NoiseLevel  # [b] each
    prediction: str  # a key of PREDICTIONS: the parameterization of out and target
    mask: Tensor | None  # [b, 1, h, w] in [0, 1], weights of the loss made of the masks
    is_prior: Tensor  # [b] bool, examples of prior preservation
    step: int
    # base_out(), plain_base_out(), preserved(), decode(latents) for pixels, and attention() where
    # it was recorded
    lazy: dict[str, Callable[..., Any]] = field(default_factory=dict)
    t_max: float | None = None  # the schedule's t of pure noise, if its t counts noise up from 0
    # The network's own prediction type, for base_out() and preserved(), where `prediction` is
    # "sample" because the loss compares x0.
    network: str = ""
    # [b, n] of the learned tokens of each prompt among the columns of the attention maps, in the
    # prompt's order; -1 where it has fewer than n. For losses that read attention.
    token_positions: Tensor | None = None
    # [b, 1, h, w] the masks before a scale and a temperature made the weights `mask` of them; None
    # where `mask` is as they are.
    unweighted_mask: Tensor | None = None

    @property
    def drawn_mask(self) -> Tensor | None:
        """[b, 1, h, w] in [0, 1], the masks of the images as drawn: 1 is what is learned."""
        return self.mask if self.unweighted_mask is None else self.unweighted_mask

    @cached_property
    def x0_pred(self) -> Tensor:
        """[b, c, h, w] the clean latents predicted by the output."""
        return PREDICTIONS[self.prediction].x0(self.x_t, self.out, self.level)

    @cached_property
    def base_out(self) -> Tensor:
        """[b, c, h, w] the base model's output, without gradient, parameterized like `out`."""
        return self._to_loss_space(self._compute("base_out"))

    @cached_property
    def plain_base_out(self) -> Tensor:
        """[b, c, h, w] the base model's output on the caption in ordinary words.

        Without adapters in the text encoders either, and without learned tokens: a class or the
        words of its initializer replace a placeholder word. Without gradient, parameterized like
        `out`. Training provides it with --prior.outside-mask.
        """
        return self._to_loss_space(self._compute("plain_base_out"))

    @cached_property
    def preserved(self) -> tuple[Tensor, Tensor]:
        """Outputs [b, c, h, w] with and without adapters on captions without placeholder words.

        In the captions, classes replace the placeholder words. The base model's output has no
        gradient; both are parameterized like `out`.
        """
        now, before = self._compute("preserved")
        return self._to_loss_space(now), self._to_loss_space(before.detach())

    @property
    def attention(self) -> list[AttentionMap]:
        """Attention maps of the denoiser's layers on the prompt, recorded in the forward pass.

        Only for a loss with the attribute `reads_attention = True`. Gradients pass.
        """
        return self._compute("attention")

    @cached_property
    def pixels(self) -> Tensor:
        """[b, 3, h, w] x0_pred, decoded, in [-1, 1]; gradients pass."""
        return self._compute("decode", self.x0_pred)

    def _to_loss_space(self, out: Tensor) -> Tensor:
        """A network's raw output in the parameterization of `out`."""
        network = self.network or self.prediction
        space = "model" if network == self.prediction else "edm"
        return to_loss_space(network, space, out, self.x0, self.eps, self.level)[0]

    def _compute(self, name: str, *args: Tensor) -> Any:
        if name not in self.lazy:
            offered = ", ".join(self.lazy) or "no lazy member"
            raise UserError(
                f"this loss reads step.{name}, which the caller does not provide; it has {offered}"
                f"{ATTENTION_ADVICE if name == 'attention' else ''}"
            )
        return self.lazy[name](*args)
