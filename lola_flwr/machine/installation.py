"""How this package was installed, and so how more of it is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.requirements import Requirement

from lola_flwr.errors import UserError

PACKAGE = "lola-flwr"


def install_command(extra: str = "", *, package: str = PACKAGE) -> str:
    """Return the command that installs an extra as the package itself was installed.

    No index has the package: a checkout is installed from where it is, a wheel from its
    file, and where that is gone, the extra is what it requires.

    Parameters
    ----------
    extra
        The extra; "" for the package's own requirements.
    package
        The distribution.
    """
    extras = f"[{extra}]" if extra else ""
    try:
        found = distribution(package)
    except PackageNotFoundError:
        # There is a checkout, or this would not run.
        return f"pip install -e {shlex.quote(f'.{extras}')}"
    source, is_editable = _source(found)
    if source is None:
        wanted = (_without_marker(r) for r in _stated(package, extra))
        return f"pip install {' '.join(map(shlex.quote, wanted))}"
    path = "." if source == Path.cwd() else str(source)
    editable = "-e " if is_editable else ""
    return f"pip install {editable}{shlex.quote(f'{path}{extras}')}"


def require_extra(extra: str, module: str, needed_by: str) -> None:
    """Refuse what needs an extra that is not installed.

    Parameters
    ----------
    extra
        The extra.
    module
        A module that comes with it.
    needed_by
        What the user asked for.

    Raises
    ------
    UserError
        The module is not there; the line says how to install it.
    """
    if find_spec(module) is None:
        raise UserError(f"{needed_by} needs {module}: {install_command(extra)}")


def extras_of(package: str = PACKAGE) -> list[str]:
    """Return the extras that an installed package has."""
    return distribution(package).metadata.get_all("Provides-Extra") or []


def requirements_of(package: str, extra: str = "") -> list[Requirement]:
    """Return what a package requires here, without an extra or for one alone.

    What extras of the requirements require is there, too: ``flwr[simulation]`` is
    Flower and Ray.

    Raises
    ------
    PackageNotFoundError
        The package is not installed.
    """
    found: list[Requirement] = []
    for requirement in _stated(package, extra):
        found.append(requirement)
        for inner in requirement.extras:
            try:
                found += requirements_of(requirement.name, inner)
            except PackageNotFoundError:
                break
    return found


def _stated(package: str, extra: str) -> Iterator[Requirement]:
    for line in distribution(package).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            if not extra:
                yield requirement
        elif extra and marker.evaluate({"extra": extra}):
            yield requirement


def _source(found: Distribution) -> tuple[Path | None, bool]:
    """Return the file or directory of an installation, and whether it is editable."""
    text = found.read_text("direct_url.json")
    if text is None:
        return None, False
    origin = json.loads(text)
    parts = urlsplit(str(origin.get("url", "")))
    path = Path(url2pathname(parts.path))
    if parts.scheme != "file" or not path.exists():
        return None, False
    return path, bool(origin.get("dir_info", {}).get("editable"))


def _without_marker(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"
