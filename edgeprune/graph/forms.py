"""Shapes as linear forms in group widths, evaluated for a whole model at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgeprune.errors import PlanError


@dataclass(frozen=True)
class LinearForm:
    """Size of one axis: ``constant + sum(coefficient * width[group])``.

    Attributes:
        constant: Positions that always stay.
        terms: (group name, positions per unit of that group), sorted by name.
    """

    constant: int
    terms: tuple[tuple[str, int], ...] = ()

    def at(self, widths: Mapping[str, int]) -> int:
        """The size at the given widths (all groups of the form must be given)."""
        return self.constant + sum(coefficient * widths[group] for group, coefficient in self.terms)


@dataclass(frozen=True)
class ShapeTable:
    """All shapes of a model.

    Attributes:
        sizes: Dense width per group, in the order of the columns.
        forms: The distinct linear forms.
        axes: Name to the forms (indices into `forms`) of its axes.
    """

    sizes: Mapping[str, int]
    forms: tuple[LinearForm, ...]
    axes: Mapping[str, tuple[int, ...]]
    _constants: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)
    _coefficients: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        column = {name: index for index, name in enumerate(self.sizes)}
        coefficients = np.zeros((len(self.forms), len(column)), dtype=np.int64)
        for row, form in enumerate(self.forms):
            for group, coefficient in form.terms:
                coefficients[row, column[group]] = coefficient
        object.__setattr__(self, "_constants", np.array([form.constant for form in self.forms], dtype=np.int64))
        object.__setattr__(self, "_coefficients", coefficients)

    def vector(self, widths: Mapping[str, int]) -> npt.NDArray[np.int64]:
        """Widths of all groups in column order.

        Raises:
            PlanError: If a group is unknown or a width is not between 1 and the group's size.
        """
        for name, width in widths.items():
            if name not in self.sizes:
                raise PlanError(f"widths must name groups of the model, found {name!r}.")
            if not 1 <= width <= self.sizes[name]:
                raise PlanError(f"the width of {name!r} must lie between 1 and {self.sizes[name]}, found {width}.")
        return np.array([widths.get(name, size) for name, size in self.sizes.items()], dtype=np.int64)

    def shapes(self, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """All shapes at the given widths."""
        sizes = (self._constants + self._coefficients @ self.vector(widths)).tolist()
        return {name: tuple([sizes[form] for form in forms]) for name, forms in self.axes.items()}

    def linear_forms(self) -> dict[str, tuple[LinearForm, ...]]:
        """All axes as forms."""
        return {name: tuple(self.forms[form] for form in forms) for name, forms in self.axes.items()}
