"""Tiles and channels in one allocation."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgeprune
from edgeprune import Budget, Constraints, Task
from edgeprune.criteria.calibration import DamageCalibration
from edgeprune.criteria.damage import damage_curves
from edgeprune.criteria.taylor import Taylor
from edgeprune.criteria.tiles.curves import narrow_curve
from edgeprune.criteria.tiles.loss_scales import loss_scales
from edgeprune.criteria.tiles.sums import gradient_sums, narrow_sums
from edgeprune.errors import BudgetInfeasibleError, ConfigError, ConstraintError, EmptyPlanError
from edgeprune.graph.editing import masks_of
from edgeprune.loop.joint.candidates import Candidates, forms_of
from edgeprune.loop.joint.choosing import Channels
from edgeprune.loop.joint.prices import Counted
from edgeprune.loop.joint.searching import JointSearch
from edgeprune.loop.joint.sections import sections
from edgeprune.loop.joint.settling import CutLoss, settled
from edgeprune.surgery.constraints import resolve, with_removable
from edgeprune.surgery.plan import make_plan
from edgeprune.surgery.tiles import tile_grids


class Transformer(nn.Module):
    """Of one layer; which of its eight tokens is marked by what."""

    def __init__(self, width=16, hidden=16, head=4):
        super().__init__()
        self.heads = width // head
        self.embed, self.norm1, self.norm2 = nn.Linear(8, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2, self.head = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(width, 4)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.fc2(F.gelu(self.fc1(self.norm2(x))))).mean(1))


def accuracy(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


def batches(count, seed):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        targets = torch.randint(0, 4, (32,), generator=draw)
        tokens = torch.randn(32, 8, 8, generator=draw) * 0.5
        tokens[torch.arange(32), torch.randint(0, 8, (32,), generator=draw), targets] += 4
        yield tokens, targets


class Case:
    """A trained transformer, and all that a search over it is made of."""

    def __init__(self, folder):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.task = Task.single(
            train=list(batches(12, 0)), validation=list(batches(4, 1)), loss=F.cross_entropy, metric=accuracy
        )
        self.model = Transformer()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        for _ in range(8):
            for tokens, targets in self.task.objectives[0].train:
                optimizer.zero_grad()
                F.cross_entropy(self.model(tokens), targets).backward()
                optimizer.step()
        self.model.eval()
        self.example = torch.zeros(1, 8, 8)
        self.graph = edgeprune.trace(self.model, self.example)
        self.lowered = edgeprune.lower(self.graph, workdir=folder)
        self.grids = tile_grids(self.model, self.graph, (8, 8))
        self.tokens = dict.fromkeys(self.grids, 8)
        self.rules = with_removable(resolve(Constraints(), self.graph), self.lowered.removable)
        self.sections, self.outside = sections(self.graph, self.rules, list(self.grids))
        movable = [group for one in self.sections for choice in one.choices for group in choice.groups]
        self.scores = Taylor().score(self.graph, self.model, self.task, groups=movable)
        self.damage = (
            DamageCalibration()
            .calibrate(
                damage_curves(self.scores), self.scores, self.graph, self.model, self.task, branches=self.graph.branches
            )
            .curves
        )
        sums = gradient_sums(self.model, self.grids, self.task)
        curves = {name: narrow_curve(one, self.grids[name].weights().astype(float)) for name, one in sums.items()}
        self.scales = loss_scales(self.model, curves, self.task)

    def candidates(self, prices):
        return Candidates(self.model, self.graph, self.grids, self.scores, self.tokens, self.scales, prices)

    def search(self, prices, timed=None):
        forms = [forms_of(section, self.damage, prices, self.graph) for section in self.sections]
        candidates = self.candidates(prices)
        return JointSearch(candidates, candidates.of(self.sections, forms, self.task, batches=64), prices, timed)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("lowered"))


def macs(kernels):
    """Of products with weights and of attention, as kernels have them."""
    return sum(
        float(np.prod(kernel.output)) * kernel.inputs[0][-1]
        for kernel in kernels
        if kernel.op in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
    )


def test_a_section_is_a_residual_branch_and_what_passes_by_stays_whole(case):
    described = [({group for choice in one.choices for group in choice.groups}, one.layers) for one in case.sections]
    assert ({"fc1"}, ("fc1.weight", "fc2.weight")) in described
    assert ({"qkv heads", "qkv head dimensions"}, ("qkv.weight", "proj.weight")) in described
    assert (set(), ("embed.weight",)) in described
    assert case.outside == ("embed (+2 layers)",)
    assert {one.lead for one in case.sections} == {"qkv heads", "fc1", None}


def test_within_two_percent_of_trying_all_widths_and_all_numbers_of_tiles(case):
    """Cost of everything by the kernels that would run, damage by the sums of everything: nothing of the search is used."""
    dense = macs(case.lowered.at({}))
    lists = [pareto(everything(case, section, dense)) for section in case.sections]
    search = case.search(Counted(case.lowered))
    for share in (0.9, 0.75, 0.6, 0.45, 0.3):
        budget = share * dense
        best = min(
            sum(damage for _, damage in picked)
            for picked in itertools.product(*lists)
            if dense + sum(cost for cost, _ in picked) <= budget
        )
        found = search.within(budget)
        assert found.damage <= 1.02 * best, share
        assert found.bound <= best * (1 + 1e-9)
        assert macs(case.lowered.of_plan(found.plan)) <= budget * (1 + 1e-9)


def everything(case, section, dense):
    """(what is saved, damage) of all widths with all numbers of tiles, and of no branch."""
    every = [
        {group: width for choice, width in zip(section.choices, picked, strict=True) for group in choice.groups}
        for picked in itertools.product(*(choice.allowed for choice in section.choices))
    ]
    kept = {name: [left(case, name, widths) for widths in every] for name in section.layers}
    sums = narrow_sums(case.model, {name: case.grids[name] for name in kept}, case.task, kept)
    for place, widths in enumerate(every):
        narrow = macs(case.lowered.at(widths)) - dense
        lost = sum(case.damage[choice.groups[0]][widths[choice.groups[0]]] for choice in section.choices)
        layers = []
        for name in section.layers:
            sizes = gathered(case.grids[name], *kept[name][place])
            curve = narrow_curve(sums[name][place], sizes)
            damage, filled = case.scales[name](curve.estimate), int((sizes > 0).sum())
            layers.append([(8 * (curve.weights[-1] - curve.weights[at]), damage[at]) for at in range(1, filled + 1)])
        for picked in itertools.product(*layers):
            yield narrow - sum(gone for gone, _ in picked), lost + sum(more for _, more in picked)
    if section.lead is not None:
        groups = next(one.groups for one in case.graph.branches if one.lead == section.lead)
        yield macs(case.lowered.at(dict.fromkeys(groups, 0))) - dense, case.damage[section.lead][0]


def left(case, name, widths):
    sizes = case.graph.widths()
    masks = {group: np.isin(np.arange(sizes[group]), units(case, group, width)) for group, width in widths.items()}
    kept = masks_of(case.graph, masks)
    return kept.masks(name, 0), kept.masks(name, 1)


def units(case, group, width):
    return np.argsort(-case.scores[group], kind="stable")[:width]


def gathered(grid, rows, columns):
    return np.array(
        [
            [rows[a:b].sum() * columns[c:d].sum() for c, d in itertools.pairwise(grid.column_edges)]
            for a, b in itertools.pairwise(grid.row_edges)
        ],
        dtype=float,
    )


def pareto(points):
    kept, least = [], float("inf")
    for cost, damage in sorted(points):
        if damage < least:
            kept.append((cost, damage))
            least = damage
    return kept


class Clock:
    """Milliseconds by a power of the work: what sections save does not add up."""

    unit, most_points, exact = "ms", 3, False

    def __init__(self, case, power):
        self.kernel_graph, self.power, self.predictor = case.lowered, power, self
        self.case, self.dense = case, self.network_ms(case.lowered.at({}))
        self.candidates = Counted(case.lowered).candidates

    def network_ms(self, kernels):
        return (1e-5 * macs(kernels)) ** self.power

    def narrow(self, many):
        return np.array([self.network_ms(self.kernel_graph.at(widths)) for widths in many])

    def tiled(self, plan, widths, removed):
        return self.network_ms(self.kernel_graph.of_plan(plan))


@pytest.mark.parametrize("power", [0.7, 1.4])
def test_a_latency_is_used_up_although_sections_do_not_add_up(case, power):
    clock = Clock(case, power)
    search = case.search(clock, clock)
    few = [some[:: max(1, len(some) // 5)] + some[-1:] for some in search.options]
    search = JointSearch(search.candidates, few, clock, clock)
    every = [
        (clock.tiled(search.candidates.plan(picked), {}, 0.0), sum(one.narrowing + one.tiling for one in picked))
        for picked in itertools.product(*few)
    ]
    for share in (0.8, 0.55):
        budget = share * clock.dense
        found = search.within(budget)
        assert clock.tiled(found.plan, {}, 0.0) == pytest.approx(found.cost)
        assert found.cost <= budget
        assert found.damage <= 1.02 * min(damage for cost, damage in every if cost <= budget)


def test_damage_beside_a_plan_keeps_tiles_from_being_worse_than_channels_alone(case):
    search = case.search(Counted(case.lowered))
    loss = CutLoss(case.model, case.task, 4)
    for share in (0.7, 0.4):
        budget = share * search.prices.dense
        estimated, alone = search.within(budget), search.without_tiles().within(budget)
        found, measured = settled(search, budget, loss, turns=2)
        assert measured == loss.of(found.plan)
        assert measured <= min(loss.of(estimated.plan), loss.of(alone.plan))
        assert found.cost <= budget * (1 + 1e-9)


def pruned(case, budget, channels=None, **options):
    return edgeprune.prune_tiles(
        case.model,
        case.example,
        budget,
        case.task,
        kernel_graph=case.lowered,
        channels=channels or Channels(),
        **{"tile": (8, 8), **options},
    )


def test_both_in_one_call(case, tmp_path):
    found = pruned(case, Budget.of(macs="45%"), Channels(blocks=True, turns=1), plan_path=tmp_path / "plan.json")
    assert found.share <= 0.45 * (1 + 1e-9)
    assert macs(case.lowered.of_plan(found.plan)) <= 0.45 * macs(case.lowered.at({})) * (1 + 1e-9)
    assert found.check_max_abs < 1e-6
    assert any(kept < size for kept, size in found.widths.values())
    assert edgeprune.PruningPlan.load(tmp_path / "plan.json").hash == found.plan.hash
    weights = {name: one for name, one in found.layers.items() if name in found.plan.kept}
    for name, one in weights.items():
        assert one.weights < one.dense_weights, name
    assert "Channels outside of residual branches stay whole: embed (+2 layers)." in found.notes
    assert any(note.startswith("Widths and tiles, chosen together: proven among") for note in found.notes)


def test_what_constraints_keep_stays_and_channels_go_alone_where_there_is_no_tile(case):
    found = pruned(case, Budget.of(macs="80%"), Channels(Constraints(keep=["fc1"]), turns=0), tile=None, refit=False)
    assert found.widths["fc1"] == (16, 16)
    assert not found.plan.kept_tiles
    assert found.layers == {}
    assert found.share <= 0.8
    with pytest.raises(ConstraintError):
        pruned(case, Budget.of(macs="80%"), Channels(Constraints(keep=["fc9"])))
    with pytest.raises(
        BudgetInfeasibleError, match=r"smallest plan of widths and tiles that was found has .* multiply"
    ):
        pruned(case, Budget.of(macs="1%"), Channels(turns=0))
    with pytest.raises(EmptyPlanError, match="a budget of tiles and channels must be below"):
        pruned(case, Budget.of(macs="100%"), Channels(turns=0))
    with pytest.raises(ConfigError, match="neither a tile nor channels"):
        edgeprune.prune_tiles(case.model, case.example, Budget.of(macs="50%"), case.task, tile=None)


def test_removing_a_unit_removes_its_share_of_every_tile(case):
    search = case.search(Counted(case.lowered))
    options = [one for some in search.options for one in some if one.tiles and one.widths.get("fc1", 16) < 16]
    for option in options[:3]:
        plan = make_plan(case.graph, search.candidates.units(option.widths), kept_tiles=option.tiles)
        assert macs(case.lowered.of_plan(plan)) <= option.cost * (1 + 1e-9)
        edgeprune.check(case.model, plan, case.example)
