"""Several processes that train one model together (``torchrun``): who this one is, and what all of them have.

Everything here does nothing, or gives back what it got, where ``torch.distributed`` is not initialized. Where it is, all
processes must call it in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed, nn


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _together() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return distributed.get_rank() if _together() else 0


def shared(tensors: Sequence[torch.Tensor]) -> None:
    """Give all processes the tensors of the first, in place."""
    if count() > 1:
        with torch.no_grad():
            for tensor in tensors:
                # Communication wants one block of memory.
                whole = tensor.detach().to(_wire()).contiguous()
                distributed.broadcast(whole, src=0)
                tensor.copy_(whole)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by the mean over the processes; one that is missing counts as 0, unless all miss it."""
    if count() == 1:
        return
    with torch.no_grad():
        there = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        flat = torch.cat([there.to(parts[0]), *(part.flatten() for part in parts)]).to(_wire())
        distributed.all_reduce(flat)
        used = flat[: len(parts)].tolist()
        means = torch.split(flat[len(parts) :] / count(), [part.numel() for part in parts])
        for parameter, mean, users in zip(parameters, means, used, strict=True):
            if users:
                parameter.grad = mean.view_as(parameter).to(parameter)


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replace floating-point tensors by their mean over the processes, in place."""
    if count() > 1:
        with torch.no_grad():
            for tensor in tensors:
                if tensor.is_floating_point():
                    total = tensor.detach().to(_wire(), copy=True).contiguous()
                    distributed.all_reduce(total)
                    tensor.copy_(total / count())


def summed(values: Sequence[float]) -> list[float]:
    """The sum of each number over the processes."""
    if count() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=_wire())
    distributed.all_reduce(total)
    found: list[float] = total.tolist()
    return found


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all processes in order; they may differ in the length of axis 0."""
    if count() == 1:
        return [tensor]
    own = tensor.detach().to(_wire())
    length = torch.tensor([own.shape[0]], device=own.device)
    lengths = [torch.zeros_like(length) for _ in range(count())]
    distributed.all_gather(lengths, length)
    longest = max(int(one) for one in lengths)
    padded = own.new_zeros((longest, *own.shape[1:]))
    padded[: own.shape[0]] = own
    every = [torch.empty_like(padded) for _ in range(count())]
    distributed.all_gather(every, padded)
    return [one[: int(size)].to(tensor.device) for one, size in zip(every, lengths, strict=True)]


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _wire() -> torch.device:
    """Where the processes can communicate from: NCCL knows no tensors of the CPU."""
    nccl = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
