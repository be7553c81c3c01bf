"""Textual inversion: learned token rows next to a frozen vocabulary.

Only the new rows are a parameter [n, d]. The embedding table has no gradient and no optimizer
state, so its bits cannot move (the public scripts train the whole table and put the old rows back
after every step).
"""

import copy
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.diffusion.noise import keyed_generator
from lora_core.errors import UserError
from lora_core.placeholders import Placeholder


class TokenReport(NamedTuple):
    """A learned token after training."""

    name: str
    nearest: tuple[tuple[str, float], ...]  # (vocabulary entry, cosine), best first
    norm: float
    drift: float  # L2 distance from the row's start


def count_initializer_tokens(init: str, tokenizers: Iterable[Any]) -> int:
    """The number of an initializer's tokens, the largest over the tokenizers.

    With that many rows all of it is used; a random or zero part next to words counts as one. Raises
    UserError for a random or zero start alone, which has no tokens, and for words that a tokenizer
    does not know.
    """
    if is_random_init(init):
        raise UserError(
            f"--tokens.vectors 0 counts the tokens of the initializer, and {init!r} has none; "
            "give a number of vectors or initializing words"
        )
    parts = split_initializer(init)
    counts = []
    for tokenizer in tokenizers:
        own = [
            1 if is_random_init(part) else len(_initializer_ids(part, tokenizer)) for part in parts
        ]
        counts.append(sum(own))
    return max(counts)


def is_random_init(init: str) -> bool:
    """Whether an initializer is random or zero in all its parts, without words of the vocabulary.

    Raises UserError for a random one without a usable standard deviation.
    """
    return all(_random_sigma(part) is not None for part in split_initializer(init))


def split_initializer(init: str) -> list[str]:
    """The parts of an initializer, in Mix-of-Show's spelling.

    "<rand-0.013>+woman" starts one row at random and the next at woman. Without a "+" between two
    words or random starts it is one part.
    """
    parts = [part.strip() for part in init.split("+")]
    return parts if all(parts) else [init]


def ordinary_words(placeholders: Sequence[Placeholder]) -> dict[str, str]:
    """Placeholder word -> the words that its tokens were initialized from; "" without any."""
    words = {}
    for placeholder in placeholders:
        parts = split_initializer(placeholder.init)
        words[placeholder.word] = " ".join(part for part in parts if not is_random_init(part))
    return words


class LearnedEmbedding(nn.Module):
    """A frozen embedding table and n learned rows for the ids first_id .. first_id + n - 1.

    Replaces the table in its text encoder. The output has the table's dtype; the rows stay fp32
    (cast a text encoder before `install_tokens`, not after). The ids may lie beyond the table or,
    where the table is longer than the vocabulary, over its unused rows.
    """

    rows: nn.Parameter  # [n, d] fp32
    initial: Tensor  # [n, d] the rows' first values, for the report
    table: Any  # the replaced module
    # the tokenizer's attributes, which `uninstall_tokens` restores
    tokenizer_before: dict[str, Any]
    table_trained: bool  # requires_grad of the table, restored likewise

    def __init__(
        self, table: nn.Module, rows: Tensor, names: Sequence[str], *, first_id: int
    ) -> None:
        super().__init__()
        if rows.ndim != 2 or rows.shape[0] != len(names):
            shape = list(rows.shape)
            raise ValueError(
                f"expected one row per token name, got rows {shape} for {len(names)} names"
            )
        self.table = table
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.rows = nn.Parameter(rows.detach().to(dtype).clone())
        self.register_buffer("initial", self.rows.detach().clone(), persistent=False)
        self.names = tuple(names)
        self.first_id = first_id

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [..., d] of ids [...]; gradients reach `rows` only."""
        offset = ids - self.first_id
        learned = (offset >= 0) & (offset < len(self.names))
        base = self.table(ids.masked_fill(learned, 0))
        rows = F.embedding(offset.clamp(0, len(self.names) - 1), self.rows).to(base.dtype)
        return torch.where(learned.unsqueeze(-1), rows, base)

    @property
    def weight(self) -> Tensor:
        """The frozen table's weight [V, d], where library code looks for it."""
        return self.table.weight

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight.shape[1]


def install_tokens(
    text_encoder: Any,
    tokenizer: Any,
    placeholders: Sequence[Placeholder],
    *,
    seed: int,
    stream: str = "",
) -> LearnedEmbedding:
    """Puts a LearnedEmbedding into the text encoder, with one row per token, and returns it.

    The tokens are added to the tokenizer in the placeholders' order. The table is never resized:
    ids follow the tokenizer's last one even where the table is longer. A second install wraps the
    first. Row k starts from the initializer's token k modulo their number, as in diffusers' Flux
    script. `stream` names the encoder where two of one width are to start from different random
    rows. Raises UserError, changing nothing, for a
    token that exists or repeats, or an initializer of unknown words or more tokens than rows.
    """
    names = list(itertools.chain.from_iterable(p.names for p in placeholders))
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name in vocabulary:
            index = vocabulary[name]
            raise UserError(
                f"the token {name} is already in the tokenizer's vocabulary (id {index}); "
                "choose another name"
            )
    if not names or len(set(names)) != len(names):
        raise UserError(f"expected one or more different token names, got {names}")
    table = text_encoder.get_input_embeddings()
    rows = []
    for placeholder in placeholders:
        rows.append(_initial_rows(placeholder, table, tokenizer, seed=seed, stream=stream))
    before = copy.deepcopy(vars(tokenizer), {id(tokenizer): tokenizer})
    first_id = _add_tokens(tokenizer, names, before)
    embedding = LearnedEmbedding(table, torch.cat(rows), names, first_id=first_id)
    embedding.to(table.weight.device)
    embedding.tokenizer_before = before
    embedding.table_trained = table.weight.requires_grad
    table.weight.requires_grad_(False)
    text_encoder.set_input_embeddings(embedding)
    return embedding


def uninstall_tokens(text_encoder: Any, tokenizer: Any) -> None:
    """Undoes the latest `install_tokens`: the same table as before, and the tokenizer's state.

    Later additions to the tokenizer go too. Raises ValueError when nothing is installed.
    """
    embedding = text_encoder.get_input_embeddings()
    if not isinstance(embedding, LearnedEmbedding):
        raise ValueError(
            f"expected a text encoder with learned tokens, found {type(embedding).__name__}; "
            "install first"
        )
    embedding.weight.requires_grad_(embedding.table_trained)
    text_encoder.set_input_embeddings(embedding.table)
    _restore_tokenizer(tokenizer, embedding.tokenizer_before)


def copy_token_rows(embedding: LearnedEmbedding) -> Tensor:
    """A copy of the learned rows [n, d] in the order of `embedding.names`, fp32 on the CPU."""
    return embedding.rows.detach().float().cpu().clone().contiguous()


def strip_token_rows(
    state: Mapping[str, Tensor], embedding: LearnedEmbedding, text_encoder: nn.Module
) -> dict[str, Tensor]:
    """A state dict of the text encoder under its keys without learned tokens, and without rows."""
    modules = text_encoder.named_modules(remove_duplicate=False)
    prefixes = [f"{path}." for path, module in modules if module is embedding]
    found = {}
    for key, value in state.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        if not prefix:
            found[key] = value
            continue
        inner = re.sub(r"^(table\.)+", "", key.removeprefix(prefix))  # installed more than once
        if inner != "rows":
            found[prefix + inner] = value
    return found


def load_token_rows(embedding: LearnedEmbedding, rows: Tensor) -> None:
    """Puts saved rows [n, d] into the embedding.

    Raises UserError when they do not fit this encoder or hold NaN or Inf.
    """
    if rows.shape != embedding.rows.shape:
        expected = list(embedding.rows.shape)
        raise UserError(
            f"the token rows are {list(rows.shape)}, this text encoder takes {expected}; "
            "use the model they come from"
        )
    if not torch.isfinite(rows).all():
        names = ", ".join(embedding.names)
        raise UserError(
            f"the token rows of {names} hold NaN or Inf; "
            "the file is damaged or its training diverged"
        )
    with torch.no_grad():
        embedding.rows.copy_(rows)


@torch.no_grad()
def pull_norms_(rows: Tensor, target: float | Tensor = 0.4, *, rate: float | Tensor) -> Tensor:
    """The rows [n, d], in place, each with its L2 norm moved towards `target`.

    e <- e / |e| * (|e| + rate (target - |e|)): cloneofsimo's prior of stage 1, where
    rate = min(1, 100 lr) after each optimizer step. A row of zeros has no direction and is not
    changed; at rate 0 no bit changes.
    """
    # a tensor is not read: it may be on a GPU
    if not isinstance(rate, Tensor) and not 0 <= rate <= 1:
        raise ValueError(f"the rate of the norm prior is a fraction in [0, 1], got {rate}")
    norms = rows.norm(dim=-1, keepdim=True)
    factors = torch.where(norms > 0, 1 + rate * (target / norms - 1), torch.ones_like(norms))
    return rows.mul_(factors)


@torch.no_grad()
def hold_rows_(rows: Tensor, before: Tensor, *, limit: float | Tensor) -> Tensor:
    """The rows [n, d], in place, put back to `before` if its mean L2 norm had reached `limit`.

    `before` are the rows before an optimizer step. Once the mean norm of a run's rows has reached
    the limit they are never changed again: Mix-of-Show's emb_norm_threshold.
    """
    stopped = before.norm(dim=-1).mean() >= limit
    return rows.copy_(torch.where(stopped, before, rows))


@torch.no_grad()
def rescale_std_(rows: Tensor, std: float | Tensor, *, exponent: float = 0.1) -> Tensor:
    """The rows [n, d], in place, times (std / std(rows)) ** exponent, one factor for all rows.

    As in diffusers' pivotal scripts; `std` is usually `table_std`. Rows without any deviation are
    not changed.
    """
    own = rows.std()
    return rows.mul_(torch.where(own > 0, (std / own) ** exponent, torch.ones_like(own)))


def table_std(embedding: nn.Module) -> Tensor:
    """The standard deviation of all entries of the frozen table, a 0-dim fp32 tensor.

    diffusers measures it after the table was resized, new rows included; ours has the vocabulary's
    rows only.
    """
    return embedding.weight.detach().float().std()  # type: ignore[operator]


def first_eos(ids: Tensor, eos_id: int) -> Tensor:
    """The position [b] of the first end-of-text token in ids [b, s].

    Pooled embeddings are read there. With eos_token_id 2 in a configuration transformers takes the
    largest id instead, which with added tokens is a placeholder. Raises ValueError naming the rows
    without one.
    """
    found = ids == eos_id
    missing = (~found.any(dim=-1)).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"no end-of-text token {eos_id} in row(s) {missing} of the token ids; "
            "truncate prompts so that it stays"
        )
    return found.int().argmax(dim=-1)


@torch.no_grad()
def report_tokens(embedding: LearnedEmbedding, tokenizer: Any, k: int = 5) -> list[TokenReport]:
    """The k nearest vocabulary entries (cosine), norm and drift of each learned token."""
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    count = min(embedding.num_embeddings, embedding.first_id)
    known = [index for index in range(count) if index in words]
    table = F.normalize(embedding.weight[known].to(embedding.rows.dtype), dim=-1)
    cosines, indices = (F.normalize(embedding.rows, dim=-1) @ table.T).topk(min(k, len(known)))
    norms = embedding.rows.norm(dim=-1).tolist()
    drifts = (embedding.rows - embedding.initial).norm(dim=-1).tolist()
    reports = []
    for i, name in enumerate(embedding.names):
        entries = [words[known[index]] for index in indices[i].tolist()]
        nearest = tuple(zip(entries, cosines[i].tolist(), strict=True))
        reports.append(TokenReport(name, nearest, norms[i], drifts[i]))
    return reports


@torch.no_grad()
def _initial_rows(
    placeholder: Placeholder, table: Any, tokenizer: Any, *, seed: int, stream: str
) -> Tensor:
    """The first values of the rows [n, d], fp32, from the initializer.

    Random ones depend on (seed, token name, d, stream) only. Rows for layers start alike in all
    layers, as in Mix-of-Show.
    """
    names = placeholder.names_at(0)
    starts: list[Tensor] = []  # of one part of the initializer after another
    parts = split_initializer(placeholder.init)
    for part in parts:
        sigma = _random_sigma(part)
        if sigma is None:
            ids = _initializer_ids(part, tokenizer)
            starts += table(torch.tensor(ids, device=table.weight.device)).cpu()
            continue
        # the only part of an initializer is that of all rows
        own = names if len(parts) == 1 else names[len(starts) : len(starts) + 1]
        for name in own:
            starts.append(_random_row(name, table, sigma, seed=seed, stream=stream))
    if len(starts) > len(names):
        raise UserError(
            f"the initializer {placeholder.init!r} of {placeholder.word} is {len(starts)} tokens, "
            f"more than its {len(names)} learned vectors; "
            f"set --tokens.vectors {len(starts)} (or 0: as many as it has) or shorten it"
        )
    rows = torch.stack([starts[k % len(starts)] for k in range(len(names))])
    return rows.repeat(max(placeholder.layers, 1), 1)


def _random_row(name: str, table: Any, sigma: float, *, seed: int, stream: str) -> Tensor:
    """A row [d] with this standard deviation, the table's own for NaN."""
    d = table.weight.shape[1]
    if sigma == 0:
        return torch.zeros(d)
    generator = keyed_generator(seed, name, 0, f"token row {d} {stream}".rstrip())
    row = torch.randn(d, generator=generator)
    return row * (table_std(table).cpu() if math.isnan(sigma) else sigma)


def _random_sigma(init: str) -> float | None:
    """The standard deviation of a random initializer; None for words of the vocabulary.

    NaN is the table's own, 0 for zero. "<rand-SIGMA>", "<zero>" are lora_pti's spelling.
    """
    if init in ("random", "zero", "<zero>"):
        return math.nan if init == "random" else 0.0
    found = re.fullmatch(r"random:(.*)|<rand-?(.*)>", init)
    if found is None:
        return None
    try:
        sigma = float(found[found.lastindex or 1])
    except ValueError:
        sigma = math.nan
    if not (math.isfinite(sigma) and sigma > 0):
        raise UserError(
            f"the initializer {init!r} has no spread that is a positive number; "
            "write random:0.017, or <rand-0.017>"
        )
    return sigma


def _initializer_ids(init: str, tokenizer: Any) -> list[int]:
    """The ids of the initializer's tokens, without special ones.

    Raises UserError when there are none or the tokenizer does not know one.
    """
    ids = tokenizer(init, add_special_tokens=False).input_ids
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not ids or (unknown is not None and unknown in ids):
        raise UserError(
            f"the tokenizer does not know the initializer {init!r} (--tokens.init); "
            "choose other words, random or zero"
        )
    return ids


def _add_tokens(tokenizer: Any, names: list[str], before: dict[str, Any]) -> int:
    """Adds the tokens and returns the first one's id.

    Restores the tokenizer and raises UserError when it does not read them, without spaces between,
    as one id each.
    """
    tokenizer.add_tokens(names)
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
    joined = tokenizer("".join(names), add_special_tokens=False, verbose=False).input_ids
    read = [index for index in joined if index in set(ids)]
    if ids != list(range(ids[0], ids[0] + len(ids))) or read != ids:
        _restore_tokenizer(tokenizer, before)
        raise UserError(
            f"the tokenizer gave {names} the ids {ids} and reads them joined as {read}, expected "
            "consecutive ids; choose plainer names"
        )
    return ids[0]


def _restore_tokenizer(tokenizer: Any, before: dict[str, Any]) -> None:
    vars(tokenizer).clear()
    vars(tokenizer).update(before)
