"""Every family's model in subnetworks."""

from __future__ import annotations

import pytest

from tests.d2ft.cases import FAMILIES, make


@pytest.fixture(params=FAMILIES)
def case(request):
    return make(request.param)
