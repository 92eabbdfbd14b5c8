"""What the audit of dependencies says; it needs no network for that."""

from __future__ import annotations

import urllib.error

from tests import audit

KNOWN = {"name": "a", "version": "1", "vulns": []}
UNKNOWN = {"name": "b", "version": "2", "skip_reason": "not found"}
FAULTY = {
    "name": "c",
    "version": "3",
    "vulns": [{"id": "CVE-1", "fix_versions": ["4"]}, {"id": "X", "fix_versions": []}],
}


def test_what_was_not_looked_up_is_not_called_safe():
    assert audit.summary({"dependencies": [UNKNOWN, UNKNOWN]}) == [
        "audit: skipped, pypi.org knows none of 2 packages"
    ]
    (line,) = audit.summary({"dependencies": [KNOWN, UNKNOWN]})
    assert "in 1 of 2 packages; 1 are not known" in line


def test_what_is_vulnerable_is_listed():
    assert audit.summary({"dependencies": [KNOWN, FAULTY, UNKNOWN]}) == [
        "audit: c 3 has CVE-1, mended in 4",
        "audit: c 3 has X, mended in no version",
    ]


def test_without_a_network_there_is_a_word(monkeypatch, capsys):
    def urlopen(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(audit.urllib.request, "urlopen", urlopen)
    assert audit.main() == 0
    assert "audit: skipped, pypi.org cannot be asked" in capsys.readouterr().out
