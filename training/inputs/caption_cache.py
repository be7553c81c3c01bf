"""Captions of a run as its steps take them: encoded once and cached, or as token ids where a text
encoder or tokens train.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core.adapters import injection
from lora_core.config import Config, Stage
from lora_core.data.cache import TensorCache
from lora_core.errors import UserError
from lora_core.family import Conditioning
from lora_core.layer_prompts import encode_layer_prompts, split_prompts
from lora_core.memory.residency import to_device
from lora_core.placeholders import Placeholder, Prompt, bind_layers
from lora_core.progress import track
from lora_core.runs.run_folder import nonfinite_names
from lora_core.tensor_trees import map_tensors
from lora_core.tokens import ordinary_words
from training.checks import model_checks
from training.setup import Model

TEXT_GROUPS = frozenset({"text_encoder", "tokens"})  # that change what a caption is encoded to
EXTRA = "extra."  # before the names of further members in a row of the cache
HASHING_THREADS = 8  # blake2b does 1 GB/s in each, and T5 has 9.5 GB in bf16


@dataclass(frozen=True)
class TokenIds:
    """Token ids of captions, encoded in each step where a text encoder or tokens train."""

    ids: dict[str, Tensor]  # tokenizer's output -> [texts, ...], as family.encode takes it
    kept: Tensor | None  # [b] 0 in the rows of dropped captions that zeros replace, else 1
    # [b, layers] number of the text that a cross-attention layer reads; None: text i for image i
    layers: Tensor | None = None


@dataclass(frozen=True)
class CaptionRows:
    """Captions of a micro-batch, and whether each was dropped."""

    captions: Sequence[str]
    dropped: Sequence[bool]

    def map(self, words: Mapping[str, str]) -> CaptionRows:
        """The captions with words replaced."""
        changed = [model_checks.swap_words(caption, words) for caption in self.captions]
        return CaptionRows(changed, self.dropped)


class CaptionCache:
    """Encodings of captions, on the host: of the model as it is in a stage, and of the base model.

    They are kept on disk as well (--data.cache) in runs that train neither text encoders nor
    tokens: these encode as the published model does.
    """

    def __init__(self, config: Config, model: Model) -> None:
        self.config, self.model = config, model
        self.zeroes_dropped = model_checks.drops_to_zeros(config, model.family)
        learns = bool(model.embeddings) or any(name in model.encoders for name in model.adapted)
        self.folder = "" if learns else config.data.cache
        self.changes = learns  # by training, from one stage to the next
        settings = text_fingerprint(config, model) if self.folder else {}
        self.encoded = TensorCache(settings, self.folder or None)  # row of a caption
        self.base_encoded = TensorCache({})  # row of a caption, without adapters
        self.tokenized: dict[Prompt, dict[str, Tensor]] = {}  # bound text -> token ids [1, ...]
        self.bound: dict[str, Prompt] = {}  # caption -> its text, or one for each layer
        self.disk_keys: dict[str, str] = {}  # caption -> key of its row on disk
        self.has_layer_tokens = any(p.layers for p in model.placeholders)

    def begin_stage(self) -> None:
        """Drop the encodings that were made with the parameters before this stage."""
        if self.changes:
            self.encoded.clear()

    # ------------------------------------------------------------ in a step

    def make_text(self, rows: CaptionRows, stage: Stage) -> Conditioning | TokenIds:
        """The captions with their placeholders replaced by tokens: encoded, or as token ids where a
        text encoder or tokens train in this stage.
        """
        kept = self._kept(rows) if self.zeroes_dropped else None
        if TEXT_GROUPS.isdisjoint(stage.groups):
            cond = self._encode(rows.captions, self.encoded, self.model.placeholders)
            return cond if kept is None else cond.zeroed(self.model.family.zeros, kept)
        prompts: list[Prompt] = []
        for caption in rows.captions:
            if caption not in self.bound:
                self.bound[caption] = bind_layers(caption, self.model.placeholders)
            prompts.append(self.bound[caption])
        texts: Sequence[Prompt] = prompts
        layers = None
        if self.has_layer_tokens:  # a CUDA graph needs the same number of texts in each step
            texts, layers = split_prompts(prompts, distinct=not self.config.cuda_graph)
        ids: dict[str, list[Tensor]] = {}  # tokenizer's output -> a row for each text
        for text in texts:
            if text not in self.tokenized:
                assert isinstance(text, str)
                self.tokenized[text] = self.model.family.tokenize([text])
            for name, row in self.tokenized[text].items():
                ids.setdefault(name, []).append(row)
        joined = dict(zip(ids, map(torch.cat, ids.values())))
        if layers is None:
            return TokenIds(joined, kept)
        return TokenIds(joined, kept, to_device(torch.tensor(layers), self.model.device))

    def swapped_text(
        self, rows: CaptionRows, stage: Stage
    ) -> tuple[Conditioning | TokenIds, Conditioning]:
        """The captions with classes in place of the placeholder words: as `make_text` for the model
        with adapters, and encoded by the base model.
        """
        swapped = rows.map(self.config.prior.swap)
        return self.make_text(swapped, stage), self.encode_without_adapters(swapped)

    def plain_text(self, rows: CaptionRows) -> Conditioning:
        """The captions in ordinary words as the base model encodes them."""
        return self.encode_without_adapters(self._in_ordinary_words(rows))

    def encode_without_adapters(self, rows: CaptionRows) -> Conditioning:
        """The captions as the base model encodes them."""
        with self._without_adapters():
            cond = self._encode(rows.captions, self.base_encoded, ())
        if self.zeroes_dropped:
            cond = cond.zeroed(self.model.family.zeros, self._kept(rows))
        return cond

    # ------------------------------------------------------------ before a stage

    def encode_ahead(self, captions: Iterable[str]) -> int:
        """Encode the captions of a stage that trains no text, in every form that its steps read,
        where they are neither in memory nor on disk; returns how many encodings were made.

        With a folder they come in an order of this process's own, so that processes that share it
        seldom encode the same caption.
        """
        given = CaptionRows(list(dict.fromkeys(captions)), ())
        prior = self.config.prior
        swapped = given.map(prior.swap) if prior.swap else CaptionRows((), ())
        plain = self._in_ordinary_words(given) if prior.outside_mask else CaptionRows((), ())
        done = self._fill(
            [*given.captions, *swapped.captions], self.encoded, self.model.placeholders
        )
        with self._without_adapters():
            done += self._fill([*swapped.captions, *plain.captions], self.base_encoded, ())
        return done

    def _fill(
        self, captions: Sequence[str], cache: TensorCache, placeholders: Sequence[Placeholder]
    ) -> int:
        """Put the rows of captions into a cache; returns how many were not there."""

        def is_missing(caption: str) -> bool:
            return not cache.has_row(caption, disk_key=self._disk_key(caption, cache))

        missing = [caption for caption in dict.fromkeys(captions) if is_missing(caption)]
        if cache.folder is not None:
            random.Random(os.getpid()).shuffle(missing)
        done = 0
        for caption in track(missing, "encoding captions", "caption", len(missing)):
            if is_missing(caption):  # still: another process may have been faster
                row = self._row(caption, cache, placeholders)
                done += 1
                if done == 1:
                    cache.check_room(row, len(missing), "captions")
        return done

    # ------------------------------------------------------------ rows

    def _encode(
        self, captions: Sequence[str], cache: TensorCache, placeholders: Sequence[Placeholder]
    ) -> Conditioning:
        """The encodings of the captions on the device. Raises UserError for NaN."""
        rows = [self._row(caption, cache, placeholders) for caption in captions]
        cond = Conditioning.cat(list(map(unpack_conditioning, rows)))
        return map_tensors(cond, functools.partial(to_device, device=self.model.device))

    def _row(
        self, caption: str, cache: TensorCache, placeholders: Sequence[Placeholder]
    ) -> Mapping[str, Tensor]:
        """The row of a caption, from the cache or by the text encoders."""

        def encode() -> Mapping[str, Tensor]:
            prompt = bind_layers(caption, placeholders)
            with self.model.frozen():
                cond = encode_layer_prompts(self.model.family.encode_prompts, [prompt])
            if nonfinite_names({"prompt": cond.prompt_embeds, **cond.extra}):
                raise UserError(
                    f"the text encoder gives NaN or infinity for the prompt {caption!r} in "
                    f"{self.config.precision}: its weights are damaged or its numbers overflow; "
                    "use --precision bf16 or fp32, or fetch the model again"
                )
            return pack_conditioning(cond)

        return cache.row(caption, encode, disk_key=self._disk_key(caption, cache))

    def _disk_key(self, caption: str, cache: TensorCache) -> str:
        """The caption with its token ids, which follow from tokenizer, length and words."""
        if cache.folder is None:
            return caption
        if caption not in self.disk_keys:
            content = hashlib.blake2b(digest_size=16)
            for name, ids in self.model.family.tokenize([caption]).items():
                content.update(f"{name} {ids.tolist()}".encode())
            self.disk_keys[caption] = f"{caption}\0{content.hexdigest()}"
        return self.disk_keys[caption]

    def _in_ordinary_words(self, rows: CaptionRows) -> CaptionRows:
        words = ordinary_words(self.model.placeholders) | self.config.prior.swap
        plain = rows.map(words)
        return CaptionRows([" ".join(own.split()) for own in plain.captions], rows.dropped)

    def _without_adapters(self) -> ExitStack:
        stack = ExitStack()
        for encoder in self.model.encoders.values():
            stack.enter_context(injection.disable_adapters(encoder))
        return stack

    def _kept(self, rows: CaptionRows) -> Tensor:
        """[b] 0 for examples whose caption was dropped, else 1."""
        kept = torch.tensor([float(not dropped) for dropped in rows.dropped])
        return to_device(kept, self.model.device)


def trains_text(stage: Stage) -> bool:
    """Whether text encoders or tokens train in a stage: its steps encode their captions anew."""
    return not TEXT_GROUPS.isdisjoint(stage.groups)


def pack_conditioning(cond: Conditioning) -> dict[str, Tensor]:
    """The tensors of a conditioning by the names that they have in a row of the cache."""
    extra = {f"{EXTRA}{name}": values for name, values in cond.extra.items()}
    return {"prompt_embeds": cond.prompt_embeds, **extra}


def unpack_conditioning(row: Mapping[str, Tensor]) -> Conditioning:
    """The inverse of `pack_conditioning`."""
    extra = {n.removeprefix(EXTRA): t for n, t in row.items() if n.startswith(EXTRA)}
    return Conditioning(row["prompt_embeds"], extra)


def text_fingerprint(config: Config, model: Model) -> dict[str, str]:
    """Settings of a caption cache on the disk: the family and what its encoding depends on besides
    the token ids.
    """
    return {
        "captions": f"{model.family.name} {config.family}",
        "text encoders": hash_networks(model.encoders),
        "clip skip": str(config.clip_skip),
    }


def hash_networks(networks: Mapping[str, nn.Module]) -> str:
    """Hash of the names, dtypes and numbers of all tensors of networks; several threads take 2 s
    for 9.5 GB.
    """
    named: list[tuple[str, Tensor]] = []
    for component, network in networks.items():
        named += [(f"{component}.{name}", t) for name, t in network.state_dict().items()]

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        head = f"{name} {tensor.dtype} {list(tensor.shape)} ".encode()
        return head + hashlib.blake2b(numbers.data, digest_size=16).digest()

    content = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1)) as pool:
        for part in pool.map(digest, named):
            content.update(part)
    return content.hexdigest()
