"""Energy of one inference above idle: a power while the board is busy, times latency, and energy for each operation and byte.

Sensors are too slow for single kernels, so tables hold the energy of whole networks only (`LatencyTable.energy`), and what is
fitted has three numbers: ``mJ = busy power * latency + work * mJ per operation + traffic * mJ per byte``. None may be negative.
A few networks leave it near one power for all of them, which is what most of them differ by.

Source: the split of energy into a static power over the run time and a dynamic part per operation and per byte moved, J. W. Choi,
D. Bedard, R. Fowler, R. Vuduc, "A Roofline Model of Energy", IPDPS 2013.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import TableMismatchError, UnsupportedKernelError
from edgeprune.latency.arrays import Floats
from edgeprune.latency.features import Machine, features
from edgeprune.latency.intervals import network_half_width
from edgeprune.spec import Kernel

if TYPE_CHECKING:
    from edgeprune.latency.predictor import Predictor

TOLERANCE = 0.05
"""Relative error that one network is expected to keep; what its measurement says of itself comes on top."""

PRIOR_SPREADS = (0.5, 0.5, 0.5)
"""Prior standard deviations, in shares of a middling network's energy: of the busy power around all, of the others around 0."""


@dataclass(frozen=True)
class EnergyModel:
    """What energy consists of.

    Attributes:
        busy_mw: Power above idle while the board is busy, whatever it computes, milliwatts.
        mj_per_work: For each unit of `FeatureMatrix.work`, millijoules.
        mj_per_byte: For each byte of `FeatureMatrix.traffic`, millijoules.
        covers: What the energy is that of, as the measurement says.
        networks: Names of the measured networks that it was fitted to.
        measured_mj: Their energies, millijoules.
        errors: Relative standard uncertainty of each of these.
        residuals: Log error of each when the model was fitted to all others.
        machine: For the features.
    """

    busy_mw: float
    mj_per_work: float
    mj_per_byte: float
    covers: str
    networks: tuple[str, ...]
    measured_mj: tuple[float, ...]
    errors: tuple[float, ...]
    residuals: tuple[float, ...]
    machine: Machine

    def dynamic_mj(self, kernels: Sequence[Kernel]) -> Floats:
        """What each kernel takes besides the busy power, millijoules, shape (kernels,)."""
        if not kernels:
            return np.zeros(0)
        matrix = features(list(kernels), self.machine, ())
        return np.asarray(self.mj_per_work * matrix.work + self.mj_per_byte * matrix.traffic, dtype=np.float64)

    def static_mj(self, ms: float) -> float:
        """What the busy power takes in some time, millijoules."""
        return self.busy_mw * ms / 1000

    def half_width(self, level: float) -> float:
        """Of the interval of a network's energy, in log space."""
        return network_half_width(self.residuals, [0.0] * len(self.residuals), 0.0, level)


def fit_energy(predictor: Predictor) -> EnergyModel | None:
    """The energy model of a predictor's table; None where the table holds no energy that is more than its uncertainty.

    The latencies that it is fitted to are the predicted ones, so that what latency is wrong by is in its errors too.
    """
    rows, names, told = [], [], []
    records = predictor.table.energy
    for network in predictor.table.networks:
        record = records.get(network.name)
        if record is None or not record["energy_mj"] > 2 * record["error_mj"]:
            continue
        kernels = [Kernel.from_key(key) for key in network.kernels.elements()]
        try:
            ms = predictor.network_ms(kernels)
        except UnsupportedKernelError:
            continue
        matrix = features(kernels, predictor.machine, ())
        rows.append([ms / 1000, float(matrix.work.sum()), float(matrix.traffic.sum())])
        names.append(network.name)
        told.append(record)
    if not rows:
        return None
    terms = np.array(rows)
    measured = np.array([record["energy_mj"] for record in told])
    errors = np.array([record["error_mj"] for record in told]) / measured
    busy, work, traffic = _solved(terms, measured, errors)
    residuals = []
    for row in range(len(rows) if len(rows) > 1 else 0):
        rest = np.arange(len(rows)) != row
        said = float(terms[row] @ _solved(terms[rest], measured[rest], errors[rest]))
        residuals.append(math.log(said / measured[row]))
    return EnergyModel(
        busy_mw=float(busy),
        mj_per_work=float(work),
        mj_per_byte=float(traffic),
        covers=str(told[0].get("covers", "")),
        networks=tuple(names),
        measured_mj=tuple(measured.tolist()),
        errors=tuple(errors.tolist()),
        residuals=tuple(residuals),
        machine=predictor.machine,
    )


def _solved(terms: Floats, measured: Floats, errors: Floats) -> Floats:
    """The three numbers by regularized non-negative least squares of relative errors; networks that are noisy count less."""
    from scipy.optimize import nnls

    # In units of which each would make up all of a middling network's energy.
    units = np.median(measured[:, None] / terms, axis=0)
    relative = terms * units / measured[:, None]
    weights = 1 / np.hypot(TOLERANCE, errors)
    pull = np.diag(1 / np.array(PRIOR_SPREADS))
    left = np.concatenate([relative * weights[:, None], pull])
    right = np.concatenate([weights, pull @ np.array([1.0, 0.0, 0.0])])
    found, _ = nnls(left, right)
    return np.asarray(found * units, dtype=np.float64)


def required(model: EnergyModel | None, header: Mapping[str, Any]) -> EnergyModel:
    """The model, where there is one.

    Raises:
        TableMismatchError: There is none; says how to measure energy.
    """
    if model is None:
        held = "energies no larger than their uncertainty" if header.get("energy") else "none"
        raise TableMismatchError(
            f"the latency table must hold the energy per inference of networks to predict energy, found {held}.",
            hint=f"edgeprune profile MODEL --energy --board {header.get('board', 'BOARD')}",
        )
    return model
