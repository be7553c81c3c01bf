"""Put a LoRA file on networks in memory in one call, and take it off again.

pipe = StableDiffusionPipeline.from_pretrained(...)
with patch(pipe, "runs/dog", 0.8) as p:
    image = pipe(p.bind("a photo of TOK")).images[0]

Words with tokens for each cross-attention layer (P+) have no place in one text:

with patch(pipe, "edlora.pth") as p:
    image = pipe(**p.encode("a photo of <dog1> <dog2>", negative="blurry")).images[0]
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_core import formats, tokens
from lora_core.adapters import (
    changed_parameters,
    custom_files,
    injection,
    noise_levels,
    pipeline_prompts,
)
from lora_core.adapters.adapted_layer import adapted_layers
from lora_core.adapters.live_modules import (
    collect_modules,
    family_layout,
    largest_timestep,
    live_layout,
    networks_in_file,
    networks_of,
)
from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.formats.layout import Layout
from lora_core.formats.token_files import find_token_file, list_words, token_file_of, trained_words
from lora_core.placeholders import Placeholder, bind_placeholders

MOST_LISTED = 4  # renamed tokens that are reported one by one
TOKENIZERS = {  # text encoder -> the key of its tokenizer
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
}


class Patch:
    """A LoRA or embedding file that acts on networks, until `undo` or the end of a `with` block.

    Afterwards modules, embedding tables and tokenizer contents are the same as before.
    `placeholders` are the placeholder words and learned tokens of the file, for
    `bind_placeholders`; `report` has one sentence for each unexpected fact (renamed tokens,
    rows that are not in the file).
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        name: str,
        placeholders: tuple[Placeholder, ...],
        report: tuple[str, ...],
    ) -> None:
        self.modules = dict(modules)
        self.name = name
        self.placeholders = placeholders
        self.report = report
        self.adapted: list[str] = []  # components with this patch's adapters or changes
        self.layered: list[str] = []  # of these the ones with adapted layers
        self.embedded: dict[str, tokens.LearnedEmbedding] = {}  # component -> its learned rows
        self.given: Any = None  # what was patched: a pipeline, a family, a network or several
        self.processors: dict[str, Any] = {}  # cross-attention module -> its replaced processor

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline, or None where none was given."""
        return self.given if hasattr(self.given, "encode_prompt") else None

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def bind(self, prompt: str) -> str:
        """The prompt with the file's placeholder words replaced by its learned tokens.

        Raises UserError for a word with tokens for each layer (see `encode`).
        """
        pipeline_prompts.refuse_bound_layers(prompt, self.placeholders)
        if hasattr(self.pipeline, "maybe_convert_prompt"):
            return bind_placeholders(
                prompt, pipeline_prompts.expandable_placeholders(self.placeholders)
            )
        return bind_placeholders(prompt, self.placeholders)

    def encode(self, prompt: str | Sequence[str], negative: str = "") -> dict[str, Tensor]:
        """Arguments for the pipeline's call in the place of prompt and negative_prompt.

        pipe(**p.encode("a photo of TOK")) draws any words of the file, also those with tokens for
        each cross-attention layer (P+): prompt_embeds and negative_prompt_embeds then have the
        layers' texts side by side, [b, s, layers * d]. Raises UserError where no pipeline was
        given.
        """
        if self.pipeline is None:
            raise UserError(
                "encode needs a diffusers pipeline, patch(pipe, FILE); with a model family, give "
                "placeholders=p.placeholders to generate_images"
            )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return pipeline_prompts.encode_for_pipeline(
            self.pipeline, prompts, negative, self.placeholders
        )

    def set_strength(self, strength: float | Mapping[str, float]) -> None:
        """Change the strength, to one number or one per adapted component.

        Learned tokens have no strength.
        """
        for name, number in _component_strengths(strength, self.adapted, self.name).items():
            if name in self.layered:
                injection.set_strength(self.modules[name], self.name, number)
            changed_parameters.set_change_strength(self.modules[name], self.name, number)

    def parameters(self) -> list[nn.Parameter]:
        """The factors and token rows on the networks."""
        found: list[nn.Parameter] = []
        for name in self.layered:
            found += injection.adapter_parameters(self.modules[name], self.name)
        return found + [embedding.rows for embedding in self.embedded.values()]

    def undo(self) -> None:
        """Take everything off; a second call does nothing.

        Patches with tokens on one tokenizer come off last first. Raises UserError, changing
        nothing, when a later patch added tokens: their ids follow those of the earlier.
        """
        for name, embedding in self.embedded.items():
            if self.modules[name].get_input_embeddings() is not embedding:
                raise UserError(
                    f"tokens were added to {name} after those of {self.name}; "
                    "undo the later patch first"
                )
        for name in list(self.embedded):
            tokens.uninstall_tokens(self.modules[name], self.modules[TOKENIZERS[name]])
            del self.embedded[name]
        if self.processors:
            network = self.modules[pipeline_prompts.DENOISER]
            pipeline_prompts.restore_processors(network, self.processors)
            self.processors = {}
        while self.layered:
            injection.remove(self.modules[self.layered.pop()], self.name)
        while self.adapted:
            changed_parameters.remove_changes(self.modules[self.adapted.pop()], self.name)


def patch(
    modules: Any,
    file: str | Path,
    strength: float | Mapping[str, float] = 1.0,
    *,
    layout: Layout | None = None,
    rename: Mapping[str, str] | None = None,
    kind: str = "",
) -> Patch:
    """Put a file on the given networks; nothing is copied, and several patches add up.

    modules: a diffusers pipeline, a loaded family, one network, or {"unet": ..., "text_encoder":
        ..., "tokenizer": ...} with the names that components have in pipelines; what the file does
        not touch may be among them.
    file: a .safetensors LoRA or embedding, or a run's folder (LoRA and token rows).
    strength: one number, or one for each component that the file adapts,
        {"unet": 0.6, "text_encoder": 0.9}. Tokens are on or off.
    layout: a family's names, where they differ from what `live_layout` finds, as in kohya's files
        for Flux: models.known.recognize_path(file) is the layout of the published model.
    rename: token or placeholder word in the file -> its name here. Two files from separate runs
        both have <s0>: a token that the tokenizer already knows is refused, because a prompt would
        then mean the other file's token; {"<s0>": "<dog0>", "TOK": "DOG"} keeps both.
    kind: the class of the adapters in a RUN_adapter.safetensors, FILE.py:Class, whose code is run.

    The tokenizer is changed in place (it cannot delete tokens, so `undo` puts back a copy of its
    contents made before). For words with tokens for each cross-attention layer (P+) the UNet gets
    attention processors that read them; `Patch.encode` makes their texts. Raises UserError before
    any module is touched: an unreadable file, a name or shape that does not fit, tokens for another
    number of layers, a component the file needs and `modules` lacks, a strength that would have no
    effect, a token that is taken.
    """
    source = str(file)
    rename = rename or {}
    given = modules
    layout = layout or family_layout(modules)
    modules = collect_modules(modules)
    networks = networks_of(modules)
    layout = layout or live_layout(networks)
    state = _load_for(file, layout, networks, kind)
    strengths = _component_strengths(strength, state.changed_components, source)
    names, placeholders = _rename_tokens(state, rename, source)
    encoders = _token_rows_by_encoder(state, modules, layout, names, source)
    layered = pipeline_prompts.check_layer_words(placeholders, layout, networks, source)
    adapter = _unused_adapter_name(networks, Path(file).stem)
    result = Patch(modules, adapter, placeholders, _unexpected_facts(state, rename, source))
    result.given = given
    try:
        _apply_state(state, networks, layout, strengths, result)
        if state.custom:
            _put_custom(state, networks, strengths, result, kind, source)
        _install_rows(names, encoders, result)
        if layered:
            network = networks[pipeline_prompts.DENOISER]
            result.processors = pipeline_prompts.install_layer_attention(network, layered)
    except BaseException:
        result.undo()
        raise
    for parameter in result.parameters():
        parameter.requires_grad_(False)
    return result


def _apply_state(
    state: AdapterState,
    networks: Mapping[str, nn.Module],
    layout: Layout,
    strengths: Mapping[str, float],
    result: Patch,
) -> None:
    """Puts a file's factors on the layers, and adds its changes to norms and biases."""
    for name, adapted in state.updates().items():
        factors = {layout.module_path(name, path): lr for path, lr in adapted.items()}
        injection.load_factors(networks[name], factors, result.name, strengths[name])
        result.layered.append(name)
        result.adapted.append(name)
    for name, vectors in state.parameters.items():
        prefix = layout.component(name).module_prefix
        own = {path.removeprefix(prefix): vector for path, vector in vectors.items()}
        changed_parameters.add_changes(networks[name], own, result.name, strengths[name])
        if name not in result.adapted:
            result.adapted.append(name)


def _install_rows(names: tuple[str, ...], rows: Mapping[str, Tensor], result: Patch) -> None:
    """Puts a file's tokens into the text encoders of `rows` and their tokenizers."""
    for component, own in rows.items():
        every = (Placeholder("all tokens of the file", names, init="zero"),)
        encoder, tokenizer = result.modules[component], result.modules[TOKENIZERS[component]]
        embedding = tokens.install_tokens(encoder, tokenizer, every, seed=0)
        result.embedded[component] = embedding
        tokens.load_token_rows(embedding, own)


def _put_custom(
    state: AdapterState,
    networks: Mapping[str, nn.Module],
    strengths: Mapping[str, float],
    result: Patch,
    kind: str,
    source: str,
) -> None:
    """Puts adapters of a user's class on the layers."""
    custom_files.put_adapters(networks, state, kind, result.name, source)
    largest = largest_timestep(result.given)
    for name in state.custom:
        result.layered.append(name)
        result.adapted.append(name)
        injection.set_strength(networks[name], result.name, strengths[name])
        if largest is not None:
            noise_levels.set_largest_timestep(networks[name], largest)


def _load_file(file: str | Path, layout: Layout, kind: str) -> AdapterState:
    """The state of a file; of adapters of a user's class only with this class.

    Raises UserError for a class where the file has no such adapters.
    """
    state = formats.load(file, layout, merging=True, custom=bool(kind))
    if kind and not state.custom:
        raise UserError(
            f"{file} holds no adapters of a class of its own, so that the class {kind} has no "
            "effect on it; leave it out"
        )
    return state


def _load_for(
    file: str | Path, layout: Layout, networks: Collection[str], kind: str
) -> AdapterState:
    """The state of a file. Raises UserError, also for a network that it adapts and is not given."""
    try:
        state = _load_file(file, layout, kind)
        adapted = state.changed_components
    except UserError as error:
        try:
            adapted = networks_in_file(file)  # to name a network that is missing
        except UserError:
            raise error from None
        if set(adapted) <= set(networks):
            raise
    for name in adapted:
        if name not in networks:
            given = ", ".join(networks) or "nothing"
            raise UserError(
                f"{file} adapts {name}, but only {given} was given; pass its module too, or the "
                "whole pipeline"
            )
    return state


def _component_strengths(
    strength: float | Mapping[str, float], components: Collection[str], source: str
) -> dict[str, float]:
    """Component -> strength.

    Raises UserError for one that is not finite, missing or without effect.
    """
    if not isinstance(strength, Mapping):
        if not components and strength != 1:
            raise UserError(
                f"{source} holds learned tokens only, which have no strength; leave {strength} out"
            )
        strength = dict.fromkeys(components, strength)
    for name in strength:
        if name not in components:
            known = ", ".join(components) or "no network"
            raise UserError(
                f"there is a strength for {name}, but {source} adapts {known}; remove it"
            )
    for name in components:
        if name not in strength:
            raise UserError(
                f"{source} adapts {name}, which has no strength in {dict(strength)}; "
                "give one (0 turns it off)"
            )
        if not math.isfinite(strength[name]):
            raise UserError(f"the strength of {name} is {strength[name]}, expected a finite number")
    return {name: float(number) for name, number in strength.items()}


def _rename_tokens(
    state: AdapterState, rename: Mapping[str, str], source: str
) -> tuple[tuple[str, ...], tuple[Placeholder, ...]]:
    """The tokens' names here, in row order, and the placeholder words with their tokens.

    A token without a word is its own word.
    """
    words = embeddings.placeholder_words(state, source)
    known = (*words, *state.token_names)
    for old in rename:
        if old not in known:
            raise UserError(
                f"there is no token or word {old} in {source} to rename; "
                f"it has {', '.join(known) or 'none'}"
            )
    names = tuple(rename.get(name, name) for name in state.token_names)
    used = [rename.get(word, word) for word in words]
    if len(set(names)) != len(names) or len(set(used)) != len(used):
        raise UserError(
            f"after renaming, {source} has the tokens {', '.join(names)} and words "
            f"{', '.join(used)}; they must differ"
        )
    with_word: set[str] = set()
    for own in words.values():
        with_word.update(own)
    layers = embeddings.word_layers(state, source)
    alone = {name: (name,) for name in state.token_names if name not in with_word}
    placeholders = []
    for word, own in (words | alone).items():
        renamed = tuple(rename.get(name, name) for name in own)
        new_word = rename.get(word, word)
        placeholders.append(Placeholder(new_word, renamed, layers=layers.get(word, 0)))
    return names, tuple(placeholders)


def _token_rows_by_encoder(
    state: AdapterState,
    modules: Mapping[str, Any],
    layout: Layout,
    names: tuple[str, ...],
    source: str,
) -> dict[str, Tensor]:
    """Component -> its token rows.

    Raises UserError for a text encoder or tokenizer that is not given, another width, or a token
    that is taken.
    """
    found = {}
    for key, rows in state.tokens.items():
        name = next(name for name, own in layout.encoders.items() if own == key)
        for needed in (name, TOKENIZERS[name]):
            if needed not in modules:
                raise UserError(
                    f"{source} has token rows for {name}, which needs a {needed} in the modules; "
                    "pass it, or the LoRA file alone"
                )
        width = modules[name].get_input_embeddings().weight.shape[1]
        if rows.shape[1] != width:
            raise UserError(
                f"the rows of {key} in {source} have width {rows.shape[1]}, "
                f"this {name} takes {width}; is it for another model?"
            )
        taken = [token for token in names if token in modules[TOKENIZERS[name]].get_vocab()]
        if taken:
            example = f'rename={{"{taken[0]}": "<other-{taken[0].strip("<>")}>"}}'
            raise UserError(
                f"{', '.join(taken)} of {source} is already in the {TOKENIZERS[name]}, "
                f"maybe from another file; give {example}"
            )
        found[name] = rows
    return found


def _unexpected_facts(
    state: AdapterState, rename: Mapping[str, str], source: str
) -> tuple[str, ...]:
    listed = dict(rename)
    renamed = [name for name in state.token_names if name in rename]
    facts = []
    if len(renamed) > MOST_LISTED:  # those of words for each layer can be hundreds
        first, last = renamed[0], renamed[-1]
        facts.append(
            f"the {len(renamed)} tokens {first} to {last} of {source} are called {rename[first]} "
            f"to {rename[last]} here"
        )
        listed = {old: new for old, new in rename.items() if old not in renamed}
    facts += [f"{old} of {source} is called {new} here" for old, new in listed.items()]
    if state.tokens and embeddings.TOKEN_NAMES not in state.metadata:
        facts.append(
            f"{source} does not name its tokens; they are called {', '.join(state.token_names)}, "
            "or as renamed"
        )
    if not state.tokens and embeddings.TOKEN_NAMES in state.metadata:
        facts.append(_describe_missing_tokens(state, source))
    return tuple(facts)


def _describe_missing_tokens(state: AdapterState, source: str) -> str:
    """Where the learned tokens of a LoRA without them are, and what its words are until then."""
    trained = trained_words(state.metadata)
    words = list_words(trained)
    if found := find_token_file(source):
        return (
            f"the learned tokens of {words} are in {Path(found).name}, not in "
            f"{Path(source).name}; give it too, or the run's folder"
        )
    place = "in" if Path(source).is_dir() else "beside"
    return (
        f"no token file {place} {Path(source).name} (expected {token_file_of(source).name}), "
        f"so {words} {'are ordinary words' if len(trained) > 1 else 'is an ordinary word'}"
    )


def _unused_adapter_name(networks: Mapping[str, nn.Module], wanted: str) -> str:
    """A name that no adapter on these networks has: the file's, numbered where needed.

    A module's name cannot have dots.
    """
    taken: set[str] = set()
    for network in networks.values():
        taken |= changed_parameters.names_of_changes(network)
        for layer in adapted_layers(network):
            taken.update(layer.adapters)
    first = name = f"patch_{wanted.replace('.', '_')}"
    number = 1
    while name in taken:
        number += 1
        name = f"{first}-{number}"
    return name
