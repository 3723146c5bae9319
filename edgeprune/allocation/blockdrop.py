"""Whole residual blocks only, the one that is missed least first: the baseline where narrow layers gain nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from edgeprune.allocation._base import Allocation, Allocator, Cost, Damage, Rules, first_fitting, unproven
from edgeprune.allocation.choices import choices, expand
from edgeprune.errors import ConfigError

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGroup


class BlockDrop(Allocator):
    """Residual blocks go in the order of their damage, each measured alone, until the budget is met; widths stay.

    Only groups that the rules call removable can go. On networks whose layers are no wider than a vector of the processor
    this is what pruned channels have to beat.
    """

    name: ClassVar[str] = "blockdrop"

    def allocate(
        self, groups: Sequence[ChannelGroup], damage: Damage, cost: Cost, budget_ms: float, rules: Rules | None = None
    ) -> Allocation:
        """See `Allocator.allocate`.

        Raises:
            ConfigError: No group is removable, and the dense model does not meet the budget.
            BudgetInfeasibleError: The model without any of its removable blocks does not meet the budget.
        """
        decisions = choices(groups, rules)
        dense = expand(decisions, [choice.widest for choice in decisions])
        order = sorted(
            (choice.groups[0] for choice in decisions if choice.removable),
            key=lambda name: float(damage[name][0]),
        )
        if not order and cost.ms(dense) > budget_ms:
            raise ConfigError(
                "blockdrop removes whole blocks, found none that may go.",
                hint="--blocks, or another --allocator",
            )
        plans = [{**dense, **dict.fromkeys(order[:count], 0)} for count in range(len(order) + 1)]
        widths, predicted_ms, evaluations = first_fitting(plans, cost, budget_ms)
        gone = [name for name in order if widths[name] == 0]
        return unproven(
            self.name,
            widths,
            budget_ms=budget_ms,
            predicted_ms=predicted_ms,
            damage=float(sum(damage[name][0] for name in gone)),
            evaluations=evaluations,
            note=f"{len(gone)} of {len(order)} blocks were removed, and no channel.",
        )
