"""``python -m tests.audit``: tested versions with known vulnerabilities, by pip-audit.

Without a network there is a word that nothing was looked up: `make check` goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_VERSIONS = Path(__file__).parents[1] / "constraints.txt"
# What pip-audit asks of each package, asked of one: whether there is an answer at all.
_PROBE = "https://pypi.org/pypi/pip/json"
_TIMEOUT_S = 3


def main() -> int:
    """Return 1 if a version has a known vulnerability."""
    try:
        urllib.request.urlopen(_PROBE, timeout=_TIMEOUT_S).close()
    except OSError as error:
        print(f"audit: skipped, pypi.org cannot be asked ({error})")
        return 0
    command = [
        *(sys.executable, "-m", "pip_audit", "-r", str(_VERSIONS), "--no-deps"),
        *("--disable-pip", "--format", "json", "--progress-spinner", "off"),
        *("--timeout", str(_TIMEOUT_S)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["pip-audit says nothing"])[-1]
        print(f"audit: skipped, {last}")
        return 0
    print("\n".join(summary(found)))
    return int(any(each.get("vulns") for each in found["dependencies"]))


def summary(found: Mapping[str, Any]) -> list[str]:
    """Return the lines to print of what pip-audit found.

    It calls a package that the index does not know free of vulnerabilities, and ends
    with exit code 0.
    """
    packages = found["dependencies"]
    asked = [each for each in packages if "skip_reason" not in each]
    lines = [
        f"audit: {each['name']} {each['version']} has {vulnerability['id']}, mended in "
        f"{', '.join(vulnerability['fix_versions']) or 'no version'}"
        for each in asked
        for vulnerability in each["vulns"]
    ]
    if not asked:
        return [f"audit: skipped, pypi.org knows none of {len(packages)} packages"]
    return lines or [
        f"audit: no known vulnerability in {len(asked)} of {len(packages)} packages; "
        f"{len(packages) - len(asked)} are not known to pypi.org"
    ]


if __name__ == "__main__":
    sys.exit(main())
