"""Files that are whole or not there, what keeps them from being written, and paths."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident

from lola_flwr.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
# Libraries written in Rust (safetensors, tokenizers) raise errors of their own.
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


def expanded(text: str) -> str:
    """Return a path, or whatever else may stand in its place, with ``~`` written out.

    Shells write it out themselves only where it starts a word: ``model=~/my-model`` and
    what stands in a file arrive as they are.
    """
    return os.path.expanduser(text)


def local_path(text: str | Path) -> Path:
    """Return a path on this host, ``~`` written out."""
    return Path(expanded(str(text)))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line what keeps a file or a directory from being written.

    Parameters
    ----------
    path
        What is written in the ``with``.

    Raises
    ------
    UserError
        In place of the system's own error: no room, no right to, something else there.
    """
    try:
        yield
    # What those libraries raise is of all types.
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        raise UserError(
            f"{path} cannot be written: {os.strerror(number)}; {_advice(number)}, or "
            "choose another directory."
        ) from error


@contextmanager
def filling(directory: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """Make a directory to write files into, where there is none.

    Parameters
    ----------
    directory
        The directory.
    mode
        Its permissions, less the process's mask, where it is made.

    Raises
    ------
    UserError
        As for `writing`. (Where a file is in its place, transformers' own
        ``save_pretrained`` logs that, saves nothing, and goes on.)
    """
    with writing(directory):
        directory.mkdir(mode, parents=True, exist_ok=True)
        yield directory


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a name to write under; in the end that file takes the place of ``path``.

    Who reads ``path`` sees the file from before or the new one, and after an error
    the one from before.

    Parameters
    ----------
    path
        The file; its directory is made.
    shared
        Whether others may write the same file at the same time: the name is then this
        thread's own.

    Raises
    ------
    UserError
        As for `writing`.
    """
    own = f".{os.getpid()}-{get_ident()}" if shared else ""
    unfinished = path.with_name(f"{path.name}{own}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            unfinished.replace(path)
        except BaseException:
            # On a full disk half a file is in the way of what comes next.
            with suppress(OSError):
                unfinished.unlink()
            raise


def _errno(error: Exception) -> int | None:
    """Return the system's number of an error; None if it is not of the system."""
    if isinstance(error, OSError):
        return error.errno
    found = _RUST_ERRNO.search(str(error))
    return None if found is None else int(found[1])


def _advice(number: int) -> str:
    if number in _FULL:
        return "make room there"
    if number in _REFUSED:
        return "let this user write there"
    if number in _IN_THE_WAY:
        return "move away what is there"
    return "see that the file system works"
