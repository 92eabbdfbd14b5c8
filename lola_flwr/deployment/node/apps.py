"""The ClientApps of the runs that a node takes part in, each imported once."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.cli.install import install_from_fab
from flwr.clientapp import ClientApp
from flwr.clientapp.utils import get_load_client_app_fn
from flwr.common.config import get_fused_config_from_fab, get_project_dir
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run

from lola_flwr.deployment.app_code import free_memory


class Apps:
    """One run's app at a time, and the contexts of all.

    The modules of an app are forgotten with it: the next run's may have the same names,
    and what they held in memory is free.

    Parameters
    ----------
    node_id
        Number of the node.
    node_config
        Its configuration.
    """

    def __init__(
        self, node_id: int, node_config: Mapping[str, bool | float | int | str]
    ) -> None:
        self.node_id, self._node_config = node_id, dict(node_config)
        self._contexts: dict[int, Context] = {}
        self._run_id: int | None = None
        self._app: ClientApp | None = None
        self._root: Path | None = None

    def context(self, run: Run, fab: Fab) -> Context:
        """Return the context of a run, with the state of its series so far."""
        known = self._contexts.get(run.series_id)
        if known is None or known.run_id != run.run_id:
            known = Context(
                run_id=run.run_id,
                node_id=self.node_id,
                node_config=self._node_config,
                state=RecordDict() if known is None else known.state,
                run_config=get_fused_config_from_fab(fab_file=fab.content, run=run),
                series_id=run.series_id,
            )
            self._contexts[run.series_id] = known
        return known

    def app(self, run: Run, fab: Fab) -> ClientApp:
        """Return the ClientApp of a run; import it if it is not in memory.

        Raises
        ------
        LoadClientAppError
            It cannot be loaded.
        """
        if self._app is None or self._run_id != run.run_id:
            self.forget()
            install_from_fab(fab_file=fab.content, skip_prompt=True)
            self._root = Path(
                get_project_dir(
                    fab_id=run.fab_id,
                    fab_version=run.fab_version,
                    fab_hash=fab.hash_str,
                )
            )
            load = get_load_client_app_fn(
                default_app_ref="", app_path=None, multi_app=True
            )
            self._app = load(run.fab_id, run.fab_version, fab.hash_str)
            self._run_id = run.run_id
        return self._app

    def forget(self) -> None:
        """Free the app in memory, with its modules and what they hold."""
        root, self._app, self._run_id, self._root = self._root, None, None, None
        if root is None:
            return
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file is not None and Path(file).is_relative_to(root):
                del sys.modules[name]
        sys.path[:] = [entry for entry in sys.path if entry != str(root)]
        free_memory()
