"""StepOutput: the input of a loss, the result of one training step's forward pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.cross_attention import AttentionMap, attention_on_tokens
from lora_core.diffusion.noise import NoiseLevel, Schedule, add_noise
from lora_core.diffusion.prediction import PREDICTIONS, to_loss_space
from lora_core.errors import UserError
from lora_core.kernels import choice

ATTENTION_ADVICE = (
    "; maps and token places are recorded for a loss that asks for them: "
    "write my_loss.reads_attention = True below my_loss"
)
# Metrics of the program itself, in metrics.jsonl, and how the names of others begin.
OWN_METRICS = ("step", "loss", "grad_norm", "skipped", "time", "d")
OWN_PREFIXES = ("lr_", "d_", "val_")


class CaptionTokens(NamedTuple):
    """The captions of a batch, and the places of words among their tokens."""

    # As the files have them, with placeholder words; "" for a dropped one.
    captions: tuple[str, ...]
    # The rest is for losses that read attention. Text encoder ("clip_l") -> placeholder word ->
    # [b, n] places of its tokens, as this encoder's tokenizer cut them; -1 where a caption has
    # fewer than n.
    places: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({})
    attended: str = ""  # the text encoder whose tokens are the columns of the attention maps
    # [b, n] places of all learned tokens in that encoder, in the caption's order.
    learned: Tensor | None = None
    # Any word or phrase -> [b, n] its places there; None where a CUDA graph holds the step.
    find: Callable[[str], Tensor] | None = None


def is_own_metric(name: str) -> bool:
    """Whether a metric of metrics.jsonl is the program's own, not one that a loss logs."""
    return name in OWN_METRICS or name.startswith(OWN_PREFIXES)


Readings = dict[str, list[Tensor]]  # name -> values that a loss or a step logs, 0-dim each


def add_reading(readings: Readings, name: str, value: Tensor | float) -> None:
    """Add the mean of a value to the readings of a step.

    Raises UserError for the name of a metric of the program itself.
    """
    if is_own_metric(name):
        raise UserError(
            f"step.log got the name {name!r}, which the program's own metrics have; choose another"
        )
    if not isinstance(value, Tensor | int | float):
        raise UserError(f"step.log({name!r}) got {value!r}; expected a number or a tensor")
    if not isinstance(value, Tensor) and choice.is_replayed():
        raise UserError(
            f"step.log({name!r}) got the number {value:g}, which --cuda-graph would repeat in "
            "every step; log a tensor of the device, or leave --cuda-graph out"
        )
    readings.setdefault(name, []).append(torch.as_tensor(value).detach().float().mean())


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
    # base_out(), out_at(level, x_t), base_out_at(level, x_t), plain_base_out(), preserved(),
    # decode(latents) for pixels, and attention() where it was recorded
    lazy: dict[str, Callable[..., Any]] = field(default_factory=dict)
    t_max: float | None = None  # the schedule's t of pure noise, if its t counts noise up from 0
    # The network's own prediction type, for its further outputs, where `prediction` is "sample"
    # because the loss compares x0.
    network: str = ""
    # [b, n] of the learned tokens of each prompt among the columns of the attention maps, in the
    # prompt's order; -1 where it has fewer than n. For losses that read attention.
    token_positions: Tensor | None = None
    # [b, 1, h, w] the masks before a scale and a temperature made the weights `mask` of them; None
    # where `mask` is as they are.
    unweighted_mask: Tensor | None = None
    caption_tokens: CaptionTokens | None = None
    schedule: Schedule | None = None  # schedule.level(t) gives the noise levels at t [b]
    readings: Readings | None = None  # None: nothing is logged
    # [b] bool with --data.pairs, where the rows are winner, loser, winner, loser ... and the two of
    # a pair have the same noise, noise level and caption; else None
    is_loser: Tensor | None = None

    def log(self, name: str, value: Tensor | float) -> None:
        """Add a value, or the mean of a tensor, to the run's metrics, plots and loggers.

        Raises UserError for a number with --cuda-graph, which would be that of the capture in every
        step.
        """
        if self.readings is not None:
            add_reading(self.readings, name, value)

    def split_pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(rows of the winners, rows of the losers) of x [b, ...], each [b / 2, ...].

        A loss of a pair belongs to both of its rows: `loss.repeat_interleave(2)` is [b] again, and
        the mean over rows is that over pairs. Raises UserError without pairs.
        """
        if self.is_loser is None:
            raise UserError(
                "this loss compares the two images of pairs, and there are none; give the folder "
                "with the losers, or two columns of metadata.jsonl, with --data.pairs"
            )
        return x[::2], x[1::2]

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

    def out_at(self, level: NoiseLevel, x_t: Tensor | None = None) -> Tensor:
        """[b, c, h, w] the network's output at other noise levels, parameterized like `out`.

        One more forward pass, with gradient. The network's input x_t [b, c, h, w] belongs to
        `level`; by default it is alpha x0 + sigma eps of these levels.
        """
        return self._output_at("out_at", level, x_t)

    def base_out_at(self, level: NoiseLevel, x_t: Tensor | None = None) -> Tensor:
        """[b, c, h, w] the base model's `out_at`, without gradient."""
        return self._output_at("base_out_at", level, x_t)

    def target_at(self, level: NoiseLevel) -> Tensor:
        """[b, c, h, w] the target of `out_at(level)`."""
        return PREDICTIONS[self.prediction].target(self.x0, self.eps, level)

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
    def captions(self) -> tuple[str, ...]:
        """The captions of the examples, with their placeholder words; "" for a dropped one.

        Raises UserError under --cuda-graph, which holds no text.
        """
        return self._read_captions("captions").captions

    @property
    def token_places(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Text encoder (such as "clip_l") -> placeholder word -> [b, n] places of its tokens.

        They are those that the encoder's tokenizer made of the caption, in order, -1 where a
        caption has fewer than n: learned tokens, or the pieces of their names in an encoder that
        has not learned them. Only for a loss with the attribute `reads_attention = True`.
        """
        places = self._read_captions("token_places").places
        if not places:
            raise UserError(
                "this loss reads step.token_places, and there are none: no placeholder word is "
                f"learned{ATTENTION_ADVICE}"
            )
        return places

    @property
    def attention(self) -> list[AttentionMap]:
        """Attention maps of the denoiser's layers on the prompt, recorded in the forward pass.

        Only for a loss with the attribute `reads_attention = True`. Gradients pass.
        """
        return self._compute("attention")

    def attention_of(self, word: str) -> Tensor:
        """[b, h, w] attention on the tokens of a word, on the grid of the latents.

        The sum over the word's tokens, averaged over heads and layers (`attention_on_tokens`);
        zeros for a caption without it. The word is a placeholder or, without a CUDA graph, any
        other word or phrase of the captions.
        """
        maps, tokens = self.attention, self._read_captions("attention_of")
        places = tokens.places.get(tokens.attended, {}).get(word)
        if places is None:
            if tokens.find is None:
                learned = ", ".join(tokens.places.get(tokens.attended, {})) or "none"
                raise UserError(
                    f"step.attention_of({word!r}) names no placeholder word that is learned "
                    f"({learned}), and --cuda-graph holds no other text; leave it out"
                )
            places = tokens.find(word)
        size = (self.x0.shape[-2], self.x0.shape[-1])
        return attention_on_tokens(maps, places.to(self.x0.device), size)

    @cached_property
    def pixels(self) -> Tensor:
        """[b, 3, h, w] x0_pred, decoded, in [-1, 1]; gradients pass."""
        return self.decode(self.x0_pred)

    def decode(self, latents: Tensor) -> Tensor:
        """[b, 3, h, w] pixels in [-1, 1] of latents [b, c, h, w]; gradients pass."""
        return self._compute("decode", latents)

    def _output_at(self, name: str, level: NoiseLevel, x_t: Tensor | None) -> Tensor:
        if not isinstance(level, NoiseLevel):
            raise UserError(
                f"step.{name} takes a NoiseLevel, got {type(level).__name__}; "
                "step.schedule.level(t) makes one of times t [b]"
            )
        if x_t is None:
            x_t = add_noise(self.x0, self.eps, level)
        out = self._compute(name, level, x_t)
        is_x0 = self.prediction != (self.network or self.prediction)
        return PREDICTIONS[self.network].x0(x_t, out, level) if is_x0 else out

    def _read_captions(self, member: str) -> CaptionTokens:
        tokens = self.caption_tokens
        if tokens is None or (member == "captions" and not tokens.captions):
            raise UserError(
                f"this loss reads step.{member}, which the caller does not provide; "
                "with --cuda-graph there are no captions, leave it out"
            )
        return tokens

    def _to_loss_space(self, out: Tensor) -> Tensor:
        """A network's raw output in the parameterization of `out`."""
        network = self.network or self.prediction
        space = "model" if network == self.prediction else "edm"
        return to_loss_space(network, space, out, self.x0, self.eps, self.level)[0]

    def _compute(self, name: str, *args: Any) -> Any:
        if name not in self.lazy:
            offered = ", ".join(self.lazy) or "no lazy member"
            raise UserError(
                f"this loss reads step.{name}, which the caller does not provide; it has {offered}"
                f"{ATTENTION_ADVICE if name == 'attention' else ''}"
            )
        return self.lazy[name](*args)
