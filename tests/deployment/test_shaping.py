from __future__ import annotations

import pytest

from lola_flwr.deployment.shaping import _put_back_arguments
from lola_flwr.errors import UserError


@pytest.mark.parametrize("kind", ["noqueue", "fq_codel", "mq"])
def test_the_kernels_own_queue_comes_back_by_itself(kind):
    assert _put_back_arguments("eth0", {"kind": kind, "handle": "0:"}) == []
    assert _put_back_arguments("eth0", {}) == []


@pytest.mark.parametrize("kind", ["pfifo", "fq", "fq_codel", "htb"])
def test_a_persons_queue_that_cannot_be_put_back_is_refused(kind):
    with pytest.raises(UserError, match=f"{kind}.*--relay"):
        _put_back_arguments("eth0", {"kind": kind, "handle": "8001:"})


def test_a_persons_token_bucket_is_put_back():
    options = {"rate": 125_000, "burst": 1599, "lat": 50_000}
    found = {"kind": "tbf", "handle": "8001:", "options": options}
    assert _put_back_arguments("eth0", found)[:3] == ["tbf", "rate", "1000000bit"]
