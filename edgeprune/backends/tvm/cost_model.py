"""Which candidates are worth a trial: learned from those that were tried, of all functions together.

Features are MetaSchedule's per-store features (Zheng et al. 2020, "Ansor", section 5.2), added up and at their largest over the
stores of a program; the target is the best known time of the function over the candidate's, so programs of all functions and
widths teach the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_LEAST = 32
"""Trials below which nothing is predicted, and candidates are drawn."""
_AGAIN = 1.25
"""Fitted anew when there are this many times the trials of the last fit."""
_MOST = 4000
"""Trials that are remembered: more of them take longer to learn from than to measure."""


class Throughputs:
    """Predicts how near a candidate comes to the best of its function, 0 to 1.

    Args:
        seed: Of the fit, and of what is drawn while nothing is known.
    """

    def __init__(self, seed: int) -> None:
        self._dice = np.random.default_rng(seed)
        self._seed = seed
        self._features: list[np.ndarray[Any, Any]] = []
        self._of: list[int] = []
        self._seconds: list[float] = []
        self._fitted: Any = None
        self._fitted_with = 0

    def learn(self, task: int, features: Sequence[np.ndarray[Any, Any]], seconds: Sequence[float | None]) -> None:
        """Take trials of one function into account.

        Args:
            task: Which function.
            features: Of each candidate, shape (stores, features).
            seconds: What each took; None where it failed.
        """
        for stores, time_s in zip(features, seconds, strict=True):
            if len(stores):
                self._features.append(_pooled(stores))
                self._of.append(task)
                self._seconds.append(float("inf") if time_s is None else time_s)
        del self._features[:-_MOST], self._of[:-_MOST], self._seconds[:-_MOST]
        if len(self._features) >= max(_LEAST, _AGAIN * self._fitted_with):
            self._fit()

    def predict(self, features: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """Scores of candidates of one function, shape (candidates,)."""
        if self._fitted is None:
            return self._dice.uniform(size=len(features))
        width = len(self._features[0])
        rows = np.stack([_pooled(stores) if len(stores) else np.zeros(width) for stores in features])
        scores: np.ndarray[Any, Any] = np.clip(self._fitted.predict(rows), 0.0, 1.0)
        return scores.astype("float64")

    def _fit(self) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        best: dict[int, float] = {}
        for task, time_s in zip(self._of, self._seconds, strict=True):
            best[task] = min(best.get(task, float("inf")), time_s)
        scores = [
            best[task] / time_s if np.isfinite(time_s) else 0.0
            for task, time_s in zip(self._of, self._seconds, strict=True)
        ]
        model = HistGradientBoostingRegressor(
            max_iter=80, min_samples_leaf=5, max_leaf_nodes=15, early_stopping=False, random_state=self._seed
        )
        self._fitted = model.fit(np.stack(self._features), np.asarray(scores))
        self._fitted_with = len(self._features)


def _pooled(stores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One row for a program of any number of stores."""
    return np.concatenate([stores.sum(axis=0), stores.max(axis=0), [float(len(stores))]])


def as_metaschedule(model: Throughputs) -> Any:
    """The model as MetaSchedule's evolution asks it.

    Args:
        model: What is asked; it learns from `learn` alone.
    """
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule.cost_model import PyCostModel

    extract = extractor()

    class Asked(PyCostModel):  # type: ignore[misc]
        """Only predicts: the interface has more methods than the search calls."""

        def load(self, path: str) -> None:
            raise NotImplementedError

        def save(self, path: str) -> None:
            raise NotImplementedError

        def update(self, context: Any, candidates: Any, results: Any) -> None:
            pass

        def predict(self, context: Any, candidates: Any) -> np.ndarray[Any, Any]:
            return model.predict(extract(context, candidates))

    return derived_object(Asked)()


def extractor() -> Any:
    """A function of a context and its candidates that gives features of each, shape (stores, features)."""
    from tvm.s_tir.meta_schedule.feature_extractor import PerStoreFeature

    features = PerStoreFeature()

    def extract(context: Any, candidates: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
        return [found.numpy().astype("float64") for found in features.extract_from(context, list(candidates))]

    return extract
