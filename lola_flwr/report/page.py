"""The page: template, style, script and data, put into one file."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lola_flwr.errors import UserError, si, without_directories
from lola_flwr.machine.files import replacing
from lola_flwr.report.runs import MOST_PARTS, MOST_ROUNDS, Run
from lola_flwr.report.targets import cost_columns, target_rows
from lola_flwr.run.target import Target

if TYPE_CHECKING:
    from jinja2 import Template

_HERE = files("lola_flwr.report")
_NOTEBOOK_HEIGHT = 900
# The rest is under the configuration.
_TOLD_VERSIONS = ("lola-flwr", "flwr", "torch", "python")
# Later ones use what earlier ones define.
_SCRIPT = (
    *("helpers", "files", "line_chart", "heat_map"),
    *("bars", "curves", "maps", "page"),
)


@dataclass(frozen=True)
class Report:
    """The report of one run, or of several side by side.

    Parameters
    ----------
    runs
        The runs; their names are made different.
    title
        Heading of the page (default: whether it is about runs or a plan).
    targets
        What runs are compared by: what it cost each to get there (default: what their
        configurations say, or else the best that all have come to).

    Raises
    ------
    UserError
        There is no run, or none has the metric of a target.
    """

    runs: Sequence[Run]
    title: str = ""
    targets: Sequence[Target] = ()

    def __post_init__(self) -> None:
        """Check that there is something to report."""
        if not self.runs:
            raise UserError("A report needs at least one run.")
        target_rows(self.runs, [run.name for run in self.runs], self.targets)

    @property
    def is_plan(self) -> bool:
        """Whether nothing in it has taken place."""
        return all(run.is_plan for run in self.runs)

    @property
    def heading(self) -> str:
        """The title, or what stands for it."""
        return self.title or f"lola-flwr {'plan' if self.is_plan else 'report'}"

    def html(self) -> str:
        """Return the page."""
        names = _different([run.name for run in self.runs])
        # What a page can hold is divided among its runs.
        most = (MOST_ROUNDS // len(names), MOST_PARTS // len(names))
        columns = [
            {**run.columns(*most), "name": name, "costs": cost_columns(run)}
            for run, name in zip(self.runs, names, strict=True)
        ]
        return _template().render(
            title=self.heading,
            runs=list(zip(names, self.runs, strict=True)),
            facts=_side_by_side([_facts(run) for run in self.runs]),
            metrics=_union(run.metric_names for run in self.runs),
            targets=target_rows(self.runs, names, self.targets),
            left_out=[words for run in columns if (words := _left_out(run))],
            is_plan=self.is_plan,
            tells_energy=any(run.tells_energy for run in self.runs),
            learns=any(run.learns for run in self.runs),
            config=_side_by_side(
                [
                    {
                        key: without_directories(value)
                        for key, value in run.config.items()
                    }
                    for run in self.runs
                ]
            ),
            versions=_side_by_side(
                [run.description.get("versions", {}) for run in self.runs]
            ),
            data=_script_safe(json.dumps(columns, separators=(",", ":"))),
            style=_asset("vendor/uplot-1.6.32.min.css") + _asset("report.css"),
            charts=_asset("vendor/uplot-1.6.32.min.js"),
            charts_licence=_asset("vendor/LICENSE.uplot"),
            script=_script(),
        )

    def save(self, path: str | Path) -> Path:
        """Write the page.

        Raises
        ------
        UserError
            The file cannot be written.
        """
        path = Path(path)
        with replacing(path) as unfinished:
            unfinished.write_text(self.html(), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        """Show the page in a notebook, apart from the notebook's own style."""
        page, title = html.escape(self.html()), html.escape(self.heading)
        return (
            f'<iframe srcdoc="{page}" style="width:100%;'
            f'height:{_NOTEBOOK_HEIGHT}px;border:0" title="{title}"></iframe>'
        )


@cache
def _template() -> Template:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    environment.filters["size"] = _size
    environment.filters["joules"] = _joules
    return environment.from_string(_asset("page.html.j2"))


def _script() -> str:
    """Return the parts of the page's script as one, whose names are its own."""
    parts = "\n".join(_asset(f"script/{name}.js") for name in _SCRIPT)
    return f"(() => {{\n{parts}}})();\n"


@cache
def _asset(name: str) -> str:
    return _HERE.joinpath(name).read_text(encoding="utf-8")


def _script_safe(text: str) -> str:
    """Escape JSON so that no string in it can end the script that holds it."""
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


def _size(value: int | None) -> str:
    return "–" if value is None else si(value, "B")


def _joules(value: float | None) -> str:
    return "–" if value is None else si(value, "J")


def _left_out(columns: Mapping[str, Any]) -> str:
    """Say what of a run's rounds a page does not show; nothing if it shows all."""
    there, shown = columns["num_rounds"], len(columns["round"])
    detailed = len(columns["detailed"])
    if detailed == there:
        return ""
    said = f"{columns['name']}: of {there:,} rounds "
    if shown < there:
        said += f"the charts show {shown:,}, every peak and trough among them, and "
    said += (
        f"{detailed:,} are shown device by device, of every {2 * there // detailed:,} "
        "the slowest and the fastest"
        if detailed
        else "none is shown device by device: there are too many devices"
    )
    return f"{said}. All are in rounds.jsonl in the run's directory."


def _facts(run: Run) -> dict[str, str]:
    """Return when and with what a run was made, and whether it did what it should."""
    facts = {}
    if run.description.get("started"):
        facts["started"] = _moment(run.description["started"])
    if run.duration_s:
        facts["rounds took here"] = _duration(run.duration_s)
    if not run.is_plan:
        done, asked = len(run.rounds), run.num_planned_rounds
        facts["finished"] = "yes" if done >= asked else f"no: {done} of {asked} rounds"
        if run.ended_at_target:
            facts["finished"] = f"yes, at its target: {done} of {asked} rounds"
    target_s = run.latency_target_s
    if target_s:
        within = run.num_within_target
        said = "reached" if within == len(run.rounds) else "not reached"
        facts["latency target"] = (
            f"{_number(target_s)} s a round: {said}, {within} of {len(run.rounds)} "
            "rounds within it"
        )
    elif target_s is not None:
        facts["latency target"] = "none"
    versions = run.description.get("versions", {})
    told = [f"{n} {versions[n]}" for n in _TOLD_VERSIONS if versions.get(n)]
    if told:
        facts["versions"] = ", ".join(told)
    return facts


def _moment(started: object) -> str:
    """Return when a run started, as people write it; as it stands if it is no time."""
    try:
        return f"{datetime.fromisoformat(str(started)):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return str(started)


def _duration(seconds: float) -> str:
    """Return a duration as people write it: its two largest units."""
    minutes, left = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"


def _different(names: Sequence[str]) -> list[str]:
    """Return the names with a number after those that come more than once."""
    count, seen = Counter(names), Counter[str]()
    different = []
    for name in names:
        seen[name] += 1
        different.append(f"{name} ({seen[name]})" if count[name] > 1 else name)
    return different


def _union(lists: Any) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))


def _side_by_side(
    tables: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[Any], bool]]:
    """Return each key with its value in every run, and whether these differ."""
    rows = []
    for key in _union(tables):
        values = [table.get(key) for table in tables]
        rows.append((key, values, any(value != values[0] for value in values)))
    return rows
