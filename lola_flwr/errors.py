"""The base of errors that a user can put right, and what goes into messages."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

_Options = TypeVar("_Options")

_LONGEST_QUOTE = 200

# Directories of a path from the root or the home on: where that is a whole value (also
# behind "random:"), which may hold spaces; and where it is part of a sentence.
_OF_A_VALUE = re.compile(r"(?<![^:])(?:~/|/(?!/))(?:[^/]+/)*")
_IN_A_SENTENCE = re.compile(r"""(?<![\w.…/~-])~?/(?:[^\s/'"<>|:;,]+/)+""")


class UserError(ValueError):
    """Bad input: the message is one line, says what is wrong and what to do.

    Programs that run for a user print it without a traceback.
    """


def traced(error: Exception) -> Exception | None:
    """Return an error to log the traceback of; None of a mistake: a line says it."""
    return None if isinstance(error, UserError) else error


class _Brief(reprlib.Repr):
    """Shortens what it shows before it makes text of it, bytes too."""

    def repr_bytes(self, value: bytes, level: int) -> str:
        """Show the first bytes."""
        return repr(value[: self.maxother]) + ("..." if value[self.maxother :] else "")


# What a device sent, fit for a message: short, however much it is.
brief = _Brief().repr


def quoted(said: object) -> str:
    """Return what a device said, fit for a log line: on one line, and short.

    Without the directories of its paths, which tell whose it is.
    """
    text = str(said) if isinstance(said, (str, Exception)) else brief(said)
    text = _IN_A_SENTENCE.sub("…/", text[: 2 * _LONGEST_QUOTE])
    return repr(text[:_LONGEST_QUOTE])[:_LONGEST_QUOTE]


def without_directories(value: object) -> object:
    """Return a value of a configuration without the directories that a path is in.

    They tell who ran it and where, and logs, reports and trackers go to others.
    """
    return _OF_A_VALUE.sub("…/", value) if isinstance(value, str) else value


def reason_of(error: Exception) -> str:
    """Return the first line of what a library says, fit for a line of one's own.

    With the error's type where the text alone says little: a KeyError's is a key.
    """
    kind = type(error).__name__
    text = str(error).strip().partition("\n")[0].removesuffix(".")
    if text and isinstance(error, LookupError | AttributeError):
        return f"{kind}: {text}"
    return text or kind


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known word that is most like this one.

    Empty where none is like it; made to stand at the end of a message.
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def with_options(kind: type[_Options], options: Mapping[str, Any], of: str) -> _Options:
    """Make a dataclass of options that a user has named.

    Parameters
    ----------
    kind
        The dataclass.
    options
        Values by the names of its fields.
    of
        What has the options, as a message begins.

    Raises
    ------
    UserError
        It has no such option; the message lists those that it has.
    """
    known = [*kind.__dataclass_fields__]  # type: ignore[attr-defined]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(
            f"{of} has no option {unknown[0]!r}; it has {', '.join(known)}."
            f"{nearest(unknown[0], known)}"
        )
    return kind(**options)


def si(value: float, unit: str) -> str:
    """Write a quantity with three digits and an SI prefix: ``2.5 GB``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor * 0.9995:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
