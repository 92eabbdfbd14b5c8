"""The keys of an app's run configuration: defaults, comments, and what they take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tomlkit
from tomlkit.items import AbstractTable, Comment, Item, Whitespace

from lola_flwr.cli.app_config import kind_of, rules_of, words_of
from lola_flwr.simulation.flower_app import FlowerApp

# How a bound of JSON Schema reads.
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "multipleOf": "a multiple of",
}


@dataclass(frozen=True)
class AppKey:
    """A key of an app's run configuration.

    Parameters
    ----------
    name
        The key.
    default
        Its value in the app.
    kind
        What it takes, in words.
    comment
        What the app's pyproject.toml says above and behind it.
    values
        What it can be set to.
    is_closed
        Whether it takes nothing but these values.
    """

    name: str
    default: Any
    kind: str
    comment: str = ""
    values: tuple[str, ...] = ()
    is_closed: bool = False


def app_keys(app: FlowerApp) -> list[AppKey]:
    """Return an app's keys, in the order of its pyproject.toml.

    What they take is what the app's schema says, if that is a `RunConfig`; else it
    follows from the default alone.
    """
    rules, comments = rules_of(app), key_comments(app)
    return [
        _app_key(name, default, comments.get(name, ""), rules.get(name, {}))
        for name, default in app.config.items()
    ]


def key_comments(app: FlowerApp) -> dict[str, str]:
    """Return the comments above and behind each key of an app."""
    path = app.directory / "pyproject.toml"
    document: Any = tomlkit.parse(path.read_text(encoding="utf-8"))
    return dict(_comments(document["tool"]["flwr"]["app"].get("config", {})))


def _comments(table: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    above: list[str] = []
    # Tables that are written in several places are proxies of their parts.
    for key, item in table.value.body if isinstance(table, AbstractTable) else ():
        if isinstance(item, Comment):
            above.append(_text(item))
        elif isinstance(item, Whitespace):
            above.clear()
        elif key is not None and isinstance(item, AbstractTable):
            yield from _comments(item, f"{prefix}{key.key}.")
            above.clear()
        elif key is not None:
            yield f"{prefix}{key.key}", " ".join([*above, _text(item)]).strip()
            above.clear()


def _text(item: Item) -> str:
    return item.trivia.comment.removeprefix("#").strip()


def _app_key(name: str, default: Any, comment: str, rule: Mapping[str, Any]) -> AppKey:
    closed = ("true", "false") if isinstance(default, bool) else rule.get("enum", ())
    # A number, or one of some words.
    either = rule.get("anyOf", ())
    words = words_of(rule)
    number: Mapping[str, Any] = next((r for r in either if "const" not in r), {})
    kind = kind_of(0) if number.get("type") == "integer" else kind_of(default)
    rule = {**number, **rule}
    bounds = [f"{said} {rule[at]:g}" for at, said in _BOUNDS.items() if at in rule]
    return AppKey(
        name=name,
        default=default,
        kind=" or ".join([", ".join([kind, *bounds]), *words]),
        comment=comment,
        values=tuple(map(str, closed or words or rule.get("examples", ()))),
        is_closed=bool(closed),
    )
