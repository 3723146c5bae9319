"""`Predictor`: milliseconds of kernels and of networks, with intervals, from a latency table."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeprune.errors import ConfigError, UnsupportedKernelError
from edgeprune.latency.arrays import Floats
from edgeprune.latency.calibration import Calibration, Totals
from edgeprune.latency.energy import EnergyModel, required
from edgeprune.latency.family_model import FamilyModel
from edgeprune.latency.features import Machine
from edgeprune.latency.intervals import NO_NOISE, among, network_half_width, network_noise
from edgeprune.latency.likeness import Skeleton, nearest, skeleton
from edgeprune.latency.table import LatencyTable, Network
from edgeprune.latency.table_rows import check_kernel
from edgeprune.spec import Kernel

if TYPE_CHECKING:
    import pandas as pd

    from edgeprune.latency.fit_report import FitReport

logger = logging.getLogger("edgeprune.latency")

MEMORY_FAMILIES = frozenset({"pool", "reduce", "elementwise", "layout", "concat", "norm", "softmax", "other"})
"""Families whose time is memory traffic: where the table has no row of one, the others stand in."""

FALLBACK_HALF_WIDTH = math.log(2)
"""Least half-width, in log space, of a kernel whose family the table lacks."""

REMEMBERED_KERNELS = 200_000


@dataclass(frozen=True)
class FitSettings:
    """What, with the table, decides a predictor.

    Attributes:
        seed: Of folds and regressors.
        level: Of all intervals, in (0, 1).
        method: Version of the fitting method; a change of figures changes it.
    """

    seed: int = 0
    level: float = 0.9
    method: int = 7


class Estimate(NamedTuple):
    """One kernel: milliseconds, half-width of the interval in log space, and where they come from."""

    ms: float
    half_width: float
    source: str


class HeldOut(NamedTuple):
    """A measured latency and its prediction by a fit that had not seen it, milliseconds; `name` is a kernel's key."""

    name: str
    measured_ms: float
    predicted_ms: float


class Predictor:
    """Latencies of kernels and networks on the device of a table; made by `edgeprune.fit`.

    Deterministic: a predictor is its table and its settings, so `save` writes those and `load` fits again.

    Attributes:
        table: What it was fitted to.
        settings: How.
        source: Another device's predictor that it stands on; None for one that stands alone.
        calibration: From the sum of kernels to the latency of a network, fitted to all networks of the table.
        calibrated_on: Networks of the table that the calibration was fitted to.
        machine: What the features of kernels need to know of the device.
        energy: What energy consists of; None where the table holds no energies (`edgeprune profile --energy`).
    """

    def __init__(
        self,
        table: LatencyTable,
        settings: FitSettings,
        models: Mapping[tuple[str, str], FamilyModel],
        substitutes: Mapping[str, FamilyModel],
        *,
        source: Predictor | None = None,
        borrowed: Mapping[tuple[str, str], FamilyModel] | None = None,
    ) -> None:
        self.table = table
        self.settings = settings
        self.source = source
        self.calibration = Calibration()
        self.calibrated_on: tuple[Network, ...] = ()
        self._models = dict(models)
        self._substitutes = dict(substitutes)
        self._own_calibrations: tuple[tuple[Skeleton, Calibration], ...] = ()
        self._borrowed = dict(borrowed or {})
        self._network_residuals: tuple[float, ...] = ()
        self._network_errors: tuple[float, ...] = ()
        self._network_shares: tuple[float, ...] = ()
        self._network_noise = NO_NOISE
        self._report: FitReport | None = None
        self.machine = Machine.from_header(table.header)
        self.energy: EnergyModel | None = None
        self._known: dict[Kernel, Estimate] = {}
        self._remember_held()

    @property
    def table_hash(self) -> str:
        """`LatencyTable.hash` of the table."""
        return self.table.hash

    def families(self) -> dict[tuple[str, str], FamilyModel]:
        """What was learned, by family and precision."""
        return dict(self._models)

    def kernel_ms(self, kernels: Sequence[Kernel]) -> Floats:
        """Milliseconds of kernels, shape (kernels,); each distinct kernel is computed once in the predictor's life.

        Raises:
            UnsupportedKernelError: The table holds nothing to judge a kernel by; names the kernel.
        """
        self._learn(kernels)
        known = self._known
        return np.fromiter((known[kernel].ms for kernel in kernels), dtype=np.float64, count=len(kernels))

    def predict(self, kernels: Sequence[Kernel]) -> pd.DataFrame:
        """Milliseconds of kernels with intervals.

        Returns:
            One row per kernel, in order: ``ms``, ``low_ms``, ``high_ms``, and ``source``: ``"measured"`` (in the table),
            ``"predicted"`` (by its family's regression), ``"transferred"`` (by one that stands on another device's
            predictor), or ``"fallback"`` (the table lacks its operation or family). Where the table holds energies of
            networks there is ``energy_mj`` too: above idle, what of a network's energy falls to the kernel by `EnergyModel`.
            It is modelled; no kernel's energy was measured. Where the table holds none there is no such column.

        Raises:
            UnsupportedKernelError: The table holds nothing to judge a kernel by; names the kernel.
        """
        import pandas as pd

        self._learn(kernels)
        rows = [self._known[kernel] for kernel in kernels]
        frame: pd.DataFrame = pd.DataFrame(
            {
                "ms": [row.ms for row in rows],
                "low_ms": [row.ms * math.exp(-row.half_width) for row in rows],
                "high_ms": [row.ms * math.exp(row.half_width) for row in rows],
                "source": [row.source for row in rows],
            }
        )
        if self.energy is not None:
            static = [self.energy.static_mj(row.ms) for row in rows]
            frame["energy_mj"] = np.array(static) + self.energy.dynamic_mj(kernels)
        return frame

    def network_ms(self, kernels: Sequence[Kernel]) -> float:
        """Latency of a network that executes these kernels, milliseconds, calibrated."""
        _require_kernels(kernels)
        return self.calibration_of(kernels).ms(self.totals(kernels))

    def totals(self, kernels: Sequence[Kernel]) -> Totals:
        """What the latency of a network that executes these kernels follows from; parts of a network can be told apart so."""
        return Totals.of(kernels, self.kernel_ms(kernels).tolist())

    def calibration_of(self, kernels: Sequence[Kernel]) -> Calibration:
        """The calibration of the model that these kernels are a pruned version of; that of all where none is alike."""
        if not self._own_calibrations:
            return self.calibration
        place = nearest(skeleton(kernels), [known for known, _ in self._own_calibrations])
        return self.calibration if place is None else self._own_calibrations[place][1]

    def near(self, kernels: Sequence[Kernel], taken_ms: float) -> Predictor:
        """The same for versions of one network that are about equally long: all have one calibration and one price of weights.

        What parts take then adds up exactly, which solvers need. Versions of another length, and those that look more like
        another model of the table, may be a little off.

        Args:
            kernels: Of the network.
            taken_ms: Latency of the versions that are meant, milliseconds; see `Calibration.kept_ms`.
        """
        found = copy.copy(self)
        found.calibration = self.calibration_of(kernels).at(taken_ms)
        found._own_calibrations = ()
        found._report = None
        return found

    def network(self, kernels: Iterable[Kernel]) -> tuple[float, float, float]:
        """Latency of a network with its interval.

        The interval is what calibrated networks miss (leave-one-out, Student's distribution) besides the errors of their
        predicted kernels, and the errors of this network's predicted kernels; see `network_half_width`.

        Args:
            kernels: What it executes, repeats included.

        Returns:
            Milliseconds, and the low and high end of the interval at ``settings.level``.

        Raises:
            UnsupportedKernelError: The table holds nothing to judge a kernel by; names the kernel.
        """
        _require_kernels(kernels)
        listed = list(kernels)
        ms = self.network_ms(listed)
        width = network_half_width(
            self._network_errors,
            self._network_shares,
            self.kernel_share(listed),
            self.settings.level,
            self._network_noise,
        )
        return ms, ms * math.exp(-width), ms * math.exp(width)

    def network_energy(self, kernels: Iterable[Kernel]) -> tuple[float, float, float]:
        """Energy of one inference of a network above idle, with its interval.

        Args:
            kernels: What it executes, repeats included.

        Returns:
            Millijoules, and the low and high end of the interval at ``settings.level``.

        Raises:
            TableMismatchError: The table holds no energies; says how to measure them.
            UnsupportedKernelError: The table holds nothing to judge a kernel by; names the kernel.
        """
        model = required(self.energy, self.table.header)
        _require_kernels(kernels)
        listed = list(kernels)
        mj = model.static_mj(self.network_ms(listed)) + float(model.dynamic_mj(listed).sum())
        width = model.half_width(self.settings.level)
        return mj, mj * math.exp(-width), mj * math.exp(width)

    def report(self) -> FitReport:
        """Errors, coverage and noise ceiling, per family and end to end."""
        from edgeprune.latency.fit_report import make_report

        if self._report is None:
            self._report = make_report(
                self, self._models.values(), self._network_residuals, self._network_shares, self._network_noise
            )
        return self._report

    def held_out(self) -> tuple[list[HeldOut], list[HeldOut]]:
        """Every fitted kernel and every network of `calibrated_on` as predicted by a fit that had not seen it.

        Networks are predicted by the calibration that was fitted to all others.
        """
        timed = self.table.measurements
        kernels = [
            HeldOut(kernel.key, timed[kernel.key].median_ms, timed[kernel.key].median_ms * math.exp(residual))
            for model in self._models.values()
            if len(model.residuals)
            for kernel, residual in zip(model.held, model.residuals.tolist(), strict=True)
        ]
        networks = [
            HeldOut(network.name, network.measurement.median_ms, network.measurement.median_ms * math.exp(residual))
            for network, residual in zip(self.calibrated_on, self._network_residuals, strict=True)
        ]
        return kernels, networks

    def save(self, path: str | Path) -> Path:
        """Write the settings as JSON and the table beside it (same stem, ``.parquet``); returns the path.

        A predictor that stands on another device's writes that one too (same stem, ``.source.json`` and its table).

        Raises:
            ConfigError: `path` does not end in ``.json``: the table beside it could be the same file.
        """
        from edgeprune.latency import predictor_file

        return predictor_file.write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Predictor:
        """Fit again what `save` wrote; at once if this process has fitted it before.

        Raises:
            TableFileMissingError: The file, or the table beside it, is not there.
            TableFormatError: One of them cannot be read, or was written by a release with another fitting method.
            TableMismatchError: The table beside it is not the one that it was fitted to.
        """
        from edgeprune.latency import predictor_file

        return predictor_file.read(Path(path))

    def __repr__(self) -> str:
        return f"Predictor({len(self._known)} kernels known, table {self.table_hash[:12]}, {self.calibration})"

    def calibrate(
        self,
        calibration: Calibration,
        networks: Sequence[Network],
        residuals: Sequence[float],
        own: Sequence[tuple[Skeleton, Calibration]] = (),
    ) -> None:
        """Set the map to networks, those that it was fitted to, and their leave-one-out log errors; `fit` does this once.

        Args:
            calibration: Of all networks.
            networks: Those of the table that it was fitted to.
            residuals: Per network its leave-one-out log error.
            own: Of the models that have a calibration of their own, what their networks look like.
        """
        self.calibration, self.calibrated_on = calibration, tuple(networks)
        self._own_calibrations = tuple(own)
        self._network_residuals = tuple(residuals)
        self._network_noise = network_noise([network.measurement.rounds_ms for network in networks])
        every = [[Kernel.from_key(key) for key in network.kernels.elements()] for network in networks]
        self._network_shares = tuple(self.kernel_share(kernels) for kernels in every)
        fitted = [
            math.log(self.network_ms(kernels) / network.measurement.median_ms)
            for kernels, network in zip(every, networks, strict=True)
        ]
        self._network_errors = among(fitted, residuals)

    def _learn(self, kernels: Iterable[Kernel]) -> None:
        _require_kernels(kernels)
        new = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._known]
        if not new:
            return
        if len(self._known) + len(new) > REMEMBERED_KERNELS:
            wanted = set(kernels)
            self._known = {kernel: estimate for kernel, estimate in self._known.items() if kernel in wanted}
            self._remember_held()
        groups: dict[tuple[str, str], list[Kernel]] = {}
        for kernel in new:
            problem = check_kernel(kernel)
            if problem is not None:
                raise UnsupportedKernelError(f"a kernel must have sizes to compute with; {kernel.key}: {problem}.")
            groups.setdefault((kernel.family, kernel.precision), []).append(kernel)
        for (family, precision), members in groups.items():
            model, least = self._model(family, precision, members[0])
            log_ms, half_widths = model.predict(members, self.machine)
            for kernel, value, half_width in zip(members, log_ms.tolist(), half_widths.tolist(), strict=True):
                regressed = least == 0 and kernel.op in model.ops
                source = "fallback" if not regressed else "transferred" if model.transferred else "predicted"
                self._known[kernel] = Estimate(math.exp(value), max(half_width, least), source)

    def _model(self, family: str, precision: str, kernel: Kernel) -> tuple[FamilyModel, float]:
        if (family, precision) in self._models:
            return self._models[family, precision], 0.0
        if (family, precision) in self._borrowed:
            logger.info("no measured %s kernel: %s is judged by another device", family, kernel.op)
            return self._borrowed[family, precision], FALLBACK_HALF_WIDTH
        if family in MEMORY_FAMILIES and precision in self._substitutes:
            logger.info("no measured %s kernel: %s is judged by its memory traffic", family, kernel.op)
            return self._substitutes[precision], FALLBACK_HALF_WIDTH
        raise UnsupportedKernelError(
            f"a latency table must hold {precision} kernels of family {family!r} to predict {kernel.op} "
            f"{list(kernel.inputs)} -> {kernel.output}, found none among {len(self.table.kernels)} kernels.",
            hint="edgeprune profile with this model",
        )

    def _remember_held(self) -> None:
        for model in self._models.values():
            for kernel, (log_ms, half_width) in model.held.items():
                self._known[kernel] = Estimate(math.exp(log_ms), half_width, "measured")

    def kernel_share(self, kernels: Sequence[Kernel]) -> float:
        """Relative standard deviation of the sum of these kernels that comes from those that were not measured.

        Their errors are taken as independent; what they have in common is in what calibrated networks miss.
        """
        self._learn(kernels)
        quantile = NormalDist().inv_cdf((1 + self.settings.level) / 2)
        errors, total = [], 0.0
        for kernel, count in Counter(kernels).items():
            estimate = self._known[kernel]
            total += count * estimate.ms
            if estimate.source != "measured":
                errors.append(count * estimate.ms * estimate.half_width / quantile)
        return math.hypot(*errors) / total if total else 0.0


def _require_kernels(kernels: object) -> None:
    """Refuse what has kernels at some widths, or no kernels at all; of several the first is looked at.

    Raises:
        ConfigError: Says what was found.
    """
    if isinstance(kernels, Sequence):
        found = next((one for one in kernels[:1] if not isinstance(one, Kernel)), None)
    else:
        found = None if isinstance(kernels, Iterable) else kernels
    if found is not None:
        raise ConfigError(
            f"a predictor must be given kernels, found {type(found).__name__}.",
            hint="kernel_graph.at(widths) of edgeprune.lower; at({}) is the dense model",
        )
