"""Names with a * in a sum: every file that they match."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from lora_core.errors import UserError
from lora_core.escaped_output import print_note
from lora_core.formats.known_formats import EMBEDDINGS

MOST_MATCHES = 10_000  # files of one name; more are a wrong folder
WEIGHT_BEHIND = re.compile(r"(.+)\*(\d+\.?\d*|\.\d+)")  # a*0.5


def expand_pattern(pattern: str, output: str = "") -> list[str]:
    """The files and folders that a name with a * matches, in the order of their names.

    A * stands for any characters of one name, without a dot at its beginning; other characters for
    themselves. Token files of LoRAs that match are left out, with a note: they are no terms of a
    sum. Raises UserError for no file, for more than MOST_MATCHES, and where the output of the
    command would match too.
    """
    found = glob.iglob(_escape(pattern))
    files = sorted(itertools.islice(found, MOST_MATCHES + 1))
    if not files:
        advice = "a * in a name stands for any characters of it"
        if behind := WEIGHT_BEHIND.fullmatch(pattern):
            advice = f"a weight stands before its file: {behind[2]}*{behind[1]}"
        raise UserError(f"{pattern} matches no file; {advice}")
    if len(files) > MOST_MATCHES:
        raise UserError(
            f"{pattern} matches more than {MOST_MATCHES:,} files; name a folder with fewer"
        )
    if output and _matches(output, pattern):
        raise UserError(
            f"the output {output} matches {pattern}, so that the next mix would add it to itself; "
            "choose another folder or name"
        )
    return _leave_out_token_files(files, pattern)


def _leave_out_token_files(files: Sequence[str], pattern: str) -> list[str]:
    """The files without the token files that belong to others of them."""
    if not any(path.endswith(EMBEDDINGS) for path in files):
        return list(files)
    from lora_core.formats.token_files import find_token_file  # imports torch

    owned = {Path(found) for path in files if (found := find_token_file(path))}
    kept = [path for path in files if Path(path) not in owned]
    if count := len(files) - len(kept):
        first = next(path for path in files if path not in kept)
        is_one = count == 1
        print_note(
            f"{count:,} token file{'' if is_one else 's'} of the LoRAs in {pattern} "
            f"{'is' if is_one else 'are'} left out, such as {first}; give run folders to have the "
            "tokens in the result"
        )
    return kept


def _escape(pattern: str) -> str:
    """The pattern with ? and [ as plain characters."""
    return glob.escape(pattern).replace("[*]", "*")


def _matches(path: str, pattern: str) -> bool:
    names = PurePath(os.path.abspath(path)).parts
    wanted = PurePath(os.path.abspath(pattern)).parts
    if len(names) != len(wanted) or names[-1].startswith("."):
        return False
    return all(fnmatch.fnmatchcase(own, _escape(other)) for own, other in zip(names, wanted))
