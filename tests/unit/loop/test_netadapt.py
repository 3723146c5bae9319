"""The greedy search with short tunings, beside one that is written down plainly."""

import copy

import pytest
import torch
from torch import nn

from edgeprune.budget import Budget
from edgeprune.errors import BudgetInfeasibleError, ConfigError
from edgeprune.loop.netadapt import NetAdapt
from edgeprune.loop.planning import Planner
from edgeprune.loop.pruning import prune
from edgeprune.recovery.distillation.logits import Logits
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.spec import Constraints
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import make_plan
from edgeprune.tasks.task import Task

EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def planner(tabled):
    """The same net on batches that come in one order."""
    lead = tabled.task.objectives[0]
    batches = [(x, y) for x, y in lead.train][:6]
    task = Task.single(train=batches, validation=lead.validation, loss=nn.CrossEntropyLoss(), metric=lead.metric)
    constraints = Constraints(multiple_of={"*": 8})
    return Planner(tabled.model, tabled.kernel_graph, tabled.predictor, task=task, constraints=constraints)


MAKERS = {
    "stem (+1 layer)": ("stem", "block.second"),
    "block.first": ("block.first",),
    "down": ("down",),
}


def brute_force(planner, budget_ms, settings):
    """All cuts of every step, from the definition; nothing is tuned on the way."""
    graph, cost = planner.graph, planner.cost
    batches = planner.task.objectives[0].train[: settings.batches]
    kept = {name: list(range(size)) for name, size in graph.widths().items()}
    widths, least, taken = graph.widths(), settings.reduction * planner.dense_ms, []

    def model_of(units):
        return apply(planner.model, make_plan(graph, units, allow_empty=True)).eval()

    while cost.ms(widths) > budget_ms:
        now, tried = model_of(kept), []
        for name, layers in MAKERS.items():
            norms = sum(now.get_submodule(layer).weight.detach().square().flatten(1).sum(1) for layer in layers)
            for width in cost.candidates(name):
                other = {**widths, name: width}
                if width < widths[name] and cost.ms(other) <= max(cost.ms(widths) - least, budget_ms):
                    best = sorted(norms.topk(width).indices.tolist())
                    units = {**kept, name: [kept[name][place] for place in best]}
                    with torch.no_grad():
                        model = model_of(units)
                        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
                    tried.append((right, -cost.ms(other), name, other, units))
                    break
        _, _, name, widths, kept = max(tried, key=lambda one: one[:2])
        taken.append((name, widths[name]))
        least *= settings.decay
    return kept, taken


def test_it_is_the_greedy_search(planner):
    settings = NetAdapt(reduction=0.08, decay=0.9, tuning_steps=0, batches=4)
    first = planner.propose(0.45 * planner.dense_ms)
    found = settings.search(planner, first)
    kept, taken = brute_force(planner, first.aim_ms, settings)
    assert len(taken) > 2
    assert [(step["group"], step["width"]) for step in found.record.details["steps"]] == taken
    assert {name: group["kept"] for name, group in found.proposal.plan.groups.items()} == kept
    assert found.proposal.predicted_ms <= first.aim_ms
    # Nothing was tuned, so the weights are what they were.
    state = planner.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.planner.model.state_dict().items())


def test_what_was_tuned_on_the_way_is_in_the_weights_that_are_cut(planner):
    told = []
    first = planner.propose(0.6 * planner.dense_ms)
    found = NetAdapt(reduction=0.2, tuning_steps=3, batches=2).search(
        planner, first, fine_tuning=FineTuning(epochs=2, lr=3e-3), progress=lambda *step: told.append(step)
    )
    details = found.record.details
    assert details["tunings"] == len(told) >= 2 * len(details["steps"]) - 1
    assert told[-1][0] == "trying cuts"
    assert all(done <= total for _, done, total in told)
    for step, before in zip(details["steps"][1:], details["steps"], strict=False):
        assert step["predicted_ms"] < before["predicted_ms"]
    cut = apply(found.planner.model, found.proposal.plan)
    assert evaluate(cut, planner.task) == pytest.approx(found.record.after)
    state = planner.model.state_dict()
    assert not all(torch.equal(value, state[name]) for name, value in found.planner.model.state_dict().items())
    assert NetAdapt().left(FineTuning(epochs=2), planner.task).epochs == 2
    # What a further plan keeps first is what the search has kept.
    again = found.planner.proposal(found.proposal.allocation, first.aim_ms)
    assert again.plan.hash == found.proposal.plan.hash


def test_prune_replaces_the_first_plan(planner):
    result = prune(
        planner.model,
        EXAMPLE,
        Budget(latency_ratio=0.6),
        planner=planner,
        fine_tuning=FineTuning(epochs=1, lr=3e-3),
        netadapt=NetAdapt(reduction=0.25, tuning_steps=1, batches=2),
    )
    assert result.certificate.method == "netadapt"
    assert result.certificate.bound is None
    assert [record.step for record in result.recovery] == ["netadapt", "batch_norm", "fine_tuning"]
    assert result.predicted_ms <= 0.6 * planner.dense_ms
    assert result.check_max_abs < 1e-6
    assert any(note.startswith("NetAdapt:") for note in result.notes)


class Counted(Logits):
    name = "counted"

    def __init__(self):
        super().__init__(temperature=2.0, weight=0.3)
        self.calls = 0

    def loss(self, student, teacher):
        self.calls += 1
        return super().loss(student, teacher)


def test_what_teaches_in_short_tunings_is_what_was_given(planner):
    lesson = Counted()
    result = prune(
        planner.model,
        EXAMPLE,
        Budget(latency_ratio=0.6),
        planner=planner,
        fine_tuning=FineTuning(epochs=0),
        netadapt=NetAdapt(reduction=0.4, tuning_steps=2, batches=2),
        distill=lesson,
    )
    assert lesson.calls == 2 * result.recovery[0].details["tunings"] > 0


def test_a_branch_that_went_stays_away_from_further_plans(planner):
    keep = Constraints(keep=("stem", "down"))
    with_blocks = Planner(
        planner.model, planner.kernel_graph, planner.predictor, task=planner.task, constraints=keep, blocks=True
    )
    # Nothing but the whole branch saves as much.
    first = with_blocks.propose(1.001 * planner.cost.ms({"block.first": 0}))
    found = NetAdapt(reduction=0.5, decay=1.0, tuning_steps=0, batches=1).search(with_blocks, first)
    assert [one["name"] for one in found.proposal.plan.removed] == ["block"]
    again = found.planner.propose(planner.dense_ms)
    assert again.plan.hash == found.proposal.plan.hash
    assert again.allocation.certificate.damage == found.proposal.allocation.certificate.damage == 0.0


def test_what_would_take_too_long_or_cannot_be_done_is_refused(planner):
    first = planner.propose(0.6 * planner.dense_ms)
    with pytest.raises(ConfigError, match="may take 5 short tunings, found that"):
        NetAdapt(most_tunings=5).search(planner, first)
    with pytest.raises(ConfigError, match="save at most 50% of the latency"):
        NetAdapt(reduction=0.02).steps(0.6)
    without = copy.copy(planner)
    without.task = None
    with pytest.raises(ConfigError, match="needs a task"):
        NetAdapt().search(without, first)
    far = copy.copy(first)
    object.__setattr__(far, "aim_ms", 0.02 * planner.dense_ms)
    with pytest.raises(BudgetInfeasibleError, match="smallest plan found"):
        NetAdapt(reduction=0.5, decay=1.0, tuning_steps=0, batches=1).search(planner, far)


@pytest.mark.parametrize(("reduction", "decay", "share"), [(0.05, 0.96, 0.5), (0.1, 1.0, 0.5), (0.025, 0.98, 0.7)])
def test_the_number_of_steps_is_the_geometric_sum(reduction, decay, share):
    count, saved = 0, 0.0
    while saved < share - 1e-9:
        saved += reduction * decay**count
        count += 1
    assert NetAdapt(reduction=reduction, decay=decay).steps(share) == count


@pytest.mark.parametrize("wrong", [{"reduction": 0.0}, {"decay": 1.1}, {"tuning_steps": -1}, {"batches": 0}])
def test_settings_that_mean_nothing(wrong):
    with pytest.raises(ConfigError):
        NetAdapt(**wrong)
