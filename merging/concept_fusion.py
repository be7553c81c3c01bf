"""Gradient fusion of concepts on a loaded model, in the three steps of Mix-of-Show.

1. Text encoders: the inputs of every layer at all positions of a concept's prompts, in its own
   text encoder.
2. Keys and values of cross-attention: the fused text encoder's features at learned tokens and EOS.
3. The other layers of the denoiser: their inputs while images of a concept are drawn, with fused
   keys and values and the concept's own other layers.

In each step a layer's update is the least-squares fit of `least_squares`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_core import tokens
from lora_core.adapters import changed_parameters, injection
from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.diffusion import sampling
from lora_core.diffusion.generation import start_noise
from lora_core.diffusion.noise import NoiseLevel
from lora_core.errors import UserError
from lora_core.family import Conditioning, Family, Sizes
from lora_core.layer_prompts import encode_layer_prompts, split_prompts
from lora_core.placeholders import Placeholder, Prompt
from lora_core.progress import track
from merging.concepts import Concept
from merging.layer_inputs import (
    ChosenPositions,
    concept_positions,
    recorded_ids,
    recorded_inputs,
    text_positions,
)
from merging.least_squares import (
    Factors,
    InputMoments,
    InputSpectrum,
    Regularization,
    decompose_inputs,
)
from merging.stored_layers import LayerKey

KEYS_AND_VALUES = re.compile(r".*\.attn2\.to_[kv]")
AGREEMENT = 1e-6  # relative squared residual below which updates do not contradict each other
NUMBER_BYTES = 8  # of a number in fp64
Records = Sequence[Mapping[LayerKey, InputMoments]]  # of each concept


@dataclass(frozen=True)
class FusionSettings:
    """Images that are drawn of each prompt, the memory for Gram matrices, the regularization."""

    steps: int = 20
    images: int = 1
    seed: int = 0
    resolution: int = 0  # pixels; 0: the model's own
    memory: float = 8e9  # bytes
    ridge: float = 1e-3  # of the layers of the third step, as in Regularization
    pull: float = 0.0  # above 0: the ridge of all steps, by which updates are near their sum


class LayerFit(NamedTuple):
    """How a layer was fused. Residuals and energies are those of `FusedLayer`, by concept."""

    samples: int
    condition: float
    residuals: tuple[float, ...]
    summed: tuple[float, ...]  # the residuals of the plain sum of updates
    energies: tuple[float, ...]
    # All inputs lie in the directions of one concept's, so that the updates contradict each other.
    coincides: bool


@dataclass
class Fusion:
    """The fused updates, and the fit of every layer by step."""

    updates: dict[LayerKey, LowRank | DenseUpdate] = field(default_factory=dict)
    fits: dict[str, dict[LayerKey, LayerFit]] = field(default_factory=dict)

    def state(self) -> AdapterState:
        """The fused updates as the content of an adapter file."""
        state = AdapterState()
        for (component, path), update in self.updates.items():
            state.components.setdefault(component, {})[path] = update  # type: ignore[assignment]
        return state


@torch.no_grad()
def fuse_concepts(
    family: Family, concepts: Sequence[Concept], learned: AdapterState, settings: FusionSettings
) -> Fusion:
    """Fuses the concepts' updates on the model, which afterwards has the fused ones as adapters.

    `learned` are the tokens of all concepts. Raises UserError for an inpainting model, a size that
    the model does not take, a layer that took no part, and inputs that are too few to tell the
    concepts apart.
    """
    _check_family(family, settings)
    _install_learned_tokens(family, learned)
    encoders = tuple(family.layout.encoders)
    own = changed_layers(concepts)
    text = [key for key in own if key[0] in encoders]
    crossed = [key for key in own if KEYS_AND_VALUES.fullmatch(key[1]) and key not in text]
    others = [key for key in own if key not in text and key not in crossed]
    with recorded_ids({name: family.modules[name] for name in encoders}) as ids:
        run = _FusionRun(family, concepts, learned.token_names, settings, ids)
        first, last = Regularization(), Regularization(ridge=settings.ridge)
        if settings.pull:
            first = last = Regularization(ridge=settings.pull, towards_sum=True)
        read = Step("text encoders", text, encoders, run.read_prompts, run.text_places, first)
        run.fuse_layers(read)
        for number, concept in enumerate(concepts):
            _add_parameters(family, concept, encoders, f"fused {number}")
        crosses = Step("keys, values", crossed, (), run.denoise_once, run.word_places, first)
        run.fuse_layers(crosses)
        drawn = Step("other layers", others, (family.denoiser,), run.draw_prompts, how=last)
        run.fuse_layers(drawn)
    return run.fusion


def changed_layers(concepts: Sequence[Concept]) -> list[LayerKey]:
    """The layers that a concept changes at a strength other than 0, in the order of the files."""
    found: dict[LayerKey, None] = {}
    for concept in concepts:
        for component, updates in concept.state.components.items():
            if concept.strengths[component]:
                found |= dict.fromkeys((component, path) for path in updates)
    return list(found)


class Step(NamedTuple):
    """One step of a fusion."""

    name: str
    keys: Sequence[LayerKey]  # the layers that it fuses
    networks: Sequence[str]  # that have a concept's own changes meanwhile
    run: Callable[[int], None]  # forward passes for the concept of that number
    positions: ChosenPositions = lambda component: None
    how: Regularization = Regularization()


@dataclass
class _FusionRun:
    """What the steps of a fusion share."""

    family: Family
    concepts: Sequence[Concept]
    names: tuple[str, ...]  # of all learned tokens
    settings: FusionSettings
    ids: Mapping[str, Tensor]  # text encoder -> the token ids that it read last
    fusion: Fusion = field(default_factory=Fusion)
    # The number of the text that the first layer reads, of each prompt that the denoiser reads.
    texts_of_prompts: list[int] = field(default_factory=list)

    def fuse_layers(self, step: Step) -> None:
        """Fuses the layers by the inputs that they get, then puts the updates on the model.

        Where the Gram matrices of all layers take more than the memory for them, the passes are
        repeated for some layers at a time.
        """
        fits = self.fusion.fits.setdefault(step.name, {})
        parts = list(self._split_by_memory(step.keys))
        for part in parts:
            records = []
            for number, concept in enumerate(self.concepts):
                with self._own_changes(concept, step):
                    layers = {key: self._layer(key) for key in part}
                    with recorded_inputs(layers, step.positions) as record:
                        step.run(number)
                records.append(record)
            self._check_records(part, records)
            for keys, spectrum in self._spectra(part, records):
                for key in keys:
                    fits[key] = self._fit_layer(key, spectrum, step.how)
        _refuse_small_sets(step.name, fits)
        for name in dict.fromkeys(key[0] for key in step.keys):
            made = {key: self.fusion.updates[key] for key in step.keys if key[0] == name}
            self._load(name, made, f"fused_{len(self.fusion.fits)}")

    # ------------------------------------------------------------ passes

    def read_prompts(self, number: int) -> None:
        """Encodes the prompts of a concept."""
        encode_layer_prompts(self.family.encode_prompts, self.concepts[number].bound_prompts())

    def denoise_once(self, number: int) -> None:
        """One call of the denoiser for the prompts of a concept."""
        prompts = self.concepts[number].bound_prompts()
        self.texts_of_prompts = first_texts(prompts)
        levels, noise = self._levels(), self._noise([0] * len(prompts))
        first = NoiseLevel(*(values[:1].float().expand(len(prompts)) for values in levels))
        level = first.to(self.family.device)
        self.family.denoise(noise, level, self._conditioning(prompts))

    def draw_prompts(self, number: int) -> None:
        """Draws images of each prompt, without guidance; each has a seed of its own."""
        prompts = self.concepts[number].bound_prompts()
        before = sum(len(other.prompts) for other in self.concepts[:number])
        jobs = list(itertools.product(prompts, range(self.settings.images)))
        first = self.settings.seed + before * self.settings.images
        sampler = sampling.SAMPLERS[self._sampler]
        levels = self._levels()
        path = self.concepts[number].path
        for i, (prompt, _) in enumerate(track(jobs, path, "image", len(jobs))):
            denoise = sampling.guided_denoiser(
                self.family.denoise, self.family.prediction, self._conditioning([prompt])
            )
            sampler.run(denoise, sampling.start_latents(self._noise([first + i]), levels), levels)

    def text_places(self, component: str) -> Tensor:
        """The positions of the prompts that a text encoder reads."""
        eos_id = self.family.tokenizers[component].eos_token_id
        return text_positions(self.ids[component], eos_id)

    def word_places(self, component: str) -> Tensor:
        """The positions of learned tokens and EOS in the prompts that the denoiser reads.

        They are the same in the texts of all layers.
        """
        name, ids = next(iter(self.ids.items()))
        ids = ids[self.texts_of_prompts]
        tokenizer = self.family.tokenizers[name]
        learned = tokenizer.convert_tokens_to_ids(list(self.names))
        return concept_positions(ids, learned, tokenizer.eos_token_id)

    @property
    def _sampler(self) -> str:
        return "flow_euler" if self.family.schedule.kind == "flow" else "dpmpp_2m"

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        side = (self.settings.resolution or self.family.resolution) // self.family.factor
        return self.family.latent_channels, side, side

    def _levels(self) -> NoiseLevel:
        return sampling.sampler_levels(
            self._sampler,
            self.family.schedule_at(*self._latent_shape[1:]),
            self.settings.steps,
            spacing=self.family.spacing,
            offset=self.family.offset,
        )

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        return start_noise(seeds, self._latent_shape).to(self.family.device)

    def _conditioning(self, prompts: Sequence[Prompt]) -> Conditioning:
        side = self._latent_shape[1] * self.family.factor
        sizes = Sizes.uncropped(side, side, len(prompts))
        cond = encode_layer_prompts(self.family.encode_prompts, prompts)
        return self.family.add_size_embeddings(cond, sizes, 1.0)

    # ------------------------------------------------------------ layers

    def _layer(self, key: LayerKey) -> nn.Module:
        path = self.family.layout.module_path(*key)
        return self.family.modules[key[0]].get_submodule(path)

    def _base_weight(self, key: LayerKey) -> Tensor:
        weight = self._layer(key).weight  # of the base, where the layer has adapters
        assert isinstance(weight, Tensor)
        return weight

    def _split_by_memory(self, keys: Sequence[LayerKey]) -> Iterator[list[LayerKey]]:
        """The layers in parts whose Gram matrices, one for each concept, fit into the memory."""
        part: list[LayerKey] = []
        size = 0.0
        for key in keys:
            features = self._base_weight(key)[0].numel()
            own = NUMBER_BYTES * features**2 * len(self.concepts)
            if part and size + own > self.settings.memory:
                yield part
                part, size = [], 0.0
            part.append(key)
            size += own
        if part:
            yield part

    @contextmanager
    def _own_changes(self, concept: Concept, step: Step) -> Iterator[None]:
        """A context in which some networks have a concept's own updates of a step's layers."""
        with ExitStack() as stack:
            for name in step.networks:
                network = self.family.modules[name]
                own = concept.state.components.get(name, {})
                updates = {
                    key: own[key[1]] for key in step.keys if key[0] == name and key[1] in own
                }
                if updates and concept.strengths[name]:
                    self._load(name, updates, "concept", concept.strengths[name])
                    stack.callback(injection.remove, network, "concept")
            _add_parameters(self.family, concept, step.networks, "concept")
            for name in step.networks:
                network = self.family.modules[name]
                stack.callback(changed_parameters.remove_changes, network, "concept")
            yield

    def _load(
        self,
        component: str,
        updates: Mapping[LayerKey, LowRank | DenseUpdate],
        name: str,
        strength: float = 1.0,
    ) -> None:
        paths = {self.family.layout.module_path(*key): own for key, own in updates.items()}
        injection.load_factors(self.family.modules[component], paths, name, strength)

    def _check_records(self, keys: Sequence[LayerKey], records: Records) -> None:
        """Raises UserError for a layer that took no part in the passes of a concept."""
        for concept, record in zip(self.concepts, records):
            for key in keys:
                if key not in record:
                    raise UserError(
                        f"{'.'.join(key)} takes no part in drawing the prompts of {concept.path}, "
                        "so that its update cannot be fused; leave the layer out with mix"
                    )

    def _spectra(
        self, keys: Sequence[LayerKey], records: Records
    ) -> Iterator[tuple[list[LayerKey], InputSpectrum]]:
        """Layers that read the same inputs, and these inputs decomposed."""
        groups: dict[tuple[int, ...], list[LayerKey]] = {}
        for key in keys:
            groups.setdefault(tuple(id(record[key]) for record in records), []).append(key)
        for group in track(groups.values(), "solving", "group", len(groups)):
            try:
                yield group, decompose_inputs([record[group[0]] for record in records])
            except ValueError as error:
                raise UserError(f"{'.'.join(group[0])}: {error}") from None

    def _fit_layer(self, key: LayerKey, spectrum: InputSpectrum, how: Regularization) -> LayerFit:
        """Fuses a layer, keeps its update, and returns how well it fits."""
        weight = self._base_weight(key)
        try:
            factors = [concept.layer_factors(key, weight) for concept in self.concepts]
        except ValueError as error:
            raise UserError(f"{'.'.join(key)}: {error}") from None
        fused = spectrum.fuse(factors, how)
        self.fusion.updates[key] = _as_update(fused.update, weight.shape)
        return LayerFit(
            sum(own.count for own in spectrum.moments),
            spectrum.condition,
            fused.residuals,
            spectrum.lose_by_sum(factors),
            fused.energies,
            spectrum.rank == max(spectrum.own_ranks, default=0) and fused.least_loss > AGREEMENT,
        )


def first_texts(prompts: Sequence[Prompt]) -> list[int]:
    """For each prompt the number of its first layer's text among those that are encoded."""
    rows = split_prompts(prompts)[1]
    return list(range(len(prompts))) if rows is None else [row[0] for row in rows]


def _install_learned_tokens(family: Family, learned: AdapterState) -> None:
    """Puts the token rows of all concepts into the text encoders and tokenizers."""
    every = (Placeholder("all tokens", learned.token_names, init="zero"),)
    for component, key in family.layout.encoders.items():
        if key in learned.tokens:
            encoder, tokenizer = family.modules[component], family.tokenizers[component]
            embedding = tokens.install_tokens(encoder, tokenizer, every, seed=0)
            tokens.load_token_rows(embedding, learned.tokens[key])


def _add_parameters(family: Family, concept: Concept, networks: Iterable[str], name: str) -> None:
    """Adds a concept's changes of norms and biases to some networks."""
    for component in networks:
        prefix = family.layout.component(component).module_prefix
        vectors = concept.state.parameters.get(component, {})
        own = {path.removeprefix(prefix): vector for path, vector in vectors.items()}
        if own:
            network, strength = family.modules[component], concept.strengths[component]
            changed_parameters.add_changes(network, own, name, strength)


def _check_family(family: Family, settings: FusionSettings) -> None:
    """Raises UserError for a model or a size with which no image of a prompt can be drawn."""
    if family.inpainting:
        raise UserError(
            "the base is an inpainting model, which draws no image from a prompt alone; "
            "fuse into the plain model of that family"
        )
    if settings.resolution < 0 or settings.resolution % family.multiple:
        raise UserError(
            f"--resolution {settings.resolution}: the sides of this model's images must be "
            f"multiples of {family.multiple}, such as {family.resolution}"
        )


def _refuse_small_sets(step: str, fits: Mapping[LayerKey, LayerFit]) -> None:
    """Raises UserError where the inputs of the concepts coincide in all layers of several."""
    shared = {}
    for key, fit in fits.items():
        if sum(energy > 0 for energy in fit.energies) > 1:
            shared[key] = fit
    if not shared or not all(fit.coincides for fit in shared.values()):
        return
    key, fit = max(shared.items(), key=lambda item: item[1].condition)
    raise UserError(
        f"the activation sets are too small: in the step {step} the {fit.samples} inputs of "
        f"{'.'.join(key)} lie in the directions of a single concept's (condition number "
        f"{fit.condition:.1e}), so that the updates of the others contradict it; give each concept "
        "more and other prompts with --prompts"
    )


def _as_update(factors: Factors, shape: torch.Size) -> LowRank | DenseUpdate:
    """The update of a weight of that shape, on the CPU."""
    down = factors.down.cpu()
    if factors.up is None:
        return DenseUpdate("full", tuple(shape), {"diff": down.float().reshape(shape)})
    ones = [1] * (len(shape) - 2)
    up = factors.up.cpu().reshape(*factors.up.shape, *ones)
    return LowRank(down.reshape(len(down), *shape[1:]), up, 1.0)
