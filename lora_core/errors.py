"""Errors that a user can fix, and names as they can be printed."""


class UserError(ValueError):
    """One sentence a user can act on: what was received, what was expected, what to do. Scripts print it and end with status 2."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


def printable(text: object) -> str:
    """The text with bytes of file names that are no UTF-8 written as \\xe9, so that every terminal and file takes it."""
    name = str(text)
    try:
        name.encode()
    except UnicodeEncodeError:
        return "".join(map(_escaped, name))
    return name


def _escaped(character: str) -> str:
    """A lone surrogate as the byte that it stands for (PEP 383), else as \\ud800; other characters as they are."""
    code = ord(character)
    if not 0xD800 <= code <= 0xDFFF:
        return character
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
