"""The state of a training after an epoch, in one file: safetensors with JSON in its header, never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgeprune.errors import ConfigError
from edgeprune.files import replacing

_SCHEMA = 1


def write(path: Path, identity: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], values: Any) -> None:
    """Write a checkpoint whole or not at all; its folder is made where it is missing.

    Args:
        path: File to replace.
        identity: What the training is, JSON values: `read` wants the same.
        tensors: By name.
        values: What else there is, JSON values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"schema": _SCHEMA, "identity": identity, "values": values}
    # Copies: tensors of a model may share memory, which the format has no word for.
    stored = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as draft:
        save_file(stored, draft, {"edgeprune": json.dumps(header)})


def read(path: Path, identity: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], Any] | None:
    """Tensors and values of a checkpoint, or None where there is no file.

    Raises:
        ConfigError: It is of another training, or no checkpoint.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["edgeprune"])
            found, values = header["identity"], header["values"]
            known = header["schema"] == _SCHEMA
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"a checkpoint must be as edgeprune writes it, {path} cannot be read: {error}", hint="remove it"
        ) from error
    differs = different(found, json.loads(json.dumps(identity))) if known else ["version of its format"]
    if differs:
        raise ConfigError(
            f"a checkpoint to go on from must be of the same training, {path} differs in {', '.join(differs)}.",
            hint="remove it, or another path",
        )
    return tensors, values


def different(one: Mapping[str, Any], two: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of what is not the same in two nested mappings."""
    found = []
    for name in dict.fromkeys([*one, *two]):
        here, there = one.get(name), two.get(name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            found += different(here, there, f"{prefix}{name} ")
        elif here != there:
            found.append(f"{prefix}{name}")
    return found


def weights_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
