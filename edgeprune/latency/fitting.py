"""`fit`: from a latency table to a predictor. Deterministic and quick, so predictors are refitted, never stored."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgeprune.errors import ConfigError, TableFormatError, UnsupportedKernelError
from edgeprune.latency.calibration import fit_calibrations, leave_one_out
from edgeprune.latency.energy import fit_energy
from edgeprune.latency.family_model import FamilyModel, borrowed_family, fit_family
from edgeprune.latency.features import Machine
from edgeprune.latency.likeness import grouped, skeleton
from edgeprune.latency.predictor import FALLBACK_HALF_WIDTH, MEMORY_FAMILIES, FitSettings, Predictor
from edgeprune.latency.table import LatencyTable, Network
from edgeprune.latency.transfer import SourceTimes, source_times
from edgeprune.spec import Kernel, Measurement

logger = logging.getLogger("edgeprune.latency")

_CACHED = 8
_cache: OrderedDict[tuple[str, FitSettings, tuple[str, FitSettings] | None], Predictor] = OrderedDict()


def fit(
    table: LatencyTable | Path | str,
    *,
    seed: int = 0,
    level: float = 0.9,
    transfer_from: LatencyTable | Predictor | Path | str | None = None,
) -> Predictor:
    """Fit a predictor to a table; the same table and settings give the same figures, and in one process the same object.

    Args:
        table: Measured kernels, and networks for the calibration where there are any; or the file of such a table.
        seed: Of cross-validation folds and regressors.
        level: Of all intervals, in (0, 1).
        transfer_from: Another device's table, its file, or a predictor fitted to one. With it 10 to 200 kernels of `table` are
            enough: they correct what the other predictor says, family by family, where cross-validation finds that better
            than doing without; families that `table` lacks are judged by the other device. See
            `edgeprune.latency.transfer`.

    Raises:
        TableFileMissingError: There is no such file.
        TableFormatError: The table holds no kernel, or the file is none.
        ConfigError: `level` is not in (0, 1), `transfer_from` is a predictor that was itself transferred, or there is something
            else in place of a table.
    """
    if not 0 < level < 1:
        raise ConfigError(f"the level of intervals must lie between 0 and 1, found {level}.", hint="level=0.9")
    settings = FitSettings(seed=seed, level=level)
    table = _table(table)
    if transfer_from is None or isinstance(transfer_from, Predictor):
        source = transfer_from
    else:
        source = fit_with(_table(transfer_from), settings)
    if source is not None and source.source is not None:
        raise ConfigError(
            "transfer_from must be a predictor of its own device's table, found one that was itself transferred.",
            hint="transfer_from=predictor.source",
        )
    return fit_with(table, settings, source)


def fit_with(table: LatencyTable, settings: FitSettings, source: Predictor | None = None) -> Predictor:
    """`fit` with its settings as one object, and the other device's predictor where there is one."""
    place = (table.hash, settings, None if source is None else (source.table_hash, source.settings))
    if place not in _cache:
        _cache[place] = _fitted(table, settings, source)
        while len(_cache) > _CACHED:
            _cache.popitem(last=False)
    _cache.move_to_end(place)
    return _cache[place]


def _table(given: LatencyTable | Path | str) -> LatencyTable:
    if isinstance(given, str | Path):
        return LatencyTable.load(given)
    if not isinstance(given, LatencyTable):
        raise ConfigError(
            f"a predictor is fitted to a latency table or to the file of one, found {type(given).__name__}.",
            hint="edgeprune.LatencyTable.load('table.parquet')",
        )
    return given


def _fitted(table: LatencyTable, settings: FitSettings, source: Predictor | None) -> Predictor:
    if not table.kernels:
        raise TableFormatError("a latency table must hold at least one kernel to fit a predictor, found none.")
    machine = Machine.from_header(table.header)
    families = _families(table)
    timed = table.measurements
    told = {} if source is None else {name: source_times(source, kernels) for name, kernels in families.items()}
    models = {
        name: fit_family(
            kernels,
            [timed[kernel.key] for kernel in kernels],
            machine,
            seed=settings.seed,
            level=settings.level,
            source=told.get(name),
        )
        for name, kernels in families.items()
    }
    borrowed = {} if source is None else _borrowed(source, families, timed, told)
    substitutes = _substitutes(families, timed, machine, settings)
    predictor = Predictor(table, settings, models, substitutes, source=source, borrowed=borrowed)
    _calibrate(predictor, table.networks)
    predictor.energy = fit_energy(predictor)
    return predictor


def _families(table: LatencyTable) -> dict[tuple[str, str], list[Kernel]]:
    """Kernels to learn from, by family and precision; those that the call hides only where their operation has no other."""
    hidden = set(table.header.get("flags", {}).get("below-overhead", ()))
    families: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in table.kernels:
        families.setdefault((kernel.family, kernel.precision), []).append(kernel)
    for name, kernels in families.items():
        # An operation of which nothing was left would be guessed from others, however short all of it is.
        told = {kernel.op for kernel in kernels if kernel.key not in hidden}
        clear = [kernel for kernel in kernels if kernel.key not in hidden or kernel.op not in told]
        if len(clear) < len(kernels):
            logger.info(
                "%s: %d of %d kernels are too short to learn from", name, len(kernels) - len(clear), len(kernels)
            )
            families[name] = clear
    return families


def _borrowed(
    source: Predictor,
    families: dict[tuple[str, str], list[Kernel]],
    timed: dict[str, Measurement],
    told: Mapping[tuple[str, str], SourceTimes | None],
) -> dict[tuple[str, str], FamilyModel]:
    """Families of the other device that this table has no kernel of, by the ratio that its other kernels have."""
    ratios = [
        float(np.log(timed[kernel.key].median_ms) - said)
        for name, times in told.items()
        if times is not None
        for kernel, said in zip(families[name], times(families[name]).tolist(), strict=True)
    ]
    if not ratios:
        return {}
    middle = float(np.median(ratios))
    half_width = max(FALLBACK_HALF_WIDTH, float(np.quantile(np.abs(np.array(ratios) - middle), 0.9)))
    precisions = sorted({precision for _, precision in families})
    found = {}
    for (family, lent_precision), lent in source.families().items():
        for precision in precisions:
            if (family, precision) in families:
                continue
            times = source_times(source, list(lent.held))
            if times is not None and lent_precision in (precision, source.table.header["precision"]):
                found[family, precision] = borrowed_family(lent, times, middle, half_width)
    return found


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
    usable, times, totals, skeletons = [], [], [], []
    for network in networks:
        kernels = [Kernel.from_key(key) for key in network.kernels.elements()]
        try:
            times.append(predictor.kernel_ms(kernels))
        except UnsupportedKernelError as error:
            logger.warning("network %s is left out of the calibration: %s", network.name, error.message)
        else:
            usable.append(network)
            totals.append(predictor.totals(kernels))
            skeletons.append(skeleton(kernels))
    if not usable:
        return
    measured = np.array([network.measurement.median_ms for network in usable])
    smallest = min(float(kernel_ms.min()) for kernel_ms in times)
    models = grouped(skeletons)
    residuals = [
        float(np.log(without.ms(totals[row]) / measured[row]))
        for row, without in enumerate(leave_one_out(totals, measured, smallest, models))
    ]
    common, own = fit_calibrations(totals, measured, smallest, models)
    known = [(skeletons[model[0]], found) for model, found in zip(models, own, strict=True) if found is not None]
    predictor.calibrate(common, usable, residuals, known)
