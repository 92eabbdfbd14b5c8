"""Projects of the shapes that Flower's users have, migrated by ``migration.diff``.

``make migration`` runs them all to the end, and prints what docs/migration.md shows.
"""

from __future__ import annotations

import pytest

from tests.fedavg_apps.bench import (
    PROJECTS,
    Outcome,
    changed_lines,
    copied,
    keeps_up,
    migrated,
    reached_after,
    run,
)

NAMES = {project.name: project for project in PROJECTS}


def test_changed_lines_are_counted():
    diff = (
        "--- a/x\n+++ b/x\n@@ -1 +1,2 @@\n-old\n+new\n+more\n same\n-gone\n@@ @@\n+x\n"
    )
    assert changed_lines(diff) == 4


def test_verdicts():
    assert keeps_up(0.90, 0.881, "accuracy")
    assert not keeps_up(0.90, 0.879, "accuracy")
    assert keeps_up(2.0, 2.09, "loss")
    assert not keeps_up(2.0, 2.11, "loss")
    outcome = Outcome(((0.9, 0.3, 0.5), (0.9, 0.5, 0.7)), 0.0, 0.0)
    assert reached_after(outcome, 0.4, "accuracy") == 1
    assert reached_after(outcome, 0.6, "accuracy") == 2
    assert reached_after(outcome, 0.7, "accuracy") is None
    assert reached_after(outcome, 0.4, "loss") == 1


@pytest.mark.parametrize("name", NAMES)
def test_five_lines_are_enough(name, tmp_path):
    project = NAMES[name]
    assert 1 <= changed_lines(project.diff) <= 5
    before = copied(project, tmp_path / "before")
    after = migrated(project, tmp_path / "after")
    sources = {path.name: path.read_text() for path in after.rglob("*.py")}
    for path, source in sources.items():
        compile(source, path, "exec")
    text = "".join(sources.values())
    assert "strategy import FedAvg" not in text
    assert "LoLaDeft" in text and "AssignedBlock(" in text
    changed = [
        path.relative_to(before)
        for path in before.rglob("*.*")
        if path.read_text() != (after / path.relative_to(before)).read_text()
    ]
    assert 2 <= len(changed) <= 3


@pytest.mark.slow
@pytest.mark.flower_run
@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.title)
def test_a_migrated_project_runs_beside_fedavg(project, tmp_path):
    """With Flower's default of two nodes, for as long as FedAvg learns something."""
    fedavg, lola = (
        run(make(project, tmp_path / side), project, 2, home=tmp_path / side)
        for side, make in (("fedavg", copied), ("lola", migrated))
    )
    (before,), (after,) = ({curve[0] for curve in o.curves} for o in (fedavg, lola))
    assert before == pytest.approx(after, abs=2e-3)
    assert keeps_up(fedavg.final, before, project.metric) is False
    assert keeps_up(lola.final, before, project.metric) is False
    assert 0 < lola.down_bytes <= fedavg.down_bytes
    assert 0 < lola.up_bytes <= fedavg.up_bytes
