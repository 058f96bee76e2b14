"""Devices of unequal speed over HTTP, small: both ways learn, and status shows how stale a buffer's reports were."""

import pytest

from benchmarks.unequal import PLANS, ran
from tests.demos.test_demos import need


@pytest.mark.parametrize("name", PLANS)
def test_both_ways_reach_a_target_over_http(name: str) -> None:
    need("digits")
    found = ran(name, slowest=0.3, limit=120.0, target=0.5, say=lambda line: None)
    assert found.accuracy >= 0.5
    assert found.reports >= found.models * (20 if name.startswith("synchronous") else 5)
    late = {int(versions): count for versions, count in found.staleness.items()}
    assert (max(late) > 0) is name.startswith("buffers")
