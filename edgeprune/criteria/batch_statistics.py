"""Batch norms that normalize by the batch for a while: what a cut model computes once its statistics are estimated anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeprune.surgery.program_module import ProgramModule


@contextmanager
def by_batch(model: nn.Module) -> Iterator[None]:
    """Batch norms normalize by the batch for a block, in eval form too; running statistics stay as they are."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, ProgramModule):
                stack.enter_context(module.watched(lambda name, values: None))
            elif isinstance(module, _BatchNorm) and module.track_running_stats:
                stack.callback(setattr, module, "track_running_stats", True)
                stack.callback(setattr, module, "running_var", module.running_var)
                stack.callback(setattr, module, "running_mean", module.running_mean)
                module.track_running_stats = False
                module.running_mean = module.running_var = None
        yield
