"""How much worse than the dense model's a metric may become: what a limit is, and how it is written."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass

from edgeprune.errors import ConfigError, TaskError

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclass(frozen=True)
class Tolerance:
    """A limit that refers to the dense model.

    Attributes:
        amount: 0.02 for 2 %, and for two percentage points.
        relative: True: a share of the dense model's metric. False: percentage points, 0.01 each of a metric that is a share.
    """

    amount: float
    relative: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.amount) and self.amount >= 0):
            raise ConfigError(f"a metric may become worse by an amount of at least 0, found {self.amount}.")

    def worst(self, dense: float, higher_is_better: bool, name: str) -> float:
        """The worst acceptable value of a metric.

        Args:
            dense: Metric of the dense model.
            higher_is_better: Direction of the metric.
            name: Of the objective, for the message.

        Raises:
            TaskError: The metric of the dense model is nothing that the limit can refer to.
        """
        if self.relative and dense == 0:
            raise TaskError(
                f"a limit of {self} needs a metric of the dense model that is not 0, found 0 for objective {name!r}.",
                hint=f"--limit {name}=2pp for a metric that is a share, or the worst value of the metric: --limit {name}=0.1",
            )
        if not self.relative and not 0 <= dense <= 1:
            raise TaskError(
                f"a limit in percentage points needs a metric that is a share in [0, 1], found {dense:.4g} for objective "
                f"{name!r}.",
                hint=f"--limit {name}={100 * self.amount:g}%",
            )
        drop = self.amount * abs(dense) if self.relative else self.amount
        return dense - drop if higher_is_better else dense + drop

    def __str__(self) -> str:
        return f"{100 * self.amount:g}{'%' if self.relative else 'pp'}"


def parse_limit(text: str) -> float | Tolerance:
    """Read a limit: ``"2%"`` (of the dense model's metric), ``"2pp"`` (percentage points), or the worst value, ``"0.85"``.

    Raises:
        ConfigError: If the text is none of these.
    """
    match = re.fullmatch(rf"\s*({_NUMBER})\s*(%|pp)?\s*", text)
    if match is None or (match[2] and float(match[1]) < 0):
        raise ConfigError(
            "a limit must be 2% (of the dense model's metric), 2pp (percentage points), or the worst value of the metric, "
            f"found {text!r}.",
            hint="--limit NAME=2%",
        )
    value = float(match[1])
    return Tolerance(value / 100, relative=match[2] == "%") if match[2] else value


def parse_limits(texts: tuple[str, ...]) -> dict[str, float | Tolerance]:
    """Read limits by objective, written ``NAME=LIMIT``.

    Raises:
        ConfigError: If a text is none, or an objective is named twice.
    """
    found: dict[str, float | Tolerance] = {}
    for text in texts:
        name, separator, limit = (part.strip() for part in text.rpartition("="))
        if not separator or not name:
            raise ConfigError(f"a limit must be written NAME=LIMIT, found {text!r}.", hint="--limit NAME=2%")
        if name in found:
            raise ConfigError(f"an objective must have one limit, found two for {name!r}.")
        try:
            found[name] = parse_limit(limit)
        except ConfigError as error:
            raise ConfigError(error.message, hint=f"--limit {shlex.quote(name)}=2%") from error
    return found
