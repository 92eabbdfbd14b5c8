"""What the resident node uses of Flower's inside, which no documentation promises.

The node imports nothing from there that is not listed here (a test compares the two).
Before it starts, each name is looked up in the Flower that is installed and compared by
its parameters; where one differs, Flower's own program is to be used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, get_args

# By module and name: the parameters that the node gives; None for what is no function.
INNER: Mapping[str, Mapping[str, tuple[str, ...] | None]] = {
    "flwr.cli.install": {"install_from_fab": ("fab_file", "skip_prompt")},
    "flwr.clientapp.client_app": {"LoadClientAppError": None},
    "flwr.clientapp.utils": {
        "get_load_client_app_fn": ("default_app_ref", "app_path", "multi_app"),
    },
    "flwr.common.config": {
        "get_fused_config_from_fab": ("fab_file", "run"),
        "get_project_dir": ("fab_id", "fab_version", "fab_hash"),
    },
    "flwr.common.constant": {
        "ErrorCode": None,
        "SYSTEM_TIME_TOLERANCE": None,
        "TIMESTAMP_TOLERANCE": None,
    },
    "flwr.proto.fleet_pb2": {"DeactivateNodeRequest": None},
    "flwr.proto.message_pb2": {"ObjectTree": None},
    "flwr.supercore": {"log": None},
    "flwr.supercore.address": {"parse_address": ("address",)},
    "flwr.supercore.fab": {"Fab": None},
    "flwr.supercore.grpc_health": {"run_health_server_grpc_no_tls": ("address",)},
    "flwr.supercore.inflatable.inflatable_object": {
        "get_all_nested_objects": ("obj",),
        "get_object_tree": ("obj",),
        "no_object_id_recompute": (),
    },
    "flwr.supercore.inflatable.inflatable_utils": {
        "pull_and_inflate_object_from_tree": (
            "object_tree",
            "pull_object_fn",
            "confirm_object_received_fn",
            "return_type",
            "initial_backoff",
            "backoff_cap",
        ),
        "ObjectPushError": None,
        "push_objects": ("objects", "push_object_fn", "object_ids_to_push"),
    },
    "flwr.supercore.interceptors.http.runtime_version": {
        "RuntimeVersionHttpInterceptor": ("component_name",),
    },
    "flwr.supercore.primitives.asymmetric": {"public_key_to_bytes": ("public_key",)},
    "flwr.supercore.run": {"Run": None, "RunNotRunningException": None},
    "flwr.supercore.task_identity": {"TaskIdentity": None},
    "flwr.supernode.cli.flower_supernode": {"_parse_supernode_lifespan_config": ()},
    "flwr.supernode.fleet_http_connection": {
        "http_request_response": (
            "server_address",
            "insecure",
            "root_certificates",
            "authentication_keys",
            "max_retries",
            "max_wait_time",
        ),
    },
    "flwr.supernode.fleet_http_client": {"FleetHttpClient": None},
    "flwr.supernode.node_auth_http_interceptor": {
        "NodeAuthHttpInterceptor": ("private_key", "public_key"),
    },
    "flwr.supernode.start_client_internal": {
        "FAB_VERIFICATION_ERROR": None,
        "_verify_fab": ("fab", "trusted_entities"),
    },
}

# How many arguments the functions of a connection take, which follow the node's number:
# receive, send, get_run, get_fab, pull_object, push_object, confirm.
LINK_ARGUMENTS = (0, 3, 1, 2, 2, 4, 2)


def what_differs() -> str | None:
    """Say what the installed Flower has otherwise than the node needs it.

    Returns
    -------
    Words about the first such name, or None.
    """
    return next(_differences(), None)


def _differences() -> Iterator[str]:
    for module, names in INNER.items():
        for name, given in names.items():
            try:
                found = getattr(import_module(module), name)
            except (ImportError, AttributeError):
                yield f"{module} has no {name}"
                continue
            if given is not None and not _takes(found, given):
                yield f"{module}.{name} does not take ({', '.join(given)})"
            if name == "http_request_response" and _link_arguments(found) != (
                LINK_ARGUMENTS
            ):
                yield f"{module}.{name} yields other functions"


def _takes(function: Callable[..., Any], given: tuple[str, ...]) -> bool:
    """Tell whether a function can be called with these parameters by name."""
    try:
        inspect.signature(function).bind(**dict.fromkeys(given))
    except TypeError:
        return False
    return True


def _link_arguments(connect: Callable[..., Any]) -> tuple[int, ...]:
    """Return the counts of arguments of what a connection yields, by its annotation."""
    annotation = inspect.signature(connect).return_annotation
    try:
        (yielded,) = get_args(annotation)
        return tuple(len(get_args(function)[0]) for function in get_args(yielded)[1:])
    except (ValueError, IndexError, TypeError):
        return ()
