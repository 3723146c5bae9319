"""Losses without labels for the damage of tiles: what a change of the weights does to the outputs.

Both take the outputs of a batch, a tensor of shape [samples, ...], and ignore the targets: give one as the loss of a
`Task`. Where the outputs have another form, wrap it: ``lambda outputs, _: loss(outputs["logits"], None)``.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch

from edgeprune.errors import TaskError


def squared_outputs(outputs: Any, targets: Any) -> torch.Tensor:
    """Mean of the squared outputs, as in the published form of LPViT.

    Its gradient grows with the scale of the outputs, and says what moves large outputs, not what moves any: `projected_outputs`
    is what the paper's objective asks for.

    Source: K. Xu et al., "LPViT: Low-Power Semi-structured Pruning for Vision Transformers", ECCV 2024, official code.
    """
    del targets
    return (_tensor(outputs) ** 2).mean()


def projected_outputs(outputs: Any, targets: Any) -> torch.Tensor:
    """Outputs times random signs, summed and divided by the square root of the samples.

    With `g` the gradient of one batch, the expectation of ``(g . d) ** 2`` over the signs is the mean over samples of
    ``|J d| ** 2``: to first order in `d`, the squared change of the output that a change `d` of the weights makes. So the mean
    over batches estimates ``E |f(x; W + d) - f(x; W)| ** 2``, the damage in the objective of LPViT, without labels. The
    loss itself means nothing. The signs follow from the outputs, so the same batch has the same ones each time.

    Source: M. Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989 (the random signs).
    """
    del targets
    values = _tensor(outputs)
    # The bytes of the outputs: numbers that differ from batch to batch, and not from run to run.
    seed = zlib.crc32(values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    signs = torch.randint(0, 2, values.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    found: torch.Tensor = (values * signs.to(values.device, values.dtype)).sum() / math.sqrt(values.shape[0])
    return found


def _tensor(outputs: Any) -> torch.Tensor:
    if not isinstance(outputs, torch.Tensor) or outputs.ndim < 1 or not outputs.is_floating_point():
        found = (
            f"{outputs.dtype} of shape {tuple(outputs.shape)}" if isinstance(outputs, torch.Tensor) else type(outputs)
        )
        raise TaskError(
            f"outputs must be one tensor of floats, samples first, to be projected, found {found}.",
            hint="a function that takes the tensor out of the outputs and calls this loss",
        )
    return outputs
