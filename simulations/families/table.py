"""The trials as tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

from simulations.families.trial import Outcome, Trial
from simulations.figures.tables import Row, markdown_table

_OUTCOMES: dict[Outcome, str] = {
    "right": "right",
    "told": "right when told",
    "refused": "refused",
    "wrong": "wrong",
    "not tried": "not tried",
}
_INTRODUCTION = """\
# Model families

Each class of transformers {transformers} that an automatic class of these tasks finds,
built tiny and at random, without a network: {tried} of {all} could be tried.
`python -m simulations.families --page docs/families.md` tries them and writes this
page; stopped, it goes on where it was.

Of each are checked

- its blocks and head, by changing weights: a block changes the outputs of those behind
  it and no others; what feeds the blocks is not in the head, and what does not, but
  changes the model's output, is;
- the gradients of the first, the middle and the last block, and of the head, against
  full back-propagation, in evaluation and in training with the same dropout: they
  differ by less than 1e-5 of the largest;
- the same with the layers below the block out of the prefix cache: cold, warm, and
  filled by other batches of the same samples;
- the outputs of the model, saved in float32 and loaded again: equal to 1e-6, computed
  in float64 where the model can.

*Right when told* are classes that have no one stack of equal layers: they are refused
in a line that names their stacks, and are right with `stack=`, or `blocks=` (keys of
the GLUE app, too); or those for which no input can be made up, with `example=`.
*Refused* are those that none of it helps, with all that is said to them; *not tried*,
those that cannot be built, run or trained here. Of models that take images or sound
with a text, mostly the text alone is tried: layers that never run on it are passed
over.
"""


def summary(trials: Iterable[Trial]) -> str:
    """Return how many classes of each task came out how, as a table."""
    counts: dict[str, Counter[Outcome]] = defaultdict(Counter)
    for trial in trials:
        counts[trial.task][trial.outcome] += 1
    counts["all"] = sum(counts.values(), Counter())
    return markdown_table([_row(task, count) for task, count in counts.items()])


def page(trials: Sequence[Trial]) -> str:
    """Return the page of the documentation."""
    tried = [trial for trial in trials if trial.outcome != "not tried"]
    cached = [trial for trial in tried if trial.outcome in ("right", "told")]
    uncached = [trial for trial in cached if trial.prefix_cache]
    introduction = _INTRODUCTION.format(
        transformers=version("transformers"), tried=len(tried), all=len(trials)
    )
    parts = [
        introduction,
        f"{summary(trials)}\n",
        "## Right when told\n",
        _listed({t.name: t.reason for t in trials if t.outcome == "told"}, code=True),
        "## Refused\n",
        _listed({t.name: t.reason for t in trials if t.outcome == "refused"}),
        "## Without the prefix cache\n",
        f"Of {len(cached)} classes that are right, {len(uncached)} cannot run the "
        "layers below a block apart, at least those of one of their stacks: with "
        "`prefix_cache=`, or where they stream them, they are refused in a line. Where "
        "each pass in training changes what is below, as running statistics of batch "
        "normalization, a cache is of no use, and changes nothing.\n",
        _listed({t.name: t.prefix_cache for t in uncached}),
        "## Not tried\n",
        _listed({t.name: t.reason for t in trials if t.outcome == "not tried"}),
    ]
    wrong = {trial.name: trial.reason for trial in trials if trial.outcome == "wrong"}
    if wrong:
        parts[2:2] = ["## Wrong\n", _listed(wrong)]
    return "\n".join(parts)


def _row(task: str, count: Counter[Outcome]) -> Row:
    columns = {title: count[outcome] for outcome, title in _OUTCOMES.items()}
    tried = count.total() - count["not tried"]
    return {"task": task, "tried": tried, **columns}


def _listed(reasons: Mapping[str, str], *, code: bool = False) -> str:
    """List classes by what is said to them, since many are told the same."""
    classes: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        classes[reason].append(f"`{name}`")
    lines = [
        f"- {', '.join(names)}: {_quoted(reason) if code else reason}"
        for reason, names in classes.items()
    ]
    return "\n".join(lines) + "\n" if lines else "None.\n"


def _quoted(reason: str) -> str:
    return ", ".join(f"`{each}`" for each in reason.split(", "))
