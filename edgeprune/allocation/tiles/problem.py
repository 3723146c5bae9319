"""How many tiles each layer keeps: the problem, the one interface of the searches, and what they find."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edgeprune.criteria.tiles.curves import TileCurve
from edgeprune.criteria.tiles.sums import Floats
from edgeprune.errors import BudgetInfeasibleError, ConfigError, ModelError

Counts = npt.NDArray[np.int64]
"""Kept tiles per layer, in the order of the problem's layers."""
LEAST_KEPT = 0.05
"""Share of its tiles that a layer keeps at least, the paper's number."""


@dataclass(frozen=True)
class TileLayer:
    """One layer of a problem. Arrays are by kept tiles, shape (tiles + 1,).

    Attributes:
        curve: Its damage.
        cost: What the budget bounds: floating-point operations, milliseconds or millijoules.
        power: What the objective weighs against damage; None counts nothing.
        least: Fewest tiles that may be kept.

    Raises:
        ConfigError: An array has another length, holds NaN, infinity or negative numbers, or `least` is out of range.
    """

    curve: TileCurve
    cost: Floats
    power: Floats | None = None
    least: int = 1

    def __post_init__(self) -> None:
        name, size = self.curve.grid.parameter, self.curve.tiles + 1
        for what, values in (("damage", self.curve.damage), ("cost", self.cost), ("power", self.power)):
            if values is None:
                continue
            if values.shape != (size,) or not np.isfinite(values).all() or (values < 0).any():
                raise ConfigError(
                    f"the {what} of {name!r} must be {size} finite numbers of at least 0, one per number of kept tiles, found "
                    f"shape {values.shape} with {int((~(values >= 0) | ~np.isfinite(values)).sum())} others."
                )
        if not 0 <= self.least < size:
            raise ConfigError(f"a layer must keep at least 0..{size - 1} tiles, found least={self.least} for {name!r}.")


@dataclass(frozen=True)
class TileProblem:
    """Layers that share one budget: least ``damage + beta * power`` with a total cost within it.

    Damage, power and cost add up over layers.

    Attributes:
        layers: Name of the weight to its layer.
        unit: Of the cost, for messages: ``"FLOPs"``, ``"ms"``, ``"mJ"``.
        beta: How much damage one unit of power is worth.
        fixed: Cost of what is not cut into tiles.

    Raises:
        ModelError: There are no layers.
        ConfigError: `beta` or `fixed` is negative or not finite.
    """

    layers: Mapping[str, TileLayer]
    unit: str = "FLOPs"
    beta: float = 0.0
    fixed: float = 0.0

    def __post_init__(self) -> None:
        if not self.layers:
            raise ModelError("tiles must be allocated to at least one layer, found none.")
        for what, value in (("beta", self.beta), ("fixed", self.fixed)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{what} must be finite and at least 0, found {value}.")

    @cached_property
    def dense(self) -> float:
        """Total cost with all tiles."""
        return self.cost(self.every())

    @cached_property
    def smallest(self) -> float:
        """The smallest total cost that can be reached."""
        return self.fixed + sum(float(layer.cost[layer.least :].min()) for layer in self.layers.values())

    @cached_property
    def objectives(self) -> tuple[Floats, ...]:
        """Per layer, ``damage + beta * power`` by kept tiles."""
        return tuple(
            layer.curve.damage if layer.power is None else layer.curve.damage + self.beta * layer.power
            for layer in self.layers.values()
        )

    def every(self) -> Counts:
        """All tiles of all layers."""
        return np.array([layer.curve.tiles for layer in self.layers.values()], dtype=np.int64)

    def cost(self, counts: Counts) -> float:
        """Total cost of kept tiles per layer."""
        return self.fixed + sum(
            float(layer.cost[count]) for layer, count in zip(self.layers.values(), counts, strict=True)
        )

    def damage(self, counts: Counts) -> float:
        """Total damage."""
        return sum(float(layer.curve.damage[count]) for layer, count in zip(self.layers.values(), counts, strict=True))

    def power(self, counts: Counts) -> float:
        """Total power; 0 where no layer has one."""
        return sum(
            0.0 if layer.power is None else float(layer.power[count])
            for layer, count in zip(self.layers.values(), counts, strict=True)
        )

    def objective(self, counts: Counts) -> float:
        """Total of what is minimized."""
        return sum(float(values[count]) for values, count in zip(self.objectives, counts, strict=True))

    def require_reachable(self, budget: float) -> None:
        """Refuse a budget below what can be reached.

        Raises:
            BudgetInfeasibleError: With what holds the smallest cost up.
            ConfigError: The budget is NaN.
        """
        if math.isnan(budget):
            raise ConfigError(f"a budget must be a number of {self.unit}, found NaN.")
        if self.smallest <= budget * (1 + 1e-12):
            return
        floors = {name: float(layer.cost[layer.least :].min()) for name, layer in self.layers.items()}
        largest = max(floors, key=lambda name: floors[name])
        layer = self.layers[largest]
        held = (
            f"{self.fixed / self.smallest:.0%} of it is held by what is not cut into tiles, "
            f"{1 - self.fixed / self.smallest:.0%} by layers at their fewest tiles, most of all {largest!r} with at least "
            f"{layer.least} of {layer.curve.tiles} tiles"
        )
        raise BudgetInfeasibleError(
            f"the cost must be <= {budget:.6g} {self.unit}, the smallest plan reaches {self.smallest:.6g} {self.unit} "
            f"({held}).",
            best_ms=self.smallest if self.unit == "ms" else math.nan,
            widths={name: one.least for name, one in self.layers.items()},
            hint=f"a budget of at least {rounded_up(self.smallest)} {self.unit}, or fewer tiles at least per layer",
        )


@dataclass(frozen=True)
class TileAllocation:
    """Which tiles stay.

    Attributes:
        kept: Name of the weight to the kept tiles, shape [block rows, block columns].
        method: Name of the search.
        budget: What was asked for, in `unit`.
        cost: Predicted total cost, in `unit`.
        unit: Of the cost.
        damage: Estimated total damage.
        power: Total power, in the unit of the layers' power.
        objective: ``damage + beta * power``.
        bound: No allocation within the budget has a smaller objective by the same curves; None where nothing is proven.
        note: What a person should know, one sentence, or empty.
    """

    kept: dict[str, npt.NDArray[np.bool_]]
    method: str
    budget: float
    cost: float
    unit: str
    damage: float
    power: float
    objective: float
    bound: float | None = None
    note: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """Kept tiles by weight."""
        return {name: int(tiles.sum()) for name, tiles in self.kept.items()}

    @property
    def gap(self) -> float | None:
        """Proven relative distance to the optimum, ``(objective - bound) / objective``; None without a bound."""
        if self.bound is None:
            return None
        return 0.0 if self.objective <= 0 else max(0.0, (self.objective - self.bound) / self.objective)

    @property
    def digest(self) -> str:
        """SHA-256 of names, shapes and kept tiles: equal where the same tiles stay."""
        found = hashlib.sha256()
        for name in sorted(self.kept):
            found.update(f"{name} {self.kept[name].shape} ".encode() + np.packbits(self.kept[name]).tobytes())
        return found.hexdigest()


class TileSearch(ABC):
    """Chooses how many tiles each layer keeps."""

    name: ClassVar[str]

    @abstractmethod
    def search(self, problem: TileProblem, budget: float) -> TileAllocation:
        """Choose.

        Args:
            problem: Layers with their damage, cost and power.
            budget: Upper bound of the total cost, in the problem's unit.

        Raises:
            BudgetInfeasibleError: Even the fewest tiles cost more.
        """

    def _found(
        self, problem: TileProblem, counts: Counts, budget: float, bound: float | None = None, note: str = ""
    ) -> TileAllocation:
        kept = {
            name: layer.curve.kept(int(count))
            for (name, layer), count in zip(problem.layers.items(), counts, strict=True)
        }
        return TileAllocation(
            kept,
            self.name,
            budget,
            problem.cost(counts),
            problem.unit,
            problem.damage(counts),
            problem.power(counts),
            problem.objective(counts),
            bound,
            note,
        )


def least_kept(curve: TileCurve, share: float = LEAST_KEPT) -> int:
    """Fewest tiles that a layer keeps when it keeps a share at least, rounded up.

    A layer of one tile keeps it: what is narrower than a tile is not cut.

    Raises:
        ConfigError: The share lies outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"a least share of tiles must lie in [0, 1], found {share}.")
    return math.ceil(share * curve.tiles - 1e-9)


def rounded_up(value: float) -> str:
    """A number with four significant digits that is not below it."""
    if value <= 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / step - 1e-9) * step:.6g}"
