"""Errors that a user can fix, and text that every terminal and file can encode."""


class UserError(ValueError):
    """One sentence that a user can act on: what was received, what was expected, what to do.

    Scripts print it and end with status 2.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


def first_line(error: BaseException) -> str:
    """The first line of a library's error, without its full stop, for quoting in a UserError.

    The name of its class where it has no text.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def printable(text: object) -> str:
    r"""The text with bytes of file names that are not UTF-8 written as \xe9."""
    name = str(text)
    try:
        name.encode()
    except UnicodeEncodeError:
        return "".join(map(_escape_surrogate, name))
    return name


def _escape_surrogate(character: str) -> str:
    r"""A lone surrogate as the byte that it encodes (PEP 383), else as \ud800.

    Other characters are returned unchanged.
    """
    code = ord(character)
    if not 0xD800 <= code <= 0xDFFF:
        return character
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
