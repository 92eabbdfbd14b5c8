from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_wheel_contributes_one_import_name(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
    top_level = {name.split("/")[0] for name in files}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {
        "lola_flwr"
    }
    for module in ("clients/block_client", "strategies/lola_deft", "allocation/crunch"):
        assert f"lola_flwr/{module}.py" in files
    assert "lola_flwr/py.typed" in files
    own = {
        path.name for path in (ROOT / "lola_flwr/report").iterdir() if path.is_file()
    }
    assert {f"lola_flwr/report/{name}" for name in own} <= set(files)
    assert "lola_flwr/report/vendor/LICENSE.uplot" in files


@pytest.mark.parametrize(
    "module",
    [
        "lola_flwr.allocation",
        "lola_flwr.system.channel",
        "lola_flwr.costs.estimated",
        "lola_flwr.system.devices",
        "lola_flwr.model.blocks",
        "lola_flwr.wire.codec",
        "lola_flwr.wire.payload",
        "lola_flwr.wire.versions",
        "lola_flwr.wire.records",
        "lola_flwr.server.assembly",
    ],
)
def test_mathematics_needs_neither_torch_nor_flower(module):
    program = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'flwr', 'transformers', 'ray'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_coordinator_knows_no_flower():
    program = (
        "import sys, lola_flwr.server.coordinator\nsys.exit('flwr' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
