"""A copy of the user's model, or the reason why there can be none."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from edgeprune.errors import ModelError

_COMPUTED = "graph leaves"
"""Part of what torch says of a tensor that was computed with gradients and is an attribute of a module."""


def copied(model: nn.Module, shared: Mapping[int, Any], error: type[ModelError]) -> nn.Module:
    """A deep copy of a module tree.

    Args:
        model: Of the user.
        shared: By identity, what the copy has in place of things instead of copies of them.
        error: Raised where it cannot be copied.
    """
    try:
        return copy.deepcopy(model, dict(shared))
    except (RuntimeError, TypeError, AttributeError, ValueError) as found:
        lines = str(found).splitlines() or ["no message"]
        raise error(
            f"the model must be copyable with copy.deepcopy, found: {type(found).__name__}: {lines[0]}",
            hint="run the model once under torch.no_grad(), or undo what stores computed weights in it "
            "(torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove)"
            if _COMPUTED in str(found)
            else None,
        ) from found
