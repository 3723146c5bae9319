"""Forms of sizes that are only known as numbers: what a size does when widths change, one at a time and all together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping

from edgeprune.graph.forms import SizeForm

Shapes = Mapping[str, tuple[int, ...]]

_TRIALS = 4


class FittedForms:
    """Looks shapes up at planned widths and says which form each size has; a form counts only if it holds at random widths.

    Args:
        sizes: Dense width of every group.
        shapes: Shapes of all tensors at some widths.

    Attributes:
        dense: Shapes at the dense widths.
    """

    def __init__(self, sizes: Mapping[str, int], shapes: Callable[[Mapping[str, int]], Shapes]) -> None:
        self.sizes = dict(sizes)
        self.dense = shapes(self.sizes)
        self._narrow = {name: shapes({**self.sizes, name: max(1, size // 2)}) for name, size in self.sizes.items()}
        dice = random.Random(0)
        drawn = [{name: dice.randint(1, size) for name, size in self.sizes.items()} for _ in range(_TRIALS)]
        self._trials = [(widths, shapes(widths)) for widths in drawn]

    def of(self, tensor: str) -> tuple[SizeForm | None, ...]:
        """Forms of the axes of a tensor: constants, sums of widths, multiples of a product of two; None of any other."""
        return tuple(self._axis(tensor, axis) for axis in range(len(self.dense[tensor])))

    def _axis(self, tensor: str, axis: int) -> SizeForm | None:
        size = self.dense[tensor][axis]
        change = {
            name: size - shapes[tensor][axis]
            for name, shapes in self._narrow.items()
            if len(shapes[tensor]) == len(self.dense[tensor]) and shapes[tensor][axis] != size
        }
        tried: list[SizeForm] = []
        slopes = {name: lost / (self.sizes[name] - max(1, self.sizes[name] // 2)) for name, lost in change.items()}
        if all(slope == int(slope) for slope in slopes.values()):
            terms = tuple(((name,), int(slope)) for name, slope in sorted(slopes.items()))
            constant = size - sum(int(slope) * self.sizes[name] for name, slope in slopes.items())
            tried.append(SizeForm(constant, terms))
        for first, second in itertools.combinations(sorted(change), 2):
            product = self.sizes[first] * self.sizes[second]
            if len(change) == 2 and size % product == 0:
                tried.append(SizeForm(0, (((first, second), size // product),)))
        return next((form for form in tried if self._holds(form, tensor, axis)), None)

    def _holds(self, form: SizeForm, tensor: str, axis: int) -> bool:
        return all(
            len(shapes[tensor]) > axis and form.at(widths) == shapes[tensor][axis] for widths, shapes in self._trials
        )
