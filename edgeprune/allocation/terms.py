"""Costs as sums of terms over widths: what allocations are proven with, and budgets besides the latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from edgeprune.allocation._base import Widths
from edgeprune.errors import ConfigError
from edgeprune.graph.forms import SizeForm

if TYPE_CHECKING:
    from edgeprune.allocation.choices import Choice

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CostTerm:
    """One summand of a cost: a function of one or two sizes.

    Attributes:
        forms: The sizes, as forms in group widths: a width, a sum of widths (concat), a product of two (heads times head
            dimensions), or sums of those; at most two forms, at most two widths in a product.
        at: The summand, from one integer array per form (arrays that broadcast together).
    """

    forms: tuple[SizeForm, ...]
    at: Callable[..., Floats]

    def __post_init__(self) -> None:
        if len(self.forms) > 2:
            raise ConfigError(f"a cost term must depend on at most two sizes, found {len(self.forms)}.")
        for form in self.forms:
            for groups, _ in form.terms:
                if len(groups) > 2:
                    raise ConfigError(f"a size in a cost term must multiply at most two widths, found {groups}.")


@runtime_checkable
class StatesTerms(Protocol):
    """A cost that is a sum of terms and says which; allocations are then proven for the cost itself."""

    def terms(self) -> Sequence[CostTerm]:
        """The summands; their sum is the cost at any widths."""


class AdditiveCost(StatesTerms, Protocol):
    """Something besides latency that a budget can bound, in terms: parameters, multiply-accumulates."""

    def value(self, widths: Widths) -> float:
        """The cost at these widths; groups left out are dense."""


class MeasuredCost(Protocol):
    """A cost that states no terms and is taken apart by looking it up (`edgeprune.allocation.decompose`), as a latency is."""

    def value(self, widths: Widths) -> float:
        """The cost at these widths; groups left out are dense."""

    def many_ms(self, many: Sequence[Widths]) -> Floats:
        """`value` of each, shape (len(many),), in the unit of the cost."""


@runtime_checkable
class PeakCost(Protocol):
    """A cost that is the largest of several sums of terms; a bound of it is one bound per sum."""

    def value(self, widths: Widths) -> float:
        """The cost at these widths; groups left out are dense."""

    @property
    def sums(self) -> Sequence[AdditiveCost]:
        """The sums."""


@dataclass(frozen=True)
class Limit:
    """One more budget.

    Attributes:
        name: What is bounded, for messages, e.g. ``"parameters"``.
        cost: What it is by widths.
        at_most: Upper bound, in the unit of the cost.
        unit: For messages, e.g. ``"mJ"``; may be empty.
        option: How a larger one is asked for, with braces for the number, e.g. ``"--memory {}B"``; may be empty.
    """

    name: str
    cost: AdditiveCost | PeakCost | MeasuredCost
    at_most: float
    unit: str = ""
    option: str = ""

    def apart(self) -> list[Limit]:
        """One limit per sum of a cost that is the largest of several; itself otherwise."""
        if not isinstance(self.cost, PeakCost):
            return [self]
        # What is within the limit when nothing is removed needs no bound of its own: no width makes it larger.
        binding = [cost for cost in self.cost.sums if cost.value({}) > self.at_most]
        return [replace(self, cost=cost) for cost in binding]


@dataclass(frozen=True)
class Form:
    """A `SizeForm` in decisions instead of groups; what cannot change is in the constant.

    Attributes:
        constant: Part that no decision changes.
        terms: (decisions whose widths are multiplied, ascending, coefficient), sorted.
    """

    constant: int
    terms: tuple[tuple[tuple[int, ...], int], ...]

    @property
    def scope(self) -> tuple[int, ...]:
        """The decisions that it depends on, ascending."""
        return tuple(sorted({index for indices, _ in self.terms for index in indices}))

    def at(self, widths: Mapping[int, Ints]) -> Ints:
        """The size, from the widths of the decisions in its scope; arrays broadcast."""
        total = np.asarray(self.constant, dtype=np.int64)
        for indices, coefficient in self.terms:
            product = np.asarray(coefficient, dtype=np.int64)
            for index in indices:
                product = product * widths[index]
            total = total + product
        return total


def in_decisions(form: SizeForm, choices: Sequence[Choice], movable: Sequence[int]) -> Form:
    """A form in groups as a form in decisions; tied groups are one decision, frozen ones constants.

    Raises:
        ConfigError: The form names a group that no decision is about.
    """
    decision = {name: index for index, choice in enumerate(choices) for name in choice.groups}
    constant, found = form.constant, dict[tuple[int, ...], int]()
    for groups, coefficient in form.terms:
        unknown = [name for name in groups if name not in decision]
        if unknown:
            raise ConfigError(f"a cost term must name groups of the model, found {', '.join(unknown)}.")
        indices = []
        for name in groups:
            if decision[name] in movable:
                indices.append(decision[name])
            else:
                coefficient *= choices[decision[name]].widest
        if indices:
            key = tuple(sorted(indices))
            found[key] = found.get(key, 0) + coefficient
        else:
            constant += coefficient
    return Form(constant, tuple(sorted((key, value) for key, value in found.items() if value)))
