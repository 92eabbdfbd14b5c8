"""What came of the sweep, as markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from simulations.adapters.cases import Case
from simulations.adapters.check import Outcome
from simulations.figures.tables import markdown_table

# Where these differ between families, a refusal is still the same.
_NAME_OR_SIZE = re.compile(r"\b[\w-]+(\.[\w-]+)+|\b\de[+-]\d+")


def document(outcomes: Mapping[Case, Outcome]) -> str:
    """Return the sums, the table, and the lines of refusals and faults."""
    tunings = dict.fromkeys(case.tuning for case in outcomes)
    families = dict.fromkeys(case.family for case in outcomes)
    rows = [
        {"tuner": f"`{tuning}`"}
        | {
            family: cell(
                outcome
                for case, outcome in outcomes.items()
                if (case.tuning, case.family) == (tuning, family)
            )
            for family in families
        }
        for tuning in tunings
    ]
    counts = Counter(outcome.verdict for outcome in outcomes.values())
    right = [outcome for outcome in outcomes.values() if outcome.verdict == "right"]
    sums = (
        f"{len(outcomes)} cases tried: {counts['right']} right "
        f"({sum(one.saved for one in right)} saved as adapters, "
        f"{sum(one.merged for one in right)} merged), {counts['refused']} refused in "
        f"one line, {counts['wrong']} wrong."
    )
    return "\n\n".join([sums, markdown_table(rows), *_lines(outcomes)])


def cell(outcomes: Iterable[Outcome]) -> str:
    """Say what came of a tuner on a family, under all task types."""
    return " / ".join(sorted({_word(outcome) for outcome in outcomes}))


def _word(outcome: Outcome) -> str:
    if outcome.verdict == "right" and not outcome.merged:
        return "right, not merged"
    if outcome.verdict == "right" and not outcome.saved:
        return "right, merged only"
    return outcome.verdict


def _lines(outcomes: Mapping[Case, Outcome]) -> list[str]:
    """List what was said, once where only names differ; every fault."""
    said: dict[str, str] = {}
    for case, outcome in outcomes.items():
        for text in filter(None, (outcome.line, *outcome.lines)):
            where = case.name if outcome.verdict == "wrong" else case.tuning
            said.setdefault(
                f"{where} {_NAME_OR_SIZE.sub('', text)}", f"- `{where}`: {text}"
            )
    return ["\n".join(sorted(said.values()))] if said else []
