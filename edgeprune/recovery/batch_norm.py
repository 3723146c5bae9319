"""Batch-norm re-estimation: after a cut the running statistics describe activations that no longer exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeprune.errors import TaskError
from edgeprune.recovery.evaluation import RecoveryRecord, StepProgress, evaluate
from edgeprune.surgery.program_module import ProgramModule, RunningStatistics
from edgeprune.tasks import ranks
from edgeprune.tasks.batches import batch_count, call, device_of, mode
from edgeprune.tasks.batches import batches as unpacked
from edgeprune.tasks.task import Batches, Task


def reestimate_batch_norm(
    model: nn.Module,
    loader: Batches,
    *,
    batches: int | None = None,
    task: Task | None = None,
    progress: StepProgress | None = None,
) -> RecoveryRecord:
    """Replace the running statistics of every batch norm by exact ones over calibration batches, in place.

    Each batch norm normalizes by its batch while the data pass (so that those behind it see what training would show them),
    and gets mean and unbiased variance over all values that reached it, each sample weighing the same. Momentum settings,
    affine parameters, other layers and train or eval forms stay as they are. If it fails or is interrupted, so do the statistics.
    Where ``torch.distributed`` is initialized, all processes must call it, and the values of all count.

    Args:
        model: Changed in place.
        loader: Batches of training data; targets are not used.
        batches: Most batches; None means all.
        task: For the metrics before and after in the record.
        progress: Told the batches done.

    Returns:
        A record; its details say how many ``batches`` were used and how many ``batch_norms`` there are.

    Raises:
        TaskError: The loader is empty, a batch is not a pair, or a batch norm sees a single value per channel.
    """
    norms = _batch_norms(model)
    before = evaluate(model, task) if task is not None else {}
    count = 0
    if norms:
        total = _length(loader, batches)
        device = device_of(model)
        with (
            _kept_unless_complete(norms) as complete,
            ExitStack() as hooks,
            mode(model, training=False),
            torch.no_grad(),
        ):
            sums = {name: _Moments() for name in norms}

            def look(name: str, values: torch.Tensor) -> None:
                _require_spread(name, values)
                sums[name].add(values)

            for prefix, module in model.named_modules():
                if isinstance(module, ProgramModule):
                    hooks.enter_context(module.watched(partial(_in_program, look, prefix)))
                elif prefix in norms:
                    module.training = True
                    hooks.callback(module.register_forward_pre_hook(partial(_before, look, prefix)).remove)
            for inputs, _ in unpacked(loader, "calibration data", device, batches):
                call(model, inputs)
                count += 1
                if progress is not None:
                    progress("re-estimating batch norm", count, max(count, total))
            for name, norm in norms.items():
                sums[name].pool(norm)
                sums[name].store(norm, count)
            complete.append(True)
    after = evaluate(model, task) if task is not None else {}
    return RecoveryRecord("batch_norm", before, after, {"batches": count, "batch_norms": len(norms)})


@dataclass
class _Moments:
    """Pooled mean and sum of squared deviations per channel, merged batch by batch (stable for large means)."""

    count: int = 0
    mean: torch.Tensor | None = None
    deviations: torch.Tensor | None = None

    def add(self, values: torch.Tensor) -> None:
        """Take in activations of shape (batch, channels, ...)."""
        axes = [axis for axis in range(values.ndim) if axis != 1]
        exact = values.double()
        count = values.numel() // values.shape[1]
        mean = exact.mean(dim=axes)
        self._merge(count, mean, exact.var(dim=axes, unbiased=False) * count)

    def _merge(self, count: int, mean: torch.Tensor, deviations: torch.Tensor) -> None:
        if self.mean is None or self.deviations is None:
            self.count, self.mean, self.deviations = count, mean, deviations
            return
        total = self.count + count
        shift = mean - self.mean
        self.deviations = self.deviations + deviations + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def pool(self, norm: RunningStatistics) -> None:
        """Take in what the other processes have seen."""
        if ranks.count() == 1:
            return
        zeros = torch.zeros_like(norm.mean, dtype=torch.float64)
        mean = zeros if self.mean is None else self.mean
        deviations = zeros if self.deviations is None else self.deviations
        own = torch.stack([mean, deviations, torch.full_like(mean, self.count)])
        self.count, self.mean, self.deviations = 0, None, None
        for mean, deviations, counts in ranks.gathered(own):
            if count := int(counts[0]):
                self._merge(count, mean, deviations)

    def store(self, norm: RunningStatistics, batches: int) -> None:
        """Write the statistics into a batch norm that data has reached; one that no data reached keeps its own."""
        if self.mean is None or self.deviations is None:
            return
        norm.mean.copy_(self.mean)
        norm.variance.copy_(self.deviations / max(self.count - 1, 1))
        if norm.counter is not None:
            norm.counter.fill_(batches)


def _batch_norms(model: nn.Module) -> dict[str, RunningStatistics]:
    """Every batch norm with running statistics: modules by their name, those of a cut program by its name and their mean's."""
    found: dict[str, RunningStatistics] = {}
    for name, module in model.named_modules():
        if isinstance(module, ProgramModule):
            found |= {f"{name}:{mean}": norm for mean, norm in module.batch_norms().items()}
        elif isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            found[name] = RunningStatistics(module.running_mean, module.running_var, module.num_batches_tracked)
    return found


Look = Callable[[str, torch.Tensor], None]


def _before(look: Look, name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    look(name, args[0])


def _in_program(look: Look, prefix: str, mean: str, values: torch.Tensor) -> None:
    look(f"{prefix}:{mean}", values)


def _require_spread(name: str, values: torch.Tensor) -> None:
    if values.numel() // values.shape[1] < 2:
        raise TaskError(
            f"calibration batches must give batch norm {name!r} at least 2 values per channel, "
            f"found 1 at shape {tuple(values.shape)}.",
            hint="a larger batch size, or drop_last=True",
        )


@contextmanager
def _kept_unless_complete(norms: dict[str, RunningStatistics]) -> Iterator[list[bool]]:
    """Put the statistics back unless the block marks itself complete; passing data changes them on the way."""
    kept = [(buffer, buffer.clone()) for norm in norms.values() for buffer in norm if buffer is not None]
    complete: list[bool] = []
    try:
        yield complete
    finally:
        if not complete:
            for buffer, before in kept:
                buffer.copy_(before)


def _length(loader: Batches, limit: int | None) -> int:
    known = batch_count(loader) or 0
    return known if limit is None else min(known, limit)
