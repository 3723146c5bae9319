"""The table of criteria."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.extensions import Extensions

if TYPE_CHECKING:
    from edgeprune.criteria._base import Criterion

CRITERIA: Extensions[Criterion] = Extensions(
    "a criterion",
    "edgeprune.criteria",
    {
        "l2": "edgeprune.criteria.l2:L2",
        "taylor": "edgeprune.criteria.taylor:Taylor",
        "bn_scale": "edgeprune.criteria.bn_scale:BnScale",
        "random": "edgeprune.criteria.random:Random",
    },
)
names, get = CRITERIA.names, CRITERIA.make
