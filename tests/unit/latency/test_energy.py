"""Energy of networks: what is fitted to energies that are *emulated* on really measured latencies, one known law each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgeprune.errors import TableMismatchError
from edgeprune.latency.energy import fit_energy
from edgeprune.latency.features import Machine, features
from edgeprune.latency.fitting import fit
from edgeprune.latency.predictor import Predictor
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import network_key
from edgeprune.spec import Kernel

BUSY_MW, PER_WORK, PER_BYTE = 2000.0, 4e-9, 2e-7

Emulate = Callable[..., LatencyTable]


@pytest.fixture(scope="module")
def emulate(measured: LatencyTable) -> Emulate:
    """Makes the table as if a board with a counter had measured its networks, which takes a law and some noise."""
    machine = Machine.from_header(measured.header)

    def make(noise: float = 0.02, only: int | None = None, error: float = 0.02) -> LatencyTable:
        dice = np.random.default_rng(0)
        records: dict[str, Any] = {}
        for row, network in zip(
            (row for row in measured.rows if row["kind"] == "network"), measured.networks[:only], strict=False
        ):
            matrix = features([Kernel.from_key(key) for key in network.kernels.elements()], machine, ())
            mj = BUSY_MW * network.measurement.median_ms / 1000
            mj += PER_WORK * matrix.work.sum() + PER_BYTE * matrix.traffic.sum()
            mj *= float(np.exp(noise * dice.standard_normal()))
            records[network_key(row["kernels"])] = {
                "energy_mj": mj,
                "error_mj": error * mj,
                "covers": "an emulated board",
            }
        return LatencyTable({**measured.header, "energy": records}, measured.rows)

    return make


@pytest.fixture(scope="module")
def fitted(emulate: Emulate) -> Predictor:
    table = emulate()
    convs = [kernel.key for kernel in table.kernels if kernel.family == "conv"][::6]
    others = [kernel.key for kernel in table.kernels if kernel.family != "conv"]
    return fit(table.filter(key={*convs, *others, *(network.name for network in table.networks)}))


def standing_on(predictor: Predictor, table: LatencyTable) -> Predictor:
    """The predictor, whose latencies are those of the table without energies, with this table: another fit takes seconds."""
    found = copy.copy(predictor)
    found.table = table
    return found


def listed(predictor: Predictor, place: int) -> list[Kernel]:
    return [Kernel.from_key(key) for key in predictor.table.networks[place].kernels.elements()]


def test_networks_that_the_fit_had_not_seen_are_within_a_few_percent(fitted: Predictor) -> None:
    model = fitted.energy
    assert model is not None
    errors = np.abs(np.expm1(model.residuals))
    assert len(errors) == len(fitted.table.networks) >= 10
    assert np.median(errors) < 0.06
    assert min(model.busy_mw, model.mj_per_work, model.mj_per_byte) >= 0
    assert model.covers == "an emulated board"


def test_the_report_has_a_row_for_it_beside_what_measurements_say_of_themselves(fitted: Predictor) -> None:
    report = fitted.report()
    row = report.rows()[-1]
    assert row["family"] == "energy, end to end"
    assert set(row) == set(report.families[0])
    assert row["noise_median_percent"] == pytest.approx(0.6745 * 2, rel=0.02), "of a standard uncertainty of 2 %"
    assert row["coverage_percent"] > 70
    assert "energy: median error" in report.summary()


def test_a_network_has_an_interval_and_its_kernels_share_it(fitted: Predictor) -> None:
    kernels = listed(fitted, 0)
    mj, low, high = fitted.network_energy(kernels)
    assert 0 < low < mj < high
    frame = fitted.predict(kernels)
    assert (frame["energy_mj"] > 0).all()
    # Kernels take their time alone, a network its calibrated one.
    model = fitted.energy
    assert model is not None
    apart = model.static_mj(frame["ms"].sum()) + model.dynamic_mj(kernels).sum()
    assert frame["energy_mj"].sum() == pytest.approx(apart)
    assert mj == pytest.approx(model.static_mj(fitted.network_ms(kernels)) + model.dynamic_mj(kernels).sum())


def test_one_network_leaves_one_power_for_all(predictor: Predictor, emulate: Emulate) -> None:
    model = fit_energy(standing_on(predictor, emulate(noise=0.0, only=1)))
    assert model is not None
    assert model.residuals == ()
    assert model.half_width(0.9) > 0.02, "nobody knows how far it is off"


def test_without_energies_it_says_so_and_how_to_measure_them(predictor: Predictor) -> None:
    assert predictor.energy is None
    assert "energy_mj" not in predictor.predict(listed(predictor, 0))
    assert predictor.report().energy is None
    with pytest.raises(
        TableMismatchError, match=r"must hold the energy per inference of networks.*found none"
    ) as caught:
        predictor.network_energy(listed(predictor, 0))
    assert "edgeprune profile MODEL --energy" in str(caught.value)


def test_energies_that_are_no_more_than_their_uncertainty_are_no_energies(
    predictor: Predictor, emulate: Emulate
) -> None:
    doubtful = standing_on(predictor, emulate(error=0.6))
    assert fit_energy(doubtful) is None
    with pytest.raises(TableMismatchError, match="found energies no larger than their uncertainty"):
        doubtful.network_energy(listed(doubtful, 0))
