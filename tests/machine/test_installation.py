"""How more of the package is installed, from what it was installed from."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

from lola_flwr.errors import UserError
from lola_flwr.machine import installation
from lola_flwr.machine.installation import (
    extras_of,
    install_command,
    require_extra,
    requirements_of,
)

METADATA = """Metadata-Version: 2.4
Name: some-package
Version: 1
Requires-Dist: rich>=13
Requires-Dist: nothing; python_version < '3'
Requires-Dist: other-package[deep]<2,>=1; extra == 'more'
Provides-Extra: more
Provides-Extra: empty
"""
OTHER = """Metadata-Version: 2.4
Name: other-package
Version: 1.5
Requires-Dist: click
Requires-Dist: deep-one>=3; extra == 'deep'
Provides-Extra: deep
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install two packages, the first from somewhere."""
    site = tmp_path / "site"

    def install(text, origin=None):
        name = text.splitlines()[1].partition(": ")[2].replace("-", "_")
        place = site / f"{name}-1.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(text)
        if origin is not None:
            (place / "direct_url.json").write_text(json.dumps(origin))

    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    install(OTHER)
    return lambda origin=None: install(METADATA, origin)


def command(extra="more"):
    return shlex.split(install_command(extra, package="some-package"))


def test_a_checkout(installed, tmp_path, monkeypatch):
    checkout = tmp_path / "my checkout"
    checkout.mkdir()
    installed({"url": checkout.as_uri(), "dir_info": {"editable": True}})
    assert command() == ["pip", "install", "-e", f"{checkout}[more]"]
    assert command("") == ["pip", "install", "-e", str(checkout)]
    monkeypatch.chdir(checkout)
    assert command() == ["pip", "install", "-e", ".[more]"]


def test_a_wheel_and_one_that_is_gone(installed, tmp_path):
    wheel = tmp_path / "some_package-1-py3-none-any.whl"
    wheel.touch()
    installed({"url": wheel.as_uri(), "archive_info": {}})
    assert command() == ["pip", "install", f"{wheel}[more]"]
    wheel.unlink()
    assert command() == ["pip", "install", "other-package[deep]<2,>=1"]


def test_from_an_index(installed):
    installed()
    assert command("")[2:] == ["rich>=13"]


def test_not_installed_at_all():
    assert install_command("x", package="no-such") == "pip install -e '.[x]'"


def test_what_extras_require_goes_through_to_the_end(installed):
    installed()
    assert [str(r) for r in requirements_of("some-package")] == ["rich>=13"]
    found = [r.name for r in requirements_of("some-package", "more")]
    assert found == ["other-package", "deep-one"]
    assert extras_of("some-package") == ["more", "empty"]


def test_simulation_needs_ray():
    assert {"flwr", "ray"} <= {
        r.name for r in requirements_of("lola-flwr", "simulation")
    }


def test_an_extra_that_is_missing(monkeypatch):
    require_extra("adapters", "json", "x=1")
    monkeypatch.setattr(installation, "install_command", "pip install {}".format)
    with pytest.raises(
        UserError, match=r"^tuning='lora' needs no_such: pip install ad"
    ):
        require_extra("adapters", "no_such", "tuning='lora'")
