"""Latency of whole networks from a description of their architecture, where no kernels were measured.

Some runtimes do not tell which kernels they execute (an NPU, a compiler that fuses everything into one node), and some
tables hold nothing but names and milliseconds. What is left is a regression over what the networks of one search space
differ in: widths, depths, operations. It knows nothing outside of that space; where kernels can be measured, `edgeprune.fit`
is the better tool. A description is a mapping of field to number or text; all of them have the same fields.

With other devices' tables of the same space, 10 to 200 networks of a new device are enough: see `transfer_from`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import ConfigError, TableFormatError
from edgeprune.latency.arrays import Floats
from edgeprune.latency.intervals import conformal_half_width
from edgeprune.latency.regressors import Regressor, regressor

if TYPE_CHECKING:
    import pandas as pd

Description = Mapping[str, float | str]

FOLDS = 5

LEAVE_ONE_OUT_ROWS = 40
"""With fewer rows each is held out by itself."""

SOME_ROWS = 40
"""From so many rows on richer regressions are tried."""

CLIPPED_ERROR = 0.5
"""Candidates are compared by mean absolute log error; one larger than this counts as this (it is an outlier)."""


@dataclass(frozen=True)
class _Encoding:
    """Columns of descriptions: every number as it is and as its logarithm, every text as 0 or 1 per value."""

    numbers: tuple[str, ...]
    texts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, descriptions: Sequence[Description]) -> _Encoding:
        fields = sorted(descriptions[0])
        numbers = tuple(field for field in fields if not isinstance(descriptions[0][field], str))
        values = {(field, str(row[field])) for row in descriptions for field in row if field not in numbers}
        return cls(numbers, tuple(sorted(values)))

    def matrix(self, descriptions: Sequence[Description]) -> Floats:
        fields = {*self.numbers, *(field for field, _ in self.texts)}
        for place, row in enumerate(descriptions):
            if set(row) != fields:
                raise ConfigError(
                    f"all descriptions must have the fields {', '.join(sorted(fields))}, found {', '.join(sorted(row))} "
                    f"in number {place}."
                )
        try:
            numbers = np.array(
                [[float(row[field]) for field in self.numbers] for row in descriptions], dtype=np.float64
            )
        except ValueError as error:
            raise ConfigError(f"a field must hold numbers or texts, not both ({error}).") from error
        numbers = numbers.reshape(len(descriptions), len(self.numbers))
        texts = [[float(str(row[field]) == value) for field, value in self.texts] for row in descriptions]
        flags = np.array(texts, dtype=np.float64).reshape(len(descriptions), len(self.texts))
        return np.concatenate([numbers, np.log1p(np.maximum(numbers, 0)), flags], axis=1)


class ArchitecturePredictor:
    """Latencies of the networks of one search space on one device; made by `fit_architectures`. Deterministic.

    Attributes:
        chosen: Name of the regression that cross-validation chose; it begins with ``transfer`` where other devices' tables
            were of use.
        scores: Candidate to its cross-validated mean absolute log error (clipped).
        residuals: Out-of-fold log errors (predicted over measured), shape (networks,).
        level: Of the intervals.
    """

    def __init__(
        self,
        encoding: _Encoding,
        sources: Sequence[ArchitecturePredictor],
        chosen: str,
        model: Regressor,
        scores: Mapping[str, float],
        residuals: Floats,
        level: float,
    ) -> None:
        self._encoding, self._sources, self._model = encoding, tuple(sources), model
        self.chosen, self.scores, self.residuals, self.level = chosen, dict(scores), residuals, level

    def ms(self, descriptions: Sequence[Description]) -> Floats:
        """Milliseconds, shape (networks,).

        Raises:
            ConfigError: A description has other fields than those that it was fitted to.
        """
        return np.exp(self._model.predict(_columns(self._encoding, self._sources, descriptions)))

    def predict(self, descriptions: Sequence[Description]) -> pd.DataFrame:
        """Milliseconds with intervals: one row per network, in order: ``ms``, ``low_ms``, ``high_ms``."""
        import pandas as pd

        ms = self.ms(descriptions)
        factor = math.exp(conformal_half_width(self.residuals, self.level))
        frame: pd.DataFrame = pd.DataFrame({"ms": ms, "low_ms": ms / factor, "high_ms": ms * factor})
        return frame


def fit_architectures(
    descriptions: Sequence[Description],
    ms: Sequence[float],
    *,
    transfer_from: Sequence[ArchitecturePredictor] = (),
    seed: int = 0,
    level: float = 0.9,
) -> ArchitecturePredictor:
    """Fit a predictor to networks that were measured as wholes.

    Args:
        descriptions: Field to number or text, per network.
        ms: Milliseconds, one per network.
        transfer_from: Predictors of the same search space on other devices. What they say is corrected, by one of them or
            by all together, where cross-validation finds that better than doing without.
        seed: Of folds and regressors.
        level: Of the intervals, in (0, 1).

    Raises:
        TableFormatError: There is no network, or a time is not positive and finite; says which.
        ConfigError: The descriptions do not have the same fields, or `level` is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ConfigError(f"the level of intervals must lie between 0 and 1, found {level}.", hint="level=0.9")
    times = np.asarray(ms, dtype=np.float64)
    if not len(descriptions) or times.shape != (len(descriptions),):
        raise TableFormatError(
            f"there must be one time per network, found {times.size} times of {len(descriptions)} networks."
        )
    wrong = np.flatnonzero(~(np.isfinite(times) & (times > 0)))
    if len(wrong):
        raise TableFormatError(
            f"a latency must be positive and finite, found {times[wrong[0]]} ms in row {wrong[0] + 1}."
        )
    encoding, target = _Encoding.of(descriptions), np.log(times)
    columns = _columns(encoding, transfer_from, descriptions)
    folds = _folds(len(target), seed)
    scores: dict[str, float] = {}
    out_of_fold: dict[str, Floats] = {}
    for name in _candidates(len(target), len(transfer_from)):
        predicted = np.full(len(target), np.median(target))
        for fold in range(int(folds.max()) + 1) if len(target) > 1 else ():
            rest, rows = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            model = _model(name, len(transfer_from), seed).fit(columns[rest], target[rest])
            predicted[rows] = model.predict(columns[rows])
        out_of_fold[name] = predicted
        scores[name] = float(np.mean(np.minimum(np.abs(predicted - target), CLIPPED_ERROR)))
    chosen = min(scores, key=lambda name: scores[name])
    fitted = _model(chosen, len(transfer_from), seed).fit(columns, target)
    residuals = out_of_fold[chosen] - target if len(target) > 1 else np.empty(0)
    return ArchitecturePredictor(encoding, transfer_from, chosen, fitted, scores, residuals, level)


def _columns(
    encoding: _Encoding, sources: Sequence[ArchitecturePredictor], descriptions: Sequence[Description]
) -> Floats:
    """What the sources say (log milliseconds), then the encoded descriptions."""
    said = [np.log(source.ms(descriptions))[:, None] for source in sources]
    return np.concatenate([*said, encoding.matrix(descriptions)], axis=1)


def _folds(rows: int, seed: int) -> NDArray[np.intp]:
    count = rows if rows < LEAVE_ONE_OUT_ROWS else FOLDS
    return np.asarray(np.random.default_rng(seed).permutation(rows) % max(count, 1), dtype=np.intp)


def _candidates(rows: int, sources: int) -> list[str]:
    transfers = [f"transfer_{place}" for place in range(sources)]
    if sources > 1 and rows >= 5:
        transfers.append("transfer_blend")
    if sources and rows >= 10:
        transfers.append("transfer_ridge")
    alone = ["ridge"]
    if rows >= SOME_ROWS:
        alone += ["interactions", "gradient_boosting", "extra_trees"]
        transfers += ["transfer_trees"] if sources else []
    return [*transfers, *alone]


def _model(name: str, sources: int, seed: int) -> Regressor:
    if name == "transfer_blend":
        return _Blend(slice(0, sources), strength=1.0)
    if name == "transfer_ridge":
        return _OnTop(_Blend(slice(0, sources), strength=1.0), _Centered(_linear()))
    if name == "transfer_trees":
        return _OnTop(_Blend(slice(0, sources), strength=1.0), regressor("extra_trees", seed))
    if name.startswith("transfer_"):
        place = int(name.removeprefix("transfer_"))
        return _Blend(slice(place, place + 1), strength=0.3)
    plain = {"ridge": _linear, "interactions": _interactions}
    inner = plain[name]() if name in plain else regressor(name, seed)
    return _Without(sources, _Centered(inner))


def _linear() -> Any:
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), Ridge(alpha=3.0))


def _interactions() -> Any:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    terms = PolynomialFeatures(2, include_bias=False)
    return make_pipeline(StandardScaler(), terms, StandardScaler(), RidgeCV(alphas=np.logspace(-2, 4, 13)))


class _Centered:
    """A regressor of what the median misses; for those that draw their predictions towards zero."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def fit(self, X: Floats, y: Floats) -> _Centered:
        self._middle = float(np.median(y))
        self._inner.fit(X, y - self._middle)
        return self

    def predict(self, X: Floats) -> Floats:
        return self._middle + np.asarray(self._inner.predict(X), dtype=np.float64)


class _Without:
    """A regressor that does not see what the sources say."""

    def __init__(self, sources: int, inner: Regressor) -> None:
        self._sources, self._inner = sources, inner

    def fit(self, X: Floats, y: Floats) -> _Without:
        self._inner.fit(X[:, self._sources :], y)
        return self

    def predict(self, X: Floats) -> Floats:
        return self._inner.predict(X[:, self._sources :])


class _Blend:
    """A weighted sum of what some sources say, weights drawn towards equal shares of one."""

    def __init__(self, columns: slice, strength: float) -> None:
        self._columns, self._strength = columns, strength

    def fit(self, X: Floats, y: Floats) -> _Blend:
        from sklearn.linear_model import Ridge

        said = X[:, self._columns]
        self._middle, self._offset = said.mean(axis=0), float(np.mean(y))
        centered = said - self._middle
        equal = np.full(said.shape[1], 1 / said.shape[1])
        found = Ridge(alpha=self._strength, fit_intercept=False).fit(centered, y - self._offset - centered @ equal)
        self._weights = equal + found.coef_
        return self

    def predict(self, X: Floats) -> Floats:
        return np.asarray(self._offset + (X[:, self._columns] - self._middle) @ self._weights, dtype=np.float64)


class _OnTop:
    """One regressor, and another one of what it misses."""

    def __init__(self, first: Regressor, second: Regressor) -> None:
        self._first, self._second = first, second

    def fit(self, X: Floats, y: Floats) -> _OnTop:
        self._first.fit(X, y)
        self._second.fit(X, y - self._first.predict(X))
        return self

    def predict(self, X: Floats) -> Floats:
        return self._first.predict(X) + self._second.predict(X)
