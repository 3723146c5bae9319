"""Budgets of energy and memory, by a table of another machine: nothing is timed."""

import pytest
import torch

from edgeprune.allocation.memory import Memory
from edgeprune.budget import Budget
from edgeprune.errors import BudgetInfeasibleError, TableMismatchError
from edgeprune.graph.tracing import trace
from edgeprune.latency.fitting import fit
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import network_key
from edgeprune.loop.pruning import prune
from edgeprune.lowering.kernel_graph import lower

EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def metered(tabled):
    """The predictor of a board with a counter: energies are *emulated* as one power times the latencies that were measured."""
    table, records = tabled.predictor.table, {}
    for row in table.rows:
        if row["kind"] == "network":
            mj = 1500.0 * row["median_ms"] / 1000
            records[network_key(row["kernels"])] = {"energy_mj": mj, "error_mj": 0.01 * mj, "covers": "emulated"}
    return fit(LatencyTable({**table.header, "energy": records}, table.rows))


def pruned(planner, budget, predictor):
    return prune(planner.model, EXAMPLE, budget, predictor=predictor, kernel_graph=planner.kernel_graph)


def test_energy_and_memory_are_bounded_at_once(tabled, metered):
    result = pruned(tabled, Budget(energy_ratio=0.6, memory_ratio=0.7), metered)
    spent = {one.name: one for one in result.spent}
    assert {name: one.unit for name, one in spent.items()} == {"energy": "mJ", "memory": "bytes"}
    assert all(one.value <= one.at_most for one in spent.values())
    assert max(one.value / one.at_most for one in spent.values()) > 0.8, "one of them is what stops it"
    kernels = tabled.kernel_graph.at(result.plan.widths())
    assert spent["energy"].value == pytest.approx(metered.network_energy(kernels)[0], rel=1e-4)
    # What was counted is what the cut model itself comes to.
    device = metered.table.header["identity"]
    own = lower(trace(result.module, EXAMPLE), model=result.module, device=device)
    assert Memory(own).value({}) == spent["memory"].value


def test_an_energy_out_of_reach_says_what_holds_it_up_and_one_that_nobody_measured_is_refused(tabled, metered):
    with pytest.raises(
        BudgetInfeasibleError, match=r"energy must be <= 1e-06 mJ, .*\(the board's .* mW above idle over .* hold"
    ):
        pruned(tabled, Budget(energy_mj=1e-6), metered)
    with pytest.raises(TableMismatchError, match="must hold the energy per inference of networks to predict energy"):
        pruned(tabled, Budget(energy_mj=1.0), tabled.predictor)
