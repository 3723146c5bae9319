"""Which weights an artifact was made of, as a hash."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sha256_of_weights(module: torch.nn.Module) -> str:
    """Hash of a module's state: names, types, shapes and values of its parameters and buffers, whatever file they came from."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue
        if value.layout != torch.strided:
            value = value.to_dense()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # As bytes: NumPy has no name for some of torch's types.
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
