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
        "l1": "edgeprune.criteria.l1:L1",
        "group_norm": "edgeprune.criteria.group_norm:GroupNorm",
        "geometric_median": "edgeprune.criteria.geometric_median:GeometricMedian",
        "lamp": "edgeprune.criteria.lamp:Lamp",
        "bn_scale": "edgeprune.criteria.bn_scale:BnScale",
        "taylor": "edgeprune.criteria.taylor:Taylor",
        "fisher": "edgeprune.criteria.fisher:Fisher",
        "activation_mean": "edgeprune.criteria.activation:ActivationMean",
        "activation_rms": "edgeprune.criteria.activation:ActivationRms",
        "apoz": "edgeprune.criteria.activation:Apoz",
        "lasso": "edgeprune.criteria.lasso:Lasso",
        "random": "edgeprune.criteria.random:Random",
    },
)
names, get = CRITERIA.names, CRITERIA.make
