"""A model as training would leave it, where it was not trained: an exporter folds zeros away, and other kernels are left."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SPREAD = 0.01
_GOLDEN = 0.6180339887498949


def in_trained_form(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, or a copy in which no vector of weights or statistics has all its entries equal, and no two are equal.

    Biases begin at 0, and so do the means of batch norms: folded into a convolution they give a bias of zeros, which the
    exporter leaves out. A convolution without a bias is another kernel than the one that the trained model runs, so a latency
    table of the former would know nothing of the latter. Of vectors that are equal the exporter keeps one, for layers whose
    widths have nothing to do with each other.

    Args:
        model: To be exported; not changed.
    """
    import torch

    if not any(True for _ in _begun(model)):
        return model
    found = copy.deepcopy(model)
    with torch.no_grad():
        for index, vector in enumerate(_begun(found)):
            # Multiples of the golden ratio, modulo 1, spread evenly: as far apart as so many numbers can be.
            spread = _SPREAD * (1 + (index * _GOLDEN) % 1)
            ends = torch.linspace(-spread, spread, len(vector), dtype=vector.dtype, device=vector.device)
            # Of one entry the only value of that line is its lower end, which is not 0 either.
            vector.add_(ends)
    return found


def _begun(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for tensor in chain(model.parameters(), model.buffers()):
        vector = tensor.detach()
        if vector.ndim == 1 and len(vector) and vector.is_floating_point() and bool((vector == vector[0]).all()):
            yield vector
