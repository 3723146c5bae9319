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
    """The model itself, or a copy in which parameters and vectors of statistics have unlike entries, and are unlike each other.

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
        for index, begun in enumerate(_begun(found)):
            # Multiples of the golden ratio, modulo 1, spread evenly: as far apart as so many numbers can be.
            spread = _SPREAD * (1 + (index * _GOLDEN) % 1)
            ends = torch.linspace(-spread, spread, begun.numel(), dtype=begun.dtype, device=begun.device)
            # Of one entry the only value of that line is its lower end, which is not 0 either.
            begun.add_(ends.view_as(begun))
    return found


def _begun(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    # A buffer of more axes is a mask or a grid, which training leaves as it is.
    vectors = (buffer for buffer in model.buffers() if buffer.ndim == 1)
    for tensor in chain(model.parameters(), vectors):
        values = tensor.detach()
        if not values.ndim or not values.numel() or not values.is_floating_point():
            continue
        if bool((values == values.flatten()[0]).all()):
            yield values
