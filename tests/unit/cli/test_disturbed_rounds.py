"""A measurement of which rounds were disturbed says so in a clause, any other does not."""

from __future__ import annotations

import pytest

from edgeprune.cli.deploy import told_latency
from edgeprune.deployment.agreement import Parity
from edgeprune.deployment.result import Deployment
from edgeprune.loop.result import LatencyCheck

CLAUSE = "leaving out 3 of 23 rounds as disturbed"


@pytest.mark.parametrize(("disturbance", "end"), [("", ""), (CLAUSE, f", {CLAUSE}")])
def test_the_share_of_dense_that_prune_tells(disturbance: str, end: str) -> None:
    assert LatencyCheck("bench", 2.0, 1.2, 0.6, 0.59, 0.61, disturbance=disturbance).of_dense == f"60.0%{end}"


@pytest.mark.parametrize(("disturbance", "end"), [("", ""), (CLAUSE, f"; {CLAUSE}")])
def test_the_latency_that_deploy_tells(disturbance: str, end: str) -> None:
    timed = {
        "measured_ms": 1.2,
        "dense_ms": 2.0,
        "ratio": 0.6,
        "ratio_low": 0.59,
        "ratio_high": 0.61,
        "latency_ms": 1.2,
    }
    done = Deployment(
        board="bench",
        artifact="aa",
        release="bb",
        previous=None,
        changed=True,
        parity=Parity(True, 1, 0.0, 0.0, 1e-4, None, 80.0, 1.0, 0, 0, None, "", 1.0, 0),
        **timed,
        conditions={},
        bytes_sent=0,
        seconds=1.0,
        disturbance=disturbance,
    )
    assert told_latency(done) == f"1.200 ms, measured on bench with 1 thread{end}"
