"""Shapes as forms in group widths, evaluated for a whole model at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgeprune.errors import PlanError


@dataclass(frozen=True)
class SizeForm:
    """Size of one axis: ``constant + sum(coefficient * product of widths)``.

    A concat is a sum over groups; the channels of an attention are a product, heads times head dimensions.

    Attributes:
        constant: Positions that always stay.
        terms: (group names, positions per combination of their units), sorted.
    """

    constant: int
    terms: tuple[tuple[tuple[str, ...], int], ...] = ()

    def at(self, widths: Mapping[str, int]) -> int:
        """The size at the given widths (all groups of the form must be given)."""
        return self.constant + sum(
            coefficient * math.prod(widths[group] for group in groups) for groups, coefficient in self.terms
        )

    @property
    def groups(self) -> tuple[str, ...]:
        """All groups of the form."""
        return tuple(dict.fromkeys(group for groups, _ in self.terms for group in groups))


@dataclass(frozen=True)
class ShapeTable:
    """All shapes of a model.

    Attributes:
        sizes: Dense width per group, in the order of the columns.
        forms: The distinct forms.
        axes: Name to the forms (indices into `forms`) of its axes.
    """

    sizes: Mapping[str, int]
    forms: tuple[SizeForm, ...]
    axes: Mapping[str, tuple[int, ...]]
    _constants: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)
    _coefficients: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)
    _products: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        column = {name: index for index, name in enumerate(self.sizes)}
        products: dict[tuple[str, ...], int] = {(name,): index for index, name in enumerate(self.sizes)}
        for form in self.forms:
            for groups, _ in form.terms:
                products.setdefault(groups, len(products))
        coefficients = np.zeros((len(self.forms), len(products)), dtype=np.int64)
        for row, form in enumerate(self.forms):
            for groups, coefficient in form.terms:
                coefficients[row, products[groups]] = coefficient
        several = tuple(tuple(column[name] for name in groups) for groups in products if len(groups) > 1)
        object.__setattr__(self, "_constants", np.array([form.constant for form in self.forms], dtype=np.int64))
        object.__setattr__(self, "_coefficients", coefficients)
        object.__setattr__(self, "_products", several)

    def vector(self, widths: Mapping[str, int]) -> npt.NDArray[np.int64]:
        """Widths of all groups in column order.

        Raises:
            PlanError: If a group is unknown or a width is no whole number between 1 and the group's size.
        """
        for name, width in widths.items():
            if name not in self.sizes:
                raise PlanError(f"widths must name groups of the model, found {name!r}.")
            if not isinstance(width, int | np.integer):
                raise PlanError(
                    f"the width of {name!r} must be a whole number, found {width!r}.", hint=f"1 to {self.sizes[name]}"
                )
            if not 1 <= width <= self.sizes[name]:
                raise PlanError(f"the width of {name!r} must lie between 1 and {self.sizes[name]}, found {width}.")
        return np.array([widths.get(name, size) for name, size in self.sizes.items()], dtype=np.int64)

    def shapes(self, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """All shapes at the given widths."""
        single = self.vector(widths)
        products = [int(np.prod(single[list(columns)])) for columns in self._products]
        sizes = (self._constants + self._coefficients @ np.array([*single, *products], dtype=np.int64)).tolist()
        return {name: tuple([sizes[form] for form in forms]) for name, forms in self.axes.items()}

    def size_forms(self) -> dict[str, tuple[SizeForm, ...]]:
        """All axes as forms."""
        return {name: tuple(self.forms[form] for form in forms) for name, forms in self.axes.items()}
