"""Placeholder words of captions and prompts, and the learned tokens that replace them."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_core.errors import UserError
from lora_core.text import normalize_unicode

# First words of Unicode's letter names in scripts without spaces between words, or with particles
# that are attached to words.
UNSPACED = (
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "HANGUL",
    "HALFWIDTH HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI ",
)  # fmt: skip


Prompt = str | tuple[str, ...]  # one text, or one for each cross-attention layer


@dataclass(frozen=True)
class Placeholder:
    """One concept: its word in captions, its learned tokens and their initializer."""

    word: str  # "TOK"
    names: tuple[str, ...]  # ("<s0>", "<s1>")
    # "random" (normal at the table's std), "random:SIGMA", "zero" (also "<rand-SIGMA>", "<zero>"),
    # or words of the vocabulary; several of them joined by "+" for the rows of one word
    init: str = "random"
    # 0: the tokens are the same for all layers. Else `names` has the tokens of the first
    # cross-attention layer, then those of the second ... (P+, arXiv 2303.09522).
    layers: int = 0

    def names_at(self, layer: int) -> tuple[str, ...]:
        """The tokens that replace the word in the text of a cross-attention layer."""
        if not self.layers:
            return self.names
        count = len(self.names) // self.layers
        return self.names[layer * count : (layer + 1) * count]


def make_placeholders(
    words: Mapping[str, str] | Sequence[str],
    vectors: int | Sequence[int] = 2,
    *,
    layers: int = 0,
    names: Sequence[str] = (),
) -> tuple[Placeholder, ...]:
    """One placeholder per word; `vectors` is the number of tokens of each, or one number per word.

    With `layers` above 0 each word has that number of tokens for every cross-attention layer.
    Tokens have `names` over all words, or are numbered <s0> <s1> ..., as in diffusers. `words`
    maps a word to its initializer, or lists words that start at random. Raises UserError for no
    words, an empty or repeated one, vectors < 1, and another number of names.
    """
    if isinstance(words, str):
        words = (words,)
    given = words.items() if isinstance(words, Mapping) else ((word, "random") for word in words)
    inits = {normalize_unicode(word): init for word, init in given}
    if not inits or len(inits) != len(words):
        raise UserError(f"expected one or more different placeholder words, got {list(words)}")
    counts = [vectors] * len(inits) if isinstance(vectors, int) else list(vectors)
    if len(counts) != len(inits):
        raise UserError(
            f"got {len(counts)} numbers of vectors for {len(inits)} words; "
            "give one for all or one each"
        )
    if min(counts) < 1:
        raise UserError(f"a placeholder word needs at least 1 token, got {min(counts)}")
    for word in inits:
        if not word or word != word.strip():
            raise UserError(
                f"the placeholder word {word!r} is empty or has spaces around it; "
                "use something like 'TOK'"
            )
    total = sum(counts) * max(layers, 1)
    if names and len(names) != total:
        raise UserError(
            f"got {len(names)} names for {total} learned tokens: {' '.join(names)}; name each token"
        )
    known = names or [f"<s{number}>" for number in range(total)]
    placeholders = []
    first = 0
    for (word, init), count in zip(inits.items(), counts):
        count *= max(layers, 1)
        own = tuple(known[first : first + count])
        placeholders.append(Placeholder(word, own, init, layers))
        first += count
    return tuple(placeholders)


def describe_tokens(placeholder: Placeholder) -> str:
    """The tokens as people read them: "<s0><s1>", or "<s0><s1> to <s30><s31>, by layer"."""
    text = "".join(placeholder.names_at(0))
    if placeholder.layers > 1:
        text += f" to {''.join(placeholder.names_at(placeholder.layers - 1))}, by layer"
    return text


def bind_placeholders(caption: str, placeholders: Sequence[Placeholder], layer: int = 0) -> str:
    """The caption with every placeholder word replaced by its tokens, without spaces between them.

    `layer` is the cross-attention layer that reads the text; only words with tokens for each layer
    depend on it. "a photo of TOK" -> "a photo of <s0><s1>". One pass, longest word first, whole
    words only: neither "TOK" in "TOK2" nor "Ren" in "René" nor a replacement is ever replaced
    (successive `str.replace`, as in the public scripts, turns "TOK2" into "<s0><s1>2"). Words and
    caption are compared in Unicode's normal form C, so that composed and decomposed accents are
    equal.
    """
    if not placeholders:
        return caption
    caption = normalize_unicode(caption)
    joined = {normalize_unicode(p.word): "".join(p.names_at(layer)) for p in placeholders}
    parts = []
    end = 0
    for start, word in _find_words(caption, tuple(joined)):
        parts += [caption[end:start], joined[word]]
        end = start + len(word)
    return "".join([*parts, caption[end:]])


def bind_layers(caption: str, placeholders: Sequence[Placeholder]) -> Prompt:
    """The caption bound as by `bind_placeholders`, with a text for each layer where they differ.

    They differ in captions with a word that has tokens for each cross-attention layer.
    """
    layers = 0
    for placeholder in placeholders:
        if placeholder.layers and has_placeholder(caption, placeholder.word):
            layers = placeholder.layers
    if not layers:
        return bind_placeholders(caption, placeholders)
    return tuple(bind_placeholders(caption, placeholders, layer) for layer in range(layers))


def has_placeholder(caption: str, word: str) -> bool:
    """Whether `bind_placeholders` would find the word in the caption."""
    found = _find_words(normalize_unicode(caption), (normalize_unicode(word),))
    return next(found, None) is not None


def truncated_tokens(
    caption: str, placeholders: Sequence[Placeholder], tokenizer: Any, length: int
) -> dict[str, bool]:
    """Learned token in a caption -> whether the tokenizer, cutting at `length`, cuts it off."""
    bound = bind_placeholders(caption, placeholders)  # all layers' texts have as many tokens
    whole = tokenizer(bound, verbose=False).input_ids
    kept = whole
    if len(whole) > length:
        kept = tokenizer(bound, verbose=False, truncation=True, max_length=length).input_ids
    is_cut = {}
    for placeholder in placeholders:
        for name in placeholder.names_at(0):
            index = tokenizer.convert_tokens_to_ids(name)
            if index in whole:
                is_cut[name] = whole.count(index) > kept.count(index)
    return is_cut


def token_positions(
    caption: str, placeholders: Sequence[Placeholder], tokenizer: Any, length: int
) -> list[int]:
    """The positions of the learned tokens among a caption's first `length` tokens, in their order.

    They are the same in the texts of all layers.
    """
    names: list[str] = []
    for placeholder in placeholders:
        names += placeholder.names_at(0)
    learned = set(tokenizer.convert_tokens_to_ids(names))
    bound = bind_placeholders(caption, placeholders)
    ids = tokenizer(bound, verbose=False, truncation=True, max_length=length).input_ids
    return [position for position, index in enumerate(ids) if index in learned]


def word_positions(
    word: str, caption: str, placeholders: Sequence[Placeholder], tokenizer: Any, length: int
) -> list[int]:
    """The positions of a word's tokens among a caption's first `length` tokens, in order.

    The word is a placeholder or any other word or phrase of the caption, each of its occurrences
    counts. A tokenizer that has not learned a placeholder's tokens reads their names as plain text,
    of which these are the pieces. Words of several texts (one for each layer) are counted in the
    first.
    """
    bound = bind_placeholders(normalize_unicode(caption), placeholders)
    wanted = bind_placeholders(normalize_unicode(word), placeholders)
    spans = [(start, start + len(wanted)) for start, _ in _find_words(bound, (wanted,))]
    if not spans:
        return []
    read = tokenizer(
        bound, verbose=False, truncation=True, max_length=length, return_offsets_mapping=True
    )
    found = []
    for position, (first, last) in enumerate(read.offset_mapping):
        if any(first < end and start < last for start, end in spans):
            found.append(position)
    return found


def _find_words(caption: str, words: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(position, word) of the whole words in a caption, from left to right.

    Of several at one position the longest.
    """
    ordered = sorted(words, key=len, reverse=True)
    start = 0
    while start < len(caption):
        length = 1
        for word in ordered:
            if caption.startswith(word, start) and _is_whole_word(
                caption, start, start + len(word)
            ):
                yield start, word
                length = len(word)
                break
        start += length


def _is_whole_word(caption: str, start: int, end: int) -> bool:
    """Whether caption[start:end] is not a part of a longer word."""
    if start > 0 and _is_word_letter(caption[start]) and _is_word_letter(caption[start - 1]):
        return False
    if end == len(caption) or not _is_word_letter(caption[end - 1]):
        return True
    return not (_is_word_letter(caption[end]) or _is_accent(caption[end]))


def _is_word_letter(character: str) -> bool:
    """Whether a letter next to this character belongs to the same word.

    False in scripts that write words without spaces, or attach particles to them: "TOK" is found in
    一张TOK的照片 and TOK은.
    """
    if character.isascii():
        return character.isalnum() or character == "_"
    is_letter = character.isalnum() or _is_accent(character)
    return is_letter and not unicodedata.name(character, "").startswith(UNSPACED)


def _is_accent(character: str) -> bool:
    """Whether the character is a combining mark, which changes the one before it."""
    is_mark = unicodedata.category(character).startswith("M")
    return is_mark and not unicodedata.name(character, "").startswith("VARIATION")
