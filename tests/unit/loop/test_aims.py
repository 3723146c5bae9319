"""Search at an aim, look at the whole, aim again: the budget is used up where it can be, and given up at the smallest aim."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from edgeprune.loop.aims import MOST_AIMS, UNUSED, within_budget


@dataclass(frozen=True)
class Plan:
    cost: float
    damage: float


class Search:
    """Parts that add up to the aim, down to a step; the whole costs `power` of that, of 100."""

    def __init__(self, power: float, step: float = 1e-6, least: float = 0.0) -> None:
        self.power, self.step, self.least = power, step, least
        self.aims: list[float] = []

    def __call__(self, aim: float) -> Plan | None:
        self.aims.append(aim)
        parts = self.step * int(aim / self.step)
        return None if parts < self.least else Plan(100 * (parts / 100) ** self.power, 100 - parts)


@pytest.mark.parametrize("power", [0.5, 0.8, 1.0, 1.2, 1.5])
@pytest.mark.parametrize("budget", [30.0, 60.0, 90.0])
def test_a_budget_is_used_up_whatever_the_whole_makes_of_the_parts(power, budget):
    search = Search(power)
    best, _ = within_budget(search, budget, 1.0, 100.0)
    assert best is not None
    assert (1 - UNUSED) * budget <= best.cost <= budget
    assert search.aims[0] == budget
    assert len(search.aims) <= MOST_AIMS


def test_where_parts_add_up_the_first_find_is_the_last():
    search = Search(1.0, step=20.0)
    best, _ = within_budget(search, 50.0, 1.0, 100.0, exact=True)
    assert best == Plan(40.0, 60.0)
    assert search.aims == [50.0]


def test_of_finds_that_leave_much_of_the_budget_over_the_one_with_the_least_damage_is_taken():
    search = Search(1.0, step=20.0)
    best, _ = within_budget(search, 50.0, 1.0, 100.0)
    assert best == Plan(40.0, 60.0)
    assert len(search.aims) == MOST_AIMS


def test_a_budget_is_given_up_only_when_the_smallest_aim_has_missed_it():
    search = Search(0.5, least=4.0)
    best, cheapest = within_budget(search, 10.0, 4.0, 100.0)
    assert best is None
    assert min(search.aims) == pytest.approx(4.0)
    assert cheapest is not None
    assert cheapest.cost == pytest.approx(20.0)
    assert within_budget(Search(0.5, least=200.0), 10.0, 4.0, 100.0) == (None, None)
