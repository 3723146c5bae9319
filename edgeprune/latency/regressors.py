"""Regressors of log(time / roofline time) on features, and how many rows each needs.

Tried on 420 convolutions, held out by channels, median and mean error: extremely randomised trees 1.6 and 3.0 %, gradient
boosting 1.7 and 3.5 %, histogram boosting 1.9 and 3.7 % at three times its time per prediction (so only for many rows,
where it fits faster, with few large trees), ridge 3.2 and 5.3 %, the roofline alone 3.5 and 5.6 %. A Gaussian process (1.6
and 2.8 %; behind the trees on 120 rows) is left out for its fitting time, which grows with the cube of the rows. With 60 rows
trees and boosting are level at 2.5 and 4.1 %. The mean of trees and boosting was no better than the trees on 120 and 420 rows.

Tried on convolutions of a GPU, held out by output channels, 9 000 rows, two draws, share within 10 %: the mean of trees and
histogram boosting 73 and 81 %, boosting 72 and 81 %, trees 70 and 76 %; boosting that sees 30 % of the columns at each split
is 1 to 2 points ahead of one that sees all, and 800 trees of 63 leaves are no better than 200 of 255 in three times the time.
On 18 000 rows, drawn at random, the trees are ahead of boosting by 3 points.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np

from edgeprune.latency.arrays import Floats
from edgeprune.latency.transfer import Line, Monotone

FEW_ROWS, MANY_ROWS, BOOSTING_ROWS = 8, 40, 4000


class Regressor(Protocol):
    """Fitted once, then asked often for few rows."""

    def fit(self, X: Floats, y: Floats) -> Regressor:
        """Learn from features of shape (rows, columns) and targets of shape (rows,)."""

    def predict(self, X: Floats) -> Floats:
        """Targets, shape (rows,)."""


BLENDS = {
    "blend": ("histogram_boosting", "extra_trees"),
    "transfer_blend": ("transfer_ridge", "ridge"),
    "transfer_trees_blend": ("transfer_trees", "transfer_ridge", "ridge"),
    "transfer_forests": ("transfer_trees", "extra_trees"),
}
"""Means of several regressors; their parts stand before them among the candidates."""


def candidates(rows: int) -> tuple[str, ...]:
    """Names of the regressors worth trying on that many rows; the first is the simplest."""
    if rows < FEW_ROWS:
        return ("roofline",)
    if rows < MANY_ROWS:
        return ("roofline", "ridge")
    if rows <= BOOSTING_ROWS:
        return ("roofline", "ridge", "gradient_boosting", "extra_trees")
    return ("roofline", "ridge", "histogram_boosting", "extra_trees", "blend")


def regressor(name: str, seed: int) -> Regressor:
    """A new regressor by name."""
    from sklearn.ensemble import GradientBoostingRegressor, HistGradientBoostingRegressor
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if name == "roofline":
        return Constant()
    if name == "transfer":
        return Constant(prior_rows=0.0)
    if name == "transfer_line":
        return Line()
    if name == "transfer_monotone":
        return Monotone()
    if name in ("ridge", "transfer_ridge"):
        return _Quiet(make_pipeline(StandardScaler(), Ridge(alpha=10.0)))
    if name == "gradient_boosting":
        return _Quiet(
            GradientBoostingRegressor(
                n_estimators=500, learning_rate=0.05, max_depth=4, subsample=0.6, max_features=0.3, random_state=seed
            )
        )
    if name == "histogram_boosting":
        return _Quiet(
            HistGradientBoostingRegressor(
                max_iter=200,
                learning_rate=0.1,
                max_leaf_nodes=255,
                min_samples_leaf=4,
                max_features=0.3,
                early_stopping=False,
                random_state=seed,
            )
        )
    if name in ("extra_trees", "transfer_trees"):
        return _Forest(seed)
    raise ValueError(f"a regressor must be one that candidates() names, found {name!r}.")


class Constant:
    """The prior alone, moved by the median of what it misses.

    Args:
        offset: What it is moved by before it was fitted.
        prior_rows: It is drawn towards not moving as if so many rows had said so.
    """

    def __init__(self, offset: float = 0.0, prior_rows: float = 2.0) -> None:
        self._offset, self._prior_rows = offset, prior_rows

    def fit(self, X: Floats, y: Floats) -> Constant:
        # One or two rows say little about an offset that a roofline fitted to them has not already met.
        self._offset = float(np.median(y)) * len(y) / (len(y) + self._prior_rows)
        return self

    def predict(self, X: Floats) -> Floats:
        return np.full(len(X), self._offset)


class _Quiet:
    """A scikit-learn regressor whose remarks on convergence are not the user's concern: cross-validation judges it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def fit(self, X: Floats, y: Floats) -> _Quiet:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._inner.fit(X, y)
        return self

    def predict(self, X: Floats) -> Floats:
        return np.asarray(self._inner.predict(X), dtype=np.float64)


class _Forest:
    """Extremely randomised trees. The forest's own `predict` starts a thread pool, 12 ms for 50 rows."""

    def __init__(self, seed: int) -> None:
        from sklearn.ensemble import ExtraTreesRegressor

        self._forest = ExtraTreesRegressor(100, max_features=0.8, random_state=seed, n_jobs=1)
        self._trees: list[Any] = []
        self._values, self._starts = np.empty(0), np.empty((0, 1), dtype=np.intp)

    def fit(self, X: Floats, y: Floats) -> _Forest:
        self._forest.fit(X, y)
        self._trees = [tree.tree_ for tree in self._forest.estimators_]
        # The leaves of all trees in one array: one look-up for all rows and trees, where `Tree.predict` makes one per tree.
        self._values = np.concatenate([tree.value[:, 0, 0] for tree in self._trees])
        counts = [tree.node_count for tree in self._trees]
        self._starts = np.cumsum([0, *counts[:-1]], dtype=np.intp)[:, None]
        return self

    def predict(self, X: Floats) -> Floats:
        rows = np.ascontiguousarray(X, dtype=np.float32)
        leaves = np.stack([tree.apply(rows) for tree in self._trees]) + self._starts
        # One tree after the other, however many rows there are: a sum of pairs would differ in its last digit.
        total: Floats = np.cumsum(self._values[leaves], axis=0)[-1]
        return total / len(self._trees)
