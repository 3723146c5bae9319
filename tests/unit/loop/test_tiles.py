"""From a trained transformer to a model without some of its tiles, in one call."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgeprune
from edgeprune import Budget, LatencyTable, Task
from edgeprune.allocation.tiles.exact import ExactTiles
from edgeprune.criteria.tiles.curves import tile_curves
from edgeprune.criteria.tiles.sums import gradient_sums
from edgeprune.errors import (
    BudgetInfeasibleError,
    ConfigError,
    EmptyPlanError,
    TableMismatchError,
    TableMissingError,
)
from edgeprune.loop import tile_start
from edgeprune.loop.joint.choosing import Channels
from edgeprune.loop.tile_aims import within_latency
from edgeprune.loop.tile_costs import power_share, powered, priced
from edgeprune.loop.tile_refit import calibration_of
from edgeprune.loop.tile_ruin import known_loss, ruin_notes
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.surgery.tiles import tile_grids

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"


class Transformer(nn.Module):
    """Of one layer; which of its sixteen tokens is marked by what."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(8, 32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.fc1, self.fc2, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.fc2(F.gelu(self.fc1(self.norm2(x))))).mean(1))


def accuracy(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


def batches(count, seed):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        targets = torch.randint(0, 4, (32,), generator=draw)
        tokens = torch.randn(32, 16, 8, generator=draw) * 0.5
        tokens[torch.arange(32), torch.randint(0, 16, (32,), generator=draw), targets] += 4
        yield tokens, targets


@pytest.fixture(scope="module")
def task():
    return Task.single(
        train=list(batches(20, 0)), validation=list(batches(8, 1)), loss=F.cross_entropy, metric=accuracy
    )


@pytest.fixture(scope="module")
def trained(task):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(6):
        for tokens, targets in task.objectives[0].train:
            optimizer.zero_grad()
            F.cross_entropy(model(tokens), targets).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def lowered(trained, tmp_path_factory):
    """For the device of the table; only what is predicted counts."""
    identity = LatencyTable.load(TABLE).header["identity"]
    graph = edgeprune.trace(trained, torch.zeros(1, 16, 8))
    return edgeprune.lower(graph, device=identity, workdir=tmp_path_factory.mktemp("lowered"))


def pruned(trained, task, lowered, budget, **options):
    options = {"tile": (8, 16), "kernel_graph": lowered, **options}
    return edgeprune.prune_tiles(trained, torch.zeros(1, 16, 8), budget, task, **options)


def test_half_of_the_operations_in_one_call(trained, task, lowered, tmp_path):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    found = pruned(
        trained,
        task,
        lowered,
        Budget.of(macs="60%"),
        fine_tuning=FineTuning(epochs=1),
        plan_path=tmp_path / "plan.json",
    )
    assert found.share <= 0.6
    assert found.check_max_abs < 1e-6
    assert found.metrics_before["accuracy"] > 0.9
    assert [step.step for step in found.recovery] == ["cut", "tile_reconstruction", "fine_tuning"]
    assert found.recovery[0].before == found.metrics_before
    assert found.recovery[-1].after == found.metrics_after
    assert found.metrics_after["accuracy"] > 0.8
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert edgeprune.PruningPlan.load(tmp_path / "plan.json").hash == found.plan.hash
    # What is left is in the module, and layers account for all of it.
    left = sum(layer.weights for layer in found.layers.values()) / sum(
        layer.dense_weights for layer in found.layers.values()
    )
    assert left < 0.6
    assert found.dense["head.weight"] == "its output is an output of the model"
    assert {name for name in found.layers if name not in found.plan.kept_tiles} == found.dense.keys() - {"head.weight"}
    assert found.measured is None
    assert found.predicted_ms is None
    assert found.notes[-1] == "The latency is unverified: it is not known, no board was given to measure it on."


def test_refitted_layers_are_taken_where_data_that_the_fit_did_not_see_say_so(trained, task, lowered):
    calibration = calibration_of(trained, task, 64)
    fitted, judged = calibration.fitting.objectives[0].train, calibration.judging.objectives[0].validation
    assert (len(fitted), len(judged)) == (16, 4)
    for one in judged:
        assert not any(torch.equal(one[0], other[0]) for other in fitted)
    found = pruned(trained, task, lowered, Budget.of(macs="50%"))
    details = found.recovery[1].details
    gained = details["held_back_after"]["accuracy"] > details["held_back_before"]["accuracy"]
    assert found.refitted is details["taken"] is gained
    assert found.metrics_after == (found.recovery[1].after if gained else found.recovery[0].after)
    assert ("are taken" if gained else "were left out") in found.notes[0]
    # The other way round: a metric of which less is better.
    worse = Task.single(
        train=task.objectives[0].train,
        validation=task.objectives[0].validation,
        loss=F.cross_entropy,
        metric=accuracy,
        higher_is_better=False,
    )
    other = pruned(trained, worse, lowered, Budget.of(macs="50%"))
    assert other.refitted is (details["held_back_after"]["accuracy"] < details["held_back_before"]["accuracy"])


def test_one_batch_is_none_to_judge_by_and_a_limit_that_is_not_kept_is_said(trained, task, lowered):
    single = Task.single(
        train=task.objectives[0].train[:1],
        validation=task.objectives[0].validation,
        loss=F.cross_entropy,
        metric=accuracy,
    )
    found = pruned(trained, single.with_limits({"accuracy": "0%"}), lowered, Budget.of(macs="25%"))
    assert not found.refitted
    assert found.notes[0].startswith("The refitted layers were left out: there was no second batch")
    assert found.verdicts[0].kept is False
    assert any("beyond its limit: at least" in note for note in found.notes)


@cache
def fitted_to(*families, tiles=()):
    """On the kernels of some families: quicker than on all; of a table that says that it was profiled with tiles."""
    stored = LatencyTable.load(TABLE)
    header = {**stored.header, "models": [{"name": "other", "signature": "", "tiles": [list(tile) for tile in tiles]}]}
    rows = [row for row in stored._rows if row["family"] in families]
    return edgeprune.fit(LatencyTable(header if tiles else stored.header, rows))


def test_a_latency_is_held_as_predicted_for_the_plan_as_a_whole(trained, task, lowered):
    predictor = fitted_to("gemm", "layout", "elementwise")
    found = pruned(trained, task, lowered, "97%", predictor=predictor, tile=(32, 32), refit=False)
    assert found.predicted_ms <= 0.97 * found.dense_predicted_ms
    assert found.predicted_ms == predictor.network_ms(lowered.of_plan(found.plan))
    assert found.share == found.predicted_ms / found.dense_predicted_ms
    assert any("guess from what their memory traffic is" in note for note in found.notes)
    assert found.dense["embed.weight"] == "it is no larger than a tile"
    with pytest.raises(BudgetInfeasibleError, match=r"the predicted latency must be <= .* the fastest plan of tiles"):
        pruned(trained, task, lowered, "20%", predictor=predictor, tile=(32, 32), refit=False)


def test_tiles_and_channels_share_a_latency(trained, task, lowered):
    predictor = fitted_to("gemm", "layout", "elementwise")
    found = pruned(
        trained,
        task,
        lowered,
        "90%",
        predictor=predictor,
        tile=(32, 32),
        refit=False,
        channels=Channels(turns=0),
    )
    assert found.predicted_ms <= 0.9 * found.dense_predicted_ms
    assert found.predicted_ms == predictor.network_ms(lowered.of_plan(found.plan))
    assert found.allocation.unit == "ms"
    assert found.metrics_after["accuracy"] > 0.9
    assert any("corrected by what the plan is predicted to take as a whole" in note for note in found.notes)


class Curved:
    """Milliseconds by a power of the work: what layers save does not add up."""

    def __init__(self, power):
        self.power = power

    def network_ms(self, kernels):
        products = [kernel for kernel in kernels if kernel.op in ("MatMul", "Gemm") and len(kernel.inputs) == 1]
        return float(1e-5 * sum(np.prod(kernel.output) * kernel.inputs[0][-1] for kernel in products)) ** self.power

    def kernel_ms(self, kernels):
        return np.ones(len(kernels))


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_a_budget_is_used_up_although_layers_do_not_add_up(trained, task, lowered, power):
    curves = tile_curves(gradient_sums(trained, tile_grids(trained, lowered.graph, (8, 16)), task))
    clock = Curved(power)
    problem = priced(lowered, clock, curves)
    budget_ms = 0.6 * clock.network_ms(lowered.at({}))
    found = within_latency(problem, ExactTiles(), lowered, clock, budget_ms)
    assert found.cost == clock.network_ms(lowered.of_plan(found.plan))
    assert 0.97 * budget_ms <= found.cost <= budget_ms


def test_each_layer_gets_the_size_that_the_table_speaks_for(trained, task, lowered):
    predictor = fitted_to("gemm", "layout", "elementwise", tiles=((32, 32), (16, 16)))
    found = pruned(trained, task, lowered, "97%", predictor=predictor, tile="auto", refit=False)
    assert found.predicted_ms <= 0.97 * found.dense_predicted_ms
    assert found.sizes.keys() == found.layers.keys()
    assert set(found.sizes.values()) <= {(32, 32), (16, 16)}
    assert found.check_max_abs < 1e-6
    for name, kept in found.plan.kept_tiles.items():
        assert max(np.diff(kept.grid.row_edges)) <= found.sizes[name][0]
        assert max(np.diff(kept.grid.column_edges)) <= found.sizes[name][1]
    assert any(
        "Sizes of tiles as they lose least at their predicted latency, among 32x32, 16x16" in one for one in found.notes
    )
    with pytest.raises(
        ConfigError, match="sizes of tiles are chosen by their predicted latency, which the budget must bound"
    ):
        pruned(trained, task, lowered, Budget.of(macs="50%"), tile="auto")


class Uneven(Curved):
    """Milliseconds by the work, that of the layers of an MLP at a third: what saves time does not save as much power."""

    def network_ms(self, kernels):
        products = [kernel for kernel in kernels if kernel.op in ("MatMul", "Gemm") and len(kernel.inputs) == 1]
        return sum(
            float(np.prod(kernel.output)) * kernel.inputs[0][-1] * (1 / 3 if _of_mlp(kernel) else 1)
            for kernel in products
        )


def _of_mlp(kernel):
    return any(origin in ("linear_3", "linear_4") for origin in kernel.origin)


def test_a_price_on_modelled_power_cuts_other_layers_at_equal_latency(trained, task, lowered):
    curves = tile_curves(gradient_sums(trained, tile_grids(trained, lowered.graph, (8, 16)), task))
    clock, tokens = Uneven(1), dict.fromkeys(curves, 16)
    problem = priced(lowered, clock, curves)
    budget_ms = 0.7 * clock.network_ms(lowered.at({}))
    weighed = powered(problem, tokens, 1.0)
    assert weighed.beta > 0
    plans, shares = [], []
    for weight in (0.0, 0.1, 1.0):
        found = within_latency(
            powered(problem, tokens, weight) if weight else problem, ExactTiles(), lowered, clock, budget_ms
        )
        assert found.cost <= budget_ms
        plans.append(found.plan)
        shares.append(power_share(weighed, found.plan))
    assert power_share(problem, plans[0]) is None
    assert shares[0] >= shares[1] * 0.99
    assert shares[1] >= shares[2] * 0.99
    assert shares[2] < 0.97 * shares[0]
    kept = [{name: tiles.weights for name, tiles in plan.kept_tiles.items()} for plan in plans]
    assert kept[0] != kept[2]


def test_modelled_power_is_told_and_not_weighed_beside_channels(trained, task, lowered):
    found = pruned(trained, task, lowered, Budget.of(macs="60%"), power_weight=1.0, refit=False)
    assert 0 < found.power_share < 1
    assert found.share <= 0.6
    assert any(note.startswith("Power of the layers, modelled by kept tiles") for note in found.notes)
    assert pruned(trained, task, lowered, Budget.of(macs="60%"), refit=False).power_share is None
    with pytest.raises(ConfigError, match="power is weighed where tiles alone are chosen"):
        pruned(trained, task, lowered, Budget.of(macs="60%"), power_weight=1.0, channels=Channels())
    with pytest.raises(ConfigError, match="the weight of power must be at least 0, found -1"):
        pruned(trained, task, lowered, Budget.of(macs="60%"), power_weight=-1.0)


def with_energies(predictor, kernels):
    """The predictor of a table with a few networks whose energy is told: emulated."""
    from edgeprune.latency.table_rows import network_key, network_row
    from edgeprune.spec import Measurement

    rows, records = list(predictor.table.rows), {}
    for name, part in (("dense", kernels), ("half", kernels[: len(kernels) // 2]), ("most", kernels[2:])):
        ms = predictor.network_ms(part)
        rows.append(network_row(name, part, Measurement(ms, ms, ms, 0.01, (ms,), 3)))
        mj = 2.0 * ms + 1e-7 * sum(float(np.prod(kernel.output)) for kernel in part)
        records[network_key(rows[-1]["kernels"])] = {"energy_mj": mj, "error_mj": 0.01 * mj, "covers": "emulated"}
    header = {**predictor.table.header, "energy": records}
    return edgeprune.fit(LatencyTable.from_rows(header, rows))


def test_a_budget_of_energy_is_held_as_predicted(trained, task, lowered):
    plain = fitted_to("gemm", "layout", "elementwise")
    predictor = with_energies(plain, lowered.at({}))
    found = pruned(trained, task, lowered, Budget.of(energy="97%"), predictor=predictor, tile=(32, 32), refit=False)
    dense_mj, mj = (predictor.network_energy(kernels)[0] for kernels in (lowered.at({}), lowered.of_plan(found.plan)))
    assert mj <= 0.97 * dense_mj
    assert found.allocation.unit == "mJ"
    assert found.share == pytest.approx(mj / dense_mj)
    # With energies in the table power is not modelled.
    weighed = pruned(
        trained,
        task,
        lowered,
        Budget.of(macs="70%"),
        predictor=predictor,
        tile=(32, 32),
        refit=False,
        power_weight=3.0,
    )
    assert weighed.power_of == "energy above idle, predicted from the energies that the table holds"
    assert 0.3 < weighed.power_share < 1.2
    with pytest.raises(TableMismatchError, match="must hold the energy per inference of networks"):
        pruned(trained, task, lowered, Budget.of(energy="90%"), predictor=plain, tile=(32, 32))
    with pytest.raises(
        BudgetInfeasibleError, match=r"predicted energy must be <= .* mJ, the most frugal plan of tiles"
    ):
        pruned(trained, task, lowered, Budget.of(energy="20%"), predictor=predictor, tile=(32, 32), refit=False)
    with pytest.raises(TableMissingError, match="tiles for an energy need a predictor"):
        pruned(trained, task, lowered, Budget.of(energy="50%"))
    with pytest.raises(ConfigError, match="share a budget of multiply-accumulates or latency"):
        pruned(trained, task, lowered, Budget.of(energy="50%"), predictor=predictor, channels=Channels())


def test_a_budget_that_leaves_nothing_of_what_the_model_knows_is_called_that(trained, task, lowered):
    known = known_loss(trained, task)
    with torch.no_grad():
        rises = [
            float(
                F.cross_entropy(trained(x).mean(0, keepdim=True).expand(len(x), -1), y) - F.cross_entropy(trained(x), y)
            )
            for x, y in task.objectives[0].train[:4]
        ]
    assert known == pytest.approx(np.mean(rises))
    assert 0.5 < known < 3
    (said,) = ruin_notes(2 * known, known)
    assert f"is estimated to raise the training loss by {2 * known:.3g}" in said
    assert "it only destroys accuracy" in said
    assert not [*ruin_notes(0.5 * known, known), *ruin_notes(1.0, 0.0), *ruin_notes(1.0, -1.0)]
    # A task that was solved by chance alone has nothing to lose.
    blind = Task.single(
        train=[(x[:1], y[:1]) for x, y in task.objectives[0].train],
        validation=[],
        loss=F.cross_entropy,
        metric=accuracy,
    )
    assert known_loss(trained, blind) == pytest.approx(0, abs=1e-6)
    for share in ("60%", "20%"):
        found = pruned(trained, task, lowered, Budget.of(macs=share), refit=False)
        lost = found.allocation.damage >= known_loss(trained, calibration_of(trained, task, 64).fitting)
        assert any("only destroys accuracy" in note for note in found.notes) is lost


class Stopped(list):
    """Batches that a Ctrl-C meets in the middle of an epoch, once a file is there."""

    when = None

    def __iter__(self):
        for place, batch in enumerate(super().__iter__()):
            if place == 2 and self.when is not None and self.when.exists():
                raise KeyboardInterrupt
            yield batch


def test_a_tuning_that_was_interrupted_goes_on_to_the_same_model(trained, task, lowered, tmp_path, monkeypatch):
    train, folder = Stopped(task.objectives[0].train[:6]), tmp_path / "tuning"
    few = task.objectives[0].validation[:2]
    stopping = Task.single(train=train, validation=few, loss=F.cross_entropy, metric=accuracy, name="accuracy")
    options = {"fine_tuning": FineTuning(epochs=2, lr=1e-3), "power_weight": 0.5, "batches": 4}
    budget = Budget.of(macs="60%")
    usual = pruned(trained, stopping, lowered, budget, **options)
    train.when = folder / "epochs.safetensors"
    with pytest.raises(KeyboardInterrupt):
        pruned(trained, stopping, lowered, budget, checkpoint=folder, **options)
    assert {path.name for path in folder.iterdir()} == {"state.json", "model", "epochs.safetensors"}
    train.when = None
    with monkeypatch.context() as patch:
        patch.setattr(tile_start, "gradient_sums", None)  # nothing is scored again
        found = pruned(
            trained, stopping, lowered, budget, checkpoint=folder, plan_path=tmp_path / "plan.json", **options
        )
    assert all(torch.equal(value, usual.module.state_dict()[name]) for name, value in found.module.state_dict().items())
    assert edgeprune.PruningPlan.load(tmp_path / "plan.json").hash == usual.plan.hash
    for name in ("layers", "dense", "share", "refitted", "power_share", "metrics_before", "metrics_after", "notes"):
        assert getattr(found, name) == getattr(usual, name), name
    assert found.allocation.digest == usual.allocation.digest
    assert found.recovery[-1].after == usual.recovery[-1].after
    # Another budget is another run: it begins anew, and says why.
    other = pruned(trained, stopping, lowered, Budget.of(macs="70%"), checkpoint=folder, **options)
    assert "was not gone on with: it differs in budget" in other.notes[0]
    assert other.share > found.share


def test_a_table_that_cannot_price_tiles_says_what_it_lacks(trained, task, lowered):
    predictor = fitted_to("layout", "elementwise")
    with pytest.raises(TableMismatchError, match=r"found none to judge .*MatMul \(gemm, fp32\)") as caught:
        pruned(trained, task, lowered, "97%", predictor=predictor)
    assert "edgeprune profile MODEL --table TABLE --tiles ROWSxCOLUMNS adds them" in str(caught.value)


def test_what_cannot_be_asked_for_is_refused(trained, task, lowered):
    with pytest.raises(
        ConfigError, match=r"one of multiply-accumulates, latency or energy, and nothing else, found 50%"
    ):
        pruned(trained, task, lowered, Budget.of(params="50%"))
    with pytest.raises(ConfigError, match="and nothing else"):
        pruned(trained, task, lowered, Budget.of(latency="50%", macs="50%"))
    with pytest.raises(TableMissingError, match="tiles for a latency need a predictor"):
        pruned(trained, task, lowered, "50%")
    with pytest.raises(BudgetInfeasibleError, match=r"the smallest plan reaches [\d.]+ multiply-accumulates .* 'qkv"):
        pruned(trained, task, lowered, Budget.of(macs="1%"))
    with pytest.raises(EmptyPlanError, match="below what the dense model costs"):
        pruned(trained, task, lowered, Budget.of(macs="100%"))


def test_a_model_without_linear_layers_besides_its_classifier_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    data = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))] * 2
    task = Task.single(train=data, validation=data, loss=F.cross_entropy, metric=accuracy)
    with pytest.raises(ConfigError, match="must have a linear layer besides its classifier to be cut into tiles"):
        edgeprune.prune_tiles(model, torch.zeros(1, 3, 8, 8), Budget.of(macs="50%"), task)
