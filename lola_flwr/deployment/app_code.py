"""Find the device function of a Flower app, in the client and in the worker.

The client process has the app on its path, because Flower unpacked it; the worker is
told where it is. Neither needs to import what the other one runs.
"""

from __future__ import annotations

import gc
import importlib
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lola_flwr.errors import UserError

Scalar = bool | float | int | str


@dataclass(frozen=True)
class DeviceContext:
    """What an app knows of the device that it runs on: the lasting part of a Context.

    Parameters
    ----------
    run_id, node_id
        Numbers of the run and of the node.
    node_config, run_config
        Configuration of the SuperNode and of the run.
    """

    run_id: int
    node_id: int
    node_config: Mapping[str, Scalar] = field(default_factory=dict)
    run_config: Mapping[str, Scalar] = field(default_factory=dict)


def app_root(reference: str) -> Path:
    """Return the directory that an app's package is in, without importing it.

    Parameters
    ----------
    reference
        Device function, as ``"package.module:function"``.

    Raises
    ------
    UserError
        This is no such reference, or there is no such package.
    """
    module, colon, function = reference.partition(":")
    if not (module and colon and function.isidentifier()):
        raise UserError(
            f"{reference!r} names no device function; write 'package.module:function'."
        )
    spec = find_spec(module.partition(".")[0])
    if spec is None or spec.origin is None:
        raise UserError(f"{reference!r}: there is no such package here.")
    path = Path(spec.origin).resolve()
    return path.parents[1] if path.name == "__init__.py" else path.parent


def load_device_function(reference: str) -> Callable[[Any], Any]:
    """Import the device function of an app that is on the path.

    Raises
    ------
    UserError
        The module has no such function.
    """
    module, _, name = reference.partition(":")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise UserError(f"{reference!r}: {module} has no function {name}.")
    return function  # type: ignore[no-any-return]


def put_on_path(root: Path) -> bool:
    """Let imports find the app in a directory; tell whether the path lacked it."""
    if str(root) in sys.path:
        return False
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    return True


def forget_app(reference: str, root: Path | None) -> None:
    """Drop an app's modules, and with them the models and data that they hold.

    Parameters
    ----------
    reference
        The app's device function.
    root
        What ``put_on_path`` added for it; None if it added nothing.
    """
    package = reference.partition(":")[0].partition(".")[0]
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            del sys.modules[name]
    if root is not None and str(root) in sys.path:
        sys.path.remove(str(root))
    free_memory()


def free_memory() -> None:
    """Give back the memory of what nobody refers to any more, on the GPU as well."""
    # What is annotated with a function of an app's, as by pydantic's validators, typing
    # keeps in its caches, and by the function's globals all of the app's modules.
    for clear in getattr(typing, "_cleanups", ()):
        clear()
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
