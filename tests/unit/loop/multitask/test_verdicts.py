import pytest
from torch import nn

from edgeprune.loop.notes import accuracy_notes
from edgeprune.loop.verdicts import verdicts
from edgeprune.report.pruning import metric_card
from edgeprune.tasks.task import Objective, Task


def objective(name, limit, higher_is_better=True):
    return Objective(name, [1], [1], nn.MSELoss(), lambda outputs, targets: 0.0, higher_is_better, limit)


class Planned:
    """What notes ask of a planner."""

    def __init__(self, task):
        self.task = task


def test_a_verdict_says_what_was_asked_and_whether_it_is_kept():
    task = Task(
        (objective("seg", "2%"), objective("depth", "2pp", False), objective("edges", 0.5), objective("free", None))
    )
    before = {"seg": 0.8, "depth": 0.1, "edges": 0.6, "free": 1.0}
    found = verdicts(task, before, {"seg": 0.79, "depth": 0.121, "edges": 0.4, "free": 0.0})
    assert [one.kept for one in found] == [True, False, False, None]
    assert [one.asked for one in found] == ["at least 0.784 (2%)", "at most 0.12 (2pp)", "at least 0.5", ""]
    assert found[1].worst == pytest.approx(0.12)
    assert verdicts(None, {}, {}) == ()
    cards = [metric_card(one) for one in found]
    assert [card.verdict for card in cards] == ["good", "bad", "bad", ""]
    assert cards[0].detail == "validation data of the task; at least 0.784 (2%)"
    assert list(accuracy_notes(Planned(task), found)) == [
        "The metric of depth is 0.121, beyond its limit: at most 0.12 (2pp) where the dense model has 0.1.",
        "The metric of edges is 0.4, beyond its limit: at least 0.5 where the dense model has 0.6.",
    ]
