"""One ratio for all groups: the baseline that needs no damage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from edgeprune.allocation._base import Allocation, Allocator, Cost, Damage, Rules, first_fitting, unproven
from edgeprune.allocation.choices import Choice, choices, expand
from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGroup

_MOST_RATIOS = 256


class Uniform(Allocator):
    """The largest share of units, the same in every group, whose predicted latency meets the budget.

    Each group keeps the allowed width closest to ``share * size``. Latency does not always fall with the share, so shares
    are tried from the largest down and the first that fits is taken.

    Args:
        multiple_of: Widths are rounded to multiples of it, besides what the rules say; full size stays allowed.
    """

    name: ClassVar[str] = "uniform"

    def __init__(self, multiple_of: int = 1) -> None:
        if multiple_of < 1:
            raise ConfigError(f"multiple_of must be at least 1, found {multiple_of}.")
        self.multiple_of = multiple_of

    def allocate(
        self, groups: Sequence[ChannelGroup], damage: Damage, cost: Cost, budget_ms: float, rules: Rules | None = None
    ) -> Allocation:
        """See `Allocator.allocate`; `damage` is only summed up for the certificate."""
        decisions, plans = _uniform_widths(groups, rules, self.multiple_of)
        widths, predicted_ms, evaluations = first_fitting(plans, cost, budget_ms)
        return _result(decisions, widths, damage, predicted_ms, budget_ms, evaluations)


def closest_uniform(
    groups: Sequence[ChannelGroup],
    damage: Damage,
    cost: Cost,
    target_ms: float,
    rules: Rules | None = None,
    *,
    multiple_of: int = 1,
) -> Allocation:
    """The uniform widths whose predicted latency is closest to a target, above or below: a fair rival at equal latency.

    Args:
        groups: All channel groups of the model.
        damage: Damage curves, summed up for the certificate.
        cost: Latency by widths.
        target_ms: Latency to come close to, milliseconds.
        rules: What widths must respect, by group name.
        multiple_of: As in `Uniform`.

    Returns:
        The closest widths; of equally close ones the wider. The certificate's `predicted_ms` may exceed its `budget_ms`.
    """
    decisions, plans = _uniform_widths(groups, rules, multiple_of)
    latencies = cost.many_ms(plans)
    best = min(range(len(plans)), key=lambda index: (abs(float(latencies[index]) - target_ms), index))
    return _result(decisions, plans[best], damage, float(latencies[best]), target_ms, len(plans))


def _uniform_widths(
    groups: Sequence[ChannelGroup], rules: Rules | None, multiple_of: int
) -> tuple[tuple[Choice, ...], list[dict[str, int]]]:
    """All different uniform widths, from the widest down (at most `_MOST_RATIOS`, evenly spread)."""
    decisions = tuple(_rounded(choice, multiple_of) for choice in choices(groups, rules))
    shares = sorted({width / choice.size for choice in decisions for width in choice.allowed}, reverse=True)
    # Between two neighbors of a group's widths the nearest one changes halfway.
    shares = sorted({*shares, *((one + two) / 2 for one, two in pairwise(shares))}, reverse=True)
    if len(shares) > _MOST_RATIOS:
        last = len(shares) - 1
        shares = [shares[round(step * last / (_MOST_RATIOS - 1))] for step in range(_MOST_RATIOS)]
    states = dict.fromkeys(tuple(choice.nearest(share * choice.size) for choice in decisions) for share in shares)
    return decisions, [expand(decisions, state) for state in states]


def _rounded(choice: Choice, multiple_of: int) -> Choice:
    allowed = tuple(width for width in choice.allowed if width == choice.widest or width % multiple_of == 0)
    return Choice(groups=choice.groups, size=choice.size, allowed=allowed)


def _result(
    decisions: Sequence[Choice],
    widths: dict[str, int],
    damage: Damage,
    predicted_ms: float,
    budget_ms: float,
    evaluations: int,
) -> Allocation:
    total = sum(
        float(damage[name][widths[name]])
        for choice in decisions
        if not choice.frozen
        for name in choice.groups
        if name in damage
    )
    return unproven(
        "uniform",
        widths,
        budget_ms=budget_ms,
        predicted_ms=predicted_ms,
        damage=total,
        evaluations=evaluations,
        note="one share for all groups; nothing is optimized.",
    )
