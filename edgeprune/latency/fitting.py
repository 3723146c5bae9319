"""`fit`: from a latency table to a predictor. Deterministic and quick, so predictors are refitted, never stored."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from edgeprune.errors import ConfigError, TableFormatError, UnsupportedKernelError
from edgeprune.latency.calibration import fit_calibrations, leave_one_out
from edgeprune.latency.family_model import FamilyModel, fit_family
from edgeprune.latency.features import Machine
from edgeprune.latency.likeness import grouped, skeleton
from edgeprune.latency.predictor import MEMORY_FAMILIES, FitSettings, Predictor
from edgeprune.latency.table import LatencyTable, Network
from edgeprune.spec import Kernel, Measurement

logger = logging.getLogger("edgeprune.latency")

_CACHED = 8
_cache: OrderedDict[tuple[str, FitSettings], Predictor] = OrderedDict()


def fit(table: LatencyTable, *, seed: int = 0, level: float = 0.9) -> Predictor:
    """Fit a predictor to a table; the same table and settings give the same figures, and in one process the same object.

    Args:
        table: Measured kernels, and networks for the calibration where there are any.
        seed: Of cross-validation folds and regressors.
        level: Of all intervals, in (0, 1).

    Raises:
        TableFormatError: The table holds no kernel.
        ConfigError: `level` is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ConfigError(f"the level of intervals must lie between 0 and 1, found {level}.", hint="level=0.9")
    return fit_with(table, FitSettings(seed=seed, level=level))


def fit_with(table: LatencyTable, settings: FitSettings) -> Predictor:
    """`fit` with its settings as one object."""
    place = (table.hash, settings)
    if place not in _cache:
        _cache[place] = _fitted(table, settings)
        while len(_cache) > _CACHED:
            _cache.popitem(last=False)
    _cache.move_to_end(place)
    return _cache[place]


def _fitted(table: LatencyTable, settings: FitSettings) -> Predictor:
    if not table.kernels:
        raise TableFormatError("a latency table must hold at least one kernel to fit a predictor, found none.")
    machine = Machine.from_header(table.header)
    families = _families(table)
    timed = table.measurements
    models = {
        name: fit_family(
            kernels, [timed[kernel.key] for kernel in kernels], machine, seed=settings.seed, level=settings.level
        )
        for name, kernels in families.items()
    }
    predictor = Predictor(table, settings, models, _substitutes(families, timed, machine, settings))
    _calibrate(predictor, table.networks)
    return predictor


def _families(table: LatencyTable) -> dict[tuple[str, str], list[Kernel]]:
    """Kernels to learn from, by family and precision; those that the call hides only where a family has no other."""
    hidden = set(table.header.get("flags", {}).get("below-overhead", ()))
    families: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in table.kernels:
        families.setdefault((kernel.family, kernel.precision), []).append(kernel)
    for name, kernels in families.items():
        clear = [kernel for kernel in kernels if kernel.key not in hidden]
        if clear and len(clear) < len(kernels):
            logger.info(
                "%s: %d of %d kernels are too short to learn from", name, len(kernels) - len(clear), len(kernels)
            )
            families[name] = clear
    return families


def _substitutes(
    families: dict[tuple[str, str], list[Kernel]],
    timed: dict[str, Measurement],
    machine: Machine,
    settings: FitSettings,
) -> dict[str, FamilyModel]:
    pooled: dict[str, list[Kernel]] = {}
    for (family, precision), kernels in families.items():
        if family in MEMORY_FAMILIES:
            pooled.setdefault(precision, []).extend(kernels)
    return {
        precision: fit_family(
            kernels,
            [timed[kernel.key] for kernel in kernels],
            machine,
            seed=settings.seed,
            level=settings.level,
            names=("roofline",),
        )
        for precision, kernels in pooled.items()
    }


def _calibrate(predictor: Predictor, networks: Sequence[Network]) -> None:
    usable, times, skeletons = [], [], []
    for network in networks:
        kernels = [Kernel.from_key(key) for key in network.kernels.elements()]
        try:
            times.append(predictor.kernel_ms(kernels))
        except UnsupportedKernelError as error:
            logger.warning("network %s is left out of the calibration: %s", network.name, error.message)
        else:
            usable.append(network)
            skeletons.append(skeleton(kernels))
    if not usable:
        return
    sums = np.array([float(kernel_ms.sum()) for kernel_ms in times])
    counts = np.array([float(len(kernel_ms)) for kernel_ms in times])
    measured = np.array([network.measurement.median_ms for network in usable])
    smallest = min(float(kernel_ms.min()) for kernel_ms in times)
    models = grouped(skeletons)
    residuals = [
        float(np.log(without.ms(sums[row], int(counts[row])) / measured[row]))
        for row, without in enumerate(leave_one_out(sums, counts, measured, smallest, models))
    ]
    common, own = fit_calibrations(sums, counts, measured, smallest, models)
    known = [(skeletons[model[0]], found) for model, found in zip(models, own, strict=True) if found is not None]
    predictor.calibrate(common, usable, residuals, known)
