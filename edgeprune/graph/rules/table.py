"""Find the rule of an operation: each family has a `TABLE` from ATen names to rules.

To add an operation: one function and one row in a family's file, one row in ``tests/unit/graph/rule_rows.py``.
"""

from __future__ import annotations

from edgeprune.graph.rules import (
    attention,
    contraction,
    creation,
    elementwise,
    equations,
    lookup,
    movement,
    normalization,
    recurrent,
    reduction,
    shaping,
    spatial,
)
from edgeprune.graph.rules._base import Rule

FAMILIES = (
    attention,
    contraction,
    creation,
    elementwise,
    equations,
    lookup,
    movement,
    normalization,
    recurrent,
    reduction,
    shaping,
    spatial,
)


def rule_for(op: str) -> Rule | None:
    """The rule of an operation such as ``"aten.conv2d.default"``, or None."""
    for family in FAMILIES:
        rule: Rule | None = family.TABLE.get(op)
        if rule is not None:
            return rule
    return None
