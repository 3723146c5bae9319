"""Layer-adaptive magnitude: the share of a unit in what is left when it is the next to go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from edgeprune.criteria._base import Criterion, Normalization
from edgeprune.criteria.l2 import L2

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.tasks.task import Task


class Lamp(Criterion):
    """``n_u ** 2 / sum of n_v ** 2 over all units v of the group that are not smaller``, with `n` the norm of `L2`.

    The paper scores single weights within a layer: their squares over the sum of all squares that survive when everything
    smaller is gone. For channels a unit takes the place of a weight and its group that of the layer, so within a group units
    rank as by `L2`; what is new is how groups compare. One minus a score is the share of the squared norm that is left after
    the removal, hence all of them multiply to the share that is kept. The last unit of a group has score 1.

    Source: J. Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021. Of equal units, which
    the paper and its code order by chance, the last one goes first, as in `edgeprune.criteria.damage.best_units`.
    """

    name: ClassVar[str] = "lamp"
    needs_task: ClassVar[bool] = False
    # Scores are made to be compared across layers as they are.
    normalization: ClassVar[Normalization] = "none"

    def score(
        self, graph: ChannelGraph, model: nn.Module, task: Task | None = None, *, groups: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[np.float64]]:
        """See `Criterion.score`; `task` is not used."""
        return {name: _lamp(norms**2) for name, norms in L2().score(graph, model, groups=groups).items()}


def _lamp(squares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    descending = np.argsort(-squares, kind="stable")
    survivors = np.cumsum(squares[descending])
    scores = np.zeros(len(squares))
    np.divide(squares[descending], survivors, out=scores, where=survivors > 0)
    found = np.empty(len(squares))
    found[descending] = scores
    return found
