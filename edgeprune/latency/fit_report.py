"""`FitReport`: how wrong a predictor is on what it has not seen, beside how well measurements repeat themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.latency.arrays import Floats
from edgeprune.latency.energy import EnergyModel
from edgeprune.latency.family_model import FamilyModel
from edgeprune.latency.intervals import NetworkNoise, cross_coverage, network_half_width, repeatability
from edgeprune.latency.transfer import TRANSFER
from edgeprune.latency.weak_regions import weak_regions
from edgeprune.spec import Kernel, Measurement

if TYPE_CHECKING:
    from edgeprune.latency.predictor import Predictor

END_TO_END = "end to end"
ENERGY = "energy, end to end"


@dataclass(frozen=True)
class FitReport:
    """Cross-validated errors per family and end to end, each beside its noise ceiling.

    All errors are relative, in percent of the measured time. Kernels: five folds over groups of channel counts.
    Networks: the calibration was fitted to all other networks. The regressor was chosen on the same folds, from at most
    four candidates, which flatters it a little.

    Attributes:
        families: One row per family and precision; see `rows`.
        end_to_end: The row of networks; None if the table has none.
        energy: The row of the energy of networks, each predicted by a fit to all others; None if the table has none.
        level: Nominal coverage of the intervals.
        left_out: Networks of the table that hold a kernel which cannot be predicted.
        weak: Kinds of kernels that are missed by more than the rest of their family; see `weak_regions.weak_regions`.
        edges: Stair edges that profiling bisected down to neighboring widths, the largest first: ``model``, ``group``,
            ``width`` (the wider one), ``below_ms`` and ``at_ms`` (what the group touches, at one unit less and at it).
        transferred_from: Device, runtime and table of the predictor that this one stands on, None where it stands alone.
            Families whose ``model`` begins with ``transfer`` do; for the others cross-validation found it better not to.
    """

    families: tuple[dict[str, Any], ...]
    end_to_end: dict[str, Any] | None
    level: float
    left_out: tuple[str, ...] = ()
    edges: tuple[dict[str, Any], ...] = ()
    transferred_from: str | None = None
    energy: dict[str, Any] | None = None
    weak: tuple[dict[str, Any], ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """Families, then end to end, then energy. Keys, None where there is too little data:

        ``family``, ``precision``, ``n``, ``model``, ``mean_error_percent``, ``median_error_percent``,
        ``within_5_percent``, ``within_10_percent``, ``coverage_percent``, ``width_percent`` (median full width of the
        interval), ``noise_median_percent``, ``noise_within_5_percent``, ``noise_within_10_percent`` (what a perfect
        prediction would show, since measurements do not repeat exactly); end to end also ``sum_median_error_percent`` and
        ``sum_mean_error_percent`` (no calibration).
        """
        return [dict(row) for row in (*self.families, self.end_to_end, self.energy) if row is not None]

    def summary(self) -> str:
        """One line: the error of the largest family and end to end, each beside its noise ceiling."""
        parts = []
        largest = max(self.families, key=lambda row: row["n"])
        for row in (largest, self.end_to_end):
            if row is None:
                parts.append("end to end not measured")
            elif row["median_error_percent"] is None:
                parts.append(f"{row['family']}: {row['n']} row, error unknown")
            else:
                noise = row["noise_median_percent"]
                ceiling = "repeatability unknown" if noise is None else f"measurements repeat to {noise:.1f} %"
                parts.append(
                    f"{row['family']}: median error {row['median_error_percent']:.1f} % on {row['n']} held-out "
                    f"{'networks' if row is self.end_to_end else 'kernels'}, "
                    f"{row['within_10_percent']:.0f} % within 10 % ({ceiling})"
                )
        if self.energy is not None and self.energy["median_error_percent"] is not None:
            parts.append(
                f"energy: median error {self.energy['median_error_percent']:.1f} % on {self.energy['n']} held-out networks "
                f"(measurements say {self.energy['noise_median_percent']:.1f} % of themselves)"
            )
        if self.transferred_from is not None:
            used = [row["family"] for row in self.families if row["model"].startswith(TRANSFER)]
            verb = f"used for {', '.join(used)}" if used else "of no use to any family"
            parts.append(f"transferred from {self.transferred_from}: {verb}")
        return "; ".join(parts)


def make_report(
    predictor: Predictor,
    models: Iterable[FamilyModel],
    network_residuals: Sequence[float],
    network_shares: Sequence[float],
    network_noise: NetworkNoise,
) -> FitReport:
    """Report of a fitted predictor."""
    level = predictor.settings.level
    timed = predictor.table.measurements
    models = list(models)
    weak = [
        row
        for model in models
        if len(model.residuals)
        for row in weak_regions(model.family, list(model.held), _relative(model.residuals), timed)
    ]
    families = sorted((_family_row(model, timed, level) for model in models), key=lambda row: -row["n"])
    used = {network.name for network in predictor.calibrated_on}
    left_out = tuple(network.name for network in predictor.table.networks if network.name not in used)
    total = _end_to_end_row(predictor, network_residuals, network_shares, network_noise, level)
    edges = sorted(predictor.table.header.get("edges", ()), key=lambda edge: -abs(edge["at_ms"] - edge["below_ms"]))
    lender = None if predictor.source is None else predictor.source.table
    origin = None if lender is None else f"{lender.device}, {lender.header['runtime']} (table {lender.hash[:12]})"
    energy = predictor.energy
    energies = None if energy is None else _energy_row(energy, predictor.table.header["precision"], level)
    weak.sort(key=lambda row: -row["median_error_percent"])
    return FitReport(tuple(families), total, level, left_out, tuple(edges), origin, energies, tuple(weak))


def _family_row(model: FamilyModel, timed: dict[str, Measurement], level: float) -> dict[str, Any]:
    coverage = cross_coverage(model.residuals, model.folds, level) if len(model.residuals) else math.nan
    return {
        "family": model.family,
        "precision": model.precision,
        "n": len(model.held),
        "model": model.chosen,
        **_errors(_relative(model.residuals)),
        "coverage_percent": _percent(coverage),
        "width_percent": _percent(2 * math.sinh(model.half_width)),
        **_noise([timed[kernel.key] for kernel in model.held]),
    }


def _end_to_end_row(
    predictor: Predictor, residuals: Sequence[float], shares: Sequence[float], noise: NetworkNoise, level: float
) -> dict[str, Any] | None:
    networks = predictor.calibrated_on
    if not networks:
        return None
    listed = [[Kernel.from_key(key) for key in network.kernels.elements()] for network in networks]
    sums = np.array([float(predictor.kernel_ms(kernels).sum()) for kernels in listed])
    measured = np.array([network.measurement.median_ms for network in networks])
    widths = [math.log(high / ms) for ms, _, high in map(predictor.network, listed)]
    # Each network is judged by the interval that the others alone would give.
    inside = []
    for row, residual in enumerate(residuals):
        others = [*residuals[:row], *residuals[row + 1 :]], [*shares[:row], *shares[row + 1 :]]
        inside.append(abs(residual) <= network_half_width(*others, shares[row], level, noise))
    alone = np.abs(sums / measured - 1)
    return {
        "family": END_TO_END,
        "precision": predictor.table.header["precision"],
        "n": len(networks),
        "model": "a * sum + b * kernels + c + d * weights",
        **_errors(_relative(np.array(residuals))),
        "coverage_percent": _percent(float(np.mean(inside))),
        "width_percent": _percent(float(np.median([2 * math.sinh(width) for width in widths]))),
        **_noise([network.measurement for network in networks]),
        "sum_median_error_percent": _percent(float(np.median(alone))),
        "sum_mean_error_percent": _percent(float(np.mean(alone))),
    }


def _energy_row(model: EnergyModel, precision: str, level: float) -> dict[str, Any]:
    """The energy of networks; their noise is what the measurements say of themselves, taken as normal."""
    inside = [
        abs(residual) <= network_half_width(others, [0.0] * len(others), 0.0, level)
        for row, residual in enumerate(model.residuals)
        for others in ([*model.residuals[:row], *model.residuals[row + 1 :]],)
    ]
    # Deviations that stand for a normal distribution: the median error of these is that of the distribution.
    normal = np.array([NormalDist().inv_cdf((place + 0.5) / 100) for place in range(100)])
    noise = _errors(np.abs(np.outer(model.errors, normal).ravel()))
    return {
        "family": ENERGY,
        "precision": precision,
        "n": len(model.networks),
        "model": "power * ms + a * work + b * bytes",
        **_errors(_relative(np.array(model.residuals))),
        "coverage_percent": _percent(float(np.mean(inside)) if inside else math.nan),
        "width_percent": _percent(2 * math.sinh(model.half_width(level))),
        "noise_median_percent": noise["median_error_percent"],
        "noise_within_5_percent": noise["within_5_percent"],
        "noise_within_10_percent": noise["within_10_percent"],
    }


def _relative(residuals: Floats) -> Floats:
    return np.abs(np.expm1(residuals))


def _errors(errors: Floats) -> dict[str, float | None]:
    known = len(errors) > 0
    return {
        "mean_error_percent": _percent(float(np.mean(errors)) if known else math.nan),
        "median_error_percent": _percent(float(np.median(errors)) if known else math.nan),
        "within_5_percent": _percent(float(np.mean(errors <= 0.05)) if known else math.nan),
        "within_10_percent": _percent(float(np.mean(errors <= 0.10)) if known else math.nan),
    }


def _noise(measurements: Iterable[Measurement]) -> dict[str, float | None]:
    errors = _errors(repeatability(measurement.rounds_ms for measurement in measurements))
    return {
        "noise_median_percent": errors["median_error_percent"],
        "noise_within_5_percent": errors["within_5_percent"],
        "noise_within_10_percent": errors["within_10_percent"],
    }


def _percent(share: float) -> float | None:
    return 100 * share if math.isfinite(share) else None
