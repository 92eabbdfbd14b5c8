"""The base of errors that a user can put right, and what goes into messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message is one line, says what is wrong and what to do.

    Programs that run for a user print it without a traceback.
    """


def quoted(text: object) -> str:
    """Return what a device said, fit for a log line: on one line, and short."""
    return repr(str(text))[:200]


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known word that is most like this one.

    Empty where none is like it; made to stand at the end of a message.
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
