"""How far our best is ahead of the best other way to one target, or behind it, for `pruning_quality.py`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import mean
from typing import Any

KEY = "epoch_seed"
"""With a seed behind it, the name of an accuracy after one epoch."""


def before_training(found: Mapping[str, Any]) -> float | None:
    """The better of the two recoveries without a gradient; None where a target is not reachable."""
    return max((found[key] for key in ("batch_norm", "reconstruction") if key in found), default=None)


def after_an_epoch(found: Mapping[str, Any]) -> float | None:
    """Mean over the seeds; None where there is none."""
    figures = [value for key, value in found.items() if key.startswith(KEY)]
    return mean(figures) if figures else None


def ahead(cells: Mapping[str, Mapping[str, Any]], target: str, peers: Collection[str]) -> list[str]:
    """A sentence on accuracies before training, and one on those after an epoch, as far as there are any.

    NetAdapt has taken gradient steps before the epoch already, so it is only compared after it.

    Args:
        cells: Method to what was found; ours begin with ``"edgeprune"``.
        target: Its name.
        peers: Methods whose best is told beside the best of all others.
    """
    lines = []
    for when, figure in (("before training", before_training), ("after one epoch", after_an_epoch)):
        trained = () if figure is after_an_epoch else ("netadapt",)
        every = {
            method: value
            for method, found in cells.items()
            if method not in trained and (value := figure(found)) is not None
        }
        ours = {method: value for method, value in every.items() if method.startswith("edgeprune")}
        others = {method: value for method, value in every.items() if method not in ours}
        if not ours or not others:
            continue
        best = max(ours, key=ours.__getitem__)
        line = f"{target}, {when}: {best} has {ours[best]:.1%}"
        for rivals in (others, {method: value for method, value in others.items() if method in peers}):
            if rivals:
                first = max(rivals, key=rivals.__getitem__)
                line += f"; {100 * (ours[best] - rivals[first]):+.1f} points to {first} ({rivals[first]:.1%})"
        lines.append(line)
    return lines
