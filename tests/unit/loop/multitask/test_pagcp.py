"""The search under limits: what it commits keeps them, and it is the walk that it says it is."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from edgeprune.allocation.energy import Energy
from edgeprune.allocation.resources import Parameters
from edgeprune.allocation.terms import Limit
from edgeprune.budget import Budget
from edgeprune.criteria.damage import best_units
from edgeprune.errors import BudgetInfeasibleError, ConfigError, TaskError
from edgeprune.latency.energy import fit_energy
from edgeprune.latency.features import Machine, features
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import network_key
from edgeprune.loop.multitask.calibration_data import CalibrationData
from edgeprune.loop.multitask.commits import expected_first, last_below, last_good
from edgeprune.loop.multitask.layers import Layers
from edgeprune.loop.multitask.looking import Looking
from edgeprune.loop.multitask.pagcp import Pagcp
from edgeprune.loop.multitask.rooms import Rooms
from edgeprune.loop.multitask.tolerances import tolerances
from edgeprune.loop.netadapt import NetAdapt
from edgeprune.loop.planning import Planner
from edgeprune.loop.pruning import prune
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.spec import Constraints, Kernel
from edgeprune.surgery.cutting import apply
from edgeprune.tasks.task import Objective, Task


def looking(planner, options):
    data = CalibrationData(planner.task, torch.device("cpu"), options.batches, options.metric_batches, 0)
    return Looking(planner.model, planner.graph, data, batch_statistics=not options.compat)


def kept_at(planner, widths):
    """The best units by the scores of the dense model: what a search of one round keeps."""
    return {
        name: best_units(planner.scores[name], width) if name in planner.scores else tuple(range(width))
        for name, width in widths.items()
    }


def anyhow(planner):
    """A plan that asks for no latency: what the published tolerance comes to counts alone."""
    return replace(planner.propose(0.9 * planner.dense_ms), aim_ms=math.inf)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seg=st.floats(0, 60),
    depth=st.floats(0, 200),
    rate=st.sampled_from([None, 0.02, 0.2]),
    bisect=st.booleans(),
    share=st.floats(0.5, 0.95),
)
def test_every_commit_keeps_all_limits(case, seg, depth, rate, bisect, share):
    planner = case.planner(f"{seg:g}%", f"{depth:g}%")
    options = Pagcp(initial_rate=rate, bisect=bisect, batches=1, metric_batches=1)
    first = planner.propose(share * planner.dense_ms)
    steps, kept = [], None
    try:
        found = options.search(planner, first)
    except BudgetInfeasibleError as error:
        kept = kept_at(planner, error.widths)
    else:
        steps = found.record.details.get("steps", [])
        kept = {name: tuple(group["kept"]) for name, group in found.proposal.plan.groups.items()}
        assert found.proposal.predicted_ms <= first.aim_ms
    look = looking(planner, options)
    dense = look.metrics(kept_at(planner, planner.graph.widths()))
    for state in [*(kept_at(planner, step["widths"]) for step in steps), kept]:
        metrics = look.metrics(state)
        for one in planner.task.objectives:
            assert one.meets_limit(metrics[one.name], dense[one.name])


def plain_walk(planner, options):
    """The search of one round from its definition: every width of every layer one after another, with every objective."""
    dense, look = planner.graph.widths(), looking(planner, options)
    norms = {name: planner.model.get_submodule(name).weight.detach().abs().flatten(1).mean(1) for name in dense}

    def losses(widths):
        kept = {name: sorted(norms[name].topk(width).indices.tolist()) for name, width in widths.items()}
        return look.losses({name: tuple(units) for name, units in kept.items()})

    widths, base, taken = dict(dense), losses(dense), []
    alone = {name: {**dense, name: round(0.7 * size)} for name, size in dense.items()}
    macs = {name: _macs(dense) - _macs(tried) for name, tried in alone.items()}
    sequence = tolerances(options.tolerance, len(widths), options.initial_rate)
    for name in sorted(widths, key=lambda one: macs[one], reverse=sequence.factor <= 1):
        best = None
        for width in sorted({_nearest((1 - step / 20) * dense[name]) for step in range(1, 20)}, reverse=True):
            if not 0 < width < dense[name]:
                continue
            found = losses({**widths, name: width})
            if max((found[one] + 1e-6) / (base[one] + 1e-6) for one in found) > 1 + sequence[len(taken)]:
                break
            best = width, found
        if best is not None:
            widths = {**widths, name: best[0]}
            base = {one: max(base[one], loss) for one, loss in best[1].items()}
            taken.append((name, best[0]))
    return taken


def _nearest(value):
    """The whole number next to it; of two the larger."""
    return max(1, math.floor(value + 0.5))


def _macs(widths):
    """Counted by hand: four 3x3 convolutions, and two of one pixel, on 144 pixels."""
    stem, trunk, seg, depth = (widths[name] for name in ("stem", "trunk", "seg_inner", "depth_inner"))
    return 144 * (9 * (3 * stem + stem * trunk + trunk * seg + trunk * depth) + 3 * seg + depth)


def test_compat_is_the_published_walk(case):
    """With the filter off: FLOPs order the layers, 19 ratios, one tolerance, norms of the weights, running statistics."""
    planner = case.planner(seg=None, depth=None)
    options = Pagcp(compat=True, tolerance=2.5, initial_rate=0.3, top=1.0, bisect=False, batches=2, metric_batches=1)
    found = options.search(planner, anyhow(planner))
    taken = plain_walk(planner, options)
    assert len(taken) > 1
    assert [(step["group"], step["width"]) for step in found.record.details["steps"]] == taken


def test_losses_stay_within_the_product_of_the_tolerances(case):
    planner = case.planner(seg=None, depth=None)
    options = Pagcp(compat=True, tolerance=2.0, initial_rate=0.2, top=1.0, batches=2, metric_batches=1)
    found = options.search(planner, anyhow(planner))
    look = looking(planner, options)
    before = look.losses(kept_at(planner, planner.graph.widths()))
    base = dict(before)
    sequence = tolerances(2.0, 4, 0.2)
    for place, step in enumerate(found.record.details["steps"]):
        for name, loss in step["losses"].items():
            assert loss <= (1 + sequence[place]) * base[name] + 1e-5
            base[name] = max(base[name], loss)
    for name, loss in base.items():
        assert loss <= 2.0 * before[name] + 1e-5


def test_a_layer_that_no_width_violates_is_committed_at_its_narrowest(case):
    planner = case.planner(seg=None, depth=None)
    options = Pagcp(compat=True, tolerance=1e12, initial_rate=1e6, top=1.0, batches=1, metric_batches=1)
    found = options.search(planner, anyhow(planner))
    assert [step["width"] for step in found.record.details["steps"]] == [1, 1, 1, 1]
    # A filter that keeps half of the layers takes back the others.
    half = replace(options, top=0.5).search(planner, anyhow(planner))
    assert sum(width == 1 for width in half.proposal.plan.widths().values()) == 2


def test_a_layer_of_one_objective_is_held_by_its_limit_alone(case):
    """Segmentation may lose nothing, so the trunk stays; the head of depth does not matter to it."""
    planner = case.planner(seg="0%", depth="1000%")
    options = Pagcp(batches=2, metric_batches=2)
    look = looking(planner, options)
    before = look.metrics(kept_at(planner, planner.graph.widths()))["seg"]
    with pytest.raises(BudgetInfeasibleError, match=r"\(seg=0%, depth=1000%\)") as caught:
        options.search(planner, planner.propose(0.4 * planner.dense_ms))
    widths = caught.value.widths
    assert look.metrics(kept_at(planner, widths))["seg"] >= before
    assert widths["depth_inner"] < 24
    assert widths["seg_inner"] == 16
    assert "seg stopped most layers" in caught.value.message
    assert caught.value.best_ms == planner.cost.ms(widths)
    # The limit that would do is said for what the plan for this latency breaks.
    assert "--limit seg=" in caught.value.hint


def test_what_the_latency_does_not_need_is_given_back(case):
    planner = case.planner(seg="60%", depth="200%")
    options = Pagcp(batches=2, metric_batches=2)
    mild, deep = (options.search(planner, planner.propose(share * planner.dense_ms)) for share in (0.95, 0.7))
    steps = mild.record.details["steps"]
    assert steps == deep.record.details["steps"][: len(steps)]
    for name, width in mild.proposal.plan.widths().items():
        assert width >= mild.record.details["steps"][-1]["widths"][name]
    assert mild.proposal.predicted_ms > deep.proposal.predicted_ms
    # A further plan for the same widths keeps the same units.
    again = mild.planner.proposal(mild.proposal.allocation, mild.proposal.aim_ms)
    assert again.plan.hash == mild.proposal.plan.hash


@pytest.fixture(scope="module")
def with_energy(case):
    """The predictor of a board with a counter: energies are *emulated*, a power times latency and much more per byte."""
    found, table, records = copy.copy(case.predictor), case.predictor.table, {}
    machine = Machine.from_header(table.header)
    rows = [row for row in table.rows if row["kind"] == "network"]
    for row, network in zip(rows, table.networks, strict=True):
        matrix = features([Kernel.from_key(key) for key in network.kernels.elements()], machine, ())
        mj = 0.5 * network.measurement.median_ms + 2e-6 * matrix.traffic.sum()
        records[network_key(row["kernels"])] = {"energy_mj": mj, "error_mj": 0.01 * mj, "covers": "emulated"}
    found.table = LatencyTable({**table.header, "energy": records}, table.rows)
    found.energy = fit_energy(found)
    return found


def test_where_energy_is_bounded_it_is_what_layers_contribute_and_what_is_met(case, with_energy):
    energy = Energy(case.kernel_graph, with_energy)
    at_most = 0.85 * energy.value({})
    limit = Limit("energy", energy, at_most, "mJ", "--energy {}mJ")
    # A planner's limits and predictor go together; the case's own predictor knows no energies.
    planner = Planner(
        case.model,
        case.kernel_graph,
        with_energy,
        task=case.task("60%", "200%"),
        limits=[limit],
        constraints=Constraints(min_width={"*": 1}),
    )
    layers = Layers(planner, compat=False)
    widths = planner.graph.widths()
    for choice in layers.choices:
        steps = layers.narrower(choice, widths)
        costs = [energy.value({**widths, **dict.fromkeys(choice.groups, width)}) for width in steps]
        assert costs == sorted(costs, reverse=True)
        if not steps:
            assert layers.contribution(choice, widths) == 0
            continue
        nearest = min(steps, key=lambda width: abs(width - 0.7 * choice.size))
        saved = energy.value(widths) - energy.value({**widths, **dict.fromkeys(choice.groups, nearest)})
        assert layers.contribution(choice, widths) == pytest.approx(saved)
    # A width that saves time may cost energy: its channels no longer fill a vector, and are moved once more.
    latency = Layers(case.planner(), compat=False)
    assert [layers.narrower(one, widths) for one in layers.choices] != [
        latency.narrower(one, widths) for one in latency.choices
    ]
    found = Pagcp(batches=2, metric_batches=2).search(planner, planner.propose(planner.dense_ms))
    assert energy.value(found.proposal.allocation.widths) <= at_most
    tight = Planner(
        case.model,
        case.kernel_graph,
        with_energy,
        task=case.task("0%", "0%"),
        limits=[replace(limit, at_most=0.6 * energy.value({}))],
        constraints=Constraints(min_width={"*": 1}),
    )
    with pytest.raises(
        BudgetInfeasibleError, match=r"^energy must be <= .* mJ, the smallest plan found under"
    ) as caught:
        Pagcp(batches=2, metric_batches=2).search(tight, tight.propose(tight.dense_ms))
    assert caught.value.hint.startswith("--energy ")
    counted = Limit("parameters", Parameters(planner.graph), 1.0)
    with pytest.raises(ConfigError, match="pagcp keeps a latency and an energy only, found a budget of parameters too"):
        Pagcp().require(case.planner(limits=[counted]), 1.0)


def test_rounds_tune_in_between_and_reach_further(case):
    limits = {"seg": "10%", "depth": "30%"}
    planner = case.planner(**limits)
    first = planner.propose(0.35 * planner.dense_ms)
    reached = []
    for rounds in (1, 2):
        options = Pagcp(rounds=rounds, batches=2, metric_batches=2, tuning_steps=12)
        try:
            found = options.search(planner, first, fine_tuning=FineTuning(lr=5e-3))
        except BudgetInfeasibleError as error:
            reached.append(error.best_ms)
        else:
            reached.append(found.proposal.predicted_ms)
            assert found.record.details["rounds"] > 1
            cut = apply(found.planner.model, found.proposal.plan)
            assert evaluate(cut, planner.task) == pytest.approx(found.record.after)
    assert reached[1] < reached[0]


def test_prune_gives_a_verdict_per_objective(case):
    planner = case.planner(seg="60%", depth="200%")
    result = prune(
        case.model,
        case.example,
        Budget(latency_ratio=0.8),
        planner=planner,
        fine_tuning=FineTuning(epochs=1, lr=3e-3),
        pagcp=Pagcp(batches=2, metric_batches=2),
        refit=True,
    )
    assert result.certificate.method == "pagcp"
    assert [record.step for record in result.recovery] == ["pagcp", "reconstruction", "fine_tuning"]
    assert result.predicted_ms <= 0.8 * planner.dense_ms
    assert result.check_max_abs < 1e-6
    seg, depth = result.verdicts
    assert (seg.objective, seg.dense, seg.pruned) == ("seg", result.metrics_before["seg"], result.metrics_after["seg"])
    assert seg.worst == pytest.approx(0.4 * seg.dense)
    assert depth.worst == pytest.approx(3 * depth.dense)
    assert depth.asked == f"at most {depth.worst:.4g} (200%)"
    for one in result.verdicts:
        assert one.kept == (one.pruned >= one.worst if one.higher_is_better else one.pruned <= one.worst)
    assert any(note.endswith("serve only seg.") for note in result.notes)
    assert any(note.startswith("PAGCP:") for note in result.notes)


def test_other_pruners_judge_the_same_limits(case):
    planner = case.planner(seg="0%", depth=1.0)
    result = prune(
        case.model,
        case.example,
        Budget(latency_ratio=0.4),
        planner=planner,
        fine_tuning=FineTuning(epochs=0),
    )
    seg, depth = result.verdicts
    assert (seg.kept, depth.kept) == (False, True)
    assert any(
        note.startswith("The metric of seg is ") and "beyond its limit: at least" in note for note in result.notes
    )
    with pytest.raises(TaskError, match="'depth' must be one that the dense model keeps"):
        prune(case.model, case.example, Budget(latency_ratio=0.4), planner=case.planner(seg=None, depth=1e-6))


def test_what_cannot_be_searched_is_refused(case):
    planner = case.planner(seg=None)
    first = planner.propose(0.8 * planner.dense_ms)
    with pytest.raises(ConfigError, match="needs a limit for each objective, found none for seg"):
        Pagcp().search(planner, first)
    without = case.planner()
    without.task = None
    with pytest.raises(ConfigError, match="pagcp looks at losses, so it needs a task"):
        Pagcp().search(without, first)
    lonely = case.task()
    fixed = replace(lonely.objective("seg"), loss=lambda outputs, targets: (outputs["seg"] * 0).sum())
    blind = [(images[:1], targets) for images, targets in case.train[:1]]
    with pytest.raises(TaskError, match="at least two training batches of objective 'seg', one for losses"):
        Pagcp().search(case.planner(task=Task((replace(fixed, train=blind),))), first)
    settings = {"budget": Budget(latency_ratio=0.8), "pagcp": Pagcp()}
    with pytest.raises(ConfigError, match="pagcp needs a task, for its data, found none"):
        prune(case.model, case.example, planner=without, **settings)
    with pytest.raises(ConfigError, match="netadapt and pagcp each choose the widths"):
        prune(case.model, case.example, planner=planner, netadapt=NetAdapt(), **settings)
    with pytest.raises(ConfigError, match="which pagcp has trained away from"):
        prune(case.model, case.example, planner=planner, refit=True, **{**settings, "pagcp": Pagcp(rounds=2)})
    for wrong in ({"rounds": 0}, {"initial_rate": 0.0}, {"tolerance": 1.0}, {"top": 0.0}, {"batches": 0}):
        with pytest.raises(ConfigError, match=r"(must be at least 1|must be above 0)"):
            Pagcp(**wrong)


def test_an_objective_on_nothing_that_can_be_pruned_is_refused(case):
    planner = case.planner(constraints=Constraints(keep=("stem", "trunk", "seg_inner")))
    with pytest.raises(TaskError, match="loss of objective 'seg' must depend on a channel group that can be pruned"):
        Pagcp().require(planner, 1.0)
    assert "scores" not in vars(planner), "refused before anything is scored"
    with pytest.raises(TaskError, match="loss of objective 'seg' must depend on a channel group that can be pruned"):
        Pagcp().search(planner, planner.propose(0.95 * planner.dense_ms))


@given(st.integers(0, 30), st.integers(0, 30))
def test_bisection_finds_what_the_walk_finds(count, good):
    asked = []

    def allowed(place):
        asked.append(place)
        return place < good

    walked = last_good(count, allowed, bisect=False)
    assert walked == min(good, count) - 1
    asked.clear()
    assert last_good(count, allowed, bisect=True) == walked
    assert len(asked) <= count.bit_length()


@given(st.integers(0, 30), st.integers(0, 30), st.integers(-1, 29))
def test_whatever_is_expected_the_walk_is_found(count, good, expected):
    asked = []

    def allowed(place):
        asked.append(place)
        return place < good

    walked, expected = min(good, count) - 1, min(expected, count - 1)
    assert expected_first(count, allowed, expected) == walked
    assert len(asked) == len(set(asked))
    assert len(asked) <= (2 if expected == walked else 2 * count.bit_length() + 1)


@given(st.lists(st.floats(0, 10), max_size=30))
def test_where_a_line_crosses_is_where_bisection_does(steps):
    used = [sum(steps[: place + 1]) for place in range(len(steps))]
    asked = []

    def use(place):
        asked.append(place)
        return used[place]

    assert last_below(len(used), use) == sum(one <= 1 for one in used) - 1
    assert len(asked) <= 2 * len(used).bit_length()


def bounded(limit):
    return Objective("main", [1], [1], nn.MSELoss(), lambda outputs, targets: 0.0, limit=limit)


def test_a_loss_next_to_nothing_leaves_room():
    """Of a dense loss of 0 every ratio would be infinite."""
    rooms = Rooms(Task((bounded("20%"),)), {"main": 1.0}, {"main": 1.0}, 0.1)
    pairs = [({"main": 0.0}, {"main": 1.0}), ({"main": 0.2}, {"main": 0.8}), ({"main": 0.4}, {"main": 0.6})]
    rooms.fit({"main": 0.0}, pairs)
    assert rooms.totals({"main": 0.0})["main"] == pytest.approx(11.0)
    assert rooms.ratios({"main": 0.1}, {"main": 0.0})["main"] == pytest.approx(6.0)
    assert rooms.allows("main", 0.199)
    assert not rooms.allows("main", 0.201)
    rooms.tighten("main", 0.15)
    assert not rooms.allows("main", 0.15)
    assert rooms.broken({"main": 0.79}) == ["main"]
    assert rooms.needed("main", 0.71) == "29%"


def test_a_limit_that_is_a_value_is_as_far_from_the_dense_model_everywhere():
    rooms = Rooms(Task((bounded(0.75),)), {"main": 0.8}, {"main": 0.9}, 0.1)
    assert rooms.broken({"main": 0.851}) == []
    assert rooms.broken({"main": 0.849}) == ["main"]


def test_a_limit_that_the_dense_model_breaks_already_leaves_no_room():
    with pytest.raises(TaskError, match=r"must be one that the dense model keeps, found a metric of 0\.8"):
        Rooms(Task((bounded(0.85),)), {"main": 0.8}, {"main": 0.9}, 0.1)
